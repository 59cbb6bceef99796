"""Shared fixtures. Real data come from the environment variable CONVMIXER_DATA or ../shared/data, else tests skip."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from shared import once

if TYPE_CHECKING:
    from playwright.sync_api import Browser
    from tests.exports import Exports

    from convmixer.exported.check import Images

ROOT = Path(__file__).parent.parent
# the files that take longest begin first, so that none is left to one process at the end
LONGEST = [
    f"test_{name}.py"
    for name in ("exported_files", "docs_commands", "tuning", "exported_agreement", "studies_run", "studies_tune",
                 "fast", "decode", "fast_tools", "resume", "plan", "faults_kills", "models_commands", "faults_disk",
                 "exported_hostile", "train_freeze", "kernels_cuda", "train_processes", "estimator", "studies_queue",
                 "fast_inference", "results_report", "train_budget")
]  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of the longest files first; the others keep their order."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.fixture(scope="session")
def cifar10() -> Path:
    """The folder of the real CIFAR-10 parquet files."""
    for folder in (os.environ.get("CONVMIXER_DATA"), ROOT.parent / "shared" / "data"):
        if folder and (Path(folder) / "cifar10").is_dir():
            return Path(folder) / "cifar10"
    pytest.skip("real CIFAR-10 not found: set CONVMIXER_DATA to the folder that holds cifar10/")


@pytest.fixture(scope="session", autouse=True)
def clean_checkout() -> Iterator[None]:
    """Fail if a test leaves something in the folder that the tests are run from."""
    before = set(Path.cwd().iterdir())
    yield
    left = {path.name for path in set(Path.cwd().iterdir()) - before if not path.name.startswith(".")}
    assert not left - {"build"}, f"a test left {sorted(left)} in {Path.cwd()}"


@pytest.fixture(scope="session", autouse=True)
def own_state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what convmixer remembers about its user out of the real home folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(once(tmp_path_factory, "state", lambda folder: None)))
        yield


@pytest.fixture(scope="session")
def digits_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a small ConvMixer trained for seconds on the real digits, about 95% right on the rest."""
    from made_weights import train_digits

    return once(tmp_path_factory, "digits", lambda folder: train_digits(folder / "weights")) / "weights"


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny study that was never interrupted: two arms, two seeds. Copy it before changing anything."""
    from study_runs import start, tiny

    def make(folder: Path) -> None:
        start(tiny(folder), folder / "out", in_one_process=True).finish()

    return once(tmp_path_factory, "whole", make) / "out"


@pytest.fixture
def measured_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `plan` and `compare` measure in this process, which saves seconds of imports."""
    import probed_here

    probed_here.patch(monkeypatch)


@pytest.fixture(scope="session")
def scans() -> "Images":
    """Real scans of digits as images: 100 to check an export on, 260 to calibrate with."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    from convmixer.exported.check import Images

    pixels, labels = load_digits(return_X_y=True)
    images = [Image.fromarray((scan.reshape(8, 8) * 15.9).astype(np.uint8)) for scan in pixels[:360]]
    return Images("digits", images[:100], labels[:100], images[100:])


@pytest.fixture(scope="session")
def exports(scans: "Images", tmp_path_factory: pytest.TempPathFactory) -> "Exports":
    """A small model and its exports, each made once for all tests."""
    from tests.exports import Exports

    return Exports(scans, tmp_path_factory)


@pytest.fixture(scope="session")
def browser() -> Iterator["Browser"]:
    """Headless Chromium; without one, tests skip."""
    from tests.pages import open_browser

    yield from open_browser()


@pytest.fixture(scope="session")
def page_weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The shipped weights; before they exist, untrained ones of a small model."""
    from tests.pages import make_weights

    return make_weights(tmp_path_factory.mktemp("page-weights"))


@pytest.fixture(scope="session")
def page_folder(page_weights: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Those weights exported as a web page."""
    from tests.pages import export_page

    return once(tmp_path_factory, "web", lambda folder: export_page(page_weights, folder / "page")) / "page"


@pytest.fixture(scope="session")
def page_address(page_folder: Path) -> Iterator[str]:
    """The exported page on a plain file server."""
    from tests.pages import serve_files

    yield from serve_files(page_folder)


@pytest.fixture(scope="session")
def serve_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small network as an ONNX file, so that a server starts without torch."""
    from serving import write_network

    return once(tmp_path_factory, "serve", lambda folder: write_network(folder / "tiny.onnx")) / "tiny.onnx"


@pytest.fixture(scope="session")
def serve_classifier(serve_weights: Path) -> Any:
    """The same network, loaded."""
    from convmixer.inference import load_classifier

    return load_classifier(serve_weights)


@pytest.fixture(scope="session")
def server(serve_weights: Path) -> Iterator[Any]:
    """A server in a process, with small limits."""
    from serving import start_process

    process, server = start_process(
        serve_weights, "--max-body-mb", "1", "--max-pixels", "400000", "--max-images", "4"
    )
    yield server
    process.terminate()
    process.communicate(timeout=20)
