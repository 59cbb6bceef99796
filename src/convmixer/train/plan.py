"""Estimates what a run would cost. Parameters and MACs are counted, memory and time are measured with a few steps.

Memory on the CPU is measured in a fresh process that takes three steps: its peak resident size minus its size before
the first step, when libraries, data and model are loaded. On a GPU it is the peak that CUDA reports.
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
from convmixer.train import options
from convmixer.train.budget import seconds_per_image
from convmixer.train.engine import measure_speed
from convmixer.train.setup import prepare

EVENING = "3h"  # the time for which `plan` proposes settings if no max_time is given


def plan(data: str, config: Config) -> dict[str, Any]:
    """Return and print what training with these settings costs on this machine.

    Args:
        data: The data argument.
        config: Resolved settings.

    Returns:
        Among others: `parameters`; `macs`, multiply-accumulates of one image's forward pass; `peak_memory_bytes` of
        training, without the loaded libraries, data and model; `seconds_per_epoch` with validation; `seconds_total`;
        `options`, up to three settings that fit into `budget` (max_time, else 3 hours), each with `what`, `flags`,
        `epochs`, `seconds` and `memory`.

    Raises:
        RequestError: The settings or the data cannot be used.
    """
    job = prepare(data, config)
    module = job.module(config.epochs or 1)
    loader = job.train_loader()
    step = statistics.median(measure_speed(module, loader))
    per_image = seconds_per_image(module, job) if job.data.val or job.data.test else 0.0
    val, test = (len(split) if (split := getattr(job.data, name)) else 0 for name in ("val", "test"))
    per_epoch = job.steps_per_epoch * step + val * per_image
    epochs = config.epochs or int(parse_seconds(str(config.max_time)) / per_epoch)  # as many as fit
    once, budget = test * per_image, config.max_time or EVENING
    memory, others = options.measure(data, config, job, per_epoch * epochs + once, parse_seconds(budget))
    first = options.fewer_epochs(per_epoch, once, epochs, parse_seconds(budget), budget)
    result = {
        "model": job.build[0],
        "parameters": sum(p.numel() for p in job.model.parameters()),
        "macs": macs(job.build, job.preprocessing.img_size, job.preprocessing.in_chans, len(job.data.classes)),
        "peak_memory_bytes": memory,
        "seconds_per_epoch": per_epoch,
        "seconds_total": per_epoch * epochs + once,
        "seconds_per_step": step,
        "images_per_second": job.batch_size / step,
        "batch_size": job.batch_size,
        "epochs": epochs,
        "steps_per_epoch": job.steps_per_epoch,
        "kernels": job.kernels,
        "device": job.device.type,
        "precision": job.config.precision,
    }
    result["budget"] = budget
    result["options"] = [options.plain(option) for option in ([first] if first else []) + others][: options.MOST]
    summary = summarise(job.data)
    result["data"] = summary
    show(summary, Console(soft_wrap=True, highlight=False))
    result["advice"] = _advice(result, config)
    _show(result, data)
    return result


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
        advice.append(
            f"max_time {config.max_time} will cut it to about {budget / result['seconds_per_epoch']:.1f} epochs"
        )
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
    table.add_row("an epoch", f"{duration(result['seconds_per_epoch'], 1)} ({result['steps_per_epoch']} steps)")
    table.add_row("total", f"{duration(result['seconds_total'], 1)} ({result['epochs']} epochs)")
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
