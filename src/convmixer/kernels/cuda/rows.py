"""The element-wise steps between the convolutions and the matrix multiplications, on activations as (rows, C).

A row is the C channels of one pixel. A program computes a block of rows and channels, tile by tile, and writes one
part of each sum over the batch, see `sums`.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from convmixer.kernels.cuda.activation import activate, norm, norm_backward

_PROGRAMS = 2048  # least number of programs: several for each multiprocessor of the largest GPUs
_MOST_ROWS = 512  # most rows per program, so that fp32 sums stay short


def statistics(v: Tensor, act: int) -> Tensor:
    """Return the parts of the sums of act(v) and of its square, (P, 2, C)."""
    return _with_parts(_statistics, 2, v, v, act)


def products(grad: Tensor, v: Tensor, act: int) -> Tensor:
    """Return the parts of the sums of grad and of grad * act(v), (P, 2, C)."""
    return _with_parts(_products, 2, v, grad, v, act)


def act_norm(v: Tensor, scale_shift: Tensor, act: int) -> Tensor:
    """Return norm(act(v))."""
    y = torch.empty_like(v)
    _launch(_act_norm, v, v, scale_shift, y, act)
    return y


def residual(u: Tensor, scale_shift: Tensor, x: Tensor, act: int) -> Tensor:
    """Return h = norm(act(u)) + x."""
    h = torch.empty_like(u)
    _launch(_residual, u, u, scale_shift, x, h, act)
    return h


def act_norm_backward(grad: Tensor, v: Tensor, back: Tensor, out: Tensor, act: int) -> Tensor:
    """Write the gradient of v to `out`, and return the parts of its sum, (P, 1, C).

    `grad` is the gradient of norm(act(v)); `out` may be the same tensor.
    """
    return _with_parts(_act_norm_backward, 1, v, grad, v, back, out, act)


def operands(
    grad: Tensor,
    v: Tensor,
    back: Tensor,
    u: Tensor,
    norm_u: Tensor,
    before: Tensor,
    norm_before: Tensor,
    act: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what the gradients of the pointwise convolution need: v's gradient; h; x; and the parts of the sum of
    v's gradient, (P, 1, C).
    """
    dv, h, x = (torch.empty_like(v) for _ in range(3))
    parts = _with_parts(_operands, 1, v, grad, v, back, u, norm_u, before, norm_before, dv, h, x, act)
    return dv, h, x, parts


def pool(v: Tensor, scale_shift: Tensor, act: int) -> Tensor:
    """Return the mean of norm(act(v)) over each image, fp32 (N, C)."""
    N, H, W, C = v.shape
    y = torch.empty((N, C), dtype=torch.float32, device=v.device)
    if y.numel():
        _pool[_image_grid(v)](v, scale_shift, y, H * W, C, **_common(act, v), **_image_tile(v))
    return y


def pool_backward(grad: Tensor, v: Tensor, act: int) -> tuple[Tensor, Tensor]:
    """Return each pixel's gradient, and the parts of the sums of the gradient and of gradient * act(v), (N, 2, C)."""
    N, H, W, C = v.shape
    dy, parts = torch.empty_like(v), torch.empty((N, 2, C), dtype=torch.float32, device=v.device)
    _pool_backward[_image_grid(v)](grad, v, dy, parts, H * W, C, **_common(act, v), **_image_tile(v))
    return dy, parts


def _with_parts(kernel: Callable[..., None], count: int, like: Tensor, *args: Any) -> Tensor:
    shape = _shape(like)
    parts = torch.empty((shape["grid"][0], count, like.shape[-1]), dtype=torch.float32, device=like.device)
    _launch(kernel, like, *args[:-1], parts, args[-1])
    return parts


def _launch(kernel: Any, like: Tensor, *args: Any) -> None:
    *tensors, act = args
    if like.numel():
        shape = _shape(like)
        C = like.shape[-1]
        kernel[shape["grid"]](
            *tensors, like.numel() // C, C, ROWS=shape["rows"], **_common(act, like), **shape["tile"]
        )


def _common(act: int, like: Tensor) -> dict[str, Any]:
    return {"ACT": act, "POLYNOMIAL": like.dtype is torch.bfloat16}


def _shape(like: Tensor) -> dict[str, Any]:
    """Return the grid, the rows of a program and its tile, which depend only on the tensor's shape."""
    C = like.shape[-1]
    rows = like.numel() // C
    channels = min(64, triton.next_power_of_2(C))
    height = 1024 // channels
    columns = triton.cdiv(C, channels)
    each = triton.cdiv(triton.cdiv(rows * columns, _PROGRAMS), height) * height
    each = max(height, min(each, _MOST_ROWS))
    return {
        "grid": (triton.cdiv(rows, each), columns),
        "rows": each,
        "tile": {"HEIGHT": height, "CHANNELS": channels},
    }


def _image_grid(v: Tensor) -> tuple[int, int]:
    return v.shape[0], triton.cdiv(v.shape[3], min(64, triton.next_power_of_2(v.shape[3])))


def _image_tile(v: Tensor) -> dict[str, int]:
    return {"HEIGHT": 32, "CHANNELS": min(64, triton.next_power_of_2(v.shape[3]))}


@triton.jit
def _channels(CHANNELS: tl.constexpr):
    return tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)


@triton.jit
def _coefficient(rows, number, c, C):
    return tl.load(rows + number * C + c, mask=c < C, other=0.0)[None, :]


@triton.jit
def _tile(first, rows, c, C, HEIGHT: tl.constexpr):
    r = first + tl.arange(0, HEIGHT)
    return r.to(tl.int64)[:, None] * C + c[None, :], (r < rows)[:, None] & (c < C)[None, :]


@triton.jit
def _read(tensor, at, here):
    return tl.load(tensor + at, mask=here, other=0.0).to(tl.float32)


@triton.jit
def _write(tensor, at, here, value):
    """Store a value, and return it rounded to the stored dtype."""
    rounded = value.to(tensor.dtype.element_ty)
    tl.store(tensor + at, rounded, mask=here)
    return rounded.to(tl.float32)


@triton.jit
def _write_part(parts, part, number, count, sums, c, C):
    tl.store(parts + (part * count + number) * C + c, tl.sum(sums, 0), mask=c < C)


@triton.jit
def _statistics(
    v, parts, rows, C, ROWS: tl.constexpr, ACT: tl.constexpr, POLYNOMIAL: tl.constexpr, HEIGHT: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    c = _channels(CHANNELS)
    sums = tl.zeros([HEIGHT, CHANNELS], tl.float32)
    squares = tl.zeros([HEIGHT, CHANNELS], tl.float32)
    for r in range(0, ROWS, HEIGHT):
        at, here = _tile(tl.program_id(0) * ROWS + r, rows, c, C, HEIGHT)
        a = activate(_read(v, at, here), ACT, POLYNOMIAL)  # rows after the last add act(0), which is 0
        sums += a
        squares += a * a
    _write_part(parts, tl.program_id(0), 0, 2, sums, c, C)
    _write_part(parts, tl.program_id(0), 1, 2, squares, c, C)


@triton.jit
def _products(
    grad, v, parts, rows, C, ROWS: tl.constexpr, ACT: tl.constexpr, POLYNOMIAL: tl.constexpr, HEIGHT: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    c = _channels(CHANNELS)
    sums = tl.zeros([HEIGHT, CHANNELS], tl.float32)
    with_act = tl.zeros([HEIGHT, CHANNELS], tl.float32)
    for r in range(0, ROWS, HEIGHT):
        at, here = _tile(tl.program_id(0) * ROWS + r, rows, c, C, HEIGHT)
        g = _read(grad, at, here)
        sums += g
        with_act += g * activate(_read(v, at, here), ACT, POLYNOMIAL)
    _write_part(parts, tl.program_id(0), 0, 2, sums, c, C)
    _write_part(parts, tl.program_id(0), 1, 2, with_act, c, C)


@triton.jit
def _act_norm(
    v, scale_shift, y, rows, C, ROWS: tl.constexpr, ACT: tl.constexpr, POLYNOMIAL: tl.constexpr,
    HEIGHT: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    c = _channels(CHANNELS)
    scale, shift = _coefficient(scale_shift, 0, c, C), _coefficient(scale_shift, 1, c, C)
    for r in range(0, ROWS, HEIGHT):
        at, here = _tile(tl.program_id(0) * ROWS + r, rows, c, C, HEIGHT)
        _write(y, at, here, norm(_read(v, at, here), scale, shift, ACT, POLYNOMIAL))


@triton.jit
def _residual(
    u, scale_shift, x, h, rows, C, ROWS: tl.constexpr, ACT: tl.constexpr, POLYNOMIAL: tl.constexpr,
    HEIGHT: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    c = _channels(CHANNELS)
    scale, shift = _coefficient(scale_shift, 0, c, C), _coefficient(scale_shift, 1, c, C)
    for r in range(0, ROWS, HEIGHT):
        at, here = _tile(tl.program_id(0) * ROWS + r, rows, c, C, HEIGHT)
        _write(h, at, here, norm(_read(u, at, here), scale, shift, ACT, POLYNOMIAL) + _read(x, at, here))


@triton.jit
def _act_norm_backward(
    grad, v, back, out, parts, rows, C, ROWS: tl.constexpr, ACT: tl.constexpr, POLYNOMIAL: tl.constexpr,
    HEIGHT: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    c = _channels(CHANNELS)
    a, b, d = _coefficient(back, 0, c, C), _coefficient(back, 1, c, C), _coefficient(back, 2, c, C)
    sums = tl.zeros([HEIGHT, CHANNELS], tl.float32)
    for r in range(0, ROWS, HEIGHT):
        at, here = _tile(tl.program_id(0) * ROWS + r, rows, c, C, HEIGHT)
        g = norm_backward(_read(grad, at, here), _read(v, at, here), a, b, d, ACT, POLYNOMIAL)
        sums += tl.where(here, _write(out, at, here, g), 0.0)
    _write_part(parts, tl.program_id(0), 0, 1, sums, c, C)


@triton.jit
def _operands(
    grad, v, back, u, norm_u, before, norm_before, dv, h, x, parts, rows, C, ROWS: tl.constexpr, ACT: tl.constexpr,
    POLYNOMIAL: tl.constexpr, HEIGHT: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    c = _channels(CHANNELS)
    a, b, d = _coefficient(back, 0, c, C), _coefficient(back, 1, c, C), _coefficient(back, 2, c, C)
    scale_u, shift_u = _coefficient(norm_u, 0, c, C), _coefficient(norm_u, 1, c, C)
    scale, shift = _coefficient(norm_before, 0, c, C), _coefficient(norm_before, 1, c, C)
    sums = tl.zeros([HEIGHT, CHANNELS], tl.float32)
    for r in range(0, ROWS, HEIGHT):
        at, here = _tile(tl.program_id(0) * ROWS + r, rows, c, C, HEIGHT)
        g = norm_backward(_read(grad, at, here), _read(v, at, here), a, b, d, ACT, POLYNOMIAL)
        sums += tl.where(here, _write(dv, at, here, g), 0.0)
        value = _write(x, at, here, norm(_read(before, at, here), scale, shift, ACT, POLYNOMIAL))
        _write(h, at, here, norm(_read(u, at, here), scale_u, shift_u, ACT, POLYNOMIAL) + value)
    _write_part(parts, tl.program_id(0), 0, 1, sums, c, C)


@triton.jit
def _pool(
    v, scale_shift, y, pixels, C, ACT: tl.constexpr, POLYNOMIAL: tl.constexpr, HEIGHT: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    c = _channels(CHANNELS)
    image = v + tl.program_id(0).to(tl.int64) * pixels * C
    sums = tl.zeros([HEIGHT, CHANNELS], tl.float32)
    for first in range(0, pixels, HEIGHT):
        at, here = _tile(first, pixels, c, C, HEIGHT)
        sums += activate(_read(image, at, here), ACT, POLYNOMIAL)
    mean = tl.sum(sums, 0)[None, :] / pixels
    y_row = mean * _coefficient(scale_shift, 0, c, C) + _coefficient(scale_shift, 1, c, C)
    tl.store(y + tl.program_id(0) * C + c[None, :], y_row, mask=(c < C)[None, :])


@triton.jit
def _pool_backward(
    grad, v, dy, parts, pixels, C, ACT: tl.constexpr, POLYNOMIAL: tl.constexpr, HEIGHT: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    c = _channels(CHANNELS)
    n = tl.program_id(0)
    offset = n.to(tl.int64) * pixels * C
    share = _coefficient(grad, n, c, C) / pixels
    share = share.to(dy.dtype.element_ty).to(tl.float32)
    sums = tl.zeros([HEIGHT, CHANNELS], tl.float32)
    for first in range(0, pixels, HEIGHT):
        at, here = _tile(first, pixels, c, C, HEIGHT)
        sums += activate(_read(v + offset, at, here), ACT, POLYNOMIAL)
        _write(dy + offset, at, here, tl.broadcast_to(share, [HEIGHT, CHANNELS]))
    part = parts + n * 2 * C + c[None, :]
    tl.store(part, share * pixels, mask=(c < C)[None, :])
    tl.store(part + C, share * tl.sum(sums, 0)[None, :], mask=(c < C)[None, :])
