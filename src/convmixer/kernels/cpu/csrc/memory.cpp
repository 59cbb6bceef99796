#include "memory.h"

#include <torch/csrc/stable/ops.h>

#include <cstdlib>
#include <map>
#include <mutex>
#include <new>
#include <unordered_map>
#if defined(__linux__)
#include <sys/mman.h>
#endif

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

constexpr size_t HUGE_PAGE = size_t{2} << 20;
constexpr size_t SMALL = size_t{64} << 10;  // bytes; smaller blocks are not pooled: malloc keeps their pages anyway

// Allocates a block. If it has at least `huge` bytes, the system is asked to use huge pages for it, for fewer page
// faults and TLB misses; the system may ignore this.
void* allocate(size_t bytes, size_t huge) {
  const size_t alignment = bytes >= huge ? HUGE_PAGE : 64, whole = (bytes + alignment - 1) / alignment * alignment;
  void* block = std::aligned_alloc(alignment, whole);
  if (!block) throw std::bad_alloc();
#if defined(__linux__)
  if (bytes >= huge) madvise(block, whole, MADV_HUGEPAGE);
#endif
  return block;
}

// Keeps freed blocks by size, to use them again. Live blocks are those in use. Live and free blocks together never
// exceed the peak of the live ones.
class Pool {
 public:
  void* take(size_t bytes) {
    std::lock_guard<std::mutex> guard(mutex_);
    void* block = nullptr;
    auto found = free_.find(bytes);
    if (found != free_.end()) {
      block = found->second;
      free_.erase(found);
      free_bytes_ -= bytes;
    } else {
      trim(bytes);
      block = allocate(bytes, HUGE_PAGE);
    }
    live_[block] = bytes;
    live_bytes_ += bytes;
    peak_bytes_ = live_bytes_ > peak_bytes_ ? live_bytes_ : peak_bytes_;
    return block;
  }

  void give(void* block) {
    std::lock_guard<std::mutex> guard(mutex_);
    auto found = live_.find(block);
    const size_t bytes = found->second;
    live_.erase(found);
    live_bytes_ -= bytes;
    free_.emplace(bytes, block);
    free_bytes_ += bytes;
  }

 private:
  // Called before a block is allocated: frees kept blocks, so that memory does not grow as shapes change.
  void trim(size_t wanted) {
    while (!free_.empty() && live_bytes_ + free_bytes_ + wanted > peak_bytes_) release(free_.begin());
  }

  void release(std::multimap<size_t, void*>::iterator block) {
    free_bytes_ -= block->first;
    std::free(block->second);
    free_.erase(block);
  }

  std::mutex mutex_;
  std::multimap<size_t, void*> free_;
  std::unordered_map<void*, size_t> live_;
  size_t free_bytes_ = 0, live_bytes_ = 0, peak_bytes_ = 0;
};

Pool& pool() {
  static Pool* instance = new Pool;  // never destroyed: tensors may outlive static objects
  return *instance;
}

struct Scratch {
  float* data = nullptr;
  size_t count = 0;
  ~Scratch() { std::free(data); }
};

}  // namespace

Tensor pooled(const std::vector<int64_t>& sizes, ScalarType dtype) {
  size_t bytes = dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2;
  for (int64_t size : sizes) bytes *= size;
#if defined(TORCH_VERSION_2_11_0) && TORCH_FEATURE_VERSION >= TORCH_VERSION_2_11_0
  if (bytes >= SMALL) {
    std::vector<int64_t> strides(sizes.size(), 1);
    for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * sizes[i];
    const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
    return torch::stable::from_blob(
        pool().take(bytes), sizes, strides, cpu, dtype, [](void* block) { pool().give(block); });
  }
#endif
  return torch::stable::empty(sizes, dtype);
}

float* scratch(size_t count) {
  static thread_local Scratch mine;
  if (mine.count < count) {
    std::free(mine.data);
    mine = {};  // stay valid if the allocation below throws
    const size_t whole = (count + 15) / 16 * 16;
    // huge pages, because reads down columns touch many pages
    mine.data = static_cast<float*>(allocate(whole * sizeof(float), SMALL));
    mine.count = whole;
  }
  return mine.data;
}
