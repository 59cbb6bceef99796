"""Classifies files, folders, URLs and videos; writes predictions as a table, a file, and pictures with labels."""

import csv
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from convmixer.data.unused import Unused
from convmixer.errors import Failed, RequestError
from convmixer.files import write_atomic
from convmixer.inference import Classifier, load_classifier
from convmixer.predict.sources import Still, Video, is_video, sources_of
from convmixer.preprocess import Preprocessing, preprocess
from convmixer.progress import track
from convmixer.text import csv_cell, markup, terminal

Prediction = dict[str, Any]
DRAWN_LABELS = 3  # most classes drawn into a picture
DRAWN_SIDE = 1600  # largest side of a picture, pixels


@dataclass(frozen=True)
class Watching:
    """How videos are read.

    Args:
        every: Seconds between two predictions; 0: predict every frame.
        most: Seconds to read of each video or camera; None: the whole video, and the camera until Ctrl-C.
    """

    every: float = 0.5
    most: float | None = None


def predict_files(
    weights: str | Path,
    images: Sequence[str | Path],
    topk: int = 5,
    batch_size: int = 32,
    precision: str = "auto",
    out: Path | None = None,
    expected: dict[str, Any] | None = None,
    draw: Path | None = None,
    network: bool = False,
    watching: Watching | None = None,
    tta: bool = False,
) -> dict[str, Any]:
    """Classify images and videos, print a table, and return an entry per image or predicted frame, in order.

    Args:
        weights: See `load_classifier`.
        images: See `sources.sources_of`.
        topk: Classes per image, at least 1.
        batch_size: Images at once, at least 1.
        precision: See `load_classifier`.
        out: A .csv or .jsonl file for the predictions; None: no file.
        expected: See `load_classifier`.
        draw: A folder for pictures with their labels drawn in, or, for one video, a video file; or None.
        network: Whether URLs among `images` may be fetched.
        watching: How videos are read; None: the defaults.
        tta: Average the probabilities of each image and its mirror image (test-time augmentation).

    Returns:
        "predictions": a list of {"file", "classes", "probabilities"}, for a video also "second"; for a file that
        cannot be read {"file", "error"}. "drawn": the pictures and videos that were written. "tta": the argument.

    Raises:
        RequestError: An argument is wrong, or there is nothing to classify.
        RuntimeError: None of the files can be read.
    """
    if min(topk, batch_size) < 1:
        raise RequestError(f"--topk and --batch-size must be at least 1, not {topk} and {batch_size}")
    if out is not None and out.suffix not in _WRITERS:
        raise RequestError(f"--out {out} must end in {' or '.join(_WRITERS)}")
    sources, unused = sources_of(images, network)
    if not sources:
        raise RequestError("name at least one image or folder")
    pictures = _Pictures(draw, sources)
    classifier = load_classifier(weights, precision, expected=expected)
    if tta:
        classifier = classifier.mirrored()
        print("tta      probabilities are means over each image and its mirror image")
    predictions: list[Prediction] = []
    for group in _grouped(sources):
        if isinstance(group, Video):
            predictions += _watch(classifier, group, topk, watching or Watching(), pictures)
        else:
            predictions += _predict_each(classifier, group, topk, batch_size, pictures)
    if out is not None:
        # file names are bytes to the system, and not always valid text
        write_atomic(out, _WRITERS[out.suffix](predictions).encode(errors="surrogateescape"))
    _print_table(predictions, classifier, [out, *pictures.written[:1]], unused)
    errors = [p["error"] for p in predictions if "error" in p]
    if len(errors) == len(predictions):
        raise Failed(f"none of the {len(errors)} files can be read; the first: {errors[0] if errors else ''}")
    return {"predictions": predictions, "drawn": list(map(str, pictures.written)), "tta": tta}


def _grouped(sources: Sequence[Still | Video]) -> Iterator[list[Still] | Video]:
    """Yield each video, and the images between two videos as one group."""
    stills: list[Still] = []
    for source in sources:
        if isinstance(source, Still):
            stills.append(source)
            continue
        if stills:
            yield stills
        stills = []
        yield source
    if stills:
        yield stills


class _Pictures:
    """Writes images and videos with labels.

    Args:
        path: A folder or a video file; None: nothing is drawn.
        sources: The images and videos that are classified; if `path` is a video file, they must be one video.
    Attributes:
        written: The pictures and videos that were written.
        video: Whether they go into a video.
    """

    def __init__(self, path: Path | None, sources: Sequence[Still | Video]) -> None:
        self.path, self.written, self._numbers = path, list[Path](), count(1)
        self.video = path is not None and is_video(path)
        if path is None:
            return
        if self.video and not (len(sources) == 1 and isinstance(sources[0], Video)):
            raise RequestError(f"--draw {path} is a video, which needs one video or camera to label: name a folder")
        if self.video and path.exists() and sources[0].name == str(path):
            raise RequestError(f"--draw {path} would overwrite what it reads: choose another name")
        if not self.video and path.exists() and not path.is_dir():
            raise RequestError(f"--draw {path} is a file: name a folder, or a video such as labelled.mp4")

    def add(self, name: str, image: Image.Image, labels: Sequence[tuple[str, float]]) -> None:
        """Write an image with its labels into the folder, numbered, because two may have the same name."""
        if self.path is None or self.video:
            return
        from convmixer.results.labelled import with_labels

        stem = "".join(c if c.isalnum() or c in "-_." else "_" for c in Path(name).stem)[:60]
        path = self.path / f"{next(self._numbers):05}-{stem}.jpg"
        content = io.BytesIO()
        with_labels(image, labels[:DRAWN_LABELS]).save(content, "JPEG", quality=90)
        write_atomic(path, content.getvalue())
        self.written.append(path)


def _watch(
    classifier: Classifier, video: Video, topk: int, watching: Watching, pictures: _Pictures
) -> Iterator[Prediction]:
    """Predict some frames of a video; frames read before damage count."""
    from convmixer.predict.video import Writer, frames

    labels: list[tuple[str, float]] = []
    due = 0.0
    writer = Writer(pictures.path) if pictures.video and pictures.path else None
    try:
        for frame in frames(video, watching.most):
            if frame.second >= due:
                due = frame.second + watching.every
                labels = classifier.predict([frame.image], topk)[0]
                names, probabilities = zip(*labels, strict=True)
                if video.camera is not None:
                    print(f"{frame.second:7.1f} s  {terminal(names[0])} {100 * probabilities[0]:.1f}%", flush=True)
                pictures.add(f"{Path(video.name).stem}-{frame.second:08.2f}", frame.image, labels)
                yield {
                    "file": video.name,
                    "second": round(frame.second, 3),
                    "classes": list(names),
                    "probabilities": list(probabilities),
                }
            if writer:
                writer.add(frame, labels[:DRAWN_LABELS])
    except RequestError:  # no PyAV, no camera
        raise
    except (OSError, ValueError) as error:
        yield {"file": video.name, "error": _reason(video.name, error)}
    finally:
        if writer and writer.close():
            pictures.written.append(writer.path)


def _predict_each(
    classifier: Classifier, stills: Sequence[Still], topk: int, batch_size: int, pictures: _Pictures
) -> Iterator[Prediction]:
    """Yield a prediction per image. The next batch is decoded in threads while the model computes the current one."""
    batches = [stills[i : i + batch_size] for i in range(0, len(stills), batch_size)]
    p, keep = classifier.preprocessing, pictures.path is not None
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:

        def start(batch: Sequence[Still]) -> list[Any]:
            return [pool.submit(_read, still, p, keep) for still in batch]

        coming = start(batches[0])
        for number, batch in enumerate(track(batches, "predicting", len(batches))):
            read = [future.result() for future in coming]
            coming = start(batches[number + 1]) if number + 1 < len(batches) else []
            yield from _entries(classifier, batch, read, topk, pictures)


@dataclass(frozen=True)
class _Read:
    """An image as model input, and if it will be drawn, also as a picture."""

    array: np.ndarray
    image: Image.Image | None


def _read(still: Still, p: Preprocessing, keep: bool) -> _Read | str:
    """Return an image, or why it cannot be read."""
    try:
        image = still.read(p)
        array = preprocess(image, p)
        if keep:
            image.thumbnail((DRAWN_SIDE, DRAWN_SIDE))  # many large photos would fill the memory
        return _Read(array, image if keep else None)
    except (OSError, ValueError) as error:
        return _reason(still.name, error)


def _reason(name: str, error: Exception) -> str:
    return " ".join(str(error).removeprefix(f"{name}: ").split()) or type(error).__name__


def _entries(
    classifier: Classifier, stills: Sequence[Still], read: Sequence[_Read | str], topk: int, pictures: _Pictures
) -> Iterator[Prediction]:
    good = [found.array for found in read if isinstance(found, _Read)]
    tops = iter(classifier.top(np.stack(good), topk) if good else [])
    for still, found in zip(stills, read, strict=True):
        if isinstance(found, str):
            yield {"file": still.name, "error": found}
            continue
        labels = next(tops)
        if found.image is not None:
            pictures.add(still.name, found.image, labels)
        names, probabilities = zip(*labels, strict=True)
        yield {"file": still.name, "classes": list(names), "probabilities": list(probabilities)}


def _csv(predictions: Sequence[Prediction]) -> str:
    most = max(len(p.get("classes", ())) for p in predictions)
    pairs = [f"{name}_{i + 1}" for i in range(most) for name in ("class", "probability")]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    timed = ["second"] if any("second" in p for p in predictions) else []
    writer.writerow(["file", *timed, *pairs, "error"])
    for p in predictions:
        cells = [v for pair in zip(p.get("classes", ()), p.get("probabilities", ()), strict=True) for v in pair]
        row = [p["file"], *(p.get(key, "") for key in timed), *(cells or [""] * len(pairs)), p.get("error", "")]
        writer.writerow([csv_cell(value) if isinstance(value, str) else value for value in row])
    return text.getvalue()


def _jsonl(predictions: Sequence[Prediction]) -> str:
    return "".join(json.dumps(p, ensure_ascii=False) + "\n" for p in predictions)


_WRITERS: dict[str, Callable[[Sequence[Prediction]], str]] = {".csv": _csv, ".jsonl": _jsonl}


def _print_table(
    predictions: Sequence[Prediction], classifier: Classifier, written: Sequence[Path | None], unused: Unused
) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    console = Console(width=None if sys.stdout.isatty() else 200)
    about = classifier.describe
    console.print(
        f"{markup(about.get('found') or about['source'])} ({about.get('precision', 'exported')})", highlight=False
    )
    table = Table(Column("file", overflow="fold"), "prediction", box=None, pad_edge=False)
    shown = predictions[:50]
    for p in shown:
        pairs = zip(p.get("classes", ()), p.get("probabilities", ()), strict=True)
        text = ", ".join(f"{markup(name)} {100 * value:.1f}%" for name, value in pairs)
        second = f" at {p['second']:.1f} s" if "second" in p else ""
        table.add_row(markup(p["file"]) + second, text or f"[red]{markup(p['error'])}[/red]")
    console.print(table)
    bad = sum("error" in p for p in predictions)
    rest = len(predictions) - len(shown)
    notes = [
        f"{rest} more not shown" if rest else "",
        f"{bad} of {len(predictions)} cannot be read" if bad else "",
        *unused.notes(),
        *(f"written to {markup(path)}" for path in written if path),
    ]
    for note in filter(None, notes):
        console.print(note, highlight=False)
