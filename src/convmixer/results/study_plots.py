"""Pictures of a study as SVG, legible on light and dark pages, in print, and for colour-blind readers.

Text and grid lines have colours that the page sets with CSS variables; `standalone` replaces them with fixed colours
on white, for separate files. The arms' colours are Okabe and Ito's (jfly.uni-koeln.de/color), and every arm also has
its own marker and line style.
"""

import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # works without a display

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from convmixer.results.fonts import drawing
from convmixer.results.plots import depthwise_kernels, patch_filters
from convmixer.results.study import StudyResults

INK, GRID = "#0a0b0c", "#d0d1d2"  # replaced by the page's own colours, see `_themed`
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", INK)
MARKERS, LINES = "osD^vPX*<>", ("-", "--", "-.", ":")
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "path",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.grid": True,
    "grid.color": GRID,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}
ALIKE = 1.1  # a cost that differs by less than this factor, such as matched parameters, is not plotted
UNITS = {
    "test_top1": "test top-1, percentage points",
    "kernel_structure": "correlation of neighbouring weights in a kernel",
    "train_images_per_second": "training, images/s",
    "infer_images_per_second": "inference, images/s",
}


def style_of(index: int) -> dict[str, Any]:
    """Return colour, marker and line style of the arm at that position in the study."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": LINES[(index // len(COLOURS)) % len(LINES)],
    }


def figures(results: StudyResults) -> dict[str, tuple[str, str]]:
    """Return name -> (title, themed SVG) of every picture for which the records have numbers."""
    drawn: dict[str, tuple[str, str]] = {}
    texts = [str(arm["label"]) for arm in results.plan["arms"].values()]

    def add(name: str, title: str, plot: Callable[[StudyResults, Axes], bool], height: float = 3.9) -> None:
        svg = draw(name, height, lambda axes: plot(results, axes), texts)
        if svg:
            drawn[name] = (title, svg)

    arms, claims = len(results.plan["arms"]), len(results.plan["claims"])
    tall = 3.6 + 0.2 * ((arms + 1) // 2)  # with room for the legend
    add("accuracy", "Test accuracy of every arm, with the 95% interval over seeds", _accuracy, 1.2 + 0.34 * arms)
    add("trials", "Validation accuracy of every trial; the chosen ones are filled", _trials, 1.2 + 0.34 * arms)
    add("verdicts", "Difference of every claim, with the 95% interval", _claims, 1.3 + 0.5 * claims)
    add("parameters", "Accuracy against parameters", _against("parameters", "parameters, millions", 1e6), tall)
    add(
        "macs",
        "Accuracy against multiply-accumulates",
        _against("macs", "MACs per image, millions", 1e6),
        tall,
    )
    add("time", "Accuracy against measured training time", _against("seconds", "minutes of a run", 60), tall)
    add("train-loss", "Training loss", _curves("train_loss", "training loss"), tall)
    add("val-top1", "Validation accuracy", _curves("top1", "validation top-1, %"), tall)
    return drawn


def draw(name: str, height: float, plot: Callable[[Axes], bool], texts: Sequence[str] = ()) -> str | None:
    """Return a picture as themed SVG, or None if there is nothing to draw.

    Args:
        name: Name of the picture, unique on its page.
        height: Height of the figure, inches.
        plot: Draws into the axes, and returns whether there was anything.
        texts: Names in the picture, in any script.
    """
    with drawing({**_STYLE, "svg.hashsalt": name}, texts):  # a fixed salt: equal numbers give equal files
        figure, axes = plt.subplots(figsize=(5.2, height), layout="constrained")
        svg = _themed(figure, name) if plot(axes) else None
        plt.close(figure)
    return svg


def standalone(svg: str) -> str:
    """Return a themed SVG with fixed colours on white, for a separate file."""
    fixed = svg.replace("var(--ink)", "#222222").replace("var(--grid)", "#dddddd")
    return re.sub(r"(<svg [^>]*>)", r'\1<rect width="100%" height="100%" fill="#ffffff"/>', fixed, count=1)


def draw_weights(weights: Path, folder: Path, arm: str) -> None:
    """Draw the first convolution and the depthwise kernels of saved weights, if there are any.

    Args:
        weights: A .safetensors file.
        folder: Where `<arm>-filters.png` and `<arm>-kernels.png` go; an existing one is kept.
        arm: The arm's name.
    """
    from safetensors.numpy import load_file

    if (folder / f"{arm}-filters.png").exists():
        return
    tensors = load_file(str(weights))
    first = next(
        (
            t
            for name, t in tensors.items()
            if t.ndim == 4 and t.shape[2] > 1 and not name.startswith(("blocks.", "layer"))
        ),
        None,
    )
    depthwise = {
        name.removesuffix(".weight"): t[:, 0].astype(np.float32)
        for name, t in sorted(tensors.items(), key=lambda item: _natural(item[0]))
        if t.ndim == 4 and t.shape[1] == 1 and t.shape[2] > 1 and name.startswith("blocks.")
    }
    if first is not None:
        patch_filters(first.astype(np.float32), folder / f"{arm}-filters.png")
    if depthwise:
        shown = {f"block {name.split('.')[1]}": kernels for name, kernels in depthwise.items()}
        depthwise_kernels(shown, folder / f"{arm}-kernels.png")


def _natural(name: str) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _themed(figure: Figure, name: str) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg ") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)  # holds web addresses; nothing needs it
    svg = re.sub(r'(<svg [^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg [^>]*?) height="[^"]*"', r"\1", svg, count=1)
    for mark in (' id="', "url(#", 'href="#'):  # all pictures share one page, so ids must differ
        svg = svg.replace(mark, f"{mark}{name}-")
    return svg.replace(INK, "var(--ink)").replace(GRID, "var(--grid)")


def _accuracy(results: StudyResults, axes: Axes) -> bool:
    rows = [(i, row) for i, row in enumerate(results.rows()) if row.test]
    rows.sort(key=lambda item: item[1].test.mean if item[1].test else 0)
    for place, (i, row) in enumerate(rows):
        style = style_of(i) | {"linestyle": "none"}
        values = list(results.values(row.name, "test_top1").values())
        axes.plot(values, [place] * len(values), marker="|", color=style["color"], linestyle="none", ms=9, alpha=0.7)
        assert row.test
        spread = row.test.half_width if row.test.n > 1 else 0
        axes.errorbar(row.test.mean, place, xerr=spread, capsize=3, ms=6, **style)
    axes.set_yticks(range(len(rows)), [row.label for _, row in rows])
    axes.set(xlabel="test top-1, %", ylim=(-0.6, len(rows) - 0.4))
    axes.grid(axis="y", visible=False)
    return bool(rows)


def _trials(results: StudyResults, axes: Axes) -> bool:
    if not any(results.tried(arm) for arm in results.plan["arms"]):
        return False
    for place, arm in enumerate(results.plan["arms"]):
        style = style_of(place) | {"linestyle": "none"}
        for trial, value in results.tried(arm).items():
            if value is not None:
                chosen = trial == results.chosen(arm)
                axes.plot(value, place, ms=7, markerfacecolor=style["color"] if chosen else "none", **style)
    labels = [arm["label"] for arm in results.plan["arms"].values()]
    axes.set_yticks(range(len(labels)), labels)
    axes.set(xlabel="validation top-1, %", ylim=(-0.6, len(labels) - 0.4))
    axes.grid(axis="y", visible=False)
    return True


def _claims(results: StudyResults, axes: Axes) -> bool:
    claims = [c for c in results.verdicts() if c["measure"] == "test_top1" and c["n"]]
    labels = {name: arm["label"] for name, arm in results.plan["arms"].items()}
    look = {"supported": ("o", "#0072B2"), "contradicted": ("X", "#D55E00"), "not decided": ("s", INK)}
    for place, claim in enumerate(reversed(claims)):
        marker, colour = look[claim["verdict"]]
        spread = claim["high"] - claim["difference"] if claim["high"] is not None else 0
        axes.errorbar(claim["difference"], place, xerr=spread, fmt=marker, color=colour, capsize=3, ms=7)
        edge = claim["matters"]
        marks = {"better": [edge], "at-least": [-edge], "same": [-edge, edge]}[claim["relation"]]
        axes.plot(marks, [place] * len(marks), "|", color=INK, ms=16, mew=1.5)
    pairs = [f"{labels[c['first']]}\n− {labels[c['second']]}" for c in reversed(claims)]
    axes.set_yticks(range(len(claims)), pairs, fontsize=8)
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set(xlabel="test top-1, points; bar: what matters", ylim=(-0.7, len(claims) - 0.3))
    axes.grid(axis="y", visible=False)
    for name, (marker, colour) in look.items():
        axes.plot([], [], marker, color=colour, label=name)
    return legend(axes, len(claims), columns=3)


def _against(key: str, label: str, unit: float) -> Callable[[StudyResults, Axes], bool]:
    def draw(results: StudyResults, axes: Axes) -> bool:
        costs = [getattr(row, key) for row in results.rows()]
        if key != "seconds" and max(costs) < ALIKE * min(costs):
            return False
        points = 0
        for i, row in enumerate(results.rows()):
            x = getattr(row, key)
            if row.test:
                spread = row.test.half_width if row.test.n > 1 else 0
                style = style_of(i) | {"linestyle": "none"}
                axes.errorbar(x / unit, row.test.mean, yerr=spread, capsize=3, ms=8, label=row.label, **style)
                points += 1
        axes.set(xlabel=label, ylabel="test top-1, %")
        axes.set_xlim(0, 1.1 * axes.dataLim.x1 if points else 1)
        return legend(axes, points)

    return draw


def _curves(key: str, label: str) -> Callable[[StudyResults, Axes], bool]:
    def draw(results: StudyResults, axes: Axes) -> bool:
        lines = 0
        for i, (name, arm) in enumerate(results.plan["arms"].items()):
            epochs, values = results.curve(name, key)
            if not epochs:
                continue
            style = style_of(i)
            axes.plot(epochs, [np.mean(v) for v in values], label=arm["label"], ms=4, **style)
            low, high = [min(v) for v in values], [max(v) for v in values]
            axes.fill_between(epochs, low, high, color=style["color"], alpha=0.2, linewidth=0)
            lines += 1
        axes.set(xlabel="epoch (line: mean, band: all seeds)", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        return legend(axes, lines)

    return draw


def legend(axes: Axes, entries: int, columns: int = 2) -> bool:
    """Put the legend below the axes if there are entries, and return whether there are."""
    if entries:
        handles: Sequence[Any] = axes.get_legend_handles_labels()[0]
        figure = axes.figure
        figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=9)
    return bool(entries)
