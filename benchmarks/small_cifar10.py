"""Write CIFAR-10 smaller and in parts, to bring it to a machine without network. No pixel changes.

    python benchmarks/small_cifar10.py FROM TO [--part-mb 30] [--images 100]

FROM is the folder of the data set's own parquet files (138 MB of PNG). The images are written as lossless WebP, in
parquet files that `convmixer train TO` reads; with --part-mb each part is a folder of at most that many megabytes,
whose files belong together in one folder again.
"""

import argparse
import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

EACH = 5000  # images of a file


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--part-mb", type=float, default=0, help="megabytes of a part; 0: all in one folder")
    parser.add_argument("--images", type=int, help="of each split, to try it")
    options = parser.parse_args()
    folder, used, number = options.target, 0.0, 0
    for split in ("train", "test"):
        (path,) = options.source.glob(f"{split}-*.parquet")
        table = pq.read_table(path)[: options.images]
        pieces = range(0, len(table), EACH)
        for i, first in enumerate(pieces):
            data = _small(table[first : first + EACH])
            if options.part_mb and (not number or used + len(data) > options.part_mb * 1e6):
                folder, used, number = options.target / f"part-{number}", 0.0, number + 1
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{split}-{i:05d}-of-{len(pieces):05d}.parquet").write_bytes(data)
            used += len(data)
            print(f"{folder.name}: {split} {first + EACH}, {used / 1e6:.1f} MB", flush=True)
    return 0


def _small(table: pa.Table) -> bytes:
    """Return a parquet file with the images of a table as lossless WebP, and its other columns unchanged."""
    column = next(name for name in table.column_names if pa.types.is_struct(table.schema.field(name).type))
    images = [_as_webp(image) for image in table[column].to_pylist()]
    at = table.column_names.index(column)
    changed = table.set_column(at, table.schema.field(at), pa.array(images, table.schema.field(at).type))
    file = io.BytesIO()
    pq.write_table(changed, file, compression="none", row_group_size=1000)
    return file.getvalue()


def _as_webp(image: dict[str, Any]) -> dict[str, Any]:
    pixels = Image.open(io.BytesIO(image["bytes"])).convert("RGB")
    file = io.BytesIO()
    pixels.save(file, "WEBP", lossless=True, method=6, quality=100, exact=True)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(file.getvalue())).convert("RGB")), np.asarray(pixels))
    return image | {"bytes": file.getvalue()}


if __name__ == "__main__":
    sys.exit(main())
