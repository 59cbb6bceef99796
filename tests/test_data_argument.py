"""A data argument that could mean two things: the choice, and its note. The hub is never asked for a path."""

from pathlib import Path

import pytest

from convmixer.data.argument import read_argument
from convmixer.data.datasets import load_data
from convmixer.errors import RequestError
from data_sets import parts, write_folder, write_parquet

SETTINGS = {"val_fraction": 0.1, "seed": 0, "max_bad_fraction": 0.0}


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the hub was asked for."""
    asked: list[str] = []

    def download(repo: str, **_: object) -> str:
        asked.append(repo)
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    return asked


def test_a_path_that_looks_like_a_hub_name_is_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_hub: list[str]
) -> None:
    write_folder(tmp_path / "data" / "flowers", range(60))
    monkeypatch.chdir(tmp_path)
    data = load_data("data/flowers", **SETTINGS)
    assert data.spec == str(tmp_path / "data" / "flowers")
    assert data.notes[0].endswith("for the data set on the hub write hf-hub:data/flowers")
    assert not no_hub


def test_what_was_trained_on_is_found_from_elsewhere_and_never_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_hub: list[str]
) -> None:
    write_folder(tmp_path / "data" / "flowers", range(60))
    monkeypatch.chdir(tmp_path)
    spec = load_data("data/flowers", **SETTINGS).spec
    monkeypatch.chdir("/")
    assert load_data(spec, **SETTINGS, recorded=True).spec == spec
    with pytest.raises(RequestError, match=r"not here: name the data \(if it is .*: hf-hub:data/flowers\)"):
        load_data("data/flowers", **SETTINGS, recorded=True)  # weights of older versions hold relative paths
    assert not no_hub


def test_a_hub_name_is_said_to_be_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_hub: list[str]) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RequestError, match=r"cannot be downloaded.*for a path write \./owner/flowers"):
        load_data("owner/flowers", **SETTINGS)
    (tmp_path / "owner").mkdir()
    with pytest.raises(RequestError, match=r"folder owner is here.*write hf-hub:owner/flowers"):
        load_data("owner/flowers", **SETTINGS)
    assert no_hub == ["owner/flowers"]
    with pytest.raises(RequestError, match="cannot be downloaded"):
        load_data("hf-hub:owner/flowers", **SETTINGS)
    assert no_hub == ["owner/flowers"] * 2
    for path in ("owner/table.csv", "more/shards.tar", "./owner/flowers", "/owner/flowers", "../owner", "a/b/"):
        with pytest.raises(RequestError, match="no data"):
            load_data(path, **SETTINGS)
    assert len(no_hub) == 2


def test_hub_names_are_kept_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(tmp_path / "copy" / "small" / "train.parquet", range(60))
    asked = []

    def download(repo: str, **_: object) -> str:
        asked.append(repo)
        return str(tmp_path / "copy")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    for spec in ("owner/name", "owner/name/small", "hf-hub:owner/name"):
        data = load_data(spec, **SETTINGS)
        assert sum(len(part) for part in parts(data)) == 60
        assert data.spec == "hf-hub:" + spec.removeprefix("hf-hub:")
        assert load_data(data.spec, **SETTINGS, recorded=True).checksum == data.checksum
    assert asked == ["owner/name"] * 6


def test_a_folder_beside_that_is_called_like_built_in_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("digits", "cifar10", "data/cifar10"):
        write_folder(tmp_path / name, range(60))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CONVMIXER_DATA", raising=False)
    digits = load_data("digits", **SETTINGS)
    assert digits.notes[0].endswith("is used; for the folder of that name write ./digits")
    assert len(parts(digits)[0]) > 1000
    assert load_data("./digits", **SETTINGS).spec == str(tmp_path / "digits")
    assert read_argument("cifar10").notes == (
        "cifar10: read from data/cifar10",
        "cifar10: the built-in data set is used; for the folder of that name write ./cifar10",
    )
    assert not read_argument("./cifar10").notes


def test_a_name_too_long_for_the_disk_is_no_data() -> None:
    with pytest.raises(RequestError, match="no data"):
        read_argument("x" * 5000)
