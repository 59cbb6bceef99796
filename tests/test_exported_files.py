"""Exported files are valid in their format, name nothing of the machine, and have the same bytes for the same
weights.
"""

import json
import os
import re
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
from convmixer.exported.export import export
from convmixer.exported.formats import FORMATS, format_of
from convmixer.exported.load import load_exported


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


@pytest.mark.parametrize(("format", "precision"), ALL)
def test_the_same_weights_give_the_same_bytes(exports: Exports, tmp_path: Path, format: str, precision: str) -> None:
    first = exports.get(format, precision)[0]
    exports.write(tmp_path / "again" / first.name, format, precision)
    assert contents(tmp_path / "again" / first.name) == contents(first)


def test_another_process_gives_the_same_bytes(digits_weights: Path, tmp_path: Path) -> None:
    """Its hash seed differs from this process's, which is random unless PYTHONHASHSEED is set."""
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    code = (
        "import sys\nfrom pathlib import Path\nfrom convmixer.exported.export import export\n"
        "for name, end in (('onnx', '.onnx'), ('openvino', '.xml'), ('torch', '.pt2')):\n"
        "    export(sys.argv[1], name, out=Path(sys.argv[2], 'm' + end), limit=9)\n"
    )
    arguments = [sys.executable, "-c", code, str(digits_weights), str(tmp_path / "there")]
    subprocess.run(arguments, check=True, capture_output=True, env={**os.environ, "PYTHONHASHSEED": seed})
    for name, end in (("onnx", ".onnx"), ("openvino", ".xml"), ("torch", ".pt2")):
        export(str(digits_weights), name, out=Path(tmp_path / "here", "m" + end), limit=9)
    first, second = (contents(tmp_path / place / "m.onnx") for place in ("here", "there"))
    assert first.keys() == second.keys() == {"m.onnx", "m.xml", "m.bin", "m.pt2"}
    assert [name for name in first if first[name] != second[name]] == []


def test_an_export_says_what_it_was_trained_on_but_not_where_it_was(
    digits_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for spec, shown in (("digits", "digits"), ("/home/me/private", None)):
        weights = tmp_path / "weights"
        weights.mkdir(exist_ok=True)
        config = json.loads((digits_weights / "config.json").read_text())
        data = {"spec": spec, "seal": "abc", "options": {"test": "/home/me/t.csv", "group": "a"}}
        config["convmixer"]["data"] |= data
        del config["sha256"]  # it is of the config as it was
        (weights / "config.json").write_text(json.dumps(config))
        (weights / "model.safetensors").write_bytes((digits_weights / "model.safetensors").read_bytes())
        path = tmp_path / "m.onnx"
        assert main(["export", str(weights), "--out", str(path), "--limit", "9"]) == 0
        data = load_exported(path).describe["data"]
        assert data.get("spec") == shown
        assert data["checksum"].startswith("sha256:")
        assert "seal" not in data
        assert data["options"] == {"group": "a"}
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
    for _ in range(2):
        exports.write(path, "web")
        assert not (path / "left-over").exists()
        (path / "left-over").write_text("")
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
