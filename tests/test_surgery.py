"""Model surgery: what can be kept is kept, exactly where it can be exact."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from convmixer import cli
from convmixer.errors import RequestError
from convmixer.evaluation.val import val
from convmixer.models.convmixer import ConvMixer
from convmixer.models.create import create_model
from convmixer.models.surgery import convert, resize, resize_kernels, resize_patches
from convmixer.models.weights import LoadedModel, load_model, save_model
from convmixer.preprocess import Preprocessing


def colour_model(kernel_size: int = 3) -> LoadedModel:
    torch.manual_seed(0)
    model = ConvMixer(8, 2, kernel_size, 2, num_classes=3, act="relu").eval()
    for norm in (m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        torch.nn.init.uniform_(norm.running_mean, -1, 1)
    return LoadedModel(model, ("cat", "dog", "cow"), Preprocessing(16), {"name": "x"}, Path("x"), "x")


@pytest.mark.parametrize(("old", "new"), [(3, 5), (3, 4), (4, 5), (4, 6), (2, 9), (3, 8)])
def test_larger_kernels_keep_the_outputs(old: int, new: int) -> None:
    loaded = colour_model(old)
    grown, changes = resize(loaded, kernel_size=new)
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(grown.model(x), loaded.model(x), rtol=1e-4, atol=1e-5)
    assert changes == [f"2 depthwise kernels: {old} -> {new}, zeros around"]
    assert grown.model.act == "relu"


@pytest.mark.parametrize(("old", "new", "same_grid"), [(9, 5, True), (7, 3, True), (5, 9, False)])
def test_interpolated_kernels_keep_the_response_to_a_constant(old: int, new: int, same_grid: bool) -> None:
    line = torch.linspace(-1.5, 1.5, old)
    smooth = torch.exp(-(line[:, None] ** 2 + line**2))[None, None]
    resized = resize_kernels(smooth, new, same_grid)
    assert resized.shape == (1, 1, new, new)
    assert float(resized.sum()) == pytest.approx(float(smooth.sum()), rel=0.1)  # the edges cost some


def test_patches_keep_the_response_to_resized_images() -> None:
    torch.manual_seed(0)
    weight = torch.randn(4, 3, 4, 4)
    small = torch.randn(2, 3, 4, 4)
    large = F.interpolate(small, (8, 8), mode="bicubic", antialias=True)
    resized = resize_patches(weight, 8)
    torch.testing.assert_close(F.conv2d(large, resized), F.conv2d(small, weight), rtol=1e-3, atol=1e-3)


def test_classes_are_kept_by_name() -> None:
    loaded = colour_model()
    new, changes = resize(loaded, classes=["cow", "horse", "cat"])
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        before, after = loaded.model(x), new.model(x)
    torch.testing.assert_close(after[:, [0, 2]], before[:, [2, 0]])
    assert changes == ["classifier: 3 -> 3 classes, 2 kept by name"]
    assert new.classes == ("cow", "horse", "cat")
    assert resize(loaded, num_classes=5)[0].classes == ("0", "1", "2", "3", "4")
    same, nothing = resize(loaded, num_classes=3)
    assert (same.classes, nothing) == (loaded.classes, [])


def test_grey_equals_grey_in_colour() -> None:
    loaded = colour_model()
    grey = resize(loaded, in_chans=1)[0]
    x = torch.randn(2, 1, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(grey.model(x), loaded.model(x.expand(-1, 3, -1, -1)))
    assert grey.preprocessing.in_chans == len(grey.preprocessing.mean) == 1
    again = resize(grey, in_chans=3)[0]
    with torch.no_grad():
        torch.testing.assert_close(again.model(x.expand(-1, 3, -1, -1)), grey.model(x))


def test_a_larger_kernel_costs_a_trained_model_nothing(digits_weights: Path, tmp_path: Path) -> None:
    convert(digits_weights, tmp_path, kernel_size=5)
    assert load_model(tmp_path).model.kernel_size == 5
    assert val(tmp_path, precision="fp32")["top1"] == val(digits_weights, precision="fp32")["top1"]


def test_the_command(digits_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new"
    flags = [
        "--patch-size",
        "2",
        "--kernel-size",
        "5",
        "--num-classes",
        "12",
        "--in-chans",
        "3",
        "--img-size",
        "16",
        "--json",
    ]
    assert cli.main(["convert", str(digits_weights), "--out", str(out), *flags]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["changes"] == [
        "patch embedding: 1 -> 3 channels",
        "patch embedding: 1 -> 2 px, by pseudo-inverse resizing",
        "2 depthwise kernels: 3 -> 5, bicubic, sum kept",
        "classifier: 10 -> 12 classes, 10 kept by name",
        "input 8 -> 16 px",
        "images of 16 px would give the grid of patches that the blocks were trained on",
    ]
    loaded = load_model(out)
    assert loaded.model(torch.randn(1, 3, 16, 16)).shape == (1, 12)
    assert result["parameters"] == sum(p.numel() for p in loaded.model.parameters())
    name = loaded.metadata["name"]
    assert create_model(name, num_classes=12).state_dict().keys() == loaded.model.state_dict().keys()
    for bad in (
        "--patch-size -1",
        "--patch-size 0",
        "--kernel-size 0",
        "--in-chans 0",
        "--img-size 0",
        "--num-classes 0",
        "--in-chans 4",
        "--classes a,a",
        "--classes a,b --num-classes 3",
    ):
        assert cli.main(["convert", str(digits_weights), "--out", str(tmp_path / "bad"), *bad.split()]) == 2


def test_weights_are_not_written_into_a_run(digits_weights: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("command: convmixer train\n")
    with pytest.raises(RequestError, match="is a run"):
        convert(digits_weights, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["config.yaml"]
    assert not (tmp_path / "bad").exists()


def test_plain_conversion_and_other_models(tmp_path: Path) -> None:
    state = {f"module.{key}": value for key, value in colour_model().model.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "a.pth.tar")
    result = convert(tmp_path / "a.pth.tar", tmp_path / "ours")
    assert result["changes"] == []
    assert (tmp_path / "ours" / "config.json").is_file()
    vit = create_model("vit_tiny_patch16_224", num_classes=2, img_size=32, depth=1)
    save_model(
        tmp_path / "vit",
        vit,
        architecture="vit_tiny_patch16_224",
        model_args={"img_size": 32, "depth": 1},
        classes="ab",
        preprocessing=Preprocessing(32),
    )
    assert convert(tmp_path / "vit", tmp_path / "copy")["changes"] == []
    with pytest.raises(RequestError, match="only a ConvMixer can be resized"):
        convert(tmp_path / "vit", tmp_path / "no", kernel_size=3)
