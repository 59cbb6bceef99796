"""`--group`: images of one group stay in one split, whether a column, a member or a pattern on paths names it."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from convmixer.data.datasets import DataSplits
from convmixer.data.options import Options
from convmixer.data.splits import stratified
from convmixer.errors import RequestError
from data_sets import label, load, names, parts, png, write_folder, write_members


def test_groups_by_pattern_and_by_column(tmp_path: Path) -> None:
    for i in range(120):
        folder = tmp_path / "img" / f"class {i // 10 % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"video{i // 10:02}_{i % 10}.png").write_bytes(png(i))
    rows = [
        f"img/class {i // 10 % 2}/video{i // 10:02}_{i % 10}.png,class {i // 10 % 2},p{i // 20}" for i in range(120)
    ]
    (tmp_path / "table.csv").write_text("\n".join(["path,label,patient", *rows]))

    def videos(data: DataSplits, length: int = 7) -> list[set[str]]:
        return [{Path(name).name[:length] for name in names(part)} for part in parts(data)]

    data = load(tmp_path / "img", options=Options(group=r"(video\d+)_"))
    found = videos(data)
    assert sum(map(len, found)) == len(set.union(*found)) == 12
    assert "12 groups, each in one split" in data.notes
    assert [len(part) for part in parts(data)] == [70, 20, 30] or sum(map(len, parts(data))) == 120
    patients = load(tmp_path / "table.csv", options=Options(group="patient"))
    pairs = [{int(name[5:]) // 2 for name in part} for part in videos(patients)]
    assert sum(map(len, pairs)) == len(set.union(*pairs)) == 6


def test_groups_that_cannot_be(tmp_path: Path) -> None:
    write_folder(tmp_path, range(60))
    with pytest.raises(RequestError, match=r"--group 'patient' is neither a column nor .* a path, such as 'digit 0/"):
        load(tmp_path, options=Options(group="patient"))
    with pytest.raises(RequestError, match="nor a valid regular expression"):
        load(tmp_path, options=Options(group="("))
    write_folder(tmp_path / "s" / "train", range(60))
    write_folder(tmp_path / "s" / "test", range(60, 90))
    with pytest.raises(RequestError, match=r"group '00' is in .* own splits separate images"):
        load(tmp_path / "s", options=Options(group=r"/(00)\d\d"))


@pytest.mark.parametrize("fraction", [0.1, 0.2, 0.5])
def test_whole_groups_are_held_out(fraction: float) -> None:
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 100, 1000)
    labels = groups % 4
    held = stratified(labels, fraction, 0, groups)
    assert not set(groups[held]) & set(groups[~held])
    assert abs(held.mean() - fraction) < 0.03
    assert (stratified(labels, fraction, 0, groups) == held).all()
    single = np.arange(1000)
    assert (stratified(labels, fraction, 3, single) == stratified(labels, fraction, 3)).all()


def check_groups(data: DataSplits, group: Callable[[str], object]) -> None:
    """Check that the images of each group are in one split, and that each split has several groups."""
    found = [{group(name) for name in names(part)} for part in parts(data)]
    assert sum(map(len, found)) == len(set.union(*found)) == 15
    assert all(len(groups) > 1 for groups in found)
    assert "15 groups, each in one split" in data.notes


def number(name: str) -> int:
    return int("".join(c for c in name.rpartition(":")[2] if c.isdigit()))


@pytest.mark.parametrize("group", [r"^p(\d+)_", "patient", "who"])
def test_groups_of_shards(tmp_path: Path, group: str) -> None:
    def sample(i: int) -> list[tuple[str, bytes]]:
        key, about = f"./p{i // 4}_{i % 4}", {"label": i // 4 % 2, "patient": i // 4}
        return [
            (f"{key}.png", png(i)),
            (f"{key}.json", json.dumps(about).encode()),
            (f"{key}.who", str(i // 4).encode()),
        ]

    for shard in range(3):
        write_members(tmp_path / f"x-{shard}.tar", (m for i in range(20 * shard, 20 * shard + 20) for m in sample(i)))
    data = load(tmp_path, options=Options(group=group))
    check_groups(data, lambda name: name.rpartition("/")[2].partition("_")[0])
    assert any("a member that" in note for note in data.notes) == (group != "who")
    with pytest.raises(RequestError, match=r"--group 'patients' is neither a column nor .* such as 'p0_0.png'"):
        load(tmp_path, options=Options(group="patients"))
    with pytest.raises(RequestError, match=r"--group puts all images into one group, 'png'"):
        load(tmp_path, options=Options(group="png"))


@pytest.mark.parametrize("group", ["patient", r"p(\d+)_"])
def test_groups_of_parquet(tmp_path: Path, group: str) -> None:
    images = pa.array([{"bytes": png(i), "path": f"p{i // 4}_{i % 4}.png"} for i in range(60)])
    columns = {"image": images, "label": [i // 4 % 2 for i in range(60)], "patient": [i // 4 for i in range(60)]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    data = load(tmp_path / "a.parquet", options=Options(group=group))
    check_groups(data, lambda name: number(name) // 4)
    columns["image"] = pa.array([png(i) for i in range(60)])
    columns["patient"] = [i // 4 if i >= 8 else None for i in range(60)]
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(RequestError, match=r"--group \(\.\): .*no such column, and its images have no paths"):
        load(tmp_path / "a.parquet", options=Options(group="(.)"))
    loose = load(tmp_path / "a.parquet", options=Options(group="patient"))
    assert "13 groups, each in one split; 8 images belong to no group" in loose.notes


def test_an_empty_cell_is_no_group_and_the_column_counts_as_used(tmp_path: Path) -> None:
    write_folder(tmp_path / "img", range(60))
    rows = [f"img/{label(i)}/{i:04}.png,{label(i)},{['', 'NaN', f'p{i // 8}'][i % 3]}" for i in range(60)]
    (tmp_path / "t.csv").write_text("\n".join(["path,label,breed", *rows]))
    data = load(tmp_path / "t.csv", options=Options(group="breed"))
    assert "8 groups, each in one split; 40 images belong to no group" in data.notes
    assert not any("a column of the table" in note for note in data.notes)
