"""The page of mistakes: which images are on it, in which order, how many at most, all escaped."""

import csv
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser
from tests.pages import SIZES, serious

from convmixer.cli import main
from convmixer.results import mistakes
from convmixer.results.mistakes import Answers, label_errors, write_mistakes, write_table

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 200, 3), dtype=np.uint8))


def answers_of(probabilities: list[list[float]], labels: list[int]) -> Answers:
    return Answers.of(np.log(np.array(probabilities)), np.array(labels))


def many(n: int, classes: int, wrong: float = 0.5) -> Answers:
    """Return answers to n images of which a share is wrong, with any confidence."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, n)
    logits = rng.normal(0, 2, (n, classes))
    right = rng.random(n) > wrong
    logits[right, labels[right]] += 8
    return Answers.of(logits, labels)


def page_of(answers: Answers, classes: list[str], path: Path, **more: Any) -> str:
    write_mistakes(path, answers, classes, lambda place: PICTURE, lambda place: f"{place}.jpg", "a test", **more)
    return path.read_text()


def test_answers_by_hand() -> None:
    answers = Answers.of(np.log([[0.2, 0.7, 0.1], [0.5, 0.3, 0.2]]), np.array([0, 0]))
    assert answers.predicted.tolist() == [1, 0]
    assert answers.confidence == pytest.approx([0.7, 0.5])
    assert answers.loss == pytest.approx(-np.log([0.2, 0.5]))
    assert Answers.of(np.array([[2000.0, -2000.0]]), np.array([1])).loss[0] == 4000  # no overflow
    again = Answers.from_table(answers.table(), answers.places)
    assert all(np.array_equal(getattr(again, name), value) for name, value in vars(answers).items())


def test_a_label_is_doubted_if_the_model_is_surer_than_usual() -> None:
    # class 0 is usually given 0.57, class 1 0.52
    answers = answers_of(
        [[0.8, 0.2], [0.9, 0.1], [0.35, 0.65], [0.3, 0.7], [0.8, 0.2], [0.1, 0.9], [0.49, 0.51]],
        [0, 0, 1, 1, 1, 0, 0],
    )
    assert label_errors(answers).tolist() == [5, 4]
    assert 6 not in label_errors(answers)  # wrong, but less sure of class 1 than usual


def test_a_class_without_images_never_names_a_label_error() -> None:
    assert not len(label_errors(answers_of([[0.1, 0.1, 0.8], [0.8, 0.1, 0.1]], [0, 0])))


def test_the_page_shows_pairs_and_losses_in_order(tmp_path: Path) -> None:
    answers = answers_of([[0.2, 0.7, 0.1], [0.1, 0.8, 0.1], [0.1, 0.1, 0.8], [0.1, 0.8, 0.1]], [0, 0, 0, 1])
    page = page_of(answers, ["cat", "dog", "owl"], tmp_path / "m.html")
    assert "3 of 4 images are misclassified" in page
    assert page.index("cat → dog") < page.index("cat → owl")
    worst = page[page.index("Largest loss") :]
    assert re.findall(r"loss (\d\.\d\d)", worst) == ["2.30", "2.30", "1.61", "0.22"]
    assert 'class="right">dog' in worst


def test_a_weak_model_s_doubts_are_put_in_doubt(tmp_path: Path) -> None:
    weak, good = (page_of(many(500, 10, wrong), list("abcdefghij"), tmp_path / "m.html") for wrong in (0.9, 0.3))
    assert "the model is wrong about most images" in weak
    assert "the model is wrong about most images" not in good


def test_no_mistake_is_said(tmp_path: Path) -> None:
    page = page_of(answers_of([[0.9, 0.1], [0.2, 0.8]], [0, 1]), ["a", "b"], tmp_path / "m.html")
    assert "0 of 2 images are misclassified (top-1 100.00%)" in page
    assert "None found." in page
    assert "None are." in page


@pytest.mark.parametrize("classes", [2, 10, 43, 1000])
def test_the_page_is_bounded_at_any_number_of_images_and_classes(tmp_path: Path, classes: int) -> None:
    page = page_of(many(20_000, classes), [f"class {i}" for i in range(classes)], tmp_path / "m.html")
    most = mistakes.LABEL_ERRORS + mistakes.WORST + mistakes.PAIRS * mistakes.IN_PAIR
    assert mistakes.WORST <= page.count("<img") <= most
    assert len(page) < 5_000_000
    assert not re.search(r'(src|href)="(?!data:|#)', page)


def test_images_are_read_once_and_no_longer_than_allowed(tmp_path: Path) -> None:
    reads: list[int] = []

    def read(place: int) -> Image.Image | None:
        reads.append(place)
        return PICTURE if place % 2 else None

    answers, path = many(500, 3), tmp_path / "m.html"
    write_mistakes(path, answers, ["a", "b", "c"], read, str, "")
    assert len(reads) == len(set(reads))
    assert f"{sum(not place % 2 for place in reads)} images are not shown" in path.read_text()
    reads.clear()
    write_mistakes(path, answers, ["a", "b", "c"], read, str, "", seconds=0)
    assert reads == []
    assert "<img" not in path.read_text()


def test_names_of_strangers_are_escaped_and_short(tmp_path: Path) -> None:
    evil = '"><script>alert(1)</script>' + "x" * 10_000
    path = tmp_path / "m.html"
    answers = answers_of([[0.1, 0.9], [0.9, 0.1]], [0, 0])
    write_mistakes(path, answers, [evil, "\u202eb\udcff"], lambda place: PICTURE, lambda place: evil, evil)
    page = path.read_text()
    assert "<script" not in page
    assert "\u202e" not in page
    assert "x" * 100 not in page[page.index("<section>") :]


def test_a_class_with_one_image_is_not_counted_as_1_of_1(tmp_path: Path) -> None:
    page = page_of(answers_of([[0.1, 0.9], [0.2, 0.8]], [0, 1]), ["a", "b"], tmp_path / "m.html")
    assert "a → b" in page
    assert "the only image" in page
    assert "1 of 1" not in page


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("classes", "scheme"), [(2, "dark"), (43, "light"), (1000, "dark")])
def test_the_page_fits_and_is_legible(browser: Browser, tmp_path: Path, size: str, classes: int, scheme: Any) -> None:
    names = [f"a_long_name_without_any_space_at_all_{n}" if n % 2 else f"speed limit {n}" for n in range(classes)]
    page_of(many(2 * classes, classes), names, tmp_path / "m.html")
    width, height = SIZES[size]
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
    page.goto((tmp_path / "m.html").as_uri())
    edges = "[...document.querySelectorAll('body *')].map(e => e.getBoundingClientRect().right)"
    assert max(page.evaluate(edges)) <= width + 1
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert serious(page) == []
    page.close()


def test_the_table_holds_every_mistake_and_marks_the_doubtful_labels(tmp_path: Path) -> None:
    answers = answers_of([[0.2, 0.8], [0.1, 0.9], [0.9, 0.1]], [0, 1, 1])
    write_table(tmp_path / "m.csv", answers, ["=cat", "dog"], lambda place: f"{place}.png")
    rows = list(csv.DictReader((tmp_path / "m.csv").read_text().splitlines()))
    assert [(row["image"], row["label"], row["predicted"]) for row in rows] == [
        ("2.png", "dog", "'=cat"),
        ("0.png", "'=cat", "dog"),
    ]
    assert [row["likely_label_error"] for row in rows] == ["1", "1"]


def test_val_finds_the_labels_that_were_swapped(
    digits_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Real digits, two of them in the wrong folders: the model that learned the rest doubts these labels."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    for i in range(1400, 1500):
        label = {1410: 0, 1411: 1}.get(i, digits.target[i])
        folder = tmp_path / "scans" / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((digits.images[i] * 15.9).astype(np.uint8)).save(folder / f"{i}.png")
    out = tmp_path / "out"
    assert main(["val", str(digits_weights), str(tmp_path / "scans"), "--mistakes", "--out", str(out)]) == 0
    page = (out / "mistakes-train.html").read_text()
    rows = csv.DictReader((out / "mistakes-train.csv").read_text().splitlines())
    doubted = {Path(row["image"]).name for row in rows if row["likely_label_error"] == "1"}
    assert doubted >= {"1410.png", "1411.png"}
    assert "1410.png" in page
    assert "of which" in capsys.readouterr().out
