"""The table of export formats. Light: `--help` and running an ONNX file import no torch.

To add a format, add a row here and a module of the same name beside it with `write` and `read`.
"""

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convmixer.errors import unknown


@dataclass(frozen=True)
class Format:
    """One way to export a model.

    Args:
        name: What `--format` takes, e.g. "onnx".
        module: The file beside this one that writes and reads it.
        suffix: How the name of the file (or folder) ends.
        precisions: What `--precision` takes for it.
        extra: The extra of this package that brings what it needs.
        summary: What it is for, in a few words.
        folder: The marker file, if the export is a folder.
    """

    name: str
    module: str
    suffix: str
    precisions: tuple[str, ...]
    extra: str
    summary: str
    folder: str = ""

    def load_module(self) -> Any:
        """Return the module that writes and reads this format."""
        return importlib.import_module(f"convmixer.exported.{self.module}")


_ALL = ("fp32", "fp16", "int8")
FORMATS = {
    row.name: row
    for row in (
        Format("onnx", "onnx", ".onnx", _ALL, "export", "a file for ONNX Runtime"),
        Format("openvino", "openvino", ".xml", _ALL, "openvino", "a pair of files for OpenVINO"),
        Format("torch", "pt2", ".pt2", ("fp32",), "export", "a torch.export program"),
        Format("web", "web", "-web", _ALL, "export", "a web page that classifies in the browser", "model.js"),
    )
}


def format_named(name: str) -> Format:
    """Return a format by name.

    Raises:
        RequestError: There is no such format.
    """
    if name not in FORMATS:
        raise unknown("format", name, FORMATS)
    return FORMATS[name]


def format_of(path: str | Path) -> Format | None:
    """Return the format that a path's suffix or contents announce, or None."""
    path = Path(path)
    for row in FORMATS.values():
        if (path / row.folder).is_file() if row.folder else path.suffix == row.suffix:
            return row
    return None
