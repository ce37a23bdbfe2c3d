// SPDX-License-Identifier: BSD-3-Clause
// Products of float operands on units that multiply bfloat16: each operand is cut into three parts of 8 bits, which add
// up to it exactly, and of the nine products the six that a float can see are summed in float (Henry, Tang and Heinecke
// 2019). On Intel's AMX that is up to 2.5 times as fast as multiply-adds, with no more error.
//
// A sum runs in chains of kPartChain terms, which are added to what it starts from one after the other; its bits depend
// on its own row and column alone. Denormal parts and products of parts count as zero: a term below 1e-33 loses its
// last bits. An operand that bfloat16 rounds to infinity gives NaN. Implemented in isa/amx_parts.cpp, used by forward.h
// and gradients.h.
#pragma once
#include <stdint.h>

namespace fastrnn {
namespace cpu {

struct Bfloat16;

constexpr int64_t kPartChain = 512;
constexpr int kPartRows = 32;  // of one product; 16 or 32 are read, whatever is wanted
constexpr int kFewRows = 16;   // that multiply_few takes

// out[m][c] = init[m][c] + sum over k of a[m][k] * w[k][c]        m < rows <= 32, c < columns <= 64
struct PartArgs {
  int64_t blocks;     // of 32 terms
  const Bfloat16* a;  // [rows][part][32*blocks], rows a_row apart
  int64_t a_row;
  const Bfloat16* w;  // [blocks][part][vectors][pair of terms][lane][2], vectors = columns / 16 rounded up
  const float* init;  // rows init_row apart (0: one for all); null: zero
  int64_t init_row;
  float* out;  // rows out_row apart
  int64_t out_row;
  int rows, columns;
};

// A few rows times rows of w where they lie, unpacked: to the bits of the product above, which takes x as its left
// operand. out[m][v][lane] = init[v][lane] + sum over k of x[m][k] * w[row of v and lane][k]      m < rows <= 16
struct FewRowsArgs {
  const Bfloat16* x;  // right operand of one vector, a lane for each row
  int rows;
  const float* w;  // as in pack_gates, and so are the next five
  int64_t k, units, unit, blocks;
  int gates;
  const float* init;  // [blocks][gate][lane]
  float* out;         // rows of as much, out_row apart
  int64_t out_row;
};

// Elements of a row of `terms` terms as the left operand; a few more keep rows out of each other's cache set.
static constexpr int64_t part_row(int64_t terms) { return (terms + 31) / 32 * 32 * 3 + 32; }
// Elements of a panel of `terms` terms and `vectors` vectors as the right operand.
static constexpr int64_t part_panel(int64_t terms, int64_t vectors) {
  return (terms + 31) / 32 * 32 * 3 * vectors * 16;
}

struct PartProducts {
  // Around all that a thread multiplies.
  void (*begin)();
  void (*end)();
  void (*multiply)(const PartArgs&);
  void (*multiply_few)(const FewRowsArgs&);
  // n rows of k floats, from_row apart -> left operand, rows part_row(k) apart.
  void (*pack_rows)(const float* from, int64_t from_row, int64_t n, int64_t k, Bfloat16* to);
  // Columns of a [k, a_row] -> left operand, a row for each column, part_row(k) apart, up to a multiple of 16.
  void (*pack_turned)(const float* a, int64_t a_row, int64_t k, int64_t columns, Bfloat16* to);
  // A row of w [.., k] for each gate and unit -> right operand, vectors [block of units][gate]. Of the units from
  // `unit` on, `blocks` blocks; rows of w as pack.h has them.
  void (*pack_gates)(const float* w, int64_t k, int64_t units, int64_t unit, int64_t blocks, int gates, Bfloat16* to);
  // Up to 16 rows of k floats, from_row apart -> right operand of one vector, a lane for each row.
  void (*pack_few)(const float* from, int64_t from_row, int64_t n, int64_t k, Bfloat16* to);
  // Rows row[0], ..., row[k - 1], of which columns [column, end) -> right operand; k <= 32: the block-th of a panel.
  void (*pack_columns)(const float* const* row, int64_t k, int64_t column, int64_t end, Bfloat16* to);
};

}  // namespace cpu
}  // namespace fastrnn
