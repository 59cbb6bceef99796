"""Compares the user's own runs: a table of their results and of settings that differ, and plots."""

import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from convmixer.errors import RequestError
from convmixer.files import write_atomic
from convmixer.results.fonts import as_drawn
from convmixer.results.page import figure, html_page, html_table
from convmixer.results.runs import RunSummary, labels_of, read_run
from convmixer.results.statistics import wilson
from convmixer.results.study_plots import draw, legend, standalone, style_of
from convmixer.text import duration, markup, plain_value, shortened
from convmixer.text import html as escape_html

MOST, DRAWN = 200, 12  # runs in the table, and in the pictures
HEADS = ("run", "test top-1 %", "val top-1 %", "epochs", "parameters", "time", "images/s", "differs in")


def compare_runs(paths: Sequence[Path], out: Path | None = None) -> dict[str, Any]:
    """Print a table of runs, the most accurate first, and write a page with it and with pictures.

    Args:
        paths: Run folders, finished or not.
        out: Folder of the page and the pictures; None: `comparison` in the current folder.

    Returns:
        "page", "pictures", "differs" (names of settings that are not the same in all runs), "notes", and "runs", a
        list of dicts with "run", "settings" (those that differ), "test_top1", "ci95", "val_top1", "epochs",
        "parameters", "seconds", "images_per_second" and "finished".

    Raises:
        RequestError: A folder cannot be read or is named twice, or there are fewer than two folders.
    """
    folders = [path.resolve() for path in paths]
    twice = next((path for path in paths if folders.count(path.resolve()) > 1), None)
    if twice is not None or not 2 <= len(paths) <= MOST:
        why = f"{twice} is named twice" if twice else f"compare takes 2 to {MOST} runs, not {len(paths)}"
        raise RequestError(why)
    runs = [read_run(path, label) for path, label in zip(paths, labels_of(folders), strict=True)]
    runs.sort(key=lambda run: -1 if (top := _accuracy(run)) is None else top, reverse=True)
    table = _Comparison(runs)
    folder = out or Path("comparison")
    pictures = table.pictures()
    for name, (_, svg) in pictures.items():
        write_atomic(folder / f"{name}.svg", standalone(svg).encode())
    write_atomic(folder / "comparison.html", table.page(pictures).encode(errors="replace"))
    table.print()
    print(f"page     {folder / 'comparison.html'}")
    return {
        "page": str(folder / "comparison.html"),
        "pictures": [str(folder / f"{name}.svg") for name in pictures],
        "differs": table.differs,
        "notes": table.notes,
        "runs": [table.entry(run) for run in runs],
    }


def _accuracy(run: RunSummary) -> float | None:
    return run.val_top1 if run.test_top1 is None else run.test_top1


class _Comparison:
    """The table and plots of some runs."""

    def __init__(self, runs: Sequence[RunSummary]) -> None:
        self.runs = runs
        names = dict.fromkeys(name for run in runs for name in run.settings)
        self.differs = [name for name in names if len({plain_value(run.settings.get(name)) for run in runs}) > 1]
        self.notes = self._notes()

    def _notes(self) -> list[str]:
        """Return notes on why the accuracies are hard to compare, if they are."""
        notes = []
        if len({run.data for run in self.runs}) > 1:
            notes.append("The runs are of different data: their accuracies cannot be compared.")
        best = [interval for run in self.runs if (interval := _interval(run))][:2]
        if len(best) == 2 and best[0][0] <= best[1][1]:
            few = "The intervals of the first two overlap: so few test images may not tell them apart."
            notes.append(f"{few} Train both with other seeds, or as a study (docs/studies.md).")
        unfinished = [run.label for run in self.runs if not run.finished]
        if unfinished:
            notes.append(f"Not finished, so without a test accuracy: {', '.join(unfinished)}.")
        if len(self.runs) > DRAWN:
            notes.append(f"The pictures show the first {DRAWN} of {len(self.runs)} runs.")
        return notes

    def entry(self, run: RunSummary) -> dict[str, Any]:
        """Return a run as plain JSON types."""
        keys = ("test_top1", "val_top1", "epochs", "parameters", "seconds", "images_per_second", "finished")
        settings = {name: run.settings.get(name) for name in self.differs}
        return {"run": str(run.path), "settings": settings, "ci95": _interval(run)} | {
            key: getattr(run, key) for key in keys
        }

    def cells(self, run: RunSummary) -> list[str]:
        """Return a row of the table, in the order of HEADS."""
        interval = _interval(run)
        test = "–" if run.test_top1 is None else f"{run.test_top1:.2f}"
        speed = run.images_per_second
        return [
            shortened(run.label, 40),
            test + (f" ({interval[0]:.2f} to {interval[1]:.2f})" if interval else ""),
            "–" if run.val_top1 is None else f"{run.val_top1:.2f}",
            f"{run.epochs:g}",
            "–" if run.parameters is None else f"{run.parameters:,}",
            "–" if run.seconds is None else duration(run.seconds),
            "–" if speed is None else f"{speed:,.0f}",
            shortened(self.own(run) or "nothing", 300),
        ]

    def own(self, run: RunSummary) -> str:
        """Return the settings of a run that are not the same in all runs, as a text."""
        return ", ".join(f"{name} {plain_value(run.settings[name])}" for name in self.differs if name in run.settings)

    def print(self) -> None:
        """Show the table on the terminal."""
        from rich.console import Console
        from rich.table import Column, Table

        console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
        table = Table(*(Column(head, overflow="fold") for head in HEADS), box=None, pad_edge=False)
        for run in self.runs:
            table.add_row(*map(markup, self.cells(run)))
        console.print(table)
        for note in self.notes:
            console.print(f"note     {markup(note)}", soft_wrap=True)

    def page(self, pictures: dict[str, tuple[str, str]]) -> str:
        """Return the page."""
        notes = "".join(f'<p class="warning">{escape_html(note)}</p>' for note in self.notes)
        charts = "".join(figure(title, svg) for title, svg in pictures.values())
        rows = [self.cells(run) for run in self.runs]
        lead = "Test top-1 with its 95% Wilson interval. Settings not named are the same in all runs."
        return html_page(
            "Comparison of runs",
            f'<header><h1>Comparison of {len(self.runs)} runs</h1><p class="lead">{lead}</p>{notes}</header>'
            f"<section>{html_table(HEADS, rows, 'arms runs')}</section>"
            f'<section><h2>Pictures</h2><div class="grid">{charts}</div></section>',
        )

    def pictures(self) -> dict[str, tuple[str, str]]:
        """Return name -> (title, SVG in the page's colours) of every picture for which the runs have numbers."""
        shown, drawn = self.runs[:DRAWN], {}
        labels = [as_drawn(run.label, 28) for run in shown]
        tall = 3.6 + 0.2 * ((len(shown) + 1) // 2)  # with room for the legend
        plans = (
            ("accuracy", "Accuracy on the test split, with its 95% interval", 1.2 + 0.34 * len(shown), _accuracies),
            ("val-top1", "Validation accuracy over training time", tall, _curves("top1", "validation top-1, %")),
            ("train-loss", "Training loss over training time", tall, _curves("train_loss", "training loss")),
        )
        for name, title, height, plot in plans:
            svg = draw(name, height, functools.partial(plot, shown, labels), labels)
            if svg:
                drawn[name] = (title, svg)
        return drawn


def _interval(run: RunSummary) -> tuple[float, float] | None:
    if run.test_top1 is None or not run.test_n or not 0 <= run.test_top1 <= 100:
        return None
    low, high = wilson(round(run.test_top1 * run.test_n / 100), run.test_n)
    return 100 * low, 100 * high


def _accuracies(runs: Sequence[RunSummary], labels: Sequence[str], axes: Axes) -> bool:
    measured = [(i, run, top) for i, run in enumerate(runs) if (top := run.test_top1) is not None]
    for place, (i, run, top) in enumerate(reversed(measured)):
        interval = _interval(run) or (top, top)
        style = style_of(i) | {"linestyle": "none"}
        axes.errorbar(top, place, xerr=[[top - interval[0]], [interval[1] - top]], capsize=3, ms=7, **style)
    names = [labels[i] for i, _, _ in reversed(measured)]
    axes.set_yticks(range(len(measured)), names)
    axes.set(xlabel="test top-1, %", ylim=(-0.6, len(measured) - 0.4))
    axes.grid(axis="y", visible=False)
    return bool(measured)


def _curves(key: str, what: str) -> Any:
    def plot(runs: Sequence[RunSummary], labels: Sequence[str], axes: Axes) -> bool:
        lines = 0
        for i, run in enumerate(runs):
            points = [(row["seconds"] / 60, row[key]) for row in run.rows if key in row and "seconds" in row]
            if points:
                axes.plot(*zip(*points, strict=True), label=labels[i], ms=4, **style_of(i))
                lines += 1
        axes.set(xlabel="minutes", ylabel=what)
        axes.set_xlim(left=0)  # reading the data counts too
        return legend(axes, lines)

    return plot
