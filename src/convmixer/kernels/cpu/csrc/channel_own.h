// The pointwise half with our own matrix products: a block of rows goes through all steps while it is in a cache.
#pragma once
#include "channels.h"
#include "pointwise.h"

namespace {

// The first row of a slot. Slots hold whole tiles, because a single row takes as long as a tile.
inline int64_t first_row(int64_t slot, int64_t rows) {
  return std::min(rows, (rows + TALL - 1) / TALL * slot / SLOTS * TALL);
}

// Calls body(slot, first, count) for blocks of rows, in order within a group of slots; groups run in parallel.
template <class Body> void over_blocks(int64_t rows, int64_t group, int64_t groups, const Body& body) {
  for (int64_t slot = group * SLOTS / groups; slot < (group + 1) * SLOTS / groups; slot++) {
    const int64_t begin = first_row(slot, rows), last = first_row(slot + 1, rows);
    const int64_t blocks = (last - begin + BLOCK_ROWS - 1) / BLOCK_ROWS;
    for (int64_t first = begin, left = blocks; left > 0; left--) {  // whole tiles, of nearly equal size
      const int64_t count = std::min(((last - first + left - 1) / left + TALL - 1) / TALL * TALL, last - first);
      body(slot, first, count);
      first += count;
    }
  }
}

// Calls element(row, count, values) for one vector of channels of a panel, down its rows, a few rows at a time.
template <class Element> INLINE void down(int64_t rows, const float* panel, const Element& element) {
  int64_t r = 0;
  for (; r + MANY <= rows; r += MANY) element(r, many, read<MANY>(panel + r * PANEL, PANEL, L));
  for (; r < rows; r++) element(r, one, read<1>(panel + r * PANEL, PANEL, L));
}

// Computes v = h weight + bias with h = norm(act(u)) + norm(act(v before)), and the statistics of act(v).
template <class T, int ACT>
void channel_forward_all(const Residual<T, ACT>& residual, const float* panels, const Coefficients& bias, T* v,
                         int64_t rows, int64_t C, Sums* sums) {
  using K = Operand<T>;
  torch::stable::parallel_for(0, SLOTS, 1, [&](int64_t begin, int64_t end) {
    const int64_t depth = words_of<K>(C), step = row_step(depth);
    float *h = scratch(BLOCK_ROWS * (step + PANEL)), *out = h + BLOCK_ROWS * step;
    for (int64_t slot = begin; slot < end; slot++)
      over_blocks(rows, slot, SLOTS, [&](int64_t, int64_t first, int64_t count) {
        const Residual here = residual.from(first * C);  // a copy: otherwise it would be read again after every store
        for (int64_t r = 0; r < count; r++)
          along(C, [=](auto n, int64_t c, int lanes) INLINED {
            write(values_at<K>(h + r * step, c), L, here(n, r * C + c, c, lanes), L);
          });
        for (int64_t panel = 0; panel < C; panel += PANEL) {
          product<K, false, false>(count, h, step, panels + panel * depth, PANEL, depth, out, PANEL);
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

// Overwrites the gradient of y with the gradient of h. Gathers the gradient of the weights in one (C, whole panels)
// matrix for each group.
template <class T, int ACT>
void channel_backward_all(T* grad, const T* v, const Coefficients& norm_v, const Residual<T, ACT>& residual,
                          const float* panels, float* weight_sums, int64_t groups, int64_t rows, int64_t C, Sums& sums,
                          Sums& bias_sums) {
  using K = Operand<T>;
  torch::stable::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
    // The gradient of h reads dv along its rows. The gradient of the weights reads dv and h down their columns; there
    // a word holds values of neighbouring rows.
    const int64_t depth = words_of<K>(C), row = row_step(depth), step = row_step(C), columns = whole_panels(C);
    const int64_t held_words = words_of<K>(BLOCK_ROWS) * step, own_words = K::GROUP > 1 ? BLOCK_ROWS * row : 0;
    float *all_h = scratch(2 * held_words + own_words + BLOCK_ROWS * PANEL + columns), *all_dv = all_h + held_words;
    float *own_dv = all_dv + held_words, *out = own_dv + own_words, *bias_rows = out + BLOCK_ROWS * PANEL;
    for (int64_t group = begin; group < end; group++) {
      float* weight_sum = weight_sums + group * C * columns;
      std::memset(weight_sum, 0, C * columns * sizeof(float));
      int64_t held = 0;  // words of rows not yet added to the weights' gradient; many are added at once
      const auto add_to_weights = [&] {
        for (int64_t r = 0; r < C; r += SUM_ROWS)
          for (int64_t c = 0; c < C; c += PANEL)
            product<K, true, true>(std::min(SUM_ROWS, C - r), all_dv + r, step, all_h + c, step, held,
                                   weight_sum + r * columns + c, columns);
        held = 0;
      };
      over_blocks(rows, group, groups, [&](int64_t slot, int64_t first, int64_t count) {
        if (held + words_of<K>(count) > words_of<K>(BLOCK_ROWS)) add_to_weights();
        float *h = all_h + held * step, *down_dv = all_dv + held * step, *dv = K::GROUP > 1 ? own_dv : down_dv;
        held += words_of<K>(count);
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
        const Residual here = residual.from(first * C);
        in_words(h, [=](auto n, int64_t r, int64_t c, int lanes) INLINED { return here(n, r * C + c, c, lanes); });
        for (int64_t panel = 0; panel < C; panel += PANEL) {
          product<K, false, false>(count, dv, row, panels + panel * depth, PANEL, depth, out, PANEL);
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

// The groups' weight gradients, (groups, C, columns), added in order.
inline void add_weight_groups(const float* partial, int64_t groups, int64_t C, int64_t columns, float* out) {
  torch::stable::parallel_for(0, C, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++)
      for (int64_t c = 0; c < C; c++) {
        float sum = 0;
        for (int64_t g = 0; g < groups; g++) sum += partial[(g * C + row) * columns + c];
        out[row * C + c] = sum;
      }
  });
}

}  // namespace
