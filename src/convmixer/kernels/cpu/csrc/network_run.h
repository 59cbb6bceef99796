// What both forms of inference, network_vectors.cpp and network_tiles.cpp, share: the network's sizes and weights,
// memory that is kept between calls, and the division of images among threads.
#pragma once
#include "network.h"

#include <torch/csrc/stable/ops.h>

#include <unistd.h>

#include <cstdlib>
#include <new>

namespace network {

enum Precision { FP32, BF16, INT8 };

struct Net {
  int64_t dim, depth, k, patch, in_chans;
  int act;
  int64_t blocks() const { return (dim + CB - 1) / CB; }
  int64_t padded() const { return blocks() * CB; }
  int64_t taps() const { return in_chans * patch * patch; }
};

// The weights to pack, plain (dim, ...) floats. Packing adds channels to fill the last block; their weights are zero,
// so they stay zero.
struct Plain {
  const float *stem, *stem_vectors, *depthwise, *depthwise_vectors, *point, *point_vectors;
};

inline bf16 to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return bits >> 16 | 0x40;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// Place t of each block of channels gets channel order(t) of the block.
template <class Order>
void pack_vectors(const float* vectors, int64_t dim, int64_t padded, const Order& order, float* out) {
  for (int row = 0; row < Vectors::COUNT; row++)
    for (int64_t c = 0; c < padded; c++) {
      const int64_t from = c / CB * CB + order(c % CB);
      if (from < dim) out[row * padded + c] = vectors[row * dim + from];
    }
}

// Memory that a thread keeps between calls: fresh pages would cost as much time as a small network.
class Arena {
 public:
  ~Arena() { std::free(data_); }
  // Returns `bytes` of memory. It is set to zero if it is new or if `key` differs from the last call's; otherwise it
  // holds what the last user left, so borders stay zero.
  char* take(size_t bytes, uint64_t key) {
    bytes = round_up(bytes, 64);
    if (bytes > size_) {
      std::free(data_);
      data_ = (char*)std::aligned_alloc(64, bytes);
      size_ = data_ ? bytes : 0;
      if (!data_) throw std::bad_alloc();
      key_ = ~key;
    }
    if (key != key_) std::memset(data_, 0, bytes);
    key_ = key;
    return data_;
  }

 private:
  char* data_ = nullptr;
  size_t size_ = 0;
  uint64_t key_ = 0;
};

inline char* activations(size_t bytes, uint64_t key) {
  static thread_local Arena arena;
  return arena.take(bytes, key);
}
inline char* scratch(size_t bytes) {
  static thread_local Arena arena;
  return arena.take(bytes, 0);
}

inline uint64_t key_of(std::initializer_list<int64_t> sizes) {
  uint64_t key = 0;
  for (int64_t n : sizes) key = key * 1000003 + n;
  return key;
}

// Returns the bytes of a core's second-level cache, or a common size if the system does not report it.
inline int64_t second_level_cache() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  static const int64_t bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (bytes > 0) return bytes;
#endif
  return 512 << 10;
}

// Computes one image in parts of `rows` rows. `each(n, f)` calls f(i, scratch) for parts i = 0 .. n - 1 in any order.
template <class Run, class Each>
void run_image(const Run& run, const float* pixels, int64_t rows, char* memory, float* out, const Each& each) {
  using X = typename Run::X;
  X *x = (X*)memory, *y = (X*)(memory + run.image_bytes());
  const int64_t H = run.grid.H, parts = (H + rows - 1) / rows;
  const auto end = [&](int64_t i) { return std::min(H, (i + 1) * rows); };
  each(parts, [&](int64_t i, char* own) { run.stem(pixels, i * rows, end(i), x, own); });
  for (int64_t layer = 0; layer < run.packed.net.depth; layer++, std::swap(x, y))
    each(parts, [&](int64_t i, char* own) { run.block(layer, x, i * rows, end(i), y, own); });
  run.pool(x, out);
}

// Computes as many images at once as there are threads, each image on one thread. For each image left over, the
// threads share its rows.
template <class Run> void run_batch(const Run& run, const float* images, int64_t N, float* out) {
  const Net& net = run.packed.net;
  const int64_t threads = torch::stable::get_num_threads(), image_size = net.in_chans * run.H * run.W;
  const int64_t whole = threads > 1 ? N / threads * threads : N, rows = run.rows_at_once(1);
  torch::stable::parallel_for(0, whole, 1, [&](int64_t from, int64_t to) {
    char* memory = activations(2 * run.image_bytes(), run.key());
    char* own = scratch(run.scratch_bytes(rows));
    const auto in_turn = [&](int64_t n, const auto& f) {
      for (int64_t i = 0; i < n; i++) f(i, own);
    };
    for (int64_t i = from; i < to; i++)
      run_image(run, images + i * image_size, rows, memory, out + i * net.dim, in_turn);
  });
  const int64_t fewer = run.rows_at_once(threads);
  const auto shared = [&](int64_t n, const auto& f) {
    torch::stable::parallel_for(0, n, 1, [&](int64_t from, int64_t to) {
      char* own = scratch(run.scratch_bytes(fewer));
      for (int64_t i = from; i < to; i++) f(i, own);
    });
  };
  for (int64_t i = whole; i < N; i++) {
    char* memory = activations(2 * run.image_bytes(), run.key());
    run_image(run, images + i * image_size, fewer, memory, out + i * net.dim, shared);
  }
}

}  // namespace network
