// The processor's matrix unit (AMX): eight registers, called tiles, of up to 16 rows of 64 bytes. One instruction
// multiplies two tiles and adds the product to a third. On processors without the unit, CONVMIXER_TILES=1 computes
// the same in plain C++, so that the code that uses tiles can be tested anywhere.
#pragma once
#include <array>
#include <cstdint>
#include <cstring>

#include "vec.h"

#ifndef CONVMIXER_AMX
#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__) && defined(__AVX512BF16__) && \
    defined(__linux__) && CONVMIXER_LANES == 16
#define CONVMIXER_AMX 1
#else
#define CONVMIXER_AMX 0
#endif
#endif
#if CONVMIXER_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif
#ifndef CONVMIXER_TILES
#define CONVMIXER_TILES CONVMIXER_AMX
#endif

#if CONVMIXER_TILES
static_assert(L == 16);

namespace tiles {

constexpr int ROWS = 16, BYTES = 64, SIZE = ROWS * BYTES;

// The layout that `ldtilecfg` reads.
struct alignas(64) Config {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};  // of a row
  uint8_t rows[16] = {};
};

// Returns the shapes of the tiles. Tiles 0 to 3 are sums, 4 and 5 left factors, 6 and 7 right factors. Sums and left
// factors have `rows` rows. A row of a left factor has `words` words of 4 bytes; a right factor has `words` rows.
inline Config shapes(int rows, int words) {
  Config config;
  for (int i = 0; i < 8; i++) {
    config.rows[i] = i < 6 ? rows : words;
    config.bytes[i] = i == 4 || i == 5 ? 4 * words : BYTES;
  }
  return config;
}

#if CONVMIXER_AMX
// Returns whether the system lets this process use the tiles. On Linux each process must request them.
inline bool usable() {
  constexpr int REQUEST = 0x1023, TILE_DATA = 18;
  static const bool granted = syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
  return granted;
}
INLINE void configure(const Config& config) { asm volatile("ldtilecfg %0" ::"m"(config)); }
INLINE void release() { asm volatile("tilerelease" ::: "memory"); }
template <int T> INLINE void zero() { asm volatile("tilezero %%tmm%c0" ::"i"(T)); }
template <int T> INLINE void load(const void* from, int64_t stride = BYTES) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(T) : "memory");
}
template <int T> INLINE void store(void* to, int64_t stride = BYTES) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(T) : "memory");
}
// Tile C += tile A times tile B: of bf16, or of signed bytes (A) times unsigned bytes (B).
template <int C, int A, int B> INLINE void dot_bf16() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
template <int C, int A, int B> INLINE void dot_int8() {
  asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
#else
struct State {
  Config config;
  uint8_t data[8][ROWS][BYTES];
};
inline State& state() {
  static thread_local State mine;
  return mine;
}
inline bool usable() { return true; }
inline void configure(const Config& config) {
  std::memset(state().data, 0, sizeof state().data);
  state().config = config;
}
inline void release() {}
template <int T> void zero() { std::memset(state().data[T], 0, SIZE); }
template <int T> void load(const void* from, int64_t stride = BYTES) {
  State& s = state();
  zero<T>();
  for (int r = 0; r < s.config.rows[T]; r++)
    std::memcpy(s.data[T][r], (const char*)from + r * stride, s.config.bytes[T]);
}
template <int T> void store(void* to, int64_t stride = BYTES) {
  State& s = state();
  for (int r = 0; r < s.config.rows[T]; r++) std::memcpy((char*)to + r * stride, s.data[T][r], s.config.bytes[T]);
}
template <int C, int A, int B, class Sum, class Word> void dot(const Word& word) {
  State& s = state();
  for (int r = 0; r < ROWS; r++)
    for (int i = 0; i < ROWS; i++)
      for (int column = 0; column < ROWS; column++)
        ((Sum*)s.data[C][r])[column] += word(s.data[A][r] + 4 * i, s.data[B][i] + 4 * column);
}
template <int C, int A, int B> void dot_bf16() {
  dot<C, A, B, float>([](const uint8_t* a, const uint8_t* b) {
    const bf16 *x = (const bf16*)a, *y = (const bf16*)b;
    return value_of(x[0]) * value_of(y[0]) + value_of(x[1]) * value_of(y[1]);
  });
}
template <int C, int A, int B> void dot_int8() {
  dot<C, A, B, int32_t>([](const uint8_t* a, const uint8_t* b) {
    int32_t sum = 0;
    for (int i = 0; i < 4; i++) sum += (int8_t)a[i] * b[i];
    return sum;
  });
}
#endif

}  // namespace tiles
#endif
