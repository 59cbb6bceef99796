"""CIFAR-10 packed for a machine without network comes back with the same pixels, labels and columns."""

import importlib.util
import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image


@pytest.fixture(scope="module")
def tool() -> Any:
    path = Path(__file__).parents[1] / "benchmarks" / "small_cifar10.py"
    spec = importlib.util.spec_from_file_location("small_cifar10", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def _read(path: Path) -> dict[bytes, int]:
    table = pq.read_table(path)
    images = [np.asarray(Image.open(io.BytesIO(image["bytes"]))).tobytes() for image in table["img"].to_pylist()]
    return dict(zip(images, table["label"].to_pylist(), strict=True))


def test_no_pixel_changes(tool: Any, tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    schema = pa.schema([("img", image), ("label", pa.int64())], metadata={"huggingface": "names"})
    for split, count in (("train", 230), ("test", 7)):
        rows = [{"bytes": _png(draw.integers(0, 256, (32, 32, 3), np.uint8)), "path": None} for _ in range(count)]
        columns = [pa.array(rows, image), pa.array(draw.integers(0, 10, count))]
        (tmp_path / "from").mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_arrays(columns, schema=schema), tmp_path / "from" / f"{split}-0.parquet")
    tool.pack(tmp_path / "from", tmp_path / "packed", 2, None)
    tool.unpack([tmp_path / "packed" / "part-1", tmp_path / "packed" / "part-0"], tmp_path / "to")
    for split in ("train", "test"):
        made = tmp_path / "to" / f"{split}-00000-of-00001.parquet"
        assert _read(made) == _read(tmp_path / "from" / f"{split}-0.parquet")
        assert pq.read_schema(made).equals(schema, check_metadata=True)
