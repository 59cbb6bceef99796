"""The confusion matrix at any number of classes: what is shown, in which order, and the pairs listed next to it."""

import itertools
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from convmixer.results import fonts, plots
from convmixer.results.labelled import with_labels


def confused(n: int, seed: int = 0) -> np.ndarray:
    """Return counts of n classes, each mostly right and sometimes taken for the class half the classes away."""
    rng = np.random.default_rng(seed)
    counts = np.diag(rng.integers(50, 100, n))
    for i in range(n):
        counts[i, (i + n // 2) % n] += rng.integers(1, 20)
    return counts


def drawn(counts: np.ndarray, names: list[str], path: Path, monkeypatch: pytest.MonkeyPatch) -> Figure:
    kept: list[Figure] = []

    def keep(figure: Figure, _: Path) -> None:
        figure.canvas.draw()
        kept.append(figure)

    monkeypatch.setattr(plots, "save", keep)
    plots.confusion_matrix(counts, names, path)
    plt.close(kept[0])
    return kept[0]


@pytest.mark.parametrize(("n", "shown"), [(2, 2), (10, 10), (43, 43), (60, 60), (1000, 40)])
def test_every_class_shown_has_its_name_and_none_covers_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n: int, shown: int
) -> None:
    figure = drawn(confused(n), [f"a class called {i}" for i in range(n)], tmp_path / "c.png", monkeypatch)
    for axis in (figure.axes[0].xaxis, figure.axes[0].yaxis):
        labels = [label for label in axis.get_ticklabels() if label.get_text()]
        assert len(labels) == shown
        boxes = sorted((box.x0, box.x1) if axis.axis_name == "x" else (box.y0, box.y1) for box in map(_box, labels))
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(boxes))
    whole, tight = figure.bbox_inches, figure.get_tightbbox()
    assert min(tight.x0, tight.y0, whole.x1 - tight.x1, whole.y1 - tight.y1) >= -0.01  # nothing is cut


def _box(label: plt.Text) -> object:
    return label.get_window_extent()


def test_the_pairs_confused_most_come_first() -> None:
    counts = np.array([[9, 3, 0], [7, 5, 1], [0, 0, 2]])
    assert plots.confused_pairs(counts) == [(1, 0), (0, 1), (1, 2)]
    assert plots.confused_pairs(np.eye(3, dtype=int)) == []


def test_classes_taken_for_each_other_stand_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = drawn(confused(20), [str(i) for i in range(20)], tmp_path / "c.png", monkeypatch)
    order = [int(label.get_text()) for label in figure.axes[0].get_yticklabels()]
    assert sorted(order) == list(range(20))
    apart = [abs(order.index(i) - order.index(i + 10)) for i in range(10)]
    assert apart == [1] * 10


def test_of_many_classes_those_confused_most_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = np.diag(np.full(100, 50))
    counts[97, 3] = 20
    figure = drawn(counts, [str(i) for i in range(100)], tmp_path / "c.png", monkeypatch)
    assert {"97", "3"} <= {label.get_text() for label in figure.axes[0].get_yticklabels()}
    assert "40 of 100 classes" in figure.axes[0].get_title()
    assert [label.get_text() for label in figure.axes[1].get_yticklabels()] == ["97 → 3"]


def test_a_script_without_a_font_is_said_once_and_breaks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fonts, "_installed", list)
    monkeypatch.setattr(fonts, "_said", set())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("a.png", "b.png"):
            plots.confusion_matrix(np.eye(2, dtype=int), ["犬", "猫"], tmp_path / name)
    assert capsys.readouterr().out.count("no font here draws 犬猫") == 1
    assert (tmp_path / "b.png").stat().st_size > 1000


def test_labels_on_photos_say_it_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(fonts, "_installed", list)
    monkeypatch.setattr(fonts, "_said", set())
    for _ in range(2):
        with_labels(Image.new("RGB", (300, 300)), [("犬", 0.9), ("cat", 0.1)])
    assert capsys.readouterr().out.count("no font here draws 犬,") == 1


def test_an_installed_font_draws_what_the_own_one_lacks() -> None:
    families, missing = fonts.families_for("abc Ü 犬")
    assert families[0] == "DejaVu Sans"
    if missing:
        pytest.skip("no font with CJK on this machine")
    assert len(families) == 2


def test_long_names_that_differ_in_the_middle_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"a class called {i} with a long name" for i in range(20)]
    figure = drawn(confused(20), names, tmp_path / "c.png", monkeypatch)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert len(set(labels)) == 20
    assert all(len(label) <= 14 for label in labels)
    assert fonts.told_apart(["cat", "dog"]) == ["cat", "dog"]
