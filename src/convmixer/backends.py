"""Running exported files: ONNX, OpenVINO, torch.export, and the model inside a web folder. Writing them: `export.py`.

An exported file carries its class names and preprocessing, so it is used like weights. ONNX files and web folders are
run without importing torch. A .pt2 that could run code of its own when loaded is refused. Neither ONNX Runtime nor
OpenVINO may call home: telemetry is off before the import.
"""

import base64
import io
import json
import os
import re
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from convmixer.errors import RequestError
from convmixer.preprocess import Preprocessing

Run = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray | None]]
SUFFIXES = {".onnx": "onnx", ".xml": "openvino", ".pt2": "torch"}
# What may stand in a .pt2: PyTorch unpickles, evaluates and looks up by name whatever else does.
_PT2_MEMBERS = r"(data/weights/\w+|data/constants/tensor_\w+|data/\w+/model_\w+_config\.json"
_PT2_MEMBERS += r"|data/sample_inputs/model\.pt|models/model\.json|extra/convmixer\.json"
_PT2_MEMBERS += r"|archive_format|archive_version|byteorder|\.data/\w+)"
_PT2_CALLS = r"torch\.ops\.aten\.(?!from_file|save|load)\w+(\.\w+)?|torch\.sym_\w+"
_PT2_CALLS += r"|_operator\.(add|sub|mul|floordiv|truediv|mod|pow|neg|getitem|eq|ne|lt|le|gt|ge)"
_PT2_TYPES = r"builtins\.(tuple|list|dict)|cpu"  # of nested inputs and outputs; of devices
_PT2_SIZES = r"(Symbol\('\w+'(, \w+=True)*\)|(Integer|Rational|Add|Mul|Pow|FloorDiv|Mod|Max|Min)\(|-?\d+|[,) ])*"


@dataclass(frozen=True)
class Exported:
    """An exported model, ready to run.

    Args:
        run: (B, C, H, W) float32 -> logits (B, classes) and class-activation maps (B, k, h, w) of the k likeliest
            classes in falling order, or None where the file has no maps.
        classes: Class names in the order of the logits.
        preprocessing: How an image becomes the input.
        describe: What is in the file: architecture, precision, format, source.
    """

    run: Run
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    describe: dict[str, Any]


def is_exported(path: str | Path) -> bool:
    """Return whether a path names a file or folder that `convmixer export` writes."""
    path = Path(path)
    return path.suffix in SUFFIXES or (path / "model.js").is_file()


def load_exported(path: str | Path, threads: int = 0) -> Exported:
    """Return the model in an exported file.

    Args:
        path: A .onnx, .xml (OpenVINO) or .pt2 (torch.export) file, or a web folder.
        threads: Processor threads for ONNX Runtime and OpenVINO; 0: the runtime's choice.

    Raises:
        RequestError: There is no such file, it cannot be read, it was not written by `convmixer export`, or its
            runtime is not installed.
    """
    path = Path(path)
    if not path.exists():
        raise RequestError(f"{path} does not exist")
    kind = "web" if path.is_dir() else SUFFIXES[path.suffix]
    load = {"onnx": _onnx, "web": _web, "openvino": _openvino, "torch": _torch}[kind]
    try:
        run, texts = load(path, threads)
        about = {name: json.loads(text) for name, text in texts.items()}
        classes, preprocessing = about.pop("classes"), about.pop("preprocessing")
    except RequestError:
        raise
    except ImportError as error:
        raise RequestError(f"{path} needs {error.name}: pip install 'convmixer[{_extra(kind)}]'") from error
    except (KeyError, ValueError) as error:
        raise RequestError(
            f"{path} carries no class names and preprocessing: write it with `convmixer export`"
        ) from error
    except Exception as error:  # each runtime has its own exceptions for a file that is cut or not a model
        raise RequestError(f"{path} cannot be read as a {kind} model: {str(error).splitlines()[0]}") from error
    describe = {"source": str(path), "format": kind, **about.pop("about", {})}
    return Exported(run, tuple(classes), Preprocessing(**preprocessing), describe)


def _extra(kind: str) -> str:
    return "openvino" if kind == "openvino" else "export"


def data_uri(image: bytes) -> str:
    """Return a PNG or JPEG file as a data: URI."""
    kind = "png" if image.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


def import_onnxruntime() -> Any:
    """Return the onnxruntime module with its telemetry off (it reads the variable when it is imported)."""
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    import onnxruntime

    return onnxruntime


def import_openvino() -> Any:
    """Return the openvino module with its telemetry package kept out."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino


def _onnx(path: Path, threads: int) -> tuple[Run, dict[str, str]]:
    return _onnx_session(str(path), threads)


def _web(path: Path, threads: int) -> tuple[Run, dict[str, str]]:
    found = re.search(r'"onnx":\s*"([A-Za-z0-9+/=]+)"', (path / "model.js").read_text(encoding="utf-8"))
    if not found:
        raise RequestError(f"{path}/model.js holds no model: write it again with `convmixer export --format web`")
    return _onnx_session(base64.b64decode(found[1]), threads)


def _onnx_session(model: str | bytes, threads: int) -> tuple[Run, dict[str, str]]:
    runtime = import_onnxruntime()
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def run(batch: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        return _split(session.run(None, {"images": batch}))

    return run, session.get_modelmeta().custom_metadata_map


def _openvino(path: Path, threads: int) -> tuple[Run, dict[str, str]]:
    core = import_openvino().Core()
    model = core.read_model(path)
    # the default precision is bf16 where the processor has it, which would not agree with the model
    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"}
    if threads:
        settings["INFERENCE_NUM_THREADS"] = threads
    compiled = core.compile_model(model, "CPU", settings)
    texts = dict(model.get_rt_info(["convmixer"]).value)

    def run(batch: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        return _split([np.array(part) for part in compiled(batch).to_tuple()])

    return run, texts


def _torch(path: Path, threads: int) -> tuple[Run, dict[str, str]]:
    import torch

    extra = {"convmixer.json": ""}
    model = torch.export.load(_without_code(path), extra_files=extra).module()

    def run(batch: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        with torch.inference_mode():
            return _split([part.numpy() for part in model(torch.from_numpy(batch))])

    return run, json.loads(extra["convmixer.json"])


def _without_code(path: Path) -> io.BytesIO:
    """Return a copy of a .pt2 file that holds tensors and a graph of PyTorch's operations, and nothing pickled.

    Raises:
        RequestError: The file holds anything else, which may run code when it is loaded.
    """
    copy = io.BytesIO()
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(copy, "w") as out:
        for member in archive.namelist():
            name, content = member.partition("/")[2], archive.read(member)
            if not re.fullmatch(_PT2_MEMBERS, name):
                raise _may_run_code(path, member)
            if name.endswith("_config.json"):
                entries = json.loads(content)["config"].values()
                if any(entry["use_pickle"] or not re.fullmatch(r"\w+", entry["path_name"]) for entry in entries):
                    raise _may_run_code(path, "pickled objects")
            elif name == "models/model.json":
                graph = json.loads(content)
                graph["guards_code"] = []  # checks of the input, which would be compiled
                _check_graph(graph, path)
                content = json.dumps(graph).encode()
            elif name.startswith("data/sample_inputs/"):
                content = b""  # pickled, and not needed
            out.writestr(f"model/{name}", content)
    copy.seek(0)
    return copy


def _check_graph(part: Any, path: Path, key: str = "") -> None:
    """Drop the notes on where a graph comes from, and refuse texts that an export of ours would not hold.

    Args:
        part: The graph or a part of it, as JSON.
        path: The file.
        key: What the part is called in the graph.
    """
    if isinstance(part, dict):
        if "metadata" in part:
            part["metadata"] = {}  # sources and classes, which would be looked up
        for name, value in part.items():
            _check_graph(name, path)
            _check_graph(value, path, name)
    elif isinstance(part, list):
        for value in part:
            _check_graph(value, path, key)
    elif isinstance(part, str) and key in ("in_spec", "out_spec"):
        _check_graph(json.loads(part), path)
    elif isinstance(part, str):
        # most are names, which become Python source: no more than letters, digits, "_" and "."
        allowed = {"target": _PT2_CALLS, "expr_str": _PT2_SIZES, "torch_version": ".*", "type": _PT2_TYPES}
        allowed["context"] = r"null|\[\]"
        if not re.fullmatch(allowed.get(key, r"[\w.]*"), part):
            raise _may_run_code(path, f"{part[:60]!r}")


def _may_run_code(path: Path, what: str) -> RequestError:
    return RequestError(f"{path} holds {what}, which could run code: write it again with `convmixer export`")


def _split(outputs: Any) -> tuple[np.ndarray, np.ndarray | None]:
    return outputs[0], outputs[1] if len(outputs) > 1 else None
