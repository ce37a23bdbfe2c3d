// SPDX-License-Identifier: BSD-3-Clause
// Products of bfloat16 operands with sums in float: what the sweeps and the gradients of *_blocks.h run on, and how
// their operands are laid out. An operand lies in blocks of 32 terms, which a product takes at a time in pairs: an AMX
// tile (isa/amx.cpp) or 16 dot products of pairs (isa/avx512_bf16.cpp).
//
// out[m][v][lane] = init[m][v][lane] + sum over k of a[m][k] * w[k][v][lane]      m < rows, v < nv vectors of 16 lanes
//
// The sum starts from init and takes k in ascending order, whatever m, nv and the other rows are. So a sum over two
// operands, one after the other, has the bits of two products, of which the second starts from what the first left.
#pragma once
#include "elements.h"
#include "pack.h"

namespace fastrnn {
namespace cpu {

constexpr int kBlockTerms = 32, kBlockRows = 16, kBlockLanes = 16;
constexpr int kRowsAtOnce = 2 * kBlockRows;            // of one product: two blocks of rows share what they read of w
constexpr int64_t kBlock = kBlockTerms * kBlockLanes;  // elements of a block of w: [pair of terms][lane][2]

struct BlockTerms {
  int64_t k;          // length of the reduction, may be 0; a and w go on with zeros to whole blocks of 32 terms
  const Bfloat16* a;  // a[m][k] at a[m*a_row + k]
  int64_t a_row;
  const Bfloat16* w;  // [blocks][nv][pair of terms][lane][2]
  // What is fetched into the second-level cache meanwhile: with each block `lines` cache lines, ahead_row elements on
  // from those before. The processor's own prefetching ends with a page, which is a block of four vectors.
  const Bfloat16* ahead;
  int64_t lines, ahead_row;
};

// What the product of rows [row, row + 32) of n fetches while it reads a panel of nv vectors: its share of the panel
// that is used next, if there is one.
static inline __attribute__((always_inline)) void fetch_ahead(BlockTerms& terms, int64_t nv, const Bfloat16* next,
                                                              int64_t row, int64_t n) {
  const int64_t tiles = (n + kRowsAtOnce - 1) / kRowsAtOnce, q = row / kRowsAtOnce;
  const int64_t parts = tiles >= 4 ? 4 : tiles >= 2 ? 2 : 1;
  const bool fetches = next && q < parts;
  terms.lines = fetches ? nv * 16 / parts : 0;
  terms.ahead_row = fetches ? nv * kBlock : 0;
  terms.ahead = fetches ? next + q * terms.lines * 32 : terms.w;
}

struct BlockArgs {
  BlockTerms terms[2];  // the second sum goes on where the first ends
  const float* init;    // [nv][lane], of row m init_row*m elements later (0: one row for all)
  int64_t init_row;
  float* out;  // [rows] rows of [nv][lane], out_row elements apart
  int64_t out_row;
  int rows;  // that are wanted, 1 to 32
  // Rows that may be computed at a time, 1 to 16: a, init and out have whole multiples of it. The same for as many
  // calls as possible, since AMX is set up anew where the number changes (58 ns) and takes no less time for fewer.
  int room;
};

// The elements of x, y and the weights in bfloat16. Blocks, the class of an instruction set:
//   load(p, lanes), store(v, p, lanes)   16 elements, or the first few; store rounds to nearest, ties to even
//   interleave(even, odd, lanes, to)     pairs of terms: to[lane][2], zero past `lanes`; odd may be null: zero
//   scale_pairs(even, odd, pairs)        16 pairs times a factor for each of their terms, rounded
//   transpose(from, from_row, to)        to[j][m] = from[m][j], 16 rows of 16 pairs, from_row elements apart
//   multiply(args, nv)                   the product above, of an object that one sweep has; end() after the last one
//   kEqualRows                           rows for which it takes as long as for one
// and using Element = Bfloat16, kRounds = true.

// Rows [first, first + 16) of w [.., k_size], of which `rows` exist -> blocks [block][pair of terms][row][2], `step`
// elements apart, zero past the last row and the last term.
template <class Blocks>
void pack_transposed(const Bfloat16* w, int64_t k_size, int64_t rows, Bfloat16* to, int64_t step) {
  for (int64_t k = 0; k < k_size; k += kBlockTerms, to += step) {
    const int64_t terms = k_size - k < kBlockTerms ? k_size - k : kBlockTerms;
    if (rows >= kBlockLanes && terms == kBlockTerms) {
      Blocks::transpose(w + k, k_size, to);
      continue;
    }
    alignas(64) Bfloat16 part[kBlock] = {};
    for (int64_t row = 0; row < rows && row < kBlockLanes; ++row) {
      for (int64_t j = 0; j < terms; ++j) part[row * kBlockTerms + j] = w[row * k_size + k + j];
    }
    Blocks::transpose(part, kBlockTerms, to);
  }
}

// w [G*H, K], a row per gate and unit -> for each panel of [p0, p1), one behind the other,
// [block of terms][block of units][gate][pair of terms][lane][2].
template <class Blocks, int G>
void pack_gate_blocks(const Bfloat16* w, int64_t k_size, const Panels& panels, int64_t p0, int64_t p1,
                      Bfloat16* packed) {
  const int64_t k_row = in_blocks(k_size);
  for (int64_t p = p0; p < p1; ++p) {
    const int64_t width = panels.width(p), step = width * G * kBlock;
    Bfloat16* panel = packed + (panels.first(p) - panels.first(p0)) * G * kBlockLanes * k_row;
    for (int64_t block = 0; block < width; ++block) {
      const int64_t unit = (panels.first(p) + block) * kBlockLanes;
      for (int g = 0; g < G; ++g) {
        pack_transposed<Blocks>(w + (g * panels.n + unit) * k_size, k_size, panels.n - unit,
                                panel + (block * G + g) * kBlock, step);
      }
    }
  }
}

// Rows row(0), ..., row(k_size - 1) of panels.n columns, null for a row of zeros -> for each panel of [p0, p1), one
// behind the other, [block of terms][block of columns][pair of terms][lane][2]. No transpose: pairs of rows.
template <class Blocks, class Row>
inline __attribute__((always_inline)) void pack_column_blocks(const Row& row, int64_t k_size, const Panels& panels,
                                                              int64_t p0, int64_t p1, Bfloat16* packed) {
  const int64_t k_row = in_blocks(k_size);
  for (int64_t p = p0; p < p1; ++p) {
    const int64_t width = panels.width(p);
    Bfloat16* panel = packed + (panels.first(p) - panels.first(p0)) * kBlockLanes * k_row;
    for (int64_t k = 0; k < k_row; k += 2) {
      const Bfloat16* const even = k < k_size ? row(k) : nullptr;
      const Bfloat16* const odd = k + 1 < k_size ? row(k + 1) : nullptr;
      Bfloat16* to = panel + k / kBlockTerms * width * kBlock + k % kBlockTerms * kBlockLanes;
      for (int64_t block = 0; block < width; ++block, to += kBlock) {
        const int64_t column = (panels.first(p) + block) * kBlockLanes;
        const int64_t left = panels.n - column;
        Blocks::interleave(even ? even + column : nullptr, odd ? odd + column : nullptr,
                           left < kBlockLanes ? static_cast<int>(left) : kBlockLanes, to);
      }
    }
  }
}

// Columns [0, 16) of a [rows, a_row], of which `columns` exist -> [column][terms], rows past the last one zero.
template <class Blocks>
void pack_block_strip(const Bfloat16* a, int64_t a_row, int64_t rows, int columns, Bfloat16* strip, int64_t strip_row) {
  for (int64_t k = 0; k < rows; k += kBlockTerms) {
    alignas(64) Bfloat16 pairs[kBlock], turned[kBlock];
    for (int64_t j = 0; j < kBlockTerms; j += 2) {
      const Bfloat16* const even = k + j < rows ? a + (k + j) * a_row : nullptr;
      const Bfloat16* const odd = k + j + 1 < rows ? a + (k + j + 1) * a_row : nullptr;
      Blocks::interleave(even, odd, columns, pairs + j * kBlockLanes);
    }
    Blocks::transpose(pairs, 2 * kBlockLanes, turned);
    for (int column = 0; column < kBlockRows; ++column) {
      __builtin_memcpy(strip + column * strip_row + k, turned + column * kBlockTerms, kBlockTerms * sizeof(Bfloat16));
    }
  }
}

// w_hr [P, H] -> panels [first, last) of rows of h, as the forward sweep reads them.
template <class Blocks>
void pack_projection_blocks(const LayerForward& layer, int d, int64_t first, int64_t last, void* packed) {
  const Panels panels(layer.P, kBlockLanes, 4);
  pack_gate_blocks<Blocks, 1>(static_cast<const Bfloat16*>(layer.direction[d].w_hr), layer.H, panels, first, last,
                              static_cast<Bfloat16*>(packed) + panels.first(first) * kBlockLanes * in_blocks(layer.H));
}

// The packed weights of one direction as the forward sweep reads them.
template <class Cell, class V, class Blocks>
void pack_direction_blocks(const LayerForward& layer, int d, const PackedWeights& packed) {
  constexpr int G = Cell::kGates;
  const DirectionForward& direction = layer.direction[d];
  const Panels units(layer.H, kBlockLanes, kForwardPanel<Cell>);
  pack_gate_blocks<Blocks, G>(static_cast<const Bfloat16*>(direction.w_ih), layer.I, units, 0, units.count,
                              static_cast<Bfloat16*>(packed.w_ih));
  pack_gate_blocks<Blocks, G>(static_cast<const Bfloat16*>(direction.w_hh), layer.P ? layer.P : layer.H, units, 0,
                              units.count, static_cast<Bfloat16*>(packed.w_hh));
  pack_bias<V, G>(static_cast<const float*>(direction.b_ih), units, 0, units.count, static_cast<float*>(packed.b_ih));
  pack_bias<V, G>(static_cast<const float*>(direction.b_hh), units, 0, units.count, static_cast<float*>(packed.b_hh));
  if (layer.P) pack_projection_blocks<Blocks>(layer, d, 0, Panels(layer.P, kBlockLanes, 4).count, packed.w_hr);
}

}  // namespace cpu
}  // namespace fastrnn
