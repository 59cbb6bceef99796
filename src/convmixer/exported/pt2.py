"""torch.export programs (.pt2). A file that could run code when it is loaded is refused."""

import io
import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from convmixer.errors import RequestError

if TYPE_CHECKING:
    from convmixer.exported.source import Source

MAX_MEMBERS = 20_000
MAX_GRAPH_BYTES = 64 * 2**20
# Texts that a .pt2 may contain. PyTorch unpickles, evaluates or looks up all other texts by name.
_MEMBERS = r"(data/weights/\w+|data/constants/tensor_\w+|data/\w+/model_\w+_config\.json"
_MEMBERS += r"|data/sample_inputs/model\.pt|models/model\.json|extra/convmixer\.json"
_MEMBERS += r"|archive_format|archive_version|byteorder|\.data/\w+)"
_CALLS = r"torch\.ops\.aten\.(?!from_file|save|load)\w+(\.\w+)?|torch\.sym_\w+"
_CALLS += r"|_operator\.(add|sub|mul|floordiv|truediv|mod|pow|neg|getitem|eq|ne|lt|le|gt|ge)"
_TYPES = r"builtins\.(tuple|list|dict)|cpu"  # the types of nested inputs and outputs; a device
_SIZES = r"(Symbol\('\w+'(, \w+=True)*\)|(Integer|Rational|Add|Mul|Pow|FloorDiv|Mod|Max|Min)\(|-?\d+|[,) ])*"


def write(path: Path, source: "Source") -> None:
    """Write a model as a torch.export program, without the exporter's notes, which hold paths of this machine."""
    import torch

    with torch.no_grad():
        program = torch.export.export(
            source.model, (source.example,), dynamic_shapes={"images": {0: torch.export.Dim("batch")}}
        )
    torch.export.save(program, path, extra_files={"convmixer.json": json.dumps(source.texts)})
    path.write_bytes(_without_code(path).getvalue())


def check(path: Path) -> None:
    """Check a file with torch's own reader.

    Raises:
        RuntimeError: It cannot be read.
    """
    import torch

    torch.export.load(path)


def read(path: Path, threads: int) -> tuple[Callable[[np.ndarray], Any], dict[str, str]]:
    """Return a function that runs a torch.export program on a batch, and the program's metadata.

    Raises:
        RequestError: The file contains something that our exports do not contain.
    """
    checked = _without_code(path)
    import torch

    if threads:
        torch.set_num_threads(threads)
    extra = {"convmixer.json": ""}
    model = torch.export.load(checked, extra_files=extra).module()

    def run(batch: np.ndarray) -> list[np.ndarray]:
        with torch.inference_mode():
            return [part.numpy() for part in model(torch.from_numpy(batch))]

    return run, json.loads(extra["convmixer.json"])


def _without_code(path: Path) -> io.BytesIO:
    """Return a copy of a .pt2 file with its tensors and its graph of PyTorch's operations, and nothing pickled.

    Raises:
        RequestError: The file holds anything else, which could run code when it is loaded, or it unpacks to more
            bytes than it has.
    """
    copy = io.BytesIO()
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(copy, "w") as out:
        _check_sizes(path, archive.infolist())
        for member in archive.namelist():
            name = member.partition("/")[2]
            if not re.fullmatch(_MEMBERS, name):
                raise _may_run_code(path, member)
            content = archive.read(member)
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
            # ZipInfo without a time: the same model gives the same bytes
            out.writestr(zipfile.ZipInfo(f"model/{name}"), content)
    copy.seek(0)
    return copy


def _check_sizes(path: Path, members: list[zipfile.ZipInfo]) -> None:
    """Raise RequestError if an archive unpacks to more bytes than it has; torch.export does not compress."""
    names = {member.filename.partition("/")[2] for member in members}
    if not len(members) == len(names) <= MAX_MEMBERS:
        raise RequestError(f"{path} holds more than {MAX_MEMBERS} members, or one twice")
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise RequestError(f"{path} is compressed, which `convmixer export` never does: it could unpack without end")
    if sum(member.file_size for member in members) > path.stat().st_size:
        raise RequestError(f"{path} unpacks to more than its own size")
    if any(member.file_size > MAX_GRAPH_BYTES for member in members if member.filename.endswith(".json")):
        raise RequestError(f"{path} holds a graph larger than {MAX_GRAPH_BYTES >> 20} MiB")


def _check_graph(part: Any, path: Path, key: str = "") -> None:
    """Remove the notes on source code from a graph, and refuse texts that our exports do not contain.

    Args:
        part: The graph or a part of it, as JSON.
        path: The file.
        key: The part's key in the graph.
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
        # most are names, which become Python source: only letters, digits, "_" and "."
        allowed = {"target": _CALLS, "expr_str": _SIZES, "torch_version": ".*", "type": _TYPES}
        allowed["context"] = r"null|\[\]"
        if not re.fullmatch(allowed.get(key, r"[\w.]*"), part):
            raise _may_run_code(path, f"{part[:60]!r}")


def _may_run_code(path: Path, what: str) -> RequestError:
    return RequestError(f"{path} holds {what}, which could run code: write it again with `convmixer export`")
