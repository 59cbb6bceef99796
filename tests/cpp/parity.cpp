// Compares the inference kernels with float64 on small networks, without torch: for other processors under an emulator.
// Prints the largest error of each network and precision, as a share of the spread of its outputs; fails above a limit.
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "network.h"
#include "network_tiles.h"
#include "network_vectors.h"

extern "C" int convmixer_int8_most();

using namespace network;
using Floats = std::vector<float>;
using Doubles = std::vector<double>;

static std::mt19937 generator(0);
static Floats random_floats(int64_t n, float mean, float deviation) {
  std::normal_distribution<float> normal(mean, deviation);
  Floats out(n);
  for (float& value : out) value = normal(generator);
  return out;
}

struct Model {
  Net net;
  Floats stem, stem_vectors, depthwise, depthwise_vectors, point, point_vectors;
  Plain plain() const {
    return {stem.data(), stem_vectors.data(), depthwise.data(), depthwise_vectors.data(), point.data(),
            point_vectors.data()};
  }
};

// Rows as in `Vectors`: multiply, bias, scale, shift, steps, zero.
static Floats vectors(int64_t layers, int64_t dim) {
  Floats out;
  for (int64_t i = 0; i < layers; i++)
    for (int row = 0; row < Vectors::COUNT; row++) {
      const bool one = row == Vectors::MULTIPLY || row == Vectors::STEPS, none = row == Vectors::ZERO;
      for (float value : random_floats(dim, row == Vectors::SCALE, 0.3f)) out.push_back(one ? 1 : none ? 0 : value);
    }
  return out;
}

static Model random_model(const Net& net) {
  const int64_t d = net.dim, taps = net.k * net.k;
  return {net,
          random_floats(d * net.taps(), 0, 1 / std::sqrt(net.taps())),
          vectors(1, d),
          random_floats(net.depth * d * taps, 0, 1 / std::sqrt(taps)),
          vectors(net.depth, d),
          random_floats(net.depth * d * d, 0, 1 / std::sqrt(d)),
          vectors(net.depth, d)};
}

static double act(int kind, double x) { return kind == RELU ? std::max(0.0, x) : x * 0.5 * std::erfc(-x / std::sqrt(2)); }

struct Exact {
  Doubles pooled;
  std::vector<Doubles> inputs;  // of each product, (dim, H, W)
};

static Exact exact(const Model& m, const Floats& image, int64_t H, int64_t W) {
  const Net& n = m.net;
  const int64_t h = H / n.patch, w = W / n.patch, d = n.dim, area = h * w;
  const auto finish = [&](double sum, const float* v, int64_t c) {
    return act(n.act, sum + v[Vectors::BIAS * d + c]) * v[Vectors::SCALE * d + c] + v[Vectors::SHIFT * d + c];
  };
  Doubles x(d * area);
  for (int64_t c = 0; c < d; c++)
    for (int64_t p = 0; p < area; p++) {
      double sum = 0;
      for (int64_t t = 0; t < n.taps(); t++) {
        const int64_t in = t / (n.patch * n.patch), dy = t / n.patch % n.patch, dx = t % n.patch;
        sum += (double)m.stem[c * n.taps() + t] * image[(in * H + p / w * n.patch + dy) * W + p % w * n.patch + dx];
      }
      x[c * area + p] = finish(sum, m.stem_vectors.data(), c);
    }
  Exact out;
  for (int64_t i = 0; i < n.depth; i++) {
    Doubles z(d * area), y(d * area);
    const int64_t vector = i * Vectors::COUNT * d, before = (n.k - 1) / 2;
    for (int64_t c = 0; c < d; c++)
      for (int64_t p = 0; p < area; p++) {
        double sum = 0;
        for (int64_t t = 0; t < n.k * n.k; t++) {
          const int64_t row = p / w + t / n.k - before, column = p % w + t % n.k - before;
          if (row >= 0 && row < h && column >= 0 && column < w)
            sum += m.depthwise[(i * d + c) * n.k * n.k + t] * x[c * area + row * w + column];
        }
        z[c * area + p] = finish(sum, m.depthwise_vectors.data() + vector, c) + x[c * area + p];
      }
    for (int64_t c = 0; c < d; c++)
      for (int64_t p = 0; p < area; p++) {
        double sum = 0;
        for (int64_t j = 0; j < d; j++) sum += m.point[(i * d + c) * d + j] * z[j * area + p];
        y[c * area + p] = finish(sum, m.point_vectors.data() + vector, c);
      }
    out.inputs.push_back(z);
    x = y;
  }
  for (int64_t c = 0; c < d; c++) {
    double sum = 0;
    for (int64_t p = 0; p < area; p++) sum += x[c * area + p];
    out.pooled.push_back(sum / area);
  }
  return out;
}

// As `_optimized` in fast/inference.py does it.
static Model quantized(Model m, const Exact& e) {
  const int64_t d = m.net.dim, area = e.inputs[0].size() / d;
  for (int64_t i = 0; i < m.net.depth; i++) {
    float *depthwise = &m.depthwise_vectors[i * Vectors::COUNT * d], *point = &m.point_vectors[i * Vectors::COUNT * d];
    Doubles steps(d), low(d), bias(d);
    for (int64_t c = 0; c < d; c++) {
      const auto [least, most] = std::minmax_element(&e.inputs[i][c * area], &e.inputs[i][c * area] + area);
      low[c] = *least, steps[c] = 255 / std::max(1e-6, *most - *least);
      depthwise[Vectors::STEPS * d + c] = steps[c], depthwise[Vectors::ZERO * d + c] = -low[c] * steps[c];
    }
    for (int64_t n = 0; n < d; n++) {
      float* row = &m.point[(i * d + n) * d];
      double largest = 0, all = 0;
      for (int64_t j = 0; j < d; j++) largest = std::max(largest, std::abs(row[j] / steps[j]));
      const double scale = std::max(1e-12, largest / convmixer_int8_most());
      for (int64_t j = 0; j < d; j++) {
        row[j] = std::round(row[j] / steps[j] / scale);
        all += row[j] * scale * low[j] * steps[j];
      }
      point[Vectors::MULTIPLY * d + n] = scale, point[Vectors::BIAS * d + n] += all;
    }
  }
  return m;
}

static double error(const Floats& got, const Doubles& right) {
  double mean = 0, square = 0, most = 0;
  for (double value : right) mean += value / right.size();
  for (size_t i = 0; i < right.size(); i++) {
    square += (right[i] - mean) * (right[i] - mean) / right.size();
    most = std::max(most, std::isfinite(got[i]) ? std::abs(got[i] - right[i]) : 1e9);
  }
  return most / std::sqrt(square);
}

static Floats run(const Model& m, Precision precision, const Floats& image, int64_t H, int64_t W) {
  const bool tiles = precision != FP32 && tiles_usable();
  std::vector<int32_t> memory((tiles ? tiles_size : vectors_size)(m.net, precision) + 16);
  int32_t* weights = (int32_t*)(((uintptr_t)memory.data() + 63) / 64 * 64);
  (tiles ? tiles_pack : vectors_pack)(m.net, precision, m.plain(), weights);
  Floats out(m.net.dim);
  (tiles ? tiles_run : vectors_run)(m.net, precision, weights, image.data(), 1, H, W, out.data());
  return out;
}

int main() {
  // dim, depth, k, patch, in_chans, act; then the image's height and width
  const std::pair<Net, std::array<int64_t, 2>> cases[] = {
      {{40, 2, 5, 2, 3, GELU}, {20, 14}}, {{33, 2, 4, 1, 1, RELU}, {9, 35}}, {{64, 1, 9, 2, 3, GELU}, {38, 40}}};
  const char* names[] = {"fp32", "bf16", "int8"};
  const double limits[] = {2e-5, 0.05, 0.2};
  bool good = true;
  for (const auto& [net, size] : cases) {
    const Model model = random_model(net);
    const Floats image = random_floats(net.in_chans * size[0] * size[1], 0, 1);
    const Exact right = exact(model, image, size[0], size[1]);
    for (Precision precision : {FP32, BF16, INT8}) {
      const Model m = precision == INT8 ? quantized(model, right) : model;
      const double found = error(run(m, precision, image, size[0], size[1]), right.pooled);
      std::printf("dim %d, k %d, %s: error %.2g\n", (int)net.dim, (int)net.k, names[precision], found);
      good = good && found < limits[precision];
    }
  }
  return !good;
}
