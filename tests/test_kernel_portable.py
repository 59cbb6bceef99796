"""The inference kernels for other processors, compiled without torch and run here or under an emulator, are exact."""

import shutil
import subprocess
from pathlib import Path

import pytest

from convmixer.kernels.cpu.build import SOURCES, VARIANTS, processor

DRIVER = Path(__file__).parent / "cpp"
UNITS = (DRIVER / "parity.cpp", SOURCES / "network_vectors.cpp", SOURCES / "network_tiles.cpp")

# name: flags, and what the processor's own list must hold to run it here; what starts with "arm" is emulated
BUILDS: dict[str, tuple[list[str], str]] = {
    "scalar": (VARIANTS["scalar"], ""),
    "tiles in plain C++": (VARIANTS["tiles"], ""),
    "AVX2": (["-march=x86-64-v3"], "avx2"),
    "AVX-VNNI": (["-march=x86-64-v3", "-mavxvnni"], "avx_vnni"),  # no emulator in Debian 12 knows it
    "AVX-512": (["-march=x86-64-v4"], "avx512f"),  # nor this
    "AVX-512 VNNI": (["-march=icelake-server"], "avx512_vnni"),
    "AVX-512 bf16": (["-march=cooperlake"], "avx512_bf16"),
    "AMX": (["-march=sapphirerapids"], "amx_bf16"),
    "arm": (["-march=armv8-a"], ""),
    "arm dotprod": (["-march=armv8.2-a+dotprod"], ""),
    "arm i8mm": (["-march=armv8.6-a+i8mm+bf16"], ""),
}


def _tools(name: str) -> tuple[str, list[str]]:
    """Return the compiler and the command before the program; skip if they are missing."""
    compiler, emulator = ("aarch64-linux-gnu-g++", ["qemu-aarch64", "-cpu", "max"]) if "arm" in name else ("g++", [])
    for tool in (compiler, *emulator[:1]):
        if not shutil.which(tool):
            pytest.skip(f"{tool} is not installed (Debian: g++-aarch64-linux-gnu, qemu-user)")
    if (flag := BUILDS[name][1]) and flag not in processor().split():
        pytest.skip(f"this processor has no {flag}")
    return compiler, emulator


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", BUILDS)
def test_small_networks_are_exact_on(name: str, tmp_path: Path) -> None:
    compiler, emulator = _tools(name)
    program = tmp_path / "parity"
    include = [f"-I{DRIVER / 'stub'}", f"-I{SOURCES}"]
    flags = ["-std=c++20", "-O2", "-Wno-psabi", "-static", *BUILDS[name][0], *include]
    subprocess.run([compiler, *flags, *map(str, UNITS), "-o", str(program)], check=True)
    done = subprocess.run([*emulator, str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
