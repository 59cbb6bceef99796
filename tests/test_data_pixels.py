"""16-bit images that use fewer bits: the number is decided once per data set, printed, and kept in the weights."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from convmixer.config import Config
from convmixer.data.datasets import DataSplits
from convmixer.data.transforms import preprocessing_of
from convmixer.decode.load import brightest
from convmixer.exported.export import export
from convmixer.models.convmixer import ConvMixer
from convmixer.models.weights import load_model, save_model
from convmixer.preprocess import ImageError, Preprocessing, load_image, preprocess, to_mode
from data_sets import DIGITS, load, parts


def write(root: Path, scale: float, kind: type = np.uint16, suffix: str = "png") -> Path:
    """Write 60 scans as wide integers of 0 to `scale`."""
    for i in range(60):
        folder = root / f"digit {DIGITS.target[i]}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((DIGITS.images[i] / 16 * scale).astype(kind)).save(folder / f"{i:02}.{suffix}")
    return root


def spread(data: DataSplits) -> float:
    train = parts(data)[0]
    return float(max(np.asarray(train[i][0]).max() for i in range(len(train))))


@pytest.mark.parametrize(
    ("scale", "bits"), [(255, 8), (240, 8), (1023, 10), (4095, 12), (3000, 12), (16383, 14), (65535, 16)]
)
def test_the_bits_in_use_are_found_and_said(tmp_path: Path, scale: int, bits: int) -> None:
    data = load(write(tmp_path, scale))
    assert data.bits == bits
    assert 140 < spread(data) < 256  # not black, not clipped
    assert any(f"the largest value of 60 is {scale}: " in note for note in data.notes)
    assert preprocessing_of(data, Config()).bits == bits
    assert 0.1 < data.mean[0] < 0.5


def test_32_bit_integers_too(tmp_path: Path) -> None:
    data = load(write(tmp_path, 255, np.int32, "tiff"))
    assert (data.bits, spread(data)) == (8, 255)


def test_one_bright_image_decides_for_all(tmp_path: Path) -> None:
    root = write(tmp_path, 255)
    Image.fromarray(np.full((8, 8), 4095, np.uint16)).save(root / "digit 0" / "bright.png")
    data = load(root)
    assert data.bits == 12
    assert spread(load(root, bits=8, bad=0.1)) == 255


def test_images_that_are_decoded_apart_count_too(tmp_path: Path) -> None:
    root = write(tmp_path, 1023)
    values = (DIGITS.images[0] / 16 * 4000).astype(np.uint16)
    Image.fromarray(values).save(root / "digit 0" / "apart.jp2", irreversible=False)
    assert brightest(root / "digit 0" / "apart.jp2") == values.max() == 3750
    data = load(root)
    assert data.bits == 12
    assert brightest(b"no image") == 0


def test_8_bit_images_are_not_asked(tmp_path: Path) -> None:
    data = load(write(tmp_path, 200, np.uint8))
    assert data.bits == 16
    assert not any("16 or 32 bits" in note for note in data.notes)


def test_weights_keep_the_bits(tmp_path: Path) -> None:
    p = Preprocessing(8, 1, (0.3,), (0.3,), bits=12)
    model = ConvMixer(8, 1, 3, 1, in_chans=1, num_classes=2)
    save_model(tmp_path, model, architecture="convmixer_8_1_p1_k3", model_args={}, classes="ab", preprocessing=p)
    assert load_model(tmp_path).preprocessing == p
    values = (DIGITS.images[0] / 16 * 4095).astype(np.uint16)
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    seen = preprocess(load_image(file.getvalue(), p.in_chans, p.bits), p)
    assert np.allclose(seen[0], ((values >> 4) / 255 - 0.3) / 0.3, atol=1e-5)
    assert np.allclose(preprocess(Image.fromarray(values), p), seen)
    with pytest.raises(ValueError, match="bits must be one of 8, 10, 12, 14, 16, not 7"):
        Preprocessing(8, bits=7)


def test_a_web_page_says_that_it_cannot_read_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    p = Preprocessing(8, 1, (0.3,), (0.3,), bits=12)
    model = ConvMixer(8, 1, 3, 1, in_chans=1, num_classes=2)
    save_model(
        tmp_path / "w", model, architecture="convmixer_8_1_p1_k3", model_args={}, classes="ab", preprocessing=p
    )
    export(str(tmp_path / "w"), "web", out=tmp_path / "page")
    assert "the page refuses 16-bit grey PNG files: the model reads them as 12-bit images" in capsys.readouterr().out


def test_values_above_the_bits_are_refused_but_for_a_few() -> None:
    values = np.full((20, 20), 100, np.uint16)
    values[0, :4] = 5000
    assert np.asarray(to_mode(Image.fromarray(values), 1, 12)).max() == 255
    values[:2] = 5000
    with pytest.raises(ImageError, match="its values go up to 5000, but 12-bit images have at most 4095"):
        to_mode(Image.fromarray(values), 1, 12)
