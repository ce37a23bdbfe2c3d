// SPDX-License-Identifier: BSD-3-Clause
// A whole layer, forward and backward, as work for a Machine: the input product, then a product and a kernel for each
// step, then the products over all steps. layer.cpp calls it with pointers to tensors and scratch.
#pragma once
#include "machine.h"

namespace fastrnn {
namespace cuda {

// The weights of both directions, in the type of the tensors. [D, ...] stands next to each other, so that one product
// of two serves both directions of a step.
struct Weights {
  const void* w_ih[2];  // [G*H, I]
  const void* w_hh;     // [D, G*H, R]
  const void* w_hr;     // [D, P, H], or null
};

struct LayerForward {
  Cell cell;
  int64_t I;
  const int64_t* batch_sizes;  // [T] on the host, or null
  const void* x;               // [N, I]
  Weights weights;
  // All but layer.step, input and input_row; recurrent, h, c, projected, operand and unprojected are scratch of the
  // given shapes.
  Forward step;
  // Where nothing is saved: room for D * chunk_rows(...) rows [G*H] of input gates, in the type of the math. Else the
  // input gates lie where their step then puts the activated ones.
  void* input_gates;
};

// Rows of x whose input gates are computed at a time, where they are not saved.
int64_t chunk_rows(const Machine& machine, Cell cell, int64_t T, int64_t B, int64_t H);

struct LayerBackward {
  Cell cell;
  int64_t I;
  const int64_t* batch_sizes;
  const void* x;  // [N, I], zeros (anything finite) past the ends of sequences
  Weights weights;
  Backward
      step;   // all but layer.step; d_gates, entered, d_projected, unprojected, d_unprojected, through, d_h: scratch
  void* d_x;  // [N, I], in the type of the math; null: not wanted
  // In the type of the tensors; null: not wanted.
  void* d_w_ih[2];  // [G*H, I]
  void* d_w_hh[2];  // [G*H, R]
  void* d_b_ih[2];  // [G*H]
  void* d_b_hh[2];  // [G*H]
  void* d_w_hr[2];  // [P, H]
  void* partial;    // [D, ceil(N/kSumRows), stored*H], scratch, in the type of the math
};

void run_forward(Machine& machine, const LayerForward& layer);
void run_backward(Machine& machine, const LayerBackward& layer);

}  // namespace cuda
}  // namespace fastrnn
