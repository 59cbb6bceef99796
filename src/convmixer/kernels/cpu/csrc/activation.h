// GELU (exact, erf) and ReLU with their derivatives (slopes), for vectors. NaN stays NaN, and gelu(-inf) is NaN, as
// in torch.
//
// For float storage GELU is exact to a few float roundings. For bf16 storage the polynomials below stay within 2e-4
// (value) and 3e-4 (slope) of the exact function everywhere: a tenth of the rounding error of a bf16 near 1.
#pragma once
#include <type_traits>

#include "vec.h"

enum Activation : int { GELU = 0, RELU = 1 };

template <int N> INLINE vf polynomial(vf x, const float (&c)[N]) {
  vf sum = splat(c[N - 1]);
#pragma GCC unroll 16
  for (int i = N - 2; i >= 0; i--) sum = sum * x + c[i];
  return sum;
}

// e^x for x <= 0; the result is 0 for x <= -87.7.
INLINE vf exp_negative(vf x) {
  x = larger(x, splat(-88.0f));
  const vf shifter = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const vf whole = (x * 1.44269504f + shifter) - shifter;
  const vf rest = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  const float c[] = {1.0f, 1.0f, 0.5f, 1.6666667e-1f, 4.1666489e-2f, 8.3334519e-3f, 1.3974467e-3f, 1.9e-4f};
  const vi exponent = __builtin_convertvector(whole, vi) + 127;
  return polynomial(rest, c) * (vf)((exponent > 0 ? exponent : vi{}) << 23);
}

// The normal distribution function: 0.5 + x P(x^2) / Q(x^2), a minimax fit on [-5.6, 5.6] with an error below 1e-8. x
// is limited to [-5.9, 5.9]. At both ends |x P / Q| exceeds 0.5 by more than its rounding error, so the result,
// limited to [0, 1], is exactly 0 or 1 there and beyond.
INLINE vf normal_cdf(vf x) {
  const float p[] = {3.989422216e-01f, 3.437612115e-02f, 4.707259467e-03f,
                     1.738507407e-04f, 6.356520539e-06f, 2.214524040e-08f};
  const float q[] = {1.0f,             2.528338703e-01f, 2.894009370e-02f,
                     1.912978363e-03f, 7.510186293e-05f, 1.180208969e-06f};
  const vf near = larger(splat(-5.9f), smaller(splat(5.9f), x));  // x comes second, to keep NaN
  const vf t = near * near;
  const vf cdf = near * polynomial(t, p) / polynomial(t, q) + 0.5f;
  return smaller(larger(cdf, vf{}), splat(1.0f));
}

template <int ACT> INLINE vf activate_exactly(vf x) {
  if constexpr (ACT == RELU) return x < 0.0f ? vf{} : x;
  return x * normal_cdf(x);
}

template <int ACT> INLINE vf slope_exactly(vf x) {
  if constexpr (ACT == RELU) return x <= 0.0f ? vf{} : splat(1.0f);
  return normal_cdf(x) + x * (exp_negative(-0.5f * x * x) * 0.398942280f);
}

template <int N, int M> INLINE vg<N> polynomial(vg<N> x, const float (&c)[M]) {
  vg<N> sum = x * splat(c[M - 1]) + splat(c[M - 2]);
#pragma GCC unroll 16
  for (int i = M - 3; i >= 0; i--) sum = sum * x + splat(c[i]);
  return sum;
}

template <class T, int ACT> constexpr bool BY_POLYNOMIAL = ACT == GELU && std::is_same_v<T, bf16>;

template <class T, int ACT, int N> INLINE vg<N> activate(vg<N> x) {
  if constexpr (!BY_POLYNOMIAL<T, ACT>) return each<N>([&](int j) { return activate_exactly<ACT>(x.v[j]); });
  const float c[] = {3.98085604e-01f,  -6.48694147e-02f, 8.91375299e-03f, -8.44504774e-04f,
                     5.12365445e-05f, -1.77045968e-06f, 2.62708145e-08f};
  const vg<N> cdf = x * polynomial(x * x, c) + splat(0.5f);  // outside [0, 1] for all |x| > 3.9, so clamping is right
  return x * smaller(larger(cdf, vf{}), splat(1.0f));
}

template <class T, int ACT, int N> INLINE vg<N> slope(vg<N> x) {
  if constexpr (!BY_POLYNOMIAL<T, ACT>) return each<N>([&](int j) { return slope_exactly<ACT>(x.v[j]); });
  const float c[] = {7.96721863e-01f, -2.62030237e-01f, 5.59150458e-02f, -7.68749666e-03f,
                     6.87652549e-04f, -3.84600693e-05f, 1.21382413e-06f, -1.64200491e-08f};
  const vg<N> near = larger(splat(-4.0f), smaller(splat(4.0f), x));  // x comes second, to keep NaN
  return near * polynomial(near * near, c) + splat(0.5f);
}

// `activate` for a single vector.
template <class T, int ACT> INLINE vf activate(vf x) { return activate<T, ACT>(vg<1>{{x}}).v[0]; }
