// `token_logprob` on a CPU: each logit is read from memory once.
//
// A row is cut into segments that stay in the core's cache while the statistics look at them
// several times; fp32 logits are read where they are, others become fp32 there. Segments are fixed
// by V, and merged in order: a row has the same bits in any batch, on any number of threads.
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#include "logit_gradient.h"
#include "row_merge.h"

using namespace sharpen;

namespace {

constexpr int64_t TASK = 65536;  // logits, about: pieces of a row, or several rows
constexpr int64_t LINE = 64;     // bytes that come from memory together

struct NoSession {};  // a thread needs nothing to begin with

struct Cut {
  Inputs in;  // `hidden` are the logits themselves
  int64_t column_stride, segment_columns, threads;

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

struct Backward {
  Cut cut;
  RowGrads of_row;
  const float* of_chosen;  // [pairs], 0 where a pair does not count
  void* dlogits;  // [rows, stride], contiguous
  int64_t stride;
};

// A thread's segments of logits as they enter the distribution.
template <typename T>
class Reader {
 public:
  explicit Reader(const Cut& cut) : cut_(cut), z_(cut.segment_columns) {}

  // Logits of a segment, which starts at column `start`; those of fp32 may be the caller's own.
  const float* read(int64_t row, int64_t start, int64_t width) {
    const T* x = address(row, start);
    if (cut_.column_stride == 1) fetch(x + width, std::min(width, cut_.in.columns - start - width));
    if constexpr (std::is_same_v<T, float>) {
      if (cut_.column_stride == 1 && !LogitMap(cut_.in, start).changes()) return x;
    }
    return copy(row, start, width);
  }

  // The same, always in this thread's memory.
  float* copy(int64_t row, int64_t start, int64_t width) {
    const T* x = address(row, start);
    float* z = z_.data();
    int64_t v = 0;
    if (cut_.column_stride != 1) {
      for (; v < width; ++v) z[v] = static_cast<float>(x[v * cut_.column_stride]);
    }
    for (; v + LANES <= width; v += LANES) store(z + v, load(x + v, All()));
    if (v < width) store(z + v, load(x + v, First(width - v)), First(width - v));
    LogitMap(cut_.in, start).apply(z, width);
    return z;
  }

 private:
  const T* address(int64_t row, int64_t start) const {
    return static_cast<const T*>(cut_.in.hidden) + row * cut_.in.hidden_stride +
           start * cut_.column_stride;
  }

  // The next segment comes from memory while this one is computed.
  static void fetch(const T* x, int64_t width) {
    for (int64_t v = 0; v < width; v += LINE / static_cast<int64_t>(sizeof(T))) {
      _mm_prefetch(reinterpret_cast<const char*>(x + v), _MM_HINT_T1);
    }
  }

  const Cut& cut_;
  std::vector<float> z_;
};

template <typename T>
struct Reducer {
  explicit Reducer(const Forward& p)
      : reader(p.cut), e(p.cut.segment_columns), statistics(p.partials, p.renyi_order, e.data()) {}

  Reader<T> reader;
  std::vector<float> e;
  RowStatistics statistics;
};

// `run(memory of the thread, thread, row, segment, its first column, its width)` for every segment
// of the rows from `begin` to `end`, a thread's neighbours one after another.
template <typename Memory, typename Problem, typename Run>
void each_segment(const Problem& p, const Cut& cut, int64_t begin, int64_t end, const Run& run) {
  const int64_t segments = cut.segments();
  const int64_t row_step = std::max<int64_t>(1, TASK / cut.in.columns);
  const int64_t segment_step = std::max<int64_t>(1, TASK / cut.segment_columns);
  const int64_t parts = (segments + segment_step - 1) / segment_step;
  const int64_t tasks = (end - begin + row_step - 1) / row_step * parts;
  std::vector<std::unique_ptr<Memory>> memory(cut.threads);
  share_out<NoSession>(cut.threads, tasks, [&](int64_t thread, int64_t i) {
    if (memory[thread] == nullptr) memory[thread] = std::make_unique<Memory>(p);
    const int64_t row = begin + i / parts * row_step;
    const int64_t segment = i % parts * segment_step;
    for (int64_t r = row; r < std::min(end, row + row_step); ++r) {
      for (int64_t s = segment; s < std::min(segments, segment + segment_step); ++s) {
        const int64_t start = s * cut.segment_columns;
        const int64_t width = std::min(cut.segment_columns, cut.in.columns - start);
        run(*memory[thread], thread, r, s, start, width);
      }
    }
  });
}

// The list of a row that a thread keeps, `row` counted from the start of the pass.
BestColumns best_of(const Forward& p, int64_t thread, int64_t row) {
  const int64_t at = (thread * p.pass_rows + row) * p.k;
  return {p.partials.best + at, p.partials.best_column + at, p.k};
}

void merge_best(const Forward& p, int64_t row, int64_t out_row) {
  const BestColumns out{p.merged.best + out_row * p.k, p.merged.best_column + out_row * p.k, p.k};
  out.clear();
  for (int64_t thread = 0; thread < p.cut.threads; ++thread) out.take(best_of(p, thread, row));
}

template <typename T>
void forward(const Forward& p) {
  const Inputs& in = p.cut.in;
  const RowMerge merge(p.partials, p.cut.segments(), p.pass_rows, p.renyi_order);
  for (int64_t begin = 0; begin < in.rows; begin += p.pass_rows) {
    const int64_t n_rows = std::min(p.pass_rows, in.rows - begin);
    for (int64_t i = 0; p.merged.best != nullptr && i < p.cut.threads * n_rows; ++i) {
      best_of(p, i / n_rows, i % n_rows).clear();
    }
    each_segment<Reducer<T>>(
        p, p.cut, begin, begin + n_rows,
        [&](Reducer<T>& own, int64_t thread, int64_t row, int64_t s, int64_t start, int64_t width) {
          const float* z = own.reader.read(row, start, width);
          own.statistics.reduce(z, width, start, s * p.pass_rows + row - begin,
                                best_of(p, thread, row - begin));
          for (int64_t pair = in.first[row]; pair < in.first[row + 1]; ++pair) {
            const int64_t column = in.target[pair] - start;
            if (column >= 0 && column < width) p.chosen[pair] = z[column];
          }
        });
    for (int64_t row = 0; row < n_rows; row += LANES) {
      merge.merge(row, std::min<int64_t>(LANES, n_rows - row), p.merged, begin + row);
    }
    for (int64_t row = 0; p.merged.best != nullptr && row < n_rows; ++row) {
      merge_best(p, row, begin + row);
    }
  }
}

template <typename T>
void ranks(const Ranks& p) {
  const Inputs& in = p.cut.in;
  each_segment<Reader<T>>(
      p.cut, p.cut, 0, in.rows,
      [&](Reader<T>& reader, int64_t, int64_t row, int64_t, int64_t start, int64_t width) {
        if (in.first[row] == in.first[row + 1]) return;
        const float* z = reader.read(row, start, width);
        for (int64_t pair = in.first[row]; pair < in.first[row + 1]; ++pair) {
          const int64_t n = count_ahead(z, width, p.chosen[pair], in.target[pair] - start);
          // sums of integers: in any order the same
          std::atomic_ref(p.ahead[pair]).fetch_add(n, std::memory_order_relaxed);
        }
      });
}

template <typename T>
void backward(const Backward& p) {
  const Inputs& in = p.cut.in;
  each_segment<Reader<T>>(
      p.cut, p.cut, 0, in.rows,
      [&](Reader<T>& reader, int64_t, int64_t row, int64_t, int64_t start, int64_t width) {
        T* out = static_cast<T*>(p.dlogits) + row * p.stride + start;
        // columns past the vocabulary follow its last segment
        const int64_t end = start + width == in.columns ? p.stride - start : width;
        if (p.of_row.active[row] == 0) {
          std::memset(out, 0, end * sizeof(T));
          return;
        }
        float* z = reader.copy(row, start, width);
        row_gradient(z, start, width, in, p.of_row, p.of_chosen, row);
        int64_t v = 0;
        for (; v + LANES <= width; v += LANES) store(out + v, load(z + v), All());
        if (v < width) store(out + v, load(z + v, First(width - v)), First(width - v));
        std::memset(out + width, 0, (end - width) * sizeof(T));
      });
}

// `run(an element)`; `_cpu_library.py` knows these numbers.
template <typename Run>
void with_type(int32_t type, const Run& run) {
  if (type == 0) return run(at::BFloat16());
  if (type == 1) return run(float());
  return run(at::Half());
}

}  // namespace

extern "C" int token_logprob_forward(const Forward* p, int32_t type, bool) {
  with_type(type, [&](auto x) { forward<decltype(x)>(*p); });
  return 0;
}

extern "C" int token_logprob_ranks(const Ranks* p, int32_t type, bool) {
  with_type(type, [&](auto x) { ranks<decltype(x)>(*p); });
  return 0;
}

extern "C" int token_logprob_backward(const Backward* p, int32_t type, bool) {
  with_type(type, [&](auto x) { backward<decltype(x)>(*p); });
  return 0;
}
