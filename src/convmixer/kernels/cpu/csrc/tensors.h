// What the ops on activations share: checks of tensors, dispatch on their type, and memory for new ones.
#pragma once
#include <tuple>

#include "activation.h"
#include "depthwise.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Internal linkage, so that GCC inlines functions that a file calls only once.
namespace {

void check(bool ok, const char* what) { STD_TORCH_CHECK(ok, "convmixer: ", what); }

int64_t whole_vectors(int64_t C) { return (C + L - 1) / L * L; }

Image image_of(const Tensor& x) {
  check(x.dim() == 4 && x.is_contiguous(), "activations must be contiguous (N, H, W, C)");
  return {x.size(0), x.size(1), x.size(2), x.size(3)};
}

// Checks that `other` has the shape and type of x. A kernel asks only x for its shape and type, and reads the other
// activation tensors as if they had the same.
void check_like(const Tensor& x, const Tensor& other) {
  bool same = other.dim() == 4 && other.is_contiguous() && other.scalar_type() == x.scalar_type();
  for (int64_t i = 0; same && i < 4; i++) same = other.size(i) == x.size(i);
  check(same, "activations must be contiguous, of one shape and one type");
}

// Calls f with the storage type and the activation as types: f(T{}, std::integral_constant<int, ACT>{}).
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

Tensor row_of(const Tensor& vector) {  // (C) -> (1, C)
  return torch::stable::unsqueeze(vector, 0);
}

}  // namespace
