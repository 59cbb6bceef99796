"""Every command that takes weights, run without network access and without writes outside its own folders."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from convmixer.models.convmixer import ConvMixer
from convmixer.models.create import create_model
from convmixer.models.weights import save_model
from convmixer.preprocess import Preprocessing
from faults.hostile_weights import FETCH, OWNED

# argv: the folder that may be written; stdin: commands. Prints status and forbidden deeds of each.
GUARDED = """
import contextlib, io, json, os, sys
allowed = (os.path.realpath(sys.argv[1]) + os.sep, "/dev/null", "/dev/shm/", "/proc/self/")
deeds = []
NETWORK = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "urllib.Request")
WRITES = ("os.mkdir", "os.remove", "os.rmdir", "os.rename", "os.link", "os.symlink", "os.truncate", "os.chmod",
          "shutil.move", "shutil.copyfile", "shutil.rmtree")
PROCESSES = ("os.system", "os.exec", "os.posix_spawn", "pty.spawn")

def forbid(event, what):
    deeds.append(f"{event} {what}")
    raise PermissionError(f"forbidden in this test: {event} {what}")

def watch(event, args):
    if event in NETWORK or event in PROCESSES:
        forbid(event, args[-1])
    path, writes = args[0] if args else "", event in WRITES
    if event == "open":
        writes = isinstance(args[2], int) and bool(args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))
    if writes and isinstance(path, (str, bytes)):
        where = os.path.realpath(os.fsdecode(path))
        if not (where + os.sep).startswith(allowed):
            forbid(event, where)

commands = json.load(sys.stdin)
sys.addaudithook(watch)
from convmixer.cli import main
for command in commands:
    deeds.clear()
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            status = main(command)
        except SystemExit as stop:
            status = stop.code
    print("\\n" + json.dumps([status, deeds, said.getvalue()[-800:]]), flush=True)
"""


def run_guarded(folder: Path, commands: list[list[str]]) -> list[list[Any]]:
    """Return status, forbidden actions and output of each command; only `folder` may be written."""
    home = folder / "home"
    home.mkdir(exist_ok=True)
    caches = ("XDG_CACHE_HOME", "XDG_STATE_HOME", "MPLCONFIGDIR", "HF_HOME", "TORCH_HOME", "TMPDIR")
    settings = dict.fromkeys((*caches, "TORCHINDUCTOR_CACHE_DIR"), str(home))
    settings |= {"PYTHONDONTWRITEBYTECODE": "1", "CONVMIXER_KERNELS": "0"}
    done = subprocess.run(
        [sys.executable, "-c", GUARDED, str(folder)],
        input=json.dumps(commands),
        capture_output=True,
        text=True,
        timeout=500,
        cwd=folder,
        env=os.environ | settings,
    )
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert len(rows) == len(commands), done.stderr[-2000:]
    return rows


def commands_on(weights: str) -> dict[str, list[str]]:
    """Every command that takes weights, on one source."""
    return {
        "predict": ["predict", weights, "image.png"],
        "val": ["val", weights, "digits", "--limit", "16"],
        "export": ["export", weights, "--out", "out.onnx", "--data", "digits", "--limit", "4"],
        "serve": ["serve", weights, "--port", "0", "--token-file", "no-such-file"],
        "explain": ["explain", weights, "image.png"],
        "plot": ["plot", weights, "--out", "pictures"],
        "convert": ["convert", weights, "--out", "converted", "--num-classes", "3"],
        "recalibrate": ["recalibrate", weights, "digits", "--out", "recalibrated", "--limit", "64"],
        "train": [
            "train",
            "digits",
            "--weights",
            weights,
            "--model",
            "auto",
            "--epochs",
            "1",
            "--workers",
            "0",
            "--draw",
            "false",
            "--out",
            "run",
        ],
    }


def save(folder: Path, name: str, args: dict[str, Any], change: dict[str, Any], ours: dict[str, Any]) -> None:
    """Weights for the digits with an edited config; `ours` goes to our own part of it."""
    model = create_model(name, num_classes=10, in_chans=1, **args) if name != "m" else ConvMixer(8, 1, 3, 1, 1, 10)
    p = Preprocessing(8, 1, (0.3,), (0.4,))
    classes = [str(i) for i in range(10)]
    save_model(folder, model, architecture=name, model_args=args, classes=classes, preprocessing=p)
    config = json.loads((folder / "config.json").read_text())
    config.pop("sha256", None)  # an attacker would not keep it
    config["model_args"] |= change.pop("model_args", {})
    config |= change
    config["convmixer"] |= ours
    (folder / "config.json").write_text(json.dumps(config))


REFUSED = ("arguments", "hub", "sizes")
EVIL = {"pretrained": True, "pretrained_cfg": FETCH, "cache_dir": OWNED}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("guarded")
    Image.fromarray(np.full((8, 8), 90, np.uint8)).save(folder / "image.png")
    save(folder / "arguments", "resnet10t", {}, {"model_args": EVIL}, {})
    save(folder / "hub", "resnet10t", {}, {"architecture": "hf-hub:someone/else"}, {})
    save(folder / "sizes", "m", {}, {"model_args": {"dim": 40_000, "depth": 10**7}}, {})
    later = {"name": "resnet10t", "model_args": EVIL, "data": {"spec": "someone/else", "checksum": 7}}
    save(folder / "later", "m", {}, {}, later)
    return folder


OUTSIDE = ["convert", "hf-hub:someone/else", "--out", "/tmp/outside-of-the-guard"]


@pytest.fixture(scope="module")
def outcomes(place: Path) -> dict[tuple[str, str], tuple[int, list[str], str]]:
    """Status, forbidden deeds and output of every command on every source, all in one process."""
    tried = {(source, name): words for source in REFUSED for name, words in commands_on(source).items()}
    tried |= {("later", name): words for name, words in commands_on("later").items() if name != "serve"}
    tried["outside", "convert"] = OUTSIDE
    return dict(zip(tried, map(tuple, run_guarded(place, [*tried.values()])), strict=True))


def test_hostile_weights_are_refused_by_every_command(place: Path, outcomes: dict[Any, Any]) -> None:
    for (source, name), (status, deeds, said) in outcomes.items():
        if source not in REFUSED:
            continue
        assert not deeds, (source, name)
        assert status == 2, (source, name, said)
        lines = [line for line in said.strip().splitlines() if "building the font cache" not in line]
        assert len(lines) == 1, (source, name, said)  # Matplotlib's own line comes if its cache takes five seconds
    assert not (place / OWNED).exists()


def test_no_command_follows_what_metadata_say(place: Path, outcomes: dict[Any, Any]) -> None:
    rows = {name: row for (source, name), row in outcomes.items() if source == "later"}
    assert len(rows) == len(commands_on("later")) - 1
    for name, (status, deeds, said) in rows.items():
        assert not deeds, name
        assert status == 0, (name, said)
    assert not list(place.rglob(OWNED))


def test_the_guard_sees_a_deed(outcomes: dict[Any, Any]) -> None:
    status, deeds, _ = outcomes["outside", "convert"]
    assert status == 2
    assert any(deed.startswith(("socket", "urllib")) for deed in deeds)
