"""The page in real headless Chromium: how tests open it, and what they drop on it."""

import base64
import functools
import http.server
import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from convmixer.exported.check import Images
from convmixer.exported.export import export_model
from convmixer.models.create import create_model
from convmixer.models.registry import shipped
from convmixer.models.weights import load_model, save_model
from convmixer.preprocess import Preprocessing
from file_server import running

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


def open_browser() -> Iterator[Browser]:
    """Give Chromium to a fixture."""
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


def make_weights(folder: Path) -> str:
    """Return the shipped weights; before they exist, untrained ones of a small model."""
    if SHIPPED in shipped():
        return SHIPPED
    torch.manual_seed(0)
    p = Preprocessing(img_size=32, mean=(0.49, 0.48, 0.45), std=(0.25, 0.24, 0.26))
    model = create_model("convmixer_64_2_p4_k5", num_classes=10).eval()
    args = {"architecture": "convmixer_64_2_p4_k5", "model_args": {}, "classes": NAMES, "preprocessing": p}
    save_model(folder, model, **args)
    return str(folder)


def export_page(weights: str, path: Path) -> Path:
    """Export weights as a page with eight samples, and return its folder."""
    loaded = load_model(weights)
    image = Image.open(io.BytesIO(photograph()))
    cuts = [image.crop((40 * n, 20 * n, 40 * n + 160, 20 * n + 160)) for n in range(8)]
    samples = []
    for cut in cuts:
        buffer = io.BytesIO()
        cut.resize((32, 32)).save(buffer, "PNG")
        samples.append(buffer.getvalue())
    images, about = Images("photograph", cuts, None, ()), {"architecture": "convmixer_64_2"}
    export_model(loaded.model, loaded.classes, loaded.preprocessing, images, path, "web", "fp32", about, samples)
    return path


def serve_files(web: Path) -> Iterator[str]:
    """Give the address of a folder on a plain file server to a fixture."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(web))
    with running(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)) as address:
        yield f"{address}/"


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


def serious(page: Page) -> list[str]:
    """Return the violations of the accessibility rules that matter most."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page).response["violations"]
    return [f"{v['id']}: {v['nodes'][0]['html']}" for v in found if v["impact"] in ("serious", "critical")]
