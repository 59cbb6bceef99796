// The two halves of a ConvMixer block, forward and backward, on activations of shape (N, H, W, C).
//
// A block is  u = depthwise(x) + b,  h = norm(act(u)) + x,  v = pointwise(h) + b,  y = norm(act(v)),  and y is the x
// of the next one. Only u and v are kept. x, h and every normalised value are computed again where they are read:
// norm(act(v)) is act(v) * scale + shift once the statistics are known, cheaper than a trip to memory.
//
// In each training step a tensor passes through memory as few times as the statistics allow. They are a barrier:
// spatial_forward    reads v of the block before, writes u, gathers the statistics of act(u)
// channel_forward    reads u and v before, writes v, gathers the statistics of act(v); by rows that fit the cache,
//                    between which and the product nothing goes to memory where the product is our own
// channel_backward   turns the gradient of y into that of h; gathers the sums for the first norm
// spatial_backward   turns the gradient of h into that of x; gathers the sums for the norm of the block before
#include "activation.h"
#include "depthwise.h"
#include "pointwise.h"

#include <array>
#include <tuple>

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

void check(bool ok, const char* what) { STD_TORCH_CHECK(ok, "convmixer: ", what); }

int64_t whole_vectors(int64_t C) { return (C + L - 1) / L * L; }

// Rows of per-channel coefficients, (count, C) fp32, padded to whole vectors.
class Coefficients {
 public:
  Coefficients(const Tensor& t, int64_t C) : C_(whole_vectors(C)), values_(t.size(0) * C_) {
    check(t.is_contiguous() && t.scalar_type() == ScalarType::Float && t.size(1) == C, "coefficients must be fp32");
    for (int64_t i = 0; i < t.size(0); i++)
      std::memcpy(&values_[i * C_], t.const_data_ptr<float>() + i * C, C * sizeof(float));
  }
  INLINE vf at(int row, int64_t c) const { return load(data_ + row * C_ + c); }
  template <int N> INLINE vg<N> some(int row, int64_t c) const { return ::read<N>(data_ + row * C_ + c, L, L); }

 private:
  int64_t C_;
  std::vector<float> values_;
  const float* data_ = values_.data();
};

// Per-channel sums in double, gathered in slots that one thread at a time writes, then added in order.
class Sums {
 public:
  Sums(int slots, int count, int64_t C) : slots_(slots), count_(count), C_(C), padded_(whole_vectors(C)) {
    values_.assign(slots * count * padded_, 0.0);
  }
  void add(int64_t slot, int which, int64_t c, vf sum) {
    double* to = &values_[(slot * count_ + which) * padded_ + c];
    store_vector(to, load_vector<vd>(to) + __builtin_convertvector(sum, vd));
  }
  // (count, C) float64
  Tensor total() const {
    Tensor out = pooled({count_, C_}, ScalarType::Double);
    double* to = out.mutable_data_ptr<double>();
    for (int which = 0; which < count_; which++)
      for (int64_t c = 0; c < C_; c++) {
        double sum = 0;
        for (int slot = 0; slot < slots_; slot++) sum += values_[(slot * count_ + which) * padded_ + c];
        to[which * C_ + c] = sum;
      }
    return out;
  }

 private:
  int slots_, count_;
  int64_t C_, padded_;
  std::vector<double> values_;
};

// act(v) * scale + shift. V is a vector for one set of channels, or a group of them for neighbouring sets.
template <class T, int ACT, class V> struct Norm {
  V scale, shift;
  template <int N> INLINE vg<N> operator()(vg<N> v) const { return activate<T, ACT>(v) * scale + shift; }
};
template <class T, int ACT> INLINE Norm<T, ACT, vf> norm_of(const Coefficients& k, int64_t c) {
  return {k.at(0, c), k.at(1, c)};
}
template <class T, int ACT, int N> INLINE Norm<T, ACT, vg<N>> norms_of(Size<N>, const Coefficients& k, int64_t c) {
  return {k.some<N>(0, c), k.some<N>(1, c)};
}

// The gradient before act, from the gradient g after norm: (a * g + b * act(v) + c) * act'(v). The coefficients hold
// the batch's sums; Source: arXiv 1502.03167, Sec. 3.
template <class T, int ACT, class V> struct NormBackward {
  V a, b, c;
  template <int N> INLINE vg<N> operator()(vg<N> g, vg<N> v) const {
    return (g * a + (activate<T, ACT>(v) * b + c)) * slope<T, ACT>(v);
  }
};

constexpr int SLOTS = 32;     // shares of the rows, whatever the number of threads, so that sums do not depend on it
constexpr int64_t ROWS = 32;  // rows whose sums are added in float before they go to double

// element(count, c, lanes) for every vector or few vectors of a row of C channels.
template <class Element> INLINE void along(int64_t C, const Element& element) {
  int64_t c = 0;
  for (; c + MANY * L <= C; c += MANY * L) element(many, c, L);
  for (; c + L <= C; c += L) element(one, c, L);
  if (c < C) element(one, c, (int)(C - c));
}

// element(count, i, c, lanes, sums) for every vector or few vectors, i their offset and c their channel, in parallel
// and in the order of the memory. sums points at their `Sums` running sums, side by side, which end in `gathered`.
template <int Count, class Element>
void over_rows(int64_t rows, int64_t C, Sums* gathered, const Element& element) {
  const int64_t padded = whole_vectors(C);
  torch::stable::parallel_for(0, SLOTS, 1, [&](int64_t begin, int64_t end) {
    float* sums = scratch(Count * padded);
    for (int64_t slot = begin; slot < end; slot++) {
      const int64_t last = (slot + 1) * rows / SLOTS;
      for (int64_t first = slot * rows / SLOTS; first < last; first += ROWS) {
        std::memset(sums, 0, Count * padded * sizeof(float));
        for (int64_t r = first; r < std::min(first + ROWS, last); r++)
          along(C, [&](auto count, int64_t c, int lanes) INLINED {
            element(count, r * C + c, c, lanes, sums + Count * c);
          });
        for (int64_t c = 0; c < C && gathered; c += L)
          for (int which = 0; which < Count; which++)
            gathered->add(slot, which, c, aligned(sums + Count * c + which * L));
      }
    }
  });
}

// Add to sum number `which` of `Count`.
template <int Count, int N> INLINE void add_to(float* sums, int which, vg<N> x) {
#pragma GCC unroll 8
  for (int j = 0; j < N; j++) put(sums + (j * Count + which) * L, aligned(sums + (j * Count + which) * L) + x.v[j]);
}

template <class T, int ACT> void gather_statistics(const T* v, int64_t rows, int64_t C, Sums& sums) {
  over_rows<2>(rows, C, &sums, [=](auto count, int64_t i, int64_t, int lanes, float* sum) INLINED {
    const auto a = activate<T, ACT>(read<count.value>(v + i, L, lanes));
    add_to<2>(sum, 0, a);
    add_to<2>(sum, 1, a * a);
  });
}

// v += bias, which the library's product does not add as cheaply; then the statistics of act(v).
template <class T, int ACT>
void add_bias(T* v, const Coefficients& bias, int64_t rows, int64_t C, Sums* sums) {
  over_rows<2>(rows, C, sums, [=, &bias](auto count, int64_t i, int64_t c, int lanes, float* sum) INLINED {
    const auto sum_of_both = read<count.value>(v + i, L, lanes) + bias.some<count.value>(0, c);
    const auto stored = write_rounded(v + i, L, sum_of_both, lanes);
    const auto a = activate<T, ACT>(stored);
    add_to<2>(sum, 0, a);
    add_to<2>(sum, 1, a * a);
  });
}

// out = x, or out += x
template <class T> void accumulate(const T* x, float* out, int64_t count, bool first) {
  torch::stable::parallel_for(0, count, 1 << 15, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += L) {
      const int lanes = std::min<int64_t>(L, end - i);
      const auto value = read<1>(x + i, L, lanes);
      write(out + i, L, first ? value : read<1>(out + i, L, lanes) + value, lanes);
    }
  });
}

// Sums of g and of g * act(v).
template <class T, int ACT> void gather_products(const T* g, const T* v, int64_t rows, int64_t C, Sums& sums) {
  over_rows<2>(rows, C, &sums, [=](auto count, int64_t i, int64_t, int lanes, float* sum) INLINED {
    const auto gradient = read<count.value>(g + i, L, lanes);
    add_to<2>(sum, 0, gradient);
    add_to<2>(sum, 1, gradient * activate<T, ACT>(read<count.value>(v + i, L, lanes)));
  });
}

template <class T, int ACT>
void apply_norm(const T* v, const Coefficients& norm, T* y, int64_t rows, int64_t C) {
  over_rows<0>(rows, C, nullptr, [=, &norm](auto count, int64_t i, int64_t c, int lanes, float*) INLINED {
    write(y + i, L, norms_of<T, ACT>(count, norm, c)(read<count.value>(v + i, L, lanes)), lanes);
  });
}

// h = norm(act(u)) + norm(act(v before)), of vectors at offset i and channel c.
template <class T, int ACT> struct Residual {
  const T *u, *before;
  const Coefficients &norm, &norm_before;
  template <int N> INLINE vg<N> operator()(Size<N> count, int64_t i, int64_t c, int lanes) const {
    const auto x = norms_of<T, ACT>(count, norm_before, c)(read<N>(before + i, L, lanes));
    return norms_of<T, ACT>(count, norm, c)(read<N>(u + i, L, lanes)) + x;
  }
  Residual from(int64_t offset) const { return {u + offset, before + offset, norm, norm_before}; }
};
template <class T, int ACT> void apply_residual(const Residual<T, ACT>& residual, T* h, int64_t rows, int64_t C) {
  over_rows<0>(rows, C, nullptr, [&](auto count, int64_t i, int64_t c, int lanes, float*) INLINED {
    write(h + i, L, residual(count, i, c, lanes), lanes);
  });
}

// The gradient before the activation, and its sum. `out` may be `g`.
template <class T, int ACT>
void apply_norm_backward(const T* g, const T* v, const Coefficients& norm, T* out, int64_t rows, int64_t C,
                         Sums& sums) {
  over_rows<1>(rows, C, &sums, [=, &norm](auto count, int64_t i, int64_t c, int lanes, float* sum) INLINED {
    constexpr int N = count.value;
    const NormBackward<T, ACT, vg<N>> back{norm.some<N>(0, c), norm.some<N>(1, c), norm.some<N>(2, c)};
    const auto gradient = back(read<N>(g + i, L, lanes), read<N>(v + i, L, lanes));
    add_to<1>(sum, 0, gradient);
    write(out + i, L, gradient, lanes);
  });
}

template <int N> INLINE vf total(vg<N> x) {
  vf sum = x.v[0];
#pragma GCC unroll 8
  for (int j = 1; j < N; j++) sum += x.v[j];
  return sum;
}

// Sum of value(pixel) over an image, row by row: one fp32 sum over a thousand pixels would lose three digits.
template <int N, class F> INLINE vg<N> sum_of_pixels(const Image& s, const F& value) {
  vg<N> sum{};
  for (int64_t row = 0; row < s.pixels(); row += s.W) {
    vg<N> part{};
    for (int64_t p = row; p < row + s.W; p++) part = part + value(p);
    sum = sum + part;
  }
  return sum;
}

template <class T, int ACT>
void pool_all(const Image& s, const T* v, const Coefficients& norm, float* out) {
  const vf share = splat(1.0f / s.pixels());
  torch::stable::parallel_for(0, s.N, 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; n++)
      along(s.C, [&](auto count, int64_t c, int lanes) {
        constexpr int N = decltype(count)::value;
        const T* image = v + n * s.pixels() * s.C + c;
        const auto sum = sum_of_pixels<N>(
            s, [&](int64_t p) { return activate<T, ACT>(read<N>(image + p * s.C, L, lanes)); });
        write(out + n * s.C + c, L, sum * share * norm.some<N>(0, c) + norm.some<N>(1, c), lanes);
      });
  });
}

// Each pixel's share of the pooled gradient, and its sums with act(v).
template <class T, int ACT> void spread(const Image& s, const float* grad, const T* v, T* out, Sums& sums) {
  const vf share = splat(1.0f / s.pixels());
  torch::stable::parallel_for(0, SLOTS, 1, [&](int64_t begin, int64_t end) {
    for (int64_t slot = begin; slot < end; slot++)
      for (int64_t n = slot * s.N / SLOTS; n < (slot + 1) * s.N / SLOTS; n++)
        along(s.C, [&](auto count, int64_t c, int lanes) {
          constexpr int N = decltype(count)::value;
          const auto of_image = read<N>(grad + n * s.C + c, L, lanes) * share;
          const auto g = each<N>([&](int j) { return rounded(of_image.v[j], out); });
          const auto sum = sum_of_pixels<N>(s, [&](int64_t p) {
            const int64_t i = (n * s.pixels() + p) * s.C + c;
            const auto a = activate<T, ACT>(read<N>(v + i, L, lanes));
            write(out + i, L, g, lanes);
            return a;
          });
          for (int j = 0; j < N; j++) {
            sums.add(slot, 0, c + j * L, g.v[j] * (float)s.pixels());
            sums.add(slot, 1, c + j * L, g.v[j] * sum.v[j]);
          }
        });
  });
}

template <class T, int ACT>
void spatial_forward_all(const Image& s, int K, const T* before, const Coefficients& norm, const float* weights,
                         const Coefficients& bias, T* u, Sums* sums) {
  const Tile t{s.H, s.W, K, (K - 1) / 2, (K - 1) / 2};
  for_planes(s, t.floats(), [&](int64_t group, int64_t n, int64_t c, int lanes, float* tile) {
    const int64_t base = n * s.pixels() * s.C + c;
    const auto at = [&](int64_t row, int64_t column) { return base + (row * s.W + column) * s.C; };
    const auto x = norm_of<T, ACT>(norm, c);
    fill<PAIRS<T>>(t, tile, [&](int64_t row, int64_t column, auto count) {
      return x(read<count.value>(before + at(row, column), s.C, lanes));
    });
    const vf b = bias.at(0, c);
    vf sum{}, squares{};
    const auto end_row = [&] {
      sums->add(group, 0, c, sum);
      sums->add(group, 1, c, squares);
      sum = squares = vf{};
    };
    convolve<PAIRS<T>>(t, tile, weights + c * K * K, [&](int64_t row, int64_t column, auto, auto values) INLINED {
      if (sums && column == 0 && row % 2 == 0) end_row();
      const auto stored = write_rounded(u + at(row, column), s.C, values + b, lanes);
      if (!sums) return;
      const auto a = activate<T, ACT>(stored);
      sum += total(a);
      squares += total(a * a);
    });
    if (sums) end_row();
  });
}

template <class T, int ACT>
void spatial_backward_all(const Image& s, int K, T* grad, const T* u, const Coefficients& norm, const T* before,
                          const Coefficients& norm_before, const float* flipped, float* weight_sums,
                          int64_t group_floats, Sums& sums, Sums& bias_sums) {
  const Tile of_x{s.H, s.W, K, (K - 1) / 2, (K - 1) / 2}, of_grad{s.H, s.W, K, K / 2, K / 2};
  for_planes(s, 2 * of_x.floats(), [&](int64_t group, int64_t n, int64_t c, int lanes, float* x_tile) {
    const int64_t base = n * s.pixels() * s.C + c;
    const auto at = [&](int64_t row, int64_t column) { return base + (row * s.W + column) * s.C; };
    float* grad_tile = x_tile + of_x.floats();
    const auto x = norm_of<T, ACT>(norm_before, c);
    fill<PAIRS<T>>(of_x, x_tile, [&](int64_t row, int64_t column, auto count) {
      return x(read<count.value>(before + at(row, column), s.C, lanes));
    });
    const NormBackward<T, ACT, vf> back{norm.at(0, c), norm.at(1, c), norm.at(2, c)};
    vf bias_sum{};
    fill<PAIRS<T>>(of_grad, grad_tile, [&](int64_t row, int64_t column, auto count) {
      constexpr int N = count.value;
      const int64_t i = at(row, column);
      const auto gradient = back(read<N>(grad + i, s.C, lanes), read<N>(u + i, s.C, lanes));
      bias_sum += total(gradient);
      return gradient;
    });
    bias_sums.add(group, 0, c, bias_sum);
    correlate<PAIRS<T>>(of_x, x_tile, grad_tile + of_grad.top * of_grad.row_floats() + of_grad.left * L,
                        weight_sums + group * group_floats + c * K * K);
    vf sum{}, products{};
    const auto add_dx = [&](int64_t row, int64_t column, auto count, auto dx) INLINED {
      constexpr int N = count.value;
      const int64_t i = at(row, column);
      const auto gradient = write_rounded(grad + i, s.C, dx + read<N>(grad + i, s.C, lanes), lanes);
      sum += total(gradient);
      products += total(gradient * activate<T, ACT>(read<N>(before + i, s.C, lanes)));
    };
    convolve<PAIRS<T>>(of_grad, grad_tile, flipped + c * K * K, add_dx);
    sums.add(group, 0, c, sum);
    sums.add(group, 1, c, products);
  });
}

// ---- the pointwise half with our own products: a block of rows goes through all steps while it is in a cache ----

// The first row of a slot: shares in whole tiles, since a row alone takes as long as several.
inline int64_t first_row(int64_t slot, int64_t rows) {
  return std::min(rows, (rows + TALL - 1) / TALL * slot / SLOTS * TALL);
}

// body(slot, first, count) for blocks of rows, in order within a group of slots; groups run in parallel.
template <class Body> void over_blocks(int64_t rows, int64_t group, int64_t groups, const Body& body) {
  for (int64_t slot = group * SLOTS / groups; slot < (group + 1) * SLOTS / groups; slot++) {
    const int64_t begin = first_row(slot, rows), last = first_row(slot + 1, rows);
    const int64_t blocks = (last - begin + BLOCK_ROWS - 1) / BLOCK_ROWS;
    for (int64_t first = begin, left = blocks; left > 0; left--) {  // of nearly one size, in whole tiles
      const int64_t count = std::min(((last - first + left - 1) / left + TALL - 1) / TALL * TALL, last - first);
      body(slot, first, count);
      first += count;
    }
  }
}

// element(row, count, values) for every vector of channels c .. c + lanes of a panel: few rows at a time.
template <class Element> INLINE void down(int64_t rows, const float* panel, const Element& element) {
  int64_t r = 0;
  for (; r + MANY <= rows; r += MANY) element(r, many, read<MANY>(panel + r * PANEL, PANEL, L));
  for (; r < rows; r++) element(r, one, read<1>(panel + r * PANEL, PANEL, L));
}

// v = h weight + bias with h = norm(act(u)) + norm(act(v before)), and the statistics of act(v).
template <class T, int ACT>
void channel_forward_all(const Residual<T, ACT>& residual, const float* panels, const Coefficients& bias, T* v,
                         int64_t rows, int64_t C, Sums* sums) {
  using K = Operand<T>;
  torch::stable::parallel_for(0, SLOTS, 1, [&](int64_t begin, int64_t end) {
    const int64_t depth = words_of<K>(C), step = row_step(depth);
    float *h = scratch(BLOCK_ROWS * (step + PANEL)), *out = h + BLOCK_ROWS * step;
    for (int64_t slot = begin; slot < end; slot++)
      over_blocks(rows, slot, SLOTS, [&](int64_t, int64_t first, int64_t count) {
        const Residual here = residual.from(first * C);  // by value: else it is read again after every store
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

// The gradient of y becomes that of h; the gradients of the weights, one (C, whole panels) matrix for each group.
template <class T, int ACT>
void channel_backward_all(T* grad, const T* v, const Coefficients& norm_v, const Residual<T, ACT>& residual,
                          const float* panels, float* weight_sums, int64_t groups, int64_t rows, int64_t C, Sums& sums,
                          Sums& bias_sums) {
  using K = Operand<T>;
  torch::stable::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
    // dv is read along its rows for the gradient of h. For that of the weights dv and h are read down their columns,
    // where a word holds values of neighbouring rows.
    const int64_t depth = words_of<K>(C), row = row_step(depth), step = row_step(C), columns = whole_panels(C);
    const int64_t held_words = words_of<K>(BLOCK_ROWS) * step, own_words = K::GROUP > 1 ? BLOCK_ROWS * row : 0;
    float *all_h = scratch(2 * held_words + own_words + BLOCK_ROWS * PANEL + columns), *all_dv = all_h + held_words;
    float *own_dv = all_dv + held_words, *out = own_dv + own_words, *bias_rows = out + BLOCK_ROWS * PANEL;
    for (int64_t group = begin; group < end; group++) {
      float* weight_sum = weight_sums + group * C * columns;
      std::memset(weight_sum, 0, C * columns * sizeof(float));
      int64_t held = 0;  // words of rows that the weights' gradient still lacks: it is added to for many at once
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

// ---- tensors in, tensors out ----

Image image_of(const Tensor& x) {
  check(x.dim() == 4 && x.is_contiguous(), "activations must be contiguous (N, H, W, C)");
  return {x.size(0), x.size(1), x.size(2), x.size(3)};
}

// Call f with the storage type and the activation as types: f(T{}, std::integral_constant<int, ACT>{}).
template <class F> void dispatch(const Tensor& x, int64_t act, const F& f) {
  using Gelu = std::integral_constant<int, GELU>;
  using Relu = std::integral_constant<int, RELU>;
  const ScalarType type = x.scalar_type();
  check(type == ScalarType::Float || type == ScalarType::BFloat16, "fp32 or bf16 is needed");
  if (type == ScalarType::Float) act == RELU ? f(float{}, Relu{}) : f(float{}, Gelu{});
  else act == RELU ? f(bf16{}, Relu{}) : f(bf16{}, Gelu{});
}

template <class T> const T* data(const Tensor& t) { return static_cast<const T*>(t.const_data_ptr()); }
template <class T> T* mutable_data(const Tensor& t) { return static_cast<T*>(t.mutable_data_ptr()); }

Tensor like(const Tensor& x) { return pooled({x.size(0), x.size(1), x.size(2), x.size(3)}, x.scalar_type()); }

void check_pointwise(const Tensor& weight, const Tensor& x) {
  check(weight.is_contiguous() && weight.scalar_type() == x.scalar_type() && weight.dim() == 2 &&
            weight.size(0) == x.size(3) && weight.size(1) == x.size(3),
        "pointwise weights must be contiguous (C, C), of the activations' type");
}

Tensor row_of(const Tensor& vector) {  // (C) -> (1, C)
  return torch::stable::unsqueeze(vector, 0);
}

std::tuple<Tensor, Tensor> spatial_forward(const Tensor& before, const Tensor& norm, const Tensor& weight,
                                           const Tensor& bias, int64_t act, bool statistics) {
  const Image s = image_of(before);
  const int K = weight.size(2);
  check(weight.is_contiguous() && weight.scalar_type() == ScalarType::Float, "weights must be contiguous fp32");
  Tensor u = like(before), packed = pooled({whole_vectors(s.C) * K * K}, ScalarType::Float);
  const Coefficients norms(norm, s.C), biases(row_of(bias), s.C);
  Sums sums(Split(s).groups, 2, s.C);
  dispatch(before, act, [&](auto t, auto a) {
    using T = decltype(t);
    float* weights = packed.mutable_data_ptr<float>();
    pack_weights<T>(weight.const_data_ptr<float>(), s.C, K, false, weights);
    spatial_forward_all<T, decltype(a)::value>(s, K, data<T>(before), norms, weights, biases, mutable_data<T>(u),
                                               statistics ? &sums : nullptr);
  });
  return {u, sums.total()};
}

// The gradient of the weights comes back as (C, 1, k, k), that of the bias as (1, C), the sums as (2, C).
std::tuple<Tensor, Tensor, Tensor> spatial_backward(const Tensor& grad, const Tensor& u, const Tensor& norm,
                                                    const Tensor& before, const Tensor& norm_before,
                                                    const Tensor& weight, int64_t act) {
  const Image s = image_of(grad);
  const int K = weight.size(2), taps = K * K;
  const int64_t groups = Split(s).groups, group_floats = whole_vectors(s.C) * taps;
  check(weight.is_contiguous() && weight.scalar_type() == ScalarType::Float, "weights must be contiguous fp32");
  Tensor packed = pooled({group_floats}, ScalarType::Float);
  Tensor partial = pooled({groups, group_floats}, ScalarType::Float);
  std::memset(partial.mutable_data_ptr(), 0, groups * group_floats * sizeof(float));
  const Coefficients norms(norm, s.C), norms_before(norm_before, s.C);
  Sums sums(groups, 2, s.C), bias_sums(groups, 1, s.C);
  dispatch(grad, act, [&](auto t, auto a) {
    using T = decltype(t);
    pack_weights<T>(weight.const_data_ptr<float>(), s.C, K, true, packed.mutable_data_ptr<float>());
    spatial_backward_all<T, decltype(a)::value>(s, K, mutable_data<T>(grad), data<T>(u), norms, data<T>(before),
                                                norms_before, packed.const_data_ptr<float>(),
                                                partial.mutable_data_ptr<float>(), group_floats, sums, bias_sums);
  });
  Tensor weight_grad = pooled({s.C, 1, K, K}, ScalarType::Float);
  add_groups(partial.const_data_ptr<float>(), groups, group_floats, s.C, taps, weight_grad.mutable_data_ptr<float>());
  return {weight_grad, bias_sums.total(), sums.total()};
}

// ---- the pointwise half with the library's products, in chunks of rows that fit the shared cache ----

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // before torch 2.12
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

void multiply(const Tensor& a, const Tensor& b, Tensor& out) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(a), torch::stable::detail::from(b),
                                    torch::stable::detail::from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor rows_of(const Tensor& matrix, int64_t begin, int64_t count) {
  Tensor whole = matrix;
  return torch::stable::narrow(whole, 0, begin, count);
}

Tensor as_matrix(const Tensor& x) { return torch::stable::view(x, {x.size(0) * x.size(1) * x.size(2), x.size(3)}); }

int64_t chunk_rows(int64_t rows, int64_t C) {
  const int64_t wanted = std::max<int64_t>(2048, (int64_t{1} << 20) / C);
  const int64_t chunks = std::max<int64_t>(1, rows / wanted);
  return (rows + chunks - 1) / chunks;
}

template <class T, int ACT>
void channel_forward_by_library(const Residual<T, ACT>& residual, const Tensor& weight, const Coefficients& bias,
                                Tensor& v, int64_t rows, int64_t C, Sums* sums) {
  const int64_t step = chunk_rows(rows, C);
  Tensor h = pooled({step, C}, v.scalar_type());
  const Tensor v_rows = as_matrix(v), transposed = torch::stable::transpose(weight, 0, 1);
  for (int64_t begin = 0; begin < rows; begin += step) {
    const int64_t count = std::min(step, rows - begin), offset = begin * C;
    Tensor h_rows = rows_of(h, 0, count), out = rows_of(v_rows, begin, count);
    apply_residual(residual.from(offset), mutable_data<T>(h), count, C);
    multiply(h_rows, transposed, out);
    add_bias<T, ACT>(mutable_data<T>(v) + offset, bias, count, C, sums);
  }
}

template <class T, int ACT>
void channel_backward_by_library(const Tensor& grad, const Tensor& v, const Coefficients& norm_v,
                                 const Residual<T, ACT>& residual, const Tensor& weight, Tensor& weight_grad,
                                 int64_t rows, int64_t C, Sums& sums, Sums& bias_sums) {
  const int64_t step = chunk_rows(rows, C);
  Tensor h = pooled({step, C}, v.scalar_type()), dv = pooled({step, C}, v.scalar_type());
  Tensor product = pooled({C, C}, v.scalar_type());
  const Tensor grad_rows = as_matrix(grad);
  for (int64_t begin = 0; begin < rows; begin += step) {
    const int64_t count = std::min(step, rows - begin), offset = begin * C;
    Tensor dv_rows = rows_of(dv, 0, count), h_rows = rows_of(h, 0, count), dh = rows_of(grad_rows, begin, count);
    apply_norm_backward<T, ACT>(data<T>(grad) + offset, data<T>(v) + offset, norm_v, mutable_data<T>(dv), count, C,
                                bias_sums);
    apply_residual(residual.from(offset), mutable_data<T>(h), count, C);
    multiply(torch::stable::transpose(dv_rows, 0, 1), h_rows, product);
    accumulate<T>(data<T>(product), weight_grad.mutable_data_ptr<float>(), C * C, begin == 0);
    multiply(dv_rows, weight, dh);
    gather_products<T, ACT>(data<T>(grad) + offset, residual.u + offset, count, C, sums);
  }
}

// ---- the pointwise half, whoever multiplies ----

std::tuple<Tensor, Tensor> channel_forward(const Tensor& u, const Tensor& norm, const Tensor& before,
                                           const Tensor& norm_before, const Tensor& weight, const Tensor& bias,
                                           int64_t act, bool statistics) {
  const Image s = image_of(u);
  const int64_t rows = s.N * s.pixels();
  check_pointwise(weight, u);
  Tensor v = like(u);
  const Coefficients norms(norm, s.C), norms_before(norm_before, s.C), biases(row_of(bias), s.C);
  Sums sums(SLOTS, 2, s.C);
  Sums* gathered = statistics ? &sums : nullptr;
  dispatch(u, act, [&](auto t, auto a) {
    using T = decltype(t);
    const Residual<T, decltype(a)::value> residual{data<T>(u), data<T>(before), norms, norms_before};
    if constexpr (LIBRARY_PRODUCTS<T>) {
      channel_forward_by_library(residual, weight, biases, v, rows, s.C, gathered);
    } else {
      Tensor panels = pooled({whole_panels(s.C), words_of<Operand<T>>(s.C)}, ScalarType::Float);
      pack_panels<Operand<T>>(data<T>(weight), s.C, s.C, 1, s.C, panels.mutable_data_ptr<float>());
      channel_forward_all(residual, panels.const_data_ptr<float>(), biases, mutable_data<T>(v), rows, s.C, gathered);
    }
  });
  return {v, sums.total()};
}

// `grad` comes in as the gradient of y and leaves as that of h. Gradients of the weights (C, C) and bias (1, C), and
// the sums for the first norm (2, C).
std::tuple<Tensor, Tensor, Tensor> channel_backward(const Tensor& grad, const Tensor& v, const Tensor& norm_v,
                                                    const Tensor& u, const Tensor& norm, const Tensor& before,
                                                    const Tensor& norm_before, const Tensor& weight, int64_t act) {
  const Image s = image_of(grad);
  const int64_t rows = s.N * s.pixels();
  check_pointwise(weight, u);
  Tensor weight_grad = pooled({s.C, s.C}, ScalarType::Float);
  const Coefficients norms_v(norm_v, s.C), norms(norm, s.C), norms_before(norm_before, s.C);
  Sums sums(SLOTS, 2, s.C), bias_sums(SLOTS, 1, s.C);
  dispatch(u, act, [&](auto t, auto a) {
    using T = decltype(t);
    const Residual<T, decltype(a)::value> residual{data<T>(u), data<T>(before), norms, norms_before};
    if constexpr (LIBRARY_PRODUCTS<T>) {
      channel_backward_by_library(grad, v, norms_v, residual, weight, weight_grad, rows, s.C, sums, bias_sums);
    } else {
      const int64_t groups = std::min<int64_t>(SLOTS, torch::stable::get_num_threads()), columns = whole_panels(s.C);
      Tensor panels = pooled({columns, words_of<Operand<T>>(s.C)}, ScalarType::Float);
      Tensor partial = pooled({groups, s.C, columns}, ScalarType::Float);
      pack_panels<Operand<T>>(data<T>(weight), s.C, s.C, s.C, 1, panels.mutable_data_ptr<float>());
      channel_backward_all(mutable_data<T>(grad), data<T>(v), norms_v, residual, panels.const_data_ptr<float>(),
                           partial.mutable_data_ptr<float>(), groups, rows, s.C, sums, bias_sums);
      add_weight_groups(partial.const_data_ptr<float>(), groups, s.C, columns,
                        weight_grad.mutable_data_ptr<float>());
    }
  });
  return {weight_grad, bias_sums.total(), sums.total()};
}

// ---- the ends: after the stem's convolution and after the last block ----

Tensor act_statistics(const Tensor& v, int64_t act) {
  const Image s = image_of(v);
  Sums sums(SLOTS, 2, s.C);
  dispatch(v, act, [&](auto t, auto a) {
    using T = decltype(t);
    gather_statistics<T, decltype(a)::value>(data<T>(v), s.N * s.pixels(), s.C, sums);
  });
  return sums.total();
}

Tensor act_products(const Tensor& grad, const Tensor& v, int64_t act) {
  const Image s = image_of(v);
  Sums sums(SLOTS, 2, s.C);
  dispatch(v, act, [&](auto t, auto a) {
    using T = decltype(t);
    gather_products<T, decltype(a)::value>(data<T>(grad), data<T>(v), s.N * s.pixels(), s.C, sums);
  });
  return sums.total();
}

Tensor act_norm(const Tensor& v, const Tensor& norm, int64_t act) {
  const Image s = image_of(v);
  Tensor y = like(v);
  const Coefficients norms(norm, s.C);
  dispatch(v, act, [&](auto t, auto a) {
    using T = decltype(t);
    apply_norm<T, decltype(a)::value>(data<T>(v), norms, mutable_data<T>(y), s.N * s.pixels(), s.C);
  });
  return y;
}

Tensor act_norm_pool(const Tensor& v, const Tensor& norm, int64_t act) {
  const Image s = image_of(v);
  Tensor y = pooled({s.N, s.C}, ScalarType::Float);
  const Coefficients norms(norm, s.C);
  dispatch(v, act, [&](auto t, auto a) {
    using T = decltype(t);
    pool_all<T, decltype(a)::value>(s, data<T>(v), norms, y.mutable_data_ptr<float>());
  });
  return y;
}

// From the gradient of the pooled features, (N, C) fp32: the gradient of every pixel, and the sums for the last norm.
std::tuple<Tensor, Tensor> act_norm_pool_backward(const Tensor& grad, const Tensor& v, int64_t act) {
  const Image s = image_of(v);
  Tensor dy = like(v);
  Sums sums(SLOTS, 2, s.C);
  const float* g = grad.const_data_ptr<float>();
  dispatch(v, act, [&](auto t, auto a) {
    using T = decltype(t);
    spread<T, decltype(a)::value>(s, g, data<T>(v), mutable_data<T>(dy), sums);
  });
  return {dy, sums.total()};
}

// `grad` comes in as the gradient after the norm and leaves as the one before the activation.
void act_norm_backward(const Tensor& grad, const Tensor& v, const Tensor& norm, int64_t act) {
  const Image s = image_of(v);
  const Coefficients norms(norm, s.C);
  Sums sums(SLOTS, 1, s.C);
  dispatch(v, act, [&](auto t, auto a) {
    using T = decltype(t);
    apply_norm_backward<T, decltype(a)::value>(data<T>(grad), data<T>(v), norms, mutable_data<T>(grad),
                                               s.N * s.pixels(), s.C, sums);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(convmixer, CPU, m) {
  m.impl("spatial_forward", TORCH_BOX(&spatial_forward));
  m.impl("spatial_backward", TORCH_BOX(&spatial_backward));
  m.impl("channel_forward", TORCH_BOX(&channel_forward));
  m.impl("channel_backward", TORCH_BOX(&channel_backward));
  m.impl("act_statistics", TORCH_BOX(&act_statistics));
  m.impl("act_products", TORCH_BOX(&act_products));
  m.impl("act_norm", TORCH_BOX(&act_norm));
  m.impl("act_norm_pool", TORCH_BOX(&act_norm_pool));
  m.impl("act_norm_pool_backward", TORCH_BOX(&act_norm_pool_backward));
  m.impl("act_norm_backward", TORCH_BOX(&act_norm_backward));
}
