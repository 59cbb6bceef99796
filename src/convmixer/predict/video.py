"""Frames of videos and cameras, and videos with labels, through PyAV (the extra `video`).

Videos are untrusted. Only the containers listed here are opened, because a playlist could lead to other files or to
the network. The size and the number of frames are limited. FFmpeg decodes videos in this process.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from convmixer.errors import RequestError, shown
from convmixer.files import temporary_name
from convmixer.predict.sources import Video
from convmixer.results.labelled import with_labels

CONTAINERS = "mov,matroska,avi,mpegts,mpeg,ogg,asf"  # FFmpeg's names; mov is MP4 too, matroska WebM
MOST_PIXELS = 50_000_000  # largest frame
MOST_FRAMES = 10_000_000  # two days at 60 frames per second
STALL_SECONDS = 30.0
TICKS = 90_000  # clock ticks per second in the videos that we write
FORMATS = {".mkv": "matroska", ".webm": "webm", ".mov": "mov", ".avi": "avi"}  # formats that we write, besides MP4
CAMERAS = {"linux": ("v4l2", "/dev/video{}"), "darwin": ("avfoundation", "{}"), "win32": ("dshow", "video={}")}


@dataclass(frozen=True)
class Frame:
    """One frame.

    Args:
        second: Seconds since the first frame.
        frame: PyAV's frame; its pixels are converted only if they are needed.
    """

    second: float
    frame: Any

    @cached_property
    def image(self) -> Image.Image:
        """The picture, upright, RGB."""
        image: Image.Image = self.frame.to_image()
        return image.rotate(self.frame.rotation, expand=True) if self.frame.rotation else image


def frames(video: Video, most_seconds: float | None = None) -> Iterator[Frame]:
    """Yield the frames of a video file or a camera, in order. Ctrl-C ends the reading of a camera, not the program.

    Args:
        video: The video or camera.
        most_seconds: Stop after this many seconds of the video; None: read it to its end.

    Raises:
        RequestError: PyAV is missing, or there is no such camera.
        OSError, ValueError: The file is not a video, is damaged, or its frames are too large.
    """
    av = _av()
    try:
        with _open(av, video) as container:
            yield from _frames(container, most_seconds)
    except av.FFmpegError as error:
        raise OSError(f"it cannot be read as a video: {shown(error.strerror or str(error))}") from error
    except KeyboardInterrupt:
        if video.camera is None:
            raise


def _frames(container: Any, most_seconds: float | None) -> Iterator[Frame]:
    if not container.streams.video:
        raise ValueError("it holds no video")
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    if stream.width * stream.height > MOST_PIXELS:
        raise ValueError(f"its frames have more than {MOST_PIXELS:,} pixels")
    rate, first = float(stream.average_rate or 25), None
    for number, frame in enumerate(container.decode(stream)):
        if frame.width * frame.height > MOST_PIXELS:
            raise ValueError(f"its frames have more than {MOST_PIXELS:,} pixels")
        moment = number / rate if frame.time is None else frame.time
        first = moment if first is None else first
        second = max(0.0, moment - first)
        if number >= MOST_FRAMES or (most_seconds is not None and second > most_seconds):
            return
        yield Frame(second, frame)


def _open(av: Any, video: Video) -> Any:
    if video.camera is not None:
        kind, name = CAMERAS.get(sys.platform, CAMERAS["linux"])
        try:
            return av.open(name.format(video.camera), format=kind)
        except (av.FFmpegError, ValueError) as error:
            raise RequestError(f"{video.name} cannot be opened: {shown(str(error))}") from error
    path, options = str(Path(video.name).absolute()), {"format_whitelist": CONTAINERS, "protocol_whitelist": "file"}
    return av.open(path, options=options, timeout=STALL_SECONDS, metadata_errors="replace")


class Writer:
    """Writes a video with labels, with the size and speed of the frames; the file appears when it is complete.

    Args:
        path: The file; its suffix names the container.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._part = path, temporary_name(path)
        self._container: Any = None
        self._last = -1

    def add(self, frame: Frame, labels: Sequence[tuple[str, float]]) -> None:
        """Add a frame with its labels drawn in."""
        av = _av()
        picture = with_labels(frame.image, labels)
        if self._container is None:
            self._begin(av, picture)
        # every frame gets the size of the first one, with even sides, which the codec needs
        picture = picture if picture.size == self._size else picture.resize(self._size)
        encoded = av.VideoFrame.from_image(picture)
        self._last = max(self._last + 1, round(frame.second * TICKS))
        encoded.pts, encoded.time_base = self._last, Fraction(1, TICKS)
        self._container.mux(self._stream.encode(encoded))

    def _begin(self, av: Any, picture: Image.Image) -> None:
        self._part.parent.mkdir(parents=True, exist_ok=True)
        self._size = max(2, picture.width // 2 * 2), max(2, picture.height // 2 * 2)
        kind = FORMATS.get(self.path.suffix.lower(), "mp4")
        codec = "libvpx-vp9" if kind == "webm" else "libx264" if "libx264" in av.codecs_available else "mpeg4"
        self._container = av.open(str(self._part), "w", format=kind)
        self._stream = self._container.add_stream(codec, rate=30)
        self._stream.width, self._stream.height = self._size
        self._stream.pix_fmt = "yuv420p"
        self._stream.codec_context.time_base = Fraction(1, TICKS)

    def close(self) -> bool:
        """Finish the file, and return whether it was written; without frames it is not."""
        if self._container is None:
            return False
        self._container.mux(self._stream.encode())
        self._container.close()
        self._part.replace(self.path)
        return True


def _av() -> Any:
    try:
        import av
    except ImportError as error:
        raise RequestError("videos and cameras need the package av: pip install 'convmixer[video]'") from error
    return av
