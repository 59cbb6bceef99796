"""Small image sets of every kind, made of real scans and a real photograph, for the tests of data."""

import io
import json
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from sklearn.datasets import load_digits, load_sample_image

from convmixer.data.datasets import DataSplits, ImageSet, load_data

PHOTO = Image.fromarray(load_sample_image("china.jpg")).resize((64, 43))
DIGITS = load_digits()


def load(spec: object, val_fraction: float = 0.2, seed: int = 0, bad: float = 0.0, **more: Any) -> DataSplits:
    return load_data(str(spec), val_fraction=val_fraction, seed=seed, max_bad_fraction=bad, **more)


def write_noise(root: Path) -> Path:
    """Write two classes, "a" and "b", of twenty images of noise each, and return the folder."""
    noise = np.random.default_rng(0)
    for name in "ab":
        (root / name).mkdir(parents=True)
        for number in range(20):
            pixels = noise.integers(0, 255, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root


def png(index: int) -> bytes:
    """Return one of the real scans as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray((DIGITS.images[index] * 15).astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def label(index: int) -> str:
    return f"digit {DIGITS.target[index]}"


def write_folder(root: Path, indices: Iterable[int]) -> Path:
    """Write scans into class folders."""
    for i in indices:
        folder = root / label(i)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i:04}.png").write_bytes(png(i))
    return root


def write_parquet(path: Path, indices: range, *, features: bool = True, column: str = "img") -> None:
    """Write scans as the Hugging Face hub's parquet, with or without its description of the columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images = pa.array([{"bytes": png(i), "path": f"{i}.png"} for i in indices])
    other = pa.array([f"note {i}" for i in indices])
    table = pa.table({"note": other, column: images, "target": pa.array([int(DIGITS.target[i]) for i in indices])})
    if features:
        described = {
            column: {"_type": "Image"},
            "target": {"_type": "ClassLabel", "names": [f"digit {i}" for i in range(10)]},
        }
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": described}})})
    pq.write_table(table, path, row_group_size=16)


def write_members(path: Path, members: Iterable[tuple[str, bytes]]) -> None:
    """Write a tar file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def write_tar(path: Path, indices: range, labels: Callable[[int], str] = label) -> None:
    """Write scans as a WebDataset shard."""
    pairs = (((f"{i:04}.png", png(i)), (f"{i:04}.cls", labels(i).encode())) for i in indices)
    write_members(path, (member for pair in pairs for member in pair))


def pixels(images: ImageSet) -> list[bytes]:
    return sorted(images[i][0].tobytes() for i in range(len(images)))


def parts(data: DataSplits) -> tuple[ImageSet, ImageSet, ImageSet]:
    assert data.train is not None
    assert data.val is not None
    assert data.test is not None
    return data.train, data.val, data.test


def names(images: ImageSet) -> set[str]:
    return {images.name(i) for i in range(len(images))}
