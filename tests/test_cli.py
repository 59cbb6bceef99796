"""The command line as a whole: mistyped words, and how its process ends."""

import subprocess
import sys
from pathlib import Path

import pytest

from convmixer.cli import main


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trian", "digits"], "unknown command 'trian': did you mean 'train'?"),
        (["xyzzy"], "unknown command 'xyzzy': choose from benchmark, compare, convert"),
        (["export", "--format", "onx"], "unknown value 'onx': did you mean 'onnx'?"),
        (["train", "digits", "--epoch", "3"], "unknown option '--epoch': did you mean '--epochs'?"),
        (["train", "digits", "--recipe", "digit"], "unknown recipe 'digit': did you mean 'digits'?"),
        (["compare", "mixer"], "unknown study 'mixer': did you mean 'mixers'?"),
    ],
)
def test_a_mistyped_word_names_the_nearest_one(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = main(words)
    except SystemExit as end:
        status = end.code
    assert status == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("words", ["models", "--version"])  # more and less than a buffer
def test_output_that_cannot_be_written_is_an_error(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    with full.open("w") as stdout:
        command = [sys.executable, "-m", "convmixer", words]
        done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 1
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr


ENDINGS = """
import atexit, sys, threading, time
from convmixer.processes import run_program

class Slow:
    def __del__(self):
        time.sleep(60)  # as if there were millions of objects to free

def work():
    atexit.register(lambda: print("cleaned up", end=""))
    threading.Thread(target=lambda: (time.sleep(0.3), print("thread done", end=", "))).start()
    {ending}

kept = Slow()
sys.exit(run_program(work))
"""


@pytest.mark.parametrize(
    ("ending", "status", "error"),
    [
        ("return None", 0, ""),
        ("return 2", 2, ""),
        ("sys.exit(3)", 3, ""),
        ("sys.exit('wrong')", 1, "wrong"),
        ("raise OSError('no disk')", 1, "OSError: no disk"),
    ],
)
def test_a_program_ends_its_threads_and_frees_nothing_by_hand(ending: str, status: int, error: str) -> None:
    code = ENDINGS.format(ending=ending)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout) == (status, "thread done, cleaned up")
    assert done.stderr.strip().endswith(error)
