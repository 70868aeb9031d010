// Forward of `linear_logprob` on a CPU: segments of the vocabulary, blocks of rows.
//
// A segment's weight is packed once, then multiplied with one block of rows at a time into a tile
// of fp32 logits that stays in the core's cache, and the tile is reduced on the spot. The products
// are those of the CPU's matrix units, oneDNN's, or our own, by what the CPU has.
// Segments and blocks are fixed by V and D; a block is always full (zero rows behind the last), so
// a row meets the same instructions in any batch. Segments go to threads as they come free and are
// merged in order, so bits do not depend on the number of threads either.
#include <exception>
#include <string>

#include "amx.h"
#include "fma.h"
#include "linear_logprob_bwd.h"
#include "onednn.h"
#include "row_merge.h"
#include "tile.h"

using namespace sharpen;

namespace {

// How the rows and columns are cut, and memory for it.
struct Cut {
  Inputs in;
  int64_t segment_columns, pass_rows, chunk_rows, threads;
  char* hidden;   // a pass of rows, packed
  char* scratch;  // for each thread a segment, a tile, a row of exponentials

  int64_t segments() const { return round_up(in.columns, segment_columns) / segment_columns; }
};

struct Forward {
  Cut cut;
  int64_t k;
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
template <typename M>
struct Scratch {
  typename M::Word* packed;
  float* tile;
  float* e;

  Scratch(const Cut& cut, int64_t thread) {
    char* memory = cut.scratch + thread * bytes(cut);
    const int64_t words = M::right_size(cut.in.depth, cut.segment_columns);
    packed = reinterpret_cast<typename M::Word*>(take(&memory, words * sizeof(typename M::Word)));
    tile = reinterpret_cast<float*>(take(&memory, BLOCK * cut.segment_columns * 4));
    e = reinterpret_cast<float*>(take(&memory, cut.segment_columns * 4));
  }

  static int64_t bytes(const Cut& cut) {
    const int64_t words = M::right_size(cut.in.depth, cut.segment_columns);
    return round_up(words * sizeof(typename M::Word), 64) + (BLOCK + 1) * cut.segment_columns * 4;
  }
};

// The rows from `begin` to `end` as left factors.
template <typename M>
void pack_hidden(const Cut& cut, int64_t begin, int64_t end) {
  const Inputs& in = cut.in;
  const auto* x = static_cast<const typename M::Element*>(in.hidden);
  auto* out = reinterpret_cast<typename M::Word*>(cut.hidden);
  const int64_t blocks = round_up(end - begin, BLOCK) / BLOCK;
  share_out<typename M::Session>(cut.threads, blocks, [&](int64_t, int64_t i) {
    const int64_t row = begin + i * BLOCK;
    M::pack_left(x + row * in.hidden_stride, in.hidden_stride, std::min(BLOCK, end - row), in.depth,
                 out + M::left_size(i * BLOCK, in.depth));
  });
}

// `run(z, row, start, width)` with the logits over one segment of each row from `begin` to `end`,
// in the pass that starts at `pass`.
template <typename M, typename Run>
void each_row(const Cut& cut, const Scratch<M>& scratch, int64_t segment, int64_t pass,
              int64_t begin, int64_t end, const Run& run) {
  const Inputs& in = cut.in;
  const int64_t start = segment * cut.segment_columns;
  const int64_t width = std::min(cut.segment_columns, in.columns - start);
  const int64_t stride = round_up(width, PANEL);
  const auto* weight = static_cast<const typename M::Element*>(in.weight);
  M::pack_columns(weight + start * in.weight_stride, in.weight_stride, width, in.depth,
                  scratch.packed);
  const auto* hidden = reinterpret_cast<const typename M::Word*>(cut.hidden);
  const LogitMap map(in, start);
  for (int64_t row = begin; row < end; row += BLOCK) {
    M::logits(hidden + M::left_size(row - pass, in.depth), scratch.packed, in.depth, width,
              scratch.tile, stride);
    for (int64_t r = 0; r < std::min(BLOCK, end - row); ++r) {
      float* z = scratch.tile + r * stride;
      map.apply(z, width);
      run(z, row + r, start, width);
    }
  }
}

// `run(thread, segment, from, to)` for every segment and chunk of the rows from `begin` to `end`.
template <typename M, typename Run>
void each_task(const Cut& cut, int64_t begin, int64_t end, const Run& run) {
  const int64_t chunks = round_up(end - begin, cut.chunk_rows) / cut.chunk_rows;
  share_out<typename M::Session>(
      cut.threads, cut.segments() * chunks, [&](int64_t thread, int64_t i) {
        const int64_t from = begin + i % chunks * cut.chunk_rows;
        run(thread, i / chunks, from, std::min(end, from + cut.chunk_rows));
      });
}

// `run(begin, end)` for every pass over rows, with these packed.
template <typename M, typename Run>
void each_pass(const Cut& cut, const Run& run) {
  for (int64_t begin = 0; begin < cut.in.rows; begin += cut.pass_rows) {
    const int64_t end = std::min(cut.in.rows, begin + cut.pass_rows);
    pack_hidden<M>(cut, begin, end);
    run(begin, end);
  }
}

// The list of a row that a thread keeps, `row` counted from the start of the pass.
BestColumns best_of(const Forward& p, int64_t thread, int64_t row) {
  const int64_t at = (thread * p.cut.pass_rows + row) * p.k;
  return {p.partials.best + at, p.partials.best_column + at, p.k};
}

template <typename M>
void reduce_segment(const Forward& p, int64_t thread, int64_t segment, int64_t pass, int64_t begin,
                    int64_t end) {
  const Inputs& in = p.cut.in;
  const Scratch<M> scratch(p.cut, thread);
  const RowStatistics statistics(p.partials, p.renyi_order, scratch.e);
  each_row<M>(p.cut, scratch, segment, pass, begin, end,
              [&](const float* z, int64_t row, int64_t start, int64_t width) {
                const int64_t at = segment * p.cut.pass_rows + row - pass;
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

template <typename M>
void forward(const Forward& p) {
  const Cut& cut = p.cut;
  const RowMerge merge(p.partials, cut.segments(), cut.pass_rows, p.renyi_order);
  each_pass<M>(cut, [&](int64_t begin, int64_t end) {
    const int64_t n_rows = end - begin;
    if (p.merged.best != nullptr) {
      for (int64_t thread = 0; thread < cut.threads; ++thread) {
        for (int64_t row = 0; row < n_rows; ++row) best_of(p, thread, row).clear();
      }
    }
    each_task<M>(cut, begin, end, [&](int64_t thread, int64_t segment, int64_t from, int64_t to) {
      reduce_segment<M>(p, thread, segment, begin, from, to);
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
  });
}

// Logits are computed again, by the instructions of `forward`: equal ones are equal there as well.
template <typename M>
void ranks(const Ranks& p) {
  const Inputs& in = p.cut.in;
  each_pass<M>(p.cut, [&](int64_t begin, int64_t end) {
    each_task<M>(p.cut, begin, end, [&](int64_t thread, int64_t segment, int64_t from, int64_t to) {
      each_row<M>(p.cut, Scratch<M>(p.cut, thread), segment, begin, from, to,
                  [&](const float* z, int64_t row, int64_t start, int64_t width) {
                    for (int64_t pair = in.first[row]; pair < in.first[row + 1]; ++pair) {
                      const int64_t left = in.target[pair] - start;
                      const int64_t n = count_ahead(z, width, p.chosen[pair], left);
                      // sums of integers: in any order the same
                      std::atomic_ref(p.ahead[pair]).fetch_add(n, std::memory_order_relaxed);
                    }
                  });
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

// `_linear_logprob_cpu.py` and `_cpu_library.py` know these numbers.
enum Type : int32_t { BF16, FP32, FP16 };
enum Products : int32_t { FMA, ONEDNN, AMX };

// `run(a kind of product)`.
template <typename Run>
auto with_products(Type type, [[maybe_unused]] Products products, const Run& run) {
#ifdef SHARPEN_AMX
  if (products == AMX && type == BF16) return run(Amx<at::BFloat16>());
  if (products == AMX && type == FP16) return run(Amx<at::Half>());
  if (products == AMX) return run(Amx<float>());
#endif
#ifdef __AVX512F__
  if (products == ONEDNN && type == BF16) return run(OneDnn<at::BFloat16>());
  if (products == ONEDNN && type == FP32) return run(OneDnn<float>());
#endif
  if (type == BF16) return run(Fma<at::BFloat16>());
  return type == FP16 ? run(Fma<at::Half>()) : run(Fma<float>());
}

}  // namespace

// 0, or 1 with the message in `linear_logprob_error`.
extern "C" int linear_logprob_forward(const Forward* p, Type type, Products products) {
  return guarded(
      [&] { with_products(type, products, [&](auto m) { forward<decltype(m)>(*p); }); });
}

extern "C" int linear_logprob_ranks(const Ranks* p, Type type, Products products) {
  return guarded(
      [&] { with_products(type, products, [&](auto m) { ranks<decltype(m)>(*p); }); });
}

extern "C" int linear_logprob_backward(const Backward* p, Type type, Products products) {
  return guarded(
      [&] { with_products(type, products, [&](auto m) { backward<decltype(m)>(*p); }); });
}

// Bytes that each thread wants at `scratch`, and a row of a pass at `hidden`.
extern "C" int64_t linear_logprob_scratch_bytes(const Cut* cut, Type type, Products products) {
  return with_products(type, products, [&](auto m) { return Scratch<decltype(m)>::bytes(*cut); });
}

extern "C" int64_t linear_logprob_row_bytes(const Cut* cut, Type type, Products products) {
  return with_products(type, products, [&](auto m) -> int64_t {
    return m.left_size(BLOCK, cut->in.depth) * sizeof(typename decltype(m)::Word) / BLOCK;
  });
}

// Bytes of memory that `linear_logprob_backward` wants at `memory`.
extern "C" int64_t linear_logprob_backward_bytes(const Backward* p, Type type, Products products) {
  return with_products(type, products, [&](auto m) { return Workspace<decltype(m)>().layout(*p); });
}

extern "C" const char* linear_logprob_error() { return last_error.c_str(); }

// The fastest products that run here.
extern "C" int linear_logprob_products() {
#ifdef SHARPEN_AMX
  // oneDNN packs bf16 just where it may use them
  if (at::native::cpublas::could_pack(at::kBFloat16) && may_use_amx()) return AMX;
#endif
#ifdef __AVX512F__
  if (onednn_multiplies()) return ONEDNN;
#endif
  return FMA;
}
