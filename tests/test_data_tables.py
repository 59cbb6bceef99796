"""Tables of images as people have them: which columns are taken, and what is refused."""

from pathlib import Path

import pytest

from convmixer.data.labels import encode_labels
from convmixer.errors import RequestError
from data_sets import label, load, parts, png, write_folder


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


def test_classes_of_one_number_keep_their_order() -> None:
    spellings = ["0" * zeros + number for zeros in range(9) for number in ("1", "2")]
    classes, labels = encode_labels({"train": spellings})
    assert list(classes) == sorted(spellings, key=lambda name: (int(name), name))
    assert [classes[i] for i in labels["train"]] == spellings


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "names no images"),
        ("a.png\n", "line 1: expected path,label"),
        ("path,label\na.png,\n", "line 2: expected path,label"),
        ("path,label,split\na.png,x,hidden\n", "split 'hidden' is not"),
        ("where,what\nreal.png,x\n", "line 1 is no image, and as a header"),
        ("path,label,split\nreal.png,x,train\nreal.png,y,test\n", "class 'y' is in test but"),
    ],
)
def test_wrong_csv(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "real.png").write_bytes(png(0))
    (tmp_path / "table.csv").write_text(text)
    with pytest.raises(RequestError, match=reason):
        load(tmp_path / "table.csv")
