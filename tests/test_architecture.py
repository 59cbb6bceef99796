"""The structure that keeps the package readable: which module may import which, and what stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import convmixer

PACKAGE = Path(convmixer.__file__).parent
# small, and free of the heavy libraries
EVERYWHERE = {"errors", "config", "records", "preprocess", "device", "files", "run_folder"}
# part -> the parts it may import besides EVERYWHERE; data flows one way and so do imports
ALLOWED = {
    "errors": set(),
    "config": set(),
    "records": set(),
    "files": set(),
    "run_folder": set(),
    "preprocess": set(),
    "device": set(),
    "data": set(),
    "models": set(),
    "kernels": set(),
    "recipes": set(),
    "results": set(),
    "fast": {"models", "kernels"},
    "info": {"kernels"},
    "train": {"data", "models", "fast", "results", "recipes", "inference"},
    "inference": {"models", "fast", "exported"},
    "estimator": {"train", "inference", "recipes"},
    "exported": set(),
    "export": {"models", "fast", "inference", "exported", "data"},
    "serve": {"inference", "exported"},
    "explain": {"inference", "models", "results"},
    "studies": {"data", "models", "train", "results", "recipes", "fast", "inference"},
    "benchmark": {"models", "fast", "kernels"},
}


def imports_of(path: Path) -> set[str]:
    """Return the parts of the package that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("convmixer.")}
    return found


def part_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_flow_one_way(path: Path) -> None:
    part = part_of(path)
    if part in ("__init__", "__main__", "cli"):
        return
    assert part in ALLOWED, f"say in this test what {part} may import"
    extra = imports_of(path) - EVERYWHERE - ALLOWED[part] - {part}
    assert not extra, f"{path.relative_to(PACKAGE)} imports {sorted(extra)}"


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
    users = [p for p in PACKAGE.rglob("*.py") if "cli" in imports_of(p) and p.name != "__main__.py"]
    assert not users
