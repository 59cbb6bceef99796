"""The data a model is measured on: all images, or training's split; never a folder named by untrusted weights."""

import json
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import ImageNetInfo

from convmixer import cli
from convmixer.errors import RequestError
from convmixer.evaluation.data import find_data, match_classes
from convmixer.evaluation.val import val
from convmixer.models.convmixer import ConvMixer
from convmixer.models.weights import class_names
from convmixer.run_folder import RunFolder

TRAINED = [
    "--model",
    "convmixer_8_1_p4_k3",
    "--epochs",
    "1",
    "--batch-size",
    "16",
    "--workers",
    "0",
    "--img-size",
    "16",
    "--draw",
    "false",
]


def pictures(folder: Path, count: int, first: int = 0) -> Path:
    """Write colour images of two classes, different ones for another `first`."""
    for label, name in enumerate(("cat", "dog")):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(first, first + count):
            noise = np.random.default_rng(number).integers(0, 60, (16, 16, 3), dtype=np.uint8)
            noise[..., 2 * label] += 150
            Image.fromarray(noise).save(folder / name / f"{number:04d}.png")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run trained on a folder given by a relative path."""
    home = tmp_path_factory.mktemp("project")
    pictures(home / "data" / "flowers", 30)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        assert cli.main(["train", "data/flowers", "--out", "run", *TRAINED]) == 0
    return home / "run"


def measure(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[dict, str]:
    assert cli.main(["val", *map(str, arguments), "--json"]) == 0
    out = capsys.readouterr().out
    return json.loads(out.splitlines()[-1]), out


def test_a_run_finds_its_data_from_another_folder(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    result, out = measure(capsys, run)
    assert result["n"] == 12  # the training's own test split
    assert "12 images held out of train" in out


def test_other_data_are_measured_whole(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new = pictures(tmp_path / "new", 30, first=500)
    result, out = measure(capsys, run, new)
    assert result["n"] == 60
    assert "all 60 images are measured" in out
    (tmp_path / "split").mkdir()
    new.rename(tmp_path / "split" / "train")
    pictures(tmp_path / "split" / "test", 5, first=600)
    assert measure(capsys, run, tmp_path / "split")[0]["n"] == 10
    assert measure(capsys, run, tmp_path / "split", "--split", "train")[0]["n"] == 60
    (tmp_path / "split" / "test").rename(tmp_path / "split" / "val")
    result, out = measure(capsys, run, tmp_path / "split")
    assert result["n"] == 10
    assert "split val is measured, of val 10, train 60 images; --split chooses another" in out


def test_the_training_s_data_are_split_as_then_wherever_they_lie(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = shutil.copytree(run.parent / "data" / "flowers", tmp_path / "moved")
    assert measure(capsys, run, moved)[0]["n"] == 12
    assert measure(capsys, run, run.parent / "data" / "flowers")[0]["n"] == 12
    pictures(moved, 1, first=900)
    assert measure(capsys, run, moved)[0]["n"] == 62


def test_recalibrate_uses_all_images_of_other_data(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = pictures(tmp_path / "new", 32, first=500)
    assert cli.main(["recalibrate", str(run), str(new), "--out", str(tmp_path / "out"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["images"], result["split"]) == (64, "train")


def test_the_flags_for_columns_say_how_other_data_are_read(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures(tmp_path / "img", 10, first=700)
    rows = [f"img/{name}/{i:04d}.png,{name},{i % 2},{i}" for name in ("cat", "dog") for i in range(700, 710)]
    table = tmp_path / "table.csv"
    table.write_text("\n".join(["image,kind,fold,who", *rows]))
    assert cli.main(["val", str(run), str(table)]) == 2
    assert "which column is the label? it could be kind" in capsys.readouterr().err
    flags = ["--label-column", "kind", "--split-column", "fold=1"]
    result, _ = measure(capsys, run, table, *flags)
    assert (result["n"], result["split"]) == (10, "val")
    assert cli.main(["recalibrate", str(run), str(table), "--out", str(tmp_path / "new"), *flags, "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["images"] == 10
    out = tmp_path / "model.onnx"
    assert cli.main(["export", str(run), "--data", str(table), "--out", str(out), *flags, "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["images"], result["images_from"]) == (10, "table.csv")


def test_the_training_s_data_are_read_as_then(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["val", run], ["export", run], ["recalibrate", run, "--out", tmp_path / "new"]):
        assert cli.main([*map(str, command), "--label-column", "kind"]) == 2
        assert "--label-column kind: name the data too" in capsys.readouterr().err
    data = run.parent / "data" / "flowers"
    assert cli.main(["val", str(run), str(data), "--group", "(.)"]) == 2
    assert "--group (.): training read these data without --group; leave it out" in capsys.readouterr().err


def test_a_stranger_s_weights_cannot_name_a_folder(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another user"))
    weights = shutil.copytree(RunFolder(run).weights("best"), tmp_path / "weights")
    whole = shutil.copytree(run, tmp_path / "run")
    opened: list[str] = []
    monkeypatch.setattr("convmixer.evaluation.data.load_data", lambda spec, **_: opened.append(spec))
    for source in (weights, whole, run):  # a whole run of somebody else is no better
        assert cli.main(["val", str(source)]) == 2
        assert cli.main(["recalibrate", str(source), "--out", str(tmp_path / "out")]) == 2
        assert "does not open these data by itself: name the data" in capsys.readouterr().err
    assert not opened


def test_a_seal_counts_for_one_path_alone(run: Path) -> None:
    metadata = json.loads((RunFolder(run).weights("best") / "config.json").read_text())["convmixer"]
    assert find_data(None, metadata, "weights").own
    for change in ({"spec": str(run.parent)}, {"seal": None}, {"seal": "0" * 64}, {"seal": 7}):
        with pytest.raises(RequestError, match="by itself"):
            find_data(None, {"data": metadata["data"] | change}, "weights")


def test_a_train_split_of_which_a_part_was_used_is_said() -> None:
    trained_on = {"spec": "digits", "fraction": 0.25}
    part, whole = (find_data("digits", {"data": entry}, "weights") for entry in (trained_on, {"spec": "digits"}))
    assert "a part of this split (--fraction 0.25)" in part.said("train")[0]
    assert part.said("test") == whole.said("train") == []


def test_metadata_of_other_types_are_no_data(run: Path) -> None:
    for entry in ({}, None, [], "digits", {"spec": None}):
        with pytest.raises(RequestError, match="does not say what it was trained on"):
            find_data(None, {"data": entry}, "weights")
    odd = {"spec": "digits", "val_fraction": "x", "seed": -1, "max_bad_fraction": 1e9}
    assert len(find_data(None, {"data": odd}, "weights").pick("test")) == 360


def test_classes_are_matched_by_name() -> None:
    index, lines = match_classes(["cat", "dog"], ["dog", "cow", "cat"])
    assert index.tolist() == [2, 0]
    assert not lines
    with pytest.raises(RequestError, match=r"does not know 1 of the 2 classes of the data: dog"):
        match_classes(["cat", "dog"], ["cat", "cow"])


def test_one_name_in_two_spellings_of_unicode_is_one_class() -> None:
    composed, decomposed = (unicodedata.normalize(form, "Möwe") for form in ("NFC", "NFD"))
    assert composed != decomposed
    assert match_classes([composed, "a"], ["a", decomposed])[0].tolist() == [1, 0]
    with pytest.raises(RequestError, match="two classes of the data have the same name"):
        match_classes([composed, decomposed], ["a", decomposed])


def test_equal_names_are_refused_if_they_are_needed() -> None:
    with pytest.raises(RequestError, match="two classes of the model have the same name, 'a'"):
        match_classes(["a", "b"], ["a", "a", "b"])
    assert match_classes(["b"], ["a", "a", "b"])[0].tolist() == [2]


def test_a_model_without_names_has_the_order_of_the_data_and_says_so() -> None:
    index, lines = match_classes(["cat", "dog"], ["0", "1"])
    assert index.tolist() == [0, 1]
    assert "in the order of the data" in lines[0]
    assert not match_classes(["0", "1"], ["0", "1"])[1]
    with pytest.raises(RequestError, match="does not know 2 of the 2"):  # two of three could be any two
        match_classes(["cat", "dog"], ["0", "1", "2"])
    with pytest.raises(RequestError, match="does not know 2 of the 2"):  # numbers for names would be a guess
        match_classes(["0", "1"], ["cat", "dog"])


def test_folders_of_imagenet_meet_its_classes() -> None:
    index, lines = match_classes(["n01443537", "n01440764"], class_names(1000))  # goldfish, tench
    assert torch.equal(index, torch.tensor([1, 0]))
    assert "ImageNet" in lines[0]
    with pytest.raises(RequestError, match="does not know 1 of the 1"):
        match_classes(["n99999999"], class_names(1000))


def test_folders_of_imagenet_with_words_meet_its_classes_under_any_usual_name() -> None:
    info = ImageNetInfo()
    folders = ["n02085620-Chihuahua", "n03126707", "n01440764_tench"]  # "crane" is a bird and a machine
    for names in (class_names(1000), info.label_descriptions(), info.label_descriptions(detailed=True)):
        assert match_classes(folders, names)[0].tolist() == [151, 517, 0]
    assert match_classes(folders, info.label_names())[0].tolist() == [151, 517, 0]
    with pytest.raises(RequestError, match="two classes of the data have the same name, 'n01440764'"):
        match_classes(["n01440764", "n01440764-tench"], class_names(1000))
    with pytest.raises(RequestError, match="does not know 3 of the 3"):  # 1000 classes of something else
        match_classes(folders, [f"class {i}" for i in range(1000)])


def test_a_few_of_imagenets_folders_measure_weights_of_its_1000_classes(tmp_path: Path) -> None:
    torch.save(ConvMixer(4, 1, 3, 4).state_dict(), tmp_path / "w.pth")
    for synset in ("n01443537", "n01440764"):  # goldfish and tench
        (tmp_path / "data" / synset).mkdir(parents=True)
        for i in range(2):
            pixels = np.random.default_rng([i, int(synset[1:])]).integers(0, 256, (32, 32, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / synset / f"{i}.png")
    result = val(tmp_path / "w.pth", str(tmp_path / "data"))
    assert {row["name"]: row["n"] for row in result["per_class"] if row["n"]} == {
        "tench, Tinca tinca": 2,
        "goldfish, Carassius auratus": 2,
    }
    assert any("ImageNet's folder names are matched" in line for line in result["warnings"])
