"""Pictures of what a model looks at and has learned agree with its weights, and are written as files."""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from convmixer.cli import main
from convmixer.explain import SHOWN_SIDE, explain
from convmixer.models import inspection
from convmixer.models.create import create_model
from convmixer.models.weights import save_model
from convmixer.preprocess import Preprocessing
from convmixer.results import plots

P = Preprocessing(img_size=16, mean=(0.5,) * 3, std=(0.25,) * 3)


def width(picture: Path) -> int:
    with Image.open(picture) as image:
        return image.width


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """Weights whose answer is known: class "red" scores the red channel of each patch, and nothing else."""
    model = create_model("convmixer_4_1_p4_k3", num_classes=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.stem[0].weight[0, 0] = 1 / 16  # channel 0 is the mean of red
        model.stem[2].weight.fill_(1)
        model.blocks[0][1].weight[0, 0, 0, 0] = 1
        model.blocks[0][3].weight.fill_(1)
        model.head.weight[0, 0] = 1
    args = {"architecture": "convmixer_4_1_p4_k3", "model_args": {}, "classes": ("red", "other"), "preprocessing": P}
    save_model(tmp_path / "run" / "weights" / "best", model.eval(), **args)
    return tmp_path / "run"


def test_the_map_lies_where_the_evidence_is(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[4:8, 8:12, 0] = 255  # one red patch: row 1, column 2
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    picture = tmp_path / "explained.png"
    assert main(["explain", str(weights), str(tmp_path / "photo.png"), "--out", str(picture), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert answer["classes"][0] == "red"
    evidence = np.array(answer["map"])
    assert evidence.shape == (4, 4)
    assert np.unravel_index(evidence.argmax(), (4, 4)) == (1, 2)
    assert width(picture) > 900


def test_explain_names_an_image_that_cannot_be_read(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.png").write_text("not an image")
    assert main(["explain", str(weights), str(tmp_path / "text.png")]) == 2
    assert "text.png" in capsys.readouterr().err
    assert main(["explain", str(weights), str(tmp_path / "none.png")]) == 2


def test_plot_draws_weights_growth_and_receptive_field(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = create_model("convmixer_4_1_p4_k3", num_classes=2)
    growth = inspection.kernel_growth(model)
    events = [{"event": "epoch", "step": epoch, "epoch": epoch, "kernels": growth} for epoch in (1, 2)]
    cut = '{"event": "epoch", "kernels": {"block 1": {"norm": 5.0}'  # by a kill, in mid-line
    (weights / "config.yaml").write_text("command: convmixer train\n")  # what makes a folder a run
    (weights / "log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events) + cut)
    assert main(["plot", str(weights), "--json"]) == 0
    pictures = [Path(path) for path in json.loads(capsys.readouterr().out.splitlines()[-1])["pictures"]]
    names = ["patch_embedding", "depthwise_kernels", "kernel_growth", "receptive_field"]
    assert [path.stem for path in pictures] == names
    assert all(width(path) > 300 and path.parent == weights / "pictures" for path in pictures)


def test_kernel_growth_measures_norm_and_radius() -> None:
    model = create_model("convmixer_4_2_p4_k3", num_classes=2)
    with torch.no_grad():
        conv = model.blocks[1][0].fn[0]
        conv.weight.zero_()
        conv.weight[:, 0, 1, 1] = 3.0
        conv.weight[:, 0, 0, 1] = 4.0
    growth = inspection.kernel_growth(model)
    assert list(growth) == ["block 1", "block 2"]
    assert growth["block 2"] == pytest.approx({"norm": 5.0, "radius": (16 / 25) ** 0.5})


def test_structure_is_zero_for_random_kernels_and_high_for_smooth_ones() -> None:
    torch.manual_seed(0)
    model = create_model("convmixer_64_2_p4_k7", num_classes=2)
    assert inspection.kernel_structure(model) == pytest.approx(0, abs=0.02)
    bump = torch.exp(-((torch.arange(7) - 3.0) ** 2) / 8)
    with torch.no_grad():
        for block in model.blocks:
            block[0].fn[0].weight.copy_((bump[:, None] * bump).expand(64, 1, 7, 7))
    smooth = inspection.kernel_structure(model)
    assert smooth is not None
    assert 0.75 < smooth < 1
    with torch.no_grad():
        for block in model.blocks:
            block[0].fn[0].weight.copy_((torch.arange(49) % 2 * 2 - 1.0).view(1, 1, 7, 7).expand(64, 1, 7, 7))
    assert inspection.kernel_structure(model) == pytest.approx(-1, abs=0.03)  # each neighbour is the opposite
    assert inspection.kernel_structure(create_model("convmixer_4_1_p4_k1", num_classes=2)) is None


def test_receptive_field_is_the_kernel_after_one_block_and_grows() -> None:
    torch.manual_seed(0)
    model = create_model("convmixer_8_3_p2_k3", num_classes=2).eval()
    fields = inspection.receptive_field(model, torch.randn(2, 3, 32, 32))
    first, last = fields["after block 1"] > 0, fields["after block 3"] > 0
    assert first.sum() == 6 * 6  # 3 x 3 patches of 2 x 2 pixels
    assert last.sum() == 14 * 14
    assert first[16:18, 16:18].all()


def test_the_photo_is_drawn_beside_evidence_that_leaves_it_readable(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photo = np.full((300, 400, 3), 200, np.uint8)
    photo[160:220, 160:220] = (255, 0, 0)
    Image.fromarray(photo).save(tmp_path / "photo.png")
    kept: list[Figure] = []
    monkeypatch.setattr(plots, "save", lambda figure, path: kept.append(figure))
    explain(str(weights), tmp_path / "photo.png", tmp_path / "out.png")
    panels = {axes.get_title(): axes for axes in kept[0].axes}
    drawn = panels["The photo"].images[0].get_array()
    assert np.allclose(drawn, photo / 255)  # the whole photo, at its own size
    below, evidence = panels["Evidence for red"].images
    alpha = np.asarray(evidence.get_alpha())
    assert below.get_array().shape == (SHOWN_SIDE, SHOWN_SIDE)
    assert alpha.min() >= 0
    assert alpha.max() <= 0.8  # the photo shows through everywhere
    assert list(evidence.get_extent()) == [-0.5, SHOWN_SIDE - 0.5, SHOWN_SIDE - 0.5, -0.5]
    plt.close(kept[0])


def test_a_model_without_maps_gets_no_evidence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    titles: list[list[str]] = []
    monkeypatch.setattr(plots, "save", lambda figure, path: titles.append([a.get_title() for a in figure.axes]))
    pixels = np.zeros((8, 8))
    plots.explanation(pixels, pixels, pixels, None, ["a", "b"], [0.9, 0.1], tmp_path / "a.png")
    assert titles == [["The photo", "Network input: 8 x 8 pixels", "Probability, %"]]
    plt.close("all")
