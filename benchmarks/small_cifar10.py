"""Write CIFAR-10 smaller and in parts, to bring it to a machine without network. No pixel changes.

    python benchmarks/small_cifar10.py pack FROM TO --parts 2     # TO/part-0 and TO/part-1, 98 MB together
    python benchmarks/small_cifar10.py unpack PART PART TO        # there: what `convmixer train TO` reads

FROM is the folder of the data set's own parquet files (138 MB of PNG). Packed, a hundred images are one picture, as
lossless WebP. It takes minutes to pack and seconds to unpack.
"""

import argparse
import io
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

SIDE, ACROSS = 32, 10  # pixels of an image, images on a side of a picture
EACH = ACROSS * ACROSS


def pack(source: Path, target: Path, parts: int, most: int | None) -> None:
    """Write the pictures, the labels and the original columns in that many files of about equal size."""
    rows, schemas = [], {}
    for split in ("train", "test"):
        (path,) = source.glob(f"{split}-*.parquet")
        table = pq.read_table(path)[:most]
        schemas[split] = table.schema.serialize().to_pybytes().hex()
        image, label = table.column_names  # their order in the data set
        for first in range(0, len(table), EACH):
            piece = table[first : first + EACH]
            pixels = [np.asarray(Image.open(io.BytesIO(i["bytes"])).convert("RGB")) for i in piece[image].to_pylist()]
            rows.append({"split": split, "picture": _encode(np.stack(pixels)), "labels": piece[label].to_pylist()})
    for part in range(parts):
        folder = target / f"part-{part}"
        folder.mkdir(parents=True, exist_ok=True)
        table = pa.Table.from_pylist(rows[part::parts]).replace_schema_metadata({"schemas": json.dumps(schemas)})
        pq.write_table(table, folder / f"cifar10-{part}.parquet", compression="none")
        print(f"{folder}: {(folder / f'cifar10-{part}.parquet').stat().st_size / 1e6:.1f} MB", flush=True)


def unpack(parts: list[Path], target: Path) -> None:
    """Write one parquet file for each split, with the original columns; the order of images may differ."""
    tables = [pq.read_table(path) for part in parts for path in sorted(part.glob("cifar10-*.parquet"))]
    schemas = json.loads(tables[0].schema.metadata[b"schemas"])
    target.mkdir(parents=True, exist_ok=True)
    for split, text in schemas.items():
        schema = pa.ipc.read_schema(pa.py_buffer(bytes.fromhex(text)))
        rows = [row for table in tables for row in table.to_pylist() if row["split"] == split]
        labels = [label for row in rows for label in row["labels"]]
        images = [
            {"bytes": _png(i), "path": None} for row in rows for i in _decode(row["picture"], len(row["labels"]))
        ]
        columns = [pa.array(values, field.type) for values, field in zip((images, labels), schema, strict=True)]
        pq.write_table(pa.Table.from_arrays(columns, schema=schema), target / f"{split}-00000-of-00001.parquet")
        print(f"{split}: {len(labels)} images", flush=True)


def _encode(images: np.ndarray) -> bytes:
    """(N, 32, 32, 3) -> lossless WebP of a picture with the images in rows."""
    canvas = np.zeros((EACH, SIDE, SIDE, 3), np.uint8)
    canvas[: len(images)] = images
    pixels = canvas.reshape(ACROSS, ACROSS, SIDE, SIDE, 3).transpose(0, 2, 1, 3, 4).reshape(ACROSS * SIDE, -1, 3)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "WEBP", lossless=True, method=6, quality=100, exact=True)
    if not np.array_equal(_decode(file.getvalue(), len(images)), images):
        raise SystemExit("WebP changed a pixel here")
    return file.getvalue()


def _decode(picture: bytes, count: int) -> np.ndarray:
    pixels = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"))
    tiles = pixels.reshape(ACROSS, SIDE, ACROSS, SIDE, 3).transpose(0, 2, 1, 3, 4)
    return tiles.reshape(EACH, SIDE, SIDE, 3)[:count]


def _png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=1)
    return file.getvalue()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=("pack", "unpack"))
    parser.add_argument("folders", type=Path, nargs="+", help="pack: FROM TO; unpack: PARTS and TO")
    parser.add_argument("--parts", type=int, default=1)
    parser.add_argument("--images", type=int, help="of each split, to try it")
    options = parser.parse_args()
    *sources, target = options.folders
    if options.task == "pack":
        pack(sources[0], target, options.parts, options.images)
    else:
        unpack(sources, target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
