"""The exported page in Chromium: same answers as `predict`, nothing leaves the machine, accessible to all."""

import base64
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser
from tests.pages import DROP, SIZES, cifar_images, drop, open_page, photograph, serious

from convmixer.predict.files import predict_files


@pytest.mark.parametrize("images", [30, pytest.param(200, marks=pytest.mark.slow)])
def test_the_web_folder_answers_as_predict_on_test_images_and_a_photograph(
    browser: Browser, page_address: str, page_weights: str, cifar10: Path, tmp_path: Path, images: int
) -> None:
    bodies = cifar_images(cifar10, images)
    files = [tmp_path / f"{n:03}.png" for n in range(images)]
    for file, body in zip(files, bodies, strict=True):
        file.write_bytes(body)
    (tmp_path / "photo.jpg").write_bytes(photograph())
    answer = predict_files(page_weights, [*files, tmp_path / "photo.jpg"], 1, 64, "fp32")
    expected = [prediction["classes"][0] for prediction in answer["predictions"]]
    page, wrong = open_page(browser, page_address)
    page.context.set_offline(True)  # once loaded it needs no network at all
    got = [drop(page, body) for body in bodies]
    got.append(drop(page, photograph(), "image/jpeg", "photo.jpg"))
    assert got == expected
    assert wrong == []
    page.context.close()


def test_the_folder_opened_from_disk_works(browser: Browser, page_folder: Path) -> None:
    page, wrong = open_page(browser, (page_folder / "index.html").as_uri().removesuffix("index.html") + "index.html")
    assert drop(page, photograph(), "image/jpeg") is not None
    assert [line for line in wrong if not line.startswith("file://")] == []
    page.context.close()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_accessible_and_fits(
    browser: Browser, page_address: str, size: str, scheme: str, tmp_path: Path
) -> None:
    page, wrong = open_page(browser, page_address, size, scheme)
    assert serious(page) == []
    page.click("#samples button:nth-child(2)")
    page.wait_for_selector("body[data-answer]")
    page.wait_for_timeout(500)  # let the bars settle: text over a moving bar has no contrast to measure
    assert serious(page) == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    folder = Path(os.environ.get("CONVMIXER_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=folder / f"{size}-{scheme}.png", full_page=size == "phone")
    assert wrong == []
    page.context.close()


def test_the_keyboard_alone_is_enough_and_the_answer_is_announced(browser: Browser, page_address: str) -> None:
    page, _ = open_page(browser, page_address)
    for _ in range(12):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.closest('#samples') !== null"):
            break
    page.keyboard.press("Enter")
    page.wait_for_selector("body[data-answer]")
    assert page.inner_text("[role=status]").startswith("Answer: ")
    first = page.get_attribute("#map", "aria-label")
    second = page.locator(".classes button").nth(1)
    second.focus()
    page.keyboard.press("Space")
    assert page.get_attribute("#map", "aria-label") != first
    assert second.get_attribute("aria-pressed") == "true"
    page.context.close()


def test_a_file_that_is_no_picture_is_said_and_the_page_goes_on(browser: Browser, page_address: str) -> None:
    page, _ = open_page(browser, page_address)
    script = DROP.replace("i < 2000", "i < 100")
    page.evaluate(script, [base64.b64encode(b"hello").decode(), "image/png", "a.png"])
    assert "not a picture" in page.inner_text("[role=alert]")
    assert drop(page, photograph(), "image/jpeg") is not None
    assert page.inner_text("[role=alert]") == ""
    page.context.close()


def test_a_picture_whose_bits_a_browser_cannot_read_is_refused(browser: Browser, page_address: str) -> None:
    page, _ = open_page(browser, page_address)
    buffer = io.BytesIO()
    Image.fromarray(np.arange(1024, dtype=np.uint16).reshape(32, 32)).save(buffer, "PNG")
    assert drop(page, buffer.getvalue()) is not None  # a model of 16-bit images reads the upper byte too
    page.evaluate("CONVMIXER_MODEL.preprocessing.bits = 12")
    page.evaluate(
        DROP.replace("i < 2000", "i < 100"), [base64.b64encode(buffer.getvalue()).decode(), "image/png", "a.png"]
    )
    assert "16 bits, of which the model reads 12; a browser cannot" in page.inner_text("[role=alert]")
    assert drop(page, photograph(), "image/jpeg") is not None
    page.context.close()


def test_a_pasted_and_a_chosen_picture_are_classified(browser: Browser, page_address: str, tmp_path: Path) -> None:
    page, _ = open_page(browser, page_address)
    paste = DROP.replace('getElementById("drop").', "").replace("DragEvent", "ClipboardEvent")
    paste = paste.replace('"drop"', '"paste"').replace("dataTransfer", "clipboardData")
    pasted = page.evaluate(paste, [base64.b64encode(photograph()).decode(), "image/jpeg", "a.jpg"])
    (tmp_path / "photo.jpg").write_bytes(photograph())
    for field in ("#file", "#camera"):
        page.evaluate("delete document.body.dataset.answer")
        page.set_input_files(field, tmp_path / "photo.jpg")
        page.wait_for_selector("body[data-answer]")
        assert page.get_attribute("body", "data-answer") == pasted
    page.context.close()


def test_the_page_forbids_every_connection(page_folder: Path) -> None:
    page = (page_folder / "index.html").read_text()
    assert "connect-src 'none'" in page
    model = json.loads((page_folder / "model.js").read_text().partition("=")[2].strip().removesuffix(";"))
    assert len(model["samples"]) == 8
