"""The command `val`: measures a model on a split, and warns if the accuracy may be misleading."""

import csv
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchmetrics.functional import classification as tm

from convmixer.data.images import ImageSet
from convmixer.data.loader import eval_loader
from convmixer.data.options import Options
from convmixer.data.transforms import eval_transform
from convmixer.errors import RequestError
from convmixer.evaluation.batchnorm import check_batchnorm
from convmixer.evaluation.data import EvaluationData, find_data, match_classes, sample, unreadable
from convmixer.evaluation.metrics import ClassResult, collect, metrics, per_class
from convmixer.files import write_atomic
from convmixer.inference import load_classifier
from convmixer.models.weights import LoadedModel
from convmixer.progress import track
from convmixer.results.mistakes import Answers, label_errors, write_mistakes, write_table
from convmixer.run_folder import run_of
from convmixer.text import csv_cell, markup, terminal

CALIBRATION = 64  # training images for int8
TTA = "mean over each image and its mirror image"


def val(
    weights: str | Path,
    data: str | None = None,
    split: str | None = None,
    limit: int | None = None,
    batch_size: int = 64,
    precision: str = "auto",
    out: Path | None = None,
    expected: dict[str, Any] | None = None,
    options: Options | None = None,
    mistakes: bool = False,
    tta: bool = False,
) -> dict[str, Any]:
    """Measure a model on a split, print the tables, and return the numbers.

    Args:
        weights: See `inference.load_classifier`.
        data: See `data.load_data`; None: the data that the weights were trained on.
        split: "train", "val" or "test"; None: test, or for data other than the training data the first of test, val
            and train that exists.
        limit: Evaluate on a random sample (with a fixed seed) of this many images; None: on all.
        batch_size: Images per batch, at least 1.
        precision: See `inference.load_classifier`.
        out: A folder for metrics.json, per_class.csv and confusion_matrix.png, or None.
        expected: See `inference.load_classifier`.
        options: What the user said about the columns, folders and groups of `data`.
        mistakes: Write a page and a table of the misclassified images. They go to `out`. If that is None, they go to
            the run's folder if `data` is None too, else to the current folder.
        tta: Average the probabilities of each image and its mirror image (test-time augmentation).

    Returns:
        The result of `metrics`, and "data", "split", "tta", "checksum", "per_class", "notes" on the data, "warnings"
        (one says if the data have changed since training) and "batchnorm". With `mistakes` also "mistakes": the page,
        the table, and the names of images whose label is likely wrong.

    Raises:
        RequestError: An argument is wrong, there is no such split, or the model does not know a class.
    """
    if batch_size < 1 or (limit is not None and limit < 1):
        raise RequestError(f"--batch-size and --limit must be at least 1, not {batch_size} and {limit}")
    found: list[EvaluationData] = []

    def calibration(loaded: LoadedModel) -> torch.Tensor:
        found.append(find_data(data, loaded.metadata, weights, options))
        return _calibration(found[0], loaded)

    quantise = calibration if precision == "int8" else None
    classifier = load_classifier(weights, precision, calibration=quantise, expected=expected)
    classifier = classifier.mirrored() if tta else classifier
    print(terminal(f"{weights}: {classifier.describe.get('found', 'exported')}"))
    there = found[0] if found else find_data(data, classifier.describe, weights, options)
    splits, chosen = there.splits, there.choose(split)
    images = sample(there.pick(chosen), limit)
    index, assumed = match_classes(splits.classes, classifier.classes)
    loader = eval_loader(images, eval_transform(classifier.preprocessing), batch_size, workers=0)
    logits, labels = collect(classifier.logits, track(loader, "evaluating", len(loader)))
    labels = index[labels]
    batchnorm, bad = check_batchnorm(classifier.loaded, images, index, weights) if classifier.loaded else ({}, [])
    classes = per_class(logits, labels, classifier.classes)
    result = metrics(logits, labels) | {
        "data": splits.name,
        "split": chosen,
        "tta": TTA if tta else None,
        "checksum": splits.checksum,
        "precision": classifier.describe.get("precision", "exported"),
        "per_class": [vars(row) for row in classes],
        "batchnorm": batchnorm,
        "notes": [*splits.notes, *there.said(chosen)],
        "warnings": [*_changed(there, chosen), *unreadable(images), *assumed, *bad],
    }
    _print(result, classes)
    if out is not None:
        n = len(classifier.classes)
        counts = tm.multiclass_confusion_matrix(logits.argmax(1), labels, max(2, n)).numpy()[:n, :n]
        _write(out, result, classes, counts, classifier.classes)
    if mistakes:
        answers = Answers.of(logits.numpy(), labels.numpy(), images.readable())
        home = out or (run_of(weights) if there.own and data is None else None) or Path()
        about = f"{weights} on {splits.name}, {chosen} split."
        result["mistakes"] = _write_mistakes(
            home / f"mistakes-{chosen}.html", answers, classifier.classes, images, about
        )
    return result


def _calibration(data: EvaluationData, loaded: LoadedModel) -> torch.Tensor:
    """Return a batch of training images for int8."""
    images = sample(data.training_images(), CALIBRATION)
    batch, _ = next(iter(eval_loader(images, eval_transform(loaded.preprocessing), CALIBRATION)))
    return batch


def _changed(data: EvaluationData, split: str) -> list[str]:
    """Return a warning if the training data have changed, because their splits are then different."""
    if split == "train" or not data.changed:
        return []
    return [
        f"the data at {data.splits.spec} have changed since training: the model may have been trained on images of "
        f"this {split} split, and the accuracy may be too high; measure on images that it was not trained on"
    ]


def _print(result: dict[str, Any], classes: Sequence[ClassResult]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 200)
    low, high = result["ci95"]
    for note in result["notes"]:
        console.print(f"data {markup(result['data'])}: {markup(note)}", highlight=False)
    console.print(f"{markup(result['data'])}, {result['split']} split: {result['n']} images ({result['precision']})")
    if result["tta"]:
        console.print(f"test-time augmentation: {result['tta']}", highlight=False)
    console.print(f"top-1 {result['top1']:.2f}% (95% Wilson interval {low:.2f} to {high:.2f})", highlight=False)
    console.print(f"top-5 {result['top5']:.2f}%, loss {result['loss']:.4f}, ECE {result['ece']:.4f}", highlight=False)
    worst = sorted(classes, key=lambda row: row.f1)[:10]
    shown = classes if len(classes) <= 25 else worst
    table = Table("class", "precision", "recall", "F1", "images", box=None, pad_edge=False)
    if shown is worst:
        table.title = f"the 10 classes of {len(classes)} with the lowest F1"
    for row in shown:
        table.add_row(markup(row.name), *(f"{v:.1f}" for v in (row.precision, row.recall, row.f1)), str(row.n))
    console.print(table)
    for warning in result["warnings"]:
        console.print(f"[yellow]warning:[/yellow] {markup(warning)}", highlight=False)


def _write_mistakes(
    path: Path, answers: Answers, classes: Sequence[str], images: ImageSet, about: str
) -> dict[str, Any]:
    write_mistakes(path, answers, classes, images.picture, images.name, about)
    table = path.with_suffix(".csv")
    write_table(table, answers, classes, images.name)
    suspects = [images.name(int(answers.places[i])) for i in label_errors(answers)]
    print(f"mistakes: {int(answers.wrong.sum())}, of which {len(suspects)} are likely wrong labels: {terminal(path)}")
    return {"page": str(path), "table": str(table), "likely_label_errors": suspects}


def _write(
    out: Path, result: dict[str, Any], classes: Sequence[ClassResult], counts: np.ndarray, names: Sequence[str]
) -> None:
    from convmixer.results.plots import confusion_matrix

    write_atomic(out / "metrics.json", json.dumps(result | {"confusion_matrix": counts.tolist()}, indent=1).encode())
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["class", "precision", "recall", "f1", "images"])
    writer.writerows((csv_cell(row.name), *list(vars(row).values())[1:]) for row in classes)
    write_atomic(out / "per_class.csv", text.getvalue().encode(errors="surrogateescape"))
    confusion_matrix(counts, names, out / "confusion_matrix.png")
    print(f"tables and picture written to {terminal(out)}")
