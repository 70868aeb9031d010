// `Lanes` in two registers of AVX2.
#pragma once

namespace sharpen {

struct Lanes {
  __m256 low, high;

  friend Lanes operator+(Lanes a, Lanes b) { return {a.low + b.low, a.high + b.high}; }
  friend Lanes operator-(Lanes a, Lanes b) { return {a.low - b.low, a.high - b.high}; }
  friend Lanes operator*(Lanes a, Lanes b) { return {a.low * b.low, a.high * b.high}; }
  friend Lanes operator/(Lanes a, Lanes b) { return {a.low / b.low, a.high / b.high}; }
};

struct Words {  // 32 bits each
  __m256i low, high;
};

struct Mask {  // all bits of a lane, or none
  __m256i low, high;
};

struct All {};

// The first n lanes, all of them from 16 on, none below 1.
struct First {
  int64_t n;
  Mask mask;

  explicit First(int64_t n) : n(std::clamp<int64_t>(n, 0, LANES)) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const auto m = static_cast<int32_t>(this->n);
    mask = {_mm256_cmpgt_epi32(_mm256_set1_epi32(m), lane),
            _mm256_cmpgt_epi32(_mm256_set1_epi32(m - 8), lane)};
  }
  operator Mask() const { return mask; }
};

inline Mask both(Mask a, Mask b) {
  return {_mm256_and_si256(a.low, b.low), _mm256_and_si256(a.high, b.high)};
}
inline Mask both(Mask a, All) { return a; }
inline Mask either(Mask a, Mask b) {
  return {_mm256_or_si256(a.low, b.low), _mm256_or_si256(a.high, b.high)};
}
inline Mask only(int64_t lane) {
  const __m256i each = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const auto i = static_cast<int32_t>(lane);
  return {_mm256_cmpeq_epi32(_mm256_set1_epi32(i), each),
          _mm256_cmpeq_epi32(_mm256_set1_epi32(i - 8), each)};
}
inline uint32_t bits_of(Mask mask) {
  const auto bits = [](__m256i x) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(x)));
  };
  return bits(mask.low) | bits(mask.high) << 8;
}

inline Lanes splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Lanes pick(Mask mask, Lanes x, Lanes otherwise) {
  return {_mm256_blendv_ps(otherwise.low, x.low, _mm256_castsi256_ps(mask.low)),
          _mm256_blendv_ps(otherwise.high, x.high, _mm256_castsi256_ps(mask.high))};
}

// The lanes from `x` on; those outside are not read, and 0 or as in `otherwise`.
inline Lanes load(const float* x) { return {_mm256_loadu_ps(x), _mm256_loadu_ps(x + 8)}; }
inline Lanes load(const float* x, All) { return load(x); }
inline Lanes load(const float* x, All, Lanes) { return load(x); }
inline Lanes load(const float* x, const First& here) {
  return {_mm256_maskload_ps(x, here.mask.low), _mm256_maskload_ps(x + 8, here.mask.high)};
}
inline Lanes load(const float* x, const First& here, Lanes otherwise) {
  return pick(here, load(x, here), otherwise);
}
inline Words load_bits(const void* x) {
  const auto* at = static_cast<const __m256i*>(x);
  return {_mm256_loadu_si256(at), _mm256_loadu_si256(at + 1)};
}
inline Words pick(Mask mask, Words x, Words otherwise) {
  return {_mm256_blendv_epi8(otherwise.low, x.low, mask.low),
          _mm256_blendv_epi8(otherwise.high, x.high, mask.high)};
}
inline Words load_words(const int32_t* x, Mask here, Words otherwise) {
  return pick(here, {_mm256_maskload_epi32(x, here.low), _mm256_maskload_epi32(x + 8, here.high)},
              otherwise);
}

inline Words as_words(Lanes x) {
  return {_mm256_castps_si256(x.low), _mm256_castps_si256(x.high)};
}
inline Lanes as_lanes(Words x) {
  return {_mm256_castsi256_ps(x.low), _mm256_castsi256_ps(x.high)};
}
inline Lanes load(const at::BFloat16* x, All) {
  const auto half = [](const at::BFloat16* at) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
    return _mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16);
  };
  return as_lanes({half(x), half(x + 8)});
}
inline Lanes load(const at::Half* x, All) {
  const auto* at = reinterpret_cast<const __m128i*>(x);
  return {_mm256_cvtph_ps(_mm_loadu_si128(at)), _mm256_cvtph_ps(_mm_loadu_si128(at + 1))};
}
template <typename T>
Lanes load(const T* x, const First& here) {
  T copy[LANES] = {};
  std::memcpy(static_cast<void*>(copy), x, here.n * sizeof(T));
  return load(copy, All());
}

// To nearest, ties to even; NaN stays NaN.
inline Words bf16_bits(Lanes x) {
  const auto half = [](__m256 x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF));
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, up), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7FC0), nan);
  };
  return {half(x.low), half(x.high)};
}

inline void store(float* out, Lanes x) {
  _mm256_storeu_ps(out, x.low);
  _mm256_storeu_ps(out + 8, x.high);
}
inline void store(float* out, Lanes x, All) { store(out, x); }
inline void store_bits(void* out, Words x) { store(static_cast<float*>(out), as_lanes(x)); }
inline void store(at::BFloat16* out, Lanes x, All) {
  const Words bits = bf16_bits(x);
  const __m256i packed = _mm256_packus_epi32(bits.low, bits.high);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_permute4x64_epi64(packed, 0xD8));
}
inline void store(at::Half* out, Lanes x, All) {
  auto* at = reinterpret_cast<__m128i*>(out);
  _mm_storeu_si128(at, _mm256_cvtps_ph(x.low, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(at + 1, _mm256_cvtps_ph(x.high, _MM_FROUND_TO_NEAREST_INT));
}
template <typename T>
void store(T* out, Lanes x, const First& here) {
  T copy[LANES];
  store(copy, x, All());
  std::memcpy(static_cast<void*>(out), copy, here.n * sizeof(T));
}
inline void store_words(int32_t* out, Words x, const First& here) {
  int32_t copy[LANES];
  store_bits(copy, x);
  std::memcpy(out, copy, here.n * sizeof(int32_t));
}

inline Words zero_words() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline Words count_up(Words n, Mask mask) {
  return {_mm256_sub_epi32(n.low, mask.low), _mm256_sub_epi32(n.high, mask.high)};
}
inline int64_t sum(Words x) {
  int32_t each[LANES];
  store_bits(each, x);
  int64_t total = 0;
  for (const int32_t n : each) total += n;
  return total;
}

// a b + c and c - a b, rounded once.
inline Lanes fma(Lanes a, Lanes b, Lanes c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline Lanes fnma(Lanes a, Lanes b, Lanes c) {
  return {_mm256_fnmadd_ps(a.low, b.low, c.low), _mm256_fnmadd_ps(a.high, b.high, c.high)};
}
// Where the mask names the lane, `a` elsewhere.
inline Lanes add_where(Mask mask, Lanes a, Lanes b) { return pick(mask, a + b, a); }
inline Lanes add_where(All, Lanes a, Lanes b) { return a + b; }
inline Lanes sub_where(Mask mask, Lanes a, Lanes b) { return pick(mask, a - b, a); }
// The second where either is NaN.
inline Lanes larger(Lanes a, Lanes b) {
  return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)};
}
inline Lanes smaller(Lanes a, Lanes b) {
  return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)};
}

template <int TEST>
Mask compare(Lanes a, Lanes b) {
  return {_mm256_castps_si256(_mm256_cmp_ps(a.low, b.low, TEST)),
          _mm256_castps_si256(_mm256_cmp_ps(a.high, b.high, TEST))};
}
inline Mask is_above(Lanes a, Lanes b) { return compare<_CMP_GT_OQ>(a, b); }
inline Mask is_at_least(Lanes a, Lanes b) { return compare<_CMP_GE_OQ>(a, b); }
inline Mask is_equal(Lanes a, Lanes b) { return compare<_CMP_EQ_OQ>(a, b); }
// NaN is neither equal nor below.
inline Mask is_not(Lanes a, Lanes b) { return compare<_CMP_NEQ_UQ>(a, b); }
inline Mask is_not_below(Lanes a, Lanes b) { return compare<_CMP_NLT_UQ>(a, b); }

// Bytes that are 0, of those that are there.
inline Mask zero_bytes(const uint8_t* x, const First& here) {
  uint8_t copy[LANES] = {};
  std::memcpy(copy, x, here.n);
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(copy));
  const __m128i zero = _mm_cmpeq_epi8(bytes, _mm_setzero_si128());
  return both({_mm256_cvtepi8_epi32(zero), _mm256_cvtepi8_epi32(_mm_srli_si128(zero, 8))}, here);
}

inline Lanes to_nearest_integer(Lanes x) {
  constexpr int MODE = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.low, MODE), _mm256_round_ps(x.high, MODE)};
}
// x 2^n for whole n from -126 to 0.
inline Lanes scale_down(Lanes x, Lanes n) {
  const auto power = [](__m256 n) {
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
  };
  return {x.low * power(n.low), x.high * power(n.high)};
}

inline float sum(Lanes x) {
  const __m256 y = x.low + x.high;
  __m128 z = _mm256_castps256_ps128(y) + _mm256_extractf128_ps(y, 1);
  z += _mm_movehl_ps(z, z);
  return z[0] + z[1];
}
inline float largest_of(Lanes x) {
  const __m256 y = _mm256_max_ps(x.low, x.high);
  __m128 z = _mm_max_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
  z = _mm_max_ps(z, _mm_movehl_ps(z, z));
  return std::max(z[0], z[1]);
}

// Transpose 8 x 8 words.
inline void transpose(const __m256i x[8], __m256i out[8]) {
  __m256i y[8], z[8];
  for (int i = 0; i < 8; i += 2) {
    y[i] = _mm256_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm256_unpackhi_epi32(x[i], x[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    z[i] = _mm256_unpacklo_epi64(y[i], y[i + 2]);
    z[i + 1] = _mm256_unpackhi_epi64(y[i], y[i + 2]);
    z[i + 2] = _mm256_unpacklo_epi64(y[i + 1], y[i + 3]);
    z[i + 3] = _mm256_unpackhi_epi64(y[i + 1], y[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    out[i] = _mm256_permute2x128_si256(z[i], z[i + 4], 0x20);
    out[i + 4] = _mm256_permute2x128_si256(z[i], z[i + 4], 0x31);
  }
}

// Transpose 16 x 16 words.
[[gnu::always_inline]] inline void transpose(Words x[16]) {
  __m256i from[4][8], to[4][8];
  for (int i = 0; i < 8; ++i) {
    from[0][i] = x[i].low;
    from[1][i] = x[i].high;
    from[2][i] = x[i + 8].low;
    from[3][i] = x[i + 8].high;
  }
  for (int i = 0; i < 4; ++i) transpose(from[i], to[i]);
  for (int i = 0; i < 8; ++i) {
    x[i] = {to[0][i], to[2][i]};
    x[i + 8] = {to[1][i], to[3][i]};
  }
}

// 16 numbers in fp64.
struct Wide {
  __m256d part[4] = {};

  static Wide of(Lanes x) {
    const auto low = [](__m256 x) { return _mm256_cvtps_pd(_mm256_castps256_ps128(x)); };
    const auto high = [](__m256 x) { return _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1)); };
    return {{low(x.low), high(x.low), low(x.high), high(x.high)}};
  }
  Lanes narrow() const {
    const auto joined = [](__m256d a, __m256d b) {
      return _mm256_set_m128(_mm256_cvtpd_ps(b), _mm256_cvtpd_ps(a));
    };
    return {joined(part[0], part[1]), joined(part[2], part[3])};
  }
  friend Wide operator+(const Wide& a, const Wide& b) {
    return each([&](int i) { return a.part[i] + b.part[i]; });
  }
  friend Wide operator-(const Wide& a, const Wide& b) {
    return each([&](int i) { return a.part[i] - b.part[i]; });
  }
  friend Wide operator*(const Wide& a, const Wide& b) {
    return each([&](int i) { return a.part[i] * b.part[i]; });
  }
  // 0 where b is 0
  friend Wide operator/(const Wide& a, const Wide& b) {
    return each([&](int i) {
      const __m256d some = _mm256_cmp_pd(b.part[i], _mm256_setzero_pd(), _CMP_NEQ_UQ);
      return _mm256_and_pd(some, a.part[i] / b.part[i]);
    });
  }
  Wide at_least_zero() const {
    // max returns its second operand where the first is NaN
    return each([&](int i) { return _mm256_max_pd(_mm256_setzero_pd(), part[i]); });
  }

 private:
  template <typename Run>
  static Wide each(const Run& run) {
    return {{run(0), run(1), run(2), run(3)}};
  }
};

}  // namespace sharpen
