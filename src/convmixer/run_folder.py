"""The files of a run folder, which training writes and all other commands read, and how to recognise such a folder.

Other folders that convmixer writes are recognised here too. Only file names and first bytes are read. Standard
library only.
"""

import hashlib
from pathlib import Path

CONFIG = "config.yaml"
LOG = "log.jsonl"
METRICS, STEPS = "metrics.csv", "steps.csv"
RECORD = "record.jsonl"
LOCK = "lock"
CARD = "README.md"
LATEST, PREVIOUS, SHARES = "latest.pt", "previous.pt", "shares.bin"
MODEL, MODEL_CONFIG = "model.safetensors", "config.json"  # files of a weights folder, in timm's hub layout
BEST, LAST = "best", "last"
STUDY, STUDY_RECORDS, STUDY_FAILURES, STUDY_QUEUE = "study.json", "records.jsonl", "failures.json", "queue.db"
STUDY_TRIALS = "trials.jsonl"
SEARCH = "tune.json"
MISTAKES = "mistakes.html"
RATES, RATES_PICTURE = "lr.json", "lr.png"  # files of the learning-rate finder

_DIGEST = "# sha256: "  # begins the last line of the settings
_PICTURES = (".png", ".jpg", ".jpeg")
_SHIPPED = Path(__file__).parent / "pretrained"


def sealed(text: str) -> str:
    """Return the text of a settings file with its digest as the last line."""
    return f"{text}{_DIGEST}{_digest(text)}\n"


def intact(text: str) -> bool:
    """Return whether a settings file is unchanged since it was written. Older files have no digest and count as
    unchanged.
    """
    body, mark, digest = text.rpartition(_DIGEST)
    return not mark or digest.strip() == _digest(body)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


class RunFolder:
    """The paths of one run. Creating the object touches no file.

    Args:
        path: The folder.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.config = self.path / CONFIG
        self.log_file = self.path / LOG
        self.metrics = self.path / METRICS
        self.steps = self.path / STEPS
        self.record = self.path / RECORD
        self.lock = self.path / LOCK
        self.card = self.path / CARD
        self.checkpoints = self.path / "checkpoints"
        self.pictures = self.path / "pictures"
        self.samples = self.path / "samples"
        self.exports = self.path / "exports"
        self.tensorboard = self.path / "tensorboard"
        self.loggers = self.path / "loggers"
        self.mistakes = self.path / MISTAKES

    def weights(self, which: str) -> Path:
        """Return the folder of the BEST or LAST weights."""
        return self.path / "weights" / which


class StudyFolder:
    """The paths of one study. Creating the object touches no file.

    Args:
        path: The folder.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.plan = self.path / STUDY
        self.records = self.path / STUDY_RECORDS
        self.trials = self.path / STUDY_TRIALS
        self.failures = self.path / STUDY_FAILURES
        self.queue = self.path / STUDY_QUEUE
        self.pictures = self.path / "pictures"

    def run(self, name: str) -> RunFolder:
        """Return the folder of one of the study's runs."""
        return RunFolder(self.path / "runs" / name)


def study_of_weights(weights: Path) -> tuple[StudyFolder, str]:
    """Return the study and the name of the run of weights with the path STUDY/runs/NAME/weights/best."""
    run = weights.parents[1]
    return StudyFolder(run.parents[1]), run.name


def is_run(path: Path | str) -> bool:
    """Return whether a folder is a run: it holds the config.yaml that training writes first.

    A config.yaml of another program does not begin with the command, as ours does, and does not count.
    """
    try:
        with (Path(path) / CONFIG).open("rb") as file:
            return file.read(8) == b"command:"
    except OSError:
        return False


def is_study(path: Path | str) -> bool:
    """Return whether a folder is a study: it holds the plan and its own list of records, queue or runs."""
    path = Path(path)
    return _is_file(path / STUDY) and any(_exists(path / name) for name in (STUDY_RECORDS, STUDY_QUEUE, "runs"))


def is_search(path: Path | str) -> bool:
    """Return whether a folder is a hyperparameter search: it holds the plan that `convmixer tune` writes first."""
    return _is_file(Path(path) / SEARCH) and _exists(Path(path) / STUDY_QUEUE)


def is_rates(path: Path | str) -> bool:
    """Return whether a folder is what `convmixer train --find-lr` wrote."""
    return all(_is_file(Path(path) / name) for name in (RATES, RATES_PICTURE))


def is_web_export(path: Path | str) -> bool:
    """Return whether a folder is a web page that `convmixer export` wrote."""
    return all(_is_file(Path(path) / name) for name in ("index.html", "model.js", "local.js"))


def is_weights(path: Path | str) -> bool:
    """Return whether a folder holds weights: model.safetensors and its config.json."""
    return all(_is_file(Path(path) / name) for name in (MODEL, MODEL_CONFIG))


def is_own_output(path: Path | str) -> bool:
    """Return whether convmixer wrote a folder, so that its pictures are not data.

    Such folders are runs, studies, searches, exports, weights and tests of learning rates, and folders that hold
    nothing else, like `runs`.
    """
    path = Path(path)
    return _is_output(path) or _holds_only_outputs(path)


def weights_folders(path: Path) -> list[Path]:
    """Return the folders of weights in a run (the best, then the last), or a folder of weights itself."""
    run = RunFolder(path)
    return [folder for folder in (run.weights(BEST), run.weights(LAST), path) if _is_file(folder / MODEL)]


def run_of(path: Path | str) -> Path | None:
    """Return the run that a path belongs to: the path itself or one of the three folders above it; else None."""
    path = Path(path)
    around = path.resolve().parents[:3] if path.exists() else ()
    return next((folder for folder in (path, *around) if is_run(folder)), None)


def sample_files(source: Path | str, most: int = 12) -> list[Path]:
    """Return a few sample images kept with weights: in their run folder, or in the folder of shipped weights.

    Args:
        source: Weights or an exported file, anywhere in a run folder, or the name of shipped weights.
        most: Files to return at most.
    """
    path = Path(source)
    if not path.exists():
        path = _SHIPPED / path.name
    path = path.resolve()
    for home in (path, *path.parents[:3]):
        if is_run(home) or is_weights(home):  # only a run's or weights folder's samples
            inside = (file for file in (home / "samples").glob("*") if file.resolve().is_relative_to(home))
            files = sorted(file for file in inside if file.suffix in _PICTURES)
            if files:
                return files[:most]
    return []


def _is_output(path: Path) -> bool:
    kinds = (is_run, is_study, is_search, is_web_export, is_weights, is_rates)
    return any(kind(path) for kind in kinds)


def _holds_only_outputs(path: Path) -> bool:
    try:
        inside = (child for child in path.iterdir() if not child.name.startswith("."))
        first = next(inside, None)
        return first is not None and _is_output(first) and all(map(_is_output, inside))
    except OSError:
        return False


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # e.g. a name too long
        return False


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        return False
