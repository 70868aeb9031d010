// `Lanes` in one register of AVX-512.
#pragma once

namespace sharpen {

using Lanes = __m512;
using Words = __m512i;  // 32 bits each
using Mask = __mmask16;

struct All {
  operator Mask() const { return 0xFFFF; }
};

// The first n lanes, all of them from 16 on, none below 1.
struct First {
  Mask mask;

  explicit First(int64_t n)
      : mask(static_cast<Mask>((1U << std::clamp<int64_t>(n, 0, LANES)) - 1)) {}
  operator Mask() const { return mask; }
};

inline Mask both(Mask a, Mask b) { return a & b; }
inline Mask either(Mask a, Mask b) { return a | b; }
inline Mask only(int64_t lane) { return static_cast<Mask>(1U << lane); }
inline uint32_t bits_of(Mask mask) { return mask; }

inline Lanes splat(float x) { return _mm512_set1_ps(x); }
inline Lanes pick(Mask mask, Lanes x, Lanes otherwise) {
  return _mm512_mask_mov_ps(otherwise, mask, x);
}

// The lanes from `x` on; those outside are not read, and 0 or as in `otherwise`.
inline Lanes load(const float* x) { return _mm512_loadu_ps(x); }
inline Lanes load(const float* x, Mask here) { return _mm512_maskz_loadu_ps(here, x); }
inline Lanes load(const float* x, Mask here, Lanes otherwise) {
  return _mm512_mask_loadu_ps(otherwise, here, x);
}
inline Words load_bits(const void* x) { return _mm512_loadu_si512(x); }
inline Words load_words(const int32_t* x, Mask here, Words otherwise) {
  return _mm512_mask_loadu_epi32(otherwise, here, x);
}
inline Lanes load(const at::BFloat16* x, Mask here) {
  const __m512i bits = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(here, x));
  return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}
inline Lanes load(const at::Half* x, Mask here) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(here, x));
}

// To nearest, ties to even; NaN stays NaN.
inline Words bf16_bits(Lanes x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, half), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  return _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7FC0));
}

inline void store(float* out, Lanes x) { _mm512_storeu_ps(out, x); }
inline void store(float* out, Lanes x, Mask here) { _mm512_mask_storeu_ps(out, here, x); }
inline void store_bits(void* out, Words x) { _mm512_storeu_si512(out, x); }
inline void store_words(int32_t* out, Words x, Mask here) {
  _mm512_mask_storeu_epi32(out, here, x);
}
inline void store(at::BFloat16* out, Lanes x, Mask here) {
  _mm256_mask_storeu_epi16(out, here, _mm512_cvtepi32_epi16(bf16_bits(x)));
}
inline void store(at::Half* out, Lanes x, Mask here) {
  _mm256_mask_storeu_epi16(out, here, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

inline Words zero_words() { return _mm512_setzero_si512(); }
inline Words as_words(Lanes x) { return _mm512_castps_si512(x); }
inline Lanes as_lanes(Words x) { return _mm512_castsi512_ps(x); }
inline Words pick(Mask mask, Words x, Words otherwise) {
  return _mm512_mask_mov_epi32(otherwise, mask, x);
}
inline Words count_up(Words n, Mask mask) {
  return _mm512_mask_add_epi32(n, mask, n, _mm512_set1_epi32(1));
}
inline int64_t sum(Words x) { return _mm512_reduce_add_epi32(x); }

// a b + c and c - a b, rounded once.
inline Lanes fma(Lanes a, Lanes b, Lanes c) { return _mm512_fmadd_ps(a, b, c); }
inline Lanes fnma(Lanes a, Lanes b, Lanes c) { return _mm512_fnmadd_ps(a, b, c); }
// Where the mask names the lane, `a` elsewhere.
inline Lanes add_where(Mask mask, Lanes a, Lanes b) { return _mm512_mask_add_ps(a, mask, a, b); }
inline Lanes sub_where(Mask mask, Lanes a, Lanes b) { return _mm512_mask_sub_ps(a, mask, a, b); }
// The second where either is NaN.
inline Lanes larger(Lanes a, Lanes b) { return _mm512_max_ps(a, b); }
inline Lanes smaller(Lanes a, Lanes b) { return _mm512_min_ps(a, b); }

inline Mask is_above(Lanes a, Lanes b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
inline Mask is_at_least(Lanes a, Lanes b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
inline Mask is_equal(Lanes a, Lanes b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
// NaN is neither equal nor below.
inline Mask is_not(Lanes a, Lanes b) { return _mm512_cmp_ps_mask(a, b, _CMP_NEQ_UQ); }
inline Mask is_not_below(Lanes a, Lanes b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ); }

// Bytes that are 0, of those that are there.
inline Mask zero_bytes(const uint8_t* x, Mask here) {
  const __m128i bytes = _mm_maskz_loadu_epi8(here, x);
  return _mm_testn_epi8_mask(bytes, bytes) & here;
}

inline Lanes to_nearest_integer(Lanes x) {
  return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
// x 2^n for whole n from -126 to 0.
inline Lanes scale_down(Lanes x, Lanes n) { return _mm512_scalef_ps(x, n); }

inline float sum(Lanes x) { return _mm512_reduce_add_ps(x); }
inline float largest_of(Lanes x) { return _mm512_reduce_max_ps(x); }

// Transpose 16 x 16 words.
[[gnu::always_inline]] inline void transpose(Words x[16]) {
  __m512i y[16];
  for (int i = 0; i < 16; i += 2) {
    y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
    x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
    x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
    x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    y[i] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0x88);
    y[i + 4] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0xDD);
    y[i + 8] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0x88);
    y[i + 12] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0xDD);
  }
  for (int i = 0; i < 4; ++i) {
    x[i] = _mm512_shuffle_i32x4(y[i], y[i + 8], 0x88);
    x[i + 8] = _mm512_shuffle_i32x4(y[i], y[i + 8], 0xDD);
    x[i + 4] = _mm512_shuffle_i32x4(y[i + 4], y[i + 12], 0x88);
    x[i + 12] = _mm512_shuffle_i32x4(y[i + 4], y[i + 12], 0xDD);
  }
}

inline Mask lanes_before(int64_t n) { return First(n); }

// Up to 16 words of a row from element `d` on, zeros behind its end.
inline __m512i load_words(const float* row, int64_t d, int64_t depth) {
  const auto n = static_cast<uint32_t>(std::min<int64_t>(depth - d, 16));
  return _mm512_maskz_loadu_epi32(static_cast<__mmask16>((1U << n) - 1), row + d);
}

inline __m512i load_words(const at::BFloat16* row, int64_t d, int64_t depth) {
  const auto n = static_cast<uint32_t>(std::min<int64_t>(depth - d, 32));
  return _mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << n) - 1), row + d);
}

// 16 numbers in fp64.
struct Wide {
  __m512d low = _mm512_setzero_pd();
  __m512d high = _mm512_setzero_pd();

  static Wide of(Lanes x) {
    return {_mm512_cvtps_pd(_mm512_castps512_ps256(x)),
            _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1))};
  }
  Lanes narrow() const {
    return _mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps(low)), _mm512_cvtpd_ps(high),
                              1);
  }
  friend Wide operator+(const Wide& a, const Wide& b) { return {a.low + b.low, a.high + b.high}; }
  friend Wide operator-(const Wide& a, const Wide& b) { return {a.low - b.low, a.high - b.high}; }
  friend Wide operator*(const Wide& a, const Wide& b) { return {a.low * b.low, a.high * b.high}; }
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

}  // namespace sharpen
