// Inference of a whole ConvMixer on the processor's matrix unit (tiles.h), depthwise convolutions included.
//
// Activations are stored in bf16 as [channels][column tiles][rows][32]. A column tile is 16 columns with a halo:
// copies of the columns beside them that a convolution also reads, or a border of zeros at the edge of the image. So
// edges are no special case, and the row of a column tile is one cache line.
//
// For each row of the kernel, the depthwise convolution multiplies up to 16 rows of a column tile, one row further
// down each time, by a band matrix: 32 columns in, 16 out. A few image rows at a time go through depthwise +
// activation + BatchNorm + residual into the matrix z, which stays in the core's cache. z holds groups of 16
// neighbouring pixels of one row, each as [channels / GROUP][16 pixels] words of GROUP channels. The pointwise
// convolution multiplies tiles of weights by tiles of z. This gives 16 channels x 16 pixels, each row of which is the
// 16 columns inside a row of a column tile.
//
// The matrix unit works beside the vector units: while it computes the sums of one tile, they compute activation and
// BatchNorm of the tile before.
#include "network_tiles.h"

#include "tiles.h"

#if CONVMIXER_TILES

namespace network {
namespace {

constexpr int SIDE = 16;     // rows and columns of a tile of sums
constexpr int WIDE = 32;     // values of a row of a column tile, with its halo
constexpr int AT_ONCE = 4;   // tiles that are multiplied by each band matrix while it is loaded
constexpr int BAND_WORDS = tiles::SIZE / 4;

struct Bf16Tiles {
  static constexpr int GROUP = 2;  // channels in a word
  static constexpr bool INTEGER = false;
  template <int C, int A, int B> INLINE static void dot() { tiles::dot_bf16<C, A, B>(); }
};
struct Int8Tiles {
  static constexpr int GROUP = 4;
  static constexpr bool INTEGER = true;
  template <int C, int A, int B> INLINE static void dot() { tiles::dot_int8<C, A, B>(); }
};

// The layout of one image's activations, in values.
struct Planes {
  int64_t H, W, before, after, rows, tiles;
  Planes(int64_t H, int64_t W, int64_t k)
      : H(H), W(W), before((k - 1) / 2), after(k / 2), rows(H + k - 1), tiles((W + SIDE - 1) / SIDE) {}
  int64_t plane() const { return (tiles * rows | 1) * WIDE; }  // an odd number of lines: no aliasing
  int64_t at(int64_t tile, int64_t y) const { return (tile * rows + y) * WIDE; }  // y: with the border
  int64_t inside(int64_t tile, int64_t y) const { return at(tile, y + before) + before; }
};

// Where 16 neighbouring pixels of a row are stored: in their column tile, and in the halos of the tiles beside it.
struct Place {
  int64_t own, left, right;  // offsets; < 0: none
  uint32_t valid;            // one bit for each pixel inside the image
  bool whole;                // all 16 are inside
};

INLINE void store_some(bf16* to, vh bits, uint32_t mask) {
#if CONVMIXER_AMX
  _mm256_mask_storeu_epi16(to, mask, (__m256i)bits);
#else
  for (int i = 0; i < L; i++)
    if (mask >> i & 1) to[i] = bits[i];
#endif
}

INLINE void put(bf16* plane, const Place& place, const Planes& g, vh bits) {
  if (__builtin_expect(place.whole, 1)) store_vector(plane + place.own, bits);
  else store_some(plane + place.own, bits, place.valid);
  if (__builtin_expect(place.right >= 0, 0))  // its halo begins with our last columns
    store_some(plane + place.right + g.before - SIDE, bits, place.valid & (0xffffu << (SIDE - g.before)) & 0xffffu);
  if (__builtin_expect(place.left >= 0, 0))
    store_some(plane + place.left + g.before + SIDE, bits, place.valid & ((1u << g.after) - 1));
}

struct Halves {
  vh first, second;
};
INLINE Halves narrow_both(vf first, vf second) {
#if CONVMIXER_AMX
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
  return {(vh)_mm512_castsi512_si256(both), (vh)_mm512_extracti64x4_epi64(both, 1)};
#else
  return {narrow(first), narrow(second)};
#endif
}

// Spreads the calls f(0), f(By), ... f(n - By) over `steps` steps: `until` makes those that are due at step `step`.
template <int By> struct Progress {
  int64_t done = 0;
  template <class F> INLINE void until(int64_t n, int64_t step, int64_t steps, const F& f) {
    for (const int64_t end = n * step / steps; done < end; done += By) f(done);
  }
};

// --- Depthwise.

// Row p of the band matrix holds, for each output column, the weights of input columns 2p and 2p + 1. It is a window
// of 16 words from `weights` with zeros before and after. `weights` has 16 words, see `pack_bands`.
INLINE void write_band(const int32_t* weights, int words, int32_t* band) {
  const vi all = load_vector<vi>(weights);
  unrolled<SIDE>(EACH(p) {
    if (p >= words) return;
    constexpr int first = 2 * SIDE - 2 - 2 * p;
    const vi none{};
#if CONVMIXER_AMX
    __m512i row;
    if constexpr (first < SIDE) row = _mm512_alignr_epi32((__m512i)all, (__m512i)none, first);
    else row = _mm512_alignr_epi32((__m512i)none, (__m512i)all, first - SIDE);
    _mm512_store_si512(band + p * SIDE, row);
#else
    for (int i = 0; i < SIDE; i++) {
      const int from = first + i - SIDE;
      band[p * SIDE + i] = from >= 0 && from < SIDE ? all[from] : 0;
    }
#endif
  });
}

// Writes one line of z: 16 pixels, each a word of GROUP channels.
INLINE void put_words(const vg<2>& values, char* line) {
#if CONVMIXER_AMX
  alignas(64) static constexpr uint16_t order[] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                   8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)values.v[1], (__m512)values.v[0]);
  _mm512_store_si512(line, _mm512_permutexvar_epi16(_mm512_load_si512(order), both));
#else
  store_vector(line, pair_of(narrow(values.v[0]), narrow(values.v[1])));
#endif
}
INLINE void put_words(const vg<4>& values, char* line) {
  const vg<4> q = smaller(larger(values, vf{}), splat(255.0f));
#if CONVMIXER_AMX
  const auto whole = [&](int j) INLINED { return _mm512_cvtps_epi32((__m512)q.v[j]); };
  const __m512i bytes = _mm512_packus_epi16(_mm512_packus_epi32(whole(0), whole(1)),
                                            _mm512_packus_epi32(whole(2), whole(3)));  // 4 pixels of each, by 128 bits
  const __m512i order = _mm512_set4_epi32(0x0f0b0703, 0x0e0a0602, 0x0d090501, 0x0c080400);
  _mm512_store_si512(line, _mm512_shuffle_epi8(bytes, order));
#else
  vi word{};
  for (int j = 0; j < 4; j++) word |= __builtin_convertvector(q.v[j] + 0.5f, vi) << 8 * j;
  store_vector(line, word);
#endif
}

// Up to AT_ONCE tiles of `tall` rows that are computed together, for all channels. A line is 16 pixels of one row.
struct Strip {
  int64_t count, tall;
  int64_t at[AT_ONCE];             // the first row that each tile reads
  int64_t centre[AT_ONCE * SIDE];  // where each line is in the plane of a channel
  char* lines[AT_ONCE * SIDE];     // and where in z
};

template <class K, int ACT, int Count>
void depthwise_strip(const Strip& s, int64_t plane, int k, const bf16* x, const int32_t* weights, const Vectors& p,
                     float* sums, int32_t* bands) {
  constexpr int G = K::GROUP, AREA = AT_ONCE * SIDE * SIDE;
  const int64_t lines = s.count * s.tall;
  const int words = (k + SIDE) / 2;
  const auto finish = [&](int64_t c, const float* from, int64_t line) INLINED {
    const bf16* residual = x + c * plane + s.centre[line];
    vg<G> z = activate<bf16, ACT>(each<G>([&](int j) INLINED {
      return ::load(from + j * AREA + line * SIDE) + splat(*p.row(Vectors::BIAS, c + j));
    }));
    z = each<G>([&](int j) INLINED {
      return z.v[j] * splat(*p.row(Vectors::SCALE, c + j)) +
             (splat(*p.row(Vectors::SHIFT, c + j)) + ::load(residual + j * plane));
    });
    if constexpr (K::INTEGER)
      z = each<G>([&](int j) INLINED {
        return z.v[j] * splat(*p.row(Vectors::STEPS, c + j)) + splat(*p.row(Vectors::ZERO, c + j));
      });
    put_words(z, s.lines[line] + c / G * tiles::BYTES);
  };
  const auto band = [&](int64_t c, int dy) INLINED { return bands + ((c & 1) * k + dy) * BAND_WORDS; };
  for (int dy = 0; dy < k; dy++) write_band(weights + dy * SIDE, words, band(0, dy));
  float *mine = sums, *other = sums + G * AREA;
  for (int64_t c = 0; c < p.dim; c += G, std::swap(mine, other)) {
    Progress<1> progress;
    for (int j = 0; j < G; j++) {
      unrolled<Count>(EACH(t) { tiles::zero<t>(); });
      for (int dy = 0; dy < k; dy++) {
        tiles::load<6>(band(c + j, dy));
        unrolled<Count>(EACH(t) {
          tiles::load<4 + t % 2>(x + (c + j) * plane + s.at[t] + dy * WIDE);
          tiles::dot_bf16<t, 4 + t % 2, 6>();
        });
        if (c + j + 1 < p.dim) write_band(weights + ((c + j + 1) * k + dy) * SIDE, words, band(c + j + 1, dy));
        if (c) progress.until(lines, j * k + dy + 1, G * k, [&](int64_t i) INLINED { finish(c - G, other, i); });
      }
      unrolled<Count>(EACH(t) { tiles::store<t>(mine + j * AREA + t * s.tall * SIDE); });
    }
  }
  for (int64_t i = 0; i < lines; i++) finish(p.dim - G, other, i);
}

// --- Product.

// `sums`: room for two blocks of 32 channels x 2 groups of 16 pixels.
template <class K, int ACT>
void product(const Planes& g, int64_t groups, const char* z, int64_t z_step, int64_t steps, const char* weights,
             const Vectors& p, bf16* out, const Place* places, float* sums) {
  const int64_t plane = g.plane();
  const auto finish = [&](int64_t c, int64_t group, const float* from, int64_t row) INLINED {
    constexpr int ROWS = 2;  // of sums, each of two groups of pixels: four vectors side by side
    from += row * 2 * SIDE, c += row;
    vg<2 * ROWS> y = each<2 * ROWS>([&](int j) INLINED {
      const vf bias = splat(*p.row(Vectors::BIAS, c + j / 2));
      if constexpr (!K::INTEGER) return ::load(from + j * SIDE) + bias;
      const vf sum = __builtin_convertvector(load_vector<vi>(from + j * SIDE), vf);
      return sum * splat(*p.row(Vectors::MULTIPLY, c + j / 2)) + bias;
    });
    y = activate<bf16, ACT>(y);
    y = each<2 * ROWS>([&](int j) INLINED {
      return y.v[j] * splat(*p.row(Vectors::SCALE, c + j / 2)) + splat(*p.row(Vectors::SHIFT, c + j / 2));
    });
    unrolled<ROWS>(EACH(r) {
      const Halves bits = narrow_both(y.v[2 * r], y.v[2 * r + 1]);
      put(out + (c + r) * plane, places[group], g, bits.first);
      put(out + (c + r) * plane, places[group + 1], g, bits.second);
    });
  };
  float *mine = sums, *other = sums + CB * 2 * SIDE;
  int64_t before_c = 0, before_group = -1;
  // While 32 channels are multiplied, the weights of the next 32 are prefetched, `fetched` bytes in each step.
  const int64_t panel = 2 * steps * tiles::SIZE, fetched = round_up(panel * 2 / (groups * steps), 64) + 64;
  for (int64_t c = 0; c < p.dim; c += CB) {
    const char *next = weights + (c / CB + 1) * panel, *end = c + CB < p.dim ? next + panel : next;
    for (int64_t group = 0; group < groups; group += 2, std::swap(mine, other)) {
      Progress<2> progress;
      unrolled<4>(EACH(t) { tiles::zero<t>(); });
      const char *a = weights + c / SIDE * steps * tiles::SIZE, *b = z + group * z_step;
      for (int64_t step = 0; step < steps; step++, a += tiles::SIZE, b += tiles::SIZE) {
        for (const char* to = std::min(next + fetched, end); next < to; next += tiles::BYTES)
          __builtin_prefetch(next, 0, 2);
        tiles::load<4>(a);
        tiles::load<6>(b);
        K::template dot<0, 4, 6>();
        tiles::load<7>(b + z_step);
        K::template dot<1, 4, 7>();
        tiles::load<5>(a + steps * tiles::SIZE);
        K::template dot<2, 5, 6>();
        K::template dot<3, 5, 7>();
        if (before_group >= 0)
          progress.until(CB, step + 1, steps, [&](int64_t i) INLINED { finish(before_c, before_group, other, i); });
      }
      unrolled<4>(EACH(t) { tiles::store<t>(mine + (t / 2 * SIDE * 2 + t % 2) * SIDE, 2 * SIDE * 4); });
      before_c = c, before_group = group;
    }
  }
  for (int64_t i = 0; i < CB; i += 2) finish(before_c, before_group, other, i);
}

// --- The network.

// The sizes of the parts of the packed weights, and where a layer begins, in words of 4 bytes. Each part fills whole
// cache lines.
template <class K> struct TilesPacked {
  Net net;
  static constexpr int64_t STEP = SIDE * K::GROUP, STEM_STEP = SIDE * Bf16Tiles::GROUP;  // inputs of a tile
  int64_t steps() const { return (net.padded() + STEP - 1) / STEP; }
  int64_t stem_steps() const { return (net.taps() + STEM_STEP - 1) / STEM_STEP; }
  int64_t vectors() const { return Vectors::COUNT * net.padded(); }
  int64_t depthwise() const { return net.padded() * net.k * SIDE; }
  int64_t product(int64_t steps) const { return net.padded() / SIDE * steps * tiles::SIZE / 4; }
  int64_t layer_size() const { return depthwise() + product(steps()) + 2 * vectors(); }
  int64_t stem_size() const { return product(stem_steps()) + vectors(); }
  int64_t size() const { return stem_size() + net.depth * layer_size(); }
  int64_t layer(int64_t i) const { return stem_size() + i * layer_size(); }
};

template <class X>
void pack_tiles(const float* weight, int64_t dim, int64_t inputs, int64_t steps, int32_t* out) {
  constexpr int64_t STEP = tiles::BYTES / sizeof(X);
  for (int64_t n = 0; n < dim; n++)
    for (int64_t i = 0; i < inputs; i++) {
      X* row = (X*)((char*)out + (n / SIDE * steps + i / STEP) * tiles::SIZE + n % SIDE * tiles::BYTES);
      const float value = weight[n * inputs + i];
      if constexpr (sizeof(X) == 1) row[i % STEP] = (X)value;
      else row[i % STEP] = to_bf16(value);
    }
}

// Each row of a kernel becomes 16 words, the last of them (0, w[0]), the one before (w[0], w[1]), and so on.
inline void pack_bands(const float* weight, int64_t dim, int64_t k, int32_t* out) {
  for (int64_t row = 0; row < dim * k; row++)
    for (int64_t i = 0; i < 2 * SIDE; i++) {
      const int64_t dx = SIDE - 2 - i / 2 + i % 2;
      if (dx >= 0 && dx < k) ((bf16*)(out + row * SIDE))[i] = to_bf16(weight[row * k + dx]);
    }
}

template <class K> void pack_all(const TilesPacked<K>& p, const Plain& plain, int32_t* out) {
  const Net& net = p.net;
  const auto same = [](int64_t c) { return c; };
  const auto vectors = [&](const float* from, int32_t* to) {
    pack_vectors(from, net.dim, net.padded(), same, (float*)to);
  };
  const int64_t row = Vectors::COUNT * net.dim;
  pack_tiles<bf16>(plain.stem, net.dim, net.taps(), p.stem_steps(), out);
  vectors(plain.stem_vectors, out + p.product(p.stem_steps()));
  for (int64_t i = 0; i < net.depth; i++) {
    int32_t* layer = out + p.layer(i);
    pack_bands(plain.depthwise + i * net.dim * net.k * net.k, net.dim, net.k, layer);
    vectors(plain.depthwise_vectors + i * row, layer += p.depthwise());
    using X = std::conditional_t<K::INTEGER, int8_t, bf16>;
    pack_tiles<X>(plain.point + i * net.dim * net.dim, net.dim, net.dim, p.steps(), layer += p.vectors());
    vectors(plain.point_vectors + i * row, layer += p.product(p.steps()));
  }
}

template <class K> struct TilesRun {
  using X = bf16;
  TilesPacked<K> packed;
  const int32_t* weights;
  int64_t H, W;  // of the image
  Planes grid;
  TilesRun(const TilesPacked<K>& packed, const int32_t* weights, int64_t H, int64_t W)
      : packed(packed), weights(weights), H(H), W(W), grid(H / packed.net.patch, W / packed.net.patch, packed.net.k) {}

  int64_t z_step() const { return std::max(packed.steps(), packed.stem_steps()) * tiles::SIZE + 64; }  // no aliasing
  int64_t groups(int64_t rows) const { return round_up(rows * grid.tiles, 2); }
  size_t image_bytes() const { return packed.net.padded() * grid.plane() * sizeof(X); }
  uint64_t key() const { return key_of({1, grid.H, grid.W, packed.net.k, packed.net.dim}); }

  // The scratch memory that a thread needs to compute some rows of the image.
  struct Room {
    Place* places;
    float* sums;
    int32_t* bands;
    char* z;
  };
  static constexpr size_t SUMS = 2 * std::max(K::GROUP * AT_ONCE * SIDE * SIDE, CB * 2 * SIDE) * sizeof(float);
  size_t places_bytes(int64_t rows) const { return round_up(groups(rows) * sizeof(Place), 64); }
  size_t bands_bytes() const { return 2 * packed.net.k * tiles::SIZE; }
  size_t scratch_bytes(int64_t rows) const {
    return places_bytes(rows) + SUMS + bands_bytes() + groups(rows) * z_step();
  }
  Room room(int64_t y0, int64_t y1, char* own) const {
    Place* places = (Place*)own;
    own += places_bytes(y1 - y0);
    const Room room{places, (float*)own, (int32_t*)(own + SUMS), own + SUMS + bands_bytes()};
    for (int64_t tile = 0; tile < grid.tiles; tile++)
      for (int64_t y = y0; y < y1; y++) {
        const int64_t columns = std::min<int64_t>(SIDE, grid.W - tile * SIDE), row = y + grid.before;
        const bool first = tile == 0 || grid.after == 0, last = tile + 1 == grid.tiles || grid.before == 0;
        *places++ = {grid.inside(tile, y), first ? -1 : grid.at(tile - 1, row), last ? -1 : grid.at(tile + 1, row),
                     (1u << columns) - 1, columns == SIDE};
      }
    if ((y1 - y0) * grid.tiles % 2) *places = {0, -1, -1, 0, false};
    return room;
  }

  void patches(const float* image, int64_t tile, int64_t y, bf16* z) const {
    const int64_t p = packed.net.patch, columns = std::min<int64_t>(SIDE, grid.W - tile * SIDE);
    std::memset(z, 0, packed.stem_steps() * tiles::SIZE);
    int64_t tap = 0;
    for (int64_t c = 0; c < packed.net.in_chans; c++)
      for (int64_t dy = 0; dy < p; dy++)
        for (int64_t dx = 0; dx < p; dx++, tap++) {
          const float* from = image + (c * H + y * p + dy) * W + tile * SIDE * p + dx;
          bf16* to = z + tap / 2 * 2 * SIDE + tap % 2;
          for (int64_t i = 0; i < columns; i++) to[2 * i] = to_bf16(from[i * p]);
        }
  }

  template <class Kind>
  void multiply(const Room& room, int64_t rows, int64_t steps, const int32_t* panels, X* out) const {
    const Vectors v{(const float*)panels + packed.product(steps), packed.net.padded()};
    tiles::configure(tiles::shapes(SIDE, SIDE));
    const auto run = packed.net.act == GELU ? &product<Kind, GELU> : &product<Kind, RELU>;
    run(grid, rows * grid.tiles, room.z, z_step(), steps, (const char*)panels, v, out, room.places, room.sums);
    tiles::release();
  }

  void stem(const float* image, int64_t y0, int64_t y1, X* out, char* own) const {
    const Room r = room(y0, y1, own);
    for (int64_t tile = 0, group = 0; tile < grid.tiles; tile++)
      for (int64_t y = y0; y < y1; y++, group++) patches(image, tile, y, (bf16*)(r.z + group * z_step()));
    multiply<Bf16Tiles>(r, y1 - y0, packed.stem_steps(), weights, out);
  }

  void block(int64_t layer, const X* x, int64_t y0, int64_t y1, X* out, char* own) const {
    const Room r = room(y0, y1, own);
    const int32_t* w = weights + packed.layer(layer);
    depthwise(r, x, y0, y1, w);
    multiply<K>(r, y1 - y0, packed.steps(), w + packed.depthwise() + packed.vectors(), out);
  }

  // All tiles have the same height. The last may overlap the one before; the rows that both hold are computed twice.
  void depthwise(const Room& r, const X* x, int64_t y0, int64_t y1, const int32_t* w) const {
    const int64_t rows = y1 - y0, deep = (rows + SIDE - 1) / SIDE, tall = (rows + deep - 1) / deep;
    const Vectors v{(const float*)w + packed.depthwise(), packed.net.padded()};
    tiles::configure(tiles::shapes(tall, (packed.net.k + SIDE) / 2));
    for (int64_t first = 0; first < deep * grid.tiles; first += AT_ONCE) {
      Strip s{std::min<int64_t>(AT_ONCE, deep * grid.tiles - first), tall, {}, {}, {}};
      for (int64_t t = 0; t < s.count; t++) {
        const int64_t tile = (first + t) / deep, y = std::min(y0 + (first + t) % deep * tall, y1 - tall);
        s.at[t] = grid.at(tile, y);
        for (int64_t i = 0; i < tall; i++) {
          s.centre[t * tall + i] = grid.inside(tile, y + i);
          s.lines[t * tall + i] = r.z + (tile * rows + y + i - y0) * z_step();
        }
      }
      static constexpr auto kinds = []<int... I>(std::integer_sequence<int, I...>) {
        return std::array{std::array{&depthwise_strip<K, GELU, I + 1>, &depthwise_strip<K, RELU, I + 1>}...};
      }(std::make_integer_sequence<int, AT_ONCE>{});
      kinds[s.count - 1][packed.net.act == RELU](s, grid.plane(), packed.net.k, x, w, v, r.sums, r.bands);
    }
  }

  void pool(const X* x, float* out) const {
    for (int64_t c = 0; c < packed.net.dim; c++) {
      vf sum{};
      for (int64_t tile = 0; tile < grid.tiles; tile++)
        for (int64_t y = 0; y < grid.H; y++) sum += ::load(x + c * grid.plane() + grid.inside(tile, y));
      float all = 0;
      for (int i = 0; i < L; i++) all += sum[i];
      out[c] = all / (grid.H * grid.W);
    }
  }

  // Returns the rows of each part of an image: as many as let z stay in the core's second-level cache, because each
  // part reads all weights, for wide layers from a more distant cache.
  int64_t rows_at_once(int64_t threads) const {
    const int64_t most = std::max<int64_t>(1, second_level_cache() / (grid.tiles * z_step()));
    const int64_t parts = std::min(grid.H, round_up((grid.H + most - 1) / most, threads));
    return (grid.H + parts - 1) / parts;
  }
};

template <class F> void with_kind(Precision precision, const Net& net, const F& f) {
  if (precision == INT8) f(TilesPacked<Int8Tiles>{net});
  else f(TilesPacked<Bf16Tiles>{net});
}

}  // namespace

bool tiles_usable() { return tiles::usable(); }

int64_t tiles_size(const Net& net, Precision precision) {
  int64_t size = 0;
  with_kind(precision, net, [&](const auto& packed) { size = packed.size(); });
  return size;
}

void tiles_pack(const Net& net, Precision precision, const Plain& plain, int32_t* out) {
  with_kind(precision, net, [&](const auto& packed) { pack_all(packed, plain, out); });
}

void tiles_run(const Net& net, Precision precision, const int32_t* weights, const float* images, int64_t N, int64_t H,
               int64_t W, float* out) {
  with_kind(precision, net, [&](const auto& packed) { run_batch(TilesRun(packed, weights, H, W), images, N, out); });
}

}  // namespace network
#else
namespace network {
bool tiles_usable() { return false; }
int64_t tiles_size(const Net&, Precision) { return 0; }
void tiles_pack(const Net&, Precision, const Plain&, int32_t*) {}
void tiles_run(const Net&, Precision, const int32_t*, const float*, int64_t, int64_t, int64_t, float*) {}
}  // namespace network
#endif
