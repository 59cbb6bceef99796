"""ConvMixer with single parts replaced, for controlled comparisons.

Models of other families are in `peers`; sizes are chosen in `convmixer.studies`.
"""

import itertools
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn as nn

from convmixer.errors import RequestError, unknown
from convmixer.models.convmixer import ConvMixer
from convmixer.models.layers import DepthwiseConv2d, Residual, activation


class Attention(nn.Module):
    """Multi-head self-attention over positions with a learned relative position bias: keeps (B, dim, H, W).

    A convolution knows the relative position of each neighbour. The bias gives attention the same knowledge inside
    the mixer, so the rest of the model stays as it is.

    Args:
        dim: Channels, a multiple of `heads`.
        grid: Height and width in positions; the only size it accepts.
        heads: Attention heads.

    Raises:
        RequestError: `dim` is not a multiple of `heads`.

    Source: arXiv 2010.11929, App. A (attention); arXiv 2103.14030, Sec. 3.2, Eq. 4 (bias).
    """

    def __init__(self, dim: int, grid: int, heads: int) -> None:
        super().__init__()
        if dim % heads:
            raise RequestError(f"dim {dim} must be a multiple of heads {heads}")
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.bias = nn.Parameter(torch.zeros(heads, (2 * grid - 1) ** 2))
        y, x = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
        y, x = y.flatten(), x.flatten()  # (N,)
        offset = (y[:, None] - y + grid - 1) * (2 * grid - 1) + x[:, None] - x + grid - 1  # (N, N)
        self.register_buffer("offset", offset, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, C, H, W = x.shape
        tokens = x.flatten(2).transpose(1, 2)  # (B, N, C)
        q, k, v = self.qkv(tokens).view(B, H * W, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        bias = self.bias[:, cast(torch.Tensor, self.offset)].to(q.dtype)  # (heads, N, N)
        # written out: with a trainable bias on a CPU, torch's attention does this and two more steps for masked rows
        scores = q * (C // self.heads) ** -0.5 @ k.transpose(2, 3) + bias  # (B, heads, N, N)
        out = scores.softmax(3) @ v  # (B, heads, N, C // heads)
        out = self.proj(out.transpose(1, 2).reshape(B, H * W, C))
        return out.transpose(1, 2).reshape(B, C, H, W)


class TokenMixing(nn.Module):
    """One linear map or two-layer perceptron over the positions, the same for every channel: keeps (B, dim, H, W).

    Args:
        grid: Height and width in positions; the only size it accepts.
        hidden: Width of the hidden layer; 0 means one linear map.

    Source: arXiv 2105.01601, Eq. 1 (token MLP); arXiv 2105.03404, Eq. 2 (linear).
    """

    def __init__(self, grid: int, hidden: int) -> None:
        super().__init__()
        n = grid * grid
        self.mix: nn.Module = (
            nn.Sequential(nn.Linear(n, hidden), nn.GELU(), nn.Linear(hidden, n)) if hidden else nn.Linear(n, n)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.flatten(2).transpose(1, 2)  # (B, N, C)
        for layer in self.mix if isinstance(self.mix, nn.Sequential) else [self.mix]:
            y = _over_positions(layer.weight, y, layer.bias) if isinstance(layer, nn.Linear) else layer(y)
        return y.transpose(1, 2).reshape(x.shape)


def _over_positions(matrix: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return matrix (M, N) times x (B, N, C) plus bias (M,): (B, M, C). x is not copied in either memory layout."""
    matrices = matrix.expand(x.shape[0], -1, -1)
    return torch.bmm(matrices, x) if bias is None else torch.baddbmm(bias[:, None], matrices, x)


class AveragePooling(nn.Module):
    """Average over a window around every position: keeps (B, dim, H, W). Positions outside the image do not count.

    It is computed as a multiplication by a fixed matrix, which on a CPU trains about three times as fast as torch's
    pooling.

    Args:
        grid: Height and width in positions; the only size it accepts.
        window: Side of the window, odd.

    Raises:
        RequestError: The window is even, so it has no centre.

    Source: arXiv 2111.11418, Sec. 3.2, here with the residual of the skeleton instead of a subtraction.
    """

    def __init__(self, grid: int, window: int) -> None:
        super().__init__()
        if window % 2 == 0:
            raise RequestError(f"average pooling needs an odd kernel_size to be centred, not {window}")
        place = torch.arange(grid)
        near = ((place[:, None] - place).abs() <= window // 2).float()  # (grid, grid)
        rows = near / near.sum(1, keepdim=True)
        self.register_buffer("matrix", torch.kron(rows, rows), persistent=False)  # (N, N)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = _over_positions(cast(torch.Tensor, self.matrix), x.flatten(2).transpose(1, 2))
        return y.transpose(1, 2).reshape(x.shape)


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels at every position: keeps (B, dim, H, W)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


NORMS: dict[str, Callable[[int], nn.Module]] = {"batch": nn.BatchNorm2d, "layer": LayerNorm2d}
MIXERS = ("depthwise", "attention", "token-mlp", "linear", "pool", "none")
STEMS = ("patch", "overlap", "stack", "stride1", "stride1-pool")
RESIDUALS = ("depthwise", "both", "none")


class Isotropic(ConvMixer):
    """ConvMixer with another spatial mixer, stem, norm or placement of the residuals.

    With every option at its default it is the ConvMixer of the paper, parameter for parameter.

    Args:
        dim: Width.
        depth: Number of blocks.
        mixer: What replaces the depthwise convolution: "depthwise" (nothing replaced), "attention", "token-mlp"
            (MLP-Mixer), "linear" (ResMLP), "pool" (average over the same window), "none".
        stem: What replaces the patch embedding: "patch" (nothing replaced), "overlap" (kernel 2p - 1, stride p),
            "stack" (3x3 convolutions of stride 2, so p must be a power of two), "stride1-pool" (3x3 at full
            resolution, then average pooling to the same grid), "stride1" (3x3 and no reduction: p is ignored).
        residual: "depthwise" as in the paper, "both" (around the pointwise part too), "none".
        norm: "batch" as in the paper, or "layer".
        img_size: Side of the image; attention, token MLP, linear mixing and pooling accept only this size.
        heads: Heads of attention.
        kernel_size: Window of the depthwise convolution and of the pooling.
        patch_size: Stride of the stem.
        in_chans: Channels of the image.
        num_classes: Outputs.
        act: "gelu" or "relu".
        drop_rate: Dropout before the classifier.

    Raises:
        RequestError: An option is not known or the sizes do not fit together.

    Source: arXiv 2201.09792, Sec. 2 and the ablations of its appendix; mixers and stems ours.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        mixer: str = "depthwise",
        stem: str = "patch",
        residual: str = "depthwise",
        norm: str = "batch",
        img_size: int = 32,
        heads: int = 4,
        kernel_size: int = 9,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 10,
        act: str = "gelu",
        drop_rate: float = 0.0,
    ) -> None:
        _check(mixer, stem, residual, norm, img_size, patch_size)
        super().__init__(dim, depth, kernel_size, patch_size, in_chans, num_classes, act, drop_rate)
        grid = img_size if stem == "stride1" else img_size // patch_size
        self.mixer, self.stem_kind = mixer, stem
        if stem != "patch":
            self.stem = make_stem(stem, dim, patch_size, in_chans, act)
        blocks = [cast(Any, block) for block in self.blocks]
        for block in blocks:
            block[0].fn[0] = make_mixer(mixer, block[0].fn[0], dim, grid, heads)
        if residual != "depthwise":
            self.blocks = nn.Sequential(*(_place_residual(block, residual) for block in blocks))
        if norm != "batch":
            _replace_norms(self, NORMS[norm])

    def no_weight_decay(self) -> set[str]:
        """Return the names of all biases; by its shape, attention's position bias would otherwise be decayed."""
        return {name for name, _ in self.named_parameters() if name.endswith(".bias")}


def _check(mixer: str, stem: str, residual: str, norm: str, img_size: int, patch_size: int) -> None:
    for kind, name, known in (
        ("mixer", mixer, MIXERS),
        ("stem", stem, STEMS),
        ("residual", residual, RESIDUALS),
        ("norm", norm, NORMS),
    ):
        if name not in known:
            raise unknown(kind, name, known)
    if patch_size < 1 or img_size % patch_size:
        raise RequestError(f"img_size {img_size} must be a multiple of patch_size {patch_size}")
    if stem == "stack" and (patch_size < 2 or patch_size & (patch_size - 1)):
        raise RequestError(f"a stack of stride-2 convolutions needs a patch_size of 2, 4, 8, ..., not {patch_size}")


def make_mixer(mixer: str, depthwise: DepthwiseConv2d, dim: int, grid: int, heads: int) -> nn.Module:
    """Return the spatial mixer of one block; `depthwise` is the convolution that it replaces."""
    if mixer == "attention":
        return Attention(dim, grid, heads)
    if mixer in ("token-mlp", "linear"):
        return TokenMixing(grid, 2 * grid * grid if mixer == "token-mlp" else 0)
    if mixer == "pool":
        return AveragePooling(grid, depthwise.kernel_size[0])
    return nn.Identity() if mixer == "none" else depthwise


def make_stem(stem: str, dim: int, patch_size: int, in_chans: int, act: str) -> nn.Sequential:
    """Return a stem (B, in_chans, H, W) -> (B, dim, h, w), each convolution followed by activation and BatchNorm.

    Source: ours; "stack" follows arXiv 2106.14881 in doubling the width with every halving.
    """

    def conv(inputs: int, outputs: int, kernel: int, stride: int) -> list[nn.Module]:
        layer = nn.Conv2d(inputs, outputs, kernel, stride, padding=(kernel - 1) // 2)
        return [layer, activation(act), nn.BatchNorm2d(outputs)]

    if stem == "overlap":
        return nn.Sequential(*conv(in_chans, dim, 2 * patch_size - 1, patch_size))
    if stem == "stack":
        steps = patch_size.bit_length() - 1
        widths = [in_chans, *(max(1, dim >> (steps - 1 - i)) for i in range(steps))]
        return nn.Sequential(*(m for a, b in itertools.pairwise(widths) for m in conv(a, b, 3, 2)))
    pool = [nn.AvgPool2d(patch_size)] if stem == "stride1-pool" else []
    return nn.Sequential(*conv(in_chans, dim, 3, 1), *pool)


def _place_residual(block: Any, residual: str) -> nn.Sequential:
    spatial, channel = block[0], block[1:]
    return nn.Sequential(spatial, Residual(channel)) if residual == "both" else nn.Sequential(spatial.fn, *channel)


def _replace_norms(model: nn.Module, norm: Callable[[int], nn.Module]) -> None:
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, norm(child.num_features))
