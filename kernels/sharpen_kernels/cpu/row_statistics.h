// What one row of a tile of logits leaves behind: the fields of `Partial` in `_rows.py`.
//
// Compiled without contraction and without fast-math: every statistic is the same instructions
// whatever else is asked for, so its bits do not depend on the company it is computed in.
#pragma once

#include "best_columns.h"
#include "exp.h"
#include "tile.h"

namespace sharpen {

constexpr int WAYS = 4;  // sums side by side, so that no addition waits for the one before
// a masked column is exp 0 times this, and 0 * -inf would be NaN
constexpr float FAR = -1e3F;
// the square of less is below the smallest normal number, and nothing beside the 1 of the maximum
constexpr float LOWEST_SQUARED = 1e-18F;

// Fields of `Partial` for rows, or for segments and rows; null where not asked for.
struct Partials {
  float* top;
  float* mass;
  float* spread;
  float* square;
  float* squares;
  float* powers;
  float* total;
  float* n_valid;
  int32_t* column;
  float* second;
  float* best;  // k beside each other, as the next
  int32_t* best_column;
};

inline float shift_of(float top) { return top == -INF ? 0.0F : top; }

// `run(first, lanes, way)` for every 16 neighbouring columns.
template <typename Run>
inline void each_vector(int64_t width, const Run& run) {
  int64_t v = 0;
  for (; v + WAYS * LANES <= width; v += WAYS * LANES) {
    for (int i = 0; i < WAYS; ++i) run(v + i * LANES, static_cast<__mmask16>(0xFFFF), i);
  }
  for (; v < width; v += LANES) run(v, lanes_before(width - v), 0);
}

// Logits from `z` on, -inf in the other lanes.
inline __m512 load_logits(const float* z, __mmask16 lanes) {
  return _mm512_mask_loadu_ps(_mm512_set1_ps(-INF), lanes, z);
}

struct Sums {
  __m512 of[WAYS] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(),
                     _mm512_setzero_ps()};

  float value() const {
    const __m512 low = _mm512_add_ps(of[0], of[1]);
    return _mm512_reduce_add_ps(_mm512_add_ps(low, _mm512_add_ps(of[2], of[3])));
  }
};

// Largest of the logits, but for the column `without`. A NaN is passed over: the mass shows it.
inline float largest(const float* z, int64_t width, int64_t without = -1) {
  __m512 tops[WAYS];
  for (auto& top : tops) top = _mm512_set1_ps(-INF);
  const int64_t from = without / LANES * LANES;
  each_vector(width, [&](int64_t v, __mmask16 lanes, int i) {
    if (without >= 0 && v == from) lanes &= static_cast<__mmask16>(~(1U << (without - from)));
    // max returns its second operand where the first is NaN
    tops[i] = _mm512_max_ps(load_logits(z + v, lanes), tops[i]);
  });
  const __m512 low = _mm512_max_ps(tops[0], tops[1]);
  return _mm512_reduce_max_ps(_mm512_max_ps(low, _mm512_max_ps(tops[2], tops[3])));
}

// top, mass, spread and total in two passes; with KEEP the exponentials stay in `e`.
template <bool SPREAD, bool TOTAL, bool KEEP>
void row_sums(const float* z, int64_t width, const Partials& out, int64_t at, float* e) {
  const float top = largest(z, width);
  const __m512 shift = _mm512_set1_ps(shift_of(top));
  Sums mass;
  Sums spread;
  Sums total;
  each_vector(width, [&](int64_t v, __mmask16 lanes, int i) {
    const __m512 gap = _mm512_sub_ps(load_logits(z + v, lanes), shift);
    const __m512 x = exp_of_nonpositive(gap);
    mass.of[i] = _mm512_add_ps(mass.of[i], x);
    if (SPREAD) {
      const __m512 near = _mm512_max_ps(_mm512_set1_ps(FAR), gap);
      spread.of[i] = _mm512_fmadd_ps(x, near, spread.of[i]);
    }
    if (TOTAL) total.of[i] = _mm512_mask_add_ps(total.of[i], lanes, total.of[i], gap);
    if (KEEP) _mm512_mask_storeu_ps(e + v, lanes, x);
  });
  out.top[at] = top;
  out.mass[at] = mass.value();
  if (SPREAD) out.spread[at] = spread.value();
  if (TOTAL) out.total[at] = total.value();
}

// Sum of z - top over the columns above -inf, and their number: for the row that has others.
inline void total_of_unmasked(const float* z, int64_t width, float top, float* total,
                              float* n_valid) {
  const __m512 shift = _mm512_set1_ps(shift_of(top));
  Sums sum;
  int64_t n = 0;
  each_vector(width, [&](int64_t v, __mmask16 lanes, int i) {
    const __m512 x = load_logits(z + v, lanes);
    const __mmask16 counts = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-INF), _CMP_NEQ_UQ);
    sum.of[i] = _mm512_mask_add_ps(sum.of[i], counts, sum.of[i], _mm512_sub_ps(x, shift));
    n += __builtin_popcount(counts);
  });
  *total = sum.value();
  *n_valid = static_cast<float>(n);
}

// Sum of e (z - top - mean)^2.
inline float sum_of_squares_about(const float* z, const float* e, int64_t width, float top,
                                  float mean) {
  const __m512 shift = _mm512_set1_ps(shift_of(top));
  Sums sum;
  each_vector(width, [&](int64_t v, __mmask16 lanes, int i) {
    const __m512 gap = _mm512_sub_ps(load_logits(z + v, lanes), shift);
    const __m512 apart =
        _mm512_sub_ps(_mm512_max_ps(_mm512_set1_ps(FAR), gap), _mm512_set1_ps(mean));
    const __m512 weighted = _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, e + v), apart);
    sum.of[i] = _mm512_fmadd_ps(weighted, apart, sum.of[i]);
  });
  return sum.value();
}

// Sum of e^2.
inline float sum_of_squares(const float* e, int64_t width) {
  Sums sum;
  each_vector(width, [&](int64_t v, __mmask16 lanes, int i) {
    const __m512 x = _mm512_maskz_loadu_ps(lanes, e + v);
    const __mmask16 counts = _mm512_cmp_ps_mask(x, _mm512_set1_ps(LOWEST_SQUARED), _CMP_GE_OQ);
    sum.of[i] = _mm512_mask3_fmadd_ps(x, x, sum.of[i], counts);
  });
  return sum.value();
}

// Sum of exp(order (z - top)).
inline float sum_of_powers(const float* z, int64_t width, float top, float order) {
  const __m512 shift = _mm512_set1_ps(shift_of(top));
  Sums sum;
  each_vector(width, [&](int64_t v, __mmask16 lanes, int i) {
    const __m512 gap = _mm512_sub_ps(load_logits(z + v, lanes), shift);
    const __m512 power = exp_of_nonpositive(_mm512_mul_ps(_mm512_set1_ps(order), gap));
    sum.of[i] = _mm512_add_ps(sum.of[i], power);
  });
  return sum.value();
}

// Lowest column that holds `top`; 0 where none does.
inline int64_t first_of(const float* z, int64_t width, float top) {
  for (int64_t v = 0; v < width; v += LANES) {
    const __mmask16 lanes = lanes_before(width - v);
    const __m512 x = _mm512_maskz_loadu_ps(lanes, z + v);
    const __mmask16 hit = _mm512_mask_cmp_ps_mask(lanes, x, _mm512_set1_ps(top), _CMP_EQ_OQ);
    if (hit != 0) return v + __builtin_ctz(hit);
  }
  return 0;
}

// Columns that come ahead of a target with logit `own`, `left` columns from the first: those of
// larger logits, and those of equal ones further left; masked ones never do.
inline int64_t count_ahead(const float* z, int64_t width, float own, int64_t left) {
  if (own == -INF) left = 0;
  const __m512 wanted = _mm512_set1_ps(own);
  const __m512i one = _mm512_set1_epi32(1);
  __m512i n = _mm512_setzero_si512();
  each_vector(width, [&](int64_t v, __mmask16 lanes, int) {
    const __m512 x = load_logits(z + v, lanes);
    const __mmask16 larger = _mm512_cmp_ps_mask(x, wanted, _CMP_GT_OQ);
    const __mmask16 equal = _mm512_mask_cmp_ps_mask(lanes_before(left - v), x, wanted, _CMP_EQ_OQ);
    n = _mm512_mask_add_epi32(n, static_cast<__mmask16>(larger | equal), n, one);
  });
  return _mm512_reduce_add_epi32(n);
}

// Every field asked for, of one row and segment at a time.
class RowStatistics {
 public:
  // `e` is memory for a segment's exponentials.
  RowStatistics(const Partials& out, float renyi_order, float* e)
      : out_(out), order_(renyi_order), e_(e), sums_(choose(out)) {}

  // Statistics of `width` logits, written at index `at` of each field; `best` is the row's own.
  void reduce(const float* z, int64_t width, int64_t first_column, int64_t at,
              const BestColumns& best) const {
    sums_(z, width, out_, at, e_);
    const float top = out_.top[at];
    if (out_.total != nullptr) {
      out_.n_valid[at] = static_cast<float>(width);
      if (!std::isfinite(out_.total[at])) {
        total_of_unmasked(z, width, top, out_.total + at, out_.n_valid + at);
      }
    }
    if (out_.square != nullptr) {
      const float mass = out_.mass[at];
      const float mean = mass == 0.0F ? 0.0F : out_.spread[at] / mass;
      out_.square[at] = sum_of_squares_about(z, e_, width, top, mean);
    }
    if (out_.squares != nullptr) out_.squares[at] = sum_of_squares(e_, width);
    if (out_.powers != nullptr) out_.powers[at] = sum_of_powers(z, width, top, order_);
    if (out_.column != nullptr) {
      const int64_t column = first_of(z, width, top);
      out_.column[at] = static_cast<int32_t>(first_column + column);
      if (out_.second != nullptr) out_.second[at] = largest(z, width, column);
    }
    if (out_.best != nullptr && top > best.least()) best.keep(z, width, first_column);
  }

 private:
  using RowSums = void (*)(const float*, int64_t, const Partials&, int64_t, float*);

  static RowSums choose(const Partials& p) {
    const bool s = p.spread != nullptr;
    const bool t = p.total != nullptr;
    if (p.square != nullptr || p.squares != nullptr) {
      if (s) return t ? row_sums<true, true, true> : row_sums<true, false, true>;
      return t ? row_sums<false, true, true> : row_sums<false, false, true>;
    }
    if (s) return t ? row_sums<true, true, false> : row_sums<true, false, false>;
    return t ? row_sums<false, true, false> : row_sums<false, false, false>;
  }

  const Partials& out_;
  const float order_;
  float* const e_;
  const RowSums sums_;
};

}  // namespace sharpen
