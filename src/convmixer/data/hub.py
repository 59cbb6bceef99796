"""Downloads data sets from the Hugging Face hub, complete and once, into the hub's cache folder."""

import os
from pathlib import Path

from convmixer.data.argument import HUB_NAMES, Argument, places
from convmixer.errors import RequestError


def download(argument: Argument) -> Path:
    """Return the folder with the parquet files of a data set on the hub, after downloading them if necessary.

    Raises:
        RequestError: It cannot be downloaded; the message says where to put the files instead.
    """
    from huggingface_hub import snapshot_download

    assert argument.repository is not None
    notes = "".join(f" ({note})" for note in argument.notes)
    try:
        patterns = ["*.parquet", "**/*.parquet"]
        return Path(snapshot_download(argument.repository, repo_type="dataset", allow_patterns=patterns))
    except Exception as error:  # the hub raises many kinds: no network, no such name, not allowed
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RequestError(
            f"data {argument.spec!r} are not here and cannot be downloaded from the hub ({argument.repository}): "
            f"{reason}. Put the parquet files in {_other_places(argument.spec)}{notes}"
        ) from error


def _other_places(spec: str) -> str:
    if spec not in HUB_NAMES:
        return "a folder and give that"
    found = ", ".join(str(place) for place in places(spec))
    return found if os.environ.get("CONVMIXER_DATA") else f"{found}, or in $CONVMIXER_DATA/{spec}"
