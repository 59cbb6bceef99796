"""The container: built, run, healthy, not root, and it stops on SIGTERM. Needs a Docker daemon."""

import shutil
import subprocess
import time
from pathlib import Path

import httpx
import pytest

from serving import PNG, picture

ROOT = Path(__file__).parent.parent


def docker(*arguments: str, seconds: float = 60) -> str:
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, timeout=seconds, check=True)
    return done.stdout.strip()


@pytest.fixture(scope="module")
def container() -> "str":
    if shutil.which("docker") is None or subprocess.run(["docker", "info"], capture_output=True).returncode:
        pytest.skip("no Docker daemon")
    docker("build", "--tag", "convmixer-test", str(ROOT), seconds=1800)
    return docker("run", "--rm", "--detach", "--publish", "127.0.0.1::8000", "convmixer-test")


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_the_container_serves_and_ends(container: str) -> None:
    address = f"http://{docker('port', container, '8000').splitlines()[0]}"
    try:
        for _ in range(120):
            if docker("inspect", "--format", "{{.State.Health.Status}}", container) == "healthy":
                break
            time.sleep(1)
        answer = httpx.post(f"{address}/v1/predict", content=picture(), headers=PNG, timeout=60)
        assert answer.status_code == 200
        assert docker("exec", container, "id", "-u") != "0"
        assert docker("inspect", "--format", "{{.State.Health.Status}}", container) == "healthy"
    finally:
        start = time.monotonic()
        docker("stop", "--time", "60", container, seconds=90)
    assert time.monotonic() - start < 50
