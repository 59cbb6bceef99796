"""The depthwise convolution in plain torch: what the C++ must match, for any dtype, float64 included."""

import torch.nn.functional as F
from torch import Tensor


def depthwise_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(N, C, H, W) -> (N, C, H, W); an even kernel pads one more at the right and the bottom."""
    before, after = (weight.shape[2] - 1) // 2, weight.shape[2] // 2
    return F.conv2d(F.pad(x, (before, after, before, after)), weight, bias, groups=x.shape[1])
