// Notices changes in Python objects without running Python, see kernels/cpu/changes.py. Does not need Python's
// headers. The caller holds the GIL. A word is 8 bytes in memory that change with an object.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace {

constexpr int64_t SIZES = 5;  // dimensions whose size and stride are compared

struct Facts {
  int32_t dtype, device, index, layout;
  int64_t dim, sizes[SIZES], strides[SIZES];
};

// `place` is the address of the at::Tensor in a tensor's Python object. If a fact cannot be read, all are -1 or 0.
Facts facts_of(void* place) {
  const AtenTensorHandle tensor = static_cast<AtenTensorHandle>(place);
  Facts facts{};
  int64_t *sizes = nullptr, *strides = nullptr;
  if (aoti_torch_get_dtype(tensor, &facts.dtype) || aoti_torch_get_device_type(tensor, &facts.device) ||
      aoti_torch_get_device_index(tensor, &facts.index) || aoti_torch_get_layout(tensor, &facts.layout) ||
      aoti_torch_get_dim(tensor, &facts.dim) || aoti_torch_get_sizes(tensor, &sizes) ||
      aoti_torch_get_strides(tensor, &strides))
    return {-1, -1, -1, -1, -1, {}, {}};
  const std::size_t bytes = sizeof(int64_t) * (facts.dim < SIZES ? facts.dim : SIZES);
  std::memcpy(facts.sizes, sizes, bytes);
  std::memcpy(facts.strides, strides, bytes);
  return facts;
}

}  // namespace

extern "C" {

uint64_t convmixer_changes = 0;  // number of changes of all watched dicts

// Python calls this at each change of a watched dict (`PyDict_AddWatcher`), maybe while it raises an exception.
int convmixer_changed(int, void*, void*, void*) {
  ++convmixer_changes;
  return 0;
}

int64_t convmixer_facts_bytes() { return sizeof(Facts); }

// Stores the present value of each word, and the facts of each tensor.
void convmixer_remember(
    const uint64_t* const* words, uint64_t* values, int64_t count, void* const* tensors, void* facts, int64_t tensor_count) {
  for (int64_t i = 0; i < count; i++) values[i] = *words[i];
  for (int64_t i = 0; i < tensor_count; i++) static_cast<Facts*>(facts)[i] = facts_of(tensors[i]);
}

// Returns 1 if all words and tensors are as `convmixer_remember` stored them, else 0.
int convmixer_same(
    const uint64_t* const* words, const uint64_t* values, int64_t count, void* const* tensors, const void* facts,
    int64_t tensor_count) {
  for (int64_t i = 0; i < count; i++)
    if (*words[i] != values[i]) return 0;
  for (int64_t i = 0; i < tensor_count; i++) {
    const Facts now = facts_of(tensors[i]);
    if (std::memcmp(&now, static_cast<const Facts*>(facts) + i, sizeof(Facts))) return 0;
  }
  return 1;
}
}
