"""Reads untrusted weights files: no code is run, and time and memory are limited by the size of the file.

`dialects` and `weights` decide what the tensors mean.
"""

import argparse
import io
import json
import pickletools
import re
import struct
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open

from convmixer.errors import RequestError, shown
from convmixer.models.digest import check_weights

State = dict[str, torch.Tensor]

MAX_TENSORS = 20_000
MAX_TEXT_BYTES = 16 * 2**20  # limit on a config, on the header of a .safetensors file, and on a pickle
MAX_PICKLE_STEPS = 2_000_000
SPARE_BYTES = 256 * 2**20  # tensors may share memory in the file (tied weights), and buffers need not be in it
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_DTYPES = (*_FLOATS, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
# PyTorch allows more types, even ones that allocate as much memory as the file asks for
_GLOBALS = (
    r"collections\.(OrderedDict|Counter)|argparse\.Namespace|(builtins|__builtin__)\.(set|complex)|_codecs\.encode"
    r"|torch\.(\w+Storage|storage\.\w+Storage|Size|device|serialization\._get_layout)"
    r"|torch\.(float|bfloat|int|uint|complex)\d+|torch\.bool|torch\.nn\.parameter\.Parameter"
    r"|torch\._utils\._rebuild_(tensor|tensor_v2|tensor_v3|parameter|parameter_with_state)"
)


def read_file(path: Path) -> Any:
    """Return the contents of a .safetensors file, or of a pickle written by torch, without running any code in it.

    Only tensors, plain types and `argparse.Namespace` are allowed. A Namespace holds only attributes. timm's training
    checkpoints contain one, and so do the authors', which were made with timm.

    Raises:
        RequestError: The file is missing, truncated or not a checkpoint, contains other objects, or needs more memory
            than it has bytes.
    """
    if path.suffix == ".safetensors":
        return read_safetensors(path)[0]
    try:
        _check_pickles(path)
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's warnings about damaged bytes
            return torch.load(path, map_location="cpu", weights_only=True)
    except (RequestError, MemoryError):
        raise
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise RequestError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # damaged bytes raise a dozen types
        raise RequestError(f"{path} is truncated, damaged or not a checkpoint: download it again") from error


def read_safetensors(path: Path) -> tuple[State, dict[str, str]]:
    """Return the tensors and the text metadata of a .safetensors file.

    Raises:
        RequestError: The file is missing, truncated, not a .safetensors file or has too many tensors.
    """
    try:
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
        if MAX_TEXT_BYTES < header < path.stat().st_size:
            raise RequestError(f"{path} has a header of {header:,} bytes, more than the limit of {MAX_TEXT_BYTES:,}")
        with safe_open(path, framework="pt") as file:
            keys = list(file.keys())
            check_count(len(keys), path)
            state, metadata = {key: file.get_tensor(key) for key in keys}, file.metadata() or {}
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise RequestError(f"cannot read {path}: {error.strerror or error}") from error
    except (
        SafetensorError,
        struct.error,
        OSError,
        AttributeError,
        TypeError,
    ) as error:  # the last two: unknown dtypes
        raise RequestError(f"{path} is truncated or not a safetensors file ({error}): download it again") from error
    check_weights(state, metadata, path)
    return state, metadata


def read_state(path: Path) -> State:
    """Return the tensors of a file that holds a state dict and nothing else.

    Raises:
        RequestError: The file cannot be read or holds something else, see `read_file` and `check_tensors`.
    """
    content = read_file(path)
    if not isinstance(content, Mapping) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise RequestError(f"{path} is not a state dict: it holds other things than tensors")
    return check_tensors({str(key): value for key, value in content.items()}, path)


def read_json(path: Path) -> Any:
    """Return the contents of an untrusted JSON file.

    Raises:
        RequestError: The file cannot be read, is too large or is not JSON.
    """
    try:
        size = path.stat().st_size
        if size > MAX_TEXT_BYTES:
            raise RequestError(f"{path} has {size:,} bytes, more than the limit of {MAX_TEXT_BYTES:,}")
        return parse_json(path.read_text(encoding="utf-8"), path)
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"cannot read {path}: {error}") from error


def parse_json(text: str, path: Path) -> Any:
    """Return the value of a JSON text from a file.

    Raises:
        RequestError: The text is not JSON, or nested too deep.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"cannot read the config of {path}: {error}") from error


def check_count(tensors: int, path: Path) -> None:
    """Check that there are not more tensors than any model has.

    Raises:
        RequestError: There are more than MAX_TENSORS.
    """
    if tensors > MAX_TENSORS:
        raise RequestError(f"{path} holds {tensors:,} tensors, more than the limit of {MAX_TENSORS:,}")


def check_tensors(state: Mapping[str, Any], path: Path) -> State:
    """Return plain tensors, after checking that they are dense and fit into the memory that the file's size allows.

    Raises:
        RequestError: A tensor is sparse, quantised or has no data, or the tensors need more memory than the file has
            bytes.
    """
    check_count(len(state), path)
    plain = {key: torch.Tensor.detach(value) for key, value in state.items()}  # without attributes from the file
    for key, value in plain.items():
        if value.layout != torch.strided or value.device.type != "cpu" or value.dtype not in _DTYPES:
            raise RequestError(
                f"{path}: {_key(key)} is a tensor of an unsupported kind, {value.dtype}, {value.layout}"
            )
    needed, size = sum(value.numel() * value.element_size() for value in plain.values()), path.stat().st_size
    if needed > size + SPARE_BYTES:
        text = f"its tensors, which share memory in the file, would need {needed:,}"
        raise RequestError(f"{path} has {size:,} bytes, but {text}")
    return plain


def check_values(state: Mapping[str, torch.Tensor], path: Path) -> None:
    """Check that the values of weights can give a meaningful result.

    Raises:
        RequestError: A tensor holds NaN or infinity, or a BatchNorm has a negative variance.
    """
    floats = {key: value for key, value in state.items() if value.is_floating_point()}
    bad = [key for key, value in floats.items() if not value.isfinite().all()]
    if bad:
        raise RequestError(
            f"{path}: {len(bad)} of {len(state)} tensors hold NaN or infinity, the first is {_key(bad[0])}: "
            "the training diverged or the file is damaged"
        )
    bad = [key for key, value in floats.items() if key.endswith("running_var") and (value < 0).any()]
    if bad:
        raise RequestError(f"{path}: {_key(bad[0])} holds negative variances: the file is damaged")


def fit(state: State, model: nn.Module, path: Path) -> State:
    """Return copies of a file's tensors in the model's dtypes, checked against the model.

    Args:
        state: Tensors by the model's keys.
        model: The model, best on the meta device.
        path: The file, for errors.

    Raises:
        RequestError: A tensor is missing, not expected, of the wrong shape or not finite, or the model needs too
            much memory for buffers that the file does not hold.
    """
    wanted = model.state_dict()
    check_shapes(state, wanted, path)
    extra = sum(b.numel() * b.element_size() for n, b in model.named_buffers() if n not in wanted)
    if extra > path.stat().st_size + SPARE_BYTES:
        raise RequestError(f"{path} asks for {extra:,} bytes besides its weights: its sizes are not plausible")
    fitted = {key: value.to(wanted[key].dtype, copy=True).contiguous() for key, value in state.items()}
    check_values(fitted, path)
    return fitted


def check_shapes(state: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor], path: Path) -> None:
    """Compare the shapes of a state dict with those of a model.

    Raises:
        RequestError: A tensor is missing, not expected, or of the wrong shape; the first few are named.
    """
    missing = [key for key in wanted if key not in state]
    extra = [key for key in state if key not in wanted]
    shapes = [
        f"{key} is {tuple(state[key].shape)}, not {tuple(wanted[key].shape)}"
        for key in wanted
        if key in state and state[key].shape != wanted[key].shape
    ]
    for problem, keys in (("lacks", missing), ("has unexpected", extra), ("has wrong shapes:", shapes)):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise RequestError(f"{path} {problem} {', '.join(map(_key, keys[:3]))}{more}: it does not fit the model")


def _key(text: str) -> str:
    return shown(text, 100)


def _check_pickles(path: Path) -> None:
    """Refuse a file of torch.save that names other objects than tensors, or unpacks to more bytes than it has."""
    size = path.stat().st_size
    with path.open("rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"
        file.seek(0)
        if not zipped:
            _check_old(io.BytesIO(file.read(MAX_TEXT_BYTES)), path)
            return
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            packed = any(member.compress_type != zipfile.ZIP_STORED for member in members)
            if packed or sum(member.file_size for member in members) > size:
                raise RequestError(f"{path} unpacks to more bytes than it has: torch.save does not write such files")
            for member in members:
                if member.filename.endswith(".pkl"):
                    _check_text(member.file_size, path)
                    _check_pickle(io.BytesIO(archive.read(member)), path)


def _check_old(file: BinaryIO, path: Path) -> None:
    """Check the five pickles at the start of a file in torch's format before version 1.6."""
    for _ in range(5):
        _check_pickle(file, path)


def _check_text(size: int, path: Path) -> None:
    if size > MAX_TEXT_BYTES:
        raise RequestError(
            f"{path} describes its tensors in {size:,} bytes, more than the limit of {MAX_TEXT_BYTES:,}"
        )


def _check_pickle(file: BinaryIO, path: Path) -> None:
    try:
        for steps, (name, argument) in enumerate(_steps(file)):
            if steps > MAX_PICKLE_STEPS:
                raise RequestError(f"{path} describes its tensors in more than {MAX_PICKLE_STEPS:,} steps")
            if name in ("GLOBAL", "INST"):
                _check_global(str(argument).replace(" ", "."), path)
    except RequestError:
        raise
    except Exception as error:  # damaged bytes raise more than ValueError
        raise RequestError(f"{path} is not a checkpoint, or a damaged one: download it again") from error


def _steps(file: BinaryIO) -> Iterator[tuple[str, Any]]:
    for opcode, argument, _ in pickletools.genops(file):
        yield opcode.name, argument


def _check_global(name: str, path: Path) -> None:
    if not re.fullmatch(_GLOBALS, name):
        raise RequestError(
            f"{path} holds the Python object {shown(name)}, which could run code, so it is not read: "
            "save only its state_dict, preferably as .safetensors"
        )
