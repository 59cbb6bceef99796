// Inference of a whole ConvMixer as one op: images in, pooled features out. The weights are packed once beforehand.
#include "network.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <unistd.h>

#include <cstdlib>
#include <new>

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace network {
namespace {

enum Precision { FP32, BF16, INT8 };

struct Net {
  int64_t dim, depth, k, patch, in_chans;
  int act;
  int64_t blocks() const { return (dim + CB - 1) / CB; }
  int64_t padded() const { return blocks() * CB; }
  int64_t taps() const { return in_chans * patch * patch; }
};

// Where each part begins in the packed weights, in words of 4 bytes. Each part fills whole cache lines.
template <class Stem, class K> struct Packed {
  Net net;
  int64_t stem_depth() const { return (net.taps() + Stem::GROUP - 1) / Stem::GROUP; }
  int64_t depth() const { return net.padded() / K::GROUP; }
  int64_t vectors() const { return Vectors::COUNT * net.padded(); }
  int64_t depthwise() const { return depthwise_words<typename K::X>(net.k) * net.blocks(); }
  int64_t layer_size() const { return depthwise() + depth() * net.padded() + 2 * vectors(); }
  int64_t stem_size() const { return stem_depth() * net.padded() + vectors(); }
  int64_t size() const { return stem_size() + net.depth * layer_size(); }
  int64_t layer(int64_t i) const { return stem_size() + i * layer_size(); }
};

// --- Packing: plain (dim, ...) floats in, `Packed` out. Channels beyond dim get zero weights, so they stay zero.

bf16 to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return bits >> 16 | 0x40;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

template <class K> void put_weight(int32_t* word, int64_t i, float value) {
  if constexpr (K::INTEGER) ((int8_t*)word)[i] = (int8_t)value;
  else if constexpr (K::GROUP == 2) ((bf16*)word)[i] = to_bf16(value);
  else ((float*)word)[i] = value;
}

// weight: (dim, inputs). Input t of the packed product is input `channel(t)` of the weight.
template <class K, class Channel>
void pack_product(const float* weight, int64_t dim, int64_t inputs, int64_t depth, const Channel& channel, int32_t* out) {
  for (int64_t n = 0; n < dim; n++)
    for (int64_t i = 0; i < depth * K::GROUP; i++) {
      const int64_t from = channel(i);
      if (from < inputs)
        put_weight<K>(out + (n / CB * depth + i / K::GROUP) * CB + n % CB, i % K::GROUP, weight[n * inputs + from]);
    }
}

template <class Order>
void pack_vectors(const float* vectors, int64_t dim, int64_t padded, const Order& order, float* out) {
  for (int row = 0; row < Vectors::COUNT; row++)
    for (int64_t c = 0; c < padded; c++) {
      const int64_t from = c / CB * CB + order(c % CB);
      if (from < dim) out[row * padded + c] = vectors[row * dim + from];
    }
}

template <class X> void pack_depthwise(const float* weight, const Net& net, int32_t* out) {
  const int k = net.k, pairs = (k + 1) / 2;
  for (int64_t c = 0; c < net.padded(); c++) {
    const int64_t from = c / CB * CB + channel_at<X>(c % CB);
    int32_t* block = out + c / CB * depthwise_words<X>(k);
    for (int tap = 0; from < net.dim && tap < k * k; tap++) {
      const float value = weight[from * k * k + tap];
      if (sizeof(X) == 4) ((float*)block)[tap * CB + c % CB] = value;
      else ((bf16*)(block + (tap / k * pairs + tap % k / 2) * CB + c % CB))[tap % k % 2] = to_bf16(value);
    }
  }
}

struct Plain {
  const float *stem, *stem_vectors, *depthwise, *depthwise_vectors, *point, *point_vectors;
};

template <class Stem, class K> void pack_all(const Packed<Stem, K>& p, const Plain& plain, int32_t* out) {
  using X = typename K::X;
  const Net& net = p.net;
  const auto same = [](int64_t t) { return t; };
  const auto swapped = [](int64_t t) -> int64_t { return t / CB * CB + channel_at<X>(t % CB); };
  pack_product<Stem>(plain.stem, net.dim, net.taps(), p.stem_depth(), same, out);
  pack_vectors(plain.stem_vectors, net.dim, net.padded(), same, (float*)out + p.stem_depth() * net.padded());
  for (int64_t i = 0; i < net.depth; i++) {
    int32_t* layer = out + p.layer(i);
    const int64_t row = Vectors::COUNT * net.dim;
    pack_depthwise<X>(plain.depthwise + i * net.dim * net.k * net.k, net, layer);
    layer += p.depthwise();
    pack_vectors(plain.depthwise_vectors + i * row, net.dim, net.padded(), swapped, (float*)layer);
    layer += p.vectors();
    pack_product<K>(plain.point + i * net.dim * net.dim, net.dim, net.dim, p.depth(), swapped, layer);
    pack_vectors(plain.point_vectors + i * row, net.dim, net.padded(), same, (float*)layer + p.depth() * net.padded());
  }
}

// --- Memory that a thread keeps between calls: fresh pages would cost as much time as a small network.

class Arena {
 public:
  ~Arena() { std::free(data_); }
  // Returns `bytes` of memory. It is all zero if it is new or `key` differs from the last call's.
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

// Returns the bytes of a core's second-level cache, or a common size if the system does not report it.
int64_t second_level_cache() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  static const int64_t bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (bytes > 0) return bytes;
#endif
  return 512 << 10;
}

// --- Running.

template <class Stem, class K> struct Run {
  using X = typename K::X;
  Packed<Stem, K> packed;
  const int32_t* weights;
  Grid grid;
  int64_t H, W;  // of the image

  int64_t words() const { return std::max(packed.depth(), packed.stem_depth()) + 16; }  // 16: no aliasing
  int64_t image_elements() const { return packed.net.blocks() * grid.plane(); }
  size_t image_bytes() const { return round_up(image_elements() * sizeof(X) + 64, 64); }
  size_t scratch_bytes(int64_t rows) const { return rows * grid.W * (words() + 1) * 4 + 64; }
  uint64_t key() const {
    uint64_t key = sizeof(X);
    for (int64_t n : {grid.H, grid.W, packed.net.k, packed.net.dim}) key = key * 1000003 + n;
    return key;
  }

  // Writes the offsets, in a block of channels, of the pixels of rows y0 .. y1. Returns their number.
  int64_t places(int64_t y0, int64_t y1, int32_t* out) const {
    int64_t n = 0;
    for (int64_t y = y0; y < y1; y++)
      for (int64_t x = 0; x < grid.W; x++) out[n++] = grid.inside(y, x);
    return n;
  }

  void patch(const float* image, int64_t y, int64_t x, int32_t* row) const {
    const int64_t p = packed.net.patch;
    row[packed.stem_depth() - 1] = 0;  // the taps may not fill the last word
    int64_t i = 0;
    for (int64_t c = 0; c < packed.net.in_chans; c++)
      for (int64_t dy = 0; dy < p; dy++) {
        const float* from = image + (c * H + y * p + dy) * W + x * p;
        for (int64_t dx = 0; dx < p; dx++, i++) put_weight<Stem>(row + i / Stem::GROUP, i % Stem::GROUP, from[dx]);
      }
  }

  void stem(const float* image, int64_t y0, int64_t y1, X* out, int32_t* scratch) const {
    int32_t* a = scratch + (y1 - y0) * grid.W;
    const int64_t rows = places(y0, y1, scratch), padded = packed.net.padded();
    for (int64_t i = 0; i < rows; i++) patch(image, y0 + i / grid.W, i % grid.W, a + i * words());
    const Vectors v{(const float*)weights + packed.stem_depth() * padded, padded};
    product<Stem>(rows, a, words(), weights, packed.stem_depth(), packed.net.act, v, out, grid.plane(), scratch);
  }

  void block(int64_t layer, const X* x, int64_t y0, int64_t y1, X* out, int32_t* scratch) const {
    const int32_t* w = weights + packed.layer(layer);
    const int64_t padded = packed.net.padded();
    const Vectors first{(const float*)w + packed.depthwise(), padded};
    int32_t* a = scratch + (y1 - y0) * grid.W;
    for (int64_t c = 0; c < padded; c += CB)
      depthwise<K>(grid, packed.net.k, packed.net.act, x + c / CB * grid.plane(), w + c / CB * depthwise_words<X>(packed.net.k), first, c,
              y0, y1, a + c / K::GROUP, words());
    const int32_t* panels = w + packed.depthwise() + packed.vectors();
    const Vectors second{(const float*)panels + packed.depth() * padded, padded};
    const int64_t rows = places(y0, y1, scratch);
    product<K>(rows, a, words(), panels, packed.depth(), packed.net.act, second, out, grid.plane(), scratch);
  }

  void pool(const X* x, float* out) const {
    for (int64_t c = 0; c < packed.net.dim; c += L) {
      vf sum{};
      const X* plane = x + c / CB * grid.plane() + c % CB;
      for (int64_t y = 0; y < grid.H; y++)
        for (int64_t column = 0; column < grid.W; column++) sum += load(plane + grid.inside(y, column));
      sum *= 1.0f / (grid.H * grid.W);
      for (int i = 0; i < std::min<int64_t>(L, packed.net.dim - c); i++) out[c + i] = sum[i];
    }
  }

  // The block of image rows that one thread computes at once; all blocks are of nearly equal size. Each block reads
  // all weights. If the weights fit into half of the core's second-level cache, a small block is best, because it
  // stays in the first-level cache. Wider layers take as many rows as the cache holds beside one panel of weights.
  int64_t pixels_at_once() const {
#ifdef CONVMIXER_PIXELS
    return CONVMIXER_PIXELS;
#else
    const int64_t cache = second_level_cache(), panel = packed.depth() * CB * 4, weights = packed.depth() * packed.net.padded() * 4;
    if (weights <= cache / 2) return 64;
    return std::clamp<int64_t>((cache - panel) / (words() * 4), 120, 256);
#endif
  }
  int64_t rows_at_once(int64_t threads) const {
    const int64_t pixels = pixels_at_once();
    const int64_t parts = std::min(grid.H, round_up((grid.H * grid.W + pixels - 1) / pixels, threads));
    return (grid.H + parts - 1) / parts;
  }

  // Computes one image. `each(n, f)` calls f(i, scratch) for each of n parts i, in any order.
  template <class Each> void image(const float* pixels, int64_t rows, X* x, X* y, float* out, const Each& each) const {
    const int64_t parts = (grid.H + rows - 1) / rows;
    const auto end = [&](int64_t i) { return std::min(grid.H, (i + 1) * rows); };
    each(parts, [&](int64_t i, int32_t* scratch) { stem(pixels, i * rows, end(i), x, scratch); });
    for (int64_t layer = 0; layer < packed.net.depth; layer++, std::swap(x, y))
      each(parts, [&](int64_t i, int32_t* scratch) { block(layer, x, i * rows, end(i), y, scratch); });
    pool(x, out);
  }

  static char* activations(size_t bytes, uint64_t key) {
    static thread_local Arena arena;
    return arena.take(bytes, key);
  }
  static int32_t* scratch(size_t bytes) {
    static thread_local Arena arena;
    return (int32_t*)arena.take(bytes, 0);
  }

  // Computes as many images at once as there are threads, each image on one thread. For each image left over, the
  // threads share its rows.
  void batch(const float* images, int64_t N, float* out) const {
    const int64_t threads = torch::stable::get_num_threads(), image_size = packed.net.in_chans * H * W;
    const int64_t whole = threads > 1 ? N / threads * threads : N;
    const int64_t rows = rows_at_once(1);
    torch::stable::parallel_for(0, whole, 1, [&](int64_t from, int64_t to) {
      char* x = activations(2 * image_bytes(), key());
      int32_t* own = scratch(scratch_bytes(rows));
      const auto in_turn = [&](int64_t n, const auto& f) {
        for (int64_t i = 0; i < n; i++) f(i, own);
      };
      for (int64_t i = from; i < to; i++)
        image(images + i * image_size, rows, (X*)x, (X*)(x + image_bytes()), out + i * packed.net.dim, in_turn);
    });
    const int64_t fewer = rows_at_once(threads);
    const auto shared = [&](int64_t n, const auto& f) {
      torch::stable::parallel_for(0, n, 1, [&](int64_t from, int64_t to) {
        int32_t* own = scratch(scratch_bytes(fewer));
        for (int64_t i = from; i < to; i++) f(i, own);
      });
    };
    for (int64_t i = whole; i < N; i++) {
      char* x = activations(2 * image_bytes(), key());
      image(images + i * image_size, fewer, (X*)x, (X*)(x + image_bytes()), out + i * packed.net.dim, shared);
    }
  }
};

template <class F> auto with_precision(int64_t precision, const F& f) {
  STD_TORCH_CHECK(precision >= FP32 && precision <= INT8, "convmixer: precision must be 0 (fp32), 1 (bf16) or 2 (int8)");
  if (precision == FP32) return f(Fp32{}, Fp32{});
  if (precision == BF16) return f(Bf16{}, Bf16{});
  return f(Bf16{}, Int8{});
}

const float* floats(const Tensor& t, std::initializer_list<int64_t> sizes) {
  bool ok = t.scalar_type() == ScalarType::Float && t.is_contiguous() && t.dim() == (int64_t)sizes.size();
  int64_t i = 0;
  for (int64_t size : sizes) ok = ok && t.size(i++) == size;
  STD_TORCH_CHECK(ok, "convmixer: a tensor to pack is not contiguous fp32 of the right sizes");
  return t.const_data_ptr<float>();
}

Tensor pack_network(const Tensor& stem, const Tensor& stem_vectors, const Tensor& depthwise,
                    const Tensor& depthwise_vectors, const Tensor& point, const Tensor& point_vectors,
                    int64_t precision) {
  STD_TORCH_CHECK(stem.dim() == 4 && depthwise.dim() == 4, "convmixer: stem or depthwise weights are not 4-dimensional");
  const Net net{stem.size(0), depthwise.size(0), depthwise.size(3), stem.size(3), stem.size(1), 0};
  STD_TORCH_CHECK(net.k >= 1 && net.k <= 15, "convmixer: kernel sizes go from 1 to 15");
  constexpr int64_t V = Vectors::COUNT;
  const Plain plain{floats(stem, {net.dim, net.in_chans, net.patch, net.patch}),
                    floats(stem_vectors, {V, net.dim}),
                    floats(depthwise, {net.depth, net.dim, net.k, net.k}),
                    floats(depthwise_vectors, {net.depth, V, net.dim}),
                    floats(point, {net.depth, net.dim, net.dim}),
                    floats(point_vectors, {net.depth, V, net.dim})};
  return with_precision(precision, [&](auto stem_kind, auto kind) {
    const Packed<decltype(stem_kind), decltype(kind)> packed{net};
    Tensor out = torch::stable::empty({packed.size()}, ScalarType::Int);
    std::memset(out.mutable_data_ptr(), 0, packed.size() * 4);
    pack_all(packed, plain, (int32_t*)out.mutable_data_ptr());
    return out;
  });
}

Tensor run_network(const Tensor& images, const Tensor& weights, int64_t dim, int64_t depth, int64_t k, int64_t patch,
                   int64_t act, int64_t precision) {
  STD_TORCH_CHECK(images.dim() == 4 && images.is_contiguous() && images.scalar_type() == ScalarType::Float,
                  "convmixer: images must be contiguous fp32 (N, C, H, W)");
  const int64_t N = images.size(0), H = images.size(2), W = images.size(3);
  STD_TORCH_CHECK(k >= 1 && k <= 15 && patch >= 1 && H >= patch && W >= patch, "convmixer: sizes out of range");
  const Net net{dim, depth, k, patch, images.size(1), (int)act};
  Tensor out = torch::stable::empty({N, dim}, ScalarType::Float);
  with_precision(precision, [&](auto stem_kind, auto kind) {
    const Packed<decltype(stem_kind), decltype(kind)> packed{net};
    STD_TORCH_CHECK(weights.numel() == packed.size(), "convmixer: the packed weights are of another network");
    const Run<decltype(stem_kind), decltype(kind)> run{
        packed, (const int32_t*)weights.const_data_ptr(), Grid(H / patch, W / patch, k), H, W};
    run.batch(images.const_data_ptr<float>(), N, out.mutable_data_ptr<float>());
    return 0;
  });
  return out;
}

}  // namespace
}  // namespace network

STABLE_TORCH_LIBRARY_IMPL(convmixer, CPU, m) {
  m.impl("pack_network", TORCH_BOX(&network::pack_network));
  m.impl("run_network", TORCH_BOX(&network::run_network));
}

// Python calls these by name: the largest int8 weight, and which instructions this build uses.
extern "C" int convmixer_int8_most() { return network::Int8::MOST; }
extern "C" const char* convmixer_level() {
#if defined(__AVX512F__) && CONVMIXER_LANES == 16
#if defined(__AVX512BF16__) && defined(__AVX512VNNI__)
  return "AVX-512 with bf16 and VNNI";
#elif defined(__AVX512VNNI__)
  return "AVX-512 with VNNI";
#else
  return "AVX-512";
#endif
#elif defined(__AVXVNNI__) && CONVMIXER_LANES == 8
  return "AVX2 with VNNI";
#elif defined(__AVX2__) && CONVMIXER_LANES == 8
  return "AVX2";
#elif defined(__aarch64__)
  return "NEON";
#else
  return "plain C++";
#endif
}
