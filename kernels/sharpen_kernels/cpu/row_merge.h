// The merge over the segments of a row: `merge` of `_rows.py`, from the first column to the last.
#pragma once

#include "row_statistics.h"

namespace sharpen {

// 16 numbers in fp64.
struct Wide {
  __m512d low = _mm512_setzero_pd();
  __m512d high = _mm512_setzero_pd();

  static Wide of(__m512 x) {
    return {_mm512_cvtps_pd(_mm512_castps512_ps256(x)),
            _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1))};
  }
  __m512 narrow() const {
    return _mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps(low)), _mm512_cvtpd_ps(high),
                              1);
  }
  friend Wide operator+(const Wide& a, const Wide& b) {
    return {_mm512_add_pd(a.low, b.low), _mm512_add_pd(a.high, b.high)};
  }
  friend Wide operator-(const Wide& a, const Wide& b) {
    return {_mm512_sub_pd(a.low, b.low), _mm512_sub_pd(a.high, b.high)};
  }
  friend Wide operator*(const Wide& a, const Wide& b) {
    return {_mm512_mul_pd(a.low, b.low), _mm512_mul_pd(a.high, b.high)};
  }
  // 0 where b is 0
  friend Wide operator/(const Wide& a, const Wide& b) {
    return {over(a.low, b.low), over(a.high, b.high)};
  }
  Wide at_least_zero() const {
    // max returns its second operand where the first is NaN
    return {_mm512_max_pd(_mm512_setzero_pd(), low), _mm512_max_pd(_mm512_setzero_pd(), high)};
  }

 private:
  static __m512d over(__m512d a, __m512d b) {
    const __mmask8 some = _mm512_cmp_pd_mask(b, _mm512_setzero_pd(), _CMP_NEQ_UQ);
    return _mm512_maskz_div_pd(some, a, b);
  }
};

// The fields of up to 16 neighbouring rows, [segments, stride] in `part`, [rows] in `out`.
class RowMerge {
 public:
  RowMerge(const Partials& part, int64_t segments, int64_t stride, float renyi_order)
      : part_(part), segments_(segments), stride_(stride), order_(renyi_order) {}

  void merge(int64_t row, int64_t n_rows, const Partials& out, int64_t out_at) const {
    const __mmask16 here = lanes_before(n_rows);
    const __m512 top = merge_tops(row, here, out, out_at);
    merge_sums(row, here, top, out, out_at);
  }

 private:
  __m512 load(const float* field, int64_t at, __mmask16 here) const {
    return _mm512_maskz_loadu_ps(here, field + at);
  }

  __m512 merge_tops(int64_t row, __mmask16 here, const Partials& out, int64_t out_at) const {
    __m512 top = _mm512_set1_ps(-INF);
    __m512 second = top;
    __m512i column = _mm512_setzero_si512();
    for (int64_t s = 0; s < segments_; ++s) {
      const int64_t at = s * stride_ + row;
      const __m512 x = load(part_.top, at, here);
      if (part_.column != nullptr) {
        // of equal maxima the first; in the first segment also where all are masked
        const __mmask16 higher = s == 0 ? here : _mm512_cmp_ps_mask(x, top, _CMP_GT_OQ) & here;
        column = _mm512_mask_loadu_epi32(column, higher, part_.column + at);
      }
      if (part_.second != nullptr) {
        const __m512 behind = _mm512_max_ps(load(part_.second, at, here), _mm512_min_ps(x, top));
        second = _mm512_max_ps(second, behind);
      }
      top = _mm512_max_ps(x, top);
    }
    _mm512_mask_storeu_ps(out.top + out_at, here, top);
    if (part_.column != nullptr) _mm512_mask_storeu_epi32(out.column + out_at, here, column);
    if (part_.second != nullptr) _mm512_mask_storeu_ps(out.second + out_at, here, second);
    return top;
  }

  void merge_sums(int64_t row, __mmask16 here, __m512 top, const Partials& out,
                  int64_t out_at) const {
    const __m512 lowest = _mm512_set1_ps(-INF);
    const __m512 shift =
        _mm512_mask_mov_ps(top, _mm512_cmp_ps_mask(top, lowest, _CMP_EQ_OQ), _mm512_setzero_ps());
    Wide mass, spread, inside, between, squares, powers, total, n_valid;
    for (int64_t s = 0; s < segments_; ++s) {
      const int64_t at = s * stride_ + row;
      const __m512 x = load(part_.top, at, here);
      // 0 for an empty segment: it is 0 in every sum, and 0 * -inf would be NaN
      const __mmask16 some = _mm512_cmp_ps_mask(x, lowest, _CMP_NEQ_UQ);
      const __m512 gap = _mm512_maskz_sub_ps(some, x, shift);
      const __m512 near = _mm512_max_ps(_mm512_set1_ps(FAR), gap);
      const Wide scale = Wide::of(exp_of_nonpositive(near));
      const Wide m = scale * Wide::of(load(part_.mass, at, here));
      mass = mass + m;
      if (part_.spread != nullptr) {
        const Wide moved = scale * Wide::of(load(part_.spread, at, here)) + m * Wide::of(near);
        spread = spread + moved;
        if (part_.square != nullptr) {
          inside = inside + scale * Wide::of(load(part_.square, at, here));
          between = between + moved * moved / m;
        }
      }
      if (part_.squares != nullptr) {
        squares = squares + scale * scale * Wide::of(load(part_.squares, at, here));
      }
      if (part_.powers != nullptr) {
        const __m512 power = exp_of_nonpositive(_mm512_mul_ps(_mm512_set1_ps(order_), gap));
        powers = powers + Wide::of(power) * Wide::of(load(part_.powers, at, here));
      }
      if (part_.total != nullptr) {
        const Wide n = Wide::of(load(part_.n_valid, at, here));
        total = total + Wide::of(load(part_.total, at, here)) + n * Wide::of(gap);
        n_valid = n_valid + n;
      }
    }
    const auto store = [&](float* field, const Wide& x) {
      if (field != nullptr) _mm512_mask_storeu_ps(field + out_at, here, x.narrow());
    };
    store(out.mass, mass);
    store(out.spread, spread);
    // about the common mean: in fp64 nothing is lost where the two all but cancel
    store(out.square, inside + (between - spread * spread / mass).at_least_zero());
    store(out.squares, squares);
    store(out.powers, powers);
    store(out.total, total);
    store(out.n_valid, n_valid);
  }

  const Partials& part_;
  const int64_t segments_, stride_;
  const float order_;
};

}  // namespace sharpen
