"""Builds for other processors pass the parity tests; a broken compiler does not crash; builders do not collide."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from convmixer.processes import _started

TESTS = Path(__file__).parent
PARITY = ("test_kernels_ops.py", "test_fast.py")


def _run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True)


def _check_parity(*files: str, only: str = "", **environment: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-k", only, *(str(TESTS / file) for file in files)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "skipped" not in done.stdout


@pytest.mark.slow
def test_the_ops_of_another_processor() -> None:
    _check_parity("test_kernels_ops.py", CONVMIXER_KERNELS_MARCH="pairs")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("march", ["pairs", "library", "wide-pairs", "tiles", "x86-64-v3", "scalar"])
def test_other_processors(march: str) -> None:
    _check_parity(*PARITY, CONVMIXER_KERNELS_MARCH=march)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("march", ["tiles", "vectors"])
def test_inference_with_and_without_a_matrix_unit(march: str) -> None:
    chosen = "as_exact or largest or digits or threads"
    _check_parity("test_fast_inference.py", only=chosen, CONVMIXER_KERNELS_MARCH=march)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not shutil.which("clang++"), reason="clang++ is not installed")
def test_another_compiler() -> None:
    _check_parity(*PARITY, CXX="clang++")


@pytest.mark.slow
def test_two_builders_do_not_collide(tmp_path: Path) -> None:
    code = "from convmixer import kernels; print(kernels.why_not())"
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen([sys.executable, "-c", code], env=environment, **pipes) for _ in range(2)]  # type: ignore
    said = [process.communicate(timeout=500) for process in both]
    assert [out for out, _ in said] == ["None\n"] * 2
    assert sum("building the CPU kernels" in error for _, error in said) == 1


@pytest.mark.parametrize(
    ("compiler", "said"), [("no-such-compiler", "no C++ compiler"), (" ", "no C++ compiler"), ("false", "failed")]
)
def test_without_a_working_compiler_torch_runs(tmp_path: Path, compiler: str, said: str) -> None:
    code = (
        "import torch; from convmixer.fast import accelerate; from convmixer import create_model;"
        "print(accelerate(create_model('convmixer_128_4_p4_k3'))(torch.randn(2, 3, 8, 8)).shape)"
    )
    done = _run(code, CXX=compiler, XDG_CACHE_HOME=str(tmp_path))
    assert done.stdout == "torch.Size([2, 10])\n"
    assert said in done.stderr


def test_importing_builds_nothing(tmp_path: Path) -> None:
    done = _run("import convmixer.fast, convmixer.kernels.blocks", XDG_CACHE_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())


def test_a_compiler_that_takes_too_long_is_ended_with_its_own_processes(tmp_path: Path) -> None:
    compiler = tmp_path / "slow-compiler"
    compiler.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && echo slow && exit\nsleep 600 & echo $! >> {tmp_path}/pids; wait\n'
    )
    compiler.chmod(0o755)
    code = "from convmixer.kernels.cpu import build; build.BUILD_SECONDS = 2; print(build.why_not())"
    done = _run(code, CXX=str(compiler), XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert "timed out" in done.stdout
    children = (tmp_path / "pids").read_text().split()
    assert children
    assert [_started(int(child)) for child in children] == [None] * len(children)
