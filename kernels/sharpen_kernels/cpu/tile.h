// What both passes and both kinds of product share: inputs, threads, and what follows a product.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/cpu/vec/vec.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <limits>

namespace sharpen {

constexpr int LANES = 16;  // of fp32 in a register
// Columns of a packed weight are a whole number of panels.
constexpr int64_t PANEL = 64;
// Rows of one product, always: a row meets the same instructions in any batch.
constexpr int64_t BLOCK = 64;

// What both passes read; strides in elements, columns beside each other.
struct Inputs {
  const void* hidden;
  const void* weight;
  const float* bias;    // or null
  const uint8_t* mask;  // or null; 0 where a column does not count
  const int64_t* target;
  const int64_t* first;  // pairs of row r: first[r] ... first[r + 1]
  int64_t rows, columns, depth, hidden_stride, weight_stride;
  float temperature, softcap;  // softcap 0: none
};

constexpr float INF = std::numeric_limits<float>::infinity();

// The first n lanes of a register, all of them from 16 on, none below 1.
inline __mmask16 lanes_before(int64_t n) {
  return static_cast<__mmask16>((1U << std::clamp<int64_t>(n, 0, LANES)) - 1);
}

inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Next piece of 64-byte aligned memory.
inline char* take(char** memory, int64_t bytes) {
  char* start = *memory;
  *memory += round_up(bytes, 64);
  return start;
}

// `run(thread, task)` for every task, each once, in any order, as threads come free; a `Session`
// lasts as long as a thread has tasks.
template <typename Session, typename Run>
void share_out(int64_t threads, int64_t tasks, const Run& run) {
  std::atomic<int64_t> next{0};
  std::atomic<int64_t> thread{0};
  at::parallel_for(0, std::min(threads, tasks), 1, [&](int64_t, int64_t) {
    const Session session;
    const int64_t mine = thread++;
    for (int64_t i = next++; i < tasks; i = next++) run(mine, i);
  });
}

// Transpose 16 x 16 words of 32 bits.
inline void transpose(__m512i x[16]) {
  __m512i y[16];
  for (int i = 0; i < 16; i += 2) {
    y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
    x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
    x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
    x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    y[i] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0x88);
    y[i + 4] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0xDD);
    y[i + 8] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0x88);
    y[i + 12] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0xDD);
  }
  for (int i = 0; i < 4; ++i) {
    x[i] = _mm512_shuffle_i32x4(y[i], y[i + 8], 0x88);
    x[i + 8] = _mm512_shuffle_i32x4(y[i], y[i + 8], 0xDD);
    x[i + 4] = _mm512_shuffle_i32x4(y[i + 4], y[i + 12], 0x88);
    x[i + 12] = _mm512_shuffle_i32x4(y[i + 4], y[i + 12], 0xDD);
  }
}

// Up to 16 words of a row from element `d` on, zeros behind its end.
inline __m512i load_words(const float* row, int64_t d, int64_t depth) {
  const auto n = static_cast<uint32_t>(std::min<int64_t>(depth - d, 16));
  return _mm512_maskz_loadu_epi32(static_cast<__mmask16>((1U << n) - 1), row + d);
}

inline __m512i load_words(const at::BFloat16* row, int64_t d, int64_t depth) {
  const auto n = static_cast<uint32_t>(std::min<int64_t>(depth - d, 32));
  return _mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << n) - 1), row + d);
}

// softcap(u + bias) / temperature with softcap(u) = c tanh(u / c), then -inf where the mask is 0.
struct LogitMap {
  const float* bias;    // or null
  const uint8_t* mask;  // or null
  float temperature;
  float softcap;  // 0: none

  LogitMap(const Inputs& in, int64_t start)
      : bias(in.bias == nullptr ? nullptr : in.bias + start),
        mask(in.mask == nullptr ? nullptr : in.mask + start),
        temperature(in.temperature),
        softcap(in.softcap) {}

  void apply(float* z, int64_t width) const {
    if (bias != nullptr || softcap != 0.0F || temperature != 1.0F) transform(z, width);
    if (mask != nullptr) hide(z, width);
  }

 private:
  void transform(float* z, int64_t width) const {
    using Vec = at::vec::Vectorized<float>;
    for (int64_t v = 0; v < width; v += Vec::size()) {
      const int64_t n = std::min<int64_t>(Vec::size(), width - v);
      Vec x = Vec::loadu(z + v, n);
      if (bias != nullptr) x = x + Vec::loadu(bias + v, n);
      if (softcap != 0.0F) x = (x / Vec(softcap)).tanh() * Vec(softcap);
      if (temperature != 1.0F) x = x / Vec(temperature);
      x.store(z + v, n);
    }
  }

  void hide(float* z, int64_t width) const {
    for (int64_t v = 0; v < width; v += LANES) {
      const __m128i counts = _mm_maskz_loadu_epi8(lanes_before(width - v), mask + v);
      const __mmask16 hidden = _mm_testn_epi8_mask(counts, counts) & lanes_before(width - v);
      _mm512_mask_storeu_ps(z + v, hidden, _mm512_set1_ps(-INF));
    }
  }
};

}  // namespace sharpen
