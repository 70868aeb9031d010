// A segment of the weight packed for the micro-kernel, and what follows the product.
#pragma once

#include <ATen/cpu/vec/vec.h>
#include <c10/util/BFloat16.h>
#include <immintrin.h>

#include <algorithm>
#include <cstdint>

namespace sharpen {

#ifndef SHARPEN_PANEL
#define SHARPEN_PANEL 64
#endif
// Columns of one product: the micro-kernel reads a panel of the packed weight as one stream.
constexpr int64_t PANEL = SHARPEN_PANEL;

// Depth of packed rows: the dot-product units take bf16 in pairs.
template <typename T>
int64_t padded_depth(int64_t depth) {
  return sizeof(T) == 2 ? (depth + 1) / 2 * 2 : depth;
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

// Rows [width, depth] of the weight as panels [depth, PANEL], bf16 in pairs [depth / 2, PANEL, 2];
// zeros behind the last column.
template <typename T>
void pack(const T* weight, int64_t stride, int64_t width, int64_t depth, T* out) {
  constexpr int64_t WORD = 4 / sizeof(T);  // elements
  const int64_t words = padded_depth<T>(depth) / WORD;
  for (int64_t v = 0; v < width; v += 16) {
    auto* panel = reinterpret_cast<int32_t*>(out) + v / PANEL * PANEL * words + v % PANEL;
    for (int64_t k = 0; k < words; k += 16) {
      __m512i x[16];
      for (int64_t i = 0; i < 16; ++i) {
        x[i] = v + i < width ? load_words(weight + (v + i) * stride, k * WORD, depth)
                             : _mm512_setzero_si512();
      }
      transpose(x);
      const int64_t n = std::min<int64_t>(16, words - k);
      for (int64_t i = 0; i < n; ++i) _mm512_storeu_si512(panel + (k + i) * PANEL, x[i]);
    }
  }
  for (int64_t v = (width + 15) / 16 * 16; v % PANEL != 0; v += 16) {
    auto* panel = reinterpret_cast<int32_t*>(out) + v / PANEL * PANEL * words + v % PANEL;
    for (int64_t k = 0; k < words; ++k) _mm512_storeu_si512(panel + k * PANEL, _mm512_setzero_si512());
  }
}

// softcap(u + bias) / temperature with softcap(u) = c tanh(u / c).
struct LogitMap {
  const float* bias;  // or null
  float temperature;
  float softcap;  // 0: none

  void apply(float* z, int64_t width) const {
    using Vec = at::vec::Vectorized<float>;
    if (bias == nullptr && softcap == 0.0F && temperature == 1.0F) return;
    for (int64_t v = 0; v < width; v += Vec::size()) {
      const int64_t n = std::min<int64_t>(Vec::size(), width - v);
      Vec x = Vec::loadu(z + v, n);
      if (bias != nullptr) x = x + Vec::loadu(bias + v, n);
      if (softcap != 0.0F) x = (x / Vec(softcap)).tanh() * Vec(softcap);
      if (temperature != 1.0F) x = x / Vec(temperature);
      x.store(z + v, n);
    }
  }
};

}  // namespace sharpen
