"""Finds the images and videos that the arguments of `predict` name. Nothing is decoded here."""

import glob
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from convmixer.data.unused import NO_IMAGE, Unused
from convmixer.data.walk import is_image, walk
from convmixer.errors import RequestError
from convmixer.predict.web import fetch, is_url
from convmixer.preprocess import SUFFIXES, Preprocessing, load_image

VIDEOS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".mts", ".ogv", ".3gp", ".wmv")
CAMERA = "camera:"
MOST_MATCHES = 1_000_000  # names that a pattern may match

ReadImage = Callable[[Preprocessing], Image.Image]


@dataclass(frozen=True)
class Still:
    """One image.

    Args:
        name: Its path or URL.
        read: Preprocessing -> the decoded image; raises OSError or ValueError.
    """

    name: str
    read: ReadImage


@dataclass(frozen=True)
class Video:
    """A video file, or a camera.

    Args:
        name: The path, or "camera:N".
        camera: The camera's number; None: a file.
    """

    name: str
    camera: int | None = None


def sources_of(arguments: Sequence[str | Path], network: bool = False) -> tuple[list[Still | Video], Unused]:
    """Return the images and videos to classify, in the order of the arguments, and the files that were skipped.

    If a file or folder with the argument's name exists, it is used, even if the name looks like something else.
    Otherwise the argument may be a pattern such as `photos/*.jpg` (`**` matches any folders), `camera:0`, or a URL.

    Args:
        arguments: What the user named.
        network: Whether URLs may be fetched.

    Raises:
        RequestError: A folder or pattern has no images, or a URL is not allowed.
    """
    found: list[Still | Video] = []
    unused = Unused()
    for argument in arguments:
        text = str(argument)
        if not _exists(text) and is_url(text):
            found.append(_page(text, network))
        elif not _exists(text) and text.startswith(CAMERA):
            found.append(_camera(text))
        else:
            paths = [Path(argument)] if _exists(text) or not glob.has_magic(text) else _matching(text)
            files, passed = expand(paths)
            unused.update(passed)
            found += map(_file, files)
    return found, unused


def expand(paths: Sequence[Path]) -> tuple[list[Path], Unused]:
    """Return the files, with each folder replaced by the image files below it, sorted; and the skipped files.

    Folders are read in the same way as by `train`, see `data.walk`.

    Raises:
        RequestError: A folder holds no image files.
    """
    files: list[Path] = []
    unused = Unused()
    for path in paths:
        if not path.is_dir():
            files.append(path)
            continue
        walked = walk(path)
        below = sorted(path / file for file in walked.files if is_image(file))
        if not below:
            raise RequestError(f"{path} holds no image files ({', '.join(SUFFIXES)})")
        files += below
        unused.update(walked.unused)
        unused.add(NO_IMAGE, *(file for file in walked.files if not is_image(file)))
    return files, unused


def is_video(path: str | Path) -> bool:
    """Return whether a file's name has the suffix of a video."""
    return Path(path).suffix.lower() in VIDEOS


def _matching(pattern: str) -> list[Path]:
    """Return the images, videos and folders that match a pattern, sorted.

    Raises:
        RequestError: There are none, or too many.
    """
    matches = sorted(glob.iglob(pattern, recursive=True))
    if len(matches) > MOST_MATCHES:
        raise RequestError(f"{pattern} matches {len(matches):,} names, more than {MOST_MATCHES:,}: narrow it")
    files = [Path(name) for name in matches if is_image(name) or is_video(name)]
    # ** also matches the folders of the files
    folders = [Path(name) for name in matches if Path(name).is_dir()] if not files else []
    if not files and not folders:
        raise RequestError(f"no image matches {pattern}")
    return files or folders


def _file(path: Path) -> Still | Video:
    if is_video(path):
        return Video(str(path))
    return Still(str(path), lambda p: load_image(path, p.in_chans, p.bits))


def _page(url: str, allowed: bool) -> Still:
    if not allowed:
        raise RequestError(f"{url} is on the network, which is used only if you add --allow-network")
    return Still(url, lambda p: load_image(fetch(url), p.in_chans, p.bits))


def _camera(text: str) -> Video:
    number = text.removeprefix(CAMERA)
    if not number.isdecimal() or len(number) > 3:
        raise RequestError(f"{text}: write camera:0 for the first camera")
    return Video(text, int(number))


def _exists(text: str) -> bool:
    try:
        return Path(text).exists() or Path(text).is_symlink()
    except (OSError, ValueError):  # e.g. a name too long
        return False
