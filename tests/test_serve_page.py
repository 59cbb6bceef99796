"""The served page in Chromium: same answers as the classifier, a token if one is required, accessible to all."""

import dataclasses
from pathlib import Path

import pytest
from playwright.sync_api import Browser
from tests.pages import cifar_images, drop, open_page, photograph, serious
from tests.serving import Running

from convmixer.inference import load_classifier
from convmixer.preprocess import load_image
from convmixer.serve.access import Access


@pytest.mark.parametrize("images", [30, pytest.param(200, marks=pytest.mark.slow)])
def test_the_served_page_answers_as_the_classifier(
    browser: Browser, page_weights: str, cifar10: Path, images: int
) -> None:
    classifier = load_classifier(page_weights, "fp32")
    bodies = [*cifar_images(cifar10, images), photograph()]
    expected = [classifier.predict([load_image(body)], 1)[0][0][0] for body in bodies]
    with Running(classifier) as server:
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


def test_long_names_leave_the_percentages_whole(browser: Browser, page_weights: str) -> None:
    classifier = load_classifier(page_weights, "fp32")
    names = tuple(f"No passing for vehicles over {n} metric tons" for n in range(len(classifier.classes)))
    with Running(dataclasses.replace(classifier, classes=names)) as server:
        page, _ = open_page(browser, server.address + "/", "phone")
        drop(page, photograph(), "image/jpeg")
        heights = page.eval_on_selector_all(".percent", "all => all.map(e => e.getBoundingClientRect().height)")
        assert len(heights) == 5
        assert max(heights) < 32  # one line
        page.context.close()


def test_the_served_page_asks_for_the_token(browser: Browser, page_weights: str) -> None:
    with Running(load_classifier(page_weights, "fp32"), access=Access("secret")) as server:
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
