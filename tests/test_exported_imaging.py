"""The exported page's own resizing and normalising, in Chromium: Pillow's, pixel for pixel."""

import base64
import io

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page
from tests.pages import open_page, photograph

from convmixer.preprocess import Preprocessing, load_image, resize_and_crop

SEEN = """async ([base64, p]) => {
  const blob = new Blob([Uint8Array.from(atob(base64), (c) => c.charCodeAt(0))]);
  const { data } = (await prepare(blob, p)).seen;
  let text = "";
  for (let i = 0; i < data.length; i += 32768) text += String.fromCharCode(...data.subarray(i, i + 32768));
  return btoa(text);
}"""


def seen(page: Page, body: bytes, p: Preprocessing) -> np.ndarray:
    """Return the values that the page's network sees of an image file."""
    values = vars(p) | {"mean": list(p.mean), "std": list(p.std)}
    answer = page.evaluate(SEEN, [base64.b64encode(body).decode(), values])
    return np.frombuffer(base64.b64decode(answer), np.uint8)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP"])
def test_preprocessing_in_the_browser_is_pillows_to_the_bit(browser: Browser, page_address: str, kind: str) -> None:
    body = photograph(kind)
    page, _ = open_page(browser, page_address)
    cases = [(32, 3, "bicubic", 1.0), (224, 3, "bicubic", 0.96), (17, 3, "bilinear", 0.875), (64, 3, "nearest", 1.0)]
    for size, chans, filter, crop in [*cases, (28, 1, "bicubic", 0.9), (700, 3, "bicubic", 1.0)]:
        p = Preprocessing(size, chans, (0.5,) * chans, (0.25,) * chans, filter, crop)
        expected = np.asarray(resize_and_crop(load_image(body, chans), p)).reshape(-1)
        difference = np.abs(seen(page, body, p).astype(int) - expected).max()
        # lossy formats: two decoders may round a pixel differently; grey: Pillow reads the JPEG's own luma
        assert difference <= (0 if kind in ("PNG", "BMP") else 3), (size, filter, int(difference))
    page.context.close()


def test_a_picture_larger_than_a_canvas_is_read_whole(browser: Browser, page_address: str) -> None:
    image = Image.open(io.BytesIO(photograph())).resize((5200, 3600))  # above 16,777,216 pixels
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    p = Preprocessing(700, 3, (0.5,) * 3, (0.25,) * 3)
    expected = np.asarray(resize_and_crop(load_image(buffer.getvalue()), p)).reshape(-1)
    page, _ = open_page(browser, page_address)
    np.testing.assert_array_equal(seen(page, buffer.getvalue(), p), expected)
    page.context.close()
