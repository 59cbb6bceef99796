// Activation, norm and pool at the two ends of the network: after the stem's convolution, and after the last block.
#include "channels.h"

namespace {

// Returns the sum of value(pixel) over an image. Each row of pixels is summed by itself first: a single fp32 sum over
// a thousand pixels would lose three digits.
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

// Gives each pixel its share g of the gradient of the image's mean, `grad`; gathers the sums of g and of g * act(v).
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
  check_like(v, grad);
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

// Takes the gradient of the pooled features, (N, C) fp32. Returns the gradient of every pixel, and the sums for the
// backward pass of the last norm.
std::tuple<Tensor, Tensor> act_norm_pool_backward(const Tensor& grad, const Tensor& v, int64_t act) {
  const Image s = image_of(v);
  check(grad.dim() == 2 && grad.is_contiguous() && grad.scalar_type() == ScalarType::Float && grad.size(0) == s.N &&
            grad.size(1) == s.C,
        "the pooled gradient must be contiguous fp32 (N, C)");
  Tensor dy = like(v);
  Sums sums(SLOTS, 2, s.C);
  const float* g = grad.const_data_ptr<float>();
  dispatch(v, act, [&](auto t, auto a) {
    using T = decltype(t);
    spread<T, decltype(a)::value>(s, g, data<T>(v), mutable_data<T>(dy), sums);
  });
  return {dy, sums.total()};
}

// Overwrites `grad`, the gradient of norm(act(v)), with the gradient of v.
void act_norm_backward(const Tensor& grad, const Tensor& v, const Tensor& norm, int64_t act) {
  const Image s = image_of(v);
  check_like(v, grad);
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
  m.impl("act_statistics", TORCH_BOX(&act_statistics));
  m.impl("act_products", TORCH_BOX(&act_products));
  m.impl("act_norm", TORCH_BOX(&act_norm));
  m.impl("act_norm_pool", TORCH_BOX(&act_norm_pool));
  m.impl("act_norm_pool_backward", TORCH_BOX(&act_norm_pool_backward));
  m.impl("act_norm_backward", TORCH_BOX(&act_norm_backward));
}
