// What one row of a tile of logits leaves behind, and the merge over the tiles of a row.
//
// Compiled without contraction and without fast-math: every statistic is the same instructions
// whatever else is asked for, so its bits do not depend on the company it is computed in.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "tile.h"

namespace sharpen {

constexpr float INF = std::numeric_limits<float>::infinity();
// exp of less is below the smallest normal number: counted as 0, so no product meets a denormal
constexpr float LOWEST_EXPONENT = -87.33F;

// exp(x) for x <= 0, 0 for -inf, NaN for NaN; within 1 unit in the last place.
inline __m512 exp_of_nonpositive(__m512 x) {
  // not (x < lowest): a NaN passes through
  const __mmask16 counts = _mm512_cmp_ps_mask(x, _mm512_set1_ps(LOWEST_EXPONENT), _CMP_NLT_UQ);
  const __m512 n = _mm512_roundscale_ps(
      _mm512_mul_ps(x, _mm512_set1_ps(1.44269504F)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  // x - n ln 2 in two steps, the first exact
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375F), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4F), r);
  // minimax on |r| <= ln 2 / 2, relative error 3.1e-9 before rounding; exp(0) is exactly 1
  __m512 p = _mm512_set1_ps(1.3814539e-3F);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3687454e-3F));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1668389e-2F));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666521e-1F));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.9999994e-1F));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0F));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0F));
  return _mm512_maskz_scalef_ps(counts, p, n);
}

// Fields of all segments and rows, [segments, rows] each; null where not asked for.
struct Partials {
  float* top;
  float* mass;
  float* spread;
  float* mean;
  float* count;  // of unmasked columns
  int32_t* greedy;
};

// Mean of the logits above -inf, and their number: for the rare row that holds -inf or NaN.
inline void mean_of_unmasked(const float* z, int64_t width, float* mean, float* count) {
  double sum = 0;
  int64_t n = 0;
  for (int64_t v = 0; v < width; ++v) {
    if (z[v] != -INF) {
      sum += z[v];
      ++n;
    }
  }
  *mean = n > 0 ? static_cast<float>(sum / static_cast<double>(n)) : 0.0F;
  *count = static_cast<float>(n);
}

// Statistics of `width` logits, written at index `at` of each field.
template <bool SPREAD, bool MEAN, bool GREEDY>
void row_partial(const float* z, int64_t width, int64_t first_column, const Partials& out,
                 int64_t at) {
  constexpr int WAYS = 4;
  const int64_t whole = width / LANES * LANES;
  const auto tail = static_cast<__mmask16>((1U << (width - whole)) - 1);
  const __m512 lowest = _mm512_set1_ps(-INF);
  __m512 tops[WAYS];
  __m512 sums[WAYS];
  for (int i = 0; i < WAYS; ++i) {
    tops[i] = lowest;
    sums[i] = _mm512_setzero_ps();
  }
  // max returns its second operand where the first is NaN: a NaN is seen in the mass instead
  int64_t v = 0;
  for (; v + WAYS * LANES <= whole; v += WAYS * LANES) {
    for (int i = 0; i < WAYS; ++i) {
      const __m512 x = _mm512_loadu_ps(z + v + i * LANES);
      tops[i] = _mm512_max_ps(x, tops[i]);
      if (MEAN) sums[i] = _mm512_add_ps(sums[i], x);
    }
  }
  for (; v < width; v += LANES) {
    const __mmask16 here = v < whole ? static_cast<__mmask16>(0xFFFF) : tail;
    const __m512 x = _mm512_mask_loadu_ps(lowest, here, z + v);
    tops[0] = _mm512_max_ps(x, tops[0]);
    if (MEAN) sums[0] = _mm512_mask_add_ps(sums[0], here, sums[0], x);
  }
  const __m512 both = _mm512_max_ps(_mm512_max_ps(tops[0], tops[1]), _mm512_max_ps(tops[2], tops[3]));
  const float top = _mm512_reduce_max_ps(both);
  out.top[at] = top;
  if (MEAN) {
    const __m512 all = _mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3]));
    const float sum = _mm512_reduce_add_ps(all);
    if (std::isfinite(sum)) {
      out.mean[at] = sum / static_cast<float>(width);
      out.count[at] = static_cast<float>(width);
    } else {
      mean_of_unmasked(z, width, out.mean + at, out.count + at);
    }
  }

  const __m512 shift = _mm512_set1_ps(top == -INF ? 0.0F : top);
  // a masked column is exp 0 times this, and 0 * -inf would be NaN
  const __m512 farthest = _mm512_set1_ps(-1e3F);
  __m512 masses[WAYS];
  __m512 spreads[WAYS];
  for (int i = 0; i < WAYS; ++i) masses[i] = spreads[i] = _mm512_setzero_ps();
  const auto add = [&](__m512 x, int i) {
    const __m512 gap = _mm512_sub_ps(x, shift);
    const __m512 e = exp_of_nonpositive(gap);
    masses[i] = _mm512_add_ps(masses[i], e);
    if (SPREAD) spreads[i] = _mm512_fmadd_ps(e, _mm512_max_ps(farthest, gap), spreads[i]);
  };
  for (v = 0; v + WAYS * LANES <= whole; v += WAYS * LANES) {
    for (int i = 0; i < WAYS; ++i) add(_mm512_loadu_ps(z + v + i * LANES), i);
  }
  for (; v < width; v += LANES) {
    const __mmask16 here = v < whole ? static_cast<__mmask16>(0xFFFF) : tail;
    add(_mm512_mask_loadu_ps(lowest, here, z + v), 0);
  }
  const auto total = [](const __m512* x) {
    return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(x[0], x[1]), _mm512_add_ps(x[2], x[3])));
  };
  out.mass[at] = total(masses);
  if (SPREAD) out.spread[at] = total(spreads);

  if (GREEDY) {
    const __m512 wanted = _mm512_set1_ps(top);
    int64_t found = 0;
    for (v = 0; v < width; v += LANES) {
      const __mmask16 here = v < whole ? static_cast<__mmask16>(0xFFFF) : tail;
      const __mmask16 hit =
          _mm512_mask_cmp_ps_mask(here, _mm512_maskz_loadu_ps(here, z + v), wanted, _CMP_EQ_OQ);
      if (hit != 0) {
        found = v + __builtin_ctz(hit);
        break;
      }
    }
    out.greedy[at] = static_cast<int32_t>(first_column + found);
  }
}

// Sums in fp64 of 16 rows.
struct Sum16 {
  __m512d low = _mm512_setzero_pd();
  __m512d high = _mm512_setzero_pd();

  void add(__m512 x) {
    low = _mm512_add_pd(low, _mm512_cvtps_pd(_mm512_castps512_ps256(x)));
    high = _mm512_add_pd(high, _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1)));
  }
  void add_product(__m512 x, __m512 y) {  // exact
    low = _mm512_fmadd_pd(_mm512_cvtps_pd(_mm512_castps512_ps256(x)),
                          _mm512_cvtps_pd(_mm512_castps512_ps256(y)), low);
    high = _mm512_fmadd_pd(_mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1)),
                           _mm512_cvtps_pd(_mm512_extractf32x8_ps(y, 1)), high);
  }
  __m512 over(const Sum16& n) const {
    return join(_mm512_div_pd(low, n.low), _mm512_div_pd(high, n.high));
  }
  __m512 value() const { return join(low, high); }
  static __m512 join(__m512d a, __m512d b) {
    return _mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps(a)), _mm512_cvtpd_ps(b), 1);
  }
};

// Up to 16 neighbouring rows, from the first segment to the last; `out` is [rows] from `out_at` on.
inline void merge_rows(const Partials& part, int64_t segments, int64_t stride, int64_t row,
                       int64_t n_rows, const Partials& out, int64_t out_at) {
  const auto here = static_cast<__mmask16>((1U << n_rows) - 1);
  __m512 top = _mm512_set1_ps(-INF);
  __m512i greedy = _mm512_setzero_si512();
  for (int64_t s = 0; s < segments; ++s) {
    const int64_t at = s * stride + row;
    const __m512 x = _mm512_maskz_loadu_ps(here, part.top + at);
    if (part.greedy != nullptr) {
      // of equal maxima the first
      const __mmask16 higher = _mm512_cmp_ps_mask(x, top, _CMP_GT_OQ);
      greedy = _mm512_mask_loadu_epi32(greedy, higher & here, part.greedy + at);
    }
    top = _mm512_max_ps(x, top);
  }
  const __mmask16 empty = _mm512_cmp_ps_mask(top, _mm512_set1_ps(-INF), _CMP_EQ_OQ);
  const __m512 shift = _mm512_mask_blend_ps(empty, top, _mm512_setzero_ps());
  Sum16 mass;
  Sum16 spread;
  Sum16 sum;
  Sum16 count;
  for (int64_t s = 0; s < segments; ++s) {
    const int64_t at = s * stride + row;
    // a finite gap: an empty segment is 0 in every sum, and 0 * -inf would be NaN
    const __m512 gap = _mm512_max_ps(
        _mm512_set1_ps(-1e3F), _mm512_sub_ps(_mm512_maskz_loadu_ps(here, part.top + at), shift));
    const __m512 scale = exp_of_nonpositive(gap);
    const __m512 m = _mm512_mul_ps(scale, _mm512_maskz_loadu_ps(here, part.mass + at));
    mass.add(m);
    if (part.spread != nullptr) {
      const __m512 x = _mm512_maskz_loadu_ps(here, part.spread + at);
      spread.add_product(scale, x);
      spread.add_product(m, gap);
    }
    if (part.mean != nullptr) {
      const __m512 n = _mm512_maskz_loadu_ps(here, part.count + at);
      sum.add_product(n, _mm512_maskz_loadu_ps(here, part.mean + at));
      count.add(n);
    }
  }
  _mm512_mask_storeu_ps(out.top + out_at, here, top);
  _mm512_mask_storeu_ps(out.mass + out_at, here, mass.value());
  if (part.spread != nullptr) _mm512_mask_storeu_ps(out.spread + out_at, here, spread.value());
  if (part.mean != nullptr) {
    _mm512_mask_storeu_ps(out.mean + out_at, here, sum.over(count));
    _mm512_mask_storeu_ps(out.count + out_at, here, count.value());
  }
  if (part.greedy != nullptr) _mm512_mask_storeu_epi32(out.greedy + out_at, here, greedy);
}

}  // namespace sharpen
