// The pointwise half of a block: the norms and the residual sum that give h, the matrix product, the statistics.
#include "channel_library.h"
#include "channel_own.h"

namespace {

// Whether torch's library multiplies: if `LIBRARY_PRODUCTS` (pointwise.h), or for wide layers on the matrix unit. A
// panel of a wide layer's weights does not fit into the first-level cache beside the rows, so that our own products
// were slower in most measurements (768 channels, docs/log.md).
template <class T> bool by_library(int64_t C) {
  constexpr int64_t WIDE = 512;
  return LIBRARY_PRODUCTS<T> || (CONVMIXER_AMX && std::is_same_v<T, bf16> && C > WIDE);
}

// Calls f(K{}) with the kind of operand that a product of T reads: TilePairs, Pairs or Floats (pointwise.h).
template <class T, class F> void with_operand(const F& f) {
#if CONVMIXER_TILES && CONVMIXER_PAIRS
  if constexpr (PAIRS<T>)
    if (tiles::usable()) return f(TilePairs{});
#endif
  f(Operand<T>{});
}

void check_pointwise(const Tensor& weight, const Tensor& x) {
  check(weight.is_contiguous() && weight.scalar_type() == x.scalar_type() && weight.dim() == 2 &&
            weight.size(0) == x.size(3) && weight.size(1) == x.size(3),
        "pointwise weights must be contiguous (C, C), of the activations' type");
}

std::tuple<Tensor, Tensor> channel_forward(const Tensor& u, const Tensor& norm, const Tensor& before,
                                           const Tensor& norm_before, const Tensor& weight, const Tensor& bias,
                                           int64_t act, bool statistics) {
  const Image s = image_of(u);
  const int64_t rows = s.N * s.pixels();
  check_pointwise(weight, u), check_like(u, before);
  Tensor v = like(u);
  const Coefficients norms(norm, s.C), norms_before(norm_before, s.C), biases(row_of(bias), s.C);
  Sums sums(SLOTS, 2, s.C);
  Sums* gathered = statistics ? &sums : nullptr;
  dispatch(u, act, [&](auto t, auto a) {
    using T = decltype(t);
    const Residual<T, decltype(a)::value> residual{data<T>(u), data<T>(before), norms, norms_before};
    if (by_library<T>(s.C)) {
      channel_forward_by_library(residual, weight, biases, v, rows, s.C, gathered);
    } else {
      with_operand<T>([&](auto k) {
        using K = decltype(k);
        Tensor panels = pooled({whole_panels(s.C), depth_of<K>(s.C)}, ScalarType::Float);
        pack_panels<K>(data<T>(weight), s.C, s.C, 1, s.C, panels.mutable_data_ptr<float>());
        channel_forward_all<K>(residual, panels.const_data_ptr<float>(), biases, mutable_data<T>(v), rows, s.C,
                               gathered);
      });
    }
  });
  return {v, sums.total()};
}

// Overwrites `grad`, the gradient of y, with the gradient of h. Returns the gradients of the weights (C, C) and of
// the bias (1, C), and the sums for the backward pass of the norm of u (2, C).
std::tuple<Tensor, Tensor, Tensor> channel_backward(const Tensor& grad, const Tensor& v, const Tensor& norm_v,
                                                    const Tensor& u, const Tensor& norm, const Tensor& before,
                                                    const Tensor& norm_before, const Tensor& weight, int64_t act) {
  const Image s = image_of(grad);
  const int64_t rows = s.N * s.pixels();
  check_pointwise(weight, u), check_like(grad, v), check_like(grad, u), check_like(grad, before);
  Tensor weight_grad = pooled({s.C, s.C}, ScalarType::Float);
  const Coefficients norms_v(norm_v, s.C), norms(norm, s.C), norms_before(norm_before, s.C);
  Sums sums(SLOTS, 2, s.C), bias_sums(SLOTS, 1, s.C);
  dispatch(u, act, [&](auto t, auto a) {
    using T = decltype(t);
    const Residual<T, decltype(a)::value> residual{data<T>(u), data<T>(before), norms, norms_before};
    if (by_library<T>(s.C)) {
      channel_backward_by_library(grad, v, norms_v, residual, weight, weight_grad, rows, s.C, sums, bias_sums);
    } else {
      const int64_t groups = std::min<int64_t>(SLOTS, torch::stable::get_num_threads()), columns = whole_panels(s.C);
      Tensor partial = pooled({groups, columns, columns}, ScalarType::Float);
      with_operand<T>([&](auto k) {
        using K = decltype(k);
        Tensor panels = pooled({columns, depth_of<K>(s.C)}, ScalarType::Float);
        pack_panels<K>(data<T>(weight), s.C, s.C, s.C, 1, panels.mutable_data_ptr<float>());
        channel_backward_all<K>(mutable_data<T>(grad), data<T>(v), norms_v, residual, panels.const_data_ptr<float>(),
                                partial.mutable_data_ptr<float>(), groups, rows, s.C, sums, bias_sums);
      });
      add_weight_groups(partial.const_data_ptr<float>(), groups, s.C, columns,
                        weight_grad.mutable_data_ptr<float>());
    }
  });
  return {weight_grad, bias_sums.total(), sums.total()};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(convmixer, CPU, m) {
  m.impl("channel_forward", TORCH_BOX(&channel_forward));
  m.impl("channel_backward", TORCH_BOX(&channel_backward));
}
