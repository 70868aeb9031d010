// The k largest logits of a row and their columns, kept while its segments go by.
#pragma once

#include "tile.h"

namespace sharpen {

// Falling, of equal ones the lowest column first, from -inf on: one order for all columns, so what
// stays depends neither on the order they come in nor on the threads that keep apart lists.
struct BestColumns {
  float* value;
  int32_t* column;
  int64_t k;

  float least() const { return value[k - 1]; }

  void clear() const {
    std::fill(value, value + k, -INF);
    std::fill(column, column + k, 0);
  }

  void insert(float z, int32_t at) const {
    if (!ahead(z, at, k - 1)) return;
    int64_t i = k - 1;
    for (; i > 0 && ahead(z, at, i - 1); --i) {
      value[i] = value[i - 1];
      column[i] = column[i - 1];
    }
    value[i] = z;
    column[i] = at;
  }

  // Those of `width` logits that belong here; lower columns than the first have been before.
  void keep(const float* z, int64_t width, int64_t first_column) const {
    for (int64_t v = 0; v < width; v += LANES) {
      const First here(width - v);
      // -inf is above nothing
      const Lanes x = load(z + v, here, splat(-INF));
      uint32_t hit = bits_of(is_above(x, splat(least())));
      for (; hit != 0; hit &= hit - 1) {
        const int64_t i = v + __builtin_ctz(hit);
        insert(z[i], static_cast<int32_t>(first_column + i));
      }
    }
  }

  // Those of another list that belong here.
  void take(const BestColumns& other) const {
    for (int64_t i = 0; i < k && other.value[i] > -INF; ++i) {
      insert(other.value[i], other.column[i]);
    }
  }

 private:
  bool ahead(float z, int32_t at, int64_t i) const {
    return z > value[i] || (z == value[i] && at < column[i]);
  }
};

}  // namespace sharpen
