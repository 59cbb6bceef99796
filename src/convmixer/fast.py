"""Make a model fast where it stands: swap its ConvMixers for kernel-backed ones.

Parameters, buffers, state-dict keys and the whole interface stay those of the plain model. Where the kernels cannot
serve, the plain model runs and the reason is said once.
"""

import functools
import sys
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from convmixer import kernels
from convmixer.device import native_bf16
from convmixer.models.convmixer import ConvMixer
from convmixer.models.layers import DepthwiseConv2d, Residual

_NATIVE_BF16 = native_bf16()  # elsewhere torch emulates bf16 products, a hundred times slower than fp32
_ACTS: dict[type[nn.Module], int] = {nn.GELU: 0, nn.ReLU: 1}


def accelerate(model: nn.Module) -> nn.Module:
    """Swap every ConvMixer in a model for a kernel-backed one, in place, and return the model.

    The kernels are built on first use. Each forward pass runs on them when it can: on a CPU, in fp32 or bf16 (by the
    parameters, or by autocast), with the paper's own layers; otherwise it runs as before, and says why once.

    Args:
        model: Any module; ConvMixers in it are found at any depth.
    """
    found = [module for module in model.modules() if type(module) is ConvMixer]
    if found and (reason := kernels.why_not()):
        _say_once(reason)
        return model
    for module in found:
        module.__class__ = FastConvMixer
    return model


def uses_kernels(model: nn.Module) -> bool:
    """Return whether `accelerate` found a ConvMixer in the model and the kernels for it."""
    return any(isinstance(module, FastConvMixer) for module in model.modules())


@functools.cache
def _say_once(reason: str) -> None:
    print(f"convmixer: plain PyTorch instead of the CPU kernels: {reason}", file=sys.stderr, flush=True)


class FastConvMixer(ConvMixer):
    """A ConvMixer whose stem, blocks and pool run on the CPU kernels. Made by `accelerate`."""

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, dim, H // patch_size, W // patch_size), channels-last."""
        if reason := _unfit(self, x):
            return self._plain(reason).forward_features(x)
        return self._fast(x, pool=False).permute(0, 3, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, num_classes)."""
        if reason := _unfit(self, x):
            return self._plain(reason).forward(x)
        pooled = self._fast(x, pool=True)
        logits: Tensor = self.head(self.head_drop(pooled.to(_dtype(self))))
        return logits

    def _plain(self, reason: str) -> ConvMixer:
        if reason != _QUIETLY:
            _say_once(reason)
        return super()  # type: ignore[return-value]

    def _fast(self, x: Tensor, pool: bool) -> Tensor:
        from convmixer.kernels.blocks import features

        norms = _norms(self)
        training = norms[0].training
        if training and x.shape[0] * (x.shape[2] // self.patch_size) * (x.shape[3] // self.patch_size) == 1:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.shape}")
        running = [] if training else [t.float() for n in norms for t in (n.running_mean, n.running_var)]
        act = _ACTS[type(self.stem[1])]
        v = _patch_embedding(self.stem[0], x, _dtype(self))
        y, statistics = features(v, _parameters(self), running, norms[0].eps, act, training, pool)
        if training:
            _update_running(norms, statistics.detach(), v.numel() // v.shape[3])
        return y


_QUIETLY = "another tool needs the plain model"  # nothing that the user should change


def _unfit(model: Any, x: Tensor) -> str | None:
    """Return why the kernels cannot run this pass, or None."""
    weight = model.stem[0].weight
    if x.device.type != "cpu" or weight.device.type != "cpu":
        return f"the model is on {weight.device}, the images on {x.device}"
    if _dtype(model) not in (torch.float32, torch.bfloat16) or weight.dtype not in (torch.float32, torch.bfloat16):
        return f"they compute in fp32 and bf16, not in {_dtype(model)}"
    if model.grad_checkpointing:
        return "gradient checkpointing is on"
    if torch.jit.is_tracing() or torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export():
        return _QUIETLY
    return _unusual(model)


def _unusual(model: Any) -> str | None:
    """Return what in the model the kernels do not know, or None."""
    act = type(model.stem[1])
    expected: list[tuple[nn.Module, type[nn.Module]]] = [(model.stem[0], nn.Conv2d), (model.stem, nn.Sequential)]
    for norm_parts in _act_norms(model):
        expected += zip(norm_parts, (act, nn.BatchNorm2d), strict=True)
    for block in model.blocks:
        residual, pointwise = block[0], block[1]
        inner: Any = getattr(residual, "fn", [None])
        expected += [(block, nn.Sequential), (residual, Residual), (pointwise, nn.Conv2d)]
        expected += [(inner, nn.Sequential), (inner[0], DepthwiseConv2d)]
    for module, kind in expected:
        if type(module) is not kind:
            return f"the model has a {type(module).__name__}"
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            return _QUIETLY
    if act not in _ACTS or (act is nn.GELU and model.stem[1].approximate != "none"):
        return f"the activation is {model.stem[1]}"
    first = model.stem[2]
    for norm in _norms(model):
        if norm.weight is None or norm.running_mean is None or norm.momentum is None:
            return "a BatchNorm has no weight, no running statistics or no momentum"
        if (norm.eps, norm.training) != (first.eps, first.training):
            return "the BatchNorms differ in eps or mode"
    return None


def _act_norms(model: Any) -> list[list[Any]]:
    pairs = [list(model.stem)[1:]]
    for block in model.blocks:
        pairs += [list(getattr(block[0], "fn", block[0]))[1:], list(block)[2:]]
    return pairs


def _norms(model: ConvMixer) -> list[Any]:
    return [pair[1] for pair in _act_norms(model)]


def _dtype(model: ConvMixer) -> torch.dtype:
    if torch.is_autocast_enabled("cpu"):
        return torch.get_autocast_dtype("cpu")
    return next(model.parameters()).dtype


def _parameters(model: Any) -> list[Tensor]:
    """Return the parameters in the order of `convmixer.kernels.blocks`, in fp32."""
    parts = [model.stem[2]]
    for block in model.blocks:
        parts += [block[0].fn[0], block[0].fn[2], block[1], block[3]]
    return [parameter.float() for part in parts for parameter in (part.weight, part.bias)]


def _patch_embedding(conv: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, in_chans, H, W) -> (B, H // p, W // p, dim): every patch is a row, so the convolution is a product."""
    B, C, H, W = x.shape
    p = conv.kernel_size[0]
    h, w = H // p, W // p
    product = torch.float32 if dtype is torch.bfloat16 and not _NATIVE_BF16 else dtype
    with torch.autocast("cpu", enabled=False):
        patches = x[:, :, : h * p, : w * p].to(product).reshape(B, C, h, p, w, p).permute(0, 2, 4, 1, 3, 5)
        weight, bias = conv.weight.flatten(1).to(product), conv.bias
        bias = None if bias is None else bias.to(product)
        v = nn.functional.linear(patches.reshape(B * h * w, -1), weight, bias).to(dtype)
    return v.view(B, h, w, -1)


def _update_running(norms: list[Any], statistics: Tensor, count: int) -> None:
    """Move the running statistics as BatchNorm does: towards the mean and the unbiased variance."""
    means, variances = statistics.unbind(1)
    unbiased = variances * (count / (count - 1))
    with torch.no_grad():
        for norm, mean, variance in zip(norms, means.float(), unbiased.float(), strict=True):
            norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), norm.momentum)
            norm.running_var.lerp_(variance.to(norm.running_var.dtype), norm.momentum)
            norm.num_batches_tracked += 1
