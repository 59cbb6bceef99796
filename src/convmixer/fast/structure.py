"""Checks all types and attributes of a model that affect its output, and notices later changes of them.

The kernels compute a ConvMixer only from its parameters. So every other attribute that changes a module's output must
have the value that the kernels assume; `unusual` names the first attribute with another value.
"""

import operator
import weakref
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from convmixer.kernels.cpu.changes import Unchanged, usable
from convmixer.models.convmixer import ConvMixer
from convmixer.models.isotropic import Isotropic
from convmixer.models.layers import DepthwiseConv2d, Residual

ACTS: dict[type[nn.Module], int] = {nn.GELU: 0, nn.ReLU: 1}  # the kernels' numbers
QUIETLY = "another tool needs the plain model"  # never printed: the user need not change anything
_OVERRIDES = ("forward", "forward_features", "forward_head", "_run", "_intermediates")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_KINDS: tuple[Any, ...] = (
    nn.Conv2d,
    nn.BatchNorm2d,
    nn.GELU,
    nn.ReLU,
    nn.Sequential,
    nn.AvgPool2d,
    DepthwiseConv2d,
    Residual,
)
_FACTS = operator.attrgetter("dtype", "device", "shape", "layout")
_METHODS = ("forward", "_call_impl", "_conv_forward")
_USUAL = [  # methods and functions that some tools replace for all modules at once
    (kind, name, getattr(kind, name)) for kind in _KINDS for name in (*_METHODS, "__call__") if hasattr(kind, name)
] + [(nn.functional, name, getattr(nn.functional, name)) for name in ("conv2d", "batch_norm", "gelu", "relu")]


def unusual(model: Any) -> str | None:
    """Return what in the model the kernels do not support, or None."""
    if any(name in model.__dict__ for name in _OVERRIDES) or type(model)._run is not ConvMixer._run:
        return "a method of the model was replaced"
    reason = _stem_reason(model.stem)
    for i, block in enumerate(model.blocks):
        reason = reason or _block_reason(block, any_mixer=isinstance(model, Isotropic), called=i < _called(model))
    return reason or _hooks_or_forwards(model) or _norms_reason(model)


def forwards_replaced() -> bool:
    """Return whether a method of a class that the kernels know, or a function that it calls, was replaced."""
    return any(getattr(owner, name) is not usual for owner, name, usual in _USUAL)


def _called(model: Any) -> int:
    """Return the number of blocks whose convolutions are called as modules, see `plain_blocks`."""
    return 0 if _wrong(model.stem, nn.Sequential) else plain_blocks(model)


def _wrong(module: Any, kind: type[nn.Module]) -> str | None:
    return None if type(module) is kind else f"the model has a {type(module).__name__}"


def _stem_reason(stem: Any) -> str | None:
    """Return what the kernels do not support in a stem, or None.

    A stem has convolutions, which run as modules, then an activation and a norm, and perhaps average pooling.
    """
    if _wrong(stem, nn.Sequential) or len(stem) < 3:
        return "the stem is built in another way"
    reason = _wrong(stem[0], nn.Conv2d)
    if type(stem[-1]) is nn.AvgPool2d:
        if len(stem) != 4 or reason or not _is_pooled(stem[0], stem[3]):
            return reason or "the stem is built in another way"
        return _act_reason(stem[1]) or _wrong(stem[2], nn.BatchNorm2d)
    return reason or _act_reason(stem[-2]) or _wrong(stem[-1], nn.BatchNorm2d)


def _is_pooled(conv: Any, pool: Any) -> bool:
    """Return whether a convolution keeps the image's size, and the pool's windows lie side by side."""
    k = conv.kernel_size[0]
    size = conv.kernel_size == (k, k) and k % 2 == 1 and conv.padding == (k // 2, k // 2)
    usual = conv.stride == conv.dilation == (1, 1) and conv.groups == 1 and conv.padding_mode == "zeros"
    usual = usual and _has_shapes(conv, (conv.out_channels, conv.in_channels, k, k))
    windows = isinstance(pool.kernel_size, int) and pool.stride == pool.kernel_size and pool.padding == 0
    return size and usual and windows and not pool.ceil_mode and pool.divisor_override is None


def is_patches(conv: Any) -> bool:
    """Return whether a convolution reads each pixel once, so that it is a matrix multiplication of patches."""
    p = conv.kernel_size[0]
    square = conv.kernel_size == conv.stride == (p, p) and conv.padding == (0, 0)
    usual = conv.dilation == (1, 1) and conv.groups == 1
    return square and usual and _has_shapes(conv, (conv.out_channels, conv.in_channels, p, p))


def _block_reason(block: Any, any_mixer: bool, called: bool) -> str | None:
    if _wrong(block, nn.Sequential) or len(block) != 4 or _wrong(block[0], Residual):
        return _wrong(block, nn.Sequential) or "a block is built in another way"
    inner = block[0].fn
    if _wrong(inner, nn.Sequential) or len(inner) != 3:
        return "a block is built in another way"
    if called:
        return _act_reason(block[2]) or _wrong(block[3], nn.BatchNorm2d)
    mixer, dim = inner[0], getattr(block[3], "num_features", 0)
    if type(mixer) is not DepthwiseConv2d and getattr(inner[1], "inplace", False):
        return "an activation works in place on the input of the residual sum"
    reason = None if any_mixer and type(mixer) is not DepthwiseConv2d else _depthwise_reason(mixer, dim)
    reason = reason or _act_reason(inner[1]) or _wrong(inner[2], nn.BatchNorm2d)
    return reason or _pointwise_reason(block[1], dim) or _act_reason(block[2]) or _wrong(block[3], nn.BatchNorm2d)


def _depthwise_reason(conv: Any, dim: int) -> str | None:
    if reason := _wrong(conv, DepthwiseConv2d):
        return reason
    k = conv.kernel_size[0]
    padding = (k // 2, k // 2) if k % 2 else (0, 0)
    return _conv_reason(conv, (dim, 1, k, k), groups=dim, padding=padding)


def _pointwise_reason(conv: Any, dim: int) -> str | None:
    return _wrong(conv, nn.Conv2d) or _conv_reason(conv, (dim, dim, 1, 1), groups=1, padding=(0, 0))


def _conv_reason(conv: Any, shape: tuple[int, ...], groups: int, padding: tuple[int, int]) -> str | None:
    usual = conv.stride == conv.dilation == (1, 1) and conv.padding_mode == "zeros" and conv.groups == groups
    if not usual or conv.padding != padding or conv.kernel_size != shape[2:]:
        return f"a convolution has other settings: {conv}"
    if conv.bias is None or not _has_shapes(conv, shape):
        return "a convolution has no bias, or weights of another shape"
    return None


def _has_shapes(conv: Any, shape: tuple[int, ...]) -> bool:
    """Return whether the weights have the given shape, and the bias, if there is one, fits them."""
    return tuple(conv.weight.shape) == shape and (conv.bias is None or tuple(conv.bias.shape) == shape[:1])


def _act_reason(act: Any) -> str | None:
    if type(act) not in ACTS:
        return f"the model has a {type(act).__name__}"
    return f"the activation is {act}" if getattr(act, "approximate", "none") != "none" else None


def _hooks_or_forwards(model: Any) -> str | None:
    for part in (model.stem, model.blocks):
        for module in part.modules():
            if any(name in module.__dict__ for name in _METHODS):
                return "the forward of a module was replaced"
            if any(getattr(module, name) for name in _HOOKS):
                return QUIETLY
    return None


def _norms_reason(model: Any) -> str | None:
    first = norms_of(model)[0]
    for act, norm in act_norms(model):
        if type(act) is not type(act_norms(model)[0][0]):
            return "the activations differ"
        if norm.weight is None or norm.bias is None or norm.momentum is None or not norm.track_running_stats:
            return "a BatchNorm has no weight, no running statistics or no momentum"
        if norm.running_mean is None or norm.running_var is None or norm.num_batches_tracked is None:
            return "a BatchNorm has no running statistics"
        if norm.eps <= 0:
            return "the eps of a BatchNorm is not above 0"
        if norm.eps != first.eps:
            return "the BatchNorms differ in eps"
        tensors = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
        if any(tuple(t.shape) != tuple(first.weight.shape) for t in tensors):
            return "the BatchNorms differ in size"
    modes = [norm.training for norm in norms_of(model)]
    return None if len(set(modes)) == 1 or frozen_blocks(model) is not None else "the BatchNorms differ in mode"


def frozen_blocks(model: Any) -> int | None:
    """Return how many of the first blocks are frozen: their norms and the stem's are in eval mode, later ones train.

    The kernels run these blocks without gradients. Return None if all norms have the same mode, if their modes differ
    in another way, if the stem is not a patch embedding, or if a mixer is not a depthwise convolution.
    """
    modes = [norm.training for norm in norms_of(model)]
    first = modes.index(True) if True in modes else 0
    if first % 2 == 0 or not all(modes[first:]):  # the stem has one norm, each block two
        return None
    patches = len(model.stem) == 3 and is_patches(model.stem[0])
    return first // 2 if patches and all_depthwise(model.blocks) else None


def plain_blocks(model: Any) -> int:
    """Return how many blocks run as torch modules: 1 if the stem pools after its norm, else 0.

    The kernels start from the output of a convolution, before activation and norm. If the stem ends in pooling, the
    first such output is that of the first block's pointwise convolution.
    """
    return int(type(model.stem[-1]) is nn.AvgPool2d)


def act_norms(model: Any) -> list[list[Any]]:
    """Return the activations and norms that the kernels compute, in their order."""
    plain = plain_blocks(model)
    pairs = [list(model.stem)[-2 - plain :][:2]]
    for block in model.blocks:
        pairs += [list(block[0].fn)[1:], list(block)[2:]]
    return [pairs[0], *pairs[1 + plain :]]


def norms_of(model: Any) -> list[Any]:
    """Return the norms that the kernels compute, in their order."""
    return [pair[1] for pair in act_norms(model)]


def all_depthwise(blocks: Any) -> bool:
    """Return whether every block has a depthwise convolution, so that the kernels compute all of it."""
    return all(type(block[0].fn[0]) is DepthwiseConv2d for block in blocks)


class Found:
    """The result of `unusual` for a model, and everything that the result depends on.

    For each module these are its `__dict__`, its tensors and its submodules. CPython's dict versions and watchers
    show whether any of them changed (`kernels.cpu.changes`). If these cannot be used, or show a change (maybe of
    another model), everything is compared with copies.
    """

    def __init__(self, model: Any) -> None:
        self.kind = type(model)
        self.modules = [*model.stem.modules(), *model.blocks.modules()]
        held = [d for m in self.modules for d in (m._parameters, m._buffers, m._modules) if d]
        self.dicts = [model.__dict__, model._modules, *(m.__dict__ for m in self.modules), *held]
        self.hooks = [getattr(m, name) for m in self.modules for name in _HOOKS]
        own = [p for m in self.modules for p in m._parameters.values() if p is not None]
        buffers = [b for m in self.modules for b in m._buffers.values() if b is not None]
        usual = bool(own) and all(type(t) in (nn.Parameter, Tensor) for t in (*own, *buffers))
        self.tensors = [*own, *buffers] if usual else []
        watched = usual and own[0].device.type in ("cpu", "cuda") and usable()
        self.marks = Unchanged([*self.dicts, *self.hooks], self.modules, self.tensors) if watched else None
        self.types, self.facts = list(map(type, self.modules)), self._facts()
        self.copies = [dict(d) for d in self.dicts]
        self.weights = [p for p in own if p.ndim == 4]
        self.parts: Any = None  # see parts.py
        self.reason = unusual(model) or (None if usual else QUIETLY) or _types_reason(own, buffers)
        self.in_chans = 0 if self.reason else model.stem[0].in_channels
        self.frozen: list[Tensor] = []  # parameters without gradients, see `frozen_blocks`
        if not self.reason and (blocks := frozen_blocks(model)) is not None:
            parts = [model.stem, *list(model.blocks)[:blocks]]
            self.frozen = [parameter for part in parts for parameter in part.parameters()]

    def holds(self) -> bool:
        """Return whether nothing has changed since the check."""
        if self.marks is None:
            return self._equals_copies()
        if self.marks.holds():
            return True
        state = self.marks.state()  # read before comparing, so that a change meanwhile is noticed
        same = self._equals_copies()
        if same:
            self.marks.remember(state)  # only now: other threads must not rely on it before
        return same

    def _equals_copies(self) -> bool:
        if any(self.hooks) or list(map(type, self.modules)) != self.types:
            return False
        try:
            if self.dicts != self.copies:
                return False
        except Exception:  # a tensor was replaced, and two tensors cannot be compared with ==
            return False
        # == does not notice that a one-element tensor was replaced by an equal one
        return all(map(operator.is_, self._held(), self.tensors)) and self._facts() == self.facts

    def _held(self) -> list[Tensor]:
        """Return the parameters and buffers that the modules hold now."""
        kinds = ([m._parameters for m in self.modules], [m._buffers for m in self.modules])
        return [t for dicts in kinds for d in dicts for t in d.values() if t is not None]

    def _facts(self) -> list[Any]:
        strided = [t.stride() if t.layout is torch.strided else None for t in self.tensors]
        return [*map(_FACTS, self.tensors), *strided]


def _types_reason(parameters: list[Tensor], buffers: list[Tensor]) -> str | None:
    """Return an error if tensors differ in dtype, else None; norms and biases may be fp32 if the weights are not."""
    kinds = {p.dtype for p in parameters if p.ndim == 4}
    all_kinds = {t.dtype for t in (*parameters, *buffers) if t.is_floating_point()}
    usual = len(kinds) == 1 and all_kinds <= {*kinds, torch.float32}
    return None if usual else "its parameters or statistics differ in dtype"


_FOUND: "weakref.WeakKeyDictionary[nn.Module, Found]" = weakref.WeakKeyDictionary()


def known(model: nn.Module) -> Found | None:
    """Return what was found in a model when it was last checked, or None if it never was."""
    return _FOUND.get(model)


def found(model: nn.Module) -> Found:
    """Return the result of `unusual`; the model is checked again only if something in it has changed."""
    about = known(model)
    if about is None or about.kind is not type(model) or not about.holds():
        about = _FOUND[model] = Found(model)
    return about
