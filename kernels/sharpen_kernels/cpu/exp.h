// exp of what is at most 0, for 16 numbers.
#pragma once

#include "lanes.h"

namespace sharpen {

// exp of less is below the smallest normal number: counted as 0, so no product meets a denormal
constexpr float LOWEST_EXPONENT = -87.33F;

// exp(x) for x <= 0, 0 for -inf, NaN for NaN; within 1 unit in the last place.
inline Lanes exp_of_nonpositive(Lanes x) {
  // not (x < lowest): a NaN passes through
  const Mask counts = is_not_below(x, splat(LOWEST_EXPONENT));
  const Lanes n = to_nearest_integer(x * splat(1.44269504F));
  // x - n ln 2 in two steps, the first exact
  Lanes r = fnma(n, splat(0.693359375F), x);
  r = fnma(n, splat(-2.12194440e-4F), r);
  // minimax on |r| <= ln 2 / 2, relative error 3.1e-9 before rounding; exp(0) is exactly 1
  Lanes p = splat(1.3814539e-3F);
  p = fma(p, r, splat(8.3687454e-3F));
  p = fma(p, r, splat(4.1668389e-2F));
  p = fma(p, r, splat(1.6666521e-1F));
  p = fma(p, r, splat(4.9999994e-1F));
  p = fma(p, r, splat(1.0F));
  p = fma(p, r, splat(1.0F));
  return keep(counts, scale_down(p, n));
}

}  // namespace sharpen
