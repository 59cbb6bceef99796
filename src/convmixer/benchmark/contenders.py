"""The contenders: ours and the peers (other runtimes). Each has a function that prepares a case and returns its step.

If the package of a peer is missing, its function raises `ImportError`, and the caller reports the peer as missing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from convmixer.benchmark.case import Case, batch, build
from convmixer.exported.onnx import import_onnxruntime
from convmixer.exported.openvino import import_openvino
from convmixer.exported.quiet import quiet
from convmixer.files import cache_folder

Step = Callable[[], object]


@dataclass(frozen=True)
class Contender:
    """One way to run a network.

    Args:
        name: Its name in tables and for `--peers`, e.g. "eager-bf16-nhwc".
        prepare: Case -> step; it also does everything that is done only once.
        slow_start: Whether it compiles for long, so that the limit on the time to compile applies.
    """

    name: str
    prepare: Callable[[Case], Step]
    slow_start: bool = False


def ours(task: str) -> Contender:
    """Return this package's contender: `accelerate` for training, `optimize_for_inference` for inference."""
    return Contender("ours", _ours_train if task == "train" else _ours_infer)


def peers(task: str, precision: str) -> list[Contender]:
    """Return the peers of a task. For training in bf16, PyTorch in fp32 is a peer too, because it may be faster."""
    if task == "infer":
        return _infer_peers(precision)
    precisions = ("fp32", "bf16") if precision == "bf16" else ("fp32",)
    eager = [_eager(p, layout, _train_step) for p in precisions for layout in ("nchw", "nhwc")]
    return eager + [Contender(f"compile-{p}", _compiled_train(p), True) for p in precisions]


def _infer_peers(precision: str) -> list[Contender]:
    torch_peers = [_eager(precision, layout, _infer_step) for layout in ("nchw", "nhwc")]
    torch_peers.append(Contender(f"compile-freezing-{precision}", _compiled_infer(precision), True))
    onnx = Contender(f"onnxruntime-{precision}", _onnxruntime)
    openvino = Contender(f"openvino-{precision}", _openvino)
    # eager PyTorch has no int8, ONNX Runtime no bf16 on CPUs
    return {
        "fp32": [*torch_peers, onnx, openvino],
        "bf16": [*torch_peers, openvino],
        "int8": [onnx, openvino],
    }[precision]


# PyTorch


def _eager(precision: str, layout: str, step: Callable[[nn.Module, Case, str], Step]) -> Contender:
    def prepare(case: Case) -> Step:
        model = build(case)
        return step(model.to(memory_format=torch.channels_last) if layout == "nhwc" else model, case, precision)

    return Contender(f"eager-{precision}-{layout}", prepare)


def _ours_train(case: Case) -> Step:
    from convmixer.fast import accelerate

    return _train_step(accelerate(build(case)), case, case.precision)


def _ours_infer(case: Case) -> Step:
    from convmixer.fast import optimize_for_inference

    images = batch(case)[0]
    model = optimize_for_inference(build(case).eval(), case.precision, calibration=images)
    return lambda: model(images)


def _compiled_train(precision: str) -> Callable[[Case], Step]:
    def prepare(case: Case) -> Step:
        model = build(case).to(memory_format=torch.channels_last)
        return _train_step(torch.compile(model), case, precision)  # type: ignore[arg-type]

    return prepare


def _compiled_infer(precision: str) -> Callable[[Case], Step]:
    def prepare(case: Case) -> Step:
        model = build(case).eval().to(memory_format=torch.channels_last)
        return _infer_step(torch.compile(model, options={"freezing": True}), case, precision)  # type: ignore[arg-type]

    return prepare


def _layout(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    weight = next(p for p in model.parameters() if p.ndim == 4 and p.shape[1] > 1)
    nhwc = weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    return images.to(memory_format=torch.channels_last) if nhwc else images


def _autocast(precision: str) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")


def _train_step(model: nn.Module, case: Case, precision: str) -> Step:
    images, labels = batch(case)
    images = _layout(model, images)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        with _autocast(precision):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()

    return step


def _infer_step(model: nn.Module, case: Case, precision: str) -> Step:
    model, images = model.eval(), _layout(model, batch(case)[0])
    compiled = hasattr(model, "_orig_mod")
    if precision == "bf16" and not compiled:  # autocast would cast all weights again at every step
        model, images = model.bfloat16(), images.bfloat16()

    def step() -> torch.Tensor:
        with torch.no_grad() if compiled else torch.inference_mode(), _autocast(precision if compiled else "fp32"):
            logits: torch.Tensor = model(images)
            return logits

    return step


# ONNX Runtime and OpenVINO; converting large networks takes minutes, so the files are kept


def _onnxruntime(case: Case) -> Step:
    onnxruntime = import_onnxruntime()
    onnxruntime.set_default_logger_severity(3)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = case.threads
    path = _onnx_int8(case) if case.precision == "int8" else _onnx(case)
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: batch(case)[0].numpy()}
    return lambda: session.run(None, feed)


def _openvino(case: Case) -> Step:
    openvino = import_openvino()
    core = openvino.Core()
    model = core.read_model(_openvino_int8(case, core) if case.precision == "int8" else _onnx(case))
    # OpenVINO's default is bf16 if the processor has it; with int8, bf16 is fastest for the rest of the network
    config = {
        "INFERENCE_PRECISION_HINT": "f32" if case.precision == "fp32" else "bf16",
        "INFERENCE_NUM_THREADS": case.threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = core.compile_model(model, "CPU", config).create_infer_request()
    images = openvino.Tensor(batch(case)[0].numpy())
    return lambda: request.infer([images])


def _cache(case: Case) -> Path:
    folder = cache_folder("benchmark", f"{case.model}_{case.act}_{case.img_size}_{case.num_classes}")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _onnx(case: Case) -> Path:
    """Return the network as ONNX for its batch size, because both runtimes are fastest with a fixed shape."""
    path = _cache(case) / f"b{case.batch_size}-torch{torch.__version__}.onnx"
    if not path.exists():
        program = torch.onnx.export(build(case).eval(), (batch(case)[0],), dynamo=True, verbose=False)
        assert program is not None
        program.save(str(path))
    return path


def _onnx_int8(case: Case) -> Path:
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = [{"x": batch(case)[0].numpy()}]

        def get_next(self) -> dict[str, np.ndarray] | None:
            return self.left.pop() if self.left else None

    source = _onnx(case)
    path = source.with_name(source.stem + "-ort-int8.onnx")
    if not path.exists():
        ready = source.with_name(source.stem + "-prepared.onnx")
        int8: dict[str, Any] = {"weight_type": QuantType.QInt8, "activation_type": QuantType.QUInt8}
        with quiet():
            quant_pre_process(str(source), str(ready))
            quantize_static(str(ready), str(path), Reader(), per_channel=True, **int8)
    return path


def _openvino_int8(case: Case, core: Any) -> Path:
    import nncf

    openvino = import_openvino()
    source = _onnx(case)
    path = source.with_name(source.stem + "-openvino-int8.xml")
    if not path.exists():
        dataset = nncf.Dataset([batch(case)[0].numpy()])
        with quiet():
            openvino.save_model(nncf.quantize(core.read_model(source), dataset, subset_size=1), path)
    return path
