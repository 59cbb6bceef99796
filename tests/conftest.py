"""Shared fixtures. Real data come from the environment variable CONVMIXER_DATA or ../shared/data, else tests skip."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser
    from tests.exports import Exports

    from convmixer.exported.check import Images

ROOT = Path(__file__).parent.parent


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
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(scope="session")
def digits_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a small ConvMixer trained for seconds on the real digits, about 95% right on the rest."""
    import torch
    from torch.nn.functional import cross_entropy

    from convmixer.data.datasets import load_data
    from convmixer.data.loader import eval_loader
    from convmixer.data.transforms import eval_transform
    from convmixer.evaluation.batchnorm import recompute_batchnorm
    from convmixer.models.convmixer import ConvMixer
    from convmixer.models.weights import save_model
    from convmixer.preprocess import Preprocessing

    settings = {"val_fraction": 0.1, "seed": 0, "max_bad_fraction": 0.0}
    splits = load_data("digits", **settings)
    p = Preprocessing(splits.img_size, splits.in_chans, splits.mean, splits.std)
    images, labels = next(iter(eval_loader(splits.train, eval_transform(p), len(splits.train))))
    torch.manual_seed(0)
    model = ConvMixer(32, 2, 3, 1, in_chans=1, num_classes=10)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 110)
    for _ in range(10):
        for part in torch.randperm(len(labels)).split(128):
            optimizer.zero_grad()
            cross_entropy(model(images[part]), labels[part]).backward()
            optimizer.step()
            falling.step()
    recompute_batchnorm(model, splits.train, p, 1280)  # after so few steps the running ones lag behind
    folder = tmp_path_factory.mktemp("digits") / "weights"
    save_model(
        folder,
        model,
        architecture="convmixer_32_2_p1_k3",
        model_args={},
        classes=splits.classes,
        preprocessing=p,
        data={"spec": "digits", "checksum": splits.checksum, **settings},
    )
    return folder


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny study that was never interrupted: two arms, two seeds. Copy it before changing anything."""
    from study_runs import finish, start, tiny

    folder = tmp_path_factory.mktemp("whole")
    finish(start(tiny(folder), folder / "out", program="probed_here"))
    return folder / "out"


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

    return Exports(scans, tmp_path_factory.mktemp("exports"))


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

    return export_page(page_weights, tmp_path_factory.mktemp("web") / "page")


@pytest.fixture(scope="session")
def page_address(page_folder: Path) -> Iterator[str]:
    """The exported page on a plain file server."""
    from tests.pages import serve_files

    yield from serve_files(page_folder)


@pytest.fixture(scope="session")
def serve_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small network as an ONNX file, so that a server starts without torch."""
    import io

    import torch
    from PIL import Image

    from convmixer.exported.check import Images
    from convmixer.exported.export import export_model
    from convmixer.models.create import create_model
    from serving import CLASSES, P, picture

    torch.manual_seed(0)
    model = create_model("convmixer_8_1_p4_k3", num_classes=3).eval()
    path = tmp_path_factory.mktemp("serve") / "tiny.onnx"
    images = [Image.open(io.BytesIO(picture(seed))) for seed in range(8)]
    export_model(model, CLASSES, P, Images("photograph", images, None, ()), path, about={"architecture": "tiny"})
    return path


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
