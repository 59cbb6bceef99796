"""Lists what the kernels need from a model: its norms, blocks and tensors. Lists are kept until the model changes."""

from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from convmixer.fast.structure import all_depthwise, known, norms_of, plain_blocks


class Parts:
    """Norms, activation and blocks of a model, and their tensors in the order of the kernels.

    Args:
        norms: All norms, in order.
        act: The activation.
        blocks: The blocks; may be empty.
    """

    def __init__(self, norms: list[Any], act: type[nn.Module], blocks: list[Any]) -> None:
        self.norms, self.act, self.blocks = norms, act, blocks
        self.depthwise = all_depthwise(blocks)
        layers = [norms[0]]
        for block in blocks:
            layers += [block[0].fn[0]] * self.depthwise + [block[0].fn[2], block[1], block[3]]
        self._parameters = [tensor for layer in layers for tensor in (layer.weight, layer.bias)]
        self._running = [tensor for norm in norms for tensor in (norm.running_mean, norm.running_var)]
        self._fit = all(t.dtype is torch.float32 and t.is_contiguous() for t in (*self._parameters, *self._running))

    def first(self, blocks: int) -> "Parts":
        """Return the parts of only the first blocks."""
        return (
            self
            if blocks == len(self.blocks)
            else Parts(self.norms[: 2 * blocks + 1], self.act, self.blocks[:blocks])
        )

    def parameters(self) -> list[Tensor]:
        """Return fp32 parameters in the order of `kernels.blocks`, or of `kernels.mixed` if not all mixers are
        depthwise.
        """
        return self._as_fp32(self._parameters)

    def running(self) -> list[Tensor]:
        """Return mean and variance of each norm, fp32."""
        return self._as_fp32(self._running)

    def _as_fp32(self, tensors: list[Tensor]) -> list[Tensor]:
        return tensors if self._fit else [tensor.float().contiguous() for tensor in tensors]


def parts_of(model: Any) -> Parts:
    """Return the parts of a model that the kernels compute; they must support the model (`support.unfit`).

    If the first block runs as torch modules (`structure.plain_blocks`), the parts begin with that block's last norm.
    """
    about = None if torch.compiler.is_compiling() else known(model)
    if about is not None and about.parts is not None:
        return about.parts
    plain = plain_blocks(model)
    parts = Parts(norms_of(model)[plain:], type(model.stem[1]), list(model.blocks)[plain:])
    if about is not None:
        about.parts = parts
    return parts
