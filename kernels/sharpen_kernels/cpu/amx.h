// Products by the matrix units of a CPU that has them (AMX), in fp32 as well.
//
// They multiply bf16 and sum in fp32, 32 deep in one instruction. An fp32 number is the sum of
// three bf16 numbers, an fp16 number that of two, without a rest. Of the nine products of two fp32
// numbers the six of the order of 2^-18 and above are taken, the others are below half a unit in
// the last place; of two fp16 numbers all four. Six such products take half the time of one fp32
// product, and sum in blocks, so that less is rounded. An infinite factor gives NaN.
#pragma once

#include <type_traits>

#include "tile.h"

#if defined(__AVX512F__) && defined(__GNUC__) && !defined(__clang__) && \
    __has_include(<amxtileintrin.h>)
#define SHARPEN_AMX 1
#include <sys/syscall.h>
#include <unistd.h>

#pragma GCC push_options
#pragma GCC target("amx-tile,amx-bf16,avx512bf16")

namespace sharpen {

// T is the inputs' type. Factors are tiles of 1 KiB: left ones of 16 rows, 32 deep; right ones of
// 16 columns, 32 deep in pairs. Tiles follow one another in depth, the terms of a sum side by side.
template <typename T>
struct Amx {
  using Element = T;
  using Word = uint16_t;  // the bits of a bf16
  static constexpr int64_t TILE = 512;
  static constexpr int64_t DEEP = 32;   // of a tile
  static constexpr int64_t SIDE = 32;   // of one product: two tiles by two
  static constexpr bool IS_BF16 = std::is_same_v<T, at::BFloat16>;
  static constexpr int TERMS = IS_BF16 ? 1 : sizeof(T) == 2 ? 2 : 3;  // of an input
  static constexpr int GRADIENT_TERMS = sizeof(T) == 2 ? 2 : 3;       // of a gradient of a logit
  // tiles of depth of one product: each rounds its sums several times, so they are kept short
  static constexpr int64_t DEPTH_TILES = IS_BF16 ? 8 : 16;

  static constexpr int64_t TILE_COLUMNS = IS_BF16 ? 256 : 128;  // of backward, at a time

  struct Session {
    Session() {
      // static: the intrinsic does not say that it reads all of it
      alignas(64) static constexpr struct {
        uint8_t palette = 1;
        uint8_t start_row = 0;
        uint8_t reserved[14] = {};
        uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
      } shapes;
      _tile_loadconfig(&shapes);
    }
    ~Session() { _tile_release(); }
  };

  static int64_t tiles(int64_t depth) { return round_up(depth, DEEP) / DEEP; }
  static int64_t left_size(int64_t rows, int64_t depth) {
    return rows / 16 * tiles(depth) * TERMS * TILE;
  }
  static int64_t right_size(int64_t depth, int64_t n) {
    return round_up(n, PANEL) / 16 * tiles(depth) * TERMS * TILE;
  }
  static int64_t gradient_size(int64_t rows, int64_t k) {
    return rows / 16 * tiles(k) * GRADIENT_TERMS * TILE;
  }

  static void pack_left(const T* x, int64_t stride, int64_t n, int64_t depth, Word* out) {
    for (int64_t r = 0; r < BLOCK; r += 16) {
      for (int64_t d = 0; d < depth; d += DEEP, out += TERMS * TILE) {
        for (int64_t i = 0; i < 16; ++i) {
          const bool counts = r + i < n;
          Terms terms(counts ? x + (r + i) * stride + d : x, counts ? depth - d : 0);
          for (int term = 0; term < TERMS; ++term) {
            _mm512_storeu_si512(out + term * TILE + i * DEEP, terms.next());
          }
        }
      }
    }
  }

  static void pack_columns(const T* weight, int64_t stride, int64_t n, int64_t depth, Word* out) {
    for (int64_t v = 0; v < round_up(n, PANEL); v += 16) {
      for (int64_t d = 0; d < depth; d += DEEP) {
        __m512i x[TERMS][16];
        for (int64_t i = 0; i < 16; ++i) {
          const bool counts = v + i < n;
          Terms terms(counts ? weight + (v + i) * stride + d : weight, counts ? depth - d : 0);
          for (int term = 0; term < TERMS; ++term) x[term][i] = terms.next();
        }
        for (int term = 0; term < TERMS; ++term, out += TILE) {
          transpose(x[term]);
          for (int i = 0; i < 16; ++i) _mm512_storeu_si512(out + i * 32, x[term][i]);
        }
      }
    }
  }

  static void pack_rows(const T* x, int64_t stride, int64_t n, int64_t depth,
                        const uint8_t* active, Word* out, int64_t at, int64_t k) {
    const auto counts = [&](int64_t r) { return r < n && (active == nullptr || active[r] != 0); };
    for (int64_t r = 0; r < PANEL; r += 2) {
      const T* even = counts(r) ? x + r * stride : nullptr;
      const T* odd = counts(r + 1) ? x + (r + 1) * stride : nullptr;
      Word* to = out + (at + r) / DEEP * TERMS * TILE + r % DEEP * 16;
      for (int64_t d = 0; d < depth; d += 16, to += tiles(k) * TERMS * TILE) {
        Pairs pairs(even == nullptr ? x : even + d, even == nullptr ? 0 : depth - d,
                    odd == nullptr ? x : odd + d, odd == nullptr ? 0 : depth - d);
        for (int i = 0; i < TERMS; ++i) _mm512_storeu_si512(to + i * TILE, pairs.next());
      }
    }
  }

  static void logits(const Word* left, const Word* right, int64_t depth, int64_t width, float* tile,
                     int64_t stride) {
    const int64_t deep = tiles(depth);
    const int64_t step = deep * TERMS * TILE;
    for (int64_t r = 0; r < BLOCK; r += SIDE) {
      for (int64_t d = 0; d < deep; d += DEPTH_TILES) {
        const Word* a = left + r / 16 * step + d * TERMS * TILE;
        const int64_t n = std::min(DEPTH_TILES, deep - d);
        // the rows to come: the next chunk of these, or the first of the two tiles after
        Ahead ahead(d + n < deep ? a + n * TERMS * TILE : left + (r / 16 + 2) * step, step,
                    TERMS * TILE, round_up(width, SIDE) / SIDE);
        for (int64_t v = 0; v < width; v += SIDE) {
          product<TERMS>(a, step, right + v / 16 * step + d * TERMS * TILE, step, n, d > 0,
                         tile + r * stride + v, stride, SIDE, ahead);
        }
      }
    }
  }

  static void store(Word* gradient, int64_t, int64_t k, int64_t row, int64_t at, __m512 x) {
    Word* out = gradient + (row / 16 * tiles(k) + at / DEEP) * GRADIENT_TERMS * TILE +
                row % 16 * DEEP + at % DEEP;
    for (int i = 0; i < GRADIENT_TERMS; ++i) {
      const __m256i bits = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i * TILE), bits);
      x = _mm512_sub_ps(x, wide(bits));
    }
  }

  static void multiply(const Word* gradient, int64_t, int64_t k, int64_t row, int64_t at, int64_t n,
                       const Word* right, int64_t depth, int64_t from, int64_t to, bool add,
                       float* out) {
    const int64_t left_step = tiles(k) * GRADIENT_TERMS * TILE;
    const int64_t right_step = tiles(k) * TERMS * TILE;
    const int64_t end = (at + n) / DEEP;
    for (int64_t r = 0; r < BLOCK; r += SIDE) {
      const Word* a = gradient + (row + r) / 16 * left_step;
      for (int64_t i = at / DEEP; i < end; i += DEPTH_TILES) {
        const int64_t some = std::min(DEPTH_TILES, end - i);
        const Word* then = a + (i + some < end ? (i + some) * GRADIENT_TERMS * TILE
                                               : 2 * left_step + at / DEEP * GRADIENT_TERMS * TILE);
        Ahead ahead(then, left_step, GRADIENT_TERMS * TILE, round_up(to - from, SIDE) / SIDE);
        for (int64_t d = from; d < to; d += SIDE) {
          product<GRADIENT_TERMS>(a + i * GRADIENT_TERMS * TILE, left_step,
                                  right + d / 16 * right_step + i * TERMS * TILE, right_step, some,
                                  add || i > at / DEEP, out + r * depth + d, depth, to - d, ahead);
        }
      }
    }
  }

 private:
  static __m512 wide(__m256i bits) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  // 16 neighbours, of which n count.
  static __m512 load(const T* x, int64_t n) {
    if constexpr (sizeof(T) == 4) return _mm512_maskz_loadu_ps(lanes_before(n), x);
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes_before(n), x));
  }

  // The terms of 32 neighbours, of which n count, one after another.
  struct Terms {
    __m512i bits;
    __m512 low, high;

    Terms(const T* x, int64_t n) {
      if constexpr (TERMS == 1) {
        bits = n > 0 ? load_words(x, 0, n) : _mm512_setzero_si512();
      } else {
        low = load(x, n);
        high = load(x + LANES, n - LANES);
      }
    }
    __m512i next() {
      if constexpr (TERMS == 1) return bits;
      const __m256i left = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(low));
      const __m256i right = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(high));
      low = _mm512_sub_ps(low, wide(left));
      high = _mm512_sub_ps(high, wide(right));
      return _mm512_inserti64x4(_mm512_castsi256_si512(left), right, 1);
    }
  };

  // The terms of 16 pairs of one row and the next.
  struct Pairs {
    __m512i bits;
    __m512 even, odd;

    Pairs(const T* x, int64_t n, const T* y, int64_t m) {
      if constexpr (TERMS == 1) {
        bits = join(_mm256_maskz_loadu_epi16(lanes_before(n), x),
                    _mm256_maskz_loadu_epi16(lanes_before(m), y));
      } else {
        even = load(x, n);
        odd = load(y, m);
      }
    }
    __m512i next() {
      if constexpr (TERMS == 1) return bits;
      const __m256i low = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(even));
      const __m256i high = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(odd));
      even = _mm512_sub_ps(even, wide(low));
      odd = _mm512_sub_ps(odd, wide(high));
      return join(low, high);
    }
    static __m512i join(__m256i low, __m256i high) {
      return _mm512_or_si512(_mm512_cvtepu16_epi32(low),
                             _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
    }
  };

  // What to fetch from the third cache while products run that do not need it yet: two rows of
  // tiles `step` apart, a share of them at each step in depth of each product.
  struct Ahead {
    const Word* at;
    int64_t step, lines;

    Ahead(const Word* first, int64_t step, int64_t words, int64_t products)
        : at(first), step(step), lines((words / LINE + products - 1) / products) {}
    void fetch() {
      for (int64_t i = 0; i < lines; ++i, at += LINE) {
        _mm_prefetch(at, _MM_HINT_T1);
        _mm_prefetch(at + step, _MM_HINT_T1);
      }
    }

   private:
    static constexpr int64_t LINE = 32;  // words of a cache line
  };

  // c [SIDE, n_columns up to SIDE] += or = n tiles deep of a left factor times those of a right
  // one; a step is from one tile to the next of 16 rows or columns. The smallest products come
  // first.
  template <int LEFT>
  static void product(const Word* a, int64_t a_step, const Word* b, int64_t b_step, int64_t n,
                      bool add, float* c, int64_t stride, int64_t n_columns, Ahead& ahead) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    // the intrinsics do not say that they touch memory
    asm volatile("" ::: "memory");
    for (int64_t i = 0; i < n; ++i, a += LEFT * TILE, b += TERMS * TILE) {
      const auto left = [&](int term) {
        _tile_loadd(4, a + term * TILE, 64);
        _tile_loadd(5, a + a_step + term * TILE, 64);
      };
      const auto right = [&](int term) {
        _tile_loadd(6, b + term * TILE, 64);
        _tile_loadd(7, b + b_step + term * TILE, 64);
      };
      const auto multiply = [] {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      };
      ahead.fetch();
      if constexpr (TERMS == 3) {
        right(0), left(2), multiply();
        left(1), multiply();
        right(1), multiply();
        left(0), multiply();
        right(2), multiply();
        right(0), multiply();
      } else {
        for (int term = LEFT - 1; term >= 0; --term) {
          left(term);
          for (int other = TERMS - 1; other >= 0; --other) {
            if (TERMS > 1 || term == LEFT - 1) right(other);
            multiply();
          }
        }
      }
    }
    if (!add && n_columns >= SIDE) {
      put(c, stride);
      return;
    }
    alignas(64) float sums[SIDE * SIDE];
    put(sums, SIDE);
    for (int64_t r = 0; r < SIDE; ++r) {
      for (int64_t j = 0; j < SIDE; j += LANES) {
        const __mmask16 here = lanes_before(n_columns - j);
        float* at = c + r * stride + j;
        // summed apart: one long chain would round more
        const __m512 before = add ? _mm512_maskz_loadu_ps(here, at) : _mm512_setzero_ps();
        _mm512_mask_storeu_ps(at, here, _mm512_add_ps(before, _mm512_load_ps(sums + r * SIDE + j)));
      }
    }
  }

  static void put(float* c, int64_t stride) {
    _tile_stored(0, c, stride * 4);
    _tile_stored(1, c + 16, stride * 4);
    _tile_stored(2, c + 16 * stride, stride * 4);
    _tile_stored(3, c + 16 * stride + 16, stride * 4);
    asm volatile("" ::: "memory");
  }
};

// Whether the system lets this process use the matrix units; where the CPU has them.
inline bool may_use_amx() {
  constexpr long REQUEST_PERMISSION = 0x1023;
  constexpr long TILE_DATA = 18;
  return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}

}  // namespace sharpen
#pragma GCC pop_options
#endif
