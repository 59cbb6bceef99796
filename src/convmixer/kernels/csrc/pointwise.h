// Matrix products of our own for the pointwise half of a block: rows that lie in a cache (of wide layers, in the shared
// one) times a packed matrix, in float.
//
// What goes into a product was just computed and what comes out is used at once, so a row never goes to memory in
// between. Where the processor multiplies bf16 itself and the storage is bf16, the library's products win (block.cpp).
#pragma once
#include <algorithm>
#include <type_traits>

#include "memory.h"
#include "vec.h"

#if defined(__AVX512BF16__) || defined(__ARM_FEATURE_BF16)
template <class T> constexpr bool LIBRARY_PRODUCTS = std::is_same_v<T, bf16>;
#else
template <class T> constexpr bool LIBRARY_PRODUCTS = false;
#endif

constexpr int PANEL = 2 * L;  // columns that are computed at once
inline int64_t whole_panels(int64_t columns) { return (columns + PANEL - 1) / PANEL * PANEL; }

// A step between rows in the cache that is no multiple of a power of two: the rows of a panel would share few sets.
inline int64_t row_step(int64_t columns) { return whole_panels(columns) + 16; }

constexpr int TALL = L >= 16 ? 14 : 6;  // rows of a tile: as many sums as there are registers for

// Rows that are taken through all steps together, at most. Each block reads all weights and adds to all their
// gradients, so wide layers want many rows, even where those fill more than the second-level cache. 128, in whole
// tiles: batches of a power of two make shares of nearly one.
constexpr int64_t BLOCK_ROWS = (128 + TALL - 1) / TALL * TALL;

// Rows of the weights' gradient that are added to at once: their share of the values stays in the first-level cache.
constexpr int64_t SUM_ROWS = 48 / TALL * TALL;

// (rows, columns) with any steps -> [columns / PANEL][rows][PANEL], zeros after the last column.
template <class T>
void pack_panels(const T* matrix, int64_t rows, int64_t columns, int64_t row_step, int64_t column_step, float* out) {
  torch::stable::parallel_for(0, whole_panels(columns) / PANEL, 1, [=](int64_t begin, int64_t end) {
    float* to = out + begin * PANEL * rows;
    for (int64_t c = begin * PANEL; c < end * PANEL; c += PANEL)
      for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < PANEL; i++)
          *to++ = c + i < columns ? value_of(matrix[r * row_step + (c + i) * column_step]) : 0.0f;
  });
}

// One tile of a product. a(r, k) lies at a[r * a_row + k], transposed at a[k * a_row + r]; b has PANEL columns.
template <int Rows, bool Transposed, bool Add>
__attribute__((noinline)) void product_tile(const float* a, int64_t a_row, const float* b, int64_t b_row,
                                            int64_t depth, float* out, int64_t out_row) {
  if constexpr (Add)  // the sums may lie in a farther cache: they come while the tile is computed
    for (int r = 0; r < Rows; r++) __builtin_prefetch(out + r * out_row, 1);
  vf sum[Rows][2] = {};
#pragma GCC unroll 2
  for (int64_t k = 0; k < depth; k++) {
    const vf b0 = load(b), b1 = load(b + L);
    b += b_row;
#pragma GCC unroll 16
    for (int r = 0; r < Rows; r++) {
      const float value = Transposed ? a[r] : a[r * a_row + k];
      sum[r][0] += value * b0;
      sum[r][1] += value * b1;
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

// out = a b, or out += a b, for `rows` rows and one panel of columns.
template <bool Transposed, bool Add>
void product(int64_t rows, const float* a, int64_t a_row, const float* b, int64_t b_row, int64_t depth, float* out,
             int64_t out_row) {
  const int64_t step = Transposed ? 1 : a_row;
  int64_t r = 0;
  const auto some = [&](auto count) {
    constexpr int N = decltype(count)::value;
    for (; r + N <= rows; r += N)
      product_tile<N, Transposed, Add>(a + r * step, a_row, b, b_row, depth, out + r * out_row, out_row);
  };
  some(Size<TALL>{});
  some(Size<4>{});
  some(one);
}
