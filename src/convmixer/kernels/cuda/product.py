"""The pointwise convolution as a multiplication of (rows, C) by (C, C), fused with the steps before and after it.

16-bit multiplications use the tensor cores with fp32 sums. fp32 products use cuBLAS, with torch's TF32 setting, and
the steps before and after are separate kernels: without tensor cores, a fused kernel is not faster. A program
writes one part of each sum over the batch, see `sums`.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from convmixer.kernels.cuda import rows
from convmixer.kernels.cuda.activation import activate, norm

FUSED_WIDTH = 256  # up to this many channels a program computes whole rows, so h is computed only once


def forward(u: Tensor, norm_u: Tensor, x: Tensor, weight: Tensor, bias: Tensor, act: int) -> tuple[Tensor, Tensor]:
    """Return v = (norm(act(u)) + x) weight + bias, and the parts of the sums of act(v) and its square, (P, 2, C).

    Args:
        u, x: (N, H, W, C).
        norm_u: Scale and shift, (2, C) fp32.
        weight: (C, C) of u's dtype, outputs first.
        bias: (C,) fp32.
        act: 0 for GELU, 1 for ReLU.
    """
    if u.dtype is torch.float32:
        v = _by_library(rows.residual(u, norm_u, x, act), weight.t(), bias)
        return v, rows.statistics(v, act)
    v = torch.empty_like(u)
    if u.shape[-1] <= FUSED_WIDTH:
        return v, _multiply(u, weight.t(), v, act, mode="statistics", bias=bias, residual=x, norm_u=norm_u)
    h = rows.residual(u, norm_u, x, act)
    return v, _multiply(h, weight.t(), v, act, mode="statistics", bias=bias)


def forward_norm(h: Tensor, weight: Tensor, bias: Tensor, norm_v: Tensor, act: int) -> Tensor:
    """Return norm(act(h weight + bias)), the second half of a block; the norm's scale and shift must be known."""
    if h.dtype is torch.float32:
        return rows.act_norm(_by_library(h, weight.t(), bias), norm_v, act)
    y = torch.empty_like(h)
    _multiply(h, weight.t(), y, act, mode="norm", bias=bias, norm_out=norm_v)
    return y


def input_gradient(dv: Tensor, weight: Tensor, u: Tensor, out: Tensor, act: int) -> Tensor:
    """Write the gradient dh = dv weight to `out`; return the parts of the sums of dh and dh * act(u), (P, 2, C)."""
    if dv.dtype is torch.float32:
        torch.mm(_matrix(dv), weight, out=_matrix(out))
        return rows.products(out, u, act)
    return _multiply(dv, weight, out, act, mode="products", other=u)


def weight_gradient(dv: Tensor, h: Tensor) -> Tensor:
    """Return dv^T h with fp32 sums, (C, C) fp32."""
    left, right = _matrix(dv).t(), _matrix(h)
    if dv.dtype is torch.float32:
        return torch.mm(left, right)
    if dv.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return torch.mm(left.float(), right.float())


def _matrix(x: Tensor) -> Tensor:
    return x.view(-1, x.shape[-1])


def _by_library(h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.addmm(bias, _matrix(h), weight).view_as(h)


def _multiply(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    act: int,
    *,
    mode: str,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    norm_u: Tensor | None = None,
    other: Tensor | None = None,
    norm_out: Tensor | None = None,
) -> Tensor:
    C = a.shape[-1]
    M = a.numel() // C
    tile = _tile(C, residual is not None)
    grid = (triton.cdiv(M, tile["ROWS"]) * triton.cdiv(C, tile["COLUMNS"]),)
    parts = torch.empty((triton.cdiv(M, tile["ROWS"]), 2, C), dtype=torch.float32, device=a.device)
    if M:
        _multiply_kernel[grid](
            a, b, bias, residual, norm_u, other, norm_out, out, parts, M, C, b.stride(0), b.stride(1),
            ACT=act, POLYNOMIAL=a.dtype is torch.bfloat16, MODE=mode, RESIDUAL=residual is not None,
            WIDEN=not a.is_cuda, **tile,
        )  # fmt: skip
    return parts


def _tile(C: int, fused: bool) -> dict[str, Any]:
    """Return the tile of a program: its rows, its columns, and how many terms of the sums it adds at once."""
    width = max(16, triton.next_power_of_2(C))
    if fused:
        return {
            "ROWS": 64,
            "COLUMNS": width,
            "DEPTH": min(32, width),
            "GROUP": 1,
            "num_warps": 4 if width < 256 else 8,
        }
    if width <= 64:
        return {"ROWS": 128, "COLUMNS": width, "DEPTH": width, "GROUP": 1, "num_warps": 4, "num_stages": 3}
    return {"ROWS": 128, "COLUMNS": 128, "DEPTH": 64, "GROUP": 8, "num_warps": 8, "num_stages": 3}


@triton.jit
def _multiply_kernel(
    a, b, bias, residual, norm_u, other, norm_out, out, parts, M, C, b_depth, b_column, ACT: tl.constexpr,
    POLYNOMIAL: tl.constexpr, MODE: tl.constexpr, RESIDUAL: tl.constexpr, WIDEN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    # first all GROUP tiles of rows for one tile of columns, then for the next, so that a and b stay in the L2 cache
    tall, wide = tl.cdiv(M, ROWS), tl.cdiv(C, COLUMNS)
    first = tl.program_id(0) // (GROUP * wide) * GROUP
    high = tl.minimum(tall - first, GROUP)
    in_group = tl.program_id(0) % (GROUP * wide)
    part, column = first + in_group % high, in_group // high
    r = part * ROWS + tl.arange(0, ROWS)
    c = column * COLUMNS + tl.arange(0, COLUMNS)
    row_at = r.to(tl.int64)[:, None] * C
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for begin in range(0, C, DEPTH):
        d = begin + tl.arange(0, DEPTH)
        here = (r < M)[:, None] & (d < C)[None, :]
        left = tl.load(a + row_at + d[None, :], mask=here, other=0.0)
        if RESIDUAL:
            scale = tl.load(norm_u + d, mask=d < C, other=0.0)[None, :]
            shift = tl.load(norm_u + C + d, mask=d < C, other=0.0)[None, :]
            x = tl.load(residual + row_at + d[None, :], mask=here, other=0.0).to(tl.float32)
            left = (norm(left.to(tl.float32), scale, shift, ACT, POLYNOMIAL) + x).to(a.dtype.element_ty)
        right = tl.load(
            b + d[:, None] * b_depth + c[None, :] * b_column, mask=(d < C)[:, None] & (c < C)[None, :], other=0.0
        )
        if WIDEN:  # Triton's interpreter cannot multiply bf16
            left, right = left.to(tl.float32), right.to(tl.float32)
        sums = tl.dot(left, right, sums)
    at = row_at + c[None, :]
    here = (r < M)[:, None] & (c < C)[None, :]
    if MODE != "products":
        sums += tl.load(bias + c, mask=c < C, other=0.0)[None, :]
    if MODE == "norm":
        scale = tl.load(norm_out + c, mask=c < C, other=0.0)[None, :]
        shift = tl.load(norm_out + C + c, mask=c < C, other=0.0)[None, :]
        sums = norm(sums, scale, shift, ACT, POLYNOMIAL)
    rounded = sums.to(out.dtype.element_ty)
    tl.store(out + at, rounded, mask=here)
    if MODE != "norm":
        value = tl.where(here, rounded.to(tl.float32), 0.0)
        if MODE == "products":
            factor = activate(tl.load(other + at, mask=here, other=0.0).to(tl.float32), ACT, POLYNOMIAL)
            first_sum, second_sum = value, value * factor
        else:
            first_sum = activate(value, ACT, POLYNOMIAL)
            second_sum = first_sum * first_sum
        tl.store(parts + part * 2 * C + c, tl.sum(first_sum, 0), mask=c < C)
        tl.store(parts + (part * 2 + 1) * C + c, tl.sum(second_sum, 0), mask=c < C)
