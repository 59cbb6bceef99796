// Depthwise convolution, the gradient of its input and the gradient of its weights, as three ops on (N, H, W, C).
#include "depthwise.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

struct Convolution {
  Image s;
  int K;
  bool flip;  // the input's gradient is the convolution with the flipped kernel and the opposite padding
  int64_t before() const { return flip ? K / 2 : (K - 1) / 2; }
};

template <class T>
void convolve_all(const Convolution& p, const T* x, const float* weights, const float* bias, T* y) {
  const Tile t{p.s.H, p.s.W, p.K, p.before(), p.before()};
  for_planes(p.s, t.floats(), [&](int64_t, int64_t n, int64_t c, int lanes, float* tile) {
    const int64_t C = p.s.C, base = n * p.s.pixels() * C + c;
    const auto at = [&](int64_t row, int64_t column) { return base + (row * p.s.W + column) * C; };
    fill<PAIRS<T>>(t, tile, [&](int64_t row, int64_t column, auto count) {
      return read<count.value>(x + at(row, column), C, lanes);
    });
    const vf b = bias ? read<1>(bias + c, L, lanes).v[0] : vf{};
    convolve<PAIRS<T>>(t, tile, weights + c * p.K * p.K, [&](int64_t row, int64_t column, auto, auto sums) {
      write(y + at(row, column), C, sums + b, lanes);
    });
  });
}

// out: [groups][C rounded up to L][K * K], in vectors of L channels.
template <class T>
void correlate_all(const Image& s, int K, const T* x, const T* grad, float* out, int64_t group_floats) {
  const Tile t{s.H, s.W, K, (K - 1) / 2, (K - 1) / 2};
  for_planes(s, 2 * t.floats(), [&](int64_t group, int64_t n, int64_t c, int lanes, float* tile) {
    const int64_t base = n * s.pixels() * s.C + c;
    const auto reader = [&](const T* from) {
      return [=, &s](int64_t row, int64_t column, auto count) {
        return read<count.value>(from + base + (row * s.W + column) * s.C, s.C, lanes);
      };
    };
    float* grad_tile = tile + t.floats();
    fill<PAIRS<T>>(t, tile, reader(x));
    fill<PAIRS<T>>(t, grad_tile, reader(grad));
    correlate<PAIRS<T>>(t, tile, grad_tile + t.top * t.row_floats() + t.left * L,
                        out + group * group_floats + c * K * K);
  });
}

Image image_of(const Tensor& x) { return {x.size(0), x.size(1), x.size(2), x.size(3)}; }

void check(bool ok, const char* what) { STD_TORCH_CHECK(ok, "convmixer: ", what); }

void check_image(const Tensor& x) {
  check(x.dim() == 4 && x.is_contiguous(), "activations must be contiguous (N, H, W, C)");
  check(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::BFloat16, "fp32 or bf16 is needed");
}

void check_weight(const Tensor& weight, int64_t C) {
  check(weight.dim() == 4 && weight.is_contiguous() && weight.scalar_type() == ScalarType::Float,
        "weights must be contiguous fp32 (C, 1, k, k)");
  check(weight.size(0) == C && weight.size(1) == 1 && weight.size(2) == weight.size(3), "weights are not (C, 1, k, k)");
}

int64_t whole_vectors(int64_t C) { return (C + L - 1) / L * L; }

Tensor convolution(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, bool flip) {
  check_image(x);
  check_weight(weight, x.size(3));
  const Convolution p{image_of(x), (int)weight.size(2), flip};
  Tensor y = pooled({p.s.N, p.s.H, p.s.W, p.s.C}, x.scalar_type());
  Tensor packed = pooled({whole_vectors(p.s.C) * p.K * p.K}, ScalarType::Float);
  float* weights = packed.mutable_data_ptr<float>();
  const float* w = weight.const_data_ptr<float>();
  const float* b = bias ? bias->const_data_ptr<float>() : nullptr;
  if (x.scalar_type() == ScalarType::Float) {
    pack_weights<float>(w, p.s.C, p.K, flip, weights);
    convolve_all(p, (const float*)x.const_data_ptr(), weights, b, (float*)y.mutable_data_ptr());
  } else {
    pack_weights<bf16>(w, p.s.C, p.K, flip, weights);
    convolve_all(p, (const bf16*)x.const_data_ptr(), weights, b, (bf16*)y.mutable_data_ptr());
  }
  return y;
}

Tensor depthwise(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  return convolution(x, weight, bias, false);
}

Tensor depthwise_input_grad(const Tensor& grad, const Tensor& weight) {
  return convolution(grad, weight, std::nullopt, true);
}

Tensor depthwise_weight_grad(const Tensor& x, const Tensor& grad, int64_t K) {
  check_image(x);
  check_image(grad);
  check(x.scalar_type() == grad.scalar_type() && x.numel() == grad.numel(), "input and gradient differ");
  const Image s = image_of(x);
  const int64_t taps = K * K, group_floats = whole_vectors(s.C) * taps, groups = Split(s).groups;
  Tensor sums = pooled({groups, group_floats}, ScalarType::Float);
  float* partial = sums.mutable_data_ptr<float>();
  std::memset(partial, 0, groups * group_floats * sizeof(float));
  if (x.scalar_type() == ScalarType::Float)
    correlate_all(s, K, (const float*)x.const_data_ptr(), (const float*)grad.const_data_ptr(), partial, group_floats);
  else
    correlate_all(s, K, (const bf16*)x.const_data_ptr(), (const bf16*)grad.const_data_ptr(), partial, group_floats);
  Tensor out = pooled({s.C, 1, K, K}, ScalarType::Float);
  add_groups(partial, groups, group_floats, s.C, taps, out.mutable_data_ptr<float>());
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(convmixer, CPU, m) {
  m.impl("depthwise", TORCH_BOX(&depthwise));
  m.impl("depthwise_input_grad", TORCH_BOX(&depthwise_input_grad));
  m.impl("depthwise_weight_grad", TORCH_BOX(&depthwise_weight_grad));
}
