"""About 200 named hostile weights files: each must be refused in one line, within limits of time and memory.

    python tests/faults/hostile_weights.py FOLDER

writes them all. `write_all` does the same for a test, and returns the source to load for each name.
"""

import argparse
import io
import json
import os
import pickle
import struct
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from convmixer.models.convmixer import ConvMixer
from convmixer.models.weights import save_model
from convmixer.preprocess import Preprocessing

State = dict[str, torch.Tensor]
Config = dict[str, Any]
Write = Callable[[Path], Path]

OWNED = "owned-by-a-stranger"  # the name of what hostile files try to write
FETCH = {"url": "http://127.0.0.1:9/usercustomize.py", "hf_hub_id": "someone/else", "file": "/etc/passwd"}

# arguments that a config must not be able to pass on
ARGUMENTS: list[Config] = [
    {"pretrained": True, "pretrained_cfg": FETCH, "cache_dir": OWNED},
    {"pretrained": True},
    {"pretrained_cfg": FETCH},
    {"pretrained_cfg": "a1_in1k"},
    {"pretrained_cfg_overlay": FETCH},
    {"cache_dir": OWNED},
    {"checkpoint_path": "/etc/passwd"},
    {"pretrained_strict": False},
    {"pretrained_filter_fn": "os.system"},
    {"pretrained_model_args": {}},
    {"scriptable": True},
    {"exportable": True},
    {"no_jit": True},
    {"features_only": True},
    {"feature_cls": "fx"},
    {"model_cfg": {}},
    {"pruned": True},
    {"block": "os.system"},
    {"norm_layer": {"a": 1}},
    {"act_layer": "os.system(1)"},
    {"device": "cuda"},
    {"": 1},
    {"layers": [10**6] * 4},
    {"layers": [True]},
    {"layers": list(range(1000))},
    {"channels": [10**9] * 4},
    {"drop_rate": 2},
    {"drop_rate": float("nan")},
    {"global_pool": "a" * 1000},
]
NAMES: list[Any] = [
    "hf-hub:someone/else", "hf_hub:a/b", "local-dir:/tmp", "/etc/passwd", "../w", "os.system", "", None, 7, ["a"], {},
    "resnet10t\n", "a" * 10_000, "resnet10t/../..", "http://127.0.0.1:9/x", "convmixer_0_0_p0_k0", "no_such_model",
    "\x1b[31mred", "convmixer_40000_10000000_p1_k9", "vit_giant_patch14_dinov2", "eva_giant_patch14_560",
    "isotropic", "resnet", "mlp_mixer",
]  # fmt: skip
SIZES: list[Config] = [
    {"dim": 40_000}, {"depth": 10**7}, {"depth": 10**400}, {"depth": True}, {"depth": "2"}, {"depth": None},
    {"dim": 8.0}, {"dim": -8}, {"dim": 0}, {"dim": [8]}, {"patch_size": 10**9}, {"patch_size": 0},
    {"kernel_size": -1}, {"kernel_size": 10**9}, {"kernel_size": [3, 3]}, {"act": "tanh"}, {"act": ["gelu"]},
    {"act": "__import__"}, {"num_classes": 3}, {"in_chans": 1}, {"stem": "patch"},
]  # fmt: skip
INPUTS: list[Config] = [
    {"input_size": [3, 30_000, 30_000]}, {"input_size": [3, 1.5, 1.5]}, {"input_size": [3, -1, -1]},
    {"input_size": [3, 10**400, 1]}, {"input_size": [10**9, 12, 12]}, {"input_size": []}, {"input_size": 3},
    {"input_size": None}, {"input_size": "312"}, {"crop_pct": 1e-9}, {"crop_pct": 0}, {"crop_pct": "1"},
    {"crop_pct": float("nan")}, {"std": [0, 1, 1]}, {"std": [-1, 1, 1]}, {"std": [float("nan"), 1, 1]},
    {"std": [1e-300, 1, 1]}, {"std": [float("inf"), 1, 1]}, {"std": [1]}, {"std": "abc"}, {"std": 1},
    {"mean": [float("inf"), 1, 1]}, {"mean": [float("nan"), 1, 1]}, {"mean": [1e300, 1, 1]}, {"mean": None},
    {"mean": [[1], [1], [1]]}, {"interpolation": "magic"}, {"interpolation": 3}, {"interpolation": {"a": 1}},
    {"label_names": ["a"]}, {"label_names": ["a", 7]}, {"label_names": 7}, {"label_names": "ab"},
    {"label_names": {"x": 1, "y": 2}}, {"label_names": ["a"] * 10_000},
]  # fmt: skip
OUTPUTS: list[Any] = [10**9, -1, 1.5, "2", None, True, [2], 3]
TEXTS = [
    "", "{", "[]", "7", "null junk", "[" * 100_000, '{"a":' * 100_000, '"' * 7, "\x00" * 100, "9" * 10_000,
    '{"architecture": "convmixer"}', '{"pretrained_cfg": 7}', '{"pretrained_cfg": {"input_size": {}}}',
    '{"architecture": "convmixer", "architecture": "resnet10t"}', " " * (17 * 2**20),
]  # fmt: skip
OBJECTS = [
    "posix system", "builtins eval", "builtins exec", "builtins getattr", "builtins bytearray", "builtins open",
    "subprocess Popen", "torch load", "torch.hub load", "torch FloatTensor", "numpy.core.multiarray scalar",
    "torch._utils _rebuild_qtensor", "torch._utils _rebuild_sparse_tensor", "importlib import_module",
    "runpy run_path", "webbrowser open", "shutil rmtree", "os.path join", "pickle loads",
    "torch.storage _load_from_bytes",
]  # fmt: skip
STEM, VARIANCE = "stem.0.weight", "stem.2.running_var"


def small() -> State:
    """A good state dict with timm's keys."""
    return ConvMixer(8, 1, 3, 2, num_classes=2).state_dict()


def write_all(folder: Path, pick: Callable[[str], bool] = lambda name: True) -> dict[str, Path]:
    """Write the hostile weights into a folder, each in a folder of its name, and return what to load for each."""
    torch.manual_seed(0)
    sources = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd tensors on purpose
        for name, write in cases():
            if pick(name):
                (folder / name).mkdir(parents=True)
                sources[name] = write(folder / name)
    return sources


def cases() -> Iterator[tuple[str, Write]]:
    """Yield each hostile file's name and what writes it into a folder, returning the source to load."""
    for kind in (
        _configs,
        _texts,
        _pickled_objects,
        _tensors,
        _values,
        _keys,
        _containers,
        _zips,
        _damaged,
        _headers,
    ):
        yield from kind()


def _folder(edit: Callable[[Config], Any], lone: bool = False) -> Write:
    """Weights in our format after an edit of the config; `lone`: one .safetensors file that holds it."""

    def write(folder: Path) -> Path:
        model = ConvMixer(8, 1, 3, 2, num_classes=2)
        p = Preprocessing(12)
        save_model(folder, model, architecture="m", model_args={}, classes="ab", preprocessing=p)
        config = json.loads((folder / "config.json").read_text())
        config.pop("sha256", None)  # an attacker would not keep it
        edit(config)
        (folder / "config.json").write_text(json.dumps(config))
        if lone:
            safetensors.torch.save_file(
                model.state_dict(), folder / "lone.safetensors", {"config": json.dumps(config)}
            )
        return folder / "lone.safetensors" if lone else folder

    return write


def _as_timm(args: Config) -> Callable[[Config], None]:
    return lambda config: config.update(architecture="resnet10t", model_args=args)


def _configs() -> Iterator[tuple[str, Write]]:
    for number, args in enumerate(ARGUMENTS):
        for lone in (False, True):
            yield f"argument-{number:02}-{'lone' if lone else 'folder'}", _folder(_as_timm(args), lone)
    for number, name in enumerate(NAMES):
        yield f"name-{number:02}", _folder(lambda c, name=name: c.update(architecture=name, model_args={}))
    for number, sizes in enumerate(SIZES):
        yield f"size-{number:02}", _folder(lambda c, sizes=sizes: c["model_args"].update(sizes))
    for number, given in enumerate(INPUTS):
        yield f"input-{number:02}", _folder(lambda c, given=given: c["pretrained_cfg"].update(given))
    for number, outputs in enumerate(OUTPUTS):
        yield f"outputs-{number:02}", _folder(lambda c, outputs=outputs: c.update(num_classes=outputs))
    yield (
        "giant-image",
        _folder(
            lambda c: c.update(architecture="vit_tiny_patch16_224", model_args={"img_size": 4096, "patch_size": 1})
        ),
    )
    yield (
        "giant-pool",
        _folder(
            lambda c: c.update(
                architecture="isotropic",
                model_args={
                    "dim": 8,
                    "depth": 1,
                    "patch_size": 2,
                    "kernel_size": 3,
                    "mixer": "pool",
                    "img_size": 4096,
                },
            )
        ),
    )


def _texts() -> Iterator[tuple[str, Write]]:
    for number, text in enumerate(TEXTS):

        def write(folder: Path, text: str = text) -> Path:
            _folder(lambda _: None)(folder)
            (folder / "config.json").write_text(text)
            return folder

        yield f"json-{number:02}", write


def _pickled_objects() -> Iterator[tuple[str, Write]]:
    for name in OBJECTS:
        for zipped in (True, False):

            def write(folder: Path, name: str = name, zipped: bool = zipped) -> Path:
                # protocol 2: {"state_dict": NAME("touch owned...")}
                touch = f"touch {folder / OWNED}".encode()
                call = b"c" + name.replace(" ", "\n").encode() + b"\n"
                argument = b"X" + struct.pack("<I", len(touch)) + touch + b"\x85R"
                content = b"\x80\x02}X\x0a\x00\x00\x00state_dict" + call + argument + b"s."
                return _zip(folder, {"data.pkl": content}) if zipped else _old(folder, content)

            yield f"object-{name.replace(' ', '.')}-{'zip' if zipped else 'old'}", write


def _zip(folder: Path, members: dict[str, bytes], packed: int = zipfile.ZIP_STORED) -> Path:
    path = folder / "weights.pth"
    with zipfile.ZipFile(path, "w", packed) as archive:
        for name, content in ({"version": b"3\n", "byteorder": b"little"} | members).items():
            archive.writestr(f"archive/{name}", content)
    return path


def _old(folder: Path, content: bytes) -> Path:
    head = [0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}]
    path = folder / "weights.pth"
    path.write_bytes(b"".join(pickle.dumps(part, 2) for part in head) + content + pickle.dumps([], 2))
    return path


def _saved(make: Callable[[], Any], zipped: bool = True) -> Write:
    def write(folder: Path) -> Path:
        torch.save(make(), folder / "weights.pth", _use_new_zipfile_serialization=zipped)
        return folder / "weights.pth"

    return write


def _tensors() -> Iterator[tuple[str, Write]]:
    odd: dict[str, Callable[[], Any]] = {
        "stride0": lambda: torch.zeros(1, 1).expand(60_000, 60_000),
        "stride0-many": lambda: torch.zeros(1, 1, 1, 1).expand(8, 3, 30_000, 30_000),
        "sparse": lambda: torch.zeros(8, 3, 2, 2).to_sparse(),
        "meta": lambda: torch.zeros(8, 3, 2, 2, device="meta"),
        "complex": lambda: torch.zeros(8, 3, 2, 2, dtype=torch.complex64),
        "quantised": lambda: torch.quantize_per_tensor(torch.zeros(8, 3, 2, 2), 0.1, 0, torch.qint8),
        "float8": lambda: torch.zeros(8, 3, 2, 2).to(torch.float8_e4m3fn),
        "scalar": lambda: torch.tensor(1.0),
        "empty": lambda: torch.zeros(0, 3, 2, 2),
        "flat": lambda: torch.zeros(96),
        "six": lambda: torch.zeros(8, 3, 2, 2, 1, 1),
        "wide": lambda: torch.zeros(8, 3, 2, 4),
        "colours": lambda: torch.zeros(8, 7, 2, 2),
        "none": lambda: None,
        "text": lambda: "weights",
    }
    for name, make in odd.items():
        for zipped in (True, False):
            yield f"tensor-{name}-{'zip' if zipped else 'old'}", _saved(lambda m=make: small() | {STEM: m()}, zipped)
    yield "tensor-many", _saved(lambda: {f"k{i}": torch.zeros(1) for i in range(20_001)})
    yield "tensor-many-lone", _tensors_file({f"k{i}": torch.zeros(1) for i in range(20_001)})


def _tensors_file(state: State) -> Write:
    def write(folder: Path) -> Path:
        safetensors.torch.save_file(state, folder / "lone.safetensors")
        return folder / "lone.safetensors"

    return write


def _values() -> Iterator[tuple[str, Write]]:
    for name, value in (("nan", float("nan")), ("inf", float("inf")), ("minus-inf", -float("inf"))):
        for key in (STEM, "blocks.0.1.bias", VARIANCE, "head.weight"):
            state = small()
            state[key] = torch.full_like(state[key], value)
            yield f"value-{name}-{key}-pickle", _saved(lambda s=state: s)
            yield f"value-{name}-{key}-file", _tensors_file(state)
    negative = small()
    negative[VARIANCE] = -negative[VARIANCE]
    yield "value-negative-variance", _saved(lambda: negative)
    yield (
        "value-too-large-for-fp32",
        _saved(lambda: small() | {STEM: torch.full((8, 3, 2, 2), 1e300, dtype=torch.float64)}),
    )


def _keys() -> Iterator[tuple[str, Write]]:
    one = torch.zeros(1)
    for name, key in (
        ("far-block", "blocks.9999999.0.fn.0.weight"),
        ("digits", f"blocks.{'9' * 6000}.0.fn.0.weight"),
        ("square", "²"),
        ("newline", "a\nb"),
        ("terminal", "\x1b[2J\x1b[31m"),
        ("long", "k" * 100_000),
        ("empty", ""),
    ):
        for place in ("blocks.0.", "head.", "7."):  # elsewhere it would be left out
            yield f"key-{name}-{place}", _saved(lambda key=f"{place}{key}": small() | {key: one})
        yield f"key-{name}-alone", _saved(lambda key=key: {key: one})


def _containers() -> Iterator[tuple[str, Write]]:
    def itself() -> Any:
        holds: Config = {"epoch": 1, "loss": 0.1}
        holds["state_dict"] = holds
        return holds

    def deep(levels: int) -> Any:
        inner: Any = {"a": 1}
        for _ in range(levels):
            inner = {"model": inner}
        return inner

    yield "holds-itself", _saved(itself)
    yield "nested-100", _saved(lambda: deep(100))
    yield "empty-state", _saved(lambda: {"state_dict": {}})
    yield "list", _saved(lambda: [small()])
    yield "namespace", _saved(lambda: argparse.Namespace(state_dict=small()))
    yield "tensor-alone", _saved(lambda: torch.zeros(3))

    def laughs(folder: Path) -> Path:
        content = b"\x80\x02" + b"(" * 500_000 + b"l" * 500_000 + b"."
        return _zip(folder, {"data.pkl": content})

    yield "pickle-deep", laughs
    yield "pickle-steps", lambda folder: _zip(folder, {"data.pkl": b"\x80\x02" + b"N0" * 2_000_000 + b"N."})
    yield "pickle-memo", lambda folder: _zip(folder, {"data.pkl": b"\x80\x02}r\xff\xff\xff\xff."})
    yield "pickle-no-stop", lambda folder: _zip(folder, {"data.pkl": b"\x80\x02}"})
    yield "pickle-long-text", lambda folder: _zip(folder, {"data.pkl": b"\x80\x02X\xff\xff\xff\x7f."})


def _zips() -> Iterator[tuple[str, Write]]:
    def packed(folder: Path) -> Path:
        content = io.BytesIO()
        torch.save({"head.weight": torch.zeros(2000, 2000)}, content)
        with zipfile.ZipFile(content) as whole:
            members = {name.partition("/")[2]: whole.read(name) for name in whole.namelist()}
        return _zip(folder, members, zipfile.ZIP_DEFLATED)

    def overlapping(folder: Path) -> Path:
        """Many entries of the directory name the same bytes."""
        path = _zip(folder, {"data.pkl": b"\x80\x02}.", "data/0": b"0" * 100_000})
        data = path.read_bytes()
        start, end = data.index(b"PK\x01\x02"), data.index(b"PK\x05\x06")
        entry = data[data.rindex(b"PK\x01\x02") : end]
        count, size = 4 + 1000, end - start + 1000 * len(entry)
        tail = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, count, count, size, start, 0)
        path.write_bytes(data[:end] + entry * 1000 + tail)
        return path

    yield "zip-packed", packed
    yield "zip-overlapping", overlapping
    yield "zip-empty", lambda folder: _zip(folder, {})
    yield "zip-large-pickle", lambda folder: _zip(folder, {"data.pkl": b"\x80\x02" + b"N0" * (9 * 2**20) + b"N."})
    yield "zip-members", lambda folder: _zip(folder, {f"data/{i}": b"" for i in range(30_000)})


def _damaged() -> Iterator[tuple[str, Write]]:
    """Good files, cut off or with bytes overwritten at the front."""
    makers: dict[str, Write] = {
        "pickle": _saved(small),
        "old": _saved(small, zipped=False),
        "lone": _folder(lambda _: None, lone=True),
    }
    for name, make in makers.items():
        for percent in (0, 1, 10, 50, 90, 99):

            def cut(folder: Path, make: Write = make, percent: int = percent) -> Path:
                path = make(folder)
                content = path.read_bytes()
                path.write_bytes(content[: len(content) * percent // 100])
                return path

            yield f"cut-{name}-{percent:02}", cut


def _headers() -> Iterator[tuple[str, Write]]:
    """.safetensors files with false headers."""

    def raw(header: bytes, length: int | None = None, rest: bytes = b"\0" * 64) -> Write:
        def write(folder: Path) -> Path:
            path = folder / "lone.safetensors"
            path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + rest)
            return path

        return write

    def tensor(**change: Any) -> bytes:
        return json.dumps({"a": {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]} | change}).encode()

    yield "header-good-but-no-model", raw(tensor())
    yield "header-length", raw(tensor(), 2**62)
    yield "header-length-0", raw(tensor(), 0)
    yield "header-shape", raw(tensor(shape=[10**9, 10**9]))
    yield "header-negative", raw(tensor(shape=[-4, -4]))
    yield "header-offsets", raw(tensor(data_offsets=[0, 10**12]))
    yield "header-reversed", raw(tensor(data_offsets=[64, 0]))
    yield "header-dtype", raw(tensor(dtype="F33"))
    yield "header-deep", raw(b"[" * 100_000)
    yield (
        "header-overlap",
        raw(json.dumps({k: {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]} for k in "ab"}).encode()),
    )
    yield "header-large", lambda folder: _large_header(folder)
    yield "header-no-config", raw(json.dumps({"__metadata__": {"config": "{"}}).encode(), rest=b"")


def _large_header(folder: Path) -> Path:
    path = folder / "lone.safetensors"
    header = json.dumps({"__metadata__": {"a": "b" * (20 * 2**20)}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    return path


if __name__ == "__main__":
    os.makedirs(sys.argv[1], exist_ok=True)
    print(f"{len(write_all(Path(sys.argv[1])))} hostile weights written")
