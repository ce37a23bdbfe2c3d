// SPDX-License-Identifier: BSD-3-Clause
// What the kernels of a step read and write: plain pointers and sizes, passed to a kernel by value.
// sweep.cpp fills these structs, forward.cuh and backward.cuh have the kernels' bodies. No torch, no CUDA.
//
// Letters as everywhere: T time, B batch, H hidden units, P projection, R = P or H, D directions, G gates, N = rows of
// x and y = T*B, or the packed row count. Arrays are contiguous and row-major, their address a multiple of 16 bytes.
// Two element types: that of the tensors, `element`, and that of the math, double for float64 and float for all others.
#pragma once
#include <stdint.h>

#include "../cell_sizes.h"
#include "elements.h"

namespace fastrnn {
namespace cuda {

// One direction at one step of its sweep. Earlier, later: in the order of the sweep, backwards in time for direction 1.
// A row is a sequence of the batch, the rows of a step the sequences that may take part in it.
struct Step {
  int64_t t;             // of this step, in time
  int64_t row;           // of its first sequence in an array of N rows
  int64_t rows;          // packed: batch_sizes[t]; else B
  int64_t earlier_t;     // the step before
  int64_t earlier_row;   // likewise
  int64_t earlier_rows;  // 0 at the first step
  int64_t later_t;       // the step after
  int64_t later_rows;    // 0 at the last step
};

// An array with a row for each step of each sequence: (t, b, k) at t*stride_t + b*stride_b + k, packed row n at
// n*stride_b + k.
struct Spread {
  const void* data;  // null: not given
  int64_t stride_t, stride_b;
};

// What all kernels of a layer have in common. Null where an argument is not given.
struct Layer {
  Element element;
  bool packed;
  int64_t T, B, H, R, D, N;
  Step step[2];            // of each direction
  const int64_t* lengths;  // [B], where the kernels run, any values: those outside 0..T count as 0 or T
  const uint8_t* reset;    // [T, B], not 0 where the state before step t is replaced
  // In the type of the tensors.
  const void* h0;       // [D, B, R]
  const void* c0;       // [D, B, H]
  const void* reset_h;  // [D, B, R], null: zeros
  const void* reset_c;  // [D, B, H], null: zeros
  const void* h_mask;   // [D, B, R]
  Spread zoneout_h;     // rows of D*R
  Spread zoneout_c;     // rows of D*H
  void* y;              // [N, D*R]; the backward pass reads it
  int64_t gates_row;    // 4*padded(H)
  // In the type of the math. The gates of direction d and row n begin at (d*N + n)*gates_row, gate s is s*H behind.
  void* gates;  // [D, N, gates_row]; null: nothing is saved
  void* cells;  // [D, N, H]; null likewise
};

struct Forward {
  Layer layer;
  const void* b_ih[2];  // [G*H], in the type of the tensors; null: no bias
  const void* b_hh[2];  // [G*H]
  void* h_n;            // [D, B, R], in the type of the tensors
  void* c_n;            // [D, B, H]
  // In the type of the math. W_ih x of the step: row b of direction d at input[d] + b*input_row.
  const void* input[2];
  int64_t input_row;
  const void* recurrent;  // [D, B, G*H], W_hh h
  void* h;                // [D, B, R], the state
  void* c;                // [D, B, H]
  const void* projected;  // [D, B, R], with a projection: W_hr h
  // In the type of the tensors.
  void* operand;      // [D, B, R], what W_hh multiplies next: the state, masked
  void* unprojected;  // [D, B, H], with a projection: what W_hr multiplies
};

struct Backward {
  Layer layer;
  // In the type of the tensors.
  const void* d_y;    // [N, D*R]
  const void* d_h_n;  // [D, B, R]
  const void* d_c_n;  // [D, B, H]
  void* d_gates;      // [D, N, stored*H]
  void* entered;      // [D, N, R], the h that W_hh has multiplied, masked
  void* d_projected;  // [D, N, R], with a projection: dL/d(W_hr h)
  void* unprojected;  // [D, N, H], with a projection: what W_hr has multiplied
  // In the type of the math.
  const void* d_cells;        // [D, N, H]
  const void* d_unprojected;  // [D, B, H], with a projection: of this step
  void* through;              // [D, B, R], what came to the state before the later step through W_hh
  void* d_h;                  // [D, B, R], what came to it otherwise
  void* d_c;                  // [D, B, H]
  void* d_reset_h;            // [D, B, R], added to; null: not wanted
  void* d_reset_c;            // [D, B, H]
  // At the end, in the type of the math; null: not wanted.
  void* d_h0;  // [D, B, R]
  void* d_c0;  // [D, B, H]
};

// The sums of d_gates over its N rows, in two stages: of kSumRows rows at a time, then of those, in ascending order.
constexpr int64_t kSumRows = 256;
struct Sums {
  Element element;
  int64_t N, H, D, G, stored, input_first, recurrent_first;  // kStored, kInput, kRecurrent of the cell
  int64_t input_gate[4], recurrent_gate[4];                  // of the entries of either window
  const void* d_gates;                                       // [D, N, stored*H], in the type of the tensors
  void* partial;                                             // [D, ceil(N/kSumRows), stored*H], of the math
  void* d_b_ih[2];                                           // [G*H], in the type of the tensors; null: not wanted
  void* d_b_hh[2];
};

}  // namespace cuda
}  // namespace fastrnn
