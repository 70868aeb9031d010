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
#include "row_statistics.h"
#include "tile.h"

using namespace sharpen;

namespace {

struct Forward {
  Inputs in;
  int64_t segment_columns, pass_rows, chunk_rows, threads;
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

// Statistics of the rows from `begin` to `end`, in the pass that starts at `pass`, over one segment.
template <typename T>
void reduce_segment(const Forward& p, int64_t thread, int64_t segment, int64_t pass, int64_t begin,
                    int64_t end) {
  const Inputs& in = p.in;
  const int64_t depth = padded_depth<T>(in.depth);
  char* memory = p.scratch + thread * p.scratch_bytes;
  auto* packed = reinterpret_cast<T*>(take(&memory, p.segment_columns * depth * sizeof(T)));
  auto* tile = reinterpret_cast<float*>(take(&memory, BLOCK * p.segment_columns * 4));
  const Product<T> product{in, reinterpret_cast<T*>(take(&memory, BLOCK * depth * sizeof(T)))};

  const int64_t start = segment * p.segment_columns;
  const int64_t width = std::min(p.segment_columns, in.columns - start);
  const int64_t stride = round_up(width, LANES);
  const auto* weight = static_cast<const T*>(in.weight) + start * in.weight_stride;
  pack(weight, in.weight_stride, width, in.depth, packed);
  const RowPartial reduce = row_partial_for(p.partials);
  const LogitMap map{in.bias == nullptr ? nullptr : in.bias + start, in.temperature, in.softcap};
  for (int64_t row = begin; row < end; row += BLOCK) {
    const int64_t n_rows = std::min(BLOCK, end - row);
    product.run(packed, row, n_rows, nullptr, width, tile, stride);
    for (int64_t r = 0; r < n_rows; ++r) {
      float* z = tile + r * stride;
      map.apply(z, width);
      reduce(z, width, start, p.partials, segment * p.pass_rows + row + r - pass);
      for (int64_t pair = in.first[row + r]; pair < in.first[row + r + 1]; ++pair) {
        const int64_t column = in.target[pair] - start;
        if (column >= 0 && column < width) p.chosen[pair] = z[column];
      }
    }
  }
}

template <typename T>
void forward(const Forward& p) {
  const int64_t rows = p.in.rows;
  const int64_t segments = round_up(p.in.columns, p.segment_columns) / p.segment_columns;
  for (int64_t begin = 0; begin < rows; begin += p.pass_rows) {
    const int64_t end = std::min(rows, begin + p.pass_rows);
    const int64_t chunks = round_up(end - begin, p.chunk_rows) / p.chunk_rows;
    share_out<T>(p.threads, segments * chunks, [&](int64_t thread, int64_t i) {
      const int64_t from = begin + i % chunks * p.chunk_rows;
      const int64_t to = std::min(end, from + p.chunk_rows);
      reduce_segment<T>(p, thread, i / chunks, begin, from, to);
    });
    at::parallel_for(0, round_up(end - begin, LANES) / LANES, 16, [&](int64_t from, int64_t to) {
      for (int64_t row = from * LANES; row < std::min(to * LANES, end - begin); row += LANES) {
        const int64_t n = std::min<int64_t>(LANES, end - begin - row);
        merge_rows(p.partials, segments, p.pass_rows, row, n, p.merged, begin + row);
      }
    });
  }
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
