// The pointwise half with our own matrix products: a block of rows goes through all steps while it is in a cache. A
// word is 32 bits: one float, or a pair of bf16 values. The template parameter K says which: Floats, Pairs or
// TilePairs (pointwise.h, pointwise_tiles.h).
#pragma once
#include "channels.h"
#include "pointwise.h"
#include "pointwise_tiles.h"

namespace {

// The rows are divided into SLOTS parts, one for each slot of `Sums`. Returns the first row of a slot's part. Parts are
// whole tiles of K::TALL rows, because a row by itself takes several times as long as a row in a tile.
template <class K> int64_t first_row(int64_t slot, int64_t rows) {
  return std::min(rows, (rows + K::TALL - 1) / K::TALL * slot / SLOTS * K::TALL);
}

// Calls body(slot, first, count) for each block of rows in one group of slots, in order. The `groups` groups together
// hold all slots, and may run in parallel.
template <class K, class Body> void over_blocks(int64_t rows, int64_t group, int64_t groups, const Body& body) {
  for (int64_t slot = group * SLOTS / groups; slot < (group + 1) * SLOTS / groups; slot++) {
    const int64_t begin = first_row<K>(slot, rows), last = first_row<K>(slot + 1, rows);
    const int64_t blocks = (last - begin + K::BLOCK_ROWS - 1) / K::BLOCK_ROWS;
    for (int64_t first = begin, left = blocks; left > 0; left--) {  // blocks of whole tiles, of nearly equal size
      const int64_t share = (last - first + left - 1) / left;
      const int64_t count = std::min((share + K::TALL - 1) / K::TALL * K::TALL, last - first);
      body(slot, first, count);
      first += count;
    }
  }
}

// Goes down the rows of a panel for one vector of its channels: calls element(row, count, values) for `count` rows at
// a time, the first of which is `row`.
template <class Element> INLINE void down(int64_t rows, const float* panel, const Element& element) {
  int64_t r = 0;
  for (; r + MANY <= rows; r += MANY) element(r, many, read<MANY>(panel + r * PANEL, PANEL, L));
  for (; r < rows; r++) element(r, one, read<1>(panel + r * PANEL, PANEL, L));
}

// Multiplies, for one thread: here with vector instructions, below with the matrix unit.
template <class K> struct Unit {
  // out = `rows` rows of h times one panel of weights; the rows are `step` words apart
  static void multiply(int64_t rows, const float* h, int64_t step, const float* panel, int64_t depth, float* out) {
    product<K, false, false>(rows, h, step, panel, PANEL, depth, out, PANEL);
  }
  // sum += dv^T h, for `rows` rows of the sum and one panel of its columns; dv and h are both [words][step], where a
  // word holds neighbouring rows
  static void add(int64_t rows, const float* dv, const float* h, int64_t step, int64_t words, float* sum,
                  int64_t next) {
    product<K, true, true>(rows, dv, step, h, step, words, sum, next);
  }
  // Returns the part of dv from which `add` computes the rows r, r + 1, ... of the sum.
  static const float* held_row(const float* dv, int64_t r) { return dv + r; }
};
#if CONVMIXER_TILES && CONVMIXER_PAIRS
template <> struct Unit<TilePairs> {
  static constexpr int64_t HELD = TilePairs::HELD_ROWS / TilePairs::GROUP;
  Unit() { tiles::configure(tiles::shapes(tiles::ROWS, tiles::ROWS)); }
  ~Unit() { tiles::release(); }
  static void multiply(int64_t rows, const float* h, int64_t step, const float* panel, int64_t depth, float* out) {
    tile_products<false>(rows, {h, tiles::ROWS * step, tiles::ROWS, step}, panel, PANEL, depth, out, PANEL);
  }
  // Here dv is [tiles of channels][tiles of words], and each tile is transposed, see `hold`.
  static void add(int64_t rows, const float* dv, const float* h, int64_t step, int64_t words, float* sum,
                  int64_t next) {
    tile_products<true>(rows, {dv, tiles::ROWS * HELD, tiles::ROWS * tiles::ROWS, tiles::ROWS}, h, step, words, sum,
                        next);
  }
  static const float* held_row(const float* dv, int64_t r) { return dv + r * HELD; }
  // Transposes the tiles of a block, and puts them into dv behind the `held` words that are already there.
  static void hold(const float* down_dv, int64_t step, int64_t words, int64_t C, float* dv, int64_t held) {
    for (int64_t word = 0; word < words; word += tiles::ROWS)
      for (int64_t c = 0; c < C; c += tiles::ROWS)
        transpose_tile(down_dv + word * step + c, step, dv + c * HELD + (held + word) * tiles::ROWS);
  }
};
#endif

// Computes v = h weight + bias with h = norm(act(u)) + norm(act(before)), and the statistics of act(v).
template <class K, class T, int ACT>
void channel_forward_all(const Residual<T, ACT>& residual, const float* panels, const Coefficients& bias, T* v,
                         int64_t rows, int64_t C, Sums* sums) {
  torch::stable::parallel_for(0, SLOTS, 1, [&](int64_t begin, int64_t end) {
    const int64_t depth = depth_of<K>(C), step = row_step(depth);
    float *h = scratch(K::BLOCK_ROWS * (step + PANEL)), *out = h + K::BLOCK_ROWS * step;
    if (K::DEPTH > 1) std::memset(h, 0, K::BLOCK_ROWS * step * sizeof(float));  // the padding at the end of each row
    const Unit<K> unit;
    for (int64_t slot = begin; slot < end; slot++)
      over_blocks<K>(rows, slot, SLOTS, [&](int64_t, int64_t first, int64_t count) {
        const Residual here = residual.from(first * C);  // a copy: otherwise it would be read again after every store
        for (int64_t r = 0; r < count; r++)
          along(C, [=](auto n, int64_t c, int lanes) INLINED {
            write(values_at<K>(h + r * step, c), L, here(n, r * C + c, c, lanes), L);
          });
        for (int64_t panel = 0; panel < C; panel += PANEL) {
          unit.multiply(count, h, step, panels + panel * depth, depth, out);
          for (int64_t c = panel; c < std::min(panel + PANEL, C); c += L) {
            const int lanes = std::min<int64_t>(L, C - c);
            const vf b = bias.at(0, c);
            vf sum{}, squares{};
            down(count, out + c - panel, [&](int64_t r, auto n, auto values) INLINED {
              const auto stored = write_rounded(v + (first + r) * C + c, C, values + b, lanes);
              if (!sums) return;
              const auto a = activate<T, ACT>(stored);
              sum += total(a);
              squares += total(a * a);
            });
            if (!sums) continue;
            sums->add(slot, 0, c, sum);
            sums->add(slot, 1, c, squares);
          }
        }
      });
  });
}

// `grad` holds the gradient of y = norm(act(v)), the block's output; it is overwritten with the gradient of h. The
// gradient of the weights is summed in one (columns, columns) matrix for each group of slots, with columns =
// whole_panels(C).
template <class K, class T, int ACT>
void channel_backward_all(T* grad, const T* v, const Coefficients& norm_v, const Residual<T, ACT>& residual,
                          const float* panels, float* weight_sums, int64_t groups, int64_t rows, int64_t C, Sums& sums,
                          Sums& bias_sums) {
  torch::stable::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
    // dv is the gradient of v. For the gradient of h, dv is read along its rows, so a word holds neighbouring channels
    // (own_dv). For the gradient of the weights, dv and h are read down their columns, so a word holds neighbouring
    // rows (all_dv, all_h). Both forms of dv are the same if a word is one value. First, rows are
    // collected, with AMX from several blocks. Then one product adds their part of the gradient of the weights.
    constexpr int64_t BLOCK_ROWS = K::BLOCK_ROWS, MOST = (K::HELD_ROWS + K::GROUP - 1) / K::GROUP;
    const int64_t depth = depth_of<K>(C), row = row_step(depth), step = row_step(C), columns = whole_panels(C);
    const int64_t own_words = K::GROUP > 1 ? BLOCK_ROWS * row : 0, out_words = BLOCK_ROWS * PANEL;
    const int64_t held_words = MOST * step, across_words = K::TILES ? depth_of<K>(BLOCK_ROWS) * step : 0;
    float* all_h = scratch(2 * held_words + own_words + across_words + out_words + columns);
    float *all_dv = all_h + held_words, *own_dv = all_dv + held_words, *across = own_dv + own_words;
    float *out = across + across_words, *bias_rows = out + out_words;
    if (K::DEPTH > 1) std::memset(own_dv, 0, own_words * sizeof(float));  // the padding at the end of each row
    const Unit<K> unit;
    for (int64_t group = begin; group < end; group++) {
      float* weight_sum = weight_sums + group * columns * columns;
      std::memset(weight_sum, 0, columns * columns * sizeof(float));
      int64_t held = 0;  // words in all_dv and all_h, not yet added to the weights' gradient
      const auto add_to_weights = [&] {
        for (int64_t r = 0; r < C; r += K::SUM_ROWS)
          for (int64_t c = 0; c < C; c += PANEL)
            unit.add(std::min(K::SUM_ROWS, C - r), unit.held_row(all_dv, r), all_h + c, step, held,
                     weight_sum + r * columns + c, columns);
        held = 0;
      };
      over_blocks<K>(rows, group, groups, [&](int64_t slot, int64_t first, int64_t count) {
        const int64_t words = words_of<K>(count), whole = depth_of<K>(count);
        if (held + whole > MOST) add_to_weights();
        float *h = all_h + held * step, *down_dv = K::TILES ? across : all_dv + held * step;
        float* dv = K::GROUP > 1 ? own_dv : down_dv;
        for (float* to : {h, down_dv}) std::memset(to + words * step, 0, (whole - words) * step * sizeof(float));
        std::memset(bias_rows, 0, columns * sizeof(float));
        const auto in_words = [&](float* to, const auto& row_values) INLINED {
          for (int64_t r = 0; r < count; r += K::GROUP)
            along(C, [&](auto n, int64_t c, int lanes) INLINED {
              vg<decltype(n)::value> values[K::GROUP] = {};
#pragma GCC unroll 2
              for (int i = 0; i < K::GROUP; i++)
                if (r + i < count) values[i] = row_values(n, r + i, c, lanes);
              write(to + r / K::GROUP * step + c, L, K::words(values), L);
            });
        };
        in_words(down_dv, [&](auto n, int64_t r, int64_t c, int lanes) INLINED {
          constexpr int N = decltype(n)::value;
          const NormBackward<T, ACT, vg<N>> back{norm_v.some<N>(0, c), norm_v.some<N>(1, c), norm_v.some<N>(2, c)};
          const int64_t i = (first + r) * C + c;
          const auto gradient = back(read<N>(grad + i, L, lanes), read<N>(v + i, L, lanes));
          add_to<1>(bias_rows + c, 0, gradient);
          if constexpr (K::GROUP > 1) write(values_at<K>(dv + r * row, c), L, gradient, L);
          return gradient;
        });
        for (int64_t c = 0; c < C; c += L) bias_sums.add(slot, 0, c, aligned(bias_rows + c));
        if constexpr (K::TILES) unit.hold(down_dv, step, whole, C, all_dv, held);
        held += whole;
        const Residual here = residual.from(first * C);
        in_words(h, [=](auto n, int64_t r, int64_t c, int lanes) INLINED { return here(n, r * C + c, c, lanes); });
        for (int64_t panel = 0; panel < C; panel += PANEL) {
          unit.multiply(count, dv, row, panels + panel * depth, depth, out);
          for (int64_t c = panel; c < std::min(panel + PANEL, C); c += L) {
            const int lanes = std::min<int64_t>(L, C - c);
            vf sum{}, products{};
            down(count, out + c - panel, [&](int64_t r, auto n, auto values) INLINED {
              constexpr int N = decltype(n)::value;
              const int64_t i = (first + r) * C + c;
              const auto gradient = write_rounded(grad + i, C, values, lanes);
              sum += total(gradient);
              products += total(gradient * activate<T, ACT>(read<N>(residual.u + i, C, lanes)));
            });
            sums.add(slot, 0, c, sum);
            sums.add(slot, 1, c, products);
          }
        }
      });
      add_to_weights();
    }
  });
}

// Adds the weight gradients of all groups, (groups, columns, columns), in order.
inline void add_weight_groups(const float* partial, int64_t groups, int64_t C, int64_t columns, float* out) {
  torch::stable::parallel_for(0, C, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++)
      for (int64_t c = 0; c < C; c++) {
        float sum = 0;
        for (int64_t g = 0; g < groups; g++) sum += partial[(g * columns + row) * columns + c];
        out[row * C + c] = sum;
      }
  });
}

}  // namespace
