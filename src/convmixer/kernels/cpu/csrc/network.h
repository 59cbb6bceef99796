// The two steps of a ConvMixer block at inference, with vector instructions: the depthwise convolution, and the
// matrix product, which is the pointwise convolution. The stem is a product too.
//
// Activations are stored in blocks of 32 channels, [channels / 32][rows][columns][32], with a border of zeros around
// the image. The depthwise kernel therefore needs no edge cases and reads whole cache lines. A product computes a
// panel of 32 columns at a time, which is exactly one block of channels.
//
// A few image rows at a time go through depthwise + activation + BatchNorm + residual into a small matrix, `a`, that
// stays in the core's cache. From there they go through the product + activation + BatchNorm. Each ConvMixer block is
// thus one pass over memory.
#pragma once
#include <algorithm>
#include <array>
#include <iterator>
#include <utility>
#if defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif

#include "activation.h"

namespace network {

constexpr int CB = 32;      // channels of a block; columns of a panel of weights
constexpr int STEP = 8;     // columns of pixels that the depthwise kernel computes at once
constexpr int NV = 2;       // vectors in a row of a product's tile: the sums that are computed at once
// Rows of such a tile: as many as the registers hold sums for, and smaller numbers for the rows left over.
constexpr int HEIGHTS[] = {L >= 16 ? 14 : 6, L >= 16 ? 8 : 4, 2, 1};

// Calls f with 0 .. N - 1 as constants, so that arrays indexed by them become registers.
template <int N, class F> INLINE void unrolled(const F& f) {
  [&]<int... I>(std::integer_sequence<int, I...>) INLINED {
    (f(std::integral_constant<int, I>{}), ...);
  }(std::make_integer_sequence<int, N>{});
}

#define EACH(index) [&](auto index) INLINED

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// The kinds of operand, K in templates. A product reads words of 4 bytes, each of GROUP values: one float, or two
// bf16 or four int8 that one instruction multiplies together.
struct Fp32 {
  using X = float;  // activations in memory
  using Sum = vf;
  static constexpr int GROUP = 1;
  static constexpr bool INTEGER = false;
  INLINE static vf dot(vf sum, int32_t a, vi b) {
    float scalar;
    std::memcpy(&scalar, &a, 4);
    return sum + scalar * (vf)b;
  }
};

#if defined(__AVX512BF16__) && CONVMIXER_LANES == 16
struct Bf16 {
  using X = bf16;
  using Sum = __m512;  // the intrinsics' own type: with casts GCC would copy every sum
  static constexpr int GROUP = 2;
  static constexpr bool INTEGER = false;
  INLINE static Sum dot(Sum sum, int32_t a, vi b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(a), (__m512bh)b);
  }
};
#else
using Bf16 = Fp32;  // without bf16 dot-product instructions, bf16 storage would gain nothing
#endif

// Unsigned activations times signed weights of at most `MOST`. Four products are added at once. With VNNI they are
// added in 32 bits. Without it AVX2 first adds pairs in 16 bits, which hold 255 * 64 + 255 * 64 but not
// 255 * 127 + 255 * 127.
struct Int8 {
  using X = Bf16::X;
  using Sum = vi;
  static constexpr int GROUP = 4;
  static constexpr bool INTEGER = true;
#if defined(__AVX512VNNI__) && CONVMIXER_LANES == 16
  static constexpr int MOST = 127;
  INLINE static Sum dot(Sum sum, int32_t a, vi b) {  // with the intrinsic, GCC 12 copies every sum to memory
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(vi{} + a), "v"(b));
    return sum;
  }
#elif defined(__AVXVNNI__) && CONVMIXER_LANES == 8
  static constexpr int MOST = 127;
  INLINE static Sum dot(Sum sum, int32_t a, vi b) {
    asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(vi{} + a), "x"(b));
    return sum;
  }
#elif defined(__AVX2__) && CONVMIXER_LANES == 8
  static constexpr int MOST = 64;
  INLINE static Sum dot(Sum sum, int32_t a, vi b) {
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi32(a), (__m256i)b);
    return sum + (vi)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
  }
#elif defined(__ARM_FEATURE_MATMUL_INT8) && CONVMIXER_LANES == 4
  static constexpr int MOST = 127;
  INLINE static Sum dot(Sum sum, int32_t a, vi b) {
    return (vi)vusdotq_s32((int32x4_t)sum, vreinterpretq_u8_s32(vdupq_n_s32(a)), (int8x16_t)b);
  }
#elif defined(__ARM_FEATURE_DOTPROD) && CONVMIXER_LANES == 4
#define CONVMIXER_OFFSET 128  // this instruction multiplies only signed bytes
  static constexpr int MOST = 127;
  INLINE static Sum dot(Sum sum, int32_t a, vi b) {
    return (vi)vdotq_s32((int32x4_t)sum, vreinterpretq_s8_s32(vdupq_n_s32(a)), (int8x16_t)b);
  }
#else
  static constexpr int MOST = 127;
  INLINE static Sum dot(Sum sum, int32_t a, vi b) {
    for (int byte = 0; byte < 4; byte++) sum += (a >> 8 * byte & 255) * (b << (24 - 8 * byte) >> 24);
    return sum;
  }
#endif
#ifndef CONVMIXER_OFFSET
#define CONVMIXER_OFFSET 0
#endif
  static constexpr int OFFSET = CONVMIXER_OFFSET;  // subtracted from activations before they are stored
};

// Returns which channel of a block is at place t of the depthwise kernel's output. The interleaving instructions give
// bf16 in the order 0-3, 8-11, 16-19, 24-27, then 4-7, 12-15, ...; the weights are packed to match.
template <class X> inline int channel_at(int t) {
  if (sizeof(X) == 4) return t;
  return t % 16 / 4 * 8 + t / 16 * 4 + t % 4;
}

// The layout of one image's activations: its border has `before` rows at the top and `before` columns at the left.
struct Grid {
  int64_t H, W, before, rows, columns;
  Grid(int64_t H, int64_t W, int64_t k)
      : H(H), W(W), before((k - 1) / 2), rows(H + k - 1), columns(round_up(W, STEP) + k) {}
  int64_t plane() const { return rows * columns * CB; }
  int64_t at(int64_t y, int64_t x) const { return (y * columns + x) * CB; }  // counted with the border
  int64_t inside(int64_t y, int64_t x) const { return at(y + before, x + before); }
};

// Coefficients for each channel, which are applied to sums: a row of `dim` values (a multiple of CB) for each name.
struct Vectors {
  enum { MULTIPLY, BIAS, SCALE, SHIFT, STEPS, ZERO, COUNT };  // STEPS and ZERO quantise to unsigned 8 bits
  const float* data;
  int64_t dim;
  const float* row(int which, int64_t c) const { return data + which * dim + c; }
};

// --- Depthwise: computes image rows y0 .. y1 of one block of channels. Each pixel is a row of the matrix `a`; the
// rows are `words` words apart. `a` points at the first column of this block of channels.

INLINE void put_bytes(uint8_t* a, vf q) {
  typedef uint8_t vb __attribute__((vector_size(L)));
  q = q > 0 ? q : vf{};
  q = q < 255 ? q : splat(255);
  store_vector(a, __builtin_convertvector(__builtin_convertvector(q + 0.5f, vi) - Int8::OFFSET, vb));
}

template <class K, int ACT>
void depthwise_plain(const Grid& g, int k, const float* x, const float* weights, const Vectors& p, int64_t c,
                     int64_t y0, int64_t y1, int32_t* a, int64_t words) {
  for (int64_t y = y0; y < y1; y++)
    for (int64_t x0 = 0; x0 < g.W; x0 += STEP)
      for (int v = 0; v < CB / L; v++) {
        vf sum[STEP];
        const vf bias = load(p.row(Vectors::BIAS, c + v * L));
        unrolled<STEP>(EACH(j) { sum[j] = bias; });
        for (int dy = 0; dy < k; dy++)
          for (int dx = 0; dx < k; dx++) {
            const vf w = load(weights + (dy * k + dx) * CB + v * L);
            const float* from = x + g.at(y + dy, x0 + dx) + v * L;
            unrolled<STEP>(EACH(j) { sum[j] += w * load(from + j * CB); });
          }
        const vf scale = load(p.row(Vectors::SCALE, c + v * L)), shift = load(p.row(Vectors::SHIFT, c + v * L));
        const vf steps = load(p.row(Vectors::STEPS, c + v * L)), zero = load(p.row(Vectors::ZERO, c + v * L));
        for (int64_t j = 0; j < std::min<int64_t>(STEP, g.W - x0); j++) {
          const vf z = activate<std::conditional_t<K::INTEGER, bf16, float>, ACT>(sum[j]) * scale + shift + load(x + g.inside(y, x0 + j) + v * L);
          int32_t* to = a + ((y - y0) * g.W + x0 + j) * words;
          if constexpr (K::INTEGER) put_bytes((uint8_t*)to + v * L, z * steps + zero);
          else store((float*)to + v * L, z);
        }
      }
}

#if defined(__AVX512BF16__) && CONVMIXER_LANES == 16
// Pairs = ceil(k / 2). Neighbouring columns are interleaved, so one instruction does two weights of 16 channels.
template <int Pairs>
INLINE void convolve_pairs(const Grid& g, int k, const bf16* x, const __m512i* weights, __m512 (&sum)[STEP][2]) {
  for (int dy = 0; dy < k; dy++) {
    const bf16* row = x + g.at(dy, 0);
    __m512bh w[Pairs][2];
    unrolled<Pairs>(EACH(q) {
      w[q][0] = (__m512bh)weights[(dy * Pairs + q) * 2];
      w[q][1] = (__m512bh)weights[(dy * Pairs + q) * 2 + 1];
    });
    __m512i next = _mm512_loadu_si512(row);
    unrolled<STEP + 2 * Pairs - 2>(EACH(j) {
      const __m512i now = next;
      next = _mm512_loadu_si512(row + (j + 1) * CB);
      const __m512bh low = (__m512bh)_mm512_unpacklo_epi16(now, next);
      const __m512bh high = (__m512bh)_mm512_unpackhi_epi16(now, next);
      unrolled<Pairs>(EACH(q) {
        constexpr int o = j - 2 * q;
        if constexpr (o >= 0 && o < STEP) {
          sum[o][0] = _mm512_dpbf16_ps(sum[o][0], low, w[q][0]);
          sum[o][1] = _mm512_dpbf16_ps(sum[o][1], high, w[q][1]);
        }
      });
    });
  }
}

template <class K, int ACT>
INLINE void finish_pairs(const Grid& g, const bf16* centre, const __m512 (&sum)[STEP][2], const Vectors& p, int64_t c,
                         int64_t valid, int32_t* a, int64_t words) {
  const auto vector = [&](int which, int v) { return load(p.row(which, c + v * L)); };
  const vf scale[2] = {vector(Vectors::SCALE, 0), vector(Vectors::SCALE, 1)};
  const vf shift[2] = {vector(Vectors::SHIFT, 0), vector(Vectors::SHIFT, 1)};
  unrolled<STEP>(EACH(j) {
    if (j >= valid) return;
    const __m512i x = _mm512_loadu_si512(centre + j * CB);
    const vf residual[2] = {(vf)_mm512_unpacklo_epi16(_mm512_setzero_si512(), x),
                            (vf)_mm512_unpackhi_epi16(_mm512_setzero_si512(), x)};
    vf z[2];
    unrolled<2>(EACH(v) { z[v] = activate<bf16, ACT>((vf)sum[j][v]) * scale[v] + shift[v] + residual[v]; });
    int32_t* to = a + j * words;
    if constexpr (K::INTEGER)
      unrolled<2>(EACH(v) {
        put_bytes((uint8_t*)to + v * L, z[v] * vector(Vectors::STEPS, v) + vector(Vectors::ZERO, v));
      });
    else
      _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh((__m512)z[1], (__m512)z[0]));
  });
}

template <class K, int Pairs>
void depthwise_pairs(const Grid& g, int k, int act, const bf16* x, const void* weights, const Vectors& p, int64_t c,
                     int64_t y0, int64_t y1, int32_t* a, int64_t words) {
  const vf bias[2] = {load(p.row(Vectors::BIAS, c)), load(p.row(Vectors::BIAS, c + L))};
  for (int64_t y = y0; y < y1; y++)
    for (int64_t x0 = 0; x0 < g.W; x0 += STEP) {
      __m512 sum[STEP][2];
      unrolled<STEP>(EACH(j) { unrolled<2>(EACH(v) { sum[j][v] = (__m512)bias[v]; }); });
      convolve_pairs<Pairs>(g, k, x + g.at(y, x0), (const __m512i*)weights, sum);
      int32_t* to = a + ((y - y0) * g.W + x0) * words;
      if (act == GELU) finish_pairs<K, GELU>(g, x + g.inside(y, x0), sum, p, c, g.W - x0, to, words);
      else finish_pairs<K, RELU>(g, x + g.inside(y, x0), sum, p, c, g.W - x0, to, words);
    }
}
#endif

// `weights` and the plane `x` are those of one block of channels.
template <class K>
void depthwise(const Grid& g, int k, int act, const typename K::X* x, const void* weights, const Vectors& p, int64_t c,
               int64_t y0, int64_t y1, int32_t* a, int64_t words) {
  if constexpr (sizeof(typename K::X) == 4) {
    const auto plain = act == GELU ? &depthwise_plain<K, GELU> : &depthwise_plain<K, RELU>;
    plain(g, k, x, (const float*)weights, p, c, y0, y1, a, words);
  } else {
#if defined(__AVX512BF16__) && CONVMIXER_LANES == 16
    static constexpr auto table = []<int... I>(std::integer_sequence<int, I...>) {
      return std::array{&depthwise_pairs<K, I + 1>...};
    }(std::make_integer_sequence<int, 8>{});
    table[(k + 1) / 2 - 1](g, k, act, x, weights, p, c, y0, y1, a, words);
#endif
  }
}

// Returns the number of floats (or pairs of bf16) in the depthwise weights of one block of channels.
template <class X> int64_t depthwise_words(int k) { return (sizeof(X) == 4 ? k * k : k * ((k + 1) / 2)) * CB; }

// --- Product: multiplies rows of `a` by a panel of 32 columns, which gives one block of channels.

template <class K, int ACT, int Tall>
INLINE void finish(const typename K::Sum (&sum)[Tall][NV], const Vectors& p, int64_t c, typename K::X* out,
                   const int32_t* offsets) {
  using X = typename K::X;
  vf after[Vectors::SHIFT + 1][NV];
  unrolled<Vectors::SHIFT + 1>(EACH(which) {
    unrolled<NV>(EACH(v) { after[which][v] = load(p.row(which, c + v * L)); });
  });
  unrolled<Tall>(EACH(r) {
    vf z[NV];
    unrolled<NV>(EACH(v) {
      vf y;
      if constexpr (K::INTEGER) y = __builtin_convertvector((vi)sum[r][v], vf) * after[Vectors::MULTIPLY][v];
      else y = (vf)sum[r][v];
      z[v] = activate<X, ACT>(y + after[Vectors::BIAS][v]) * after[Vectors::SCALE][v] + after[Vectors::SHIFT][v];
    });
    X* to = out + offsets[r];
#if defined(__AVX512BF16__) && CONVMIXER_LANES == 16
    if constexpr (sizeof(X) == 2)
      _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh((__m512)z[1], (__m512)z[0]));
#endif
    if constexpr (sizeof(X) == 4) unrolled<NV>(EACH(v) { store((float*)to + v * L, z[v]); });
  });
}

template <class K, int Tall>
__attribute__((noinline)) void product_tile(const int32_t* a, int64_t words, const int32_t* panel, int64_t depth, int act, const Vectors& p,
                  int64_t c, typename K::X* out, const int32_t* offsets) {
  for (int column = 0; column < CB; column += NV * L) {
    typename K::Sum sum[Tall][NV] = {};
    for (int64_t i = 0; i < depth; i++) {
      vi b[NV];
      unrolled<NV>(EACH(v) { b[v] = load_vector<vi>(panel + i * CB + column + v * L); });
      unrolled<Tall>(EACH(r) {
        unrolled<NV>(EACH(v) { sum[r][v] = K::dot(sum[r][v], a[r * words + i], b[v]); });
      });
    }
    if (act == GELU) finish<K, GELU>(sum, p, c + column, out + column, offsets);
    else finish<K, RELU>(sum, p, c + column, out + column, offsets);
  }
}

// offsets: where each row of the result goes within a block of channels of `out`.
template <class K>
void product(int64_t rows, const int32_t* a, int64_t words, const int32_t* panels, int64_t depth, int act,
             const Vectors& p, typename K::X* out, int64_t plane, const int32_t* offsets) {
  for (int64_t c = 0; c < p.dim; c += CB) {
    int64_t r = 0;
    unrolled<std::size(HEIGHTS)>(EACH(i) {
      constexpr int tall = HEIGHTS[i];
      for (; r + tall <= rows; r += tall)
        product_tile<K, tall>(a + r * words, words, panels + c * depth, depth, act, p, c, out + c / CB * plane,
                              offsets + r);
    });
  }
}

}  // namespace network
