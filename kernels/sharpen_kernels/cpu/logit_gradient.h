// From the logits of a row to their gradient, and that gradient as the factor of a product.
#pragma once

#include <utility>
#include <vector>

#include "exp.h"
#include "tile.h"

namespace sharpen {

// Coefficients of the gradient of a row's logits, [rows up to whole blocks]; null where 0.
struct RowGrads {
  const float* top;
  const float* log_mass;
  const float* prob;
  const float* entropy;
  const float* of_entropy;
  const float* uniform;
  const uint8_t* active;  // rows that no gradient reaches add exact zeros
};

// Logits of one row become, in place, the gradient of what the map was applied to;
// `of_chosen` [pairs], or null, is added at the targets.
inline void row_gradient(float* z, int64_t start, int64_t width, const Inputs& in,
                         const RowGrads& g, const float* of_chosen, int64_t row) {
  const float slope = in.softcap == 0.0F ? 0.0F : in.temperature / in.softcap;
  // the chosen logits, before they are written over
  thread_local std::vector<std::pair<int64_t, float>> chosen;
  chosen.clear();
  for (int64_t pair = in.first[row]; of_chosen != nullptr && pair < in.first[row + 1]; ++pair) {
    const int64_t column = in.target[pair] - start;
    if (column < 0 || column >= width || z[column] == -INF) continue;
    const float t = z[column] * slope;
    chosen.emplace_back(column, of_chosen[pair] * (1.0F - t * t) / in.temperature);
  }
  const __m512 top = _mm512_set1_ps(g.top[row]);
  const __m512 log_mass = _mm512_set1_ps(g.log_mass[row]);
  const __m512 prob = _mm512_set1_ps(g.prob[row]);
  for (int64_t v = 0; v < width; v += LANES) {
    const __mmask16 here = lanes_before(width - v);
    const __m512 logit = _mm512_maskz_loadu_ps(here, z + v);
    const __mmask16 counts = _mm512_cmp_ps_mask(logit, _mm512_set1_ps(-INF), _CMP_NEQ_UQ);
    const __m512 log_p = _mm512_sub_ps(_mm512_sub_ps(logit, top), log_mass);
    const __m512 e = exp_of_nonpositive(log_p);
    __m512 dz = _mm512_mul_ps(e, prob);
    if (g.of_entropy != nullptr) {
      // dH / dz = -p (log p + H)
      const __m512 log_ph = _mm512_add_ps(_mm512_max_ps(_mm512_set1_ps(-1e3F), log_p),
                                          _mm512_set1_ps(g.entropy[row]));
      const __m512 weighted = _mm512_mul_ps(e, _mm512_set1_ps(g.of_entropy[row]));
      dz = _mm512_fnmadd_ps(weighted, log_ph, dz);
    }
    if (g.uniform != nullptr) {
      dz = _mm512_mask_sub_ps(dz, counts, dz, _mm512_set1_ps(g.uniform[row]));
    }
    if (in.softcap != 0.0F) {
      const __m512 t = _mm512_mul_ps(logit, _mm512_set1_ps(slope));
      dz = _mm512_mul_ps(dz, _mm512_fnmadd_ps(t, t, _mm512_set1_ps(1.0F)));
    }
    if (in.temperature != 1.0F) dz = _mm512_div_ps(dz, _mm512_set1_ps(in.temperature));
    // exactly 0 in a masked column, where log p = -inf and the slope of the cap too
    _mm512_mask_storeu_ps(z + v, here, _mm512_maskz_mov_ps(counts, dz));
  }
  for (const auto& [column, grad] : chosen) z[column] += grad;
}

}  // namespace sharpen
