// Products by oneDNN's micro-kernel, as torch carries it: fp32, and pairs of bf16 summed in fp32.
#pragma once

#include <ATen/native/CPUBlas.h>

#include <exception>
#include <vector>

#include "tile.h"

#ifdef __AVX512F__
namespace sharpen {

// T is the inputs' type. A left factor is [rows, depth], a right one panels [depth, PANEL], bf16 in
// pairs [depth / 2, PANEL, 2]. The gradient of a logit as a left factor is T itself, for bf16 the
// sum of two (16 bits of it are kept).
template <typename T>
struct OneDnn {
  using Element = T;
  using Word = T;
  static constexpr int64_t PER_WORD = 4 / sizeof(T);  // elements beside each other in 32 bits
  // Depth of one product. The blocks' sums are added up apart, which at a depth of 1000 makes the
  // error of one long chain three times smaller.
  static constexpr int64_t DEPTH_BLOCK = 256;
  static constexpr int64_t TILE_COLUMNS = 256;  // of backward, at a time
  static constexpr int64_t SUMMED = 128;        // of those or of rows, in one chain

  struct Session {
    ~Session() { at::native::cpublas::brgemm_release(sizeof(T) == 2); }
  };

  static int64_t padded(int64_t depth) { return round_up(depth, PER_WORD); }
  static int64_t left_stride(int64_t depth) { return round_up(depth, 64 / sizeof(T)); }
  static int64_t left_size(int64_t rows, int64_t depth) { return rows * left_stride(depth); }
  static int64_t right_size(int64_t depth, int64_t n) { return padded(depth) * round_up(n, PANEL); }
  static int64_t gradient_size(int64_t rows, int64_t k) { return rows * k * PER_WORD; }

  // A block of rows as a left factor; those from n on are zeros.
  static void pack_left(const T* x, int64_t stride, int64_t n, int64_t depth, T* out) {
    const int64_t wide = left_stride(depth);
    std::memset(static_cast<void*>(out), 0, BLOCK * wide * sizeof(T));
    for (int64_t r = 0; r < n; ++r) {
      std::memcpy(static_cast<void*>(out + r * wide), x + r * stride, depth * sizeof(T));
    }
  }

  // Rows [n, depth] of the weight as columns of a right factor; zeros behind the last.
  static void pack_columns(const T* weight, int64_t stride, int64_t n, int64_t depth, T* out) {
    const int64_t words = padded(depth) / PER_WORD;
    for (int64_t v = 0; v < round_up(n, PANEL); v += 16) {
      auto* panel = reinterpret_cast<int32_t*>(out) + v / PANEL * PANEL * words + v % PANEL;
      for (int64_t k = 0; k < words; k += 16) {
        __m512i x[16];
        for (int64_t i = 0; i < 16; ++i) {
          x[i] = v + i < n ? load_words(weight + (v + i) * stride, k * PER_WORD, depth)
                           : _mm512_setzero_si512();
        }
        transpose(x);
        const int64_t some = std::min<int64_t>(16, words - k);
        for (int64_t i = 0; i < some; ++i) _mm512_storeu_si512(panel + (k + i) * PANEL, x[i]);
      }
    }
  }

  // Rows [n, depth] as the rows from `at` to `at + PANEL` of a right factor [k, depth]; those from
  // n on, and not `active` (null: all are), are zeros.
  static void pack_rows(const T* x, int64_t stride, int64_t n, int64_t depth,
                        const uint8_t* active, T* out, int64_t at, int64_t k) {
    const auto row = [&](int64_t r, int64_t d) {
      const bool counts = r < n && (active == nullptr || active[r] != 0);
      const __mmask16 read = counts ? lanes_before(depth - d) : 0;
      const T* from = x + (counts ? r * stride + d : 0);
      if constexpr (sizeof(T) == 4) {
        return _mm512_maskz_loadu_epi32(read, from);
      } else {
        return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(read, from));
      }
    };
    for (int64_t r = 0; r < PANEL; r += PER_WORD) {
      for (int64_t d = 0; d < depth; d += 16) {
        __m512i word = row(r, d);
        if constexpr (PER_WORD == 2) {
          word = _mm512_or_si512(word, _mm512_slli_epi32(row(r + 1, d), 16));
        }
        T* panel = out + d / PANEL * k * PANEL + (at + r) * PANEL + d % PANEL * PER_WORD;
        _mm512_storeu_si512(panel, word);
      }
    }
  }

  // `width` columns times one block of rows: logits, rows of the tile `stride` apart.
  static void logits(const T* left, const T* right, int64_t depth, int64_t width, float* tile,
                     int64_t stride) {
    const int64_t deep = padded(depth);
    for (int64_t d = 0; d < deep; d += DEPTH_BLOCK) {
      const int64_t n = std::min(DEPTH_BLOCK, deep - d);
      for (int64_t v = 0; v < width; v += PANEL) {
        const int64_t wide = std::min(PANEL, round_up(width - v, LANES));
        at::native::cpublas::brgemm(BLOCK, wide, n, left_stride(depth), PANEL, stride, d > 0,
                                    left + d, right + v * deep + d * PANEL, tile + v,
                                    sizeof(T) == 2);
      }
    }
  }

  // 16 neighbours from (row, at) on of a gradient [rows, k].
  static void store(T* gradient, int64_t rows, int64_t k, int64_t row, int64_t at, Lanes x) {
    T* out = gradient + row * k + at;
    if constexpr (sizeof(T) == 4) {
      sharpen::store(out, x);
    } else {
      const Words top = bf16_bits(x);
      const Lanes rest = x - as_lanes(_mm512_slli_epi32(top, 16));
      store_half(out, top);
      store_half(out + rows * k, bf16_bits(rest));
    }
  }

  // out [BLOCK, depth] += or = rows of the gradient from `row` on, n of their k from `at` on, times
  // as many rows of a right factor [k, depth]; the columns from `from` to `to` of it.
  static void multiply(const T* gradient, int64_t rows, int64_t k, int64_t row, int64_t at,
                       int64_t n, const T* right, int64_t depth, int64_t from, int64_t to,
                       bool add, float* out) {
    const T* left = gradient + row * k + at;
    for (int64_t i = 0; i < n; i += SUMMED) {
      for (int64_t d = from; d < to; d += PANEL) {
        const T* panel = right + d / PANEL * k * PANEL + (at + i) * PANEL;
        const auto brgemm = [&](const T* x, bool onto) {
          at::native::cpublas::brgemm(BLOCK, std::min(PANEL, to - d), std::min(SUMMED, n - i), k,
                                      PANEL, depth, onto, x + i, panel, out + d, sizeof(T) == 2);
        };
        brgemm(left, add || i > 0);
        if constexpr (sizeof(T) == 2) brgemm(left + rows * k, true);
      }
    }
  }

 private:
  static void store_half(T* out, Words bits) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtepi32_epi16(bits));
  }
};

// Whether it multiplies pairs of bf16 here: tried on a block of whole numbers.
inline bool onednn_multiplies() {
  using M = OneDnn<at::BFloat16>;
  try {
    const M::Session session;
    constexpr int64_t DEPTH = 6;
    std::vector<at::BFloat16> x(BLOCK * DEPTH);
    for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i % 7) - 3.0F;
    std::vector<at::BFloat16> left(M::left_size(BLOCK, DEPTH));
    std::vector<at::BFloat16> right(M::right_size(DEPTH, PANEL));
    std::vector<float> z(BLOCK * PANEL);
    M::pack_left(x.data(), DEPTH, BLOCK, DEPTH, left.data());
    M::pack_columns(x.data(), DEPTH, PANEL, DEPTH, right.data());
    M::logits(left.data(), right.data(), DEPTH, PANEL, z.data(), PANEL);
    for (int64_t i = 0; i < BLOCK * PANEL; ++i) {
      float sum = 0.0F;
      for (int64_t d = 0; d < DEPTH; ++d) {
        const float row = x[i / PANEL * DEPTH + d];
        const float column = x[i % PANEL * DEPTH + d];
        sum += row * column;
      }
      if (z[i] != sum) return false;
    }
    return true;
  } catch (const std::exception&) {
    return false;  // this CPU or build of torch has no such kernel
  }
}

}  // namespace sharpen
#endif
