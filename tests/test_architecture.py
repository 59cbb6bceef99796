"""The structure that keeps the package readable: which module may import which, and what stays light."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

import convmixer
from convmixer import run_folder

PACKAGE = Path(convmixer.__file__).parent
# small, and free of the heavy libraries
EVERYWHERE = {
    "_version",
    "decode",
    "errors",
    "config",
    "records",
    "preprocess",
    "device",
    "files",
    "run_folder",
    "processes",
    "progress",
    "seal",
    "text",
}
# part -> the parts it may import besides EVERYWHERE
ALLOWED: dict[str, set[str]] = {
    **{part: set() for part in EVERYWHERE},
    "data": {"results"},
    "models": set(),
    "kernels": set(),
    "recipes": set(),
    "results": set(),
    "fast": {"models", "kernels"},
    "probe": {"models"},
    "info": {"kernels", "benchmark"},
    "train": {"data", "models", "fast", "results", "probe"},
    "inference": {"models", "fast", "exported"},
    "predict": {"data", "inference", "results"},
    "evaluation": {"data", "models", "inference", "results"},
    "estimator": {"data", "train", "inference", "recipes"},
    "exported": {"data", "models", "evaluation"},
    "serve": {"inference", "exported"},
    "explain": {"inference", "models", "results"},
    "studies": {"data", "models", "train", "results", "fast", "inference", "evaluation", "probe"},
    "tuning": {"recipes", "results", "studies", "train"},
    "benchmark": {"models", "fast", "kernels", "probe", "exported"},
}


def modules_of(path: Path) -> set[str]:
    """Return the modules of the package that a file imports, anywhere in it, by full name."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            submodules = {f"{node.module}.{alias.name}" for alias in node.names} & MODULES.keys()
            names = {alias.name for alias in node.names if f"{node.module}.{alias.name}" not in MODULES}
            found |= submodules | ({node.module} if names else set())
    return found & MODULES.keys()


def name_of(path: Path) -> str:
    """Return a file's module name."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in PACKAGE.rglob("*.py")}


def part_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def parts_imported() -> dict[str, set[str]]:
    """Return for each part of the package the parts that its files import, without itself and EVERYWHERE."""
    found: dict[str, set[str]] = {}
    for module, path in MODULES.items():
        used = {part_of(name) for name in modules_of(path)} - {"", part_of(module)}
        found.setdefault(part_of(module), set()).update(used - EVERYWHERE)
    return {part: used for part, used in found.items() if part not in ("", "__main__", "cli")}


def test_imports_are_those_of_the_table() -> None:
    found = parts_imported()
    assert found.keys() == ALLOWED.keys()
    for part in sorted(found):
        assert found[part] == ALLOWED[part], part


def test_no_two_files_import_each_other_in_a_circle() -> None:
    edges = {name: modules_of(path) - {name} for name, path in MODULES.items()}
    # the package's __init__ hands out public names on demand, and each file runs after it anyway
    edges = {name: {other for other in used if part_of(other)} for name, used in edges.items()}
    try:
        list(graphlib.TopologicalSorter(edges).static_order())
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_public_names_are_sorted_and_exist() -> None:
    assert convmixer.__all__ == sorted(convmixer.__all__)
    assert all(getattr(convmixer, name) is not None for name in convmixer.__all__)
    assert dir(convmixer) == sorted([*convmixer.__all__, "__version__"])  # what a console completes


def test_the_api_pages_hold_every_public_name(tmp_path: Path) -> None:
    pytest.importorskip("pdoc", reason="pdoc is not installed")
    script = Path(__file__).parent.parent / "docs" / "build_api.py"
    subprocess.run([sys.executable, str(script), str(tmp_path)], check=True)
    page = (tmp_path / "convmixer.html").read_text(encoding="utf-8")
    for name in convmixer.__all__:
        assert f'<section id="{name}">' in page


def test_help_and_import_stay_light() -> None:
    code = (
        "import sys, convmixer, convmixer.cli as c\n"
        "try: c.main(['train', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'timm', 'torchvision', 'pytorch_lightning', 'matplotlib', 'numpy'} & set(sys.modules)\n"
        "sys.exit(' '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_nothing_imports_the_command_line() -> None:
    users = [name for name, path in MODULES.items() if "convmixer.cli" in modules_of(path)]
    assert users == ["convmixer.__main__"]


def test_the_names_of_a_run_s_files_stand_in_one_file() -> None:
    """Who needs one takes it from run_folder.py; prose may mention them."""
    names = {
        getattr(run_folder, name) for name in ("CONFIG", "LOG", "METRICS", "RECORD", "LATEST", "PREVIOUS", "MODEL")
    }
    for module, path in MODULES.items():
        if module == "convmixer.run_folder":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not any(node.value == name or node.value.endswith(f"/{name}") for name in names), module
