"""ONNX files: written through torch's exporter, run by ONNX Runtime without torch."""

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from convmixer.errors import RequestError

if TYPE_CHECKING:
    from convmixer.exported.source import Source

FACTS = ("classes", "preprocessing", "about")
# Operators that neither loop, branch, call a function nor draw random numbers. Some (Expand, Tile, Range, Resize) can
# still make huge outputs from small inputs, so models also run in a process with limits on memory and time.
_OPERATORS = """
    Abs Add And ArgMax ArgMin Attention AveragePool BatchNormalization Cast CastLike Ceil Celu Clip Concat Constant
    ConstantOfShape Conv ConvInteger ConvTranspose Cos CumSum DepthToSpace DequantizeLinear Div Dropout
    DynamicQuantizeLinear Einsum Elu Equal Erf Exp Expand Flatten Floor Gather GatherElements GatherND Gelu Gemm
    GlobalAveragePool GlobalMaxPool Greater GreaterOrEqual GridSample GroupNormalization HardSigmoid HardSwish
    Identity InstanceNormalization LRN LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax LpNormalization
    LpPool MatMul MatMulInteger Max MaxPool Mean MeanVarianceNormalization Min Mish Mod Mul Neg Not Or PRelu Pad Pow
    QLinearConv QLinearMatMul QuantizeLinear RMSNormalization Range Reciprocal ReduceL1 ReduceL2 ReduceLogSum
    ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Reshape Resize Round
    ScatterElements ScatterND Selu Shape Sigmoid Sign Sin Size Slice Softmax Softplus Softsign SpaceToDepth Split
    Sqrt Squeeze Sub Sum Swish Tan Tanh Tile TopK Transpose Trilu Unsqueeze Where Xor
    """
OPERATORS = frozenset(_OPERATORS.split())


def import_onnxruntime() -> Any:
    """Return the onnxruntime module with its telemetry off."""
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    import onnxruntime

    return onnxruntime


def write(path: Path, source: "Source") -> None:
    """Write a model as an ONNX file."""
    path.write_bytes(to_bytes(source))


def check(path: Path) -> None:
    """Check a file with the ONNX project's own checker.

    Raises:
        onnx.checker.ValidationError: It is not valid.
    """
    check_bytes(path.read_bytes())


def check_bytes(content: bytes) -> None:
    """Check an ONNX model as `check` does."""
    import onnx

    onnx.checker.check_model(content, full_check=True)


def to_bytes(source: "Source") -> bytes:
    """Return a model as the bytes of an ONNX file, with the metadata that `load.py` and Ultralytics' tools read."""
    import onnx

    model = to_model(source)
    p = source.preprocessing
    customary = {
        "names": str(dict(enumerate(source.classes))),
        "task": "classify",
        "imgsz": str([p.img_size, p.img_size]),
        "channels": str(p.in_chans),
    }
    onnx.helper.set_model_props(model, source.texts | customary)
    content: bytes = model.SerializeToString(deterministic=True)
    return content


def to_model(source: "Source") -> Any:
    """Return a model as an ONNX graph in the source's precision, without metadata."""
    model = _from_torch(source)
    if source.precision == "fp16":
        return _to_fp16(model)
    return _to_int8(model, source.calibration) if source.precision == "int8" else model


def _from_torch(source: "Source") -> Any:
    import torch

    program = torch.onnx.export(
        source.model,
        (source.example,),
        dynamo=True,
        dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
        input_names=["images"],
        output_names=list(source.outputs),
        verbose=False,
    )
    assert program is not None
    return _without_notes(program.model_proto)


def _without_notes(model: Any) -> Any:
    """Return the model without the exporter's notes (local paths, source lines), which are half of a small file."""
    graph = model.graph
    parts = (*graph.node, *graph.value_info, *graph.initializer, *graph.input, *graph.output, graph)
    for part in parts:
        part.doc_string = ""
        del part.metadata_props[:]
    return model


def _to_fp16(model: Any) -> Any:
    import_onnxruntime()
    from onnxruntime.transformers.float16 import convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    converted = OnnxModel(convert_float_to_float16(model, keep_io_types=True))
    converted.topological_sort(is_deterministic=True)  # the converter puts its casts after the nodes that use them
    return converted.model


def _to_int8(model: Any, calibration: Sequence[np.ndarray]) -> Any:
    import onnx

    import_onnxruntime()
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(calibration)

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"images": batch}

    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "int8.onnx"
        quantize_static(
            model,
            target,
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=["Conv"],
            nodes_to_quantize=_pointwise(model),
            # 7 bits: without VNNI (AVX2) the runtime adds two products in 16 bits; 8-bit weights overflow silently
            reduce_range=True,
        )
        return onnx.load(target)


def _pointwise(model: Any) -> list[str] | None:
    """Return the names of the 1x1 convolutions if there are depthwise ones, else None (all).

    The 1x1 convolutions have nearly all of the multiplications and weights. A depthwise kernel and the stem sum few
    values, so their rounding errors do not average out. If they are quantised too, a ConvMixer loses several times as
    much accuracy (docs/log.md).
    """
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    kernels = {node.name: shapes[node.input[1]] for node in model.graph.node if node.op_type == "Conv"}
    depthwise = any(shape[1] == 1 < shape[0] and shape[2] > 1 for shape in kernels.values())
    return [name for name, shape in kernels.items() if shape[2:] == (1, 1)] if depthwise else None


def read(path: Path, threads: int) -> tuple[Callable[[np.ndarray], Any], dict[str, str]]:
    """Return a function that runs an ONNX file on a batch, and the file's metadata; see `read_bytes`."""
    return read_bytes(path.read_bytes(), path, threads)


def read_bytes(content: bytes, path: Path, threads: int) -> tuple[Callable[[np.ndarray], Any], dict[str, str]]:
    """Return a function that runs an ONNX model on a batch, and the model's metadata.

    Args:
        content: The model.
        path: Path of the file, for messages; no file next to it is read.
        threads: Processor threads; 0: the runtime's choice.

    Raises:
        RequestError: The model contains something that our exports do not contain.
    """
    import onnx

    runtime = import_onnxruntime()
    model = onnx.load_model_from_string(content)
    check_graph(model, path)
    model.DiscardUnknownFields()  # fields unknown to this reader must not reach the runtime
    texts = {entry.key: entry.value for entry in model.metadata_props if entry.key in FACTS}
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    session = runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda batch: session.run(None, {"images": batch}), texts


def check_graph(model: Any, path: Path) -> None:
    """Check that an ONNX model is one graph of plain operators that holds all of its weights.

    Raises:
        RequestError: The model has loops, branches, functions, custom operators, or weights in other files.
    """
    from onnx import AttributeProto

    if model.functions or model.training_info or model.graph.sparse_initializer:
        raise _refused(path, "functions, training steps or sparse weights")
    tensors = list(model.graph.initializer)
    for node in model.graph.node:
        if node.domain not in ("", "ai.onnx") or node.op_type not in OPERATORS:
            raise _refused(path, f"the operator {'.'.join(filter(None, (node.domain, node.op_type)))[:80]!r}")
        for attribute in node.attribute:
            kind = attribute.type
            if kind in (AttributeProto.GRAPH, AttributeProto.GRAPHS) or attribute.HasField("g") or attribute.graphs:
                raise _refused(path, "a graph within a graph")
            if attribute.HasField("sparse_tensor") or attribute.sparse_tensors or attribute.HasField("tp"):
                raise _refused(path, "sparse weights or types")
            tensors += [attribute.t, *attribute.tensors]
    if any(tensor.data_location or tensor.external_data for tensor in tensors):
        raise _refused(path, "weights in another file")


def _refused(path: Path, what: str) -> RequestError:
    return RequestError(f"{path} holds {what}, which `convmixer export` never writes")
