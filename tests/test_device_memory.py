"""Free memory is at most what the limit of a container leaves."""

from pathlib import Path

import pytest

from convmixer import device

GIB = 1 << 30
NAMES = {
    2: ("memory.max", "memory.current", "inactive_file"),
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def write_group(folder: Path, version: int, limit: int | str, used: int, cached: int = 0) -> None:
    maximum, current, name = NAMES[version]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / maximum).write_text(f"{limit}\n")
    (folder / current).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{name} {cached}\n")


@pytest.fixture(params=[1, 2])
def groups(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, int]:
    """An empty tree of control groups with this process in job/step, and its version."""
    monkeypatch.setattr(device, "GROUPS", str(tmp_path))
    monkeypatch.setattr(device, "PROCESS_GROUPS", str(tmp_path / "own"))
    line = "4:cpu,memory:/job/step\n3:cpuset:/\n" if request.param == 1 else "0::/job/step\n"
    (tmp_path / "own").write_text(line)
    return (tmp_path / "memory" if request.param == 1 else tmp_path), request.param


def test_the_tightest_limit_around_the_process_counts(groups: tuple[Path, int]) -> None:
    root, version = groups
    free, whole = device.available_bytes(), device.total_bytes()
    write_group(root / "job" / "step", version, "max" if version == 2 else 2**63 - 4096, GIB // 2)
    assert device.total_bytes() == whole
    write_group(root / "job", version, GIB, GIB // 2, GIB // 8)
    assert device.total_bytes() == GIB
    assert device.available_bytes() == GIB - GIB // 2 + GIB // 8  # files' pages can be given back
    assert free > GIB, "this test needs more free memory than its limits allow"


def test_a_container_that_shows_its_group_as_the_root_is_limited(groups: tuple[Path, int]) -> None:
    root, version = groups
    write_group(root, version, GIB, GIB + 5)
    assert device.available_bytes() == 0


def test_without_control_groups_the_machine_counts(groups: tuple[Path, int]) -> None:
    whole = device.total_bytes()
    (groups[0] / "own").unlink(missing_ok=True)
    assert device.total_bytes() == whole
