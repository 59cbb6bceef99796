// Our own matrix products for the pointwise half of a block. They multiply rows that are still in a cache (for
// wide layers in the one that the cores share) by a packed matrix, and sum in float.
//
// A product's input was just computed and its output is used at once, so no row goes to memory in between. If the
// processor has a unit that multiplies bf16 matrices, the unit is used instead: AMX by our own code
// (pointwise_tiles.h), other units and the wide layers through torch's library (channel_library.h).
//
// A word is 32 bits: one float, or two bf16 that are neighbours in the sum. A panel is PANEL columns of the right
// matrix, and of the result. A tile is the part of a panel of the result that is computed at once.
#pragma once
#include <algorithm>
#include <type_traits>

#include "memory.h"
#include "vec.h"

#ifndef CONVMIXER_LIBRARY
#if defined(__ARM_FEATURE_BF16) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define CONVMIXER_LIBRARY 1
#else
#define CONVMIXER_LIBRARY 0
#endif
#endif
template <class T> constexpr bool LIBRARY_PRODUCTS = CONVMIXER_LIBRARY && std::is_same_v<T, bf16>;

// How a product with vector instructions divides its work.
struct InVectors {
  static constexpr bool TILES = false;
  static constexpr int64_t DEPTH = 1;                // the words of a reduction (K) are a multiple of this
  static constexpr int64_t TALL = L >= 16 ? 14 : 6;  // rows of a tile: as many sums as fit into registers

  // The most rows in a block, which goes through all steps together. Each block reads all weights, so wide layers
  // want many rows, even if these fill more than the second-level cache. 128, rounded up to whole tiles, because
  // batches of a power of two can be divided into blocks of about 128 rows.
  static constexpr int64_t BLOCK_ROWS = (128 + TALL - 1) / TALL * TALL;
  static constexpr int64_t HELD_ROWS = BLOCK_ROWS;  // most rows added to the weights' gradient at once

  // The weights' gradient is updated in groups of this many rows: all panels of a group, then the next group. The
  // values of dv that a group needs fit into the first-level cache.
  static constexpr int64_t SUM_ROWS = 48 / TALL * TALL;
};

// The kinds of operand, K in templates. A word holds GROUP values.
struct Floats : InVectors {
  using Value = float;
  static constexpr int GROUP = 1;
  INLINE static float word(const float (&value)[1]) { return value[0]; }
  INLINE static float word(const bf16 (&value)[1]) { return value_of(value[0]); }
  template <int N> INLINE static vg<N> words(const vg<N> (&row)[1]) { return row[0]; }
  INLINE static vf dot(vf sum, const float* a, vf b) { return sum + *a * b; }
};
struct Pairs : InVectors {
  using Value = bf16;
  static constexpr int GROUP = 2;
  INLINE static float word(const bf16 (&value)[2]) {
    float word;
    std::memcpy(&word, value, sizeof word);
    return word;
  }
  template <int N> INLINE static vg<N> words(const vg<N> (&row)[2]) {
    return each<N>([&](int j) { return pair_of(narrow(row[0].v[j]), narrow(row[1].v[j])); });
  }
  INLINE static vf dot(vf sum, const float* a, vf b) {
    int32_t word;
    std::memcpy(&word, a, sizeof word);
    return dot_pairs(sum, (vf)(vi{} + word), b);
  }
};
template <class T> using Operand = std::conditional_t<PAIRS<T>, Pairs, Floats>;

// Return the number of words that hold so many terms of a reduction: `words_of` just enough, `depth_of` a multiple of
// K::DEPTH.
template <class K> int64_t words_of(int64_t values) { return (values + K::GROUP - 1) / K::GROUP; }
template <class K> int64_t depth_of(int64_t values) {
  return (words_of<K>(values) + K::DEPTH - 1) / K::DEPTH * K::DEPTH;
}
template <class K> typename K::Value* values_at(float* words, int64_t i) { return (typename K::Value*)words + i; }

constexpr int PANEL = 2 * L;  // columns computed at once
inline int64_t whole_panels(int64_t columns) { return (columns + PANEL - 1) / PANEL * PANEL; }

// Returns the distance between rows of `columns` words. The 16 avoids large powers of two, with which rows would
// share few cache sets.
inline int64_t row_step(int64_t columns) { return whole_panels(columns) + 16; }

// Packs a matrix (rows, columns), with any strides, as [panels][depth_of(rows)][PANEL] words. Rows and columns are
// padded with zeros.
template <class K, class T>
void pack_panels(const T* matrix, int64_t rows, int64_t columns, int64_t row_step, int64_t column_step, float* out) {
  torch::stable::parallel_for(0, whole_panels(columns) / PANEL, 1, [=](int64_t begin, int64_t end) {
    const int64_t depth = depth_of<K>(rows);
    float* to = out + begin * PANEL * depth;
    for (int64_t c = begin * PANEL; c < end * PANEL; c += PANEL)
      for (int64_t r = 0; r < depth * K::GROUP; r += K::GROUP)
        for (int64_t i = 0; i < PANEL; i++) {
          T values[K::GROUP];
          for (int64_t j = 0; j < K::GROUP; j++)
            values[j] = c + i < columns && r + j < rows ? matrix[(r + j) * row_step + (c + i) * column_step] : T{};
          *to++ = K::word(values);
        }
  });
}

// Computes one tile of out = a b, or of out += a b if `Add`; all sizes are in words. Element (r, k) of a is
// a[r * a_row + k], or a[k * a_row + r] if `Transposed`. b has PANEL columns.
template <class K, int Rows, bool Transposed, bool Add>
__attribute__((noinline)) void product_tile(const float* a, int64_t a_row, const float* b, int64_t b_row,
                                            int64_t depth, float* out, int64_t out_row) {
  if constexpr (Add)  // the sums may be in a more distant cache: fetch them while the tile is computed
    for (int r = 0; r < Rows; r++)
      for (int line = 0; line < PANEL; line += 16) __builtin_prefetch(out + r * out_row + line, 1);
  vf sum[Rows][2] = {};
#pragma GCC unroll 2
  for (int64_t k = 0; k < depth; k++) {
    const vf b0 = load(b), b1 = load(b + L);
    b += b_row;
#pragma GCC unroll 16
    for (int r = 0; r < Rows; r++) {
      const float* value = Transposed ? a + r : a + r * a_row + k;
      sum[r][0] = K::dot(sum[r][0], value, b0);
      sum[r][1] = K::dot(sum[r][1], value, b1);
    }
    if (Transposed) a += a_row;
  }
#pragma GCC unroll 16
  for (int r = 0; r < Rows; r++)
#pragma GCC unroll 2
    for (int j = 0; j < 2; j++) {
      float* to = out + r * out_row + j * L;
      store(to, Add ? load(to) + sum[r][j] : sum[r][j]);
    }
}

// out = a b, or out += a b if `Add`, for `rows` rows and one panel of columns.
template <class K, bool Transposed, bool Add>
void product(int64_t rows, const float* a, int64_t a_row, const float* b, int64_t b_row, int64_t depth, float* out,
             int64_t out_row) {
  const int64_t step = Transposed ? 1 : a_row;
  int64_t r = 0;
  const auto some = [&](auto count) {
    constexpr int N = decltype(count)::value;
    for (; r + N <= rows; r += N)
      product_tile<K, N, Transposed, Add>(a + r * step, a_row, b, b_row, depth, out + r * out_row, out_row);
  };
  some(Size<K::TALL>{});
  some(Size<4>{});
  some(one);
}
