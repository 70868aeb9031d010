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
    for (int i = 0; i < WAYS; ++i) run(v + i * LANES, All(), i);
  }
  for (; v < width; v += LANES) run(v, First(width - v), 0);
}

// Logits from `z` on, -inf in the other lanes.
template <typename Here>
inline Lanes load_logits(const float* z, const Here& lanes) {
  return load(z, lanes, splat(-INF));
}

struct Sums {
  Lanes of[WAYS] = {zeros(), zeros(), zeros(), zeros()};

  float value() const { return sum((of[0] + of[1]) + (of[2] + of[3])); }
};

// Largest of the logits, but for the column `without`. A NaN is passed over: the mass shows it.
inline float largest(const float* z, int64_t width, int64_t without = -1) {
  const Lanes lowest = splat(-INF);
  Lanes tops[WAYS] = {lowest, lowest, lowest, lowest};
  const int64_t from = without / LANES * LANES;
  each_vector(width, [&](int64_t v, const auto& lanes, int i) {
    Lanes x = load_logits(z + v, lanes);
    if (without >= 0 && v == from) x = pick(only(without - from), lowest, x);
    // the second operand where the first is NaN
    tops[i] = larger(x, tops[i]);
  });
  return largest_of(larger(larger(tops[0], tops[1]), larger(tops[2], tops[3])));
}

// top, mass, spread and total in two passes; with KEEP the exponentials stay in `e`.
template <bool SPREAD, bool TOTAL, bool KEEP>
void row_sums(const float* z, int64_t width, const Partials& out, int64_t at, float* e) {
  const float top = largest(z, width);
  const Lanes shift = splat(shift_of(top));
  Sums mass;
  Sums spread;
  Sums total;
  each_vector(width, [&](int64_t v, const auto& lanes, int i) {
    const Lanes gap = load_logits(z + v, lanes) - shift;
    const Lanes x = exp_of_nonpositive(gap);
    mass.of[i] = mass.of[i] + x;
    if (SPREAD) spread.of[i] = fma(x, larger(splat(FAR), gap), spread.of[i]);
    if (TOTAL) total.of[i] = add_where(lanes, total.of[i], gap);
    if (KEEP) store(e + v, x, lanes);
  });
  out.top[at] = top;
  out.mass[at] = mass.value();
  if (SPREAD) out.spread[at] = spread.value();
  if (TOTAL) out.total[at] = total.value();
}

// Sum of z - top over the columns above -inf, and their number: for the row that has others.
inline void total_of_unmasked(const float* z, int64_t width, float top, float* total,
                              float* n_valid) {
  const Lanes shift = splat(shift_of(top));
  Sums sums;
  int64_t n = 0;
  each_vector(width, [&](int64_t v, const auto& lanes, int i) {
    const Lanes x = load_logits(z + v, lanes);
    const Mask counts = is_not(x, splat(-INF));
    sums.of[i] = add_where(counts, sums.of[i], x - shift);
    n += __builtin_popcount(bits_of(counts));
  });
  *total = sums.value();
  *n_valid = static_cast<float>(n);
}

// Sum of e (z - top - mean)^2.
inline float sum_of_squares_about(const float* z, const float* e, int64_t width, float top,
                                  float mean) {
  const Lanes shift = splat(shift_of(top));
  Sums sums;
  each_vector(width, [&](int64_t v, const auto& lanes, int i) {
    const Lanes gap = load_logits(z + v, lanes) - shift;
    const Lanes apart = larger(splat(FAR), gap) - splat(mean);
    sums.of[i] = fma(load(e + v, lanes) * apart, apart, sums.of[i]);
  });
  return sums.value();
}

// Sum of e^2.
inline float sum_of_squares(const float* e, int64_t width) {
  Sums sums;
  each_vector(width, [&](int64_t v, const auto& lanes, int i) {
    const Lanes x = load(e + v, lanes);
    sums.of[i] = pick(is_at_least(x, splat(LOWEST_SQUARED)), fma(x, x, sums.of[i]), sums.of[i]);
  });
  return sums.value();
}

// Sum of exp(order (z - top)).
inline float sum_of_powers(const float* z, int64_t width, float top, float order) {
  const Lanes shift = splat(shift_of(top));
  Sums sums;
  each_vector(width, [&](int64_t v, const auto& lanes, int i) {
    const Lanes gap = load_logits(z + v, lanes) - shift;
    sums.of[i] = sums.of[i] + exp_of_nonpositive(splat(order) * gap);
  });
  return sums.value();
}

// Lowest column that holds `top`; 0 where none does.
inline int64_t first_of(const float* z, int64_t width, float top) {
  for (int64_t v = 0; v < width; v += LANES) {
    const First here(width - v);
    const uint32_t hit = bits_of(both(is_equal(load(z + v, here), splat(top)), here));
    if (hit != 0) return v + __builtin_ctz(hit);
  }
  return 0;
}

// Columns that come ahead of a target with logit `own`, `left` columns from the first: those of
// larger logits, and those of equal ones further left; masked ones never do.
inline int64_t count_ahead(const float* z, int64_t width, float own, int64_t left) {
  if (own == -INF) left = 0;
  const Lanes wanted = splat(own);
  Words n = zero_words();
  each_vector(width, [&](int64_t v, const auto& lanes, int) {
    const Lanes x = load_logits(z + v, lanes);
    const Mask equal = both(is_equal(x, wanted), First(left - v));
    n = count_up(n, either(is_above(x, wanted), equal));
  });
  return sum(n);
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
