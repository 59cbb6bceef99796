// GELU (exact, erf) and ReLU with their slopes, for vectors. NaN passes through, and gelu(-inf) is NaN, as in torch.
//
// For float storage GELU is exact to a few float roundings. For bf16 storage the polynomials below stay within 2e-4
// (value) and 3e-4 (slope) of the exact function everywhere: a tenth of the rounding of a bf16 near 1.
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

// e^x for x <= 0; from -87 down the result is 0.
INLINE vf exp_negative(vf x) {
  x = larger(x, splat(-88.0f));
  const vf shifter = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
  const vf whole = (x * 1.44269504f + shifter) - shifter;
  const vf rest = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  const float c[] = {1.0f, 1.0f, 0.5f, 1.6666667e-1f, 4.1666489e-2f, 8.3334519e-3f, 1.3974467e-3f, 1.9e-4f};
  const vi exponent = __builtin_convertvector(whole, vi) + 127;
  return polynomial(rest, c) * (vf)((exponent > 0 ? exponent : vi{}) << 23);
}

// The normal distribution function. ln(2 Phi(-t)) is a polynomial in t, minimax on [0, 6].
INLINE vf normal_cdf(vf x) {
  const float c[] = {-7.97891775e-01f, -3.18248921e-01f, -3.65140885e-02f, 5.03828856e-03f, -1.68436438e-04f,
                     -1.18189491e-04f, 3.23483907e-05f,  -4.24809490e-06f, 2.97474627e-07f, -8.86525760e-09f};
  const vf t = x < 0.0f ? -x : x;
  const vf tail = t < 6.0f ? 0.5f * exp_negative(t * polynomial(t, c)) : vf{};
  return x < 0.0f ? tail : 1.0f - tail;
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
  const vg<N> cdf = x * polynomial(x * x, c) + splat(0.5f);  // leaves [0, 1] for |x| > 3.9 and stays outside
  return x * smaller(larger(cdf, vf{}), splat(1.0f));
}

template <class T, int ACT, int N> INLINE vg<N> slope(vg<N> x) {
  if constexpr (!BY_POLYNOMIAL<T, ACT>) return each<N>([&](int j) { return slope_exactly<ACT>(x.v[j]); });
  const float c[] = {7.96721863e-01f, -2.62030237e-01f, 5.59150458e-02f, -7.68749666e-03f,
                     6.87652549e-04f, -3.84600693e-05f, 1.21382413e-06f, -1.64200491e-08f};
  const vg<N> near = larger(splat(-4.0f), smaller(splat(4.0f), x));  // this order keeps NaN
  return near * polynomial(near * near, c) + splat(0.5f);
}

// One vector alone.
template <class T, int ACT> INLINE vf activate(vf x) { return activate<T, ACT>(vg<1>{{x}}).v[0]; }
