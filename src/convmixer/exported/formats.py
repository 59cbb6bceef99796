"""The table of export formats. It imports nothing heavy, because `--help` and running ONNX files need no torch.

To add a format, add a row here and a module in this folder with `write`, `check` and `read`. The table "Where to add
what" in docs/architecture.md names the other places.
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
        name: Its name for `--format`, e.g. "onnx".
        module: The module in this folder that writes and reads it.
        suffix: The end of the name of the file or folder.
        precisions: The values of `--precision` that it supports.
        extra: The extra of convmixer that installs the packages that the format needs; "" if torch is enough.
        summary: A description in a few words.
        more_suffixes: Suffixes of further files that belong to an export.
        folder: If the export is a folder: the name of a file by which it is recognised.
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
    """Return the format of a file or folder, by its suffix or contents; None if it is not an export."""
    path = Path(path)
    for row in FORMATS.values():
        if (path / row.folder).is_file() if row.folder else path.suffix == row.suffix:
            return row
    return None
