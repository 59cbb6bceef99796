"""The files of docs/scaling.md for SLURM and Kubernetes are well formed and start the command they are for."""

import os
import subprocess
from pathlib import Path

import pytest
import yaml

from convmixer.cli import _parser
from docs_pages import ROOT, tokens

PAGE = ROOT / "docs" / "scaling.md"
TORCHRUN = '#!/bin/sh\nprintf "%s\\n" "$@" > "$SEEN"\n'
SRUN = '#!/bin/sh\nexec "$@"\n'
SCONTROL = "#!/bin/sh\nprintf 'node1\\nnode2\\n'\n"


def block(kind: str) -> str:
    return next(token.content for token in tokens(PAGE) if token.type == "fence" and token.info == kind)


def started(script: str, folder: Path) -> list[str]:
    """Run a script with stand-ins for the cluster's commands, and return the words that torchrun got."""
    commands = folder / "bin"
    commands.mkdir(exist_ok=True)
    for name, text in (("torchrun", TORCHRUN), ("srun", SRUN), ("scontrol", SCONTROL)):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "7"}
    slurm |= {"SEEN": str(folder / "seen"), "PATH": f"{commands}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-c", script], check=True, cwd=folder, env={**os.environ, **slurm})
    return (folder / "seen").read_text().splitlines()


def check(words: list[str], endpoint: str) -> list[str]:
    assert words[words.index("--rdzv-endpoint") + 1] == endpoint
    own = words[words.index("-m") + 2 :]
    _parser().parse_args(own)
    return own


def test_the_script_for_slurm_starts_and_goes_on(tmp_path: Path) -> None:
    own = check(started(block("bash"), tmp_path), "node1:29500")
    assert own == ["train", "flowers", "--out", "runs/flowers", "--workers", "8"]
    (tmp_path / "runs/flowers").mkdir(parents=True)
    (tmp_path / "runs/flowers/config.yaml").touch()
    assert check(started(block("bash"), tmp_path), "node1:29500") == ["train", "--resume", "runs/flowers"]


def test_the_pods_of_kubernetes_find_each_other(tmp_path: Path) -> None:
    service, job = yaml.safe_load_all(block("yaml"))
    pod = job["spec"]["template"]["spec"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert pod["subdomain"] == service["metadata"]["name"]
    words = started(pod["containers"][0]["args"][0], tmp_path)
    assert check(words, f"{job['metadata']['name']}-0.{pod['subdomain']}:29500")[0] == "train"
    assert int(words[words.index("--nnodes") + 1]) == job["spec"]["completions"] == job["spec"]["parallelism"]


@pytest.mark.parametrize("kind", ["bash", "yaml"])
def test_there_is_one_file_of_each_kind(kind: str) -> None:
    assert sum(token.type == "fence" and token.info == kind for token in tokens(PAGE)) == 1
