// Vectors of CONVMIXER_LANES floats as GCC vector extensions, and the two storage types: float and bf16. Arithmetic
// is always in float. Intrinsics are used only if the compiler does not find the instruction by itself.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#ifndef CONVMIXER_LANES
#if defined(__AVX512F__)
#define CONVMIXER_LANES 16
#elif defined(__AVX__)
#define CONVMIXER_LANES 8
#else
#define CONVMIXER_LANES 4
#endif
#endif

#define INLINED __attribute__((always_inline))  // for lambdas
#define INLINE inline INLINED

constexpr int L = CONVMIXER_LANES;
typedef float vf __attribute__((vector_size(4 * L)));
typedef double vd __attribute__((vector_size(8 * L)));
typedef int32_t vi __attribute__((vector_size(4 * L)));
typedef uint32_t vu __attribute__((vector_size(4 * L)));
typedef uint16_t vh __attribute__((vector_size(2 * L)));

using bf16 = uint16_t;

INLINE vf splat(float x) { return vf{} + x; }

template <class V> INLINE V load_vector(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}
template <class V> INLINE void store_vector(void* p, V v) { std::memcpy(p, &v, sizeof(V)); }

// Intrinsics, because GCC converts between vectors of 16 and of 32 bits piece by piece, and does not find x86's min
// and max. `smaller` and `larger` return b if a or b is NaN.
#if defined(__AVX512F__) && CONVMIXER_LANES == 16
INLINE vh to_16_bits(vu x) { return __builtin_convertvector(x, vh); }
INLINE vu to_32_bits(vh x) { return (vu)_mm512_cvtepu16_epi32((__m256i)x); }
INLINE vf smaller(vf a, vf b) { return (vf)_mm512_min_ps((__m512)a, (__m512)b); }
INLINE vf larger(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
#elif defined(__AVX2__) && CONVMIXER_LANES == 8
INLINE vh to_16_bits(vu x) {
  const __m128i low = _mm256_castsi256_si128((__m256i)x), high = _mm256_extracti128_si256((__m256i)x, 1);
  return (vh)_mm_packus_epi32(low, high);  // values above 0xffff do not occur
}
INLINE vu to_32_bits(vh x) { return (vu)_mm256_cvtepu16_epi32((__m128i)x); }
INLINE vf smaller(vf a, vf b) { return (vf)_mm256_min_ps((__m256)a, (__m256)b); }
INLINE vf larger(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
#else
INLINE vh to_16_bits(vu x) { return __builtin_convertvector(x, vh); }
INLINE vu to_32_bits(vh x) { return __builtin_convertvector(x, vu); }
INLINE vf smaller(vf a, vf b) { return a < b ? a : b; }
INLINE vf larger(vf a, vf b) { return a > b ? a : b; }
#endif

INLINE vf widen(vh bits) { return (vf)(to_32_bits(bits) << 16); }

// Rounds to nearest even. A NaN stays NaN: rounding cuts off half of its bits, so one of the others is set to keep it
// from becoming Inf.
INLINE vh narrow(vf x) {
#if defined(__AVX512BF16__) && CONVMIXER_LANES == 16
  return (vh)_mm512_cvtneps_pbh((__m512)x);
#else
  const vu bits = (vu)x;
  const vu out = x == x ? bits + 0x7fff + ((bits >> 16) & 1) : bits | 0x400000;
  return to_16_bits(out >> 16);
#endif
}

// Two bf16 in each 32 bits, the first in the lower half.
INLINE vf pair_of(vh first, vh second) { return (vf)(to_32_bits(first) | to_32_bits(second) << 16); }
INLINE vf first_of(vf pair) { return (vf)((vu)pair << 16); }
INLINE vf second_of(vf pair) { return (vf)((vu)pair & 0xffff0000u); }

// Adds to each lane of `sum` the product of the first bf16 of a and b, and that of the second. Some processors do
// this in one instruction; on the others only tests use pairs.
#if defined(__AVX512BF16__) && CONVMIXER_LANES == 16
#define CONVMIXER_PAIRS 1
INLINE vf dot_pairs(vf sum, vf a, vf b) { return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b); }
#else
#ifndef CONVMIXER_PAIRS
#define CONVMIXER_PAIRS 0
#endif
INLINE vf dot_pairs(vf sum, vf a, vf b) {
  return sum + first_of(a) * first_of(b) + second_of(a) * second_of(b);
}
#endif

// The channels of a pixel are padded with zeros to whole vectors. If L is even, these are whole pairs: the last of an
// odd number of channels is paired with 0.
static_assert(!CONVMIXER_PAIRS || L % 2 == 0);

// Whether matrix products multiply values stored as T in pairs.
template <class T> constexpr bool PAIRS = CONVMIXER_PAIRS && std::is_same_v<T, bf16>;

// Whether depthwise convolutions do so too. It costs them more, because they first build the pairs from two rows of
// the image. On Intel's processors with AMX this does not pay: they start two multiply-adds of floats in one cycle,
// but one dot product of pairs in two cycles.
#if defined(__AMX_BF16__)
template <class T> constexpr bool DEPTHWISE_PAIRS = false;
#else
template <class T> constexpr bool DEPTHWISE_PAIRS = PAIRS<T>;
#endif

INLINE float value_of(float x) { return x; }
INLINE float value_of(bf16 x) {
  const uint32_t bits = (uint32_t)x << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

INLINE vf load(const float* p) { return load_vector<vf>(p); }
INLINE vf load(const bf16* p) { return widen(load_vector<vh>(p)); }
INLINE void store(float* p, vf x) { store_vector(p, x); }
INLINE void store(bf16* p, vf x) { store_vector(p, narrow(x)); }

// Returns x as a load gives it after a store to a pointer of this type; the pointer itself is not used.
INLINE vf rounded(vf x, const float*) { return x; }
INLINE vf rounded(vf x, const bf16*) { return widen(narrow(x)); }

// Load or store the first n < L lanes. The other lanes read as zero and are not written.
template <class T> __attribute__((noinline)) vf load_part(const T* p, int n) {
  T lanes[L] = {};
  for (int i = 0; i < n; i++) lanes[i] = p[i];
  return load(lanes);
}
template <class T> __attribute__((noinline)) void store_part(T* p, vf x, int n) {
  T lanes[L];
  store(lanes, x);
  for (int i = 0; i < n; i++) p[i] = lanes[i];
}

// A group of N vectors; each step of the arithmetic is done for all of them before the next step. A polynomial is one
// long chain of dependent operations. Several chains side by side keep the processor's units busy even if its
// scheduler does not look far ahead.
template <int N> struct vg {
  vf v[N];
};
template <int N, class F> INLINE vg<N> each(const F& f) {
  vg<N> out;
#pragma GCC unroll 8
  for (int j = 0; j < N; j++) out.v[j] = f(j);
  return out;
}
template <int N> INLINE vg<N> operator+(vg<N> a, vg<N> b) { return each<N>([&](int j) { return a.v[j] + b.v[j]; }); }
template <int N> INLINE vg<N> operator*(vg<N> a, vg<N> b) { return each<N>([&](int j) { return a.v[j] * b.v[j]; }); }
template <int N> INLINE vg<N> operator+(vg<N> a, vf b) { return each<N>([&](int j) { return a.v[j] + b; }); }
template <int N> INLINE vg<N> operator*(vg<N> a, vf b) { return each<N>([&](int j) { return a.v[j] * b; }); }
template <int N> INLINE vg<N> operator*(vf a, vg<N> b) { return b * a; }
template <int N> INLINE vg<N> smaller(vg<N> a, vf b) { return each<N>([&](int j) { return smaller(a.v[j], b); }); }
template <int N> INLINE vg<N> larger(vg<N> a, vf b) { return each<N>([&](int j) { return larger(a.v[j], b); }); }
template <int N> INLINE vg<N> smaller(vf a, vg<N> b) { return each<N>([&](int j) { return smaller(a, b.v[j]); }); }
template <int N> INLINE vg<N> larger(vf a, vg<N> b) { return each<N>([&](int j) { return larger(a, b.v[j]); }); }

// Read or write N vectors that begin `stride` elements apart: of each only the first `lanes` lanes, at most L.
template <int N, class T> INLINE vg<N> read(const T* p, int64_t stride, int lanes) {
  if (__builtin_expect(lanes < L, 0)) return each<N>([&](int j) { return load_part(p + j * stride, lanes); });
  return each<N>([&](int j) { return load(p + j * stride); });
}
template <int N, class T> INLINE void write(T* p, int64_t stride, vg<N> x, int lanes) {
#pragma GCC unroll 8
  for (int j = 0; j < N; j++) {
    if (__builtin_expect(lanes < L, 0)) store_part(p + j * stride, x.v[j], lanes);
    else store(p + j * stride, x.v[j]);
  }
}

// Like `write`, and returns the values as stored: as bf16 they are rounded.
template <int N> INLINE vg<N> write_rounded(float* p, int64_t stride, vg<N> x, int lanes) {
  write(p, stride, x, lanes);
  return x;
}
template <int N> INLINE vg<N> write_rounded(bf16* p, int64_t stride, vg<N> x, int lanes) {
  return each<N>([&](int j) {
    const vh bits = narrow(x.v[j]);
    if (__builtin_expect(lanes < L, 0)) store_part(p + j * stride, widen(bits), lanes);
    else store_vector(p + j * stride, bits);
    return widen(bits);
  });
}

// How many vectors to compute at once, as an argument whose type holds the number. MANY is for code that needs few
// registers for each vector, FEW for code that needs more.
template <int N> struct Size {
  static constexpr int value = N;
};
constexpr int MANY = 4;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int FEW = 4;  // 32 registers
#else
constexpr int FEW = 2;  // 16 registers
#endif
constexpr Size<1> one;
constexpr Size<FEW> few;
constexpr Size<MANY> many;
