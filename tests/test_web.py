"""The page in real headless Chromium: same answers as `predict`, nothing leaves the machine, accessible to all."""

import base64
import functools
import http.server
import io
import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright
from tests.test_serve import Running

from convmixer.exported.check import Images
from convmixer.exported.export import export_model
from convmixer.inference import load_classifier, predict_files
from convmixer.models.registry import create_model, shipped
from convmixer.models.weights import load_model, save_model
from convmixer.preprocess import Preprocessing, load_image, resize_and_crop
from convmixer.serve.app import Limits

SHIPPED = "convmixer_256_8.cifar10"
NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
SIZES = {"desk": (1280, 800), "phone": (390, 844)}
DROP = """async ([base64, type, name]) => {
  const bytes = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
  const transfer = new DataTransfer();
  transfer.items.add(new File([bytes], name, { type }));
  delete document.body.dataset.answer;
  document.getElementById("drop").dispatchEvent(new DragEvent("drop", { bubbles: true, dataTransfer: transfer }));
  for (let i = 0; i < 2000 && !document.body.dataset.answer; i++) await new Promise((done) => setTimeout(done, 5));
  return document.body.dataset.answer;
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
    )
    if not found:
        pytest.skip("Chromium is not installed: see .ci/system-packages")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=FLAGS.split())
        yield browser
        browser.close()


def photograph(kind: str = "JPEG") -> bytes:
    from sklearn.datasets import load_sample_image

    buffer = io.BytesIO()
    Image.fromarray(load_sample_image("china.jpg")).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The shipped weights; before they exist, untrained ones of a small model."""
    if SHIPPED in shipped():
        return SHIPPED
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("weights")
    p = Preprocessing(img_size=32, mean=(0.49, 0.48, 0.45), std=(0.25, 0.24, 0.26))
    model = create_model("convmixer_64_2_p4_k5", num_classes=10).eval()
    args = {"architecture": "convmixer_64_2_p4_k5", "model_args": {}, "classes": NAMES, "preprocessing": p}
    save_model(folder, model, **args)
    return str(folder)


@pytest.fixture(scope="module")
def web(weights: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The exported folder."""
    loaded = load_model(weights)
    image = Image.open(io.BytesIO(photograph()))
    cuts = [image.crop((40 * n, 20 * n, 40 * n + 160, 20 * n + 160)) for n in range(8)]
    samples = []
    for cut in cuts:
        buffer = io.BytesIO()
        cut.resize((32, 32)).save(buffer, "PNG")
        samples.append(buffer.getvalue())
    path = tmp_path_factory.mktemp("web") / "page"
    images, about = Images("photograph", cuts, None, ()), {"architecture": "convmixer_64_2"}
    export_model(loaded.model, loaded.classes, loaded.preprocessing, images, path, "web", "fp32", about, samples)
    return path


@pytest.fixture(scope="module")
def address(web: Path) -> Iterator[str]:
    """The folder on a plain file server."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(web))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


def open_page(browser: Browser, address: str, size: str = "desk", scheme: str = "light") -> tuple[Page, list[str]]:
    """Return the page, ready, and a list that grows with whatever goes wrong or leaves the machine."""
    width, height = SIZES[size]
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)  # type: ignore[arg-type]
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    own = (address, "data:", "blob:")
    page.on("request", lambda request: None if request.url.startswith(own) else wrong.append(request.url))
    page.goto(address)
    page.wait_for_selector("body[data-ready]", timeout=60_000)
    return page, wrong


def drop(page: Page, body: bytes, kind: str = "image/png", name: str = "a.png") -> str | None:
    answer: str | None = page.evaluate(DROP, [base64.b64encode(body).decode(), kind, name])
    return answer


def cifar_images(folder: Path, count: int) -> list[bytes]:
    table = pyarrow.parquet.read_table(folder / "test-00000-of-00001.parquet", columns=["img"])
    return [row["bytes"] for row in table.slice(0, count)["img"].to_pylist()]


def test_the_web_folder_answers_as_predict_on_200_test_images_and_a_photograph(
    browser: Browser, address: str, weights: str, cifar10: Path, tmp_path: Path
) -> None:
    bodies = cifar_images(cifar10, 200)
    files = [tmp_path / f"{n:03}.png" for n in range(200)]
    for file, body in zip(files, bodies, strict=True):
        file.write_bytes(body)
    (tmp_path / "photo.jpg").write_bytes(photograph())
    answer = predict_files(weights, [*files, tmp_path / "photo.jpg"], 1, 64, "fp32")
    expected = [prediction["classes"][0] for prediction in answer["predictions"]]
    page, wrong = open_page(browser, address)
    page.context.set_offline(True)  # once loaded it needs no network at all
    got = [drop(page, body) for body in bodies]
    got.append(drop(page, photograph(), "image/jpeg", "photo.jpg"))
    assert got == expected
    assert wrong == []
    page.context.close()


def test_the_folder_opened_from_disk_works(browser: Browser, web: Path) -> None:
    page, wrong = open_page(browser, (web / "index.html").as_uri().removesuffix("index.html") + "index.html")
    assert drop(page, photograph(), "image/jpeg") is not None
    assert [line for line in wrong if not line.startswith("file://")] == []
    page.context.close()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP"])
def test_preprocessing_in_the_browser_is_pillows_to_the_bit(browser: Browser, address: str, kind: str) -> None:
    body = photograph(kind)
    page, _ = open_page(browser, address)
    cases = [(32, 3, "bicubic", 1.0), (224, 3, "bicubic", 0.96), (17, 3, "bilinear", 0.875), (64, 3, "nearest", 1.0)]
    for size, chans, filter, crop in [*cases, (28, 1, "bicubic", 0.9), (700, 3, "bicubic", 1.0)]:
        p = Preprocessing(size, chans, (0.5,) * chans, (0.25,) * chans, filter, crop)
        seen = np.asarray(resize_and_crop(load_image(body, chans), p)).reshape(-1)
        script = """async ([base64, p]) => {
          const blob = new Blob([Uint8Array.from(atob(base64), (c) => c.charCodeAt(0))]);
          return Array.from((await prepare(blob, p)).seen.data);
        }"""
        values = vars(p) | {"mean": list(p.mean), "std": list(p.std)}
        got = page.evaluate(script, [base64.b64encode(body).decode(), values])
        difference = np.abs(np.array(got) - seen.astype(int)).max()
        # lossy formats: two decoders may round a pixel differently; grey: Pillow reads the JPEG's own luma
        assert difference <= (0 if kind in ("PNG", "BMP") else 3), (size, filter, int(difference))
    page.context.close()


def test_a_picture_larger_than_a_canvas_is_read_whole(browser: Browser, address: str) -> None:
    image = Image.open(io.BytesIO(photograph())).resize((5200, 3600))  # above 16,777,216 pixels
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    p = Preprocessing(700, 3, (0.5,) * 3, (0.25,) * 3)
    seen = np.asarray(resize_and_crop(load_image(buffer.getvalue()), p)).reshape(-1)
    page, _ = open_page(browser, address)
    script = """async ([base64, p]) => {
      const blob = new Blob([Uint8Array.from(atob(base64), (c) => c.charCodeAt(0))]);
      return Array.from((await prepare(blob, p)).seen.data);
    }"""
    values = vars(p) | {"mean": list(p.mean), "std": list(p.std)}
    got = page.evaluate(script, [base64.b64encode(buffer.getvalue()).decode(), values])
    np.testing.assert_array_equal(got, seen)
    page.context.close()


def serious(page: Page) -> list[str]:
    """Return the violations of the accessibility rules that matter most."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page).response["violations"]
    return [f"{v['id']}: {v['nodes'][0]['html']}" for v in found if v["impact"] in ("serious", "critical")]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_accessible_and_fits(
    browser: Browser, address: str, size: str, scheme: str, tmp_path: Path
) -> None:
    page, wrong = open_page(browser, address, size, scheme)
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


def test_the_keyboard_alone_is_enough_and_the_answer_is_announced(browser: Browser, address: str) -> None:
    page, _ = open_page(browser, address)
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


def test_a_file_that_is_no_picture_is_said_and_the_page_goes_on(browser: Browser, address: str) -> None:
    page, _ = open_page(browser, address)
    script = DROP.replace("i < 2000", "i < 100")
    page.evaluate(script, [base64.b64encode(b"hello").decode(), "image/png", "a.png"])
    assert "not a picture" in page.inner_text("[role=alert]")
    assert drop(page, photograph(), "image/jpeg") is not None
    assert page.inner_text("[role=alert]") == ""
    page.context.close()


def test_a_pasted_and_a_chosen_picture_are_classified(browser: Browser, address: str, tmp_path: Path) -> None:
    page, _ = open_page(browser, address)
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


def test_the_served_page_answers_as_the_classifier(browser: Browser, weights: str, cifar10: Path) -> None:
    classifier = load_classifier(weights, "fp32")
    bodies = [*cifar_images(cifar10, 200), photograph()]
    expected = [classifier.predict([load_image(body)], 1)[0][0][0] for body in bodies]
    with Running(classifier, Limits()) as server:
        page, wrong = open_page(browser, server.address + "/")
        assert [drop(page, body) for body in bodies] == expected
        coloured = """() => {
          const { data } = document.getElementById("map").getContext("2d").getImageData(0, 0, 512, 512);
          const far = (i) => Math.abs(data[i] - data[i + 2]) > 20; // orange or blue, not the grey picture
          const place = (x, y) => 4 * (512 * y + x);
          return [64, 192, 320, 448].filter((y) => [64, 192, 320, 448].some((x) => far(place(x, y)))).length;
        }"""
        assert page.evaluate(coloured) >= 2  # the map covers the picture, not a corner of it
        assert serious(page) == []
        assert wrong == []
        page.goto(f"{server.address}/docs")
        page.wait_for_selector("table")
        assert "/v1/predict" in page.inner_text("body")
        assert serious(page) == []
        page.context.close()


def test_the_served_page_asks_for_the_token(browser: Browser, weights: str) -> None:
    with Running(load_classifier(weights, "fp32"), Limits(), token="secret") as server:
        page = browser.new_page()
        page.goto(server.address)
        page.fill("#token", "wrong")
        page.click("#login button")
        page.wait_for_selector("#problem:not(:empty)")
        page.fill("#token", "secret")
        page.click("#login button")
        page.wait_for_selector("body[data-ready]")
        assert drop(page, photograph(), "image/jpeg") is not None
        page.context.close()


def test_the_page_forbids_every_connection(web: Path) -> None:
    page = (web / "index.html").read_text()
    assert "connect-src 'none'" in page
    model = json.loads((web / "model.js").read_text().partition("=")[2].strip().removesuffix(";"))
    assert len(model["samples"]) == 8
