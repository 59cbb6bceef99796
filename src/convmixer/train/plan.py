"""Estimates what a run would cost. Parameters and MACs are counted, memory and time are measured with a few steps.

Memory on the CPU is measured in a fresh process that takes three steps. It is the peak resident size minus the size
before the first step, when libraries, data and model are already loaded. On a GPU it is the peak that CUDA reports.
"""

import statistics
from typing import Any

from rich.console import Console
from rich.table import Table

from convmixer.config import Config, parse_seconds
from convmixer.data.summary import show, summarise
from convmixer.device import available_bytes
from convmixer.probe import macs
from convmixer.text import duration, markup
from convmixer.train import features, options
from convmixer.train.budget import seconds_per_image
from convmixer.train.engine import measure_speed
from convmixer.train.freeze import freeze
from convmixer.train.setup import Job, prepare

EVENING = "3h"  # the time for which `plan` proposes settings if no max_time is given


def plan(data: str, config: Config) -> dict[str, Any]:
    """Return and print what training with these settings costs on this machine.

    Args:
        data: The data argument.
        config: Resolved settings.

    Returns:
        Among others: `parameters`; `macs`, multiply-accumulates of one image's forward pass; `peak_memory_bytes` of
        training, without the loaded libraries, data and model; `seconds_per_epoch` with validation;
        `seconds_of_features`, the time to compute the features of frozen layers; `seconds_unfrozen`, the time of an
        epoch that then trains all layers; `seconds_at_end`, the time of the last evaluation; `seconds_total`;
        `options`, up to three settings that fit into `budget` (max_time, else 3 hours), each with `what`, `flags`,
        `epochs`, `seconds` and `memory`.

    Raises:
        RequestError: The settings or the data cannot be used.
    """
    job = prepare(data, config)
    cost = _measure(job)
    per_epoch, budget = cost["seconds_per_epoch"], config.max_time or EVENING
    epochs = config.epochs or int(parse_seconds(str(config.max_time)) / per_epoch)  # as many epochs as fit
    once = cost["seconds_of_features"] + cost["seconds_at_end"] + config.unfreeze_epochs * cost["seconds_unfrozen"]
    memory, others = options.measure(data, config, job, per_epoch * epochs + once, parse_seconds(budget))
    first = options.fewer_epochs(per_epoch, once, epochs, parse_seconds(budget), budget)
    result = {
        "model": job.build[0],
        "parameters": sum(p.numel() for p in job.model.parameters()),
        "macs": macs(job.build, job.preprocessing.img_size, job.preprocessing.in_chans, len(job.data.classes)),
        "peak_memory_bytes": memory,
        "seconds_total": per_epoch * epochs + once,
        "images_per_second": job.batch_size / cost["seconds_per_step"],
        "batch_size": job.batch_size,
        "epochs": epochs,
        "unfreeze_epochs": config.unfreeze_epochs,
        "steps_per_epoch": job.steps_per_epoch,
        "kernels": job.kernels,
        "device": job.device.type,
        "precision": job.config.precision,
    } | cost
    result["budget"] = budget
    result["options"] = [options.plain(option) for option in ([first] if first else []) + others][: options.MOST]
    summary = summarise(job.data)
    result["data"] = summary
    show(summary, Console(soft_wrap=True, highlight=False))
    result["advice"] = _advice(result, config)
    _show(result, data)
    return result


def _measure(job: Job) -> dict[str, float]:
    """Return the seconds that each part of a run takes, measured with a few real steps."""
    config, data = job.config, job.data
    train, val, test = (len(split) if split else 0 for split in (data.train, data.val, data.test))
    features_seconds = later = 0.0
    if features.why_not(job):
        module = job.module(1.0)
        step = statistics.median(measure_speed(module, job.train_loader()))
        per_image = seconds_per_image(module, job, "val" if val else "test") if val or test else 0.0
        epoch = job.steps_per_epoch * step + val * per_image
    else:
        per_image, step = features.measure(job)
        features_seconds = (train * max(1, config.views) + val) * per_image
        epoch = job.steps_per_epoch * step
    if config.unfreeze_epochs:
        freeze(job.model, None)
        later = job.steps_per_epoch * statistics.median(measure_speed(job.module(1.0), job.train_loader()))
        later += val * per_image
        freeze(job.model, config.freeze)
    return {
        "seconds_per_step": step,
        "seconds_per_epoch": epoch,
        "seconds_of_features": features_seconds,
        "seconds_unfrozen": later,
        "seconds_at_end": test * per_image,
    }


def _advice(result: dict[str, Any], config: Config) -> list[str]:
    """Return what to change if memory or time do not fit."""
    advice = []
    if result["device"] == "cpu":
        free = available_bytes()
        if result["peak_memory_bytes"] > 0.8 * free:
            parts = 2 * config.grad_accum
            advice.append(
                f"memory is tight ({free / 2**30:.1f} GiB free): --grad-accum {parts}, or a smaller batch_size"
            )
    budget = parse_seconds(config.max_time) if config.max_time else None
    if budget and result["seconds_total"] > budget:
        epochs = max(0.0, budget - result["seconds_of_features"]) / result["seconds_per_epoch"]
        advice.append(f"max_time {config.max_time} will cut it to about {epochs:.1f} epochs")
    elif result["seconds_total"] > 12 * 3600:
        fits = max(1, int(8 * 3600 / result["seconds_per_epoch"]))
        advice.append(f"over half a day: --epochs {fits} or --max-time 8h fits into a night; see below")
    if result["kernels"] == "plain PyTorch" and result["device"] == "cpu":
        advice.append("the CPU kernels are not used: `convmixer info` says why")
    if not advice and result["seconds_total"] > parse_seconds(result["budget"]):
        return [f"longer than {result['budget']}: what fits is below"]
    return advice or ["it fits: nothing to change"]


def _show(result: dict[str, Any], data: str) -> None:
    table = Table("", "", show_header=False, title=f"{result['model']} on {data}", title_justify="left")
    table.add_row("parameters", f"{result['parameters']:,}")
    table.add_row("MACs per image", f"{result['macs'] / 1e6:,.1f} million")
    table.add_row(
        "training memory", f"{result['peak_memory_bytes'] / 2**20:,.0f} MiB at batch {result['batch_size']}"
    )
    table.add_row("computed by", f"{result['device']}, {result['precision']}, {result['kernels']}")
    table.add_row(
        "speed", f"{result['images_per_second']:,.0f} images/s, {result['seconds_per_step'] * 1e3:.1f} ms/step"
    )
    if result["seconds_of_features"]:
        seconds = duration(result["seconds_of_features"], 1)
        table.add_row("features", f"{seconds}, computed once")
    table.add_row("an epoch", f"{duration(result['seconds_per_epoch'], 1)} ({result['steps_per_epoch']} steps)")
    epochs = f"{result['epochs']} epochs"
    if result["unfreeze_epochs"]:
        table.add_row("an epoch of all layers", duration(result["seconds_unfrozen"], 1))
        epochs += f", then {result['unfreeze_epochs']} of all layers"
    table.add_row("total", f"{duration(result['seconds_total'], 1)} ({epochs})")
    for line in result["advice"]:
        table.add_row("advice", line)
    console = Console(soft_wrap=True, highlight=False)
    console.print(table)
    _show_options(result, console)


def _show_options(result: dict[str, Any], console: Console) -> None:
    rows, budget = result["options"], result["budget"]
    if not rows:
        console.print(f"no settings that were tried fit into {budget}: use fewer images or a longer --max-time")
        return
    table = Table("what fits", "add to the command", "epochs", "time", "memory", title_justify="left")
    table.title = f"settings that fit {budget}"
    for row in rows:
        memory = result["peak_memory_bytes"] if row["memory"] is None else row["memory"]
        cells = (row["what"], row["flags"], f"{row['epochs']:g}", duration(row["seconds"], 1))
        table.add_row(*map(markup, cells), f"{memory / 2**20:,.0f} MiB")
    console.print(table)
