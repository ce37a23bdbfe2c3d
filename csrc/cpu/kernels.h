// SPDX-License-Identifier: BSD-3-Clause
// What run.cpp (threads, scratch) and the files in isa/ (kernels) agree on: the work of one thread, and the table of
// functions that an instruction set offers. Plain data: no function with a symbol of its own is defined here, so none
// is shared by objects compiled for different instruction sets.
#pragma once
#include <stdint.h>

#include "layer.h"
#include "parts.h"

namespace fastrnn {
namespace cpu {

// What the cores of this machine do well (core.cpp).
struct Core {
  bool asks_near;      // tiles ask for the lines of a large panel some terms before they load them (matmul.h)
  bool asks_rows;      // tiles of a backward step fetch what the next one reads (backward.h); where they cannot, a row
                       // asks for the next row's lines, as packing does for rows of smaller matrices, too (pack.h)
  bool cell_in_two;    // an LSTM's cell is two loops over the rows (lines.h)
  int64_t kept_bytes;  // of a thread's W_hh that stays in its second-level cache: no panel is fetched ahead (forward.h)
  int64_t forward_pass, backward_pass;  // least terms that the tiles of a panel take together (pass_terms in matmul.h)
};
extern const Core core;

// How far a member of a team that runs at the same time is: the rounds of waiting it has begun. It alone writes it, on
// two cache lines of its own, since some processors fetch them in pairs.
struct Signal {
  alignas(64) int64_t rounds;
  char rest[120];
};

// The threads that work on one direction, and how they share it. Splitting rows needs no barrier between steps, every
// thread runs whole sequences; splitting units keeps each thread's slice of the weights in its own cache and costs one
// barrier a step.
struct Team {
  int member, members;
  bool split_units;
  bool deals;       // rows go to the members in turn, and not in blocks: their lengths differ
  Signal* signals;  // one of each member
};

// Waits until all members of the team have arrived; yields the core after a while. A team of one returns at once.
void wait(const Team& team);

// Rows, at most, of a product with weights in place (direct.h).
constexpr int64_t kDirectRows = 12;

// One thread's part of one direction, forward. Element type of every void*: the table's; with products in bfloat16
// w_ih, w_hh, w_hr, masked_h, cell_h and x_rows are bfloat16, in blocks (blocks.h): I, R and the terms of w_hr and
// cell_h are padded to 32 there; the rest is float.
struct ForwardTask {
  const LayerForward* layer;
  int direction;
  Team team;
  const int64_t* first_row;   // [T] rows before step t, sum of batch_sizes; null without them (t*B)
  int64_t chunk_rows;         // rows of input gates computed at a time; at least the rows of one step
  const PartProducts* parts;  // for the products with W_ih, or null; w_ih lies as it wants then
  bool packed;                // the weights below came packed (PackedWeights): read, never written
  bool downwards;             // ForwardSweep walks the panels downwards in even steps and upwards in odd ones
  // Shared by the team, packed here (pack.h) unless they came packed; Hp = padded(H), Rp = padded(R), Pp = padded(P).
  void* w_ih;  // [Hp*G*I]
  void* w_hh;  // [Hp*G*R]
  void* b_ih;  // [Hp*G]
  void* b_hh;  // [Hp*G]
  void* w_hr;  // [Pp*H], with a projection
  // Shared by the team when it splits units, else the thread's own; rows are the thread's.
  void* h[2];         // [rows, Rp], the state before and after a step, in turns
  void* c;            // [rows, Hp], LSTM only
  void* masked_h[2];  // [rows, Rp], h times its mask, which W_hh multiplies; h itself without a mask; 15 rows more to
                      // read, and always a copy, in bfloat16
  // The thread's own.
  void* x_gates;   // [chunk_rows, Hp*G]; with products in bfloat16 15 rows more to read, each 16 elements longer
  void* x_rows;    // [chunk_rows, I], rows of x gathered where they do not lie at one stride, or are converted
  void* few_rows;  // [kDirectRows, I + R] and 16: rows of x, and of h, turned over for products in place (direct.h)
  void* x_parts;   // with parts: [chunk_rows, I] as left operand (parts.h), and 31 rows more to read
  void* cell_h;    // [rows, Hp], o*tanh(c) before the projection; 15 rows more to read in bfloat16
};

// One thread's part of the backward sweep over one direction: from d_y to the gradients of the gates. With products in
// bfloat16 w_hh, w_hr, d_gates, d_h and cell_h are bfloat16, w_hh and w_hr in blocks, rows of d_gates
// gate_gradients_row() long and those of d_h padded to 32.
struct BackwardTask {
  const LayerBackward* layer;
  int direction;
  Team team;
  const int64_t* first_row;
  // Shared by the team.
  void* w_hh;     // [G*H, Rp] in column panels
  void* w_hr;     // [P, Hp] in column panels
  void* d_gates;  // [N, kStored*H] and kOverread elements, the result; 31 rows more of each member to read in bfloat16
  void* d_h;      // [N, P], likewise, dL/dh at every step, with a projection
  void* cell_h;   // [N, H], o*tanh(c) at every step, with a projection, when d_w_hr is wanted; else null
  // Shared by the team when it splits units, else the thread's own.
  void* d_state;  // [rows, Rp], what reaches h other than through w_hh
  void* d_c;      // [rows, Hp], LSTM only
};

// One thread's part of the large products after the sweeps; the team is all threads of the call. With products in
// bfloat16 all but the sums are bfloat16, w_ih, panels and strip in blocks, of kBlockSumRows rows.
struct GradientTask {
  const LayerBackward* layer;
  Team team;
  const int64_t* first_row;
  const int64_t* places;  // [N] row in d_x of each row of d_gates, where they differ; else null
  const void* d_gates[2];
  const void* d_h[2];
  const void* cell_h[2];
  const PartProducts* input_parts;   // for d_x, or null; w_ih lies as it wants then
  const PartProducts* weight_parts;  // for the gradients of weights, or null; so do panels and strip then
  void* w_ih[2];                     // shared: [G*H, padded(I)] in column panels
  void* panels;  // shared, twice: [kSumRows, padded(I) + padded(R) (+ padded(H))] of x, h (and cell_h) in column panels
  void* strip;   // own: see pack_strip
  void* sums;    // own: [kStripColumns + 16]
  void* strip_sums;     // own: [kStripColumns, max(I, R, H)], where weights' gradients are narrowed after a single pass
  void* d_gates_parts;  // own, with input_parts: [kPartInputRows, kPartChain] of d_gates as left operand
  void* wide_d_x;       // own, where elements are converted: [at most input_block_rows(), I], rows of d_x as floats
};

// Rows of d_x that pass over all panels of W_ih together. Their gate gradients, of `terms` elements of `bytes`, and a
// panel fill half of a small second-level cache.
static constexpr int64_t input_block_rows(int64_t terms, int64_t bytes) {
  const int64_t rows = 256 * 1024 / (terms * bytes);
  return rows < 48 ? 48 : rows;
}

// Rows that the weight gradients take at a time: two chains of the tile. More would mean fewer passes over d_w, but the
// packed rows of x and h should stay in the second-level cache (512 measured 3 % slower at H = 256, 1 MB of L2).
constexpr int64_t kSumRows = 256;
// Columns of the gate gradients that are packed at a time for the weight gradients.
constexpr int64_t kStripColumns = 192;
// pack_strip copies 16, 32 or 64 bytes at a time: it may read up to so many elements past an array.
constexpr int64_t kOverread = 16;
// Elements of a packed strip, for tiles of 3 rows or more (gradients.h asserts it).
constexpr int64_t kStripElements = kStripColumns * kSumRows + (kStripColumns / 3) * 16 + 8 * kSumRows;

// With products in bfloat16: rows that the weight gradients take at a time, elements of a packed strip, and elements
// from one row of the gate gradients to the next. A window of the gates is read in whole blocks, wherever it begins.
constexpr int64_t kBlockSumRows = 512, kBlockStripElements = kStripColumns * (kBlockSumRows + 32);
static constexpr int64_t sum_rows(bool is_bfloat16) { return is_bfloat16 ? kBlockSumRows : kSumRows; }
static constexpr int64_t gate_gradients_row(int64_t stored, int64_t H) { return in_blocks(stored * H) + 32; }

// Rows of d_x that products in parts work on at a time, chain by chain.
constexpr int64_t kPartInputRows = 128;

constexpr int kCells = 5;  // of enum Cell; null where the table has no such cell

struct Kernels {
  int lanes;
  void (*forward[kCells])(const ForwardTask&);    // by Cell
  void (*backward[kCells])(const BackwardTask&);  // by Cell
  void (*gradients[kCells])(const GradientTask&);
  void (*pack[kCells])(const LayerForward& layer, int direction, const PackedWeights& packed);  // every panel
  void (*activation)(Activation which, const void* x, void* y, int64_t n);
  int equal_rows;  // rows that a product takes as long for as for one, with products in bfloat16; else 0
};

// What both sides of a library with a cell of its own must agree on; sizes tell most changes of the structs.
constexpr int64_t kOwnLayout =
    ((((sizeof(OwnCell) * 4099 + sizeof(LayerForward)) * 4099 + sizeof(LayerBackward)) * 4099 + sizeof(ForwardTask)) *
         4099 +
     sizeof(BackwardTask)) *
        4099 +
    sizeof(GradientTask) + sizeof(Kernels) + sizeof(PartArgs) + sizeof(PartProducts);

struct Isa {
  const char* name;
  bool (*supported)();
  const Kernels* of_float;
  const Kernels* of_double;
  const Kernels* of_bfloat16;  // null: bfloat16 is converted to float
  const PartProducts* parts;   // null: products of float operands are multiply-adds
  bool (*preferred)();         // whether it is chosen by itself before the ones that stand ahead of it
};

const Isa& chosen_isa();

extern const Kernels scalar_float, scalar_double;
extern const Kernels avx2_float, avx2_double;
extern const Kernels avx512_float, avx512_double;
extern const Kernels avx512_bfloat16, amx_bfloat16;
extern const PartProducts amx_parts;

// Asks the system for AMX's tiles, for the whole process; whether it grants them.
bool amx_granted();

}  // namespace cpu
}  // namespace fastrnn
