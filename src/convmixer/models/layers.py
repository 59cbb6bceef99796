"""Layers that two or more models share."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from convmixer.errors import RequestError, unknown

ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU}


def activation(name: str) -> nn.Module:
    """Return a new activation layer, "gelu" (exact, erf) or "relu".

    Raises:
        RequestError: The name is neither "gelu" nor "relu".
    """
    if name not in ACTIVATIONS:
        raise unknown("activation", name, ACTIVATIONS)
    return ACTIVATIONS[name]()


def activation_name(layer: str | type[nn.Module]) -> str:
    """Return the name of an activation that is given as in timm: a class or a name.

    Raises:
        RequestError: It is neither GELU nor ReLU.
    """
    names = {kind: name for name, kind in ACTIVATIONS.items()}
    name = layer if isinstance(layer, str) else names.get(layer, getattr(layer, "__name__", str(layer)))
    if name not in ACTIVATIONS:
        raise unknown("activation", name, ACTIVATIONS)
    return name


def norm_maker(layer: str | Callable[..., nn.Module] | None) -> tuple[str, Callable[..., nn.Module]]:
    """Return the name of a norm that is given as in timm, and a function: number of channels -> the norm.

    Args:
        layer: A class or function, or one of timm's names, e.g. "layernorm2d"; None: `nn.BatchNorm2d`.

    Returns:
        The name is "" for a class that has none.

    Raises:
        RequestError: The name is not known.
    """
    if layer in (None, nn.BatchNorm2d, "batchnorm2d"):
        return "batchnorm2d", nn.BatchNorm2d
    import timm.layers  # takes a second, and few models need it

    def found(name: str) -> Any:
        try:
            return timm.layers.get_norm_layer(name)
        except KeyError:
            return None

    name = layer if isinstance(layer, str) else getattr(layer, "__name__", "").lower()
    maker = found(name) if name else None
    if isinstance(layer, str) and maker is None:
        raise RequestError(f"unknown norm {layer!r}: use a class, or a name that timm knows, such as 'layernorm2d'")
    assert layer is not None
    return (name, maker) if layer in (name, maker) else ("", layer)  # type: ignore[return-value]


class DepthwiseConv2d(nn.Conv2d):
    """Depthwise convolution that keeps the image size: (B, dim, H, W) -> (B, dim, H, W).

    The padding is written as integers, because `padding="same"` breaks exporters and MAC counters. An even kernel
    cannot be centred: as in `padding="same"`, the one extra row and column go to the bottom and the right.

    Args:
        dim: Channels.
        kernel_size: Height and width of the kernel, at least 1.
        device, dtype: Device and dtype of the parameters.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        padding = kernel_size // 2 if kernel_size % 2 else 0
        super().__init__(dim, dim, kernel_size, groups=dim, padding=padding, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        k = self.kernel_size[0]
        if k % 2 == 0:
            before, after = k // 2 - 1, k // 2
            x = F.pad(x, (before, after, before, after))
        return self._conv_forward(x, self.weight, self.bias)  # torch.jit.script does not support super()


class Residual(nn.Module):
    """Computes fn(x) + x."""

    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.fn(x) + x
        return y
