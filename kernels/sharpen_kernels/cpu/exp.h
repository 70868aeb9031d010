// exp of what is at most 0, for 16 numbers.
#pragma once

#include <immintrin.h>

namespace sharpen {

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

}  // namespace sharpen
