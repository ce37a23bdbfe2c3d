// SPDX-License-Identifier: BSD-3-Clause
// The arguments and results of a layer operator, one struct for all cells and directions.
// doors.h fills LayerArguments from a flat argument list, checks.h derives Sizes from them, cpu/layer.cpp runs them.
#pragma once
#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>

#include "cpu/layer.h"

namespace fastrnn {

using at::Tensor;

// Every pointer borrows a tensor that its caller keeps alive; null: not given.
// Shapes: letters as in cpu/layer.h. Packed: x and y have rows [N], else [T, B].

struct Weights {                     // of one direction
  const Tensor* w_ih;                // [G*H, I]
  const Tensor* w_hh;                // [G*H, R]
  const Tensor* b_ih;                // [G*H]
  const Tensor* b_hh;                // [G*H]
  const Tensor* w_hr;                // [P, H], LSTM only
  const Tensor* parameters;          // [parameters*H], of an own cell that has some
  const cpu::PackedWeights* packed;  // the five above as the tile reads them, in their place; null: packed at the call
};

struct LayerArguments {
  const char* name;  // of the operator, for messages
  Cell cell;
  const cpu::OwnCell* own;    // with Cell::own, else null
  const Tensor* x;            // [T, B, I] or [N, I]
  const Tensor* h0;           // [D, B, R]; null if from_zero
  const Tensor* c0;           // [D, B, H], LSTM only; null if from_zero
  bool from_zero;             // zeros stand for both, which are null; forward without gradient alone
  Weights weights[2];         // forward, reverse; w_ih of the second decides D
  const Tensor* lengths;      // [B], int64 on the CPU or the device of x; not with batch_sizes
  const Tensor* batch_sizes;  // [T], int64 on the CPU
  const Tensor* reset;        // [T, B], bool; not with batch_sizes
  const Tensor* reset_h;      // [D, B, R], with reset
  const Tensor* reset_c;      // [D, B, H], LSTM only, with reset_h
  const Tensor* h_mask;       // [D, B, R]
  const Tensor* zoneout_h;    // like y
  const Tensor* zoneout_c;    // like y with D*H features, LSTM only
};

struct BackwardArguments {
  LayerArguments layer;
  const Tensor* d_y;      // like y
  const Tensor* d_h_n;    // [D, B, R]
  const Tensor* d_c_n;    // [D, B, H], LSTM only
  const Tensor* d_cells;  // [D, N, H], LSTM only
  const Tensor* y;        // [T, B, D*R] or [N, D*R]
  const Tensor* gates;    // [D, N, 4*padded(H)], not RNN
  const Tensor* cells;    // [D, N, H], LSTM only
  int64_t needs;          // bit k set: gradient k is wanted
};

// What the checked arguments say about a layer.
struct Sizes {
  int64_t T, B, I, H, R, P, D, N;  // P = 0 without a projection
  const int64_t* batch_sizes;      // [T], null when padded
  Tensor batch_sizes_owner;        // keeps a contiguous copy alive; undefined when none was needed
  const int64_t* lengths;          // [B], each from 0 to T; null when all are T, or when they are not on the CPU
  Tensor lengths_owner;            // likewise
};

struct LayerResults {
  Tensor y;      // [T, B, D*R] or [N, D*R]
  Tensor h_n;    // [D, B, R]
  Tensor c_n;    // [D, B, H], LSTM only
  Tensor gates;  // [D, N, 4*padded(H)], LSTM and GRU; undefined when not saved
  Tensor cells;  // [D, N, H], LSTM; undefined when not saved
};

// One layer's weights, packed for calls to come. It owns what `direction` points to.
struct PackedLayer {
  Tensor memory[2];  // bytes; zero where no weight lies, so that equal weights are equal bytes
  cpu::PackedWeights direction[2];
};

// Gradients in the order of the schema: x, h0, (c0), then per direction w_ih, w_hh, b_ih, b_hh, (w_hr), then reset_h,
// (reset_c), where those in brackets are LSTM's; an own cell has its parameters in place of w_hr. One that is not
// wanted, or whose tensor was not given, is [0].
constexpr int kMaxGradients = 15;
constexpr int gradient_count(Cell cell) { return cell == Cell::lstm ? kMaxGradients : 11; }
using Gradients = std::array<Tensor, kMaxGradients>;

// The backward pass without the sums over rows, in the type of the kernels but for the first three.
struct RowGradients {
  Tensor d_x, d_h0, d_c0;  // [0] when not wanted; d_c0 LSTM only
  Tensor d_gates;          // [D, N, stored*H], see DirectionBackward
  Tensor d_h;              // [D, N, P], LSTM with a projection, else [0]
};
// Every layer above the backends is switched off where the kernels run: autograd, and modes of Python or functorch that
// would replace the copy of a strided tensor by something without memory. Lazy negation stays.
inline c10::DispatchKeySet layers_above() {
  using c10::DispatchKeySet, c10::DispatchKey;
  const DispatchKeySet below = DispatchKeySet(DispatchKeySet::FULL_AFTER, DispatchKey::Python) |
                               DispatchKeySet({DispatchKey::Conjugate, DispatchKey::Negative, DispatchKey::ZeroTensor});
  return DispatchKeySet(DispatchKeySet::RAW, DispatchKeySet(DispatchKeySet::FULL).raw_repr() & ~below.raw_repr());
}

namespace cpu {
// h_n and c_n are written into those of `given` where it has them.
LayerResults layer_forward(const LayerArguments& arguments, const Sizes& sizes, bool save, LayerResults given = {});
// For the instruction set chosen now, or for `kernels` if not null.
PackedLayer pack_layer(const LayerArguments& arguments, const Sizes& sizes, const PackedWeights* like);
Gradients layer_backward(const BackwardArguments& arguments, const Sizes& sizes);
RowGradients layer_row_gradients(const BackwardArguments& arguments, const Sizes& sizes);
}  // namespace cpu

}  // namespace fastrnn
