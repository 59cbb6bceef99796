"""Small copies of the layouts of public data sets: the names and columns are theirs, the images are scans."""

import json
from pathlib import Path

import pytest

from convmixer.data.options import Options
from convmixer.errors import RequestError
from data_sets import label, load, names, parts, png, write_folder, write_members


def test_fruits_360(tmp_path: Path) -> None:
    """Training and Test, a validation folder of another name, and a folder of photographs without classes."""
    write_folder(tmp_path / "Training", range(60))
    write_folder(tmp_path / "Test", range(60, 90))
    write_folder(tmp_path / "No_Rotation_Validation", range(100, 120))
    (tmp_path / "test-multiple_fruits").mkdir()
    (tmp_path / "test-multiple_fruits" / "apple_1.png").write_bytes(png(130))
    (tmp_path / ".DS_Store").touch()
    data = load(tmp_path)
    assert [len(part) for part in parts(data)] == [60, 20, 30]
    notes = " | ".join(data.notes)
    assert "val is No_Rotation_Validation" in notes
    assert "1 (test-multiple_fruits/apple_1.png)" in notes


def test_dog_breed_identification(tmp_path: Path) -> None:
    """labels.csv of id and breed for train/ID.jpg; test/ has images without labels."""
    for split, indices in (("train", range(60)), ("test", range(60, 80))):
        (tmp_path / split).mkdir()
        for i in indices:
            (tmp_path / split / f"{i:032x}.png").write_bytes(png(i))
    rows = [f"{i:032x},{label(i)}" for i in range(60)]
    (tmp_path / "labels.csv").write_text("\n".join(["id,breed", *rows]))
    (tmp_path / "sample_submission.csv").write_text("id,affenpinscher\n0,0.1\n")
    with pytest.raises(RequestError, match=r"to take the labels from a table, give .*: .*labels\.csv"):
        load(tmp_path)
    data = load(tmp_path / "labels.csv")
    assert sum(map(len, parts(data))) == 60
    assert all(name.startswith("train/") for name in names(parts(data)[0]))


def test_covid_chestxray(tmp_path: Path) -> None:
    """metadata.csv of fourteen columns for images/FILENAME, several images of one patient."""
    (tmp_path / "images").mkdir()
    rows = []
    for i in range(60):
        (tmp_path / "images" / f"fig{i}.png").write_bytes(png(i))
        rows.append(
            f'{i // 3},{i},M,{20 + i % 40},{label(i)},Y,PA,"January {i % 30}, 2020",,fig{i}.png,10.1/x,,,"a, b"'
        )
    header = "Patientid,offset,sex,age,finding,survival,view,date,location,filename,doi, url,license,notes"
    (tmp_path / "metadata.csv").write_text("\n".join([header, *rows]))
    with pytest.raises(RequestError, match=r"which column is the label\? it could be .*finding"):
        load(tmp_path / "metadata.csv")
    data = load(tmp_path / "metadata.csv", options=Options(label_column="finding", group="Patientid"))
    patients = [{int(Path(name).stem[3:]) // 3 for name in names(part)} for part in parts(data)]
    assert sum(map(len, patients)) == len(set.union(*patients)) == 20


def test_facial_expressions(tmp_path: Path) -> None:
    """data/legend.csv next to a folder images/, and labels that differ only in capitals."""
    (tmp_path / "images").mkdir()
    (tmp_path / "data").mkdir()
    for i in range(60):
        (tmp_path / "images" / f"{i}.png").write_bytes(png(i))
    rows = [f"302,{i}.png,{'Happiness' if i % 9 == 0 else 'happiness' if i % 2 else 'neutral'}" for i in range(60)]
    (tmp_path / "data" / "legend.csv").write_text("\n".join(["user.id,image,emotion", *rows]))
    with pytest.raises(RequestError, match="name the folder of the images with --image-root"):
        load(tmp_path / "data" / "legend.csv")
    options = Options(image_root=str(tmp_path / "images"), label_column="emotion")
    assert (
        "classes 'Happiness' and 'happiness' differ only in capitals"
        in load(tmp_path / "data" / "legend.csv", options=options).notes
    )


def test_openimages_shards(tmp_path: Path) -> None:
    """openimages-train-000000.tar: the .json of an image is a list of its many labels."""
    members = []
    for i in range(60):
        boxes = [{"ImageID": f"{i:x}", "Source": "xclick", "LabelName": label(i)}]
        members += [(f"{i:016x}.jpg", png(i)), (f"{i:016x}.json", json.dumps(boxes).encode())]
    write_members(tmp_path / "openimages-train-000000.tar", members)
    with pytest.raises(RequestError, match="an image has exactly one label here"):
        load(tmp_path)
