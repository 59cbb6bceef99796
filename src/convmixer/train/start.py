"""Describes in one line what a run starts from: random or given weights, and which other weights are available."""

from pathlib import Path

from convmixer.config import Config
from convmixer.models.registry import shipped
from convmixer.run_folder import MODEL

SMALL_SIDE = 64  # up to this size, weights for CIFAR-10's 32 pixels fit better than those for ImageNet's 224
FROM_HUB = "convmixer_768_32"  # the authors' ImageNet weights


def start_line(config: Config, in_chans: int, img_size: int) -> str:
    """Return what weights a run starts from and why. If they are random, also name weights that fit the images."""
    if config.weights:
        return f"{config.weights}, as --weights says"
    why = "random weights, as no --weights is given"
    found = weights_at_hand(in_chans, img_size)
    return f"{why}; {found[1]}: --weights {found[0]} --freeze" if found else why


def weights_at_hand(in_chans: int, img_size: int) -> tuple[str, str] | None:
    """Return the name of weights that fit the images, and why they are proposed; None if no known weights fit."""
    if in_chans != 3:  # all of them were trained on colour
        return None
    small, here = shipped(), _cached()
    if img_size <= SMALL_SIDE and small:
        return small[0], "training from weights that ship with the package takes seconds"
    if here:
        return here[0], "weights on this machine fit"
    return FROM_HUB, "ImageNet weights can be fetched from timm's hub"


def _cached() -> list[str]:
    """Return the names of timm's weights in the Hugging Face cache, ConvMixers first."""
    from huggingface_hub import constants

    folders = sorted(Path(constants.HF_HUB_CACHE).glob("models--timm--*"))
    names = [f.name.removeprefix("models--timm--") for f in folders if any(f.glob(f"snapshots/*/{MODEL}"))]
    return [f"timm/{name}" for name in sorted(names, key=lambda name: not name.startswith("convmixer"))]
