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
  const Lanes top = splat(g.top[row]);
  const Lanes log_mass = splat(g.log_mass[row]);
  const Lanes prob = splat(g.prob[row]);
  const auto gradient = [&](float* at, const auto& here) {
    const Lanes logit = load(at, here);
    const Mask counts = is_not(logit, splat(-INF));
    const Lanes log_p = logit - top - log_mass;
    const Lanes e = exp_of_nonpositive(log_p);
    Lanes dz = e * prob;
    if (g.of_entropy != nullptr) {
      // dH / dz = -p (log p + H)
      const Lanes log_ph = larger(splat(-1e3F), log_p) + splat(g.entropy[row]);
      dz = fnma(e * splat(g.of_entropy[row]), log_ph, dz);
    }
    if (g.uniform != nullptr) dz = sub_where(counts, dz, splat(g.uniform[row]));
    if (in.softcap != 0.0F) {
      const Lanes t = logit * splat(slope);
      dz = dz * fnma(t, t, splat(1.0F));
    }
    if (in.temperature != 1.0F) dz = dz / splat(in.temperature);
    // exactly 0 in a masked column, where log p = -inf and the slope of the cap too
    store(at, keep(counts, dz), here);
  };
  int64_t v = 0;
  for (; v + LANES <= width; v += LANES) gradient(z + v, All());
  if (v < width) gradient(z + v, First(width - v));
  for (const auto& [column, grad] : chosen) z[column] += grad;
}

}  // namespace sharpen
