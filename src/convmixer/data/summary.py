"""Summarises a data set: classes, splits, sizes, copies, and what is not used."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table
from rich.text import Text

from convmixer.data.datasets import DataSplits, TooFewImages, load_data
from convmixer.data.images import ImageSet
from convmixer.data.options import Options
from convmixer.data.splits import TEST_FRACTION
from convmixer.errors import RequestError
from convmixer.text import terminal

SPLITS = ("train", "val", "test")
SHOWN_CLASSES = 30
SHEET_CLASSES = 60
THUMBNAILS = 8  # images in a row of the contact sheet


def describe(
    spec: str,
    options: Options,
    out: Path | None = None,
    val_fraction: float = 0.1,
    seed: int = 0,
    test_fraction: float = TEST_FRACTION,
) -> dict[str, Any]:
    """Print what a data set holds, draw a contact sheet, and return the summary.

    Images that cannot be used are counted, without a limit on their number.

    Args:
        spec: The data argument.
        options: What the user said about columns, folders and groups.
        out: The picture to write, .png; None: `<name>-classes.png` in the current folder.
        val_fraction, seed, test_fraction: How missing splits are made, as in training.

    Returns:
        The result of `summarise`, and "picture".

    Raises:
        RequestError: There are no such data, or no image can be used.
    """
    from convmixer.results.contact_sheet import SIDE, contact_sheet

    if out is not None and out.suffix.lower() != ".png":
        raise RequestError(f"--out {out} must end in .png")
    wanted = {"val_fraction": val_fraction, "test_fraction": test_fraction, "seed": seed, "options": options}
    try:
        data = load_data(spec, max_bad_fraction=1.0, **wanted)  # type: ignore[arg-type]
    except TooFewImages as error:
        data = load_data(spec, max_bad_fraction=1.0, hold_out=False, **wanted)  # type: ignore[arg-type]
        data.notes.append(f"no split is made: {error}")
    summary, console = summarise(data), Console(soft_wrap=True, highlight=False)
    show(summary, console)
    for note in data.notes:
        console.print(f"note    {terminal(note)}", markup=False)
    picture = out or Path(re.sub(r"[^\w.-]+", "-", f"{data.name}-classes.png"))
    contact_sheet(thumbnails(data, SHEET_CLASSES, SIDE), picture)
    more = f", the first {SHEET_CLASSES} classes" if len(data.classes) > SHEET_CLASSES else ""
    console.print(f"picture {terminal(picture)}, a row per class{more}", markup=False)
    return summary | {"picture": str(picture)}


def summarise(data: DataSplits) -> dict[str, Any]:
    """Return the summary of a data set as plain JSON types.

    Returns:
        "name", "spec"; "train", "val", "test" (images); "classes" (a list of "name" and images per split);
        "imbalance" (images in the largest class of train divided by those in the smallest); "sizes" (smallest, median
        and largest side, and the number of different sizes); "modes" (PIL's mode -> number of images); "copies";
        "unreadable"; "ignored" (a list of "reason", "count", "examples"); "notes".
    """
    assert data.found is not None
    assert data.checked is not None
    counts = {split: _counts(getattr(data, split), len(data.classes)) for split in SPLITS}
    headers = [h for s in data.checked.scans.values() for h in s.headers if not isinstance(h, str)]
    largest = counts["train"] if counts["train"].any() else counts["test"]
    present = largest[largest > 0]
    return {
        "name": data.name,
        "spec": data.spec,
        **{split: int(counts[split].sum()) for split in SPLITS},
        "classes": [
            {"name": name, **{split: int(counts[split][i]) for split in SPLITS}}
            for i, name in enumerate(data.classes)
        ],
        "imbalance": float(present.max() / present.min()) if len(present) else 1.0,
        "img_size": data.img_size,
        "channels": data.in_chans,
        "sizes": _sizes([size for _, size in headers]),
        "modes": dict(Counter(mode for mode, _ in headers).most_common()),
        "copies": data.checked.copies,
        "unreadable": len(data.bad_files),
        "ignored": data.found.unused.to_list(),
        "notes": list(data.notes),
    }


def _counts(images: ImageSet | None, classes: int) -> np.ndarray:
    return np.bincount(images.labels if images else np.empty(0, np.int64), minlength=classes)


def _sizes(sizes: list[tuple[int, int]]) -> dict[str, int]:
    if not sizes:
        return {"different": 0}
    sides = np.array(sizes)
    return {
        "smallest": int(sides.min()),
        "median": int(np.median(sides)),
        "largest": int(sides.max()),
        "different": len(set(sizes)),
    }


def show(summary: dict[str, Any], console: Console) -> None:
    """Print a summary: a table of the classes, and a few lines."""
    s = summary
    rows = sorted(s["classes"], key=lambda row: -sum(row[split] for split in SPLITS))
    shown = rows if len(rows) <= SHOWN_CLASSES else [*rows[: SHOWN_CLASSES // 2], *rows[-SHOWN_CLASSES // 2 :]]
    table = Table("class", *SPLITS, box=None, pad_edge=False)
    for row in s["classes"] if shown is rows else shown:
        table.add_row(Text(terminal(row["name"])), *(str(row[split]) for split in SPLITS))
    table.add_section()
    table.add_row(f"{len(rows)} classes", *(str(s[split]) for split in SPLITS))
    console.print(table)
    if shown is not rows:
        console.print(f"shown are the {len(shown) // 2} largest and the {len(shown) // 2} smallest classes")
    sizes, modes = s["sizes"], ", ".join(f"{count} {mode}" for mode, count in s["modes"].items())
    if sizes["different"] == 1:
        console.print(f"images  all of one size, longest side {sizes['largest']} px; {modes}")
    elif sizes["different"]:
        ends = f"{sizes['smallest']} to {sizes['largest']} px, median {sizes['median']}"
        console.print(f"images  {sizes['different']} sizes, sides of {ends}; {modes}")
    console.print(f"balance the largest class has {s['imbalance']:.1f} times the images of the smallest")
    for key, text in (("copies", "copies of others, byte for byte"), ("unreadable", "that cannot be used")):
        if s[key]:
            console.print(f"        {s[key]} images {text}")


def thumbnails(data: DataSplits, rows: int, side: int) -> list[tuple[str, list[Image.Image]]]:
    """Return for each of the first classes its name and a few images, each fitted into a square.

    Args:
        data: The data.
        rows: Classes at most.
        side: Side of the square, pixels.
    """
    images = data.train or data.test or data.val
    if images is None:
        raise RequestError(f"{data.name} holds no image that can be used")
    found = []
    for number, name in enumerate(data.classes[:rows]):
        places = np.flatnonzero(images.labels == number)
        chosen = (
            places[np.linspace(0, len(places) - 1, min(len(places), THUMBNAILS)).astype(int)] if len(places) else []
        )
        read = [item[0] for place in chosen if (item := images.read(int(place))) is not None]
        found.append((name, [_fitted(image, side) for image in read]))
    return found


def _fitted(image: Image.Image, side: int) -> Image.Image:
    """Return an image in RGB whose longer side is `side`; the pixels of small ones are drawn as blocks."""
    scale = side / max(image.size)
    size = tuple(max(1, round(length * scale)) for length in image.size)
    how = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    return image.convert("RGB").resize(size, how)  # type: ignore[arg-type]
