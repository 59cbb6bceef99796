// Inference of a whole ConvMixer with vector instructions, in each precision; network.h describes the layout.
#include "network_vectors.h"

#include "network.h"

namespace network {
namespace {

// The sizes of the parts of the packed weights, and where a layer begins, in words of 4 bytes. Each part fills whole
// cache lines. `Stem` and `K` are the kinds of operand of the stem and of the blocks.
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

// --- Packing.

template <class K> void put_weight(int32_t* word, int64_t i, float value) {
  if constexpr (K::INTEGER) ((int8_t*)word)[i] = (int8_t)value;
  else if constexpr (K::GROUP == 2) ((bf16*)word)[i] = to_bf16(value);
  else ((float*)word)[i] = value;
}

// weight: (dim, inputs). Input t of the packed product is input channel(t) of `weight`.
template <class K, class Channel>
void pack_product(const float* weight, int64_t dim, int64_t inputs, int64_t depth, const Channel& channel, int32_t* out) {
  for (int64_t n = 0; n < dim; n++)
    for (int64_t i = 0; i < depth * K::GROUP; i++) {
      const int64_t from = channel(i);
      if (from < inputs)
        put_weight<K>(out + (n / CB * depth + i / K::GROUP) * CB + n % CB, i % K::GROUP, weight[n * inputs + from]);
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

// Int8::OFFSET is subtracted from stored activations, so a sum is too small by OFFSET times the sum of its weights.
// This adds the difference to the bias.
void add_offset(const float* weight, const Net& net, float* vectors) {
  for (int64_t n = 0; n < net.dim && Int8::OFFSET; n++) {
    double sum = 0;
    for (int64_t i = 0; i < net.dim; i++) sum += weight[n * net.dim + i];
    float& bias = vectors[Vectors::BIAS * net.padded() + n];
    bias = bias + Int8::OFFSET * sum * vectors[Vectors::MULTIPLY * net.padded() + n];
  }
}

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
    float* vectors = (float*)layer + p.depth() * net.padded();
    pack_vectors(plain.point_vectors + i * row, net.dim, net.padded(), same, vectors);
    if constexpr (K::INTEGER) add_offset(plain.point + i * net.dim * net.dim, net, vectors);
  }
}

// --- Running.

template <class Stem, class K> struct Run {
  using X = typename K::X;
  Packed<Stem, K> packed;
  const int32_t* weights;
  Grid grid;
  int64_t H, W;  // of the image

  int64_t words() const { return std::max(packed.depth(), packed.stem_depth()) + 16; }  // 16: no cache aliasing
  int64_t image_elements() const { return packed.net.blocks() * grid.plane(); }
  size_t image_bytes() const { return round_up(image_elements() * sizeof(X) + 64, 64); }
  size_t scratch_bytes(int64_t rows) const { return rows * grid.W * (words() + 1) * 4 + 64; }
  uint64_t key() const { return key_of({(int64_t)sizeof(X), grid.H, grid.W, packed.net.k, packed.net.dim}); }

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

  void stem(const float* image, int64_t y0, int64_t y1, X* out, char* own) const {
    int32_t* scratch = (int32_t*)own;
    int32_t* a = scratch + (y1 - y0) * grid.W;
    const int64_t rows = places(y0, y1, scratch), padded = packed.net.padded();
    for (int64_t i = 0; i < rows; i++) patch(image, y0 + i / grid.W, i % grid.W, a + i * words());
    const Vectors v{(const float*)weights + packed.stem_depth() * padded, padded};
    product<Stem>(rows, a, words(), weights, packed.stem_depth(), packed.net.act, v, out, grid.plane(), scratch);
  }

  void block(int64_t layer, const X* x, int64_t y0, int64_t y1, X* out, char* own) const {
    int32_t* scratch = (int32_t*)own;
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

  // Returns about how many pixels one thread computes at once; `rows_at_once` divides an image into parts of nearly
  // equal size. Each part reads all weights. If the weights fit into half of the core's second-level cache, small
  // parts are best, because they stay in the first-level cache. Wider layers take as many pixels, from 120 to 256, as
  // the second-level cache holds beside one panel of weights.
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
};

template <class F> void with_precision(Precision precision, const Net& net, const F& f) {
  if (precision == FP32) return f(Packed<Fp32, Fp32>{net});
  if (precision == BF16) return f(Packed<Bf16, Bf16>{net});
  f(Packed<Bf16, Int8>{net});
}

}  // namespace

int64_t vectors_size(const Net& net, Precision precision) {
  int64_t size = 0;
  with_precision(precision, net, [&](const auto& packed) { size = packed.size(); });
  return size;
}

void vectors_pack(const Net& net, Precision precision, const Plain& plain, int32_t* out) {
  with_precision(precision, net, [&](const auto& packed) { pack_all(packed, plain, out); });
}

void vectors_run(const Net& net, Precision precision, const int32_t* weights, const float* images, int64_t N,
                 int64_t H, int64_t W, float* out) {
  with_precision(precision, net, [&]<class Stem, class K>(const Packed<Stem, K>& packed) {
    const Grid grid(H / net.patch, W / net.patch, net.k);
    run_batch(Run<Stem, K>{packed, weights, grid, H, W}, images, N, out);
  });
}

}  // namespace network

// Returns the largest int8 weight with which sums cannot overflow; Python calls it by name.
extern "C" int convmixer_int8_most() { return network::Int8::MOST; }
