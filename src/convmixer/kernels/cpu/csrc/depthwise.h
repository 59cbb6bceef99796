// Depthwise convolution, one image and one vector of channels at a time, and its weight gradient.
//
// Activations are stored as (N, H, W, C). A "plane" is one vector of L channels of one image. It is copied into a
// scratch tile with a border of zeros, (rows, columns, L). The tile fits into the core's own caches for any C, and is
// read in whole aligned vectors. In the tensor the rows of a plane are C*W values apart, so they would alias in the
// cache.
//
// A "tap" is one of the k * k weights of a channel. If bf16 values are multiplied in pairs, a tile holds pairs: (row
// r, row r+1) of a channel as two bf16 in 32 bits. One dot-product instruction then does two taps. It multiplies
// exactly and adds in float, so the result is as good as that of a tile of floats.
#pragma once
#include <algorithm>

#include "memory.h"
#include "vec.h"

struct Image {
  int64_t N, H, W, C;
  int64_t pixels() const { return H * W; }
};

// A tile for one plane of H x W, with `top` zero rows above and `left` zero columns before it. The border has k - 1
// rows and k - 1 columns in all.
struct Tile {
  int64_t H, W, K, top, left;
  static constexpr int64_t STEP = 8;  // columns computed at once; rows are padded to whole steps
  int64_t columns() const { return (W + STEP - 1) / STEP * STEP + K - 1; }
  int64_t rows() const { return H + K; }  // one row more, because a pair reads the row below
  int64_t row_floats() const { return columns() * L; }
  size_t floats() const { return rows() * row_floats(); }
};

INLINE vf aligned(const float* p) { return *(const vf*)p; }
INLINE void put(float* p, vf x) { *(vf*)p = x; }

// Fills the inside of a tile whose border is already zero. read(row, column, count) returns the values of `count`
// columns of the plane, from `column` on. For pairs they are rounded to bf16.
template <bool Pairs, class Read> INLINE void fill(const Tile& t, float* tile, const Read& read) {
  for (int64_t r = 0; r < t.H; r++) {
    float* row = tile + (t.top + r) * t.row_floats() + t.left * L;
    float* above = t.top + r > 0 ? row - t.row_floats() : nullptr;
    const auto put_some = [&](auto count, int64_t c) {
      const auto values = read(r, c, count);
#pragma GCC unroll 8
      for (int j = 0; j < decltype(count)::value; j++) {
        const vf value = values.v[j];
        float* to = row + (c + j) * L;
        if constexpr (!Pairs) {
          put(to, value);
        } else {  // every row is written twice: as the first of its pairs, and as the second of those above
          const vu bits = (vu)rounded(value, (const bf16*)nullptr);
          put(to, (vf)(bits >> 16));
          if (above) put(to - t.row_floats(), (vf)((vu)aligned(to - t.row_floats()) | bits));
        }
      }
    };
    if (Pairs && r == 0 && above) std::memset(above, 0, t.W * L * sizeof(float));
    int64_t c = 0;
    for (; c + FEW <= t.W; c += FEW) put_some(few, c);
    for (; c < t.W; c++) put_some(one, c);
  }
}

// Packs the weights for the kernels: for each vector of channels [k][k][L] floats, rounded to the storage type, as
// autocast does. If `flip`, the taps are in reverse order. For pairs the layout is the same, but row 0 holds the
// pairs of rows 0 and 1, row 2 those of rows 2 and 3, and so on. Rows 1, 3, ... are not read. If k is odd, the last
// row has no partner and stays floats.
template <class T, class W> void pack_weights(const W* w, int64_t C, int K, bool flip, float* out) {
  const int taps = K * K;
  for (int64_t c0 = 0; c0 < C; c0 += L)
    for (int tap = 0; tap < taps; tap++)
      for (int lane = 0; lane < L; lane++) {
        const int64_t c = c0 + lane;
        float value = c < C ? w[c * taps + (flip ? taps - 1 - tap : tap)] : 0.0f;
        out[(c0 * taps) + tap * L + lane] = rounded(splat(value), (const T*)nullptr)[0];
      }
  if constexpr (!DEPTHWISE_PAIRS<T>) return;
  for (int64_t c0 = 0; c0 < C; c0 += L) {
    float* plane = out + c0 * taps;
    for (int ky = 0; ky + 1 < K; ky += 2)  // a pair replaces the value in its first row
      for (int kx = 0; kx < K; kx++) {
        float *first = plane + (ky * K + kx) * L, *second = first + K * L;
        store(first, pair_of(narrow(load(first)), narrow(load(second))));
      }
  }
}

// Adds the taps to the sums of `Columns` neighbouring columns of one output row. `tile` points at the value that the
// first tap of the first column multiplies.
template <bool Pairs, int Columns>
INLINE void convolve_row(const Tile& t, const float* tile, const float* weights, vf (&sum)[Columns]) {
  const int K = t.K;
  const int paired = Pairs ? K / 2 * 2 : 0;
  for (int ky = 0; ky < paired; ky += 2)
    for (int kx = 0; kx < K; kx++) {
      const vf w = aligned(weights + (ky * K + kx) * L);
      const float* x = tile + ky * t.row_floats() + kx * L;
#pragma GCC unroll 16
      for (int j = 0; j < Columns; j++) sum[j] = dot_pairs(sum[j], aligned(x + j * L), w);
    }
  for (int ky = paired; ky < K; ky++)
    for (int kx = 0; kx < K; kx++) {
      const vf w = aligned(weights + (ky * K + kx) * L);
      const float* x = tile + ky * t.row_floats() + kx * L;
#pragma GCC unroll 16
      for (int j = 0; j < Columns; j++) {
        const vf value = aligned(x + j * L);
        sum[j] += w * (Pairs ? first_of(value) : value);
      }
    }
}

template <bool Pairs, int Columns, class Write>
INLINE void convolve_columns(const Tile& t, const float* tile, const float* weights, int64_t row, int64_t column,
                             const Write& write) {
  vf sum[Columns] = {};
  convolve_row<Pairs, Columns>(t, tile + row * t.row_floats() + column * L, weights, sum);
  vf copy[Columns];  // variables index only this copy, so the sums themselves stay in registers
#pragma GCC unroll 16
  for (int j = 0; j < Columns; j++) copy[j] = sum[j];
  const int64_t valid = std::min<int64_t>(Columns, t.W - column);
  int j = 0;
#pragma GCC unroll 1
  for (; j + MANY <= valid; j += MANY) write(row, column + j, many, each<MANY>([&](int i) { return copy[j + i]; }));
#pragma GCC unroll 1
  for (; j < valid; j++) write(row, column + j, one, vg<1>{{copy[j]}});
}

// Calls write(row, column, count, sums) with the sums over the k x k taps of `count` neighbouring pixels in a row.
template <bool Pairs, class Write>
INLINE void convolve(const Tile& t, const float* tile, const float* weights, const Write& write) {
  constexpr int WIDE = L == 16 ? 16 : 8;  // as many sums as fit into registers
  for (int64_t row = 0; row < t.H; row++) {
    int64_t column = 0;
    for (; column + WIDE <= (t.W + Tile::STEP - 1) / Tile::STEP * Tile::STEP; column += WIDE)
      convolve_columns<Pairs, WIDE>(t, tile, weights, row, column, write);
    if constexpr (WIDE > Tile::STEP)
      if (column < t.W) convolve_columns<Pairs, Tile::STEP>(t, tile, weights, row, column, write);
  }
}

// Adds the sum over the plane of grad[h][w] * x[h + ky][w + kx] to out[ky * k + kx][L], for Rows x Cols taps. The
// arguments ky and kx are those of the first tap.
template <bool Pairs, int Rows, int Cols>
INLINE void correlate_taps(const Tile& t, const float* x, const float* grad, int ky, int kx, float* out) {
  vf sum[Rows][Cols] = {};
  const int64_t line = t.row_floats();
  const float* x0 = x + ky * line + kx * L;
  int64_t row = 0;
  for (; row + (Pairs ? 1 : 0) < t.H; row += Pairs ? 2 : 1)
    for (int64_t c = 0; c < t.W; c++) {
      const vf g = aligned(grad + row * line + c * L);
#pragma GCC unroll 4
      for (int i = 0; i < Rows; i++)
#pragma GCC unroll 8
        for (int j = 0; j < Cols; j++) {
          const vf value = aligned(x0 + (row + i) * line + (c + j) * L);
          sum[i][j] = Pairs ? dot_pairs(sum[i][j], value, g) : sum[i][j] + value * g;
        }
    }
  if (Pairs && row < t.H)  // if the number of rows is odd, the last has no partner
    for (int64_t c = 0; c < t.W; c++) {
      const vf g = first_of(aligned(grad + row * line + c * L));
#pragma GCC unroll 4
      for (int i = 0; i < Rows; i++)
#pragma GCC unroll 8
        for (int j = 0; j < Cols; j++)
          sum[i][j] += first_of(aligned(x0 + (row + i) * line + (c + j) * L)) * g;
    }
#pragma GCC unroll 4
  for (int i = 0; i < Rows; i++)
#pragma GCC unroll 8
    for (int j = 0; j < Cols; j++) {
      float* tap = out + ((ky + i) * t.K + kx + j) * L;
      put(tap, aligned(tap) + sum[i][j]);
    }
}

template <bool Pairs, int Cols>
void correlate_columns(const Tile& t, const float* x, const float* grad, int kx, float* out) {
  int ky = 0;
  for (; ky + 2 <= t.K; ky += 2) correlate_taps<Pairs, 2, Cols>(t, x, grad, ky, kx, out);
  if (ky < t.K) correlate_taps<Pairs, 1, Cols>(t, x, grad, ky, kx, out);
}

// Adds the weight gradient of one plane to out[k * k][L]. `grad` points at the first pixel of the gradient's plane
// inside its tile, whose rows must be as long as those of x's tile.
template <bool Pairs> void correlate(const Tile& t, const float* x, const float* grad, float* out) {
  for (int kx = 0; kx < t.K;) {
    const int left = t.K - kx;
    const int cols = left <= 5 ? left : left < 10 ? (left + 1) / 2 : 5;
    switch (cols) {
      case 1: correlate_columns<Pairs, 1>(t, x, grad, kx, out); break;
      case 2: correlate_columns<Pairs, 2>(t, x, grad, kx, out); break;
      case 3: correlate_columns<Pairs, 3>(t, x, grad, kx, out); break;
      case 4: correlate_columns<Pairs, 4>(t, x, grad, kx, out); break;
      default: correlate_columns<Pairs, 5>(t, x, grad, kx, out);
    }
    kx += cols;
  }
}

// How the planes of a batch are divided into tasks: a task is one group of images and one run of neighbouring blocks
// of channels. The split depends only on the shape, so the sums of a group do not depend on the number of threads.
struct Split {
  static constexpr int64_t BLOCK = 32;  // channels: one cache line of bf16
  int64_t groups, runs, blocks;
  explicit Split(const Image& s)
      : groups(std::clamp<int64_t>(s.N, 1, 16)), blocks((s.C + BLOCK - 1) / BLOCK) {
    runs = std::min<int64_t>(blocks, std::max<int64_t>(1, 64 / groups));
  }
};

// Calls plane(group, image, channel, lanes, scratch) for every plane, in parallel. Each thread's scratch starts as
// zeros and is not cleared between planes, so the borders of tiles stay zero.
template <class Plane> void for_planes(const Image& s, size_t scratch_floats, const Plane& plane) {
  const Split split(s);
  torch::stable::parallel_for(0, split.groups * split.runs, 1, [&](int64_t begin, int64_t end) {
    float* mine = scratch(scratch_floats);
    std::memset(mine, 0, scratch_floats * sizeof(float));
    for (int64_t task = begin; task < end; task++) {
      const int64_t group = task / split.runs, run = task % split.runs;
      const int64_t c_begin = run * split.blocks / split.runs * Split::BLOCK;
      const int64_t c_end = std::min(s.C, (run + 1) * split.blocks / split.runs * Split::BLOCK);
      for (int64_t n = group * s.N / split.groups; n < (group + 1) * s.N / split.groups; n++)
        for (int64_t c = c_begin; c < c_end; c += L)
          plane(group, n, c, (int)std::min<int64_t>(L, c_end - c), mine);
    }
  });
}

// Adds the groups' weight gradients in order: [groups][vectors of channels][taps][L] -> [C][taps].
inline void add_groups(const float* partial, int64_t groups, int64_t group_floats, int64_t C, int taps, float* out) {
  for (int64_t c = 0; c < C; c++)
    for (int tap = 0; tap < taps; tap++) {
      double sum = 0;
      for (int64_t g = 0; g < groups; g++) sum += partial[g * group_floats + c / L * L * taps + tap * L + c % L];
      out[c * taps + tap] = sum;
    }
}
