// Backward of `linear_logprob`: the logits computed again, tile by tile, by the same instructions.
//
// The vocabulary is taken in waves and the rows in passes, so that the gradient of a wave's logits
// fits the workspace; three parallel steps follow one another. (1) weight and rows are packed,
// (2) tiles of logits become tiles of their gradient, (3) these multiply the weight into the
// gradient of hidden and the rows into that of the weight. Every output element has one owner and
// one order of sums: no bit depends on the number of threads.
// For bf16 the gradient of a logit is the sum of two bf16 numbers (16 bits of it are kept), which
// the dot-product units multiply several times faster than fp32.
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

constexpr int64_t TILE_COLUMNS = 256;
constexpr int64_t DEPTH_CHUNK = 256;  // of one task of a product

template <typename T>
struct Workspace {
  T* weight_by_depth;    // the wave's weight, right factor of hidden x weight^T
  T* weight_by_column;   // and of dlogits x weight
  T* hidden_by_row;      // right factor of dlogits^T x hidden
  Factor<T> dz;          // [pass_rows, wave_columns]
  Factor<T> dz_t;        // [wave_columns, pass_rows]
  float* dweight;        // [wave_columns, depth]
  float* column_sums;    // [blocks of a pass, wave_columns]
  char* scratch;         // for each thread a tile and a block
  int64_t scratch_bytes;

  // Pieces of p.memory; returns the bytes they take.
  int64_t layout(const Backward& p) {
    char* memory = p.memory;
    const int64_t depth = padded_depth<T>(p.in.depth);
    const int64_t panels = round_up(p.in.depth, PANEL);
    const auto some = [&memory](bool wanted, int64_t n) {
      return reinterpret_cast<T*>(take(&memory, wanted ? n * sizeof(T) : 0));
    };
    const bool left = p.dhidden != nullptr;
    const bool right = p.dweight != nullptr;
    weight_by_depth = some(true, p.wave_columns * depth);
    weight_by_column = some(left, p.wave_columns * panels);
    hidden_by_row = some(right, p.pass_rows * panels);
    const int64_t n = p.wave_columns * p.pass_rows;
    dz = {some(left, n), sizeof(T) == 2 ? some(left, n) : nullptr};
    dz_t = {some(right, n), sizeof(T) == 2 ? some(right, n) : nullptr};
    dweight = reinterpret_cast<float*>(take(&memory, right ? p.wave_columns * p.in.depth * 4 : 0));
    const int64_t sums = p.dbias == nullptr ? 0 : p.pass_rows / BLOCK * p.wave_columns;
    column_sums = reinterpret_cast<float*>(take(&memory, sums * 4));
    scratch_bytes = BLOCK * TILE_COLUMNS * 4 + round_up(BLOCK * depth * sizeof(T), 64);
    scratch = take(&memory, p.threads * scratch_bytes);
    return memory - p.memory;
  }
};

// Rows [n, depth] as the right factor of a product over rows, in panels [rows, PANEL], bf16 in
// pairs of rows; rows from n to `whole`, and those not `active` (null: all are), are zeros.
template <typename T>
void pack_rows(const T* x, int64_t stride, int64_t n, int64_t whole, int64_t depth,
               const uint8_t* active, T* out, int64_t panel_stride) {
  const auto row = [&](int64_t r, int64_t d) {
    const auto here = static_cast<uint32_t>(std::min<int64_t>(16, depth - d));
    const auto mask = static_cast<__mmask16>((1U << here) - 1);
    const bool counts = r < n && (active == nullptr || active[r] != 0);
    const T* at = x + (counts ? r * stride + d : 0);
    const __mmask16 read = counts ? mask : 0;
    if constexpr (sizeof(T) == 4) {
      return _mm512_maskz_loadu_epi32(read, at);
    } else {
      return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(read, at));
    }
  };
  constexpr int64_t WORD = 4 / sizeof(T);  // rows
  for (int64_t r = 0; r < whole; r += WORD) {
    for (int64_t d = 0; d < depth; d += 16) {
      __m512i word = row(r, d);
      if constexpr (WORD == 2) {
        word = _mm512_or_si512(word, _mm512_slli_epi32(row(r + 1, d), 16));
      }
      T* panel = out + d / PANEL * panel_stride + r * PANEL + d % PANEL * WORD;
      _mm512_storeu_si512(panel, word);
    }
  }
}

template <typename T>
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
        if (p_.dweight != nullptr && !kept) {
          share(whole_ / BLOCK, [&](int64_t, int64_t i) { pack_hidden(i * BLOCK); });
        }
        const int64_t tiles = round_up(wide_, TILE_COLUMNS) / TILE_COLUMNS;
        const int64_t blocks = whole_ / BLOCK;
        share(tiles * blocks, [&](int64_t thread, int64_t i) {
          fill(thread, i / blocks * TILE_COLUMNS, i % blocks * BLOCK);
        });
        const int64_t chunks = round_up(depth_, DEPTH_CHUNK) / DEPTH_CHUNK;
        if (p_.dhidden != nullptr) {
          share(blocks * chunks, [&](int64_t, int64_t i) {
            add_to_hidden(i / chunks * BLOCK, i % chunks * DEPTH_CHUNK);
          });
        }
        if (p_.dweight != nullptr) {
          share(wide_ / BLOCK * chunks, [&](int64_t, int64_t i) {
            add_to_weight(i / chunks * BLOCK, i % chunks * DEPTH_CHUNK);
          });
        }
        if (p_.dbias != nullptr) add_to_bias();
      }
    }
  }

 private:
  template <typename Run>
  void share(int64_t tasks, const Run& run) const {
    share_out<T>(p_.threads, tasks, run);
  }

  void pack_weight(int64_t column) {
    const Inputs& in = p_.in;
    const auto* weight = static_cast<const T*>(in.weight) + (start_ + column) * in.weight_stride;
    const int64_t n = std::min(PANEL, width_ - column);
    const int64_t by_depth = column * padded_depth<T>(depth_);
    pack(weight, in.weight_stride, n, depth_, space_.weight_by_depth + by_depth);
    if (p_.dhidden != nullptr) {
      pack_rows(weight, in.weight_stride, n, PANEL, depth_, nullptr,
                space_.weight_by_column + column * PANEL, p_.wave_columns * PANEL);
    }
  }

  void pack_hidden(int64_t row) {
    const Inputs& in = p_.in;
    const auto* x = static_cast<const T*>(in.hidden) + (begin_ + row) * in.hidden_stride;
    pack_rows(x, in.hidden_stride, std::min(BLOCK, n_rows_ - row), BLOCK, depth_,
              p_.of_row.active + begin_ + row, space_.hidden_by_row + row * PANEL,
              p_.pass_rows * PANEL);
  }

  // Gradients of one tile's logits, as they are and transposed, and their sums over the rows.
  void fill(int64_t thread, int64_t column, int64_t row) {
    const Inputs& in = p_.in;
    char* memory = space_.scratch + thread * space_.scratch_bytes;
    auto* tile = reinterpret_cast<float*>(take(&memory, BLOCK * TILE_COLUMNS * 4));
    const Product<T> product{in, reinterpret_cast<T*>(memory)};
    const int64_t first = begin_ + row;
    const int64_t n = std::min(BLOCK, n_rows_ - row);
    const int64_t width = std::min(TILE_COLUMNS, width_ - column);
    const int64_t wide = round_up(width, PANEL);
    const uint8_t* active = p_.of_row.active + first;
    product.run(space_.weight_by_depth + column * padded_depth<T>(depth_), first, n, active, width,
                tile, wide);
    const int64_t start = start_ + column;
    const LogitMap map(in, start);
    for (int64_t r = 0; r < BLOCK; ++r) {
      float* z = tile + r * wide;
      const bool counts = r < n && active[r] != 0;
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
    if (p_.dhidden != nullptr) {
      for (int64_t r = 0; r < BLOCK; ++r) {
        for (int64_t v = 0; v < wide; v += LANES) {
          const int64_t at = (row + r) * p_.wave_columns + column + v;
          space_.dz.store(at, _mm512_loadu_ps(tile + r * wide + v));
        }
      }
    }
    if (p_.dweight != nullptr) {
      for (int64_t v = 0; v < wide; v += LANES) {
        for (int64_t r = 0; r < BLOCK; r += LANES) {
          __m512i x[LANES];
          for (int i = 0; i < LANES; ++i) x[i] = _mm512_loadu_si512(tile + (r + i) * wide + v);
          transpose(x);
          for (int i = 0; i < LANES; ++i) {
            const int64_t at = (column + v + i) * p_.pass_rows + row + r;
            space_.dz_t.store(at, _mm512_castsi512_ps(x[i]));
          }
        }
      }
    }
  }

  // out [BLOCK, depth] += or = left [BLOCK, n] x right [n, depth], over one chunk of the depth.
  void multiply(const Factor<T>& left, int64_t at, int64_t stride, const T* right,
                int64_t panel_stride, int64_t n, int64_t chunk, bool add, float* out) const {
    for (int64_t d = chunk; d < std::min(depth_, chunk + DEPTH_CHUNK); d += PANEL) {
      const int64_t wide = std::min(PANEL, depth_ - d);
      const T* panel = right + d / PANEL * panel_stride;
      const auto brgemm = [&](const T* x, bool onto) {
        at::native::cpublas::brgemm(BLOCK, wide, n, stride, PANEL, depth_, onto, x + at, panel,
                                    out + d, sizeof(T) == 2);
      };
      brgemm(left.high, add);
      if (left.low != nullptr) brgemm(left.low, true);
    }
  }

  void add_to_hidden(int64_t row, int64_t chunk) {
    multiply(space_.dz, row * p_.wave_columns, p_.wave_columns, space_.weight_by_column,
             p_.wave_columns * PANEL, wide_, chunk, true, p_.dhidden + (begin_ + row) * depth_);
  }

  void add_to_weight(int64_t column, int64_t chunk) {
    float* sums = space_.dweight + column * depth_;
    multiply(space_.dz_t, column * p_.pass_rows, p_.pass_rows, space_.hidden_by_row,
             p_.pass_rows * PANEL, whole_, chunk, begin_ > 0, sums);
    if (begin_ + n_rows_ < p_.in.rows) return;
    auto* out = static_cast<T*>(p_.dweight) + (start_ + column) * depth_;
    const int64_t end = std::min(depth_, chunk + DEPTH_CHUNK);
    for (int64_t v = 0; v < std::min(BLOCK, width_ - column); ++v) {
      for (int64_t d = chunk; d < end; ++d) out[v * depth_ + d] = static_cast<T>(sums[v * depth_ + d]);
    }
  }

  void add_to_bias() {
    float* out = p_.dbias + start_;
    for (int64_t v = 0; v < width_; ++v) {
      float sum = begin_ == 0 ? 0.0F : out[v];
      for (int64_t i = 0; i < whole_ / BLOCK; ++i) sum += space_.column_sums[i * p_.wave_columns + v];
      out[v] = sum;
    }
  }

  const Backward& p_;
  const int64_t depth_;
  Workspace<T> space_{};
  int64_t start_ = 0, width_ = 0, wide_ = 0;       // of the wave; wide in whole panels
  int64_t begin_ = 0, n_rows_ = 0, whole_ = 0;     // of the pass; whole in full blocks
};

template <typename T>
void backward(const Backward& p) {
  BackwardPass<T>(p).run();
}

}  // namespace sharpen
