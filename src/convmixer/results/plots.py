"""Pictures of a single run, made only from numbers: curves, grids of images, filters and kernels.

Charts have a white background and dark text. Pictures of filters and kernels have a transparent background and grey
text, so they are legible on light and on dark pages.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # works without a display

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure

from convmixer.files import atomic_file
from convmixer.results.fonts import as_drawn, drawing, told_apart

BLUE, ORANGE, GREY = "#1f5fa8", "#c8551b", "#6b6b6b"
BOTH = "#7b7f86"  # text with a contrast of 4 to 1 on white and on near-black
_STYLE: dict[Any, Any] = {
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "axes.facecolor": "white",
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "grid.color": "#e3e3e3",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 10,
    "legend.frameon": False,
}
_BARE: dict[Any, Any] = _STYLE | {
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "axes.facecolor": "none",
    "text.color": BOTH,
    "axes.labelcolor": BOTH,
    "axes.edgecolor": BOTH,
}
NUMBERED = 15  # most classes with numbers in the cells of a confusion matrix
NAMED = 60  # most classes with all names
CHOSEN = 40  # classes shown if there are more than NAMED
PAIRS = 20  # confused pairs listed at the side
KERNEL_PIXELS = 10  # of a picture, for each weight of a kernel


def curves(rows: Sequence[Mapping[str, Any]], path: Path, steps: Sequence[Mapping[str, Any]] = ()) -> None:
    """Draw loss, accuracy, learning rate and speed over the epochs, and over the steps if they are given.

    Args:
        rows: One mapping per epoch with epoch, lr, train_loss and, if measured, val_loss, top1, top5 (percent).
        path: The PNG to write.
        steps: Mappings with step, train_loss, lr, images_per_second, as `train` writes them.
    """
    length = rows[-1]["step"] / rows[-1]["epoch"] if steps else 1  # steps of an epoch
    more = steps if len(steps) > len(rows) else []  # with one step an epoch, they are the epochs' points again
    fine = [{**row, "epoch": row["step"] / length} for row in more]
    with plt.rc_context(_STYLE):
        panels = plt.subplots(2, 2, figsize=(10, 6.4), layout="constrained")
        figure, (loss, accuracy, rate, speed) = panels[0], panels[1].flat
        _line(loss, fine, "train_loss", "train, by step", "#eab892")
        _line(rate, fine, "lr", "by step", GREY)
        _line(speed, fine, "images_per_second", "by step", "#b9c7da")
        _line(speed, rows, "images_per_second", "whole epoch", BLUE)
        _line(loss, rows, "train_loss", "train, augmented", ORANGE)
        _line(loss, rows, "val_loss", "validation", BLUE)
        _line(accuracy, rows, "top1", "validation top-1", BLUE)
        if any((row.get("top5") or 100) < 100 for row in rows):  # always 100 with five classes
            _line(accuracy, rows, "top5", "validation top-5", GREY)
        _line(rate, rows, "lr", "at the end of the epoch", BLUE)
        titles = ("Loss", "Accuracy, %", "Learning rate", "Training, images/s")
        for axes, title in zip((loss, accuracy, rate, speed), titles, strict=True):
            axes.set(title=title, xlabel="epoch", xlim=(0, 1.03 * max(1, rows[-1]["epoch"])))
            axes.xaxis.get_major_locator().set_params(integer=True)
            if axes.lines:
                axes.legend()
        if not accuracy.lines:
            accuracy.text(0.5, 0.5, "no validation split", ha="center", color=GREY, transform=accuracy.transAxes)
        for axes in (rate, speed):
            axes.set_ylim(0, (1.08 * axes.dataLim.y1 or 1) if axes.lines else 1)
        save(figure, path)


def learning_rates(
    rates: np.ndarray, losses: np.ndarray, smoothed: np.ndarray, chosen: float | None, path: Path
) -> None:
    """Draw the loss of steps against their learning rate.

    Args:
        rates: (N,), growing.
        losses: (N,), of each step.
        smoothed: (N,).
        chosen: The rate to mark; None: none.
        path: The PNG to write.
    """
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
        axes.semilogx(rates, losses, ".", color=GREY, ms=3, label="of each step")
        axes.semilogx(rates, smoothed, color=BLUE, label="smoothed")
        if chosen is not None:
            axes.axvline(chosen, color=ORANGE, ls="--", label=f"steepest fall: lr {chosen:g}")
        low, first = float(smoothed.min()), float(smoothed[0])
        span = max(first - low, 0.1 * abs(first))
        axes.set(title="Loss by learning rate", xlabel="learning rate", ylabel="training loss")
        axes.set_ylim(low - 0.2 * span, first + 0.6 * span)  # leaves out the part where the loss diverges
        axes.legend(loc="lower left")
        save(figure, path)


def image_grid(images: np.ndarray, titles: Sequence[str], path: Path, title: str, columns: int = 8) -> None:
    """Draw images in a grid, each with its title above.

    Args:
        images: (N, H, W) grey or (N, H, W, 3) colour, 0 to 1.
        titles: N short texts.
        path: The PNG to write.
        title: The heading.
        columns: Images per row.
    """
    height, width = images.shape[1:3]
    gap = max(1, round(0.06 * width))
    above = max(1, round(0.22 * height))  # for the title
    canvas, corners = _mosaic(images, columns, (above, gap))
    with drawing(_STYLE, map(as_drawn, titles)):
        size = (columns * 1.25, len(corners) / columns * 1.45 + 0.5)
        figure, axes = plt.subplots(figsize=size, layout="constrained")
        axes.imshow(canvas, interpolation="nearest")
        axes.axis("off")
        for (top, left), text in zip(corners, titles, strict=False):
            where = left + (width - 1) / 2, top - 0.5 - 0.04 * height
            axes.text(*where, as_drawn(text), fontsize=8, ha="center", va="bottom")
        figure.suptitle(title, fontsize=11)
        save(figure, path)


def _mosaic(images: np.ndarray, columns: int, gap: tuple[int, int]) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Join images into one picture. matplotlib draws one picture much faster than many.

    Args:
        images: (N, H, W) grey or (N, H, W, 3) colour, 0 to 1.
        columns: Images per row.
        gap: Transparent pixels above and left of each image.

    Returns:
        The picture, (rows, columns, 4), and for each place, also those left empty, its top and left.
    """
    height, width = images.shape[1:3]
    places = [divmod(i, columns) for i in range(math.ceil(len(images) / columns) * columns)]
    corners = [(y * (height + gap[0]) + gap[0], x * (width + gap[1]) + gap[1]) for y, x in places]
    canvas = np.zeros((corners[-1][0] + height, corners[-1][1] + width, 4), np.float32)
    for image, (top, left) in zip(images, corners, strict=False):
        part = canvas[top : top + height, left : left + width]
        part[..., :3] = image if image.ndim == 3 else image[..., None]
        part[..., 3] = 1
    return canvas, corners


def patch_filters(weight: np.ndarray, path: Path, limit: int = 64) -> None:
    """Draw the filters of the first convolution (a patch embedding) as small images, each scaled to its own range.

    Args:
        weight: (dim, channels, p, p); three channels are shown in colour, others as their mean.
        path: The PNG to write.
        limit: Filters to show: those with the largest norm.
    """
    order = np.argsort(-np.linalg.norm(weight.reshape(len(weight), -1), axis=1), kind="stable")[:limit]
    chosen = weight[order].transpose(0, 2, 3, 1)
    chosen = chosen if chosen.shape[3] == 3 else chosen.mean(3)
    axis = tuple(range(1, chosen.ndim))
    low, high = chosen.min(axis, keepdims=True), chosen.max(axis, keepdims=True)
    if weight.shape[2] > 1:
        chosen = (chosen - low) / np.maximum(high - low, 1e-12)
    else:  # one pixel has no range: use the range of all filters
        chosen = (chosen - chosen.min()) / max(float(chosen.max() - chosen.min()), 1e-12)
    size = "x".join(map(str, weight.shape[2:]))
    _tiles(chosen, f"First convolution: {len(order)} of {len(weight)} filters ({size}), largest first", path)


def depthwise_kernels(layers: Mapping[str, np.ndarray], path: Path, per_layer: int = 12, most: int = 12) -> None:
    """Draw depthwise kernels, one row per layer from the first to the last; red is positive, blue negative.

    Args:
        layers: Name of the layer -> (dim, k, k).
        path: The PNG to write.
        per_layer: Kernels per layer, spread evenly over the channels.
        most: Layers to show, spread evenly over the depth.
    """
    names = list(layers)
    shown = [names[i] for i in np.unique(np.linspace(0, len(names) - 1, min(most, len(names))).astype(int))]
    with plt.rc_context(_BARE):
        size = (per_layer * 0.72 + 1, len(shown) * 0.76 + 0.6)
        figure, grid = plt.subplots(len(shown), figsize=size, layout="constrained", squeeze=False)
        for axes, name in zip(grid.flat, shown, strict=True):
            kernels = layers[name][np.linspace(0, len(layers[name]) - 1, per_layer).astype(int)]
            bound = np.abs(kernels).max((1, 2), keepdims=True)
            colours = plt.get_cmap("RdBu_r")(0.5 + kernels / np.where(bound, bound, 1) / 2)[..., :3]  # (n, k, k, 3)
            canvas = _of_weights(colours, per_layer, above=False)
            axes.imshow(canvas, interpolation="nearest")
            axes.axis("off")
            axes.text(0, len(canvas) / 2, name, ha="right", va="center", fontsize=8)
        figure.suptitle("Depthwise kernels by layer (red positive, blue negative)", fontsize=11)
        save(figure, path)


def kernel_growth(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw how the depthwise kernels of each layer grow over training, from the first layer (pale) to the last.

    Args:
        rows: One mapping per epoch with "epoch" and "layers": name -> {"norm", "radius" in patches}.
        path: The PNG to write.
    """
    epochs = [row["epoch"] for row in rows]
    names = list(rows[0]["layers"])
    colours = plt.get_cmap("viridis_r")(np.linspace(0.1, 1, len(names)))
    titles = {"norm": "Norm of a kernel", "radius": "Radius of its weight, patches"}
    with plt.rc_context(_STYLE):
        figure, both = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
        for axes, key in zip(both, titles, strict=True):
            for name, colour in zip(names, colours, strict=True):
                values = [row["layers"][name][key] for row in rows]
                axes.plot(epochs, values, color=colour, label=name, marker="o" if len(rows) < 30 else None, ms=3)
            axes.set(title=titles[key], xlabel="epoch")
            axes.xaxis.get_major_locator().set_params(integer=True)
        figure.legend(*both[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
        figure.suptitle("Depthwise kernels over training", fontsize=11)
        save(figure, path)


def receptive_field(fields: Mapping[str, np.ndarray], path: Path) -> None:
    """Draw how strongly each pixel affects the features in the middle, on a logarithmic scale.

    Args:
        fields: Name -> (H, W), with a maximum of 1.
        path: The PNG to write.
    """
    with plt.rc_context(_STYLE):
        size = (3.1 * len(fields) + 0.8, 3.5)
        figure, row = plt.subplots(1, len(fields), figsize=size, layout="constrained", squeeze=False)
        for axes, (name, field) in zip(row[0], fields.items(), strict=True):
            shown = axes.imshow(np.log10(np.maximum(field, 1e-4)), cmap="magma", vmin=-4, vmax=0)
            axes.set(title=name, xticks=[], yticks=[])
            axes.grid(False)
        bar = figure.colorbar(shown, ax=row[0].tolist(), ticks=[-4, -3, -2, -1, 0], shrink=0.85)
        bar.ax.set_yticklabels(["≤ 0.0001", "0.001", "0.01", "0.1", "1"])
        figure.suptitle("Effective receptive field of the middle patch (gradient, share of its largest)", fontsize=11)
        save(figure, path)


def explanation(
    photo: np.ndarray,
    framed: np.ndarray,
    seen: np.ndarray,
    evidence: np.ndarray | None,
    classes: Sequence[str],
    shares: Sequence[float],
    path: Path,
) -> None:
    """Draw the photo, the evidence for the likeliest class over it, what the network saw, and the likeliest classes.

    Args:
        photo: (H, W) grey or (H, W, 3), 0 to 1.
        framed: The same photo cut to what the network saw, square, in any resolution.
        seen: (S, S) or (S, S, 3), the image that the network got.
        evidence: (h, w), what each patch adds to the logit of the likeliest class; None: no panel for it.
        classes: Names in descending order of probability.
        shares: Their probabilities.
        path: The PNG to write.
    """
    rows: list[Any] = (
        [["photo", "seen"], ["bars", "bars"]] if evidence is None else [["photo", "evidence"], ["seen", "bars"]]
    )
    with drawing(_STYLE, (as_drawn(name, 22) for name in classes)):
        figure, panels = plt.subplot_mosaic(rows, figsize=(8.2, 7.4), layout="constrained")
        _picture(panels["photo"], photo, "The photo")
        _picture(panels["seen"], seen, f"Network input: {seen.shape[1]} x {seen.shape[0]} pixels")
        if evidence is not None:
            _overlay(figure, panels["evidence"], framed, evidence, len(seen), classes[0])
        _probabilities(panels["bars"], classes, shares)
        save(figure, path)


def _picture(axes: Axes, pixels: np.ndarray, title: str) -> None:
    axes.imshow(pixels, cmap="gray", vmin=0, vmax=1, interpolation="nearest" if max(pixels.shape) < 200 else None)
    axes.set_title(title)
    axes.axis("off")


def _overlay(figure: Figure, axes: Axes, framed: np.ndarray, evidence: np.ndarray, side: int, name: str) -> None:
    """Draw the evidence in colour over a pale grey photo; where the evidence is weak, the photo shows through."""
    grey = framed if framed.ndim == 2 else framed @ np.array([0.299, 0.587, 0.114])
    _picture(axes, 0.35 + 0.65 * grey, f"Evidence for {as_drawn(name, 18)}")
    bound = float(np.abs(evidence).max()) or 1.0
    right, bottom = (side // n * n / side * len(framed) - 0.5 for n in evidence.shape[::-1])  # whole patches
    shown = axes.imshow(
        evidence,
        cmap="RdBu_r",
        vmin=-bound,
        vmax=bound,
        alpha=0.8 * np.sqrt(np.abs(evidence) / bound),
        extent=(-0.5, right, bottom, -0.5),
        interpolation="nearest",
    )
    bar = figure.colorbar(ScalarMappable(shown.norm, shown.cmap), ax=axes, shrink=0.85)  # without the alpha
    bar.set_label("red: for it, blue: against it")


def _probabilities(axes: Axes, classes: Sequence[str], shares: Sequence[float]) -> None:
    axes.barh(range(len(classes)), [100 * share for share in shares], color=BLUE, height=0.6)
    axes.set(title="Probability, %", xlim=(0, 118), ylim=(max(len(classes), 4) - 0.4, -0.6))
    axes.set_yticks(range(len(classes)), [as_drawn(name, 22) for name in classes])
    axes.grid(False, axis="y")
    for number, share in enumerate(shares):
        axes.text(100 * share + 1.5, number, f"{100 * share:.1f}", va="center", fontsize=9)


def confusion_matrix(counts: np.ndarray, classes: Sequence[str], path: Path) -> None:
    """Draw the confusion matrix, next to a list of the pairs confused most.

    Up to 15 classes keep their order, and the cells hold numbers. If there are more, classes that are often confused
    with each other are put side by side. If there are more than 60, only the 40 that are confused most are shown.

    Args:
        counts: (classes, classes) numbers of images, row: true, column: predicted.
        classes: Names.
        path: The PNG to write.
    """
    share = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)  # percent of each true class
    pairs = confused_pairs(counts)
    shown = np.arange(len(classes)) if len(classes) <= NAMED else _confused_most(pairs, len(classes))
    if len(shown) > NUMBERED:
        shown = shown[_alike(share[np.ix_(shown, shown)])]
    names, longer = told_apart(classes), told_apart(classes, 18)  # short for the axes, longer for the pairs
    listed = [(longer[i], longer[j], int(counts[i, j]), share[i, j]) for i, j in pairs[:PAIRS]]
    side = min(12.0, 3.4 + 0.24 * len(shown))
    with drawing(_STYLE | {"axes.grid": False}, (as_drawn(name) for name in classes)):
        figure, (matrix, beside) = plt.subplots(
            1, 2, figsize=(side + 5.8, side), width_ratios=(side + 0.8, 5.0), layout="constrained"
        )
        part = np.ix_(shown, shown)
        _matrix(figure, matrix, counts[part], share[part], [names[int(i)] for i in shown])
        of = f"{len(shown)} of {len(classes):,} classes, those confused most; " if len(shown) < len(classes) else ""
        matrix.set_title(f"Confusion matrix: {of}{int(counts.sum()):,} images")
        _pairs(beside, listed)
        save(figure, path)


def confused_pairs(counts: np.ndarray) -> list[tuple[int, int]]:
    """Return the (true, predicted) classes that are confused at all, most images first.

    Args:
        counts: (classes, classes) numbers of images, row: true, column: predicted.
    """
    wrong = counts - np.diag(np.diag(counts))
    rows, columns = np.nonzero(wrong)
    order = np.argsort(-wrong[rows, columns], kind="stable")
    return [(int(rows[k]), int(columns[k])) for k in order]


def _confused_most(pairs: Sequence[tuple[int, int]], n: int) -> np.ndarray:
    """Return the numbers of the classes in the first pairs, filled up with the first classes."""
    found = dict.fromkeys(i for pair in pairs for i in pair)
    return np.array(list(dict.fromkeys([*found, *range(n)]))[:CHOSEN])


def _alike(share: np.ndarray) -> np.ndarray:
    """Return an order of the classes that puts those confused with each other side by side."""
    from scipy.cluster.hierarchy import leaves_list, linkage

    both = share + share.T
    apart = (both.max() - both)[np.triu_indices(len(both), 1)]
    order: np.ndarray = leaves_list(linkage(apart, "average", optimal_ordering=True))
    return order


def _matrix(figure: Figure, axes: Axes, counts: np.ndarray, share: np.ndarray, classes: Sequence[str]) -> None:
    n = len(classes)
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=100)
    size = 10 if n <= NUMBERED else 8 if n <= 30 else 7
    axes.set_xticks(range(n), classes, rotation=90, fontsize=size)
    axes.set_yticks(range(n), classes, fontsize=size)
    axes.set(xlabel="predicted", ylabel="true")
    for row, column in np.ndindex(n, n) if n <= NUMBERED else ():
        color = "white" if share[row, column] > 50 else "black"
        axes.text(column, row, str(int(counts[row, column])), ha="center", va="center", color=color, fontsize=8)
    figure.colorbar(image, ax=axes, label="% of the true class", shrink=0.8)


def _pairs(axes: Axes, pairs: Sequence[tuple[str, str, int, float]]) -> None:
    """Draw bars of the pairs confused most: true class, predicted class, images, percent of the true class."""
    if not pairs:
        axes.axis("off")
        axes.text(0.5, 0.5, "no image was misclassified", ha="center", va="center")
        return
    names = [f"{true} → {predicted}" for true, predicted, _, _ in pairs]
    axes.barh(range(len(pairs)), [n for _, _, n, _ in pairs], color=ORANGE, height=0.6)
    axes.set_yticks(range(len(pairs)), names, fontsize=8)
    for place, (_, _, n, percent) in enumerate(pairs):
        axes.text(n, place, f" {n} ({percent:.0f}%)", va="center", fontsize=8)
    axes.set_title("True → predicted, most images first", fontsize=10)
    axes.set(ylim=(max(len(pairs), 6) - 0.4, -0.6), xticks=[])
    axes.set_xlim(0, 1.45 * max(n for _, _, n, _ in pairs))
    for side in ("bottom", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0)


def _tiles(images: np.ndarray, title: str, path: Path) -> None:
    columns = min(16, len(images))
    rows = math.ceil(len(images) / columns)
    with plt.rc_context(_BARE):
        size = (max(5.5, columns * 0.6), rows * 0.6 + 0.5)
        figure, axes = plt.subplots(figsize=size, layout="constrained")
        axes.imshow(_of_weights(images, columns, above=True), interpolation="nearest")
        axes.axis("off")
        figure.suptitle(title, fontsize=11)
        save(figure, path)


def _of_weights(images: np.ndarray, columns: int, above: bool) -> np.ndarray:
    """Join pictures of a few weights each, enlarged, so that a gap can be narrower than a weight."""
    fine = images.repeat(KERNEL_PIXELS, 1).repeat(KERNEL_PIXELS, 2)
    gap = round(0.1 * fine.shape[1])
    return _mosaic(fine, columns, (gap if above else 0, gap))[0]


def _line(axes: Axes, rows: Sequence[Mapping[str, Any]], key: str, label: str, color: str) -> None:
    points = [(row["epoch"], row[key]) for row in rows if row.get(key) is not None]
    if points:
        axes.plot(
            *zip(*points, strict=True), label=label, color=color, marker="o" if len(points) < 30 else None, ms=3
        )


def save(figure: Figure, path: Path) -> None:
    """Write a figure as a picture, with the folder it goes to, and close it."""
    with atomic_file(path) as file:
        figure.savefig(file, dpi=130, format=path.suffix[1:] or "png")
    plt.close(figure)
