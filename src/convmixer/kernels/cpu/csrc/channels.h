// What both halves of a ConvMixer block share: coefficients and sums for each channel, norms, passes over rows. A row
// is the C channels of one pixel.
//
// A block is  u = depthwise(x) + b,  h = norm(act(u)) + x,  v = pointwise(h) + b,  y = norm(act(v)),  and y is the x
// of the next block. Activations are (N, H, W, C). Only u and v are stored. x, h and all normalised values are
// computed again each time they are read: once the statistics are known, norm(act(v)) is act(v) * scale + shift,
// which costs less than reading it from memory. So x is computed from `before`, the v of the previous block (for the
// first block, the output of the stem's convolution), with its scale and shift, `norm_before`.
//
// Statistics are gathered as the sums of act(v) and of its square. The backward pass of a norm needs two other sums:
// of g, the gradient of its output, and of g * act(v). Such sums are known only after all of the tensor has been
// computed. Within this limit a training step reads and writes each tensor as few times as possible:
// spatial_forward    reads `before`, writes u, gathers the statistics of act(u)                     spatial.cpp
// channel_forward    reads u and `before`, writes v, gathers the statistics of act(v)               channel.cpp
// channel_backward   turns the gradient of y into that of h, gathers the sums for the norm of u     channel.cpp
// spatial_backward   turns the gradient of h into that of x, gathers the sums for the norm before   spatial.cpp
// act_...            the passes after the stem's convolution and after the last block               ends.cpp
#pragma once
#include "activation.h"
#include "depthwise.h"
#include "tensors.h"

// Internal linkage, so that GCC inlines functions that a file calls only once.
namespace {

// Coefficients for each channel, fp32 (count, C), with each line of C padded to whole vectors.
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

// `count` sums for each channel, in double. The rows are divided into parts, and each part has a slot for its sums,
// which one thread at a time writes. `total` adds the slots in order, so it does not depend on the number of threads.
class Sums {
 public:
  Sums(int slots, int count, int64_t C) : slots_(slots), count_(count), C_(C), padded_(whole_vectors(C)) {
    values_.assign(slots * count * padded_, 0.0);
  }
  void add(int64_t slot, int which, int64_t c, vf sum) {
    double* to = &values_[(slot * count_ + which) * padded_ + c];
    store_vector(to, load_vector<vd>(to) + __builtin_convertvector(sum, vd));
  }
  // Returns float64 (count, C).
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

// act(v) * scale + shift for N vectors. V is vf if all of them hold the same channels, of different pixels; it is
// vg<N> if they hold neighbouring channels.
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

// The gradient of v, from the gradient g of norm(act(v)): (a * g + b * act(v) + c) * act'(v). The coefficients a, b
// and c contain the batch's sums. V is as in `Norm`. Source: arXiv 1502.03167, Sec. 3.
template <class T, int ACT, class V> struct NormBackward {
  V a, b, c;
  template <int N> INLINE vg<N> operator()(vg<N> g, vg<N> v) const {
    return (g * a + (activate<T, ACT>(v) * b + c)) * slope<T, ACT>(v);
  }
};

constexpr int SLOTS = 32;     // parts of the rows, fixed so that sums do not depend on the number of threads
constexpr int64_t ROWS = 32;  // rows that are summed in float before the sum is added in double

// Goes along a row of C channels: calls element(count, c, lanes) for each group of `count` neighbouring vectors, the
// first of which begins at channel c. They have `lanes` channels each: L, or fewer in the last vector of the row.
template <class Element> INLINE void along(int64_t C, const Element& element) {
  int64_t c = 0;
  for (; c + MANY * L <= C; c += MANY * L) element(many, c, L);
  for (; c + L <= C; c += L) element(one, c, L);
  if (c < C) element(one, c, (int)(C - c));
}

// Calls element(count, i, c, lanes, sums) along all rows (see `along`; i is the offset in the tensor of this row's
// channel c). Slots run in parallel, the rows of a slot in order. Each channel has KINDS running sums, such as those
// of the values and of the squares; `sums` points at those of the vectors at hand, laid out [vector][KINDS][L]. After
// every ROWS rows they are added to `gathered`, if given, and begin again at 0.
template <int KINDS, class Element>
void over_rows(int64_t rows, int64_t C, Sums* gathered, const Element& element) {
  const int64_t padded = whole_vectors(C);
  torch::stable::parallel_for(0, SLOTS, 1, [&](int64_t begin, int64_t end) {
    float* sums = scratch(KINDS * padded);
    for (int64_t slot = begin; slot < end; slot++) {
      const int64_t last = (slot + 1) * rows / SLOTS;
      for (int64_t first = slot * rows / SLOTS; first < last; first += ROWS) {
        std::memset(sums, 0, KINDS * padded * sizeof(float));
        for (int64_t r = first; r < std::min(first + ROWS, last); r++)
          along(C, [&](auto count, int64_t c, int lanes) INLINED {
            element(count, r * C + c, c, lanes, sums + KINDS * c);
          });
        for (int64_t c = 0; c < C && gathered; c += L)
          for (int which = 0; which < KINDS; which++)
            gathered->add(slot, which, c, aligned(sums + KINDS * c + which * L));
      }
    }
  });
}

// Adds x to sum number `which` of the KINDS sums of each vector, see `over_rows`.
template <int KINDS, int N> INLINE void add_to(float* sums, int which, vg<N> x) {
#pragma GCC unroll 8
  for (int j = 0; j < N; j++) put(sums + (j * KINDS + which) * L, aligned(sums + (j * KINDS + which) * L) + x.v[j]);
}

template <class T, int ACT> void gather_statistics(const T* v, int64_t rows, int64_t C, Sums& sums) {
  over_rows<2>(rows, C, &sums, [=](auto count, int64_t i, int64_t, int lanes, float* sum) INLINED {
    const auto a = activate<T, ACT>(read<count.value>(v + i, L, lanes));
    add_to<2>(sum, 0, a);
    add_to<2>(sum, 1, a * a);
  });
}

// Gathers the sums of g and of g * act(v).
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

// h = norm(act(u)) + norm(act(before)), for `count` vectors that begin at offset i in the tensor, at channel c.
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

// Computes `out`, the gradient of v, from `g`, the gradient of norm(act(v)), and the sum of `out`. `out` may be `g`.
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

}  // namespace
