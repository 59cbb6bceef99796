"""Loads exported files. They are not trusted: a process with limits (`process.py`) reads, checks and runs them.

An exported file contains its class names and preprocessing, so it is used like weights. ONNX files and web folders
run without torch. Telemetry of ONNX Runtime and OpenVINO is switched off before they are imported.
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from convmixer.errors import RequestError
from convmixer.exported.formats import format_of
from convmixer.exported.process import Confined
from convmixer.preprocess import Preprocessing

Run = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray | None]]
MAX_CLASSES, MAX_TEXT, MAX_SIDE = 100_000, 1000, 4096
ABOUT = ("precision", "exported_by", "architecture", "model_args", "data")


@dataclass(frozen=True)
class Exported:
    """An exported model, ready to run.

    Args:
        run: (B, C, H, W) float32 -> logits (B, classes), and class-activation maps (B, k, h, w) of the k likeliest
            classes in descending order, or None if the file has no maps. Logits of an image may be NaN: callers check
            them per image, so that one image does not make its whole batch fail.
        classes: Class names in the order of the logits.
        preprocessing: How an image becomes the input.
        describe: Facts about the file: source, format, precision, architecture, and the training data.
    """

    run: Run
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    describe: dict[str, Any]


def is_exported(path: str | Path) -> bool:
    """Return whether a path names a file or folder that `convmixer export` writes."""
    return format_of(path) is not None


def load_exported(path: str | Path, threads: int = 0, **limits: Any) -> Exported:
    """Return the model in an exported file, which runs in a separate process.

    Args:
        path: A file or folder in one of the formats of `formats.py`.
        threads: Processor threads for the runtime; 0: the runtime's choice.
        limits: `memory_bytes` and `load_seconds` of `process.Confined`.

    Raises:
        RequestError: The file does not exist, cannot be read, is of no kind that `convmixer export` writes, takes too
            long or too much memory, or its runtime is not installed.
    """
    path = _regular(Path(path))
    confined = Confined(path, threads, **limits)

    def run(batch: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        return _split(confined.run(batch))

    return _exported(path, run, confined.facts)


def open_exported(path: str | Path, threads: int = 0) -> Exported:
    """Return the same as `load_exported`, but run the model in this process.

    Use it only in the limited process itself, and for files that were just written.

    Raises:
        RequestError: As for `load_exported`.
    """
    path = _regular(Path(path))
    kind = format_of(path)
    assert kind is not None
    try:
        outputs, texts = kind.load_module().read(path, threads)
        facts = {name: json.loads(text) for name, text in texts.items()}
        exported = _exported(path, lambda batch: _split(outputs(batch)), facts)
        p = exported.preprocessing
        logits, _ = exported.run(np.zeros((1, p.in_chans, p.img_size, p.img_size), np.float32))
    except (RequestError, MemoryError):
        raise
    except ImportError as error:
        raise RequestError(f"{path} needs {error.name}: pip install 'convmixer[{kind.extra}]'") from error
    except RecursionError as error:
        raise RequestError(f"{path} is nested too deeply to be an export") from error
    except Exception as error:  # each runtime has its own exceptions for a truncated file or one that is not a model
        reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
        raise RequestError(f"{path} cannot be read as a {kind.name} model: {reason}") from error
    if not np.isfinite(logits).all():
        raise RequestError(f"{path} gives logits that are not finite: its weights are damaged")
    return exported


def facts_of(exported: Exported) -> dict[str, Any]:
    """Return the metadata of an exported file, as JSON values."""
    about = {name: value for name, value in exported.describe.items() if name in ABOUT}
    return {"classes": exported.classes, "preprocessing": asdict(exported.preprocessing), "about": about}


def _regular(path: Path) -> Path:
    """Return the path.

    Raises:
        RequestError: It is neither a regular file nor a folder with a page; reading a pipe could never end.
    """
    if not path.exists():
        raise RequestError(f"{path} does not exist")
    kind = format_of(path)
    if kind is None or not (path / kind.folder).is_file():
        raise RequestError(f"{path} is not an exported file or folder")
    return path


def _exported(path: Path, run: Run, facts: dict[str, Any]) -> Exported:
    if not {"classes", "preprocessing"} <= facts.keys():
        raise RequestError(f"{path} contains no class names and preprocessing: write it with `convmixer export`")
    try:
        classes = _classes(facts["classes"])
        preprocessing = _preprocessing(facts["preprocessing"])
        about = _about(facts.get("about", {}))
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise RequestError(f"{path} has damaged metadata: {str(error)[:300]}") from error
    kind = format_of(path)
    assert kind is not None
    describe = {**about, "source": str(path), "format": kind.name}
    return Exported(_checked(path, run, len(classes)), classes, preprocessing, describe)


def _checked(path: Path, run: Run, classes: int) -> Run:
    """Return `run` with a check of its outputs' shapes."""

    def checked(batch: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        logits, maps = run(batch)
        if logits.shape != (len(batch), classes):
            raise RuntimeError(f"{path} gives logits of shape {logits.shape}, not {(len(batch), classes)}")
        if maps is not None and (maps.ndim != 4 or len(maps) != len(batch) or maps.shape[1] > classes):
            raise RuntimeError(f"{path} gives class-activation maps of shape {maps.shape}")
        return logits, maps

    return checked


def _classes(names: Any) -> tuple[str, ...]:
    if not isinstance(names, list | tuple) or not 0 < len(names) <= MAX_CLASSES:
        raise ValueError(f"class names must be a list of 1 to {MAX_CLASSES} strings")
    if not all(isinstance(name, str) and len(name) <= MAX_TEXT for name in names):
        raise ValueError(f"a class name is not a string of at most {MAX_TEXT} characters")
    return tuple(names)


def _preprocessing(values: Any) -> Preprocessing:
    numbers = [values["img_size"], values["in_chans"], values["crop_pct"], *values["mean"], *values["std"]]
    if any(isinstance(number, bool) or not isinstance(number, int | float) for number in numbers):
        raise ValueError("the preprocessing holds a value that is not a number")
    if not all(math.isfinite(number) and abs(number) <= MAX_SIDE for number in numbers):
        raise ValueError(f"the preprocessing holds a number that is not finite or above {MAX_SIDE}")
    if not (isinstance(values["img_size"], int) and isinstance(values["interpolation"], str)):
        raise ValueError("img_size must be a whole number and interpolation a string")
    return Preprocessing(**values)


def _about(values: Any) -> dict[str, Any]:
    known = {name: values[name] for name in ABOUT if values.get(name) is not None}
    for name, value in known.items():
        expected = dict if name in ("model_args", "data") else str
        if not isinstance(value, expected) or len(json.dumps(value)) > 16 * MAX_TEXT:
            raise ValueError(f"{name} is of a wrong type or too long")
    return known


def _split(outputs: Any) -> tuple[np.ndarray, np.ndarray | None]:
    return outputs[0], outputs[1] if len(outputs) > 1 else None
