"""One wrong bit in any file of a run: it is noticed and named, or it changes nothing."""

import contextlib
import io
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_runs import differences, report, settings

from convmixer.errors import RequestError
from convmixer.explain import read_growth
from convmixer.models.weights import LoadedModel, load_model
from convmixer.run_folder import BEST, LAST, LATEST, MODEL, MODEL_CONFIG, PREVIOUS, RECORD, RunFolder
from convmixer.train.checkpoint import load_checkpoint
from convmixer.train.folder import RunFiles
from convmixer.train.run import resume, train
from convmixer.train.session import Run

TRIES = 40


def flip(path: Path, seed: int) -> None:
    """Change one bit of a file; runs share no files, so the original stays."""
    content = bytearray(path.read_bytes())
    bit = random.Random(seed).randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def same_model(a: LoadedModel, b: LoadedModel) -> bool:
    ours, theirs = a.model.state_dict(), b.model.state_dict()
    return (a.classes, a.preprocessing) == (b.classes, b.preprocessing) and all(
        torch.equal(ours[key], theirs[key]) for key in ours
    )


def outcome(read: Callable[[], Any], accept: Callable[[Any], bool]) -> str | None:
    """Return what went wrong, unless there was a clear refusal or a right value."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            value = read()
    except RequestError as error:
        clear = len(str(error)) < 1000 and not re.search(r"[a-z]Error\b", str(error))
        return None if clear else f"unclear: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None if accept(value) else f"a wrong value was taken, and said: {said.getvalue()!r}"


@pytest.mark.parametrize("name", [LATEST, PREVIOUS])
def test_checkpoints(whole: Path, tmp_path: Path, name: str) -> None:
    known = [load_checkpoint(RunFolder(whole).checkpoints)]
    (tmp_path / "one").mkdir()
    shutil.copy(RunFolder(whole).checkpoints / PREVIOUS, tmp_path / "one" / LATEST)
    known.append(load_checkpoint(tmp_path / "one"))

    def attempt(seed: Any) -> str | None:
        folder = shutil.copytree(RunFolder(whole).checkpoints, tmp_path / str(seed))
        flip(folder / name, seed)

        def right(state: Any) -> bool:
            weights = state["module"]["model"]
            return any(all(torch.equal(weights[k], s["module"]["model"][k]) for k in weights) for s in known)

        return outcome(lambda: load_checkpoint(folder), right)

    report(f"bit flips in {name}", range(TRIES), attempt)


@pytest.mark.parametrize("which", [BEST, LAST])
@pytest.mark.parametrize("name", [MODEL, MODEL_CONFIG])
def test_weights(whole: Path, tmp_path: Path, which: str, name: str) -> None:
    known = [load_model(RunFolder(whole).weights(w)) for w in (BEST, LAST)]

    def attempt(seed: Any) -> str | None:
        run = tmp_path / str(seed)
        shutil.copytree(whole / "weights", run / "weights")
        flip(RunFolder(run).weights(which) / name, seed)
        return outcome(lambda: load_model(run), lambda found: any(same_model(found, model) for model in known))

    report(f"bit flips in weights/{which}/{name}", range(TRIES), attempt)


def test_lone_weights(whole: Path, tmp_path: Path) -> None:
    known = load_model(RunFolder(whole).weights(BEST))

    def attempt(seed: Any) -> str | None:
        path = tmp_path / f"{seed}.safetensors"
        shutil.copy(RunFolder(whole).weights(BEST) / MODEL, path)
        flip(path, seed)
        return outcome(lambda: load_model(path), lambda found: same_model(found, known))

    report("bit flips in a lone .safetensors file", range(TRIES), attempt)


def test_config(whole: Path, tmp_path: Path) -> None:
    known = RunFiles(whole).read_config()

    def attempt(seed: Any) -> str | None:
        folder = RunFiles(tmp_path / str(seed))
        folder.path.mkdir()
        shutil.copy(RunFolder(whole).config, folder.config)
        flip(folder.config, seed)
        return outcome(folder.read_config, lambda found: found == known)

    report("bit flips in config.yaml", range(TRIES), attempt)


def test_record(whole: Path, tmp_path: Path) -> None:
    known = RunFiles(whole).read_results()

    def attempt(seed: Any) -> str | None:
        folder = RunFiles(tmp_path / str(seed))
        folder.path.mkdir()
        shutil.copy(RunFolder(whole).record, folder.record)
        flip(folder.record, seed)
        return outcome(folder.read_results, lambda found: found in (None, known))

    report("bit flips in record.jsonl", range(TRIES), attempt)


def test_log_and_metrics_are_not_needed(whole: Path, tmp_path: Path) -> None:
    """Both are written again from the checkpoint; noise in them does not stop a run."""

    def attempt(seed: Any) -> str | None:
        folder = RunFiles(tmp_path / str(seed))
        folder.path.mkdir()
        noise = random.Random(seed).randbytes(2000)
        folder.log_file.write_bytes(RunFolder(whole).log_file.read_bytes()[:-50] + noise)

        def read() -> Any:
            folder.rewind_log(10)
            return read_growth(folder.log_file)

        return outcome(read, lambda rows: isinstance(rows, list) and len(rows) <= 3)

    report("noise in log.jsonl", range(TRIES), attempt)


def test_a_resume_with_a_damaged_checkpoint_ends_with_the_same_weights(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Run, "_finish", lambda run: 1 / 0)  # dies after its last checkpoint
        with pytest.raises(ZeroDivisionError):
            train("digits", settings(), out=run)
    flip(RunFolder(run).checkpoints / LATEST, 1)
    RunFolder(run).metrics.write_bytes(b"\xff\x00noise")
    resume(run)
    assert "latest.pt: its contents do not match its digest; continuing from previous.pt" in capsys.readouterr().out
    assert differences(whole, run) == []


@pytest.mark.parametrize("content", [b"", b'{"name": "run", "comm', b"\xff\xfe\x00"])
def test_an_empty_or_half_record_is_written_again(
    whole: Path, tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(whole, tmp_path / "run")
    (run / RECORD).write_bytes(content)
    config = RunFolder(run).config
    lines = config.read_text().replace("draw: true", "draw: false").splitlines(keepends=True)
    config.write_text("".join(lines[:-1]))  # the last one says that nobody changed it
    resume(run)
    out = capsys.readouterr().out
    assert "it will be written again" in out
    assert "finished already" not in out
    found, known = RunFiles(run).read_results(), RunFiles(whole).read_results()
    assert found is not None
    assert known is not None
    assert found["test_top1"] == known["test_top1"]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.99])
def test_half_a_config_is_said_in_one_clear_line(whole: Path, tmp_path: Path, share: float) -> None:
    folder = RunFiles(tmp_path)
    content = RunFolder(whole).config.read_bytes()
    folder.config.write_bytes(content[: int(share * len(content))])
    with pytest.raises(RequestError, match=r"config\.yaml (is cut or damaged|cannot be read|was damaged)") as caught:
        folder.read_config()
    assert "\n" not in str(caught.value)
