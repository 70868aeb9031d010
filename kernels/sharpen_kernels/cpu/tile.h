// What both passes and both kinds of product share: inputs, threads, and what follows a product.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/cpu/vec/vec.h>

#include <atomic>

#include "lanes.h"

namespace sharpen {

// Columns of a packed weight are a whole number of panels.
constexpr int64_t PANEL = 64;
// Rows of one product, always: a row meets the same instructions in any batch.
constexpr int64_t BLOCK = 64;

// What both passes read; strides in elements, columns beside each other.
struct Inputs {
  const void* hidden;
  const void* weight;
  const float* bias;    // or null
  const uint8_t* mask;  // or null; 0 where a column does not count
  const int64_t* target;
  const int64_t* first;  // pairs of row r: first[r] ... first[r + 1]
  int64_t rows, columns, depth, hidden_stride, weight_stride;
  float temperature, softcap;  // softcap 0: none
};

constexpr float INF = std::numeric_limits<float>::infinity();

inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Next piece of 64-byte aligned memory.
inline char* take(char** memory, int64_t bytes) {
  char* start = *memory;
  *memory += round_up(bytes, 64);
  return start;
}

// `run(thread, task)` for every task, each once, in any order, as threads come free; a `Session`
// lasts as long as a thread has tasks.
template <typename Session, typename Run>
void share_out(int64_t threads, int64_t tasks, const Run& run) {
  std::atomic<int64_t> next{0};
  std::atomic<int64_t> thread{0};
  at::parallel_for(0, std::min(threads, tasks), 1, [&](int64_t, int64_t) {
    [[maybe_unused]] const Session session;
    const int64_t mine = thread++;
    for (int64_t i = next++; i < tasks; i = next++) run(mine, i);
  });
}

// softcap(u + bias) / temperature with softcap(u) = c tanh(u / c), then -inf where the mask is 0.
struct LogitMap {
  const float* bias;    // or null
  const uint8_t* mask;  // or null
  float temperature;
  float softcap;  // 0: none

  LogitMap(const Inputs& in, int64_t start)
      : bias(in.bias == nullptr ? nullptr : in.bias + start),
        mask(in.mask == nullptr ? nullptr : in.mask + start),
        temperature(in.temperature),
        softcap(in.softcap) {}

  bool changes() const {
    return bias != nullptr || mask != nullptr || softcap != 0.0F || temperature != 1.0F;
  }

  void apply(float* z, int64_t width) const {
    if (bias != nullptr || softcap != 0.0F || temperature != 1.0F) transform(z, width);
    if (mask != nullptr) hide(z, width);
  }

 private:
  void transform(float* z, int64_t width) const {
    using Vec = at::vec::Vectorized<float>;
    for (int64_t v = 0; v < width; v += Vec::size()) {
      const int64_t n = std::min<int64_t>(Vec::size(), width - v);
      Vec x = Vec::loadu(z + v, n);
      if (bias != nullptr) x = x + Vec::loadu(bias + v, n);
      if (softcap != 0.0F) x = (x / Vec(softcap)).tanh() * Vec(softcap);
      if (temperature != 1.0F) x = x / Vec(temperature);
      x.store(z + v, n);
    }
  }

  void hide(float* z, int64_t width) const {
    for (int64_t v = 0; v < width; v += LANES) {
      const First here(width - v);
      const Mask hidden = zero_bytes(mask + v, here);
      store(z + v, pick(hidden, splat(-INF), load(z + v, here)), here);
    }
  }
};

}  // namespace sharpen
