"""Tiny ONNX models with the metadata of an export, made in milliseconds and without torch."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

P = {"img_size": 8, "in_chans": 1, "mean": [0.5], "std": [0.5], "interpolation": "bicubic", "crop_pct": 1.0}
FACTS: dict[str, Any] = {"classes": ["a", "b"], "preprocessing": P, "about": {"precision": "fp32"}}


def constant(name: str, values: Any, kind: Any = np.int64) -> onnx.TensorProto:
    return numpy_helper.from_array(np.array(values, kind), name)


LOGITS = [
    helper.make_node("ReduceMean", ["images", "axes"], ["mean"], keepdims=0),
    helper.make_node("Concat", ["mean", "mean"], ["sound"], axis=1),
]


def model(
    nodes: Sequence[onnx.NodeProto], constants: Sequence[onnx.TensorProto] = (), **facts: Any
) -> onnx.ModelProto:
    """A model from images (B, 1, 8, 8) to logits (B, 2); the nodes before the end may use `sound`, (B, 2)."""
    shapes = [("images", ["batch", 1, 8, 8]), ("logits", ["batch", 2])]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes]
    constants = [constant("axes", [2, 3]), *constants]
    graph = helper.make_graph([*LOGITS, *nodes], "g", ends[:1], ends[1:], constants)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    helper.set_model_props(proto, {name: json.dumps(value) for name, value in (FACTS | facts).items()})
    return proto


SOUND = [helper.make_node("Identity", ["sound"], ["logits"])]


def saved(path: Path, proto: onnx.ModelProto) -> Path:
    path.write_bytes(proto.SerializeToString())
    return path
