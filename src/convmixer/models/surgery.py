"""Model surgery: changes the patch size, kernel size, classes or image channels of trained ConvMixer weights.

As much as possible of the weights is kept, so that fine-tuning starts near the old model. `convert` also writes
checkpoints of other programs in our format.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from convmixer.errors import RequestError
from convmixer.models.convmixer import ConvMixer
from convmixer.models.registry import args_of, free_name
from convmixer.models.weights import LoadedModel, adapt_channels, class_names, load_model, save_changed
from convmixer.preprocess import Preprocessing
from convmixer.run_folder import is_run

State = dict[str, torch.Tensor]


def convert(
    source: str | Path,
    out: Path,
    patch_size: int | None = None,
    kernel_size: int | None = None,
    num_classes: int | None = None,
    classes: Sequence[str] | None = None,
    in_chans: int | None = None,
    img_size: int | None = None,
    act: str | None = None,
) -> dict[str, Any]:
    """Write weights of any known format in our format, with other sizes if given, and print the changes.

    Args:
        source: See `weights.load_model`.
        out: Folder for the new weights.
        patch_size, kernel_size, num_classes, classes, in_chans, img_size: See `resize`.
        act: See `weights.load_model`.

    Returns:
        "weights" (the folder), "found" (a description of the source), "changes" (one line each), "parameters".

    Raises:
        RequestError: The source cannot be loaded or changed in this way, or `out` is a run.
    """
    if is_run(out):
        raise RequestError(f"{out} is a run, which has its own weights: choose another --out")
    loaded = load_model(source, act)
    new, changes = resize(loaded, patch_size, kernel_size, num_classes, classes, in_chans, img_size)
    made = {"converted": {"source": str(source), "changes": changes}} if changes else {}
    save_changed(out, new, **made)
    print(f"{source}: {loaded.found}")
    for line in changes or ["nothing resized"]:
        print(f"  {line}")
    print(
        f"written to {out}" + ("; fine-tune before use: convmixer train DATA --weights " + str(out)) * bool(changes)
    )
    parameters = sum(p.numel() for p in new.model.parameters())
    return {"weights": str(out), "found": loaded.found, "changes": changes, "parameters": parameters}


def resize(
    loaded: LoadedModel,
    patch_size: int | None = None,
    kernel_size: int | None = None,
    num_classes: int | None = None,
    classes: Sequence[str] | None = None,
    in_chans: int | None = None,
    img_size: int | None = None,
) -> tuple[LoadedModel, list[str]]:
    """Return a model with other sizes, which keeps as much as possible of the weights, and a line for each change.

    Args:
        loaded: The model; it is not changed. Only a ConvMixer can be resized.
        patch_size: See `resize_patches`. None, here and below: unchanged.
        kernel_size: See `resize_kernels`.
        num_classes: Outputs; the classes are then called "0", "1", ... unless `classes` names them.
        classes: Names of the outputs. The classifier keeps its weights for names that the model knows.
        in_chans: Channels of the image, 1 or 3, see `weights.adapt_channels`.
        img_size: Width and height of the input in pixels; only the preprocessing changes.

    Raises:
        RequestError: A size is out of range, or the model is not a ConvMixer.
    """
    asked = (patch_size, kernel_size, num_classes, classes, in_chans, img_size)
    if all(value is None for value in asked):
        return loaded, []
    old = loaded.model
    if type(old) is not ConvMixer:
        raise RequestError(f"only a ConvMixer can be resized, and {loaded.source} is a {type(old).__name__}")
    names = _names(loaded.classes, num_classes, classes)
    new = ConvMixer(
        old.dim,
        old.depth,
        old.kernel_size if kernel_size is None else kernel_size,
        old.patch_size if patch_size is None else patch_size,
        old.in_chans if in_chans is None else in_chans,
        len(names),
        old.act,
        global_pool=old.global_pool,
        norm_layer=old.norm_layer or None,
    )
    preprocessing = _preprocessing(loaded.preprocessing, new.in_chans, img_size)
    state, changes = _carry(old, new, loaded.classes, names)
    new.load_state_dict(state)
    if preprocessing.img_size != loaded.preprocessing.img_size:
        changes.append(f"input {loaded.preprocessing.img_size} -> {preprocessing.img_size} px")
    if new.patch_size != old.patch_size:
        same = round(loaded.preprocessing.img_size / old.patch_size * new.patch_size)
        changes.append(f"images of {same} px would give the grid of patches that the blocks were trained on")
    args = args_of(new)
    metadata = loaded.metadata | {"name": free_name(args), "model_args": args}
    return replace(loaded, model=new.eval(), classes=names, preprocessing=preprocessing, metadata=metadata), changes


def resize_patches(weight: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Return patch-embedding filters (dim, C, p, p) of another size.

    If an image is resized in the same ratio as the patches, the filters respond to it as before, in the least-squares
    sense.

    Source: FlexiViT, arXiv 2212.08013, Sec. 3.4 (pseudo-inverse resize), in timm.
    """
    from timm.layers import resample_patch_embed

    resized: torch.Tensor = resample_patch_embed(weight, [patch_size, patch_size])
    return resized


def resize_kernels(weight: torch.Tensor, kernel_size: int, same_grid: bool = True) -> torch.Tensor:
    """Return depthwise kernels (dim, 1, k, k) of another size.

    If the kernels grow and the grid of patches stays, zeros are added around them: the model's outputs do not change.
    Otherwise the kernel is resized by bicubic interpolation and multiplied by (k / new k)², which approximately keeps
    its sum, and so its response to a constant image.

    Measured on models with k=5, top-1 after recalibrating BatchNorm. With other k, "same" means zeros or cropping:

    | model | k=5 | k=7 same, interpolated | k=4 same, interpolated | k=3 same, interpolated |
    |---|---|---|---|---|
    | digits | 99.4% | 99.4%, 79.7% | 84.4%, 79.7% | 35.0%, 38.9% |
    | CIFAR-10 (short run) | 54.4% | 54.4%, 44.4% | 41.3%, 42.6% | 28.3%, 34.5% |

    Args:
        weight: The kernels.
        kernel_size: The new size, at least 1.
        same_grid: The patch size stays as it is.

    Source: ours.
    """
    old = weight.shape[-1]
    if kernel_size >= old and same_grid:
        before = (kernel_size - 1) // 2 - (old - 1) // 2  # an even kernel has its centre left of the middle
        after = kernel_size - old - before
        return F.pad(weight, (before, after, before, after))
    size = (kernel_size, kernel_size)
    stretched = F.interpolate(weight, size, mode="bicubic", antialias=True, align_corners=False)
    return stretched * (old / kernel_size) ** 2


def resize_head(
    weight: torch.Tensor, bias: torch.Tensor, old: Sequence[str], new: Sequence[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a classifier's weight (classes, dim) and bias for other classes; known names keep their weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        fresh = torch.nn.Linear(weight.shape[1], len(new))
    rows, biases = fresh.weight.detach().clone(), fresh.bias.detach().clone()
    for row, name in enumerate(new):
        if name in old:
            rows[row], biases[row] = weight[old.index(name)], bias[old.index(name)]
    return rows, biases


def _names(old: Sequence[str], num_classes: int | None, classes: Sequence[str] | None) -> tuple[str, ...]:
    if classes is not None:
        if len(set(classes)) != len(classes) or (num_classes is not None and num_classes != len(classes)):
            raise RequestError(f"--classes must be {num_classes or 'some'} different names, not {', '.join(classes)}")
        return tuple(classes)
    if num_classes is None or num_classes == len(old):
        return tuple(old)
    if num_classes < 1:
        raise RequestError(f"--num-classes must be at least 1, not {num_classes}")
    return class_names(num_classes)


def _preprocessing(old: Preprocessing, in_chans: int, img_size: int | None) -> Preprocessing:
    mean, std = old.mean, old.std
    if in_chans != old.in_chans:  # to one channel: the mean of the colours; to three: the grey value repeated
        mean = (sum(mean) / len(mean),) * in_chans
        std = (sum(std) / len(std),) * in_chans
    side = old.img_size if img_size is None else img_size
    try:
        return replace(old, img_size=side, in_chans=in_chans, mean=mean, std=std)
    except ValueError as error:
        raise RequestError(str(error)) from error


def _carry(old: ConvMixer, new: ConvMixer, known: Sequence[str], names: Sequence[str]) -> tuple[State, list[str]]:
    """Return the old model's tensors in the sizes of the new one, and a line for each change."""
    state, changes = dict(old.state_dict()), []
    stem = "stem.0.weight"
    if new.in_chans != old.in_chans:
        state[stem] = adapt_channels(state[stem], new.in_chans)
        changes.append(f"patch embedding: {old.in_chans} -> {new.in_chans} channels")
    if new.patch_size != old.patch_size:
        state[stem] = resize_patches(state[stem], new.patch_size)
        changes.append(f"patch embedding: {old.patch_size} -> {new.patch_size} px, by pseudo-inverse resizing")
    if new.kernel_size != old.kernel_size:
        same_grid = new.patch_size == old.patch_size
        for key in [key for key in state if key.endswith(".0.fn.0.weight")]:
            state[key] = resize_kernels(state[key], new.kernel_size, same_grid)
        how = "zeros around" if same_grid and new.kernel_size > old.kernel_size else "bicubic, sum kept"
        changes.append(f"{old.depth} depthwise kernels: {old.kernel_size} -> {new.kernel_size}, {how}")
    if tuple(names) != tuple(known) and old.num_classes:
        state["head.weight"], state["head.bias"] = resize_head(state["head.weight"], state["head.bias"], known, names)
        kept = sum(name in known for name in names)
        changes.append(f"classifier: {len(known)} -> {len(names)} classes, {kept} kept by name")
    return state, changes
