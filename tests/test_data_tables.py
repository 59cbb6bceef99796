"""Tables of images as people write them: which columns are used, and what is refused."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from convmixer.data.datasets import DataSplits
from convmixer.data.options import Options
from convmixer.errors import RequestError
from data_sets import DIGITS, label, load, names, parts, png, write_folder


def test_csv(tmp_path: Path) -> None:
    write_folder(tmp_path / "scans", range(60))
    rows = [f"scans/{label(i)}/{i:04}.png,{label(i)}" for i in range(60)]
    (tmp_path / "plain.csv").write_text("\n".join(rows))
    (tmp_path / "named.csv").write_text(
        "label,split,file\n"
        + "\n".join(
            f"{r.split(',')[1]},{'test' if n < 20 else 'Train'},{r.split(',')[0]}" for n, r in enumerate(rows)
        )
    )
    plain, named = load(tmp_path / "plain.csv"), load(tmp_path / "named.csv")
    assert sum(len(part) for part in parts(plain)) == 60
    assert [len(part) for part in parts(named)] == [32, 8, 20]
    assert plain.classes == named.classes == tuple(f"digit {i}" for i in range(10))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "names no images"),
        ("a.png\n", "line 1: expected path,label"),
        ("path,label\nreal.png,\n", "line 2: no label, found ''"),
        ("path,label\nreal.png,x\nreal.png,NaN\n", "line 3: no label, found 'NaN'"),
        ("path,label\nreal.png,x\n,x\n", "line 3: no path"),
        ("path,label\nreal.png,x,y\n", "line 2: 3 cells, the first line has 2"),
        ("path,label\na.png,x\n", r"'a.png' of 'path' is not there: .*--image-root, .*--path-column"),
        ("path,label\nhttps://example.org/a.png,x\n", "is a URL, which is never fetched"),
        ("path,label,split\nreal.png,x,hidden\n", "split 'hidden' is not"),
        ("path,label,split\nreal.png,x,train\nreal.png,y,test\n", "class 'y' is in test but"),
        (
            "path,other,split,is_valid\nreal.png,x,train,0\n",
            "which column is the split.*split, is_valid.*--split-column",
        ),
        ("a,b,label\nreal.png,real.png,x\n", "which column is the image.*a, b: choose with --path-column"),
        ("image_id,dx,sex\nreal,a,m\nreal,b,m\nreal,a,f\n", r"which column is the label\?.*dx, sex.*--label-column"),
        ("path,number\nreal.png,1\nreal.png,2\nreal.png,3\n", "which column is the label"),  # a name for each row
        ("path,label\nreal.png,caf\u00e9\nreal.png,cafe\u0301\n", "differ only in Unicode normalisation"),
    ],
)
def test_wrong_csv(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "real.png").write_bytes(png(0))
    (tmp_path / "table.csv").write_text(text)
    with pytest.raises(RequestError, match=reason):
        load(tmp_path / "table.csv")


def write_table(root: Path, header: str, row: Callable[[int], str], encoding: str = "utf-8", end: str = "\n") -> Path:
    """Write 60 scans into `root`/scans and a table with a row for each."""
    write_flat(root / "scans", range(60))
    table = root / "table.csv"
    lines = [header, *(row(i) for i in range(60))] if header else [row(i) for i in range(60)]
    table.write_bytes(end.join([*lines, ""]).encode(encoding))
    return table


def write_flat(folder: Path, indices: range) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in indices:
        (folder / f"{i:04}.png").write_bytes(png(i))


def check(data: DataSplits, images: int = 60) -> None:
    """Check that each scan has its label."""
    found = [part for part in (data.train, data.val, data.test) if part]
    assert sum(map(len, found)) == images
    for part in found:
        for i in range(0, len(part), 7):
            number = int(Path(part.name(i)).stem)
            assert data.classes[part[i][1]] == label(number)
            assert np.array_equal(np.asarray(part[i][0]), (DIGITS.images[number] * 15).astype(np.uint8))


@pytest.mark.parametrize(
    ("header", "row", "how"),
    [
        ("path;label", "scans/{n};{label}", {}),
        ("path;label", "scans/{n};{label}", {"encoding": "utf-16", "end": "\r\n"}),
        ("sep=;\npath;label", "scans/{n};{label}", {}),
        ("path\tlabel", "scans/{n}\t{label}", {"encoding": "utf-16"}),
        ("path|label", "scans/{n}|{label}", {"encoding": "utf-8-sig"}),
        ("id,breed", "{stem},{label}", {}),
        ("image_id,species", "{stem},{label}", {"encoding": "utf-8-sig"}),
        ("filename,class", "{n},{label}", {}),
        ("Image Name,Class Name", "{n},{label}", {}),
        (",filename,class", "{i},{n},{label}", {}),  # pandas' index
        ("what,where", "{label},scans/{n}", {}),
        ("path,label", "C:\\Users\\me\\digits\\scans\\{n},{label}", {}),
        ("path,label", "scans\\{n},{label}", {}),
        ("path,label", "/kaggle/input/digits/scans/{n},{label}", {}),
        ("path,label", "./scans/{n},{label}", {}),
        ("", "scans/{n},{label}", {}),
        ("", "{label};scans/{n}", {}),
        ("path,label", '"scans/{n}","{label}"', {}),
    ],
)
def test_tables_as_people_have_them(tmp_path: Path, header: str, row: str, how: dict[str, str]) -> None:
    table = write_table(
        tmp_path, header, lambda i: row.format(i=i, n=f"{i:04}.png", stem=f"{i:04}", label=label(i)), **how
    )
    check(load(table))


def test_what_was_understood_is_said(tmp_path: Path) -> None:
    table = write_table(tmp_path, "id,breed,width", lambda i: f"{i:04},{label(i)},{i}.5")
    data = load(table)
    notes = " | ".join(data.notes)
    assert "'0000' and the like are read as scans/0000.png" in notes
    assert "not used, a column of the table: 1 (width)" in notes


def test_columns_that_say_the_split(tmp_path: Path) -> None:
    def sizes(header: str, split: Callable[[int], object], **options: str) -> list[int]:
        table = write_table(tmp_path, f"path,label,{header}", lambda i: f"scans/{i:04}.png,{label(i)},{split(i)}")
        data = load(table, 0, options=Options(**options))
        return [len(part) if part else 0 for part in (data.train, data.val, data.test)]

    assert sizes("is_valid", lambda i: i % 5 == 0)[1:] == [0, 12]  # val serves as test without val_fraction
    assert sizes("is_test", lambda i: int(i % 5 == 0)) == [48, 0, 12]
    assert sizes("Usage", lambda i: "PrivateTest" if i >= 40 else "Training") == [40, 0, 20]
    assert sizes("origin", lambda i: "test_set" if i >= 40 else "train") == [40, 0, 20]
    assert sizes("set", lambda i: "test" if i >= 40 else "") == [48, 0, 12]  # not all are splits: no split column
    assert sizes("fold", lambda i: i % 5, split_column="fold=0") == [48, 0, 12]
    assert sizes("how", lambda i: "test_set" if i >= 40 else "train", split_column="how") == [40, 0, 20]
    with pytest.raises(RequestError, match=r"--split-column: .* has the columns path, label, how; .*did you mean"):
        sizes("how", lambda i: 0, split_column="hov")


def test_folds_are_named_and_not_used(tmp_path: Path) -> None:
    table = write_table(tmp_path, "path,label,fold", lambda i: f"scans/{i:04}.png,{label(i)},{i % 5}")
    notes = load(table).notes
    assert "column 'fold' is not used; to take some rows as val: --split-column fold=0" in notes
    assert "not used, a column of the table: 1 (fold)" in notes


def test_a_table_of_another_split_next_to_it_is_said(tmp_path: Path) -> None:
    table = write_table(tmp_path, "path,label", lambda i: f"scans/{i:04}.png,{label(i)}").rename(
        tmp_path / "train.csv"
    )
    assert not any("next to it" in note for note in load(table).notes)
    (tmp_path / "test.csv").write_text("path,label\n")
    assert "test.csv next to it is not read: for its split join the tables, with a column split" in load(table).notes


def test_a_column_for_each_class(tmp_path: Path) -> None:
    columns = [f"digit {i}" for i in range(10)]
    table = write_table(
        tmp_path,
        f"image,{','.join(columns)}",
        lambda i: f"{i:04}," + ",".join("1.0" if name == label(i) else "0.0" for name in columns),
    )
    check(load(table))
    lines = table.read_text().splitlines()
    lines[5] = lines[5].replace("0.0", "1.0", 1)  # two classes
    table.write_text("\n".join(lines))
    with pytest.raises(RequestError, match="which column is the label"):
        load(table)


def test_images_of_a_name_in_two_folders(tmp_path: Path) -> None:
    table = write_table(tmp_path, "id,breed", lambda i: f"{i:04},{label(i)}")
    write_flat(tmp_path / "test", range(100, 160))
    check(load(table))  # other names
    write_flat(tmp_path / "train", range(60))
    with pytest.raises(RequestError, match=r"in several folders: choose --image-root from .*scans.*train"):
        load(table)
    check(load(table, options=Options(image_root=str(tmp_path / "scans"))))
    named = tmp_path / "train_labels.csv"
    table.rename(named)
    data = load(named)  # the name of the table says which
    check(data)
    assert "'0000' and the like are read as train/0000.png" in data.notes


def test_options_name_columns(tmp_path: Path) -> None:
    table = write_table(
        tmp_path, "image,mask,dx,age", lambda i: f"scans/{i:04}.png,scans/{59 - i:04}.png,{label(i)},{i % 9}"
    )
    with pytest.raises(RequestError, match=r"which column is the label\?.* mask, dx, age"):
        load(table)
    check(load(table, options=Options(label_column="dx")))
    with pytest.raises(RequestError, match=r"--path-column: .*image, mask, dx, age; unknown column 'imag'"):
        load(table, options=Options(path_column="imag"))
    with pytest.raises(RequestError, match=r"--image-root .* is not a folder"):
        load(table, options=Options(image_root=str(tmp_path / "nowhere")))


def test_images_that_the_table_does_not_name_are_counted(tmp_path: Path) -> None:
    table = write_table(tmp_path, "path,label", lambda i: f"scans/{i:04}.png,{label(i)}")
    write_flat(tmp_path / "scans", range(60, 65))
    (tmp_path / "scans" / "notes.txt").touch()
    notes = load(table).notes
    assert any(
        note.startswith("not used, an image that the table does not name: 5 (scans/0060.png") for note in notes
    )
    assert "not used, no image: 1 (scans/notes.txt)" in notes


def test_a_table_that_is_no_text_is_refused(tmp_path: Path) -> None:
    table = write_table(tmp_path, "path,label", lambda i: f"scans/{i:04}.png,{label(i)}")
    table.write_bytes(table.read_bytes() + b"scans/0001.png,caf\xe9\n")
    with pytest.raises(RequestError, match="line 62 is not UTF-8: save the table as CSV UTF-8"):
        load(table)


def test_a_table_and_its_options_are_found_again_from_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_table(tmp_path, "id,breed", lambda i: f"{i:04},{label(i)}")
    write_flat(tmp_path / "train", range(60))
    monkeypatch.chdir(tmp_path)
    data = load("table.csv", options=Options(image_root="scans"))
    monkeypatch.chdir("/")
    again = load(data.spec, recorded=True, options=Options.of(data.options.given()))
    assert (again.checksum, names(parts(again)[0])) == (data.checksum, names(parts(data)[0]))
