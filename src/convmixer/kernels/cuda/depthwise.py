"""The depthwise convolution on normalised values: forward with statistics of its result, and the gradients.

"Taps" are the k * k weights of a channel. A program goes down a strip of an image, for one block of channels, and
computes one tile after another. A tile has 2 to 4 rows and 8 columns (4 for images up to 4 wide). A thread computes
two channels (one if there are at most 32), with the sums of the whole tile in registers. It reads each input row of
the tile once, and uses a value for all sums that need it, without shared memory or barriers. Only the loops over a
tile and over a row of taps are unrolled; with more unrolling the compiler takes minutes. A program writes one part of
each sum over the batch, see `sums`.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from convmixer.kernels.cuda.activation import activate, norm

_WIDE = 8  # columns of a tile, see `_wide`
_PROGRAMS = 1024  # least number of programs: several for each multiprocessor of the largest GPUs
_TAPS = 28  # taps whose gradients a program computes at once: each needs a register for its sum


def forward(x: Tensor, taps: Tensor, bias: Tensor, act: int) -> tuple[Tensor, Tensor]:
    """Return u, and the parts of the sums of act(u) and of its square, (P, 2, C).

    Args:
        x: (N, H, W, C).
        taps: (k * k, C) fp32, see `taps_of`.
        bias: (C,) fp32.
        act: 0 for GELU, 1 for ReLU.
    """
    u, parts = torch.empty_like(x), _parts(x, "statistics")
    _convolve(x, taps, u, act, mode="statistics", bias=bias, parts=parts)
    return u, parts


def forward_norm(x: Tensor, taps: Tensor, bias: Tensor, scale_shift: Tensor, act: int) -> Tensor:
    """Return h = norm(act(u)) + x, the first half of a block; the norm's scale and shift must be known."""
    h = torch.empty_like(x)
    _convolve(x, taps, h, act, mode="norm", bias=bias, scale_shift=scale_shift)
    return h


def input_gradient(du: Tensor, dh: Tensor, before: Tensor, taps: Tensor, act: int) -> tuple[Tensor, Tensor]:
    """Return dx, the gradient of the block's input: dh plus the gradient through the convolution, from du.

    Also return the parts of the sums of dx and of dx * act(before), (P, 2, C).
    """
    dx, parts = torch.empty_like(du), _parts(du, "gradient")
    _convolve(du, taps, dx, act, mode="gradient", residual=dh, before=before, parts=parts)
    return dx, parts


def weight_gradient(x: Tensor, du: Tensor, k: int) -> Tensor:
    """Return the parts of the gradient of the taps, (P, k * k, C)."""
    N, H, W, C = x.shape
    at_once = max(1, min(k, _TAPS // k))
    channels, groups = _channels(C), triton.cdiv(k, at_once)
    wanted = triton.cdiv(_PROGRAMS, triton.cdiv(C, channels) * groups)
    rows = max(1, triton.cdiv(N * H, wanted))
    count = triton.cdiv(N * H, rows)
    parts = torch.empty((count, k * k, C), dtype=torch.float32, device=x.device)
    _weight_gradient[(count, triton.cdiv(C, channels), groups)](
        x, du, parts, N * H, rows, H, W, C,
        K=k, AT_ONCE=at_once, WIDE=_wide(W), CHANNELS=channels, num_warps=_warps(channels),
    )  # fmt: skip
    return parts


def taps_of(weight: Tensor) -> Tensor:
    """Return depthwise weights (C, 1, k, k) as (k * k, C), fp32, contiguous."""
    return weight.reshape(weight.shape[0], -1).t().float().contiguous()


def _convolve(
    x: Tensor,
    taps: Tensor,
    out: Tensor,
    act: int,
    *,
    mode: str,
    bias: Tensor | None = None,
    scale_shift: Tensor | None = None,
    residual: Tensor | None = None,
    before: Tensor | None = None,
    parts: Tensor | None = None,
) -> None:
    _, H, W, C = x.shape
    if not x.numel():
        return
    k, shape = round(taps.shape[0] ** 0.5), _shape(x, mode)
    settings = shape["settings"] | {"ACT": act, "POLYNOMIAL": x.dtype is torch.bfloat16, "MODE": mode}
    _convolve_kernel[shape["grid"]](
        x, taps, bias, scale_shift, residual, before, out, parts, H, W, C, shape["strips"], K=k, **settings
    )


def _parts(x: Tensor, mode: str) -> Tensor:
    return torch.empty((_shape(x, mode)["grid"][0], 2, x.shape[3]), dtype=torch.float32, device=x.device)


def _shape(x: Tensor, mode: str) -> dict[str, Any]:
    """Return the grid and the sizes of a program, which depend only on shape, dtype and mode."""
    N, H, W, C = x.shape
    channels, wide = _channels(C), _wide(W)
    columns, blocks = triton.cdiv(W, wide), triton.cdiv(C, channels)
    # rows of a tile: as many as fit into the registers, beside the values that the tile reads and writes at its end
    wide_values = x.dtype is torch.float32
    high = 3 if mode == "gradient" else 2 if wide_values else 4
    rows = triton.cdiv(H, high) * high
    while rows > high and N * columns * triton.cdiv(H, rows) * blocks < _PROGRAMS:
        rows = triton.cdiv(rows // 2, high) * high
    settings = {"ROWS": rows, "HIGH": high, "WIDE": wide, "CHANNELS": channels, "num_warps": _warps(channels)}
    return {
        "grid": (N * triton.cdiv(H, rows) * columns, blocks),
        "strips": columns,
        "settings": settings,
    }


def _channels(C: int) -> int:
    return max(32, min(128, triton.next_power_of_2(C)))


def _warps(channels: int) -> int:
    return max(1, channels // 64)  # two channels for each thread


def _wide(W: int) -> int:
    return _WIDE if W > _WIDE // 2 else _WIDE // 2


@triton.jit
def _row(x, row, first, W, C, c, present, COUNT: tl.constexpr):
    """Return COUNT values of a row from column `first` on, as fp32; values outside the image are 0."""
    values = ()
    for i in tl.static_range(COUNT):
        w = first + i
        here = present & (w >= 0) & (w < W)
        values = values + (tl.load(x + (row * W + w) * C + c, mask=here, other=0.0).to(tl.float32),)
    return values


@triton.jit
def _add_taps(sums, values, taps, C, c, present, J: tl.constexpr, K: tl.constexpr, STEP: tl.constexpr,
              HIGH: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """Add the products of the values and one row of taps to row J of the tile's sums."""
    new = ()
    for i in tl.static_range(J * WIDE):
        new = new + (sums[i],)
    row = ()
    for i in tl.static_range(WIDE):
        row = row + (sums[J * WIDE + i],)
    for dx in tl.static_range(K):
        tap = tl.load(taps + dx * STEP * C + c, mask=present, other=0.0)
        next_row = ()
        for i in tl.static_range(WIDE):
            next_row = next_row + (row[i] + values[i + dx] * tap,)
        row = next_row
    new = new + row
    for i in tl.static_range((J + 1) * WIDE, HIGH * WIDE):
        new = new + (sums[i],)
    return new


@triton.jit
def _convolve_kernel(
    x, taps, bias, scale_shift, residual, before, out, parts, H, W, C, strips, K: tl.constexpr, ROWS: tl.constexpr,
    HIGH: tl.constexpr, WIDE: tl.constexpr, CHANNELS: tl.constexpr, ACT: tl.constexpr, POLYNOMIAL: tl.constexpr,
    MODE: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    present = c < C
    per_image = tl.cdiv(H, ROWS) * strips
    image, in_image = part // per_image, part % per_image
    begin, left = in_image // strips * ROWS, in_image % strips * WIDE
    base = image.to(tl.int64) * H * W * C
    # for the gradient the taps are in reverse order, and if k is even, the larger padding is on the other side
    TOP: tl.constexpr = K // 2 if MODE == "gradient" else (K - 1) // 2
    STEP: tl.constexpr = -1 if MODE == "gradient" else 1
    if MODE == "gradient":
        taps += (K * K - 1) * C
        start = tl.zeros([CHANNELS], tl.float32)
    else:
        start = tl.load(bias + c, mask=present, other=0.0)
    if MODE == "norm":
        scale = tl.load(scale_shift + c, mask=present, other=0.0)
        shift = tl.load(scale_shift + C + c, mask=present, other=0.0)
    first_sum = tl.zeros([CHANNELS], tl.float32)
    second_sum = tl.zeros([CHANNELS], tl.float32)
    for top in range(begin, tl.minimum(begin + ROWS, H), HIGH):
        sums = ()
        for i in tl.static_range(HIGH * WIDE):
            sums = sums + (start,)
        for r in range(tl.maximum(top - TOP, 0), tl.minimum(top + HIGH - 1 - TOP + K, H)):
            values = _row(x + base, r, left - TOP, W, C, c, present, WIDE + K - 1)
            for j in tl.static_range(HIGH):
                dy = r - top - j + TOP
                if (dy >= 0) & (dy < K) & (top + j < H):
                    sums = _add_taps(sums, values, taps + dy * K * STEP * C, C, c, present, j, K, STEP, HIGH, WIDE)
        for j in tl.static_range(HIGH):
            for i in tl.static_range(WIDE):
                here = present & (top + j < H) & (left + i < W)
                at = base + ((top + j) * W + left + i) * C + c
                value = sums[j * WIDE + i]
                if MODE == "norm":
                    value = norm(value, scale, shift, ACT, POLYNOMIAL)
                    value += tl.load(x + at, mask=here, other=0.0).to(tl.float32)
                    tl.store(out + at, value.to(out.dtype.element_ty), mask=here)
                else:
                    if MODE == "gradient":
                        value += tl.load(residual + at, mask=here, other=0.0).to(tl.float32)
                    rounded = value.to(out.dtype.element_ty)
                    tl.store(out + at, rounded, mask=here)
                    value = tl.where(here, rounded.to(tl.float32), 0.0)
                    if MODE == "gradient":
                        a = activate(tl.load(before + at, mask=here, other=0.0).to(tl.float32), ACT, POLYNOMIAL)
                        first_sum += value
                        second_sum += value * a
                    else:
                        a = activate(value, ACT, POLYNOMIAL)
                        first_sum += a
                        second_sum += a * a
    if MODE != "norm":
        tl.store(parts + part * 2 * C + c, first_sum, mask=present)
        tl.store(parts + (part * 2 + 1) * C + c, second_sum, mask=present)


@triton.jit
def _weight_gradient(
    x, du, parts, all_rows, rows, H, W, C, K: tl.constexpr, AT_ONCE: tl.constexpr, WIDE: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """Compute a part of the gradient of AT_ONCE rows of taps, from `rows` consecutive rows of the stacked images."""
    part = tl.program_id(0)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    present = c < C
    first_dy = tl.program_id(2) * AT_ONCE
    TOP: tl.constexpr = (K - 1) // 2
    sums = ()
    for i in tl.static_range(AT_ONCE * K):
        sums = sums + (tl.zeros([CHANNELS], tl.float32),)
    for row in range(part * rows, tl.minimum((part + 1) * rows, all_rows)):
        image, y = row // H, row % H
        base = image.to(tl.int64) * H * W * C
        for left in range(0, W, WIDE):
            gradient = _row(du + base, y, left, W, C, c, present, WIDE)
            for j in tl.static_range(AT_ONCE):
                r = y + first_dy + j - TOP
                if (r >= 0) & (r < H) & (first_dy + j < K):
                    values = _row(x + base, r, left - TOP, W, C, c, present, WIDE + K - 1)
                    sums = _add_products(sums, values, gradient, j, K, AT_ONCE, WIDE)
    for j in tl.static_range(AT_ONCE):
        for dx in tl.static_range(K):
            tap = (first_dy + j) * K + dx
            here = present & (first_dy + j < K)
            tl.store(parts + (part * K * K + tap) * C + c, sums[j * K + dx], mask=here)


@triton.jit
def _add_products(sums, values, gradient, J: tl.constexpr, K: tl.constexpr, AT_ONCE: tl.constexpr,
                  WIDE: tl.constexpr):  # fmt: skip
    new = ()
    for i in tl.static_range(J * K):
        new = new + (sums[i],)
    for dx in tl.static_range(K):
        total = sums[J * K + dx]
        for i in tl.static_range(WIDE):
            total += values[i + dx] * gradient[i]
        new = new + (total,)
    for i in tl.static_range((J + 1) * K, AT_ONCE * K):
        new = new + (sums[i],)
    return new
