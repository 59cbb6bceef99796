"""ONNX files, run by ONNX Runtime without torch."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from convmixer.errors import RequestError

FACTS = ("classes", "preprocessing", "about")
# Operators that compute tensors from tensors in one step: none that loops, branches, calls a function, draws random
# numbers, or gives an output whose size depends on the values of its input.
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
    """Return the onnxruntime module with its telemetry off (it reads the variable when it is imported)."""
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    import onnxruntime

    return onnxruntime


def read(path: Path, threads: int) -> tuple[Callable[[np.ndarray], Any], dict[str, str]]:
    """Return what runs an ONNX file and its metadata; see `read_bytes`."""
    return read_bytes(path.read_bytes(), path, threads)


def read_bytes(content: bytes, path: Path, threads: int) -> tuple[Callable[[np.ndarray], Any], dict[str, str]]:
    """Return what runs an ONNX model, and its metadata.

    Args:
        content: The model.
        path: Where it is from, for messages; nothing beside it is read.
        threads: Processor threads; 0: the runtime's choice.

    Raises:
        RequestError: The model holds what an export does not.
    """
    import onnx

    runtime = import_onnxruntime()
    model = onnx.load_model_from_string(content)
    check_graph(model, path)
    model.DiscardUnknownFields()  # what this reader does not know must not reach the runtime
    texts = {entry.key: entry.value for entry in model.metadata_props if entry.key in FACTS}
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    session = runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda batch: session.run(None, {"images": batch}), texts


def check_graph(model: Any, path: Path) -> None:
    """Check that an ONNX model is one graph of plain operators that holds all of its weights.

    Raises:
        RequestError: It loops, branches, calls functions or custom operators, or takes weights from other files.
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
