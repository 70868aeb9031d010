// Products by fused multiply-adds in fp32, for a CPU that has nothing faster.
#pragma once

#include "tile.h"

namespace sharpen {

// T is the inputs' type; factors are fp32, so a product of bf16 or fp16 is exact. A left factor is
// [rows, depth], a right one panels [depth, 16]. Every sum is one chain along the depth for each
// piece of it, and the pieces are added up: the same for a row whichever rows are beside it.
template <typename T>
struct Fma {
  using Element = T;
  using Word = float;
  static constexpr int64_t TILE_COLUMNS = 256;  // of backward, at a time
  // Depth of one product: a panel of the right factor stays in the core's first cache. The pieces'
  // sums are added up apart, which halves the error of one long chain.
  static constexpr int64_t DEPTH_BLOCK = 128;
#ifdef __AVX512F__
  static constexpr int ROWS = 12;  // of one step: their sums fill the registers
#else
  static constexpr int ROWS = 6;
#endif
  static constexpr int REST = BLOCK % ROWS;

  struct Session {};

  static int64_t left_size(int64_t rows, int64_t depth) { return rows * depth; }
  static int64_t right_size(int64_t depth, int64_t n) { return depth * round_up(n, PANEL); }
  static int64_t gradient_size(int64_t rows, int64_t k) { return rows * k; }

  // A block of rows as a left factor; those from n on are zeros.
  static void pack_left(const T* x, int64_t stride, int64_t n, int64_t depth, float* out) {
    for (int64_t r = 0; r < n; ++r) {
      each_vector(depth, [&](int64_t d, const auto& here) {
        sharpen::store(out + r * depth + d, load(x + r * stride + d, here), here);
      });
    }
    std::fill(out + n * depth, out + BLOCK * depth, 0.0F);
  }

  // Rows [n, depth] of the weight as columns of a right factor; zeros behind the last.
  static void pack_columns(const T* weight, int64_t stride, int64_t n, int64_t depth, float* out) {
    for (int64_t v = 0; v < round_up(n, PANEL); v += LANES) {
      float* panel = out + v * depth;
      each_vector(depth, [&](int64_t d, const auto& here) {
        Words x[LANES];
        for (int64_t i = 0; i < LANES; ++i) {
          x[i] = v + i < n ? as_words(load(weight + (v + i) * stride + d, here)) : zero_words();
        }
        transpose(x);
        const int64_t some = std::min<int64_t>(LANES, depth - d);
        for (int64_t i = 0; i < some; ++i) store_bits(panel + (d + i) * LANES, x[i]);
      });
    }
  }

  // Rows [n, depth] as the rows from `at` to `at + PANEL` of a right factor [k, depth]; those from
  // n on, and not `active` (null: all are), are zeros.
  static void pack_rows(const T* x, int64_t stride, int64_t n, int64_t depth,
                        const uint8_t* active, float* out, int64_t at, int64_t k) {
    for (int64_t r = 0; r < PANEL; ++r) {
      const bool counts = r < n && (active == nullptr || active[r] != 0);
      each_vector(depth, [&](int64_t d, const auto& here) {
        const Lanes row = counts ? load(x + r * stride + d, here) : zeros();
        sharpen::store(out + d * k + (at + r) * LANES, row);
      });
    }
  }

  // `width` columns times one block of rows: logits, rows of the tile `stride` apart.
  static void logits(const float* left, const float* right, int64_t depth, int64_t width,
                     float* tile, int64_t stride) {
    for (int64_t d = 0; d < depth; d += DEPTH_BLOCK) {
      const int64_t n = std::min(DEPTH_BLOCK, depth - d);
      for (int64_t v = 0; v < width; v += LANES) {
        block(left + d, depth, right + v * depth + d * LANES, n, d > 0, tile + v, stride, All());
      }
    }
  }

  // 16 neighbours from (row, at) on of a gradient [rows, k].
  static void store(float* gradient, int64_t, int64_t k, int64_t row, int64_t at, Lanes x) {
    sharpen::store(gradient + row * k + at, x);
  }

  // out [BLOCK, depth] += or = rows of the gradient from `row` on, n of their k from `at` on, times
  // as many rows of a right factor [k, depth]; the columns from `from` to `to` of it.
  static void multiply(const float* gradient, int64_t, int64_t k, int64_t row, int64_t at,
                       int64_t n, const float* right, int64_t depth, int64_t from, int64_t to,
                       bool add, float* out) {
    const float* left = gradient + row * k + at;
    for (int64_t i = 0; i < n; i += DEPTH_BLOCK) {
      const int64_t some = std::min(DEPTH_BLOCK, n - i);
      for (int64_t d = from; d < to; d += LANES) {
        const float* panel = right + d * k + (at + i) * LANES;
        const bool onto = add || i > 0;
        if (to - d >= LANES) {
          block(left + i, k, panel, some, onto, out + d, depth, All());
        } else {
          block(left + i, k, panel, some, onto, out + d, depth, First(to - d));
        }
      }
    }
  }

 private:
  template <typename Run>
  static void each_vector(int64_t depth, const Run& run) {
    int64_t d = 0;
    for (; d + LANES <= depth; d += LANES) run(d, All());
    if (d < depth) run(d, First(depth - d));
  }

  // c [BLOCK, 16] += or = a [BLOCK, n] b [n, 16].
  template <typename Here>
  static void block(const float* a, int64_t stride, const float* b, int64_t n, bool add, float* c,
                    int64_t c_stride, const Here& here) {
    for (int64_t r = 0; r + ROWS <= BLOCK; r += ROWS) {
      product<ROWS>(a + r * stride, stride, b, n, add, c + r * c_stride, c_stride, here);
    }
    constexpr int64_t LAST = BLOCK - REST;
    product<REST>(a + LAST * stride, stride, b, n, add, c + LAST * c_stride, c_stride, here);
  }

  template <int N, typename Here>
  static void product(const float* a, int64_t stride, const float* b, int64_t n, bool add, float* c,
                      int64_t c_stride, const Here& here) {
    Lanes sums[N];
    for (auto& sum : sums) sum = zeros();
    for (int64_t k = 0; k < n; ++k) {
      const Lanes right = load(b + k * LANES);
#pragma GCC unroll 16
      for (int r = 0; r < N; ++r) sums[r] = fma(splat(a[r * stride + k]), right, sums[r]);
    }
    for (int r = 0; r < N; ++r) {
      float* out = c + r * c_stride;
      sharpen::store(out, add ? load(out, here) + sums[r] : sums[r], here);
    }
  }
};

}  // namespace sharpen
