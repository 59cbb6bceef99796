// The spatial half of a block: norm, depthwise convolution and statistics in one pass, forward and backward.
#include "channels.h"

namespace {

template <class T, int ACT>
void spatial_forward_all(const Image& s, int K, const T* before, const Coefficients& norm, const float* weights,
                         const Coefficients& bias, T* u, Sums* sums) {
  constexpr bool PAIRED = DEPTHWISE_PAIRS<T>;
  const Tile t{s.H, s.W, K, (K - 1) / 2, (K - 1) / 2};
  for_planes(s, t.floats(), [&](int64_t group, int64_t n, int64_t c, int lanes, float* tile) {
    const int64_t base = n * s.pixels() * s.C + c;
    const auto at = [&](int64_t row, int64_t column) { return base + (row * s.W + column) * s.C; };
    const auto x = norm_of<T, ACT>(norm, c);
    fill<PAIRED>(t, tile, [&](int64_t row, int64_t column, auto count) {
      return x(read<count.value>(before + at(row, column), s.C, lanes));
    });
    const vf b = bias.at(0, c);
    vf sum{}, squares{};
    const auto end_row = [&] {
      sums->add(group, 0, c, sum);
      sums->add(group, 1, c, squares);
      sum = squares = vf{};
    };
    convolve<PAIRED>(t, tile, weights + c * K * K, [&](int64_t row, int64_t column, auto, auto values) INLINED {
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
  constexpr bool PAIRED = DEPTHWISE_PAIRS<T>;
  const Tile of_x{s.H, s.W, K, (K - 1) / 2, (K - 1) / 2}, of_grad{s.H, s.W, K, K / 2, K / 2};
  for_planes(s, 2 * of_x.floats(), [&](int64_t group, int64_t n, int64_t c, int lanes, float* x_tile) {
    const int64_t base = n * s.pixels() * s.C + c;
    const auto at = [&](int64_t row, int64_t column) { return base + (row * s.W + column) * s.C; };
    float* grad_tile = x_tile + of_x.floats();
    const auto x = norm_of<T, ACT>(norm_before, c);
    fill<PAIRED>(of_x, x_tile, [&](int64_t row, int64_t column, auto count) {
      return x(read<count.value>(before + at(row, column), s.C, lanes));
    });
    const NormBackward<T, ACT, vf> back{norm.at(0, c), norm.at(1, c), norm.at(2, c)};
    vf bias_sum{};
    fill<PAIRED>(of_grad, grad_tile, [&](int64_t row, int64_t column, auto count) {
      constexpr int N = count.value;
      const int64_t i = at(row, column);
      const auto gradient = back(read<N>(grad + i, s.C, lanes), read<N>(u + i, s.C, lanes));
      bias_sum += total(gradient);
      return gradient;
    });
    bias_sums.add(group, 0, c, bias_sum);
    correlate<PAIRED>(of_x, x_tile, grad_tile + of_grad.top * of_grad.row_floats() + of_grad.left * L,
                        weight_sums + group * group_floats + c * K * K);
    vf sum{}, products{};
    const auto add_dx = [&](int64_t row, int64_t column, auto count, auto dx) INLINED {
      constexpr int N = count.value;
      const int64_t i = at(row, column);
      const auto gradient = write_rounded(grad + i, s.C, dx + read<N>(grad + i, s.C, lanes), lanes);
      sum += total(gradient);
      products += total(gradient * activate<T, ACT>(read<N>(before + i, s.C, lanes)));
    };
    convolve<PAIRED>(of_grad, grad_tile, flipped + c * K * K, add_dx);
    sums.add(group, 0, c, sum);
    sums.add(group, 1, c, products);
  });
}

void check_depthwise(const Tensor& weight, int64_t C) {
  check(weight.is_contiguous() && weight.scalar_type() == ScalarType::Float && weight.dim() == 4 &&
            weight.size(0) == C && weight.size(1) == 1 && weight.size(2) == weight.size(3),
        "depthwise weights must be contiguous fp32 (C, 1, k, k)");
}

std::tuple<Tensor, Tensor> spatial_forward(const Tensor& before, const Tensor& norm, const Tensor& weight,
                                           const Tensor& bias, int64_t act, bool statistics) {
  const Image s = image_of(before);
  const int K = weight.size(2);
  check_depthwise(weight, s.C);
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

// Overwrites `grad`, the gradient of h, with the gradient of x. Returns the gradients of the weights (C, 1, k, k) and
// of the bias (1, C), and the sums for the backward pass of the norm before the block (2, C).
std::tuple<Tensor, Tensor, Tensor> spatial_backward(const Tensor& grad, const Tensor& u, const Tensor& norm,
                                                    const Tensor& before, const Tensor& norm_before,
                                                    const Tensor& weight, int64_t act) {
  const Image s = image_of(grad);
  check_like(grad, u), check_like(grad, before);
  const int K = weight.size(2), taps = K * K;
  const int64_t groups = Split(s).groups, group_floats = whole_vectors(s.C) * taps;
  check_depthwise(weight, s.C);
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

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(convmixer, CPU, m) {
  m.impl("spatial_forward", TORCH_BOX(&spatial_forward));
  m.impl("spatial_backward", TORCH_BOX(&spatial_backward));
}
