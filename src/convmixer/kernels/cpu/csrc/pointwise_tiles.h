// The products of pointwise.h on the processor's matrix unit (AMX). Words are pairs of bf16, as in `Pairs`.
//
// The unit reads a right factor as [words][columns], the layout of pointwise.h. It reads a left factor in tiles of 16
// rows of 16 words. The rows of a block have this form already. For the weights' gradient the left factor is dv^T:
// its rows are columns of dv, so the tiles of dv are transposed.
#pragma once
#include "pointwise.h"
#include "tiles.h"

#if CONVMIXER_TILES && CONVMIXER_PAIRS

struct TilePairs : Pairs {
  static constexpr bool TILES = true;
  static constexpr int64_t DEPTH = tiles::ROWS, TALL = 2 * tiles::ROWS, BLOCK_ROWS = 4 * TALL;
  static constexpr int64_t HELD_ROWS = 4 * BLOCK_ROWS;  // many: each time, all of the gradient is read and written
  static constexpr int64_t SUM_ROWS = TALL;
};

// A left factor, and three distances in words: from a tile to the tile below and to the tile beside it, and from one
// row of a tile to the next.
struct LeftTiles {
  const float* data;
  int64_t below, beside, row;
};

// Transposes 16 x 16 words.
INLINE void transpose_tile(const float* from, int64_t step, float* to) {
#if CONVMIXER_AMX
  alignas(64) static constexpr int32_t low[] = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23},
                                       high[] = {8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  __m512i row[tiles::ROWS], merged[tiles::ROWS];
#pragma GCC unroll 16
  for (int i = 0; i < tiles::ROWS; i++) row[i] = _mm512_loadu_si512(from + i * step);
  // A word's place is eight bits: four of its row, four of its column. Merging rows i and i + 8 word by word rotates
  // these bits by one. Four such rounds exchange row and column.
#pragma GCC unroll 4
  for (int round = 0; round < 4; round++) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
      merged[2 * i] = _mm512_permutex2var_epi32(row[i], _mm512_load_si512(low), row[i + 8]);
      merged[2 * i + 1] = _mm512_permutex2var_epi32(row[i], _mm512_load_si512(high), row[i + 8]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < tiles::ROWS; i++) row[i] = merged[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < tiles::ROWS; i++) _mm512_storeu_si512(to + i * tiles::ROWS, row[i]);
#else
  for (int i = 0; i < tiles::ROWS; i++)
    for (int j = 0; j < tiles::ROWS; j++) to[j * tiles::ROWS + i] = from[i * step + j];
#endif
}

// out = a b, or out += a b if `Add`, for `Tall` (one or two) tiles of rows and two tiles of columns.
template <int Tall, bool Add>
__attribute__((noinline)) void tile_product(const LeftTiles& a, const float* b, int64_t b_row, int64_t depth,
                                            float* out, int64_t out_row) {
  const int64_t left = a.row * 4, right = b_row * 4, to = out_row * 4;
  float* lower = out + tiles::ROWS * out_row;
  if constexpr (Add) {
    tiles::load<0>(out, to), tiles::load<1>(out + L, to);
    if constexpr (Tall == 2) tiles::load<2>(lower, to), tiles::load<3>(lower + L, to);
  } else {
    tiles::zero<0>(), tiles::zero<1>(), tiles::zero<2>(), tiles::zero<3>();
  }
  const float* from = a.data;
  for (int64_t k = 0; k < depth; k += TilePairs::DEPTH, from += a.beside, b += TilePairs::DEPTH * b_row) {
    tiles::load<4>(from, left);
    tiles::load<6>(b, right);
    tiles::dot_bf16<0, 4, 6>();
    tiles::load<7>(b + L, right);
    tiles::dot_bf16<1, 4, 7>();
    if constexpr (Tall == 1) continue;
    tiles::load<5>(from + a.below, left);
    tiles::dot_bf16<2, 5, 6>();
    tiles::dot_bf16<3, 5, 7>();
  }
  tiles::store<0>(out, to), tiles::store<1>(out + L, to);
  if constexpr (Tall == 2) tiles::store<2>(lower, to), tiles::store<3>(lower + L, to);
}

// out = a b, or out += a b if `Add`, for one panel of columns. Rows and depth are rounded up to whole tiles.
template <bool Add>
void tile_products(int64_t rows, LeftTiles a, const float* b, int64_t b_row, int64_t depth, float* out,
                   int64_t out_row) {
  for (; rows > tiles::ROWS; rows -= TilePairs::TALL, a.data += 2 * a.below, out += TilePairs::TALL * out_row)
    tile_product<2, Add>(a, b, b_row, depth, out, out_row);
  if (rows > 0) tile_product<1, Add>(a, b, b_row, depth, out, out_row);
}

#endif
