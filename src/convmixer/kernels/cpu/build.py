"""Builds the C++ source on first use, caches the result, and reports the reason if it cannot be built.

The source uses torch's stable ABI. It is compiled on the machine that runs it, so it may use all instructions of that
machine. Different machines may share a home folder, so the cache key covers everything that the binary depends on.
Nothing is built at import.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from convmixer import files
from convmixer.processes import one_at_a_time

SOURCES = Path(__file__).parent / "csrc"
OFF = "CONVMIXER_KERNELS"  # 0 turns the kernels off
MARCH = "CONVMIXER_KERNELS_MARCH"  # another processor to build for, or one of `VARIANTS`
VARIANTS = {  # each runs on any processor, so the code for other processors can be tested or timed on this one
    "scalar": ["-DCONVMIXER_LANES=1"],  # no vectors
    "pairs": ["-DCONVMIXER_PAIRS=1", "-DCONVMIXER_LIBRARY=0"],  # bf16 values multiplied in pairs
    "wide-pairs": ["-DCONVMIXER_LANES=16", "-DCONVMIXER_PAIRS=1", "-DCONVMIXER_LIBRARY=0"],  # the same, 16 lanes
    "small-blocks": ["-DCONVMIXER_PIXELS=64"],  # inference of wide layers: as few pixels at once as in narrow ones
    "vectors": ["-DCONVMIXER_TILES=0", "-DCONVMIXER_LIBRARY=1"],  # without AMX
    # the code for AMX, with its instructions computed in plain C++
    "tiles": ["-DCONVMIXER_LANES=16", "-DCONVMIXER_PAIRS=1", "-DCONVMIXER_TILES=1", "-DCONVMIXER_AMX=0"],
    "library": ["-DCONVMIXER_LIBRARY=1"],  # bf16 matrix multiplications by torch, as on Arm with bf16
}
BUILD_SECONDS = 300
LIBRARIES = {"kernels": None, "changes": "changes.cpp"}  # library: its only source file; None: all other files
_ALONE = set(LIBRARIES.values())
_OFF_VALUES = ("0", "off", "false", "no")


def why_not() -> str | None:
    """Return why the kernels cannot be used, or None if they are built and loaded. Builds them on first use."""
    return switched_off() or _load()


def switched_off() -> str | None:
    """Return a message if the environment turns all kernels off, else None."""
    return f"{OFF}={os.environ[OFF]} turns them off" if os.environ.get(OFF, "1").lower() in _OFF_VALUES else None


def available() -> bool:
    """Return whether the kernels are built and loaded. Builds them on first use."""
    return why_not() is None


def target() -> str:
    """Return the processor that the kernels are built for: "native" unless the environment names another."""
    return os.environ.get(MARCH) or "native"


@functools.cache
def _load() -> str | None:
    try:
        torch.ops.load_library(str(library()))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        return str(error) or type(error).__name__
    return None


def library(name: str = "kernels") -> Path:
    """Return a built library; build it first if it is not in the cache.

    Args:
        name: One of `LIBRARIES`.

    Raises:
        RuntimeError: There is no compiler, it is too old, or it failed; the message says which.
        OSError: The cache folder cannot be written.
    """
    if sys.platform not in ("linux", "darwin"):
        raise RuntimeError(f"they are not built on {sys.platform}")
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or ""
    if not shutil.which(next(iter(compiler.split()), "")):
        raise RuntimeError(f"there is no C++ compiler ({compiler.strip() or 'g++'}); install g++ or set CXX")
    version = next(iter(_run([*compiler.split(), "--version"]).splitlines()), "a compiler without a version")
    folder = cache_folder() / _key(compiler, version)
    built = folder / f"{name}.so"
    if not built.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with one_at_a_time(folder / "lock"):
            if not built.exists():
                _build(compiler.split(), version, built)
    return built


def level() -> str:
    """Return the name of the instruction set that the built kernels use. Builds them on first use."""
    name = ctypes.CDLL(str(library())).convmixer_level
    name.restype = ctypes.c_char_p
    return str(name().decode())


def largest_int8_weight() -> int:
    """Return the largest int8 weight with which this build's sums cannot overflow."""
    return int(ctypes.CDLL(str(library())).convmixer_int8_most())


def cache_folder() -> Path:
    """Return the folder that holds the built kernels, $XDG_CACHE_HOME/convmixer/kernels by default."""
    return files.cache_folder("kernels")


def flags(version: str) -> list[str]:
    """Return the flags for a compiler, given its version text.

    Fast-math is not used, because it would change NaN, Inf and sums.
    """
    option = "-mcpu" if platform.machine() in ("aarch64", "arm64") else "-march"
    march = [] if target() == "scalar" else [f"{option}={'native' if target() in VARIANTS else target()}"]
    march += VARIANTS.get(target(), [])
    shape = ["-fno-math-errno", "-fno-trapping-math"]
    if "clang" not in version:  # predictive commoning, switched off here, causes register moves and spills
        shape.append("-fno-predictive-commoning")
    return ["-std=c++20", "-O3", "-fPIC", *shape, "-Wno-psabi", "-Wno-unknown-warning-option", *march]


def processor() -> str:
    """Return the processor's instruction-set flags as the system lists them."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return f"{platform.machine()} {platform.processor()}"
    lines = cpuinfo.read_text().splitlines()
    wanted = ("flags", "Features", "CPU part", "cpu family", "model\t")  # x86 and aarch64 spell them differently
    return " ".join(dict.fromkeys(line for line in lines if line.startswith(wanted)))


def _sources() -> list[Path]:
    return sorted(path for path in SOURCES.iterdir() if path.suffix in (".cpp", ".h"))


def _key(compiler: str, version: str) -> str:
    digest = hashlib.sha256()
    torch_is = torch.__version__, str(Path(torch.__file__).parent)
    for part in (compiler, version, *flags(version), processor(), *torch_is):
        digest.update(part.encode() + b"\0")
    for source in _sources():
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:20]


def _build(compiler: list[str], version: str, built: Path) -> None:
    start, says = time.monotonic(), built.stem == "kernels"  # the other library builds in a second
    if says:
        print(f"convmixer: building the CPU kernels once ({version}, {target()})", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=built.parent) as folder:
        out = Path(folder) / built.name
        _compile(compiler, version, Path(folder), out)
        os.replace(out, built)  # atomic: no process ever reads half a library
    if says:
        print(f"convmixer: built in {time.monotonic() - start:.0f} s: {built}", file=sys.stderr, flush=True)


def _compile(compiler: list[str], version: str, folder: Path, out: Path) -> None:
    include = Path(torch.__file__).parent / "include"
    libraries = Path(torch.__file__).parent / "lib"
    alone = LIBRARIES[out.stem]
    units = [s for s in _sources() if s.suffix == ".cpp" and (s.name == alone if alone else s.name not in _ALONE)]
    common = [*compiler, *flags(version), f"-I{include}", "-c"]
    jobs = [
        subprocess.Popen(
            [*common, str(unit), "-o", str(folder / f"{unit.stem}.o")],
            stderr=subprocess.PIPE,
            text=True,
            process_group=0,  # so that the compiler's own processes can be ended too
        )
        for unit in units
    ]
    try:
        for job in jobs:
            _, errors = job.communicate(timeout=BUILD_SECONDS)
            if job.returncode:
                first = next((line for line in errors.splitlines() if "error" in line), f"status {job.returncode}")
                raise RuntimeError(f"the compiler failed: {first}")
    finally:
        for job in jobs:
            if job.poll() is None:
                os.killpg(job.pid, signal.SIGKILL)
                job.wait()
    objects = [str(folder / f"{unit.stem}.o") for unit in units]
    _run([*compiler, "-shared", *objects, f"-L{libraries}", "-ltorch_cpu", "-lc10", "-o", str(out)])


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_SECONDS, check=True)
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"{command[0]} failed: {error.stderr.strip()[:300]}") from error
    return done.stdout
