// SPDX-License-Identifier: BSD-3-Clause
// One recurrent layer with its directions, as plain pointers and sizes.
// layer.cpp fills these structs from tensors; plan.cpp and run.cpp plan threads and call the kernels of the chosen ISA.
// Nothing here includes torch, so every file below this line can be compiled and tested without it.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "../cell_sizes.h"
#include "own_cell.h"

namespace fastrnn {
namespace cpu {

// An array with one row for each step of each sequence, the features of a row adjacent.
// Padded: element (t, b, k) at t*stride_t + b*stride_b + k; packed: row n at n*stride_b.
struct Strided {
  const void* data;  // null: not given
  int64_t stride_t, stride_b;
};

// How elements of 16 bits become floats and back, for kernels that compute in float: a row at a time where they read
// and write it.
struct Conversion {
  bool is_half;  // float16, else bfloat16
  void (*widen)(const uint16_t* from, float* to, int64_t n);
  void (*narrow)(const float* from, uint16_t* to, int64_t n);  // to nearest, ties to even
};

// Letters: T time, B batch, I input, H hidden units, P projection, G gates, D directions;
// R = P with a projection, else H (the width of h); N = rows of x and y = T*B, or the packed row count.
// Every array is contiguous and row-major unless strides are given; elements are float or double, but for those that
// is_bfloat16 and conversion name below.

struct Kernels;
struct PartProducts;

// The weights of one direction as the tile reads them (pack.h), made once by pack_weights() and read by any number of
// calls. Padded to Hp = padded(H), Rp = padded(R).
struct PackedWeights {
  const Kernels* kernels;     // whose layout it is: no other instruction set can read it
  const PartProducts* parts;  // with which w_ih is multiplied, or null; that of the plan
  bool is_bfloat16;           // as LayerForward::is_bfloat16
  void* w_ih;                 // [Hp*G*I]
  void* w_hh;                 // [Hp*G*R]
  void* b_ih;                 // [Hp*G], zeros without a bias
  void* b_hh;                 // [Hp*G]
  void* w_hr;                 // [Rp*H], with a projection
};

// What one direction reads and writes in the forward pass.
struct DirectionForward {
  const void* w_ih;             // [G*H, I]
  const void* w_hh;             // [G*H, R]
  const void* b_ih;             // [G*H] or null
  const void* b_hh;             // [G*H] or null
  const void* w_hr;             // [P, H] or null
  const void* parameters;       // [parameters*H], of an own cell that has some; never packed
  const PackedWeights* packed;  // read in place of the five above, or null
  const void* h0;               // [B, R]
  const void* c0;               // [B, H], LSTM only, else null
  void* h_n;                    // [B, R]
  void* c_n;                    // [B, H], LSTM only, else null
  void* gates;                  // [N, padded(H)/16, saved, 16], written when not null; null for RNN
  void* cells;                  // [N, H], c at every step, written when not null; LSTM only
  // What replaces the state where `reset` is set, when it is given: one row for all sequences, or with reset_by_row one
  // for each.
  const void* reset_h;  // [B, R] or [R]
  const void* reset_c;  // [B, H] or [H], LSTM only
  const void* h_mask;   // [B, R] or null; what multiplies h on its way into W_hh, and nowhere else
};

struct LayerForward {
  Cell cell;
  const OwnCell* own;  // with Cell::own, else null
  bool is_double;      // element type of every array: double, else float
  // x, y, h0, reset_h, the weights but for biases, and the gradients of x and y are bfloat16, and multiplied as such.
  bool is_bfloat16;
  const Conversion* conversion;  // not null: the same arrays have elements of 16 bits, which it makes floats
  int64_t T, B, I, H, P, D, N;
  const int64_t* batch_sizes;  // [T] rows of each step, non-increasing, batch_sizes[0] = B; null when all have B rows
  // Rows of a padded batch that end early: x, y, gates, cells and their gradients are [T', B'] still, of which only the
  // N = sum of batch_sizes rows that exist are touched. B counts the sequences of one step or more, T their longest.
  const int64_t* order;  // [B] place in the batch of each sequence, longest first; null when packed, or all are equal
  int64_t step_rows;     // B' if padded: the rows of a step in x, y, gates and cells
  const void* x;         // padded: element (t, b, k) at t*x_stride_t + b*x_stride_b + k; packed: row n at n*x_stride_b
  int64_t x_stride_t, x_stride_b;
  void* y;  // [N, D*R]; direction d owns columns [d*R, (d+1)*R)
  // [T, step_rows], not 0 where the state before step t is replaced; null: nowhere. Never with a packed batch. In the
  // reverse direction it is the state on its way from step t to step t-1.
  const uint8_t* reset;
  bool reset_by_row;
  // How much of the state before a step stays, from 0 to 1: next = keep*before + (1-keep)*(what the cell makes).
  Strided zoneout_h;  // [N, D*R]
  Strided zoneout_c;  // [N, D*H], LSTM only
  DirectionForward direction[2];
};

// Where the gradient of a weight goes: as sums in the type of the kernels, or in 16 bits, with room for sums of all its
// elements if there are more rows than one pass over them takes (sum_rows). Both null: it is not wanted.
struct WeightGradient {
  void* sums;
  uint16_t* narrow;
  explicit operator bool() const { return sums || narrow; }
};

// What one direction reads and writes in the backward pass, beside the forward's own arrays.
struct DirectionBackward {
  const void* d_h_n;      // [B, R] or null (zero)
  const void* d_c_n;      // [B, H] or null (zero)
  const void* d_cells;    // [N, H] or null (zero)
  void* d_h0;             // [B, R] or null (not wanted); likewise every pointer below
  void* d_c0;             // [B, H]
  WeightGradient d_w_ih;  // [G*H, I]
  WeightGradient d_w_hh;  // [G*H, R]
  void* d_b_ih;           // [G*H]
  void* d_b_hh;           // [G*H]
  WeightGradient d_w_hr;  // [P, H]
  void* d_parameters;     // [parameters*H]
  void* d_reset_h;        // [B, R], added to
  void* d_reset_c;        // [B, H], added to
  // What the large products are made of. Null: kept in the scratch. Given: the gradients of weights must be null.
  void* d_gates;  // [N, stored*H]: LSTM i f g o; GRU n of the input, r, z, n of the recurrence; RNN its sum
  void* d_h;      // [N, P], dL/dh at every step, with a projection
};

struct LayerBackward {
  LayerForward forward;  // as it was called, with y, gates and cells filled; read only (h_n and c_n are not used)
  const void* d_y;       // [N, D*R] or null (zero)
  void* d_x;             // [N, I] or null (not wanted)
  const Conversion* narrowing;  // of the gradients of weights, where they are wanted in 16 bits
  DirectionBackward direction[2];
};

// Rows that are operands of products in bfloat16 are padded to whole blocks of 32 terms.
static constexpr int64_t in_blocks(int64_t terms) { return (terms + 31) / 32 * 32; }

// How one call runs, decided once: the kernels of the instruction set chosen at that moment, the threads, and the
// scratch that the caller allocates, uninitialised, 64-byte aligned.
struct Plan {
  const Kernels* kernels;
  int threads;    // of the region
  int members;    // of the team of one direction
  bool together;  // two teams, a direction each; else one thread takes the directions in turn
  bool split_units;
  size_t scratch_bytes;
  const PartProducts* input_parts = nullptr;   // products with W_ih, null: multiply-adds
  const PartProducts* weight_parts = nullptr;  // gradients of weights, likewise
};
// threads: at most this many are used (at::get_num_threads()).
Plan plan_forward(const LayerForward& layer, int threads);
Plan plan_backward(const LayerBackward& layer, int threads);

// Runs the layer in one parallel region. Never allocates, never throws.
void run_forward(const LayerForward& layer, const Plan& plan, void* scratch);
void run_backward(const LayerBackward& layer, const Plan& plan, void* scratch);

// Packs w_ih, w_hh, b_ih, b_hh and w_hr of a direction for the instruction set chosen now, or as `like` lies if not
// null. packed_bytes: what its arrays take, 64-byte aligned; pack_weights lays them out in `memory`.
size_t packed_bytes(const LayerForward& layer, const PackedWeights* like);
PackedWeights pack_weights(const LayerForward& layer, int direction, const PackedWeights* like, void* memory);

// How threads share a layer is chosen by its size; tests force either way, also where it does not pay.
enum class Split : int { chosen, rows, units };
void force_split(Split split);
// What a round of waiting takes a team of so many threads now, in ns (meeting.cpp), and as it did last where no team
// can run; choices go by it from then on.
double measure_round_time(int threads);
// For the tests: choices go by this instead; 0 ends that.
void hold_round_time(double ns);

// Whether products are computed in parts (parts.h) wherever they can be, for tests, and not where it pays.
void force_parts(bool always);

// sigmoid or tanh of n values by the code that the cells use, for the tests of its accuracy.
enum class Activation : int { sigmoid, tanh };
void activate(Activation which, bool is_double, bool rounded, const void* x, void* y, int64_t n);

// Whether the instruction set chosen now has products in bfloat16.
bool multiplies_bfloat16();
// Whether it has products of floats in parts (parts.h).
bool multiplies_in_parts();

// The instruction sets compiled in and supported by this machine. Names: scalar avx2 avx512 avx512_bf16 amx; the last
// two are avx512 but for bfloat16. select_isa returns false for a name that is unknown or unsupported. FASTRNN_ISA is
// read at the first use.
const char* isa_name();
bool select_isa(const char* name);
int available_isas(const char* names[], int capacity);

}  // namespace cpu
}  // namespace fastrnn
