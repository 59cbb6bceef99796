// Tensors whose memory is kept and used again: on a machine that reclaims memory, a fresh 30 MB buffer costs as much
// as the arithmetic on it.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

// An uninitialised contiguous tensor. Its memory comes from the pool and returns there when the last view dies.
torch::stable::Tensor pooled(const std::vector<int64_t>& sizes, torch::headeronly::ScalarType dtype);

// Scratch of one thread, at least `count` floats, aligned to a cache line; valid until this thread asks again.
float* scratch(size_t count);
