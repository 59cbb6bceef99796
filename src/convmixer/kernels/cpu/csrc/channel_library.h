// The pointwise half with torch's own matrix product (aten::mm), in chunks of rows that fit into the shared cache.
#pragma once
#include <array>

#include "channels.h"

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // before torch 2.12
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

namespace {

// v += bias, then the statistics of act(v). Adding the bias here is cheaper than in the library's product.
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

// out = x if `first`, else out += x
template <class T> void accumulate(const T* x, float* out, int64_t count, bool first) {
  torch::stable::parallel_for(0, count, 1 << 15, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += L) {
      const int lanes = std::min<int64_t>(L, end - i);
      const auto value = read<1>(x + i, L, lanes);
      write(out + i, L, first ? value : read<1>(out + i, L, lanes) + value, lanes);
    }
  });
}

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

}  // namespace
