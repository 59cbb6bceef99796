"""Untrusted weights: a file names a model and its sizes, and nothing else; the file's size bounds the work."""

import inspect
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from convmixer.errors import RequestError
from convmixer.models import allowed, reading
from convmixer.models.convmixer import ConvMixer
from convmixer.models.create import create_model
from convmixer.models.registry import SKELETONS, skeleton
from convmixer.models.weights import load_model, save_model
from convmixer.preprocess import Preprocessing

Edit = Callable[[dict[str, Any]], Any]


@pytest.fixture
def resnet(tmp_path: Path) -> Path:
    """A weights folder of one of timm's models."""
    model = create_model("resnet10t", num_classes=2)
    save_model(
        tmp_path / "w", model, architecture="resnet10t", model_args={}, classes="ab", preprocessing=Preprocessing(32)
    )
    return tmp_path / "w"


@pytest.fixture
def mixer(tmp_path: Path) -> Path:
    """A weights folder of a small ConvMixer."""
    model = ConvMixer(8, 1, 3, 2, num_classes=2)
    save_model(tmp_path / "w", model, architecture="m", model_args={}, classes="ab", preprocessing=Preprocessing(12))
    return tmp_path / "w"


def change(folder: Path, edit: Edit) -> Path:
    """Edit the config of a weights folder, both config.json and the copy inside the file, as an attacker would."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.pop("sha256", None)  # an attacker would not keep it
    edit(config)
    path.write_text(json.dumps(config))
    state = safetensors.torch.load_file(folder / "model.safetensors")
    safetensors.torch.save_file(state, folder / "lone.safetensors", {"config": json.dumps(config)})
    return folder


FETCH = {"url": "http://127.0.0.1:9/usercustomize.py", "hf_hub_id": "someone/else", "file": "/etc/passwd"}


@pytest.mark.parametrize("place", ["folder", "lone file"])
@pytest.mark.parametrize(
    "args",
    [
        {"pretrained": True, "pretrained_cfg": FETCH, "cache_dir": "/tmp/owned"},
        {"pretrained": True},
        {"pretrained_cfg": FETCH},
        {"pretrained_cfg_overlay": FETCH},
        {"cache_dir": "owned"},
        {"checkpoint_path": "/etc/passwd"},
        {"pretrained_strict": False},
        {"pretrained_model_args": {}},
        {"scriptable": True},
        {"exportable": True},
        {"no_jit": True},
        {"features_only": True},
        {"block": "os.system"},
        {"norm_layer": {"a": 1}},
        {"": 1},
    ],
    ids=str,
)
def test_no_argument_but_sizes_is_passed_on(resnet: Path, args: dict[str, Any], place: str) -> None:
    change(resnet, lambda c: c["model_args"].update(args))
    with pytest.raises(RequestError, match=r"a weights file may not set|must be a short word"):
        load_model(resnet if place == "folder" else resnet / "lone.safetensors")


@pytest.mark.parametrize(
    "name",
    ["hf-hub:someone/else", "local-dir:/tmp", "hf_hub:a/b", "/etc/passwd", "../w", "os.system", "", None, 7, ["a"],
     "resnet10t\n", "a" * 10_000],
)  # fmt: skip
def test_the_architecture_is_a_name_in_the_registries(resnet: Path, name: Any) -> None:
    change(resnet, lambda c: c.update(architecture=name))
    with pytest.raises(RequestError) as caught:
        load_model(resnet)
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


def test_metadata_cannot_name_another_model_for_later(resnet: Path) -> None:
    evil = {"name": "hf-hub:someone/else", "model_args": {"pretrained": True, "cache_dir": "owned"}}
    change(resnet, lambda c: c["convmixer"].update(evil))
    for source in (resnet, resnet / "lone.safetensors"):
        metadata = load_model(source).metadata
        assert (metadata["name"], metadata["model_args"]) == ("resnet10t", {})


def test_a_convmixers_name_and_sizes_are_those_of_its_tensors(mixer: Path) -> None:
    change(mixer, lambda c: c["convmixer"].update(name="convmixer_768_32", model_args={"dim": 9}))
    metadata = load_model(mixer).metadata
    assert metadata["name"] == "convmixer_8_1_p2_k3"
    assert metadata["model_args"] == {"dim": 8, "depth": 1, "kernel_size": 3, "patch_size": 2, "act": "gelu"}
    change(mixer, lambda c: c.update(convmixer="no table"))
    assert load_model(mixer).metadata["name"] == "convmixer_8_1_p2_k3"


@pytest.mark.parametrize(
    "edit",
    [
        lambda c: c["model_args"].update(dim=40_000),
        lambda c: c["model_args"].update(depth=10**7),
        lambda c: c["model_args"].update(depth=True),
        lambda c: c["model_args"].update(dim=8.0),
        lambda c: c["model_args"].update(patch_size=10**9),
        lambda c: c["model_args"].update(kernel_size=-1),
        lambda c: c.update(architecture="convmixer_40000_10000000_p1_k9", model_args={}),
        lambda c: c.update(architecture="vit_giant_patch14_dinov2", model_args={}),
        lambda c: c.update(architecture="vit_tiny_patch16_224", model_args={"depth": 10**7}),
        lambda c: c.update(architecture="vit_tiny_patch16_224", model_args={"img_size": 4096, "patch_size": 1}),
        lambda c: c.update(architecture="resnet", model_args={"dim": 4, "layers": [10**6] * 4}),
        lambda c: c.update(num_classes=10**9),
        lambda c: c.update(num_classes=-1),
        lambda c: c["pretrained_cfg"].update(input_size=[3, 30_000, 30_000]),
        lambda c: c["pretrained_cfg"].update(input_size=[3, 1.5, 1.5]),
        lambda c: c["pretrained_cfg"].update(crop_pct=1e-9),
        lambda c: c["pretrained_cfg"].update(std=[0, 1, 1]),
        lambda c: c["pretrained_cfg"].update(std=[float("nan"), 1, 1]),
        lambda c: c["pretrained_cfg"].update(mean=[float("inf"), 1, 1]),
        lambda c: c["pretrained_cfg"].update(label_names=["a"]),
        lambda c: c["pretrained_cfg"].update(label_names={"a": 1, "b": 2}),
        lambda c: c["pretrained_cfg"].update(label_names=["a", 7]),
        lambda c: c.update(model_args=[1]),
        lambda c: c.update(pretrained_cfg=7),
    ],
)  # fmt: skip
def test_sizes_that_the_file_cannot_hold_are_refused(mixer: Path, edit: Edit) -> None:
    change(mixer, edit)
    with pytest.raises(RequestError) as caught:
        load_model(mixer)
    assert len(str(caught.value)) < 400


def test_what_is_not_in_the_file_is_bounded_too(tmp_path: Path) -> None:
    args = {"dim": 8, "depth": 1, "patch_size": 1, "mixer": "pool", "img_size": 8, "kernel_size": 3}
    model = create_model("isotropic", num_classes=2, **args)
    p = Preprocessing(8)
    save_model(tmp_path, model, architecture="isotropic", model_args=args, classes="ab", preprocessing=p)
    assert load_model(tmp_path).classes == ("a", "b")
    change(tmp_path, lambda c: c["model_args"].update(img_size=1024))  # the pooling matrix would take 4 TB
    with pytest.raises(RequestError, match="bytes besides its weights"):
        load_model(tmp_path)


def small() -> dict[str, torch.Tensor]:
    return ConvMixer(8, 1, 3, 2, num_classes=2).state_dict()


def itself() -> dict[str, Any]:
    holds: dict[str, Any] = {"epoch": 1, "loss": 0.1}
    holds["state_dict"] = holds
    return holds


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda: itself(), "holds no weights"),
        (lambda: small() | {"head.weight": torch.zeros(1, 1).expand(60_000, 60_000)}, "which share memory"),
        (lambda: {f"k{i}": torch.zeros(1) for i in range(201)}, "more than the limit of 200$"),
        (lambda: small() | {"stem.0.bias": torch.zeros(8).to_sparse()}, r"_rebuild_sparse_tensor"),
        (lambda: small() | {"stem.0.bias": torch.zeros(8, device="meta")}, "unsupported kind|_rebuild_meta"),
        (lambda: small() | {"stem.0.bias": torch.zeros(8, dtype=torch.complex64)}, "unsupported kind"),
        (lambda: small() | {"blocks.9999999.0.fn.0.weight": torch.zeros(1)}, "names block 9999999"),
        (lambda: {"model": bytearray(10)}, r"bytearray"),
    ],
)
def test_pickles_that_unpack_to_more_than_they_hold(
    tmp_path: Path, content: Callable[[], Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "MAX_TENSORS", 200)  # of 20,000, which take seconds to write
    for new in (True, False):
        torch.save(content(), tmp_path / "w.pth", _use_new_zipfile_serialization=new)
        with pytest.raises(RequestError, match=message) as caught:
            load_model(tmp_path / "w.pth")
        assert len(str(caught.value)) < 400


def test_a_compressed_checkpoint_is_refused(tmp_path: Path) -> None:
    torch.save({"head.weight": torch.zeros(1000, 1000)}, tmp_path / "w.pth")
    with zipfile.ZipFile(tmp_path / "w.pth") as whole, zipfile.ZipFile(
        tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED
    ) as bomb:  # fmt: skip
        for member in whole.namelist():
            bomb.writestr(member, whole.read(member))
    assert (tmp_path / "bomb.pth").stat().st_size < 50_000
    with pytest.raises(RequestError, match="unpacks to more bytes than it has"):
        load_model(tmp_path / "bomb.pth")


def test_tied_weights_still_load(tmp_path: Path) -> None:
    state = ConvMixer(8, 3, 3, 2, num_classes=2).state_dict()
    tied = {key: state[key.replace("blocks.1.", "blocks.0.").replace("blocks.2.", "blocks.0.")] for key in state}
    torch.save(tied, tmp_path / "tied.pth")
    assert load_model(tmp_path / "tied.pth").model.depth == 3


@pytest.mark.parametrize("name", ["convmixer", *SKELETONS])
def test_every_argument_that_changes_a_model_has_a_rule(name: str) -> None:
    """Without one, weights that were saved with it could not be loaded again."""
    maker = skeleton(name) if name in SKELETONS else ConvMixer
    unsaved = {"self", "num_classes", "in_chans", "device", "dtype"}
    assert set(inspect.signature(maker).parameters) - unsaved <= set(allowed._arguments(name))
