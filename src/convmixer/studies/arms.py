"""The families of models that a study can name. An arm of a study is one model, with its sizes.

Here each arm becomes a registry name and plain arguments for `create_model`. Parameters are counted without
allocating weights.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any

from convmixer.errors import RequestError, unknown
from convmixer.probe import Build, meta_model


def _convmixer(
    dim: int, depth: int, img_size: int, patch_size: int = 4, kernel_size: int = 5, act: str = "gelu"
) -> Build:
    return f"convmixer_{dim}_{depth}_p{patch_size}_k{kernel_size}", {"act": act}


def _isotropic(
    dim: int,
    depth: int,
    img_size: int,
    mixer: str = "depthwise",
    stem: str = "patch",
    residual: str = "depthwise",
    norm: str = "batch",
    patch_size: int = 4,
    kernel_size: int = 5,
    heads: int = 4,
    act: str = "gelu",
) -> Build:
    return "isotropic", dict(locals())


def _vit(dim: int, depth: int, img_size: int, patch_size: int = 4, heads: int = 3) -> Build:
    return "vit_tiny_patch16_224", _transformer(dim, depth, img_size, patch_size, heads)


def _deit(dim: int, depth: int, img_size: int, patch_size: int = 4, heads: int = 3) -> Build:
    return "deit_tiny_distilled_patch16_224", _transformer(dim, depth, img_size, patch_size, heads)


def _transformer(dim: int, depth: int, img_size: int, patch_size: int, heads: int) -> dict[str, Any]:
    if dim % heads:
        raise RequestError(f"dim {dim} must be a multiple of heads {heads}")
    return {"img_size": img_size, "patch_size": patch_size, "embed_dim": dim, "depth": depth, "num_heads": heads}


def _mlp_mixer(dim: int, depth: int, img_size: int, patch_size: int = 4) -> Build:
    return "mlp_mixer", dict(locals())


def _resmlp(dim: int, depth: int, img_size: int, patch_size: int = 4) -> Build:
    return "resmlp", dict(locals())


def _resnet(dim: int, depth: int, img_size: int, stem: str = "conv3x3", patch_size: int = 4) -> Build:
    """Return the model; `depth` is the number of basic blocks in each of the four stages."""
    return "resnet", {"dim": dim, "layers": [depth] * 4, "stem": stem, "patch_size": patch_size}


FAMILIES: dict[str, Callable[..., Build]] = {
    "convmixer": _convmixer,
    "isotropic": _isotropic,
    "vit": _vit,
    "deit": _deit,
    "mlp_mixer": _mlp_mixer,
    "resmlp": _resmlp,
    "resnet": _resnet,
}


def width_step(family: str, sizes: dict[str, Any]) -> int:
    """Return the step between the widths that matching tries.

    It is 1 for ResNet, whose later stages multiply the width, and 2 for other families. With attention, a width must
    also be a multiple of the number of heads.
    """
    heads = inspect.signature(FAMILIES[family]).parameters.get("heads")
    attends = heads and (family != "isotropic" or sizes.get("mixer") == "attention")
    return math.lcm(1 if family == "resnet" else 2, sizes.get("heads", heads.default) if heads and attends else 1)


def check_sizes(family: str, sizes: dict[str, Any]) -> None:
    """Check the names of a family and of its sizes.

    Raises:
        RequestError: A name is not known; the nearest one is suggested.
    """
    if family not in FAMILIES:
        raise unknown("model family", family, FAMILIES)
    known = set(inspect.signature(FAMILIES[family]).parameters) - {"img_size"}
    for name in sizes:
        if name not in known:
            raise unknown(f"key of a {family} arm", name, {*known, "model", "label", "fixed", "recipe"})


def build_args(family: str, sizes: dict[str, Any], img_size: int) -> Build:
    """Return the registry name and the arguments of an arm.

    Raises:
        RequestError: A size is missing or the sizes do not fit together.
    """
    missing = {"dim", "depth"} - set(sizes)
    if missing:
        raise RequestError(f"{' and '.join(sorted(missing))} missing: write a number, or let `match` solve for it")
    return FAMILIES[family](**sizes, img_size=img_size)


def parameters(build: Build, img_size: int, in_chans: int, num_classes: int) -> int:
    """Return the number of parameters, counted without allocating any.

    Raises:
        RequestError: The model cannot be built with these arguments.
    """
    return sum(p.numel() for p in meta_model(build, in_chans, num_classes).parameters())
