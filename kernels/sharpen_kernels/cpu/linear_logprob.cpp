// Forward of `linear_logprob` on a CPU with AVX-512: segments of the vocabulary over blocks of rows.
//
// A segment's weight is packed once (pairs of bf16 beside each other, as the dot-product units read
// them; fp32 transposed), then oneDNN's micro-kernel multiplies it with one block of rows at a time
// into a tile of fp32 logits that stays in the core's cache, and the tile is reduced on the spot.
// Segments and blocks are fixed by V and D; a block is always full (zero rows behind the last), so a
// row meets the same instructions in any batch. Segments go to threads as they come free and are
// merged in order, so bits do not depend on the number of threads either.
#include <exception>
#include <string>

#include "linear_logprob_bwd.h"
#include "row_merge.h"
#include "tile.h"

using namespace sharpen;

namespace {

// How the rows and columns are cut, and memory for each thread.
struct Cut {
  Inputs in;
  int64_t segment_columns, chunk_rows, threads;
  char* scratch;  // for each thread a segment, a tile, a block, a row of exponentials
  int64_t scratch_bytes;

  int64_t segments() const { return round_up(in.columns, segment_columns) / segment_columns; }
};

struct Forward {
  Cut cut;
  int64_t pass_rows, k;
  float renyi_order;
  // outputs, [rows] each, or null where not asked for; chosen [pairs], NaN beforehand
  Partials merged;
  float* chosen;
  // memory: [segments, pass_rows] for each field, [threads, pass_rows, k] for the best
  Partials partials;
};

struct Ranks {
  Cut cut;
  const float* chosen;  // [pairs]
  int64_t* ahead;       // [pairs], 0 beforehand
};

// The pieces of one thread's memory.
template <typename T>
struct Scratch {
  T* packed;
  float* tile;
  T* block;
  float* e;

  Scratch(const Cut& cut, int64_t thread) {
    const int64_t depth = padded_depth<T>(cut.in.depth);
    char* memory = cut.scratch + thread * cut.scratch_bytes;
    packed = reinterpret_cast<T*>(take(&memory, cut.segment_columns * depth * sizeof(T)));
    tile = reinterpret_cast<float*>(take(&memory, BLOCK * cut.segment_columns * 4));
    block = reinterpret_cast<T*>(take(&memory, BLOCK * depth * sizeof(T)));
    e = reinterpret_cast<float*>(take(&memory, cut.segment_columns * 4));
  }
};

// `run(z, row, start, width)` with the logits of each row from `begin` to `end` over one segment.
template <typename T, typename Run>
void each_row(const Cut& cut, const Scratch<T>& scratch, int64_t segment, int64_t begin,
              int64_t end, const Run& run) {
  const Inputs& in = cut.in;
  const int64_t start = segment * cut.segment_columns;
  const int64_t width = std::min(cut.segment_columns, in.columns - start);
  const int64_t stride = round_up(width, LANES);
  const auto* weight = static_cast<const T*>(in.weight) + start * in.weight_stride;
  pack(weight, in.weight_stride, width, in.depth, scratch.packed);
  const Product<T> product{in, scratch.block};
  const LogitMap map(in, start);
  for (int64_t row = begin; row < end; row += BLOCK) {
    const int64_t n_rows = std::min(BLOCK, end - row);
    product.run(scratch.packed, row, n_rows, nullptr, width, scratch.tile, stride);
    for (int64_t r = 0; r < n_rows; ++r) {
      float* z = scratch.tile + r * stride;
      map.apply(z, width);
      run(z, row + r, start, width);
    }
  }
}

// `run(thread, segment, from, to)` for every segment and chunk of the rows from `begin` to `end`.
template <typename T, typename Run>
void each_task(const Cut& cut, int64_t begin, int64_t end, const Run& run) {
  const int64_t chunks = round_up(end - begin, cut.chunk_rows) / cut.chunk_rows;
  share_out<T>(cut.threads, cut.segments() * chunks, [&](int64_t thread, int64_t i) {
    const int64_t from = begin + i % chunks * cut.chunk_rows;
    run(thread, i / chunks, from, std::min(end, from + cut.chunk_rows));
  });
}

// The list of a row that a thread keeps, `row` counted from the start of the pass.
BestColumns best_of(const Forward& p, int64_t thread, int64_t row) {
  const int64_t at = (thread * p.pass_rows + row) * p.k;
  return {p.partials.best + at, p.partials.best_column + at, p.k};
}

template <typename T>
void reduce_segment(const Forward& p, int64_t thread, int64_t segment, int64_t pass, int64_t begin,
                    int64_t end) {
  const Inputs& in = p.cut.in;
  const Scratch<T> scratch(p.cut, thread);
  const RowStatistics statistics(p.partials, p.renyi_order, scratch.e);
  each_row<T>(p.cut, scratch, segment, begin, end,
              [&](const float* z, int64_t row, int64_t start, int64_t width) {
                const int64_t at = segment * p.pass_rows + row - pass;
                statistics.reduce(z, width, start, at, best_of(p, thread, row - pass));
                for (int64_t pair = in.first[row]; pair < in.first[row + 1]; ++pair) {
                  const int64_t column = in.target[pair] - start;
                  if (column >= 0 && column < width) p.chosen[pair] = z[column];
                }
              });
}

void merge_best(const Forward& p, int64_t row, int64_t out_row) {
  const BestColumns out{p.merged.best + out_row * p.k, p.merged.best_column + out_row * p.k, p.k};
  out.clear();
  for (int64_t thread = 0; thread < p.cut.threads; ++thread) out.take(best_of(p, thread, row));
}

template <typename T>
void forward(const Forward& p) {
  const Cut& cut = p.cut;
  const RowMerge merge(p.partials, cut.segments(), p.pass_rows, p.renyi_order);
  for (int64_t begin = 0; begin < cut.in.rows; begin += p.pass_rows) {
    const int64_t n_rows = std::min(cut.in.rows - begin, p.pass_rows);
    if (p.merged.best != nullptr) {
      for (int64_t thread = 0; thread < cut.threads; ++thread) {
        for (int64_t row = 0; row < n_rows; ++row) best_of(p, thread, row).clear();
      }
    }
    each_task<T>(cut, begin, begin + n_rows,
                 [&](int64_t thread, int64_t segment, int64_t from, int64_t to) {
                   reduce_segment<T>(p, thread, segment, begin, from, to);
                 });
    at::parallel_for(0, round_up(n_rows, LANES) / LANES, 16, [&](int64_t from, int64_t to) {
      for (int64_t row = from * LANES; row < std::min(to * LANES, n_rows); row += LANES) {
        merge.merge(row, std::min<int64_t>(LANES, n_rows - row), p.merged, begin + row);
      }
      if (p.merged.best == nullptr) return;
      for (int64_t row = from * LANES; row < std::min(to * LANES, n_rows); ++row) {
        merge_best(p, row, begin + row);
      }
    });
  }
}

// Logits are computed again, by the instructions of `forward`: equal ones are equal there as well.
template <typename T>
void ranks(const Ranks& p) {
  const Inputs& in = p.cut.in;
  each_task<T>(p.cut, 0, in.rows, [&](int64_t thread, int64_t segment, int64_t from, int64_t to) {
    each_row<T>(p.cut, Scratch<T>(p.cut, thread), segment, from, to,
                [&](const float* z, int64_t row, int64_t start, int64_t width) {
                  for (int64_t pair = in.first[row]; pair < in.first[row + 1]; ++pair) {
                    const int64_t n = count_ahead(z, width, p.chosen[pair], in.target[pair] - start);
                    // sums of integers: in any order the same
                    std::atomic_ref(p.ahead[pair]).fetch_add(n, std::memory_order_relaxed);
                  }
                });
  });
}

thread_local std::string last_error;

template <typename Run>
int guarded(const Run& run) {
  try {
    run();
    return 0;
  } catch (const std::exception& error) {
    last_error = error.what();
    return 1;
  }
}

}  // namespace

// 0, or 1 with the message in `linear_logprob_error`.
extern "C" int linear_logprob_forward(const Forward* p, int is_bf16) {
  return guarded([&] { is_bf16 != 0 ? forward<at::BFloat16>(*p) : forward<float>(*p); });
}

extern "C" int linear_logprob_ranks(const Ranks* p, int is_bf16) {
  return guarded([&] { is_bf16 != 0 ? ranks<at::BFloat16>(*p) : ranks<float>(*p); });
}

extern "C" int linear_logprob_backward(const Backward* p, int is_bf16) {
  return guarded([&] { is_bf16 != 0 ? backward<at::BFloat16>(*p) : backward<float>(*p); });
}

// Bytes of memory that `linear_logprob_backward` wants at `memory`.
extern "C" int64_t linear_logprob_backward_bytes(const Backward* p, int is_bf16) {
  return is_bf16 != 0 ? Workspace<at::BFloat16>().layout(*p) : Workspace<float>().layout(*p);
}

extern "C" const char* linear_logprob_error() { return last_error.c_str(); }

// Whether oneDNN's micro-kernels run here. It packs bf16 only; those of fp32 need no more of a CPU.
extern "C" int linear_logprob_could_run() {
  return at::native::cpublas::could_pack(at::kBFloat16) ? 1 : 0;
}
