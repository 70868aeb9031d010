// 16 numbers of fp32 side by side: one register of AVX-512, or two of AVX2.
//
// Both do the same operations in the same order, and sum across the lanes by halves. A `Mask` names
// some of the lanes; `All` and `First` are masks known beforehand, of columns that are there.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

namespace sharpen {

constexpr int LANES = 16;

}  // namespace sharpen

#ifdef __AVX512F__
#include "lanes_avx512.h"
#else
#include "lanes_avx2.h"
#endif

namespace sharpen {

inline Lanes zeros() { return splat(0.0F); }

// `x` where the mask names the lane, 0 elsewhere.
inline Lanes keep(Mask mask, Lanes x) { return pick(mask, x, zeros()); }

}  // namespace sharpen
