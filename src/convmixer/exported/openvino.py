"""OpenVINO files: the graph as XML, the weights next to it in a .bin file."""

import re
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from convmixer.errors import RequestError
from convmixer.exported import onnx

if TYPE_CHECKING:
    from convmixer.exported.source import Source

XML_BYTES = 256 * 2**20
# As for ONNX: layers that neither loop, branch nor read files.
_LAYERS = """
    Abs Add AvgPool BatchNormInference Broadcast Ceiling Clamp Concat Const Convert ConvertLike Convolution
    ConvolutionBackpropData Cos CumSum DepthToSpace Divide Einsum Elu Equal Erf Exp FakeConvert FakeQuantize Floor
    FloorMod Gather GatherElements GatherND Gelu Greater GreaterEqual GridSample GroupConvolution
    GroupConvolutionBackpropData GroupNormalization HSigmoid HSwish HardSigmoid Identity Interpolate LRN Less
    LessEqual Log LogSoftmax LogicalAnd LogicalNot LogicalOr LogicalXor MVN MatMul MaxPool Maximum Minimum Mish Mod
    Multiply Negative NormalizeL2 NotEqual PReLU Pad Parameter Power RMS Range ReLU ReduceL1 ReduceL2
    ReduceLogicalAnd ReduceLogicalOr ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum Reshape Result Round
    ScaledDotProductAttention ScatterElementsUpdate ScatterNDUpdate ScatterUpdate Select Selu ShapeOf Sigmoid Sign
    Sin Slice SoftMax SoftPlus Softmax SoftSign SpaceToDepth Split Sqrt SquaredDifference Squeeze StridedSlice
    Subtract Swish Tan Tanh Tile TopK Transpose Unsqueeze VariadicSplit
    """
LAYERS = frozenset(_LAYERS.split())


def import_openvino() -> Any:
    """Return the openvino module, imported without its telemetry package."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino


def write(path: Path, source: "Source") -> None:
    """Write a model as a pair of OpenVINO files, converted from ONNX."""
    openvino = import_openvino()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        file.write_bytes(onnx.to_model(replace(source, precision="fp32")).SerializeToString())
        model = openvino.convert_model(file)
    if source.precision == "int8":
        model = _to_int8(model, source)
    _name_by_place(model)
    for name, text in source.texts.items():
        model.set_rt_info(text, ["convmixer", name])
    for name, text in _model_info(source).items():
        model.set_rt_info(text, ["model_info", name])
    openvino.save_model(model, path, compress_to_fp16=source.precision == "fp16")


def check(path: Path) -> None:
    """Check a pair of files with OpenVINO's own reader.

    Raises:
        RuntimeError: It cannot be read.
    """
    import_openvino().Core().read_model(path).validate_nodes_and_infer_types()


def _model_info(source: "Source") -> dict[str, str]:
    """Return the metadata for OpenVINO's Model API: mean and scale for values of 0 to 255, labels without spaces."""
    p = source.preprocessing
    return {
        "model_type": "Classification",
        "labels": " ".join(re.sub(r"\s+", "_", name) or "_" for name in source.classes),
        "mean_values": " ".join(str(255 * value) for value in p.mean),
        "scale_values": " ".join(str(255 * value) for value in p.std),
        "reverse_input_channels": str(p.in_chans == 3),  # the Model API reads images as BGR
        "resize_type": "crop",
        "output_raw_scores": "False",
        "multilabel": "False",
    }


def _to_int8(model: Any, source: "Source") -> Any:
    import nncf

    return nncf.quantize(
        model,
        nncf.Dataset(source.calibration),
        preset=nncf.QuantizationPreset.MIXED,
        subset_size=len(source.calibration),
        ignored_scope=nncf.IgnoredScope(names=_not_pointwise(model)),
    )


def _not_pointwise(model: Any) -> list[str]:
    """Return the names of an OpenVINO model's convolutions and matrix products that are not pointwise convolutions.

    These operations are not quantised, see `onnx._pointwise`. The list is empty if the model has no depthwise
    convolution.
    """
    names, depthwise = [], False
    for op in model.get_ops():
        kind = op.get_type_name()
        depthwise |= kind == "GroupConvolution"
        wide = kind == "Convolution" and list(op.input(1).get_shape())[2:] != [1, 1]
        if wide or kind in ("GroupConvolution", "MatMul"):
            names.append(op.get_friendly_name())
    return names if depthwise else []


def _name_by_place(model: Any) -> None:
    """Name the layers by kind and position: OpenVINO's own names depend on all layers that the process has made."""
    seen: Counter[str] = Counter()
    for op in model.get_ordered_ops():
        kind = op.get_type_name()
        if kind not in ("Parameter", "Result"):
            op.set_friendly_name(f"{kind}_{seen[kind]}")
            seen[kind] += 1


def read(path: Path, threads: int) -> tuple[Callable[[np.ndarray], Any], dict[str, str]]:
    """Return a function that runs an OpenVINO model on a batch, and the model's metadata.

    Raises:
        RequestError: The files contain something that our exports do not contain.
    """
    openvino = import_openvino()
    graph, weights = _graph(path), _weights(path)
    if len(weights) != _weight_bytes(graph):
        raise RequestError(f"{path.with_suffix('.bin')} does not belong to {path}: export the model again")
    core = openvino.Core()
    # written again from the checked graph: OpenVINO's parser may read the original file differently
    model = core.read_model(ElementTree.tostring(graph), weights)
    # the default precision is bf16 if the processor has it, which would not agree with the model
    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"}
    if threads:
        settings["INFERENCE_NUM_THREADS"] = threads
    compiled = core.compile_model(model, "CPU", settings)
    texts = {entry.tag: entry.get("value", "") for entry in graph.iterfind("rt_info/convmixer/*")}
    return lambda batch: [np.array(part) for part in compiled(batch).to_tuple()], texts


class _NoEntities(ElementTree.TreeBuilder):
    def doctype(self, *args: Any) -> None:
        raise ValueError("it declares a document type")  # which may hold entities that grow without end


def _graph(path: Path) -> ElementTree.Element:
    """Return the XML of a graph, after checking that all of its layers are in `LAYERS`."""
    if path.stat().st_size > XML_BYTES:
        raise RequestError(f"{path} is larger than {XML_BYTES >> 20} MiB")
    root = ElementTree.fromstring(path.read_bytes(), ElementTree.XMLParser(target=_NoEntities()))
    if [part.tag for part in root].count("layers") != 1 or root.tag != "net":
        raise ValueError("it holds no graph")
    for layer in root.iter("layer"):
        kind, version = layer.get("type", ""), layer.get("version", "")
        if kind not in LAYERS or not re.fullmatch(r"opset\d+", version):
            raise RequestError(f"{path} holds the layer {kind[:80]!r}, which `convmixer export` never writes")
    if any(True for tag in ("body", "then_body", "else_body", "port_map", "back_edges") for _ in root.iter(tag)):
        raise RequestError(f"{path} holds a graph within a graph, which `convmixer export` never writes")
    return root


def _weights(path: Path) -> bytes:
    weights = path.with_suffix(".bin")
    if not weights.is_file():  # a pipe would never end
        raise RequestError(f"{weights} is missing or is not a regular file")
    return weights.read_bytes()


def _weight_bytes(graph: ElementTree.Element) -> int:
    """Return the size of the weights that a graph refers to."""
    parts = [layer.find("data") for layer in graph.iter("layer") if layer.get("type") == "Const"]
    ends = (int(part.get("offset", "")) + int(part.get("size", "")) for part in parts if part is not None)
    return max(ends, default=0)
