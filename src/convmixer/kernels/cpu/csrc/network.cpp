// Inference of a whole ConvMixer as one op: images in, pooled features out. The weights are packed once beforehand.
#include "network_tiles.h"
#include "network_vectors.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace network {
namespace {

Precision checked(int64_t precision) {
  STD_TORCH_CHECK(precision >= FP32 && precision <= INT8, "convmixer: precision must be 0 (fp32), 1 (bf16) or 2 (int8)");
  return (Precision)precision;
}

bool on_tiles(Precision precision) { return precision != FP32 && tiles_usable(); }

int64_t packed_size(const Net& net, Precision precision) {
  return on_tiles(precision) ? tiles_size(net, precision) : vectors_size(net, precision);
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
  const Precision kind = checked(precision);
  const int64_t size = packed_size(net, kind);
  Tensor out = torch::stable::empty({size}, ScalarType::Int);
  int32_t* words = (int32_t*)out.mutable_data_ptr();
  std::memset(words, 0, size * sizeof(int32_t));
  (on_tiles(kind) ? tiles_pack : vectors_pack)(net, kind, plain, words);
  return out;
}

Tensor run_network(const Tensor& images, const Tensor& weights, int64_t dim, int64_t depth, int64_t k, int64_t patch,
                   int64_t act, int64_t precision) {
  STD_TORCH_CHECK(images.dim() == 4 && images.is_contiguous() && images.scalar_type() == ScalarType::Float,
                  "convmixer: images must be contiguous fp32 (N, C, H, W)");
  const int64_t N = images.size(0), H = images.size(2), W = images.size(3);
  STD_TORCH_CHECK(k >= 1 && k <= 15 && patch >= 1 && H >= patch && W >= patch, "convmixer: sizes out of range");
  const Net net{dim, depth, k, patch, images.size(1), (int)act};
  Tensor out = torch::stable::empty({N, dim}, ScalarType::Float);
  const Precision kind = checked(precision);
  STD_TORCH_CHECK(weights.numel() == packed_size(net, kind), "convmixer: the packed weights are of another network");
  (on_tiles(kind) ? tiles_run : vectors_run)(net, kind, (const int32_t*)weights.const_data_ptr(),
                                             images.const_data_ptr<float>(), N, H, W, out.mutable_data_ptr<float>());
  return out;
}

}  // namespace
}  // namespace network

STABLE_TORCH_LIBRARY_IMPL(convmixer, CPU, m) {
  m.impl("pack_network", TORCH_BOX(&network::pack_network));
  m.impl("run_network", TORCH_BOX(&network::run_network));
}

// Returns which instructions this build uses; Python calls it by name.
extern "C" const char* convmixer_level() {
#if defined(__AVX512F__) && CONVMIXER_LANES == 16
  if (network::tiles_usable()) return "AVX-512 with bf16, VNNI and AMX";
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
#elif defined(__ARM_FEATURE_MATMUL_INT8)
  return "NEON with i8mm";
#elif defined(__ARM_FEATURE_DOTPROD)
  return "NEON with dot products";
#elif defined(__aarch64__)
  return "NEON";
#else
  return "plain C++";
#endif
}
