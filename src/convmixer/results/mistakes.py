"""The mistakes of a model on one page: likely label errors, classes that are confused, images with the largest loss.

For any number of images and classes, the page shows at most about 180 small pictures. The functions here get numbers
and a function that reads an image, and write HTML and CSV.
"""

import csv
import io
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from convmixer.files import write_atomic
from convmixer.results.page import html_page, thumbnail
from convmixer.text import csv_cell, shortened
from convmixer.text import html as escape_html

LABEL_ERRORS, WORST = 36, 48  # pictures shown at most
PAIRS, IN_PAIR = 12, 8  # pairs of classes, and pictures of each
MOST_PICTURES = LABEL_ERRORS + WORST + PAIRS * IN_PAIR
SIDE = 160  # longer side of a picture in the page, pixels

Read = Callable[[int], Image.Image | None]


@dataclass(frozen=True)
class Answers:
    """A model's answers to the images of a split, one entry per image.

    Args:
        places: int64 (N,), index of the image in the split.
        labels: int64 (N,).
        predicted: int64 (N,), the likeliest class.
        confidence: float64 (N,), probability of the predicted class.
        loss: float64 (N,), cross-entropy.
    """

    places: np.ndarray
    labels: np.ndarray
    predicted: np.ndarray
    confidence: np.ndarray
    loss: np.ndarray

    @classmethod
    def of(cls, logits: np.ndarray, labels: np.ndarray, places: np.ndarray | None = None) -> "Answers":
        """Return the answers that logits (N, classes) give to images with labels (N,); places default to 0, 1, ..."""
        places = np.arange(len(labels)) if places is None else places
        if len(places) != len(labels):
            raise ValueError(f"{len(labels)} answers to {len(places)} images: some could not be read every time")
        values = logits.astype(np.float64)
        values -= values.max(axis=1, keepdims=True)
        total = np.log(np.exp(values).sum(axis=1))
        loss = total - values[np.arange(len(labels)), labels]
        return cls(places, labels, values.argmax(axis=1), np.exp(values.max(axis=1) - total), loss)

    @classmethod
    def from_table(cls, table: np.ndarray, places: np.ndarray) -> "Answers":
        """Return the answers in a table (N, 4) that `table` returned."""
        labels, predicted = table[:, :2].astype(np.int64).T
        return cls(places, labels, predicted, table[:, 2], table[:, 3])

    def table(self) -> np.ndarray:
        """Return labels, predicted, confidence and loss as columns, float64 (N, 4)."""
        return np.column_stack((self.labels, self.predicted, self.confidence, self.loss))

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def wrong(self) -> np.ndarray:
        """Whether each image is misclassified, bool (N,)."""
        return self.labels != self.predicted

    @property
    def label_probability(self) -> np.ndarray:
        """Probability of each image's label, float64 (N,)."""
        values: np.ndarray = np.exp(-self.loss)
        return values


def label_errors(answers: Answers) -> np.ndarray:
    """Return the positions of images whose label is likely wrong, int64, the likeliest first.

    For each class, take the mean probability of the class over the images with its label. A misclassified image is
    listed if the probability of its predicted class is at least that mean. The images are sorted by the probability
    of the prediction minus that of the label.

    Source: confident learning, arXiv 1911.00068, Sec. 3.1; here only the predicted class counts, which is stricter.
    """
    own = answers.label_probability
    classes = int(max(answers.labels.max(), answers.predicted.max())) + 1
    count = np.bincount(answers.labels, minlength=classes)
    usual = np.bincount(answers.labels, own, classes) / np.maximum(count, 1)
    usual[count == 0] = np.inf  # a class without images has no average probability
    found = np.flatnonzero(answers.wrong & (answers.confidence >= usual[answers.predicted]))
    margin = answers.confidence[found] - own[found]
    order: np.ndarray = found[np.argsort(-margin, kind="stable")]
    return order


def write_mistakes(
    path: Path,
    answers: Answers,
    classes: Sequence[str],
    read: Read,
    name: Callable[[int], str],
    about: str,
    seconds: float = float("inf"),
) -> None:
    """Write the page of mistakes.

    Args:
        path: The HTML file.
        answers: The model's answers, for at least one image.
        classes: Class names by label.
        read: Index in the split -> the image, or None if it cannot be read.
        name: Index in the split -> the name of the image.
        about: A sentence for the top of the page: which model was measured on which data.
        seconds: Time limit for reading images; the page says how many are left out because of it.
    """
    write_atomic(path, _Page(answers, classes, _Pictures(read, seconds), name).html(about).encode(errors="replace"))


def write_table(path: Path, answers: Answers, classes: Sequence[str], name: Callable[[int], str]) -> None:
    """Write all misclassified images as CSV, the largest loss first, with a mark at likely label errors."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", "label", "predicted", "confidence", "label_probability", "loss", "likely_label_error"])
    suspects = set(label_errors(answers).tolist())
    for i in np.argsort(-answers.loss, kind="stable"):
        if answers.wrong[i]:
            names = (name(int(answers.places[i])), classes[answers.labels[i]], classes[answers.predicted[i]])
            numbers = (answers.confidence[i], answers.label_probability[i], answers.loss[i])
            writer.writerow([*map(csv_cell, names), *(f"{v:.4g}" for v in numbers), int(i in suspects)])
    write_atomic(path, text.getvalue().encode(errors="surrogateescape"))


class _Pictures:
    """Small pictures as HTML, each read once, until the time limit."""

    def __init__(self, read: Read, seconds: float) -> None:
        self.read, self.end = read, time.monotonic() + seconds
        self.made: dict[int, str | None] = {}
        self.missing = 0

    def of(self, place: int, title: str) -> str:
        if place not in self.made:
            image = self.read(place) if time.monotonic() < self.end else None
            self.made[place] = None if image is None else thumbnail(image, title, SIDE)
            self.missing += image is None
        return self.made[place] or '<span class="gone">not read</span>'


class _Page:
    """The page, section by section."""

    def __init__(
        self, answers: Answers, classes: Sequence[str], pictures: _Pictures, name: Callable[[int], str]
    ) -> None:
        self.answers, self.classes, self.pictures, self.name = answers, classes, pictures, name

    def html(self, about: str) -> str:
        answers, wrong = self.answers, int(self.answers.wrong.sum())
        share = 100 * (1 - wrong / len(answers))
        head = f'<header><h1>Mistakes</h1><p class="lead">{escape_html(about)}</p>'
        head += f"<p>{wrong:,} of {len(answers):,} images are misclassified (top-1 {share:.2f}%).</p>"
        body = self._label_errors() + self._confused() + self._worst()
        if self.pictures.missing:
            why = "there was no time to read them, or they cannot be read"
            head += f'<p class="warning">{self.pictures.missing} images are not shown: {why}.</p>'
        return html_page("Mistakes", f"{head}</header>{body}")

    def _label_errors(self) -> str:
        found = label_errors(self.answers)
        note = (
            "The model contradicts these labels as confidently as it usually names the class that it predicts. "
            "Look at them first: a wrong label costs accuracy in training, and makes the accuracy measured here "
            "too low."
        )
        if self.answers.wrong.mean() > 0.5:
            note += " But the model is wrong about most images, so most of these labels are probably right."
        return self._section("Likely label errors", found, LABEL_ERRORS, note, "None found.")

    def _worst(self) -> str:
        order = np.argsort(-self.answers.loss, kind="stable")
        note = "Cross-entropy punishes confident mistakes most. A high loss is a hard image, a wrong label or a gap."
        return self._section("Largest loss", order, WORST, note, "")

    def _confused(self) -> str:
        pairs = self._pairs()
        parts = [self._pair(pair) for pair in pairs[:PAIRS]]
        more = f" The first {PAIRS} of {len(pairs):,} pairs." if len(pairs) > PAIRS else ""
        note = f"Label → prediction, most images first; of each pair the most confident mistakes.{more}"
        return _block("Classes that are confused", note if parts else "None are.", "".join(parts))

    def _pairs(self) -> list[np.ndarray]:
        """Return the misclassified images of each (label, predicted) pair, the largest first."""
        wrong = np.flatnonzero(self.answers.wrong)
        keys = self.answers.labels[wrong] * len(self.classes) + self.answers.predicted[wrong]
        _, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
        order = np.argsort(-counts, kind="stable")
        grouped = np.split(wrong[np.argsort(inverse, kind="stable")], np.cumsum(counts)[:-1])
        return [grouped[i] for i in order]

    def _pair(self, images: np.ndarray) -> str:
        a = self.answers
        label, predicted = int(a.labels[images[0]]), int(a.predicted[images[0]])
        of = int((a.labels == label).sum())
        shown = images[np.argsort(-a.confidence[images], kind="stable")][:IN_PAIR]
        title = f"{self._class(label)} → {self._class(predicted)}"
        share = f"{len(images):,} of {of:,} images, {100 * len(images) / of:.0f}%" if of > 1 else "the only image"
        cards = "".join(self._card(int(i)) for i in shown)
        return f'<h3>{title} <span class="soft">{share}</span></h3><div class="cards">{cards}</div>'

    def _section(self, title: str, images: np.ndarray, most: int, note: str, otherwise: str) -> str:
        if not len(images):
            return _block(title, otherwise, "")
        more = f" The first {most} of {len(images):,}." if len(images) > most else ""
        cards = "".join(self._card(int(i)) for i in images[:most])
        return _block(title, note + more, f'<div class="cards">{cards}</div>')

    def _card(self, i: int) -> str:
        a, place = self.answers, int(self.answers.places[i])
        label, predicted = self._class(int(a.labels[i])), self._class(int(a.predicted[i]))
        name = escape_html(shortened(self.name(place), 40))
        picture = self.pictures.of(place, f"image labelled {self.classes[a.labels[i]]}"[:80])
        verdict = "wrong" if a.wrong[i] else "right"
        return (
            f'<figure class="card">{picture}<figcaption>label <b>{label}</b> {_percent(a.label_probability[i])}<br>'
            f'model <b class="{verdict}">{predicted}</b> {_percent(a.confidence[i])}<br>'
            f'<span class="soft">loss {a.loss[i]:.2f} · {name}</span></figcaption></figure>'
        )

    def _class(self, number: int) -> str:
        return escape_html(shortened(self.classes[number], 40))


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _block(title: str, note: str, content: str) -> str:
    return f'<section><h2>{title}</h2><p class="small">{escape_html(note)}</p>{content}</section>'
