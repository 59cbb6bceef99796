"""Exported files are valid in their format, name nothing of the machine, and have the same bytes for the same
weights.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import onnx
import pytest
import torch
from PIL import Image
from tests.exports import ALL, CLASSES, Exports

import convmixer
from convmixer.cli import main
from convmixer.errors import RequestError
from convmixer.exported.export import _shareable
from convmixer.exported.formats import FORMATS, format_of
from convmixer.exported.load import load_exported
from shared import importable


def contents(path: Path) -> dict[str, bytes]:
    """Return the contents of an export's files by name, and of an archive's members separately."""
    files = [file for file in sorted(path.parent.rglob("*")) if file.is_file()]
    return {str(file.relative_to(path.parent)): file.read_bytes() for file in files}


@pytest.mark.parametrize("precision", FORMATS["onnx"].precisions)
def test_onnx_files_are_valid_and_named_as_other_readers_expect(exports: Exports, precision: str) -> None:
    model = onnx.load(exports.get("onnx", precision)[0])
    onnx.checker.check_model(model, full_check=True)
    props = {entry.key: entry.value for entry in model.metadata_props}
    assert props["task"] == "classify"
    assert props["imgsz"] == "[16, 16]"
    assert props["names"] == str(dict(enumerate(CLASSES)))


def test_openvino_files_carry_what_its_model_api_reads(exports: Exports) -> None:
    root = ElementTree.parse(exports.get("openvino")[0]).getroot()
    info = {entry.tag: entry.get("value") for entry in root.iterfind("rt_info/model_info/*")}
    assert info["labels"] == " ".join(name.replace(" ", "_") for name in CLASSES)
    assert float(info["mean_values"]) == pytest.approx(0.3 * 255)
    assert float(info["scale_values"]) == pytest.approx(0.3 * 255)
    assert info["model_type"] == "Classification"


def test_a_torch_export_is_loaded_by_torch_alone(exports: Exports) -> None:
    program = torch.export.load(exports.get("torch")[0])
    images = torch.randn(3, 1, 16, 16)
    torch.testing.assert_close(program.module()(images)[0], exports.model(images))


@pytest.mark.parametrize(("format", "precision"), ALL)
def test_exports_hold_no_path_and_no_notes_of_the_machine(exports: Exports, format: str, precision: str) -> None:
    here = [Path(convmixer.__file__).parent, Path(torch.__file__).parent, Path.home(), Path.cwd(), exports.folder]
    words = [str(path).encode() for path in here if len(path.parts) > 1]
    words += [b"stack_trace", b"pkg.torch", b"site-packages"]
    for name, content in contents(exports.get(format, precision)[0]).items():
        if not name.endswith(("ort.js", "runtime.js", "Notices.txt")):  # of ONNX Runtime
            assert not [word for word in words if word in content], name


def test_the_same_weights_give_the_same_bytes_in_another_process(exports: Exports, tmp_path: Path) -> None:
    """Its hash seed and what it exported before differ from this process's."""
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    torch.save((exports.model, exports.scans), tmp_path / "model.pt")
    code = (
        "import sys, torch\nfrom pathlib import Path\nfrom tests.exports import ALL, write\n"
        "model, scans = torch.load(sys.argv[1], weights_only=False)\n"
        "for format, precision in reversed(ALL):\n"
        "    write(model, scans, Path(sys.argv[2]), format, precision)\n"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path / "model.pt"), str(tmp_path / "there")]
    environment = importable() | {"PYTHONHASHSEED": seed}
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    for format, precision in ALL:
        path = exports.get(format, precision)[0]
        first, second = contents(path), contents(tmp_path / "there" / path.parent.name / path.name)
        assert first.keys() == second.keys()
        assert [name for name in first if first[name] != second[name]] == [], (format, precision)


def test_an_export_says_what_it_was_trained_on_but_not_where_it_was(
    digits_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = tmp_path / "weights"
    weights.mkdir()
    config = json.loads((digits_weights / "config.json").read_text())
    secret = {"spec": "/home/me/private", "seal": "abc", "options": {"test": "/home/me/t.csv", "group": "a"}}
    config["convmixer"]["data"] |= secret
    del config["sha256"]  # it is of the config as it was
    (weights / "config.json").write_text(json.dumps(config))
    (weights / "model.safetensors").write_bytes((digits_weights / "model.safetensors").read_bytes())
    path = tmp_path / "m.onnx"
    assert main(["export", str(weights), "--out", str(path), "--limit", "9"]) == 0
    data = load_exported(path).describe["data"]
    assert data["checksum"].startswith("sha256:")
    assert {"spec", "seal"}.isdisjoint(data)
    assert data["options"] == {"group": "a"}
    assert _shareable(secret | {"spec": "digits"}) == {"spec": "digits", "options": {"group": "a"}}
    assert "not checked on the training data" in capsys.readouterr().out
    assert main(["export", str(weights), "--out", str(path), "--precision", "int8"]) == 2
    assert "--data" in capsys.readouterr().err


@pytest.mark.parametrize("format", ["web", "onnx"])
def test_what_is_no_export_is_not_written_over(exports: Exports, tmp_path: Path, format: str) -> None:
    run = tmp_path / f"run{FORMATS[format].suffix}"
    run.mkdir()
    (run / "weights").write_text("dear")
    with pytest.raises(RequestError, match=r"choose another --out|is a folder"):
        exports.write(run, format)
    assert [file.read_text() for file in run.iterdir()] == ["dear"]


def test_a_folder_that_only_shares_a_name_with_a_page_is_not_replaced(exports: Exports, tmp_path: Path) -> None:
    page = tmp_path / "page"
    page.mkdir()
    for name in ("model.js", "index.html"):
        (page / name).write_text("dear")
        with pytest.raises(RequestError, match="choose another --out"):
            exports.write(page, "web")
    assert {file.name: file.read_text() for file in page.iterdir()} == {"model.js": "dear", "index.html": "dear"}


def test_a_page_replaces_an_older_page(exports: Exports, tmp_path: Path) -> None:
    path = tmp_path / "page"
    shutil.copytree(exports.get("web", "int8")[0], path)
    (path / "left-over").write_text("")
    exports.write(path, "web")
    assert not (path / "left-over").exists()
    assert [file.name for file in tmp_path.iterdir()] == ["page"]


def test_a_page_shows_the_samples_asked_for_and_no_others(
    digits_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = tmp_path / "samples"
    samples.mkdir()
    Image.new("L", (8, 8)).save(samples / "1.png")
    said = {}
    for choice in ((), ("--samples", str(samples))):
        page = tmp_path / f"page{len(choice)}"
        flags = ["--format", "web", "--out", str(page), "--limit", "9", *choice]
        assert main(["export", str(digits_weights), *flags]) == 0
        facts = re.search(r"= (.*);", (page / "model.js").read_text())
        assert facts
        assert len(json.loads(facts[1])["samples"]) == len(choice) // 2
        said[len(choice)] = capsys.readouterr().out
    assert "no sample pictures" in said[0]
    assert f"1 of {samples}; everybody who opens the page sees them" in said[2]
    assert main(["export", str(digits_weights), "--samples", "none"]) == 2


def test_the_table_of_formats_names_modules_that_write_check_and_read() -> None:
    for name, row in FORMATS.items():
        module = row.load_module()
        assert all(callable(getattr(module, verb)) for verb in ("write", "check", "read")), name
        if not row.folder:
            assert format_of(f"model{row.suffix}") is row
