"""Untrusted exported files: nothing that they refer to is opened, and time and memory are limited."""

import base64
import json
import os
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from tests.tiny_onnx import FACTS, SOUND, P, constant, model, saved

from convmixer.errors import RequestError
from convmixer.exported.load import load_exported
from convmixer.exported.process import Confined
from convmixer.inference import softmax

SMALL = 2 * 2**30


def refused(path: Path, reason: str, **limits: Any) -> None:
    """Check that a file is refused in one line with its name, soon."""
    start = time.monotonic()
    with pytest.raises(RequestError, match=reason) as caught:
        load_exported(path, **limits)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value) or path.stem in str(caught.value)
    assert time.monotonic() - start < 60


def test_a_sound_model_runs(tmp_path: Path) -> None:
    exported = load_exported(saved(tmp_path / "m.onnx", model(SOUND)))
    logits, maps = exported.run(np.full((3, 1, 8, 8), 7, np.float32))
    np.testing.assert_allclose(logits, np.full((3, 2), 7))
    assert maps is None
    assert exported.describe["precision"] == "fp32"


def endless_loop() -> onnx.ModelProto:
    inside = [helper.make_tensor_value_info(name, kind, []) for name, kind in (("i", 7), ("on", 9))]
    outside = helper.make_tensor_value_info("on_", 9, [])
    body = helper.make_graph([helper.make_node("Identity", ["on"], ["on_"])], "b", inside, [outside])
    return model([helper.make_node("Loop", ["", ""], [], body=body), *SOUND])


def external() -> onnx.ModelProto:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="/etc/hostname")
    return model([helper.make_node("Add", ["sound", "w"], ["logits"])], [tensor])


def with_function() -> onnx.ModelProto:
    proto = model([helper.make_node("Mine", ["sound"], ["logits"], domain="mine")])
    body = [helper.make_node("Identity", ["x"], ["y"])]
    opset = [helper.make_opsetid("", 20)]
    proto.functions.append(helper.make_function("mine", "Mine", ["x"], ["y"], body, opset))
    return proto


@pytest.mark.parametrize(
    ("proto", "reason"),
    [
        (endless_loop(), "Loop"),
        (model([helper.make_node("If", ["sound"], ["logits"])]), "If"),
        (model([helper.make_node("Gelu", ["sound"], ["logits"], domain="com.microsoft")]), "com.microsoft"),
        (model([helper.make_node("NonZero", ["sound"], ["logits"])]), "NonZero"),
        (external(), "another file"),
        (with_function(), "functions"),
    ],
    ids=["loop", "if", "custom domain", "size by values", "external data", "function"],
)
def test_onnx_beyond_plain_operators_is_refused(tmp_path: Path, proto: onnx.ModelProto, reason: str) -> None:
    refused(saved(tmp_path / "m.onnx", proto), reason)


def expanded(shape: Sequence[int]) -> onnx.ModelProto:
    nodes = [
        helper.make_node("ConstantOfShape", ["shape"], ["huge"]),
        helper.make_node("ReduceMean", ["huge"], ["one"], keepdims=0),
        helper.make_node("Add", ["sound", "one"], ["logits"]),
    ]
    return model(nodes, [constant("shape", shape)])


def test_a_small_file_that_asks_for_much_memory_is_ended(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.onnx", expanded([2**34]))
    refused(path, r"GiB|alloc|memory", memory_bytes=SMALL)


def test_a_small_file_that_works_for_hours_is_ended(tmp_path: Path) -> None:
    nodes = [helper.make_node("ConstantOfShape", ["shape"], ["m0"])]
    nodes += [helper.make_node("MatMul", [f"m{i}", f"m{i}"], [f"m{i + 1}"]) for i in range(2000)]
    nodes += [helper.make_node("ReduceMean", ["m2000"], ["one"], keepdims=0)]
    nodes += [helper.make_node("Add", ["sound", "one"], ["logits"])]
    path = saved(tmp_path / "m.onnx", model(nodes, [constant("shape", [4096, 4096])]))
    refused(path, "took too long", load_seconds=10)


def test_a_batch_that_blows_up_is_ended_and_the_next_one_is_answered(tmp_path: Path) -> None:
    nodes = [helper.make_node("Shape", ["images"], ["batch"], start=0, end=1)]
    nodes += [helper.make_node("Concat", ["batch"] * 6, ["shape"], axis=0)]
    nodes += [helper.make_node("Expand", ["zero", "shape"], ["huge"])]
    nodes += [helper.make_node("ReduceMax", ["huge"], ["one"], keepdims=0)]
    nodes += [helper.make_node("Add", ["sound", "one"], ["logits"])]
    path = saved(tmp_path / "m.onnx", model(nodes, [constant("zero", 0.0, np.float32)]))
    exported = load_exported(path, memory_bytes=SMALL)
    with pytest.raises(RuntimeError, match=str(path)):
        exported.run(np.zeros((64, 1, 8, 8), np.float32))
    assert exported.run(np.ones((2, 1, 8, 8), np.float32))[0].tolist() == [[1, 1], [1, 1]]


def test_answers_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    bad = model([helper.make_node("Add", ["sound", "nan"], ["logits"])], [constant("nan", np.nan, np.float32)])
    refused(saved(tmp_path / "m.onnx", bad), "not finite")
    steps = [("Log", "sound", "log"), ("Exp", "log", "back"), ("Sqrt", "back", "logits")]
    late = saved(tmp_path / "late.onnx", model([helper.make_node(kind, [x], [y]) for kind, x, y in steps]))
    exported = load_exported(late)
    batch = np.stack([np.full((1, 8, 8), value, np.float32) for value in (1, -1)])
    good, bad_one = exported.run(batch)[0]  # one image does not fail the others of its batch
    assert np.isfinite(good).all()
    with pytest.raises(RequestError, match="NaN or infinite"):
        softmax(bad_one[None])


def test_the_process_that_runs_a_file_is_given_no_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CONVMIXER_TOKEN", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN"):
        monkeypatch.setenv(name, "a-secret")
    sound = model([helper.make_node("Identity", ["sound"], ["logits"])])
    confined = Confined(saved(tmp_path / "m.onnx", sound))
    assert b"a-secret" not in Path(f"/proc/{confined._process.pid}/environ").read_bytes()


@pytest.mark.parametrize(
    "facts",
    [
        {"classes": "ab"},
        {"classes": ["a", 1]},
        {"classes": ["a", "b" * 5000]},
        {"classes": ["a", "b", "c"]},
        {"preprocessing": []},
        {"preprocessing": P | {"img_size": 30_000}},
        {"preprocessing": P | {"img_size": "8"}},
        {"preprocessing": P | {"std": [float("nan")]}},
        {"preprocessing": P | {"mean": [float("inf")]}},
        {"preprocessing": P | {"more": 1}},
        {"about": {"data": "/home"}},
        {"about": {"architecture": "x" * 100_000}},
        {"about": {"model_args": {"a": ["b" * 500] * 500}}},
    ],
    ids=lambda facts: str(facts)[:40],
)
def test_metadata_of_a_wrong_type_or_range_are_refused(tmp_path: Path, facts: dict[str, Any]) -> None:
    refused(saved(tmp_path / "m.onnx", model(SOUND, **facts)), r"damaged metadata|logits of shape")


def test_a_pipe_is_no_exported_file(tmp_path: Path) -> None:
    for suffix in (".onnx", ".pt2", ".xml"):
        os.mkfifo(tmp_path / f"pipe{suffix}")
        refused(tmp_path / f"pipe{suffix}", "not an exported file")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, bytes]:
    """The two files of a sound OpenVINO model."""
    from convmixer.exported.openvino import import_openvino

    openvino = import_openvino()
    folder = tmp_path_factory.mktemp("openvino")
    added = model([helper.make_node("Add", ["sound", "w"], ["logits"])], [constant("w", [0, 0], np.float32)])
    converted = openvino.convert_model(saved(folder / "m.onnx", added))
    for name, value in FACTS.items():
        converted.set_rt_info(json.dumps(value), ["convmixer", name])
    openvino.save_model(converted, folder / "m.xml", compress_to_fp16=False)
    return (folder / "m.xml").read_text(), (folder / "m.bin").read_bytes()


def write_pair(folder: Path, xml: str, weights: bytes | None) -> Path:
    (folder / "m.xml").write_text(xml)
    if weights is not None:
        (folder / "m.bin").write_bytes(weights)
    return folder / "m.xml"


def test_openvino_weights_are_a_regular_file_of_the_right_size(tmp_path: Path, pair: tuple[str, bytes]) -> None:
    xml, weights = pair
    assert load_exported(write_pair(tmp_path, xml, weights)).classes == ("a", "b")
    refused(write_pair(tmp_path, xml, weights + b"more"), "does not belong")
    (tmp_path / "m.bin").unlink()
    refused(write_pair(tmp_path, xml, None), "not a regular file")
    os.mkfifo(tmp_path / "m.bin")
    refused(write_pair(tmp_path, xml, None), "not a regular file")


def test_openvino_beyond_plain_layers_is_refused(tmp_path: Path, pair: tuple[str, bytes]) -> None:
    xml, weights = pair
    for kind in ("Loop", "TensorIterator", "If", "ReadValue", "Mine"):
        refused(write_pair(tmp_path, xml.replace('type="Concat"', f'type="{kind}"'), weights), kind)
    custom = xml.replace('version="opset1"', 'version="mine"', 1)
    refused(write_pair(tmp_path, custom, weights), "never writes")


def test_an_entity_bomb_in_openvino_xml_is_refused(tmp_path: Path, pair: tuple[str, bytes]) -> None:
    xml, weights = pair
    entities = "".join(f'<!ENTITY e{i + 1} "{f"&e{i};" * 10}">' for i in range(9))
    start = f'<!DOCTYPE net [<!ENTITY e0 "lol">{entities}]>'
    body = xml.partition("?>")[2].replace('name="images"', 'name="&e9;"', 1)
    refused(write_pair(tmp_path, f'<?xml version="1.0"?>{start}{body}', weights), "document type")


def zipped(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(f"model/{name}", content)
    return path


def test_a_torch_export_that_unpacks_to_much_is_refused(tmp_path: Path) -> None:
    bomb = zipped(tmp_path / "m.pt2", {"data/weights/weight_0": bytes(2**24)}, zipfile.ZIP_DEFLATED)
    refused(bomb, "compressed", memory_bytes=SMALL)
    many = {f"data/weights/weight_{i}": b"" for i in range(20_001)}
    refused(zipped(tmp_path / "n.pt2", many), "members")


def test_a_torch_export_whose_members_share_their_bytes_is_refused(tmp_path: Path) -> None:
    path = zipped(tmp_path / "m.pt2", {f"data/weights/weight_{i}": bytes(5000) for i in range(9)})
    content = bytearray(path.read_bytes())
    directory = content.index(b"PK\x01\x02")
    data = content[:5100]  # one member's bytes, at which every entry of the directory points
    entries = bytes(content[directory:])
    for place in [i for i in range(len(entries)) if entries.startswith(b"PK\x01\x02", i)]:
        entries = entries[: place + 42] + bytes(4) + entries[place + 46 :]
    end = entries.index(b"PK\x05\x06")
    entries = entries[: end + 16] + len(data).to_bytes(4, "little") + entries[end + 20 :]
    path.write_bytes(bytes(data) + entries)
    refused(path, "more than its own size")


def test_a_torch_export_nested_without_end_is_refused(tmp_path: Path) -> None:
    deep = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
    refused(zipped(tmp_path / "m.pt2", {"models/model.json": deep}), "nested too deeply")


def test_a_page_whose_model_is_no_base64_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "page"
    page.mkdir()
    for text in ("", '"onnx": "####"', '"onnx": "AAA"', f'"onnx": "{base64.b64encode(b"junk").decode()}"'):
        (page / "model.js").write_text(text)
        refused(page, r"holds no model|cannot be read")


def test_a_module_in_the_current_folder_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "m.onnx", model(SOUND))
    for name in ("onnx", "numpy", "json", "convmixer"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    load_exported(path)
    assert not (tmp_path / "ran").exists()
