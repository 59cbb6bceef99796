"""Model names: the paper's variants, models of any size (SKELETONS), and timm's for every other name.

A name is `convmixer_<dim>_<depth>_p<patch>_k<kernel>`. The paper's sizes also have a name without `_p` and `_k`: it
stands for the ImageNet setting, or p1 k9 for a CIFAR-10 size. timm's spellings of the released weights work too
(`convmixer_1024_20_ks9_p14`).
"""

import fnmatch
import functools
import importlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch.nn as nn

from convmixer.errors import RequestError, unknown
from convmixer.models.convmixer import ConvMixer
from convmixer.run_folder import MODEL_CONFIG

# (dim, depth) -> (patch_size, kernel_size, act): arXiv 2201.09792, Tab. 1 and the appendix's table of further sizes
IMAGENET: dict[tuple[int, int], tuple[int, int, str]] = {
    (1536, 20): (7, 9, "gelu"),
    (768, 32): (7, 7, "relu"),  # the released weights use ReLU
    (1024, 20): (14, 9, "gelu"),
    (1024, 16): (7, 9, "gelu"),
    (1024, 12): (7, 8, "gelu"),
    (512, 16): (7, 8, "gelu"),
    (512, 12): (7, 8, "gelu"),
}
# further patch and kernel sizes that the paper gives for an ImageNet size
IMAGENET_MORE: dict[tuple[int, int], tuple[tuple[int, int], ...]] = {(1536, 20): ((7, 3), (14, 9))}
# CIFAR-10 sizes, each with patches of 1, 2, 4 and kernels of 3 to 9: Tab. 4 and 5
CIFAR_SIZES = ((256, 4), (256, 8), (256, 12), (256, 16), (256, 20), (128, 4), (128, 8), (128, 12))
CIFAR_PATCHES, CIFAR_KERNELS = (1, 2, 4), (3, 5, 7, 8, 9)
ALIASES = {"convmixer_1024_20_ks9_p14": "convmixer_1024_20"}
# models of any size: name -> (file in this folder, function or class that builds it)
SKELETONS = {
    "isotropic": ("isotropic", "Isotropic"),
    "mlp_mixer": ("peers", "mlp_mixer"),
    "resmlp": ("peers", "resmlp"),
    "resnet": ("peers", "resnet"),
}
SHIPPED = Path(__file__).parent.parent / "pretrained"  # weights inside the package, one folder per name


def _variants() -> dict[str, dict[str, Any]]:
    table: dict[str, dict[str, Any]] = {}

    def add(name: str, dim: int, depth: int, patch: int, kernel: int, act: str, **more: Any) -> None:
        table[name] = {
            "dim": dim,
            "depth": depth,
            "patch_size": patch,
            "kernel_size": kernel,
            "act": act,
            **more,
        }

    for (dim, depth), (patch, kernel, act) in IMAGENET.items():
        add(f"convmixer_{dim}_{depth}", dim, depth, patch, kernel, act)
        for p, k in ((patch, kernel), *IMAGENET_MORE.get((dim, depth), ())):
            add(f"convmixer_{dim}_{depth}_p{p}_k{k}", dim, depth, p, k, act)
    for dim, depth in CIFAR_SIZES:
        add(f"convmixer_{dim}_{depth}", dim, depth, 1, 9, "gelu", num_classes=10)
        for p in CIFAR_PATCHES:
            for k in CIFAR_KERNELS:
                add(f"convmixer_{dim}_{depth}_p{p}_k{k}", dim, depth, p, k, "gelu", num_classes=10)
    return table


VARIANTS = _variants()


def shipped() -> list[str]:
    """Return the names of the weights inside the package."""
    return sorted(config.parent.name for config in SHIPPED.glob(f"*/{MODEL_CONFIG}"))


def list_models(pattern: str = "convmixer*") -> list[str]:
    """Return the names of our models that match a shell pattern; if none do, those of timm's."""
    ours = [name for name in (*VARIANTS, *shipped()) if fnmatch.fnmatch(name, pattern)]
    if ours:
        return ours
    import timm  # takes seconds to import, and most callers want our names

    return list(timm.list_models(pattern))


def model_args(name: str) -> dict[str, Any] | None:
    """Return the arguments of the ConvMixer of a name, or None if the name is not a ConvMixer's.

    Raises:
        RequestError: The name starts with convmixer but is not known.
    """
    name = ALIASES.get(name, name)
    if name in VARIANTS:
        return dict(VARIANTS[name])
    if name in shipped():
        config = json.loads((SHIPPED / name / MODEL_CONFIG).read_text(encoding="utf-8"))
        return dict(config["convmixer"]["model_args"], num_classes=config["num_classes"])
    free = re.fullmatch(r"convmixer_(\d+)_(\d+)_p(\d+)_k(\d+)", name)
    if free:
        dim, depth, patch, kernel = map(int, free.groups())
        return {"dim": dim, "depth": depth, "patch_size": patch, "kernel_size": kernel, "act": "gelu"}
    if name.startswith("convmixer"):
        raise unknown("ConvMixer", name, VARIANTS)
    return None


def args_of(model: ConvMixer) -> dict[str, Any]:
    """Return the arguments to build a ConvMixer again, without num_classes and in_chans.

    Raises:
        RequestError: Its norm is a class without a name.
    """
    args = {name: getattr(model, name) for name in ("dim", "depth", "kernel_size", "patch_size", "act")}
    usual = {"global_pool": "avg", "norm_layer": "batchnorm2d"}
    args |= {name: getattr(model, name) for name, value in usual.items() if getattr(model, name, value) != value}
    if args.get("norm_layer") == "":
        raise RequestError("the norm of the model cannot be saved: use one that timm has a name for")
    return args


def free_name(args: Mapping[str, Any]) -> str:
    """Return a ConvMixer's name with all of its sizes in it, from its arguments; the activation is left out."""
    return "convmixer_{dim}_{depth}_p{patch_size}_k{kernel_size}".format(**args)


def build_model(name: str, num_classes: int | None = None, in_chans: int = 3, **kwargs: Any) -> nn.Module:
    """Return a new model with random weights, as `create.create_model` does.

    Args:
        name: See `create.create_model`.
        num_classes: Outputs; None: the variant's default (1000, or 10 for the CIFAR sizes).
        in_chans: Channels of the image.
        **kwargs: Passed to the model.

    Raises:
        RequestError: The name is not known, or the model does not take an argument.
    """
    args = model_args(name)
    if name in SKELETONS:
        args, make = {"num_classes": 10}, skeleton(name)
    elif args is None:
        args, make = {}, _timm_maker(name)
    else:
        make = ConvMixer
    if num_classes is not None:
        args["num_classes"] = num_classes
    try:
        return make(**(args | {"in_chans": in_chans} | kwargs))
    except TypeError as error:
        raise RequestError(f"{name}: {error}") from error


def skeleton(name: str) -> Callable[..., nn.Module]:
    """Return the class or function that builds one of SKELETONS."""
    file, builder = SKELETONS[name]
    return cast(Callable[..., nn.Module], getattr(importlib.import_module(f"convmixer.models.{file}"), builder))


def _timm_maker(name: str) -> Callable[..., nn.Module]:
    import timm

    if not timm.is_model(name):
        raise unknown("model", name, [*VARIANTS, *timm.list_models()])
    return functools.partial(timm.create_model, name)
