"""Install the built wheel and sdist in fresh environments away from the checkout, and try each of them.

    make dist
    python tools/install_matrix.py                    all rows, an hour and 15 GB with the CUDA build of PyTorch
    python tools/install_matrix.py quick              one row, a minute: with the packages of this environment
    python tools/install_matrix.py oldest py313 --python 3.13=/opt/python3.13/bin/python3

In each row `convmixer info` says what is missing, the demo trains, evaluates and predicts, and a fast part of the
suite passes. A row whose Python is not on this machine is printed as not run. Exits with 1 if a row fails.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from convmixer.files import cache_folder

ROOT = Path(__file__).parents[1]
TOOLS = ("pytest>=8.3", "pytest-timeout>=2.3")
QUICK_TESTS = ("files", "preprocess", "data_folders", "models_weights")
TESTS = (*QUICK_TESTS, "models", "kernels_ops")  # none that needs an extra, or measures time
DEMO = ("digits", "--recipe", "digits", "--model", "convmixer_16_2_p2_k3", "--epochs", "2", "--out", "run")
COMPILERS = ("g++", "c++", "gcc", "cc", "clang", "clang++")
COLUMNS = ("row", "package", "Python", "torch", "timm", "compiler", "missing, says `info`", "result", "seconds")


@dataclass(frozen=True)
class Row:
    """One installation.

    Args:
        package: "whl" or "tar.gz".
        environment: Rows of one environment share its packages, but for convmixer itself.
        python: Version of Python.
        oldest: Take the lower bounds in pyproject.toml, else what pip finds.
        compiler: Leave a C++ compiler on the path.
        tests: The test files to run, without "test_" and ".py".
    """

    package: str
    environment: str = "newest"
    python: str = "3.11"
    oldest: bool = False
    compiler: bool = True
    tests: Sequence[str] = TESTS


ROWS = {
    "quick": Row("whl", "quick", f"{sys.version_info[0]}.{sys.version_info[1]}", tests=QUICK_TESTS),
    "wheel": Row("whl"),
    "sdist": Row("tar.gz"),
    "no-compiler": Row("whl", compiler=False),
    "oldest": Row("whl", "oldest", oldest=True),
    "py313": Row("whl", "py313", "3.13"),
}


class Failed(Exception):
    """A step of a row failed; the message is its last lines."""


def oldest() -> list[str]:
    """Return the lower bounds of the package's dependencies, as pip's constraints."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = [re.match(r"([\w.-]+)>=([\w.]+)", line) for line in project["dependencies"]]
    return [f"{match[1]}=={match[2]}" for match in found if match]


def built(ending: str) -> Path:
    """Return the newest file of `make dist` of a kind."""
    files = sorted((ROOT / "dist").glob(f"convmixer-*.{ending}"), key=lambda file: file.stat().st_mtime)
    if not files:
        raise SystemExit("nothing is built: run `make dist` first")
    return files[-1]


class Place:
    """A folder with an environment, away from the checkout, and what runs in it.

    Args:
        folder: Where; made if it is missing.
        python: The interpreter to make the environment with.
        site: A folder of installed packages that the environment may use; None: it starts empty.
        kernels: The cache folder of a user who has built the kernels; None: they are built anew.
    """

    def __init__(self, folder: Path, python: str, site: str | None, kernels: str | None = None) -> None:
        self.kernels = kernels
        self.folder, self.bin = folder, folder / "venv" / "bin"
        self.fresh = not folder.exists()
        folder.mkdir(exist_ok=True)
        if self.fresh:
            self.run(python, "-m", "venv", str(folder / "venv"))
            packages = Path(self.python("-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
            if site:  # links in it (.pth files) are not followed: an editable convmixer there is not seen
                (packages / "others.pth").write_text(f"{site}\n")

    def python(self, *words: str, **others: bool) -> str:
        return self.run(str(self.bin / "python"), *words, **others)

    def run(self, *words: str, compiler: bool = True) -> str:
        """Run a command in the folder, with an empty home folder, and return what it printed."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "CONVMIXER", "XDG", "VIRTUAL"))}
        path = f"{self.bin}{os.pathsep}{kept['PATH'] if compiler else self._without_compiler()}"
        home = {"HOME": str(self.folder / ("home" if compiler else "home-without-compiler")), "PATH": path}
        if self.kernels:
            home["XDG_CACHE_HOME"] = self.kernels
        done = subprocess.run(words, cwd=self.folder, env=kept | home, capture_output=True, text=True)
        if done.returncode:
            raise Failed(f"{' '.join(words)[:200]}\n{(done.stdout + done.stderr)[-3000:]}")
        return done.stdout

    def _without_compiler(self) -> str:
        """Return a folder with links to what is on the path, but for the compilers."""
        tools = self.folder / "tools"
        if not tools.exists():
            tools.mkdir()
            for folder in reversed(os.environ["PATH"].split(os.pathsep)):
                for file in Path(folder).glob("*") if Path(folder).is_dir() else ():
                    if not file.name.startswith(COMPILERS) and "-g++" not in file.name and "-gcc" not in file.name:
                        (tools / file.name).unlink(missing_ok=True)
                        (tools / file.name).symlink_to(file)
        return str(tools)


def install(row: Row, place: Place) -> None:
    """Install the package with its dependencies; into an environment that has them, the package alone."""
    package = built(row.package)
    if not place.fresh:
        place.python("-m", "pip", "install", "-q", "--force-reinstall", "--no-deps", str(package))
        return
    constraints = place.folder / "constraints.txt"
    constraints.write_text("\n".join(oldest() if row.oldest else []))
    place.python("-m", "pip", "install", "-q", "--constraint", str(constraints), str(package), *TOOLS)


def try_out(row: Row, place: Place) -> dict[str, str]:
    """Run `info`, the demo and the tests; return what belongs into the table."""
    convmixer = str(place.bin / "convmixer")
    where = place.python("-c", "import convmixer; print(convmixer.__file__)").strip()
    if not where.startswith(str(place.folder)):
        raise Failed(f"convmixer was imported from {where}")
    said = place.run(convmixer, "info", compiler=row.compiler)
    if ("no C++ compiler" in said) is row.compiler:
        raise Failed(f"what `convmixer info` says of the kernels is wrong:\n{said}")
    shutil.rmtree(place.folder / "run", ignore_errors=True)
    for words in (("train", *DEMO), ("val", "run"), ("predict", "run", "run/samples")):
        place.run(convmixer, *words, compiler=row.compiler)
    tests = place.folder / "tests"
    shutil.rmtree(tests, ignore_errors=True)
    shutil.copytree(ROOT / "tests", tests, ignore=shutil.ignore_patterns("__pycache__", "faults"))
    shutil.copy(ROOT / "pyproject.toml", place.folder)
    files = [f"tests/test_{name}.py" for name in row.tests]
    # warnings of versions other than ours are no errors
    printed = place.python("-m", "pytest", "-p", "no:cacheprovider", "-o", "filterwarnings=default", *files,
                           compiler=row.compiler)  # fmt: skip
    versions = dict(re.findall(r"(torch|timm) ([^,\s]+)", said))
    missing = re.findall(r"pip install 'convmixer\[(\w+)\]'", said)
    return versions | {"missing": ", ".join(missing) or "nothing", "result": printed.strip().splitlines()[-1]}


def find_python(version: str, given: dict[str, str]) -> str | None:
    """Return the interpreter of a version: the one given, or this one, or one on the path that starts."""
    if version in given:
        return given[version]
    if version == f"{sys.version_info[0]}.{sys.version_info[1]}":
        return sys.executable
    return shutil.which(f"python{version}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", help=f"{', '.join(ROWS)}; default: all")
    parser.add_argument("--python", action="append", default=[], metavar="VERSION=PATH", help="an interpreter")
    parser.add_argument("--site", action="append", default=[], metavar="ROW=FOLDER", help="packages a row may use")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where to make the environments, and leave them")
    arguments = parser.parse_args()
    pythons = dict(item.split("=", 1) for item in arguments.python)
    sites = {"quick": sysconfig.get_path("purelib")} | dict(item.split("=", 1) for item in arguments.site)
    failures = 0
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    with tempfile.TemporaryDirectory(prefix="install-") as temporary:
        away = arguments.keep or Path(temporary)
        for name in arguments.rows or ROWS:
            failures += not run_row(name, away, pythons, sites)
    return int(failures > 0)


def run_row(name: str, away: Path, pythons: dict[str, str], sites: dict[str, str]) -> bool:
    """Run one row and print it; return whether it is well."""
    row, begun = ROWS[name], time.monotonic()
    python, found = find_python(row.python, pythons), {"result": f"not run: no python{row.python} here"}
    problem = ""
    if python:
        try:
            kernels = str(cache_folder().parent) if name == "quick" else None
            place = Place(away / row.environment, python, sites.get(name), kernels)
            install(row, place)
            found = try_out(row, place)
        except Failed as error:
            found, problem = {"result": "failed"}, str(error)
    columns = (name, "wheel" if row.package == "whl" else "sdist", row.python, found.get("torch", ""),
               found.get("timm", ""), "yes" if row.compiler else "no", found.get("missing", ""), found["result"],
               f"{time.monotonic() - begun:.0f}")  # fmt: skip
    print(f"| {' | '.join(columns)} |", flush=True)
    if problem:
        print(problem, file=sys.stderr)
    return not problem


if __name__ == "__main__":
    sys.exit(main())
