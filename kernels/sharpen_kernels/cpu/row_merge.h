// The merge over the segments of a row: `merge` of `_rows.py`, from the first column to the last.
#pragma once

#include "row_statistics.h"

namespace sharpen {

// The fields of up to 16 neighbouring rows, [segments, stride] in `part`, [rows] in `out`.
class RowMerge {
 public:
  RowMerge(const Partials& part, int64_t segments, int64_t stride, float renyi_order)
      : part_(part), segments_(segments), stride_(stride), order_(renyi_order) {}

  void merge(int64_t row, int64_t n_rows, const Partials& out, int64_t out_at) const {
    const First here(n_rows);
    const Lanes top = merge_tops(row, here, out, out_at);
    merge_sums(row, here, top, out, out_at);
  }

 private:
  Lanes merge_tops(int64_t row, const First& here, const Partials& out, int64_t out_at) const {
    Lanes top = splat(-INF);
    Lanes second = top;
    Words column = zero_words();
    for (int64_t s = 0; s < segments_; ++s) {
      const int64_t at = s * stride_ + row;
      const Lanes x = load(part_.top + at, here);
      if (part_.column != nullptr) {
        // of equal maxima the first; in the first segment also where all are masked
        const Mask higher = s == 0 ? Mask(here) : both(is_above(x, top), here);
        column = load_words(part_.column + at, higher, column);
      }
      if (part_.second != nullptr) {
        const Lanes behind = larger(load(part_.second + at, here), smaller(x, top));
        second = larger(second, behind);
      }
      top = larger(x, top);
    }
    store(out.top + out_at, top, here);
    if (part_.column != nullptr) store_words(out.column + out_at, column, here);
    if (part_.second != nullptr) store(out.second + out_at, second, here);
    return top;
  }

  void merge_sums(int64_t row, const First& here, Lanes top, const Partials& out,
                  int64_t out_at) const {
    const Lanes lowest = splat(-INF);
    const Lanes shift = keep(is_not(top, lowest), top);
    Wide mass, spread, inside, between, squares, powers, total, n_valid;
    for (int64_t s = 0; s < segments_; ++s) {
      const int64_t at = s * stride_ + row;
      const Lanes x = load(part_.top + at, here);
      // 0 for an empty segment: it is 0 in every sum, and 0 * -inf would be NaN
      const Lanes gap = keep(is_not(x, lowest), x - shift);
      const Lanes near = larger(splat(FAR), gap);
      const Wide scale = Wide::of(exp_of_nonpositive(near));
      const Wide m = scale * Wide::of(load(part_.mass + at, here));
      mass = mass + m;
      if (part_.spread != nullptr) {
        const Wide moved = scale * Wide::of(load(part_.spread + at, here)) + m * Wide::of(near);
        spread = spread + moved;
        if (part_.square != nullptr) {
          inside = inside + scale * Wide::of(load(part_.square + at, here));
          between = between + moved * moved / m;
        }
      }
      if (part_.squares != nullptr) {
        squares = squares + scale * scale * Wide::of(load(part_.squares + at, here));
      }
      if (part_.powers != nullptr) {
        const Lanes power = exp_of_nonpositive(splat(order_) * gap);
        powers = powers + Wide::of(power) * Wide::of(load(part_.powers + at, here));
      }
      if (part_.total != nullptr) {
        const Wide n = Wide::of(load(part_.n_valid + at, here));
        total = total + Wide::of(load(part_.total + at, here)) + n * Wide::of(gap);
        n_valid = n_valid + n;
      }
    }
    const auto put = [&](float* field, const Wide& x) {
      if (field != nullptr) store(field + out_at, x.narrow(), here);
    };
    put(out.mass, mass);
    put(out.spread, spread);
    // about the common mean: in fp64 nothing is lost where the two all but cancel
    put(out.square, inside + (between - spread * spread / mass).at_least_zero());
    put(out.squares, squares);
    put(out.powers, powers);
    put(out.total, total);
    put(out.n_valid, n_valid);
  }

  const Partials& part_;
  const int64_t segments_, stride_;
  const float order_;
};

}  // namespace sharpen
