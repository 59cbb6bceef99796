"""Every command in the project's pages: run for real on tiny data, or at least parsed by the real parser.

RUN says what is run and with which cheaper settings, PARSED what is only parsed, and why. A command in neither fails.
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from PIL import Image
from sklearn.datasets import load_digits

from convmixer.cli import _parser, main
from convmixer.recipes import load_settings
from convmixer.studies.schema import load_study
from docs_pages import PAGES, ROOT, Command, commands, inline, unmarked

SMALL = ["--epochs", "1", "--workers", "0", "--batch-size", "8", "--img-size", "16", "--draw", "false"]
TINY = [*SMALL, "--model", "convmixer_8_1_p4_k3"]
# a pattern of commands -> what makes them cheap; a later value of a flag wins
RUN = {
    r"convmixer (plan|train) flowers( --(out|epochs|lr|workers) \S+| --config settings.yaml)*": TINY,
    r"convmixer (plan|train) flowers .*--model convmixer_64_\d_p\d_k5.*": SMALL,
    r"convmixer train flowers --weights .*": SMALL,
    r"convmixer train flowers --find-lr .*": TINY,
    r"convmixer train flowers --logger .*": [*TINY, "--logger", "none"],  # test_train_loggers.py logs
    r"convmixer train --resume runs/flowers": [],
    r"convmixer train --resume runs/flowers --epochs 60": ["--epochs", "2"],
    r"convmixer (val runs|predict|plot|explain|models|info)\b.*": [],
    r"convmixer export runs/flowers --format (web|onnx)\b.*": ["--limit", "4"],
    r"convmixer convert runs/flowers .*": [],
    r"convmixer compare (--list|runs/flowers runs/small .*)": [],
    r"convmixer data flowers\b.*": [],
    r"convmixer (verify studies/smoke|compare smoke digits .*--resume).*": [],
}
SLOW = {
    r"convmixer export runs/flowers --format (openvino|torch)\b.*": ["--limit", "4"],
    r"convmixer compare smoke digits --out studies/smoke": [],
    r"convmixer compare study.yaml digits --out studies/mine": [],
}
PARSED = {
    r"convmixer train cifar10 .*": "hours",
    r"convmixer train '?(https|s3)://\S+": "needs a server; test_data_remote.py",
    r"convmixer (tune flowers|train flowers --config tune/).*": "hours; test_tuning.py searches",
    r"convmixer compare (mixers|models-100) cifar10 .*": "needs CIFAR-10, or a database",
    r"convmixer compare smoke digits --out studies/second --reuse .*": "test_studies_run.py reuses a study",
    r"convmixer (verify (results/.*|record.jsonl)|val \S+ cifar10).*": "needs CIFAR-10; test_pretrained.py does both",
    r"convmixer benchmark .*": "needs an idle machine; test_benchmark.py",
    r"convmixer convert convmixer_768_32_ks7_p7_relu.pth.tar .*": "needs the authors' file; test_models_dialects.py",
    r"convmixer serve .*": "ends with Ctrl-C; test_serve_load.py",
}
OTHER = {
    r"make \S+( OPTIONS=.*)?": "its target exists",
    r"torchrun (--nnodes \d+ )?--nproc-per-node \d+ (--rdzv-\S+ \S+ )*-m convmixer .*": "test_train_machines.py",
    r"curl -F image=@photo.jpg localhost:8000/v1/predict": "test_serve_api.py sends the same form",
    r"docker (build|run) .*": "test_serve_docker.py",
    r"python tools/run_studies.py .*": "test_studies_script.py",
    r"source .venv/bin/activate|pip install .*": "the installation",
}
VERBS = set(next(a for a in _parser()._actions if isinstance(a, argparse._SubParsersAction)).choices)
ALL = list({command.text: command for page in PAGES for command in commands(page)}.values())


def matching(rules: dict[str, object], text: str) -> list[str]:
    return [pattern for pattern in rules if re.fullmatch(pattern, text)]


def these(rules: dict[str, object]) -> list[Command]:
    return [command for command in ALL if matching(rules, command.text)]


@pytest.mark.parametrize("command", ALL, ids=lambda c: c.where)
def test_no_command_is_unaccounted_for(command: Command) -> None:
    kinds = [rules for rules in (RUN | SLOW, PARSED, OTHER) if matching(dict(rules), command.text)]
    assert len(kinds) == 1, f"{command.where}: {command.text}: say in this test how it is tried"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_command_hides_in_another_block(page: Path) -> None:
    generated = page.name == "report.md" or (page.parent.parent.name == "results" and page.name == "README.md")
    assert generated or not unmarked(page), "mark the block as ```sh"


@pytest.mark.parametrize(
    "command", [c for c in ALL if re.match("convmixer |torchrun ", c.text)], ids=lambda c: c.where
)
def test_the_parser_takes_every_command(command: Command) -> None:
    _parser().parse_args(shlex.split(command.text.partition("convmixer ")[2]))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_parser_takes_the_commands_in_the_text(page: Path) -> None:
    if page.name == "log.md":  # tells what was
        return
    for text in inline(page):
        words = shlex.split(text)[1:]
        if words[-1] != "--help" and not (len(words) == 1 and words[0] in VERBS):
            _parser().parse_args(words)


def test_the_readme_names_every_command() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text[text.index("## Commands") : text.index("## The package")]
    assert set(re.findall(r"`(\w+)`", table)) == VERBS


@pytest.mark.parametrize("command", [c for c in ALL if c.text.startswith("make ")], ids=lambda c: c.where)
def test_make_knows_the_target(command: Command) -> None:
    words = shlex.split(command.text)
    done = subprocess.run([*words, "-n"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, whole: Path) -> Path:
    """A folder with what the pages mention: flowers, a photo, a holiday, settings, a study, a finished study."""
    folder = tmp_path_factory.mktemp("workplace")
    digits = load_digits()
    for digit, name in enumerate(("daisy", "rose", "tulip")):
        for number, image in enumerate(digits.images[digits.target == digit][:20]):
            path = folder / "flowers" / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((image * 15).astype("uint8")).convert("RGB").resize((16, 16)).save(path)
    shutil.copytree(folder / "flowers" / "rose", folder / "holiday")
    Image.open(folder / "holiday" / "0.png").save(folder / "photo.jpg")
    write_clip(folder / "walk.mp4")
    (folder / "settings.yaml").write_text(yaml_blocks("recipes.md")[0])
    (folder / "study.yaml").write_text(yaml_blocks("studies.md")[0])
    shutil.copytree(whole, folder / "studies" / "smoke")
    shutil.copy(whole.parent / "tiny.yaml", folder / "smoke.yaml")
    return folder


def write_clip(path: Path) -> None:
    """Write a video of two seconds."""
    av = pytest.importorskip("av", reason="PyAV, the extra `video`, is not installed")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for shade in range(10):
            container.mux(stream.encode(av.VideoFrame.from_image(Image.new("RGB", (64, 64), (20 * shade,) * 3))))
        container.mux(stream.encode())


def yaml_blocks(page: str) -> list[str]:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)


def run(command: Command, workplace: Path, rules: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    words = shlex.split(command.text)[1:]
    out = Path(words[words.index("--out") + 1]) if "--out" in words else None
    if words[0] in ("train", "convert") and out and out.is_dir():
        shutil.rmtree(out)  # another page's command writes there too
    if words[:2] == ["compare", "smoke"]:
        words = ["compare", "smoke.yaml", *words[2:]]
        (workplace / "smoke.yaml").rename(workplace / "tiny.yaml")
        words[1] = "tiny.yaml"
    status = main([*words, *rules[matching(dict(rules), command.text)[0]]])
    if (workplace / "tiny.yaml").exists():
        (workplace / "tiny.yaml").rename(workplace / "smoke.yaml")
    assert status == 0, command.where


@pytest.fixture(scope="module")
def trained(workplace: Path) -> Path:
    """The workplace after the README's training."""
    here = Path.cwd()
    os.chdir(workplace)
    assert main(["train", "flowers", "--out", "runs/flowers", *TINY, "--draw", "true"]) == 0
    os.chdir(here)
    shutil.copytree(workplace / "runs" / "flowers", workplace / "runs" / "small")
    return workplace


@pytest.mark.usefixtures("measured_here")
@pytest.mark.parametrize("command", these(dict(RUN)), ids=lambda c: c.where)
def test_commands_run(command: Command, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(command, trained, RUN, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("command", these(dict(SLOW)), ids=lambda c: c.where)
def test_slow_commands_run(command: Command, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(trained / "studies" / "smoke", ignore_errors=True)
    run(command, trained, SLOW, monkeypatch)


def test_the_files_shown_are_what_the_commands_read(tmp_path: Path) -> None:
    assert [len(yaml_blocks(page)) for page in ("recipes.md", "studies.md")] == [1, 2]
    study, settings = tmp_path / "study.yaml", tmp_path / "settings.yaml"
    study.write_text(yaml_blocks("studies.md")[0])
    settings.write_text(yaml_blocks("recipes.md")[0])
    assert len(study.read_text().splitlines()) <= 10
    assert set(load_study(str(study)).arms) == {"conv", "none"}
    study.write_text("\n".join(yaml_blocks("studies.md")))
    tune = load_study(str(study)).tune
    assert tune is not None
    assert tune.trials == 8
    assert load_settings(settings)["epochs"] == 20
    assert yaml.safe_load(study.read_text())["match"]["by"] == "parameters"
