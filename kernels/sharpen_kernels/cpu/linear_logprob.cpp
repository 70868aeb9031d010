// Forward of `linear_logprob` on a CPU with AVX-512: segments of the vocabulary over blocks of rows.
//
// A segment's weight is packed once (pairs of bf16 beside each other, as the dot-product units read
// them; fp32 transposed), then oneDNN's micro-kernel multiplies it with one block of rows at a time
// into a tile of fp32 logits that stays in the core's cache, and the tile is reduced on the spot.
// Segments and blocks are fixed by V and D; a block is always full (zero rows behind the last), so a
// row meets the same instructions in any batch. Segments go to threads as they come free and are
// merged in order, so bits do not depend on the number of threads either.
#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>

#include <atomic>
#include <cstring>
#include <exception>
#include <string>

#include "row_statistics.h"
#include "tile.h"

using namespace sharpen;

namespace {

struct Problem {
  // inputs; strides in elements, columns beside each other
  const void* hidden;
  const void* weight;
  const float* bias;  // or null
  const int64_t* target;
  const int64_t* first;  // pairs of row r: first[r] ... first[r + 1]
  int64_t rows, columns, depth, hidden_stride, weight_stride;
  float temperature, softcap;  // softcap 0: none
  // plan
  int64_t segment_columns, block_rows, pass_rows, threads;
  // outputs, [rows] each, or null where not asked for; chosen [pairs], NaN beforehand
  Partials merged;
  float* chosen;
  // memory: [segments, pass_rows] for each field, and for each thread a segment, a tile, a block
  Partials partials;
  char* scratch;
  int64_t scratch_bytes;  // of one thread
};

using RowPartial = void (*)(const float*, int64_t, int64_t, const Partials&, int64_t);

RowPartial row_partial_for(const Partials& p) {
  const bool s = p.spread != nullptr;
  const bool m = p.mean != nullptr;
  if (p.greedy != nullptr) {
    if (s) return m ? row_partial<true, true, true> : row_partial<true, false, true>;
    return m ? row_partial<false, true, true> : row_partial<false, false, true>;
  }
  if (s) return m ? row_partial<true, true, false> : row_partial<true, false, false>;
  return m ? row_partial<false, true, false> : row_partial<false, false, false>;
}

template <typename T>
class Segment {
 public:
  Segment(const Problem& problem, int64_t thread) : problem_(problem) {
    char* memory = problem.scratch + thread * problem.scratch_bytes;
    const auto take = [&memory](int64_t n, int64_t size) {
      char* start = memory;
      memory += (n * size + 63) / 64 * 64;
      return start;
    };
    depth_ = padded_depth<T>(problem.depth);
    packed_ = reinterpret_cast<T*>(take(problem.segment_columns * depth_, sizeof(T)));
    tile_ = reinterpret_cast<float*>(take(problem.block_rows * problem.segment_columns, 4));
    block_ = reinterpret_cast<T*>(take(problem.block_rows * depth_, sizeof(T)));
  }

  // Statistics of the rows from `begin` to `end` over one segment.
  void run(int64_t segment, int64_t begin, int64_t end) {
    const Problem& p = problem_;
    const int64_t start = segment * p.segment_columns;
    const int64_t width = std::min(p.segment_columns, p.columns - start);
    const int64_t wide = (width + PANEL - 1) / PANEL * PANEL;
    const auto* weight = static_cast<const T*>(p.weight) + start * p.weight_stride;
    pack(weight, p.weight_stride, width, p.depth, packed_);
    const RowPartial reduce = row_partial_for(p.partials);
    const LogitMap map{p.bias == nullptr ? nullptr : p.bias + start, p.temperature, p.softcap};
    for (int64_t row = begin; row < end; row += p.block_rows) {
      const int64_t n_rows = std::min(p.block_rows, end - row);
      multiply(row, n_rows, wide);
      for (int64_t r = 0; r < n_rows; ++r) {
        float* z = tile_ + r * wide;
        map.apply(z, width);
        reduce(z, width, start, p.partials, segment * p.pass_rows + row + r - begin);
        for (int64_t pair = p.first[row + r]; pair < p.first[row + r + 1]; ++pair) {
          const int64_t column = p.target[pair] - start;
          if (column >= 0 && column < width) p.chosen[pair] = z[column];
        }
      }
    }
  }

 private:
  // Logits of a block into the tile [block_rows, wide].
  void multiply(int64_t row, int64_t n_rows, int64_t wide) {
    const Problem& p = problem_;
    const T* x = static_cast<const T*>(p.hidden) + row * p.hidden_stride;
    int64_t stride = p.hidden_stride;
    if (n_rows < p.block_rows || depth_ != p.depth) {
      std::memset(block_, 0, p.block_rows * depth_ * sizeof(T));
      for (int64_t r = 0; r < n_rows; ++r) {
        std::memcpy(block_ + r * depth_, x + r * stride, p.depth * sizeof(T));
      }
      x = block_;
      stride = depth_;
    }
    for (int64_t v = 0; v < wide; v += PANEL) {
      at::native::cpublas::brgemm(p.block_rows, PANEL, depth_, stride, PANEL, wide, false, x,
                                  packed_ + v * depth_, tile_ + v, sizeof(T) == 2);
    }
  }

  const Problem& problem_;
  int64_t depth_;
  T* packed_;
  float* tile_;
  T* block_;
};

template <typename T>
void forward(const Problem& p) {
  const int64_t segments = (p.columns + p.segment_columns - 1) / p.segment_columns;
  for (int64_t begin = 0; begin < p.rows; begin += p.pass_rows) {
    const int64_t end = std::min(p.rows, begin + p.pass_rows);
    std::atomic<int64_t> next{0};
    std::atomic<int64_t> thread{0};
    at::parallel_for(0, p.threads, 1, [&](int64_t, int64_t) {
      Segment<T> work(p, thread++);
      for (int64_t s = next++; s < segments; s = next++) work.run(s, begin, end);
      at::native::cpublas::brgemm_release(sizeof(T) == 2);
    });
    at::parallel_for(0, (end - begin + LANES - 1) / LANES, 16, [&](int64_t from, int64_t to) {
      for (int64_t row = from * LANES; row < std::min(to * LANES, end - begin); row += LANES) {
        const int64_t n = std::min<int64_t>(LANES, end - begin - row);
        merge_rows(p.partials, segments, p.pass_rows, row, n, p.merged, begin + row);
      }
    });
  }
}

thread_local std::string last_error;

}  // namespace

// 0, or 1 with the message in `linear_logprob_error`.
extern "C" int linear_logprob_forward(const Problem* problem, int is_bf16) {
  try {
    if (is_bf16 != 0) {
      forward<at::BFloat16>(*problem);
    } else {
      forward<float>(*problem);
    }
    return 0;
  } catch (const std::exception& error) {
    last_error = error.what();
    return 1;
  }
}

extern "C" const char* linear_logprob_error() { return last_error.c_str(); }

// Whether oneDNN's micro-kernels run here. It packs bf16 only; those of fp32 need no more of a CPU.
extern "C" int linear_logprob_could_run() {
  return at::native::cpublas::could_pack(at::kBFloat16) ? 1 : 0;
}

extern "C" int linear_logprob_panel() { return PANEL; }
