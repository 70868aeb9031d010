// Backward of `linear_logprob`: the logits computed again, tile by tile, by the same instructions.
//
// The vocabulary is taken in waves and the rows in passes, so that the gradient of a wave's logits
// fits the workspace; three parallel steps follow one another. (1) weight and rows are packed,
// (2) tiles of logits become tiles of their gradient, (3) these multiply the rows into the gradient
// of the weight and the weight into that of hidden. Every output element has one owner and
// one order of sums: no bit depends on the number of threads.
// For bf16 and fp16 inputs the gradient of a logit is taken as the sum of two bf16 numbers (16 bits
// of it are kept), which is multiplied several times faster than fp32.
#pragma once

#include "logit_gradient.h"
#include "tile.h"

namespace sharpen {

struct Backward {
  Inputs in;
  RowGrads of_row;
  const float* of_chosen;  // [pairs], 0 where a pair does not count
  int64_t wave_columns, pass_rows, threads;  // whole panels, whole blocks
  // outputs, null where not asked for
  float* dhidden;  // [rows up to whole blocks, depth], zeros beforehand
  void* dweight;   // [columns, depth]
  float* dbias;    // [columns]
  char* memory;    // `layout` says how much
};

// Depth and rows of a piece of a product: the right factor stays in the cache while the blocks that
// multiply it follow one another.
constexpr int64_t DEPTH_CHUNK = 256;
constexpr int64_t ROWS_CHUNK = 512;
constexpr int64_t TASKS = 4;  // at the least for each thread

// M is one of the kinds of product: `Fma`, `OneDnn` or `Amx`.
template <typename M>
struct Workspace {
  using Word = typename M::Word;

  Word* weight_by_depth;   // the wave's weight, right factor of hidden x weight^T
  Word* weight_by_column;  // and of dlogits x weight
  Word* hidden_by_depth;   // the pass's rows, left factor of hidden x weight^T
  Word* hidden_by_row;     // right factor of dlogits^T x hidden
  Word* dz;                // [pass_rows, wave_columns], left factor
  Word* dz_t;              // [wave_columns, pass_rows]
  float* dweight;          // [wave_columns, depth]
  float* column_sums;      // [blocks of a pass, wave_columns]
  char* tiles;             // one for each thread

  // Pieces of p.memory; returns the bytes they take.
  int64_t layout(const Backward& p) {
    char* memory = p.memory;
    const int64_t depth = p.in.depth;
    const int64_t rows = p.pass_rows;
    const int64_t columns = p.wave_columns;
    const auto some = [&memory](bool wanted, int64_t n) {
      return reinterpret_cast<Word*>(take(&memory, wanted ? n * sizeof(Word) : 0));
    };
    const bool left = p.dhidden != nullptr;
    const bool right = p.dweight != nullptr;
    weight_by_depth = some(true, M::right_size(depth, columns));
    weight_by_column = some(left, M::right_size(columns, depth));
    hidden_by_depth = some(true, M::left_size(rows, depth));
    hidden_by_row = some(right, M::right_size(rows, depth));
    dz = some(left, M::gradient_size(rows, columns));
    dz_t = some(right, M::gradient_size(columns, rows));
    dweight = reinterpret_cast<float*>(take(&memory, right ? columns * depth * 4 : 0));
    const int64_t sums = p.dbias == nullptr ? 0 : rows / BLOCK * columns;
    column_sums = reinterpret_cast<float*>(take(&memory, sums * 4));
    tiles = take(&memory, p.threads * BLOCK * M::TILE_COLUMNS * 4);
    return memory - p.memory;
  }
};

template <typename M>
class BackwardPass {
 public:
  explicit BackwardPass(const Backward& p) : p_(p), depth_(p.in.depth) { space_.layout(p); }

  void run() {
    const int64_t rows = p_.in.rows;
    for (start_ = 0; start_ < p_.in.columns; start_ += p_.wave_columns) {
      width_ = std::min(p_.wave_columns, p_.in.columns - start_);
      wide_ = round_up(width_, PANEL);
      share(wide_ / PANEL, [&](int64_t, int64_t i) { pack_weight(i * PANEL); });
      for (begin_ = 0; begin_ < rows; begin_ += p_.pass_rows) {
        n_rows_ = std::min(p_.pass_rows, rows - begin_);
        whole_ = round_up(n_rows_, BLOCK);
        const bool kept = rows <= p_.pass_rows && start_ > 0;  // packed for the wave before
        if (!kept) share(whole_ / BLOCK, [&](int64_t, int64_t i) { pack_hidden(i * BLOCK); });
        const int64_t tiles = round_up(wide_, M::TILE_COLUMNS) / M::TILE_COLUMNS;
        const int64_t blocks = whole_ / BLOCK;
        share(tiles * blocks, [&](int64_t thread, int64_t i) {
          fill(thread, i / blocks * M::TILE_COLUMNS, i % blocks * BLOCK);
        });
        multiply();
        if (p_.dbias != nullptr) add_to_bias();
      }
    }
  }

 private:
  using T = typename M::Element;

  template <typename Run>
  void share(int64_t tasks, const Run& run) const {
    share_out<typename M::Session>(p_.threads, tasks, run);
  }

  void pack_weight(int64_t column) {
    const Inputs& in = p_.in;
    const auto* weight = static_cast<const T*>(in.weight) + (start_ + column) * in.weight_stride;
    const int64_t n = std::min(PANEL, width_ - column);
    M::pack_columns(weight, in.weight_stride, n, depth_,
                    space_.weight_by_depth + M::right_size(depth_, column));
    if (p_.dhidden != nullptr) {
      M::pack_rows(weight, in.weight_stride, n, depth_, nullptr, space_.weight_by_column, column,
                   p_.wave_columns);
    }
  }

  void pack_hidden(int64_t row) {
    const Inputs& in = p_.in;
    const auto* x = static_cast<const T*>(in.hidden) + (begin_ + row) * in.hidden_stride;
    const uint8_t* active = p_.of_row.active + begin_ + row;
    const int64_t n = std::min(BLOCK, n_rows_ - row);
    M::pack_left(x, in.hidden_stride, n, depth_,
                 space_.hidden_by_depth + M::left_size(row, depth_));
    if (p_.dweight != nullptr) {
      M::pack_rows(x, in.hidden_stride, n, depth_, active, space_.hidden_by_row, row,
                   p_.pass_rows);
    }
  }

  // Gradients of one tile's logits, as they are and transposed, and their sums over the rows.
  void fill(int64_t thread, int64_t column, int64_t row) {
    const Inputs& in = p_.in;
    auto* tile = reinterpret_cast<float*>(space_.tiles) + thread * BLOCK * M::TILE_COLUMNS;
    const int64_t first = begin_ + row;
    const int64_t n = std::min(BLOCK, n_rows_ - row);
    const int64_t width = std::min(M::TILE_COLUMNS, width_ - column);
    const int64_t wide = round_up(width, PANEL);
    if (reached(row)) {
      M::logits(space_.hidden_by_depth + M::left_size(row, depth_),
                space_.weight_by_depth + M::right_size(depth_, column), depth_, width, tile, wide);
    }
    const int64_t start = start_ + column;
    const LogitMap map(in, start);
    for (int64_t r = 0; r < BLOCK; ++r) {
      float* z = tile + r * wide;
      const bool counts = r < n && p_.of_row.active[first + r] != 0;
      if (counts) {
        map.apply(z, width);
        row_gradient(z, start, width, in, p_.of_row, p_.of_chosen, first + r);
      }
      std::fill(z + (counts ? width : 0), z + wide, 0.0F);
    }
    if (p_.dbias != nullptr) {
      float* sums = space_.column_sums + row / BLOCK * p_.wave_columns + column;
      std::fill(sums, sums + wide, 0.0F);
      for (int64_t r = 0; r < n; ++r) {
        for (int64_t v = 0; v < wide; ++v) sums[v] += tile[r * wide + v];
      }
    }
    const int64_t rows = p_.pass_rows;
    const int64_t columns = p_.wave_columns;
    if (p_.dhidden != nullptr) {
      for (int64_t r = 0; r < BLOCK; ++r) {
        for (int64_t v = 0; v < wide; v += LANES) {
          M::store(space_.dz, rows, columns, row + r, column + v, load(tile + r * wide + v));
        }
      }
    }
    if (p_.dweight != nullptr) {
      for (int64_t v = 0; v < wide; v += LANES) {
        for (int64_t r = 0; r < BLOCK; r += LANES) {
          Words x[LANES];
          for (int i = 0; i < LANES; ++i) x[i] = load_bits(tile + (r + i) * wide + v);
          transpose(x);
          for (int i = 0; i < LANES; ++i) {
            M::store(space_.dz_t, columns, rows, column + v + i, row + r, as_lanes(x[i]));
          }
        }
      }
    }
  }

  // Both products in one step: a thread that waits for another is a thread lost.
  void multiply() {
    const int64_t chunks = round_up(depth_, DEPTH_CHUNK) / DEPTH_CHUNK;
    const int64_t columns = wide_ / BLOCK;
    const int64_t wanted = round_up(TASKS * p_.threads, chunks) / chunks;
    const int64_t each = columns / std::min(columns, wanted);  // blocks of columns of a task
    const int64_t groups = round_up(columns, each) / each;
    const int64_t of_weight = p_.dweight == nullptr ? 0 : groups * chunks;
    const int64_t blocks = whole_ / BLOCK;
    const int64_t of_hidden = p_.dhidden == nullptr ? 0 : blocks * chunks;
    share(of_weight + of_hidden, [&](int64_t, int64_t i) {
      if (i >= of_weight) {
        i -= of_weight;
        add_to_hidden(i % blocks * BLOCK, i / blocks * DEPTH_CHUNK);
        return;
      }
      const int64_t first = i % groups * each;
      for (int64_t at = 0; at < whole_; at += ROWS_CHUNK) {
        for (int64_t c = first; c < std::min(columns, first + each); ++c) {
          add_to_weight(c * BLOCK, i / groups * DEPTH_CHUNK, at);
        }
      }
    });
  }

  // Whether a gradient reaches a row of the block from `row` on: none does in a prompt, say.
  bool reached(int64_t row) const {
    const uint8_t* active = p_.of_row.active + begin_ + row;
    return std::memchr(active, 1, std::min(BLOCK, n_rows_ - row)) != nullptr;
  }

  void add_to_hidden(int64_t row, int64_t chunk) {
    if (!reached(row)) return;
    M::multiply(space_.dz, p_.pass_rows, p_.wave_columns, row, 0, wide_, space_.weight_by_column,
                depth_, chunk, std::min(depth_, chunk + DEPTH_CHUNK), true,
                p_.dhidden + (begin_ + row) * depth_);
  }

  // The pass's rows from `at` on.
  void add_to_weight(int64_t column, int64_t chunk, int64_t at) {
    auto* out = static_cast<T*>(p_.dweight) + (start_ + column) * depth_;
    const int64_t n = std::min(BLOCK, width_ - column);
    const int64_t end = std::min(depth_, chunk + DEPTH_CHUNK);
    const int64_t rows = std::min(ROWS_CHUNK, whole_ - at);
    float* sums = space_.dweight + column * depth_;
    if constexpr (sizeof(T) == 4) {
      if (n == BLOCK) sums = out;
    }
    M::multiply(space_.dz_t, p_.wave_columns, p_.pass_rows, column, at, rows, space_.hidden_by_row,
                depth_, chunk, end, begin_ + at > 0, sums);
    const bool last = begin_ + at + rows >= p_.in.rows;
    if (!last || static_cast<void*>(sums) == static_cast<void*>(out)) return;
    for (int64_t v = 0; v < n; ++v) {
      for (int64_t d = chunk; d < end; ++d) {
        out[v * depth_ + d] = static_cast<T>(sums[v * depth_ + d]);
      }
    }
  }

  void add_to_bias() {
    float* out = p_.dbias + start_;
    for (int64_t v = 0; v < width_; ++v) {
      float sum = begin_ == 0 ? 0.0F : out[v];
      for (int64_t i = 0; i < whole_ / BLOCK; ++i) {
        sum += space_.column_sums[i * p_.wave_columns + v];
      }
      out[v] = sum;
    }
  }

  const Backward& p_;
  const int64_t depth_;
  Workspace<M> space_{};
  int64_t start_ = 0, width_ = 0, wide_ = 0;       // of the wave; wide in whole panels
  int64_t begin_ = 0, n_rows_ = 0, whole_ = 0;     // of the pass; whole in full blocks
};

template <typename M>
void backward(const Backward& p) {
  BackwardPass<M>(p).run();
}

}  // namespace sharpen
