"""Damaged, foreign and missing weights: one clear error that names the file."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn

from convmixer.errors import RequestError
from convmixer.models.convmixer import ConvMixer
from convmixer.models.create import create_model
from convmixer.models.weights import load_model, save_model
from made_weights import RGB, State, authors


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def good(folder: Path) -> Path:
    """A small good checkpoint to spoil."""
    path = folder / "good.pth"
    torch.save(authors(8, 2, 3, 2, 4).state_dict(), path)
    return path


class Hostile:
    """Unpickling it would run a command."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.target}",)


def test_hostile_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    state = authors(8, 1, 3, 2, 4).state_dict()
    torch.save({"state_dict": state, "args": Hostile(tmp_path / "owned")}, tmp_path / "evil.pth.tar")
    with pytest.raises(RequestError, match=r"posix\.system.*could run code.*save only its state_dict"):
        load_model(tmp_path / "evil.pth.tar")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("kept", [0, 1, 100, 5000])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_truncated_files(tmp_path: Path, kept: int, suffix: str) -> None:
    path = tmp_path / f"cut{suffix}"
    if suffix == ".pth":
        path.write_bytes(good(tmp_path).read_bytes()[:kept])
    else:
        folder = tmp_path / "whole"
        save_model(
            folder, ConvMixer(8, 1, num_classes=2), architecture="m", model_args={}, classes="ab", preprocessing=RGB
        )
        path.write_bytes((folder / "model.safetensors").read_bytes()[:kept])
    with pytest.raises(RequestError, match="download it again"):
        load_model(path)


def spoil(edit: Callable[[State], Any]) -> Callable[[Path], None]:
    """Return what writes a checkpoint after an edit of its state dict."""

    def write(path: Path) -> None:
        state = authors(8, 2, 3, 2, 4).state_dict()
        torch.save(edit(state) or state, path)

    return write


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda p: p.write_text("this is no checkpoint"), "not a checkpoint"),
        (lambda p: torch.save([1, 2], p), "holds a list"),
        (lambda p: torch.save({}, p), "holds no weights"),
        (lambda p: torch.save({"epoch": 3, "loss": 0.1}, p), "holds no weights"),
        (lambda p: torch.save(nn.Linear(2, 2).state_dict(), p), "not a ConvMixer of the authors, timm or mmpretrain"),
        (spoil(lambda s: {k: v for k, v in s.items() if "4.1." not in k}), "lacks blocks.1.1.weight"),
        (spoil(lambda s: s.update({"4.1.weight": torch.zeros(8, 9, 1, 1)})), r"blocks.1.1.weight is \(8, 9, 1, 1\)"),
        (spoil(lambda s: s.update({"99.weight": torch.zeros(1)})), "unexpected 99.weight"),
        (spoil(lambda s: s.update({"0.weight": torch.zeros(8)})), "lacks the patch embedding"),
        (spoil(lambda s: s.update({"7.weight": torch.zeros(4)})), "lacks head|wrong shapes"),
    ],
)
def test_bad_checkpoints_are_named(tmp_path: Path, write: Callable[[Path], Any], message: str) -> None:
    path = tmp_path / "bad.pth"
    write(path)
    with pytest.raises(RequestError, match=message) as caught:
        load_model(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "edit",
    [
        lambda c: c["pretrained_cfg"].pop("mean"),
        lambda c: c["pretrained_cfg"].update(input_size=3),
        lambda c: c["model_args"].update(dim="wide"),
        lambda c: c["model_args"].update(nonsense=1),
        lambda c: c.update(architecture="no_such_model"),
        lambda c: c["model_args"].update(dim=16),
    ],
)
def test_bad_configs(tmp_path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    save_model(
        tmp_path, ConvMixer(8, 1, num_classes=2), architecture="m", model_args={}, classes="ab", preprocessing=RGB
    )
    config = json.loads((tmp_path / "config.json").read_text())
    edit(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RequestError):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(RequestError, match="cannot read"):
        load_model(tmp_path)


def test_nan_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "nan.pth"
    spoil(lambda s: s.update({"2.running_var": torch.full((8,), float("nan"))}))(path)
    with pytest.raises(
        RequestError, match=r"1 of 37 tensors hold NaN or infinity, the first is stem\.2\.running_var"
    ):
        load_model(path)
    spoil(lambda s: s.update({"2.running_var": torch.full((8,), -0.1)}))(path)
    with pytest.raises(RequestError, match=r"stem\.2\.running_var holds negative variances"):
        load_model(path)


def test_missing_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(RequestError, match="holds no weights"):
        load_model(tmp_path)
    with pytest.raises(RequestError, match="unknown weights 'convmixer_768_23': did you mean 'convmixer_768_32'"):
        load_model("convmixer_768_23")
    for path in (tmp_path / "none.pth", tmp_path / "none", "./none", "runs/a/b"):
        with pytest.raises(RequestError, match="does not exist"):
            load_model(path)
    with pytest.raises(RequestError, match=r"cannot get timm/convmixer_1024_20_ks9_p14\.in1k from .* Go online"):
        create_model("convmixer_1024_20", pretrained=True)
