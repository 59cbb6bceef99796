// Tensors whose memory is kept and used again. If freed memory goes back to the system instead, a new 30 MB buffer
// costs as much time as the arithmetic on it.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

// Returns an uninitialised contiguous tensor. Its memory comes from a pool, and goes back when its last view is
// destroyed.
torch::stable::Tensor pooled(const std::vector<int64_t>& sizes, torch::headeronly::ScalarType dtype);

// Returns this thread's scratch memory: at least `count` floats, aligned to a cache line. It is valid until this
// thread calls `scratch` again.
float* scratch(size_t count);
