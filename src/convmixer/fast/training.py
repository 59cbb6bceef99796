"""Replaces ConvMixers, and models that vary one part of them, with versions that run on the kernels, in place.

Parameters, buffers, state-dict keys and the whole interface stay the same as in the plain model. If the kernels
cannot be used, the plain model runs and the reason is printed once.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn as nn
from torch import Tensor

from convmixer.fast.parts import Parts, parts_of
from convmixer.fast.structure import ACTS, frozen_blocks, is_patches, plain_blocks, unusual
from convmixer.fast.support import dtype_of, emulates_bf16, say_once, unfit, why_not
from convmixer.models.convmixer import ConvMixer
from convmixer.models.isotropic import Isotropic


def accelerate(model: nn.Module) -> nn.Module:
    """Replace every ConvMixer in a model with one that runs on the kernels, in place, and return the model.

    The kernels are built on first use. A forward pass runs on them on a CPU or an NVIDIA GPU, in fp32 or bf16 (on a
    GPU also fp16), if the model has only the paper's layers. The dtype is that of the parameters or of autocast.
    Other forward passes run as before, and the reason is printed once.

    An `Isotropic` with any mixer is replaced if its stem and blocks end in activation and norm, as ConvMixer's do.
    Other models are not changed.

    Args:
        model: Any module; ConvMixers in it are found at any depth.
    """
    found = [module for module in model.modules() if type(module) is ConvMixer]
    varied = [module for module in model.modules() if type(module) is Isotropic and not unusual(module)]
    if (found or varied) and (reason := _why_not_at_all(model)):
        say_once(reason)
        return model
    for module in found:
        module.__class__ = FastConvMixer
    for other in varied:
        other.__class__ = FastIsotropic
    return model


def _why_not_at_all(model: nn.Module) -> str | None:
    """Return why no kernels can run on the model's device in any dtype, or None."""
    return why_not(next(model.parameters()).device, torch.float32)


def uses_kernels(model: nn.Module) -> bool:
    """Return whether kernels are available and `accelerate` replaced something in the model."""
    return any(isinstance(module, _OnKernels) for module in model.modules())


def _plain_class(model: nn.Module) -> type[ConvMixer]:
    return Isotropic if isinstance(model, Isotropic) else ConvMixer


class _OnKernels(ConvMixer):
    """The common base of both fast models: stem, blocks and pool on the kernels."""

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, dim, h, w), channels-last."""
        if reason := unfit(self, x):
            return self._plain(reason).forward_features(x)
        return self._fast(x, pool=False)[0].permute(0, 3, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, num_classes)."""
        if reason := unfit(self, x):
            return self._plain(reason).forward(x)
        own_features = type(self).forward_features is not _OnKernels.forward_features  # a subclass has its own
        if self.global_pool != "avg" or own_features:  # the kernels' pool is the mean
            return self.forward_head(self.forward_features(x))
        pooled, _ = self._fast(x, pool=True)
        return self.forward_head(pooled.to(dtype_of(self))[:, :, None, None])  # the mean of one value is that value

    def _intermediates(self, x: Tensor, take: list[int], depth: int) -> tuple[Tensor, list[Tensor]]:
        reason = unfit(self, x)
        if not reason and frozen_blocks(self) is not None:
            reason = "they cannot return features of single blocks if the first blocks are frozen"
        if reason:
            return self._plain(reason)._intermediates(x, take, depth)
        first = plain_blocks(self)  # they run as modules; the kernels begin with their last norm
        last = depth - 1
        y, taken = self._fast(x, False, [i + 1 - first for i in take if i < last], depth - first)
        taken += [y] if last in take else []
        return y.permute(0, 3, 1, 2), [features.permute(0, 3, 1, 2) for features in taken]

    def __prepare_scriptable__(self) -> ConvMixer:
        """Return the plain model with the same parameters, for `torch.jit.script`."""
        plain = object.__new__(_plain_class(self))
        plain.__dict__ = self.__dict__.copy()
        return plain

    def __setstate__(self, state: dict[str, Any]) -> None:  # called for a copy, or in the process that unpickles it
        super().__setstate__(state)
        if reason := _why_not_at_all(self):
            say_once(reason)
            self.__class__ = _plain_class(self)  # type: ignore[assignment]

    def _plain(self, reason: str) -> ConvMixer:
        say_once(reason)
        return super()  # type: ignore[return-value]

    def _fast(
        self, x: Tensor, pool: bool, take: Sequence[int] = (), blocks: int | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        parts = parts_of(self)
        if blocks is not None:
            parts = parts.first(blocks)
        v = _stem(self, x, parts)
        if parts.norms[-1].training and v.numel() == v.shape[3]:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.shape}")
        if parts.norms[-1].training and not parts.norms[0].training:
            return _partly_frozen(v, parts, self, pool), []
        return _features(v, parts, pool, take)


class FastConvMixer(_OnKernels):
    """A ConvMixer on the kernels. `accelerate` makes it."""


class FastIsotropic(_OnKernels, Isotropic):
    """An Isotropic on the kernels.

    Three parts run as torch modules: the convolutions of a stem that is not a patch embedding, mixers other than
    depthwise convolutions, and the first block after a stem that pools.
    """


def _features(v: Tensor, parts: Parts, pool: bool, take: Sequence[int] = ()) -> tuple[Tensor, list[Tensor]]:
    """Run activation, first norm and blocks on a convolution's output, and update running statistics.

    Args:
        v: Output of a convolution, (N, H, W, C); with depthwise mixers it may be (N, H, W, blocks.wide(C)).
        parts: Norms, activation and blocks.
        pool: Return the mean over the image, (N, C) fp32, instead of (N, H, W, C).
        take: Numbers of blocks, ascending: the features after so many blocks are returned too.
    """
    from convmixer.kernels import blocks, mixed

    norms, training = parts.norms, parts.norms[0].training
    running = [] if training else parts.running()
    settings = norms[0].eps, ACTS[parts.act], training
    if parts.depthwise:
        y, statistics, taken = blocks.features(v, parts.parameters(), running, *settings, pool, take)
    else:
        mixers = [block[0].fn[0] for block in parts.blocks]
        y, statistics, taken = mixed.features(v, mixers, parts.parameters(), running, *settings, take)
        y = y.mean((1, 2), dtype=torch.float32) if pool else y
    if training:
        _update_running(norms, statistics.detach(), v.numel() // v.shape[3])
    return y, taken


def _partly_frozen(v: Tensor, parts: Parts, model: Any, pool: bool) -> Tensor:
    """Run the first blocks with their running statistics and without gradients, and train the others."""
    from convmixer.kernels import blocks

    count = frozen_blocks(model)
    assert count is not None
    first = 2 * count + 1  # index of the first norm that trains
    parameters, running = parts.parameters(), parts.running()[: 2 * first]
    settings = parts.norms[0].eps, ACTS[parts.act]
    v = blocks.frozen(v, parameters[: 2 + blocks.PER_BLOCK * count], running, *settings)
    weight, bias, *trained = parameters[blocks.PER_BLOCK * count :]
    fixed = blocks.frozen_norm(v, weight, bias, running[-2:], *settings)
    y, statistics, _ = blocks.features(v, [*fixed, *trained], [], *settings, True, pool)
    _update_running(parts.norms[first:], statistics.detach()[1:], v.numel() // v.shape[3])
    return y


def _stem(model: Any, x: Tensor, parts: Parts) -> Tensor:
    """Return the output of the last convolution before the kernels, (B, h, w, dim or `blocks.wide(dim)`)."""
    conv, dtype = model.stem[0], dtype_of(model)
    if len(model.stem) == 3 and is_patches(conv):
        return _patch_embedding(conv, x, dtype, wider=parts.depthwise)
    if plain_blocks(model):
        block = model.blocks[0]
        v: Tensor = block[1](block[0](_pooled_stem(model, x)))
    else:
        v = model.stem[:-2](x)
    return v.permute(0, 2, 3, 1).to(dtype).contiguous()


def _patch_embedding(conv: Any, x: Tensor, dtype: torch.dtype, wider: bool) -> Tensor:
    """Return the patch embedding of images, (B, H // p, W // p, dim or wider), as a matrix multiplication.

    Each patch is a row of the matrix.
    """
    B, C, H, W = x.shape
    p = conv.kernel_size[0]
    if min(H, W) < p:
        raise ValueError(f"an image of {H} x {W} pixels is smaller than a patch of {p} x {p}")
    h, w = H // p, W // p
    patches = x[:, :, : h * p, : w * p].reshape(B, C, h, p, w, p).permute(0, 2, 4, 1, 3, 5)
    v = _product(conv, patches.reshape(B * h * w, C * p * p), dtype, wider)
    return v.view(B, h, w, v.shape[1])


def _product(conv: Any, rows: Tensor, dtype: torch.dtype, wider: bool) -> Tensor:
    """Return a convolution, (M, dim), computed as a matrix multiplication.

    Args:
        conv: The convolution.
        rows: The k x k window at each position, (M, in_chans * k * k).
        dtype: Dtype of the result.
        wider: Return (M, `blocks.wide(dim)`), with zeros in the last columns.
    """
    from convmixer.kernels.blocks import wide

    product = torch.float32 if dtype is torch.bfloat16 and emulates_bf16(rows.device) else dtype
    with torch.autocast(rows.device.type, enabled=False):
        weight, bias = conv.weight.flatten(1).to(product), conv.bias
        bias = None if bias is None else bias.to(product)
        if wider and (more := wide(conv.out_channels) - conv.out_channels):
            weight = nn.functional.pad(weight, (0, 0, 0, more))
            bias = None if bias is None else nn.functional.pad(bias, (0, more))
        return nn.functional.linear(rows.to(product), weight, bias).to(dtype)


def _pooled_stem(model: Any, x: Tensor) -> Tensor:
    """Return the output of a stem that ends in average pooling, (B, dim, h, w).

    Each window of the pool is passed to the kernels as one image, and they return the mean over that image.
    """
    conv, act, norm, pool = model.stem
    B, _, H, W = x.shape
    p, dtype = pool.kernel_size, dtype_of(model)
    if H % p or W % p:  # pixels outside all windows count for the norm's statistics
        return cast(Tensor, model.stem(x))
    h, w, k = H // p, W // p, conv.kernel_size[0]
    padded = nn.functional.pad(x, (conv.padding[1],) * 2 + (conv.padding[0],) * 2)
    # (B, in_chans, h, p, w, p, k, k)
    around = padded.unfold(2, k, 1).unfold(3, k, 1).unflatten(2, (h, p)).unflatten(4, (w, p))
    rows = around.permute(0, 2, 4, 3, 5, 1, 6, 7).reshape(B * H * W, k * k * conv.in_channels)
    v = _product(conv, rows, dtype, wider=True)
    y, _ = _features(v.view(B * h * w, p, p, v.shape[1]), Parts([norm], type(act), []), pool=True)
    return y.to(dtype).view(B, h, w, y.shape[1]).permute(0, 3, 1, 2)


def _update_running(norms: list[Any], statistics: Tensor, count: int) -> None:
    """Update the running statistics as BatchNorm does: towards the mean and the unbiased variance."""
    means, variances = statistics.unbind(1)
    unbiased = variances * (count / (count - 1))
    with torch.no_grad():
        dtype = norms[0].running_mean.dtype
        for momentum in {norm.momentum for norm in norms}:  # one launch each on a GPU, for any number of norms
            chosen = [i for i, norm in enumerate(norms) if norm.momentum == momentum]
            for name, values in (("running_mean", means.to(dtype)), ("running_var", unbiased.to(dtype))):
                torch._foreach_lerp_([getattr(norms[i], name) for i in chosen], [values[i] for i in chosen], momentum)
        torch._foreach_add_([norm.num_batches_tracked for norm in norms], 1)
