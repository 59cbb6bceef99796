"""The options for data sets whose columns, folders or groups cannot be found automatically."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from convmixer.errors import RequestError


@dataclass(frozen=True)
class Options:
    """What the user said about the data. None: found automatically; if that would be a guess, an error is raised.

    Args:
        path_column: In a table or parquet file, the column that holds the images or their paths. In WebDataset
            shards, the extension of the images, e.g. "jpg".
        label_column: In a table or parquet file, the column of the labels. In WebDataset shards, an extension ("txt")
            or a key of the .json members.
        split_column: Column that names the split, or COLUMN=VALUE: rows with that value are the val split.
        image_root: Folder that the paths of a table are relative to.
        group: Column with each image's group (a patient, a video), or a regular expression that finds the group in an
            image's path. Images of one group stay in one split.
        weight_column: Column with each training image's weight in the loss; only the ratios matter.
    """

    path_column: str | None = None
    label_column: str | None = None
    split_column: str | None = None
    image_root: str | None = None
    group: str | None = None
    weight_column: str | None = None

    @classmethod
    def of(cls, values: Any) -> "Options":
        """Return the options among the attributes of settings, or the keys of a dict."""
        get = values.get if isinstance(values, Mapping) else lambda name: getattr(values, name, None)
        found = {field.name: get(field.name) for field in fields(cls)}
        for name, value in found.items():
            if not isinstance(value, (str, type(None))):
                raise RequestError(f"{name} must be a text, not {value!r}")
        return cls(**found)

    def absolute(self) -> "Options":
        """Return the options with an absolute path."""
        root = self.image_root and os.path.abspath(os.path.expanduser(self.image_root))
        return replace(self, image_root=root)

    def check_used(self, kind: str, *used: str) -> None:
        """Raise RequestError if an option is given that this kind of data cannot use.

        Args:
            kind: The kind of data, in words, for the message.
            used: Names of the options that this kind of data uses.
        """
        if unused := next((name for name in self.given() if name not in used), None):
            raise RequestError(f"{flag(unused)} {self.given()[unused]}: {kind} cannot use it: leave it out")

    def given(self) -> dict[str, str]:
        """Return the options that are not None."""
        return {name: value for name, value in vars(self).items() if value is not None}


def flag(name: str) -> str:
    """Return the command-line flag of an option."""
    return "--" + name.replace("_", "-")
