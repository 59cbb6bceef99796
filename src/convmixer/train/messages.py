"""What a run prints on the terminal."""

import textwrap
from collections.abc import Mapping
from typing import Any

import torch
from rich.console import Console

from convmixer.config import to_dict
from convmixer.data.sources import Encoded
from convmixer.data.summary import show, summarise
from convmixer.run_folder import RunFolder
from convmixer.text import terminal
from convmixer.train.distributed import world_size
from convmixer.train.setup import Job
from convmixer.train.start import start_line


def say_settings(console: Console, job: Job, folder: RunFolder, contents: Mapping[str, Any]) -> None:
    """Print everything that was decided before the first step.

    Args:
        console: Where to print.
        job: What is trained.
        folder: The run folder.
        contents: Contents of the settings file.
    """
    data, c = job.data, job.config
    console.print(f"run      {terminal(folder.path)}")
    console.print(f"recipe   {contents['recipe'] or 'none'}")
    if data.found:
        show(summarise(data), console)
    for note in data.notes:
        console.print(f"data     {terminal(data.name)}: {terminal(note)}")
    parameters = sum(p.numel() for p in job.model.parameters())
    console.print(f"model    {job.build[0]}, {parameters:,} parameters, {job.kernels}")
    console.print(f"start    {terminal(start_line(c, data.in_chans, job.preprocessing.img_size))}")
    if c.freeze:
        trained = sum(p.numel() for p in job.model.parameters() if p.requires_grad)
        then = f", then all for {c.unfreeze_epochs} epochs" if c.unfreeze_epochs else ""
        console.print(f"freeze   {c.freeze}: {trained:,} of the parameters are trained{then}")
    console.print(f"compute  {c.device}, {c.precision}, {torch.get_num_threads()} threads x {world_size()}")
    if job.augmentation:
        console.print(f"augment  {job.augmentation}")
    settings = "  ".join(f"{name}={_show(value)}" for name, value in to_dict(c).items())
    for line in textwrap.wrap(settings, 106):
        console.print(f"settings {terminal(line)}")
    for name, change in contents["differs_from_recipe"].items():
        console.print(f"differs  {name}: {_show(change['here'])} (recipe: {_show(change['recipe'])})")
    if job.batch_size != c.batch_size:
        console.print(f"batch    {job.batch_size}, because there are no more training images")


def say_results(console: Console, folder: RunFolder, results: Mapping[str, Any]) -> None:
    """Print the results of the chosen weights."""
    console.print(f"chosen   {results['chosen']}")
    for split, use in (("val", "used to choose the epoch"), ("test", "evaluated once, after training")):
        if results[f"{split}_n"]:
            top1, top5, n = (results[f"{split}_{key}"] for key in ("top1", "top5", "n"))
            console.print(f"{split:<8} top-1 {top1:.2f}%  top-5 {top5:.2f}%  of {n} images ({use})")
    drawn = f", pictures in {terminal(folder.pictures)}" if folder.pictures.is_dir() else ""
    console.print(f"files    {terminal(folder.path)}{drawn}")


def epoch_line(row: Mapping[str, Any], length: str, better: bool) -> str:
    """Return the line that is printed after an epoch.

    Args:
        row: The epoch's row of metrics.
        length: How far the run is; printed after the number of the epoch.
        better: Whether the epoch is the best so far.
    """
    text = f"epoch {row['epoch']:g}{length}  lr {row['lr']:.2g}  train loss {row['train_loss']:.4f}"
    if row["top1"] is not None:
        text += f"  val loss {row['val_loss']:.4f}  top-1 {row['top1']:.2f}%"
    text += f"  {row['images_per_second']:.0f} images/s, loader {100 * row['loader_share']:.0f}% of the time"
    return text + ("  (best)" if better else "")


def slow_loading(share: float, job: Job) -> str:
    """Return the advice that is printed once if training waits for images for a large share of the time."""
    c, helps = job.config, []
    if job.data.train and isinstance(job.data.train.source, Encoded) and not job.kept:
        helps.append("--cache memory or disk (images are decoded again in each epoch)")
    if c.auto_augment and c.augment_on == "cpu":
        helps.append(f"a lighter --auto-augment than {c.auto_augment}")
    if c.workers != "auto":
        helps.append("--workers auto")
    helps.append("fewer other programs at the same time")
    return f"training waits for images {share:.0%} of the time; what helps: {', '.join(helps)}"


def _show(value: Any) -> str:
    return "none" if value is None else ",".join(map(str, value)) if isinstance(value, list) else str(value)
