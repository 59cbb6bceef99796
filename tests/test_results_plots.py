"""Pictures of a run are written, have a solid background, and show what they are given."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from convmixer.results import plots


def _colours(path: Path, background: tuple[int, ...] = (255, 255, 255, 255)) -> tuple[Image.Image, int]:
    image = Image.open(path).convert("RGBA")
    assert image.getpixel((1, 1)) == background
    assert min(image.size) > 100
    return image, len(image.getcolors(1 << 24))


def test_curves_with_and_without_validation(tmp_path: Path) -> None:
    rows = [{"epoch": i, "lr": 0.1, "train_loss": 2 / i, "val_loss": 1.5 / i, "top1": 9.0 * i} for i in range(1, 6)]
    plots.curves(rows, tmp_path / "a.png")
    plots.curves([{"epoch": 1, "lr": 0.1, "train_loss": 2.0, "top1": None}], tmp_path / "b.png")
    assert all(_colours(tmp_path / name)[1] > 20 for name in ("a.png", "b.png"))


def test_grids_and_kernels(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    plots.image_grid(rng.random((5, 8, 8)), list("abcde"), tmp_path / "grey.png", "digits", columns=3)
    plots.image_grid(rng.random((2, 8, 8, 3)), ["a", "b"], tmp_path / "colour.png", "images")
    plots.patch_filters(rng.normal(size=(20, 3, 4, 4)), tmp_path / "filters.png")
    plots.patch_filters(rng.normal(size=(20, 1, 1, 1)), tmp_path / "points.png")
    layers = {f"block {i}": rng.normal(size=(16, 5, 5)) for i in range(3)}
    plots.depthwise_kernels(layers, tmp_path / "kernels.png", per_layer=6)
    bare = {"filters.png", "points.png", "kernels.png"}  # on the page's own background
    colours = {path: (255, 255, 255, 0) if path.name in bare else (255, 255, 255, 255) for path in tmp_path.iterdir()}
    counts = {path.name: _colours(path, background)[1] for path, background in colours.items()}
    assert len(counts) == 5
    assert all(n > 20 for n in counts.values()), counts


@pytest.mark.parametrize("names", [["$\\x$", "a$b$"], ["caf\udce9", "b"]])
def test_names_are_drawn_as_they_are(tmp_path: Path, names: list[str]) -> None:
    grey = np.zeros((2, 8, 8))
    plots.image_grid(grey, names, tmp_path / "grid.png", "images")
    plots.confusion_matrix(np.eye(2), names, tmp_path / "confusion.png")
    plots.explanation(grey[0], grey[0], grey[0], np.eye(2), names, [0.7, 0.3], tmp_path / "explained.png")
    assert all((tmp_path / f"{name}.png").is_file() for name in ("grid", "confusion", "explained"))


@pytest.mark.parametrize("shape", [(4, 1, 2, 2), (4, 3, 2, 2)])
def test_constant_filters_do_not_divide_by_zero(tmp_path: Path, shape: tuple[int, ...]) -> None:
    plots.patch_filters(np.ones(shape), tmp_path / "filters.png")
    plots.depthwise_kernels({"block": np.zeros((4, 3, 3))}, tmp_path / "kernels.png", per_layer=4)
