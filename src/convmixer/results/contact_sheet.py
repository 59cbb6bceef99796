"""A contact sheet: one row per class, with its name and small images, on a white background."""

import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageFont

SIDE = 72  # side of a small image, pixels
GAP = 6
SIZE = 9.5  # size of the letters, points at 100 dots per inch
LETTERS = 30  # most characters of a name; the middle of longer ones is left out


def contact_sheet(rows: Sequence[tuple[str, Sequence[Image.Image]]], path: Path) -> None:
    """Write the sheet as PNG.

    Args:
        rows: Name of each class and its images, each at most `SIDE` pixels wide and high.
        path: The file.
    """
    import matplotlib.pyplot as plt

    from convmixer.files import write_atomic
    from convmixer.results.fonts import as_drawn, drawing

    names = [as_drawn(name, LETTERS) for name, _ in rows]
    label = label_width(names)
    page = _page(rows, label)
    height, width = page.shape[:2]
    with drawing({}, names):
        figure = plt.figure(figsize=(width / 100, height / 100), dpi=100)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.imshow(page, interpolation="nearest", aspect="auto")
        axes.set_axis_off()
        for number, name in enumerate(names):
            middle = number * (SIDE + GAP) + GAP + SIDE / 2
            axes.text(
                label - 2 * GAP,
                middle,
                name,
                ha="right",
                va="center",
                color="#1a1a1a",
                fontsize=SIZE,
            )
        picture = io.BytesIO()
        figure.savefig(picture, format="png", facecolor="white")
        plt.close(figure)
    write_atomic(path, picture.getvalue())


def label_width(names: Sequence[str]) -> int:
    """Return the room that the longest name needs, in pixels."""
    from convmixer.results.fonts import font_file

    font = ImageFont.truetype(font_file("".join(names), say=False), SIZE * 100 / 72)
    return 4 * GAP + math.ceil(1.05 * max(map(font.getlength, names), default=0))  # several fonts may draw them


def _page(rows: Sequence[tuple[str, Sequence[Image.Image]]], label: int) -> np.ndarray:
    """Return the images on white, uint8 (H, W, 3)."""
    most = max((len(images) for _, images in rows), default=0)
    page = Image.new("RGB", (label + most * (SIDE + GAP) + GAP, len(rows) * (SIDE + GAP) + GAP), "white")
    for row, (_, images) in enumerate(rows):
        for column, image in enumerate(images):
            left = label + column * (SIDE + GAP) + (SIDE - image.width) // 2
            page.paste(image, (left, row * (SIDE + GAP) + GAP + (SIDE - image.height) // 2))
    return np.asarray(page)
