"""The table of export formats. Imports nothing heavy, so that `--help` and running ONNX files need no torch.

To add a format, add a row here and a module in this folder with `write`, `check` and `read`; if it needs a package,
add an extra to pyproject.toml.
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
        module: The file in this folder that writes and reads it.
        suffix: How the name of the file (or folder) ends.
        precisions: What `--precision` takes for it.
        extra: The extra of this package that installs what it needs; "" if torch is enough.
        summary: What it is for, in a few words.
        more_suffixes: Suffixes of the additional files next to it.
        folder: If the export is a folder, the file that marks it.
    """

    name: str
    module: str
    suffix: str
    precisions: tuple[str, ...]
    extra: str
    summary: str
    more_suffixes: tuple[str, ...] = ()
    folder: str = ""

    def load_module(self) -> Any:
        """Return the module that writes, checks and reads this format."""
        return importlib.import_module(f"convmixer.exported.{self.module}")

    def parts(self, path: Path) -> list[Path]:
        """Return the files that make up an export, beginning with the one that the user names."""
        return [path, *(path.with_suffix(suffix) for suffix in self.more_suffixes)]


PRECISIONS = ("fp32", "fp16", "int8")
FORMATS = {
    row.name: row
    for row in (
        Format("onnx", "onnx", ".onnx", PRECISIONS, "export", "a file for ONNX Runtime"),
        Format(
            "openvino", "openvino", ".xml", PRECISIONS, "openvino", "two files for OpenVINO", more_suffixes=(".bin",)
        ),
        Format("torch", "pt2", ".pt2", ("fp32",), "", "a torch.export program"),
        Format("web", "web", "-web", PRECISIONS, "export", "a page that classifies images", folder="model.js"),
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
