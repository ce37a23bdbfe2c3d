// SPDX-License-Identifier: BSD-3-Clause
// One trivial kernel over each cell, so that csrc/cells stays CUDA code while only the CPU runs it. Compiled, never
// linked, by tools/check_cuda_cells.py; a new cell is one include and one instance.
#include "../cells/gru.h"
#include "../cells/lstm.h"
#include "../cells/rnn.h"

namespace fastrnn {
namespace cuda {

// The lane class of CUDA: one unit per thread. Multiply-adds are explicit, the file is compiled with -fmad=false.
struct FloatLane {
  using Scalar = float;
  static constexpr int kLanes = 1;
  float v;

  FASTRNN_INLINE friend FloatLane operator+(FloatLane a, FloatLane b) { return {a.v + b.v}; }
  FASTRNN_INLINE friend FloatLane operator-(FloatLane a, FloatLane b) { return {a.v - b.v}; }
  FASTRNN_INLINE friend FloatLane operator*(FloatLane a, FloatLane b) { return {a.v * b.v}; }
  FASTRNN_INLINE friend FloatLane operator/(FloatLane a, FloatLane b) { return {a.v / b.v}; }
  FASTRNN_INLINE static FloatLane one() { return {1.0f}; }
  FASTRNN_INLINE static FloatLane zero() { return {0.0f}; }
  FASTRNN_INLINE static FloatLane fma(FloatLane a, FloatLane b, FloatLane c) { return {fmaf(a.v, b.v, c.v)}; }
  FASTRNN_INLINE static FloatLane sigmoid(FloatLane a) { return {1.0f / (1.0f + expf(-a.v))}; }
  FASTRNN_INLINE static FloatLane tanh(FloatLane a) { return {tanhf(a.v)}; }
  FASTRNN_INLINE static FloatLane relu(FloatLane a) { return {a.v < 0.0f ? 0.0f : a.v}; }
  FASTRNN_INLINE static FloatLane where_positive(FloatLane y, FloatLane d) { return {y.v <= 0.0f ? 0.0f : d.v}; }
};

// One step forward and back of `units` units; every array is [lanes of the cell][units].
template <class Cell, class V>
__global__ void step(int units, const V* x, const V* r, const V* prev, const V* d_next, V* next, V* d, V* d_prev) {
  const int j = blockIdx.x * blockDim.x + threadIdx.x;
  if (j >= units) return;
  V x_j[Cell::kGates], r_j[Cell::kGates], saved_j[Cell::kSaved + 1], d_j[Cell::kStored];
  V prev_j[Cell::kStates], next_j[Cell::kStates], d_next_j[Cell::kStates], d_prev_j[Cell::kStates];
  for (int g = 0; g < Cell::kGates; ++g) x_j[g] = x[g * units + j], r_j[g] = r[g * units + j];
  for (int s = 0; s < Cell::kStates; ++s) prev_j[s] = prev[s * units + j], d_next_j[s] = d_next[s * units + j];
  Cell::forward(x_j, r_j, prev_j, next_j, saved_j);
  Cell::backward(d_next_j, saved_j, prev_j, next_j, d_j, d_prev_j);
  for (int s = 0; s < Cell::kStates; ++s) next[s * units + j] = next_j[s], d_prev[s * units + j] = d_prev_j[s];
  for (int s = 0; s < Cell::kStored; ++s) d[s * units + j] = d_j[s];
}

#define FASTRNN_INSTANCE(Cell)                                                                                     \
  template __global__ void step<Cell>(int, const FloatLane*, const FloatLane*, const FloatLane*, const FloatLane*, \
                                      FloatLane*, FloatLane*, FloatLane*)
FASTRNN_INSTANCE(Lstm);
FASTRNN_INSTANCE(Gru);
FASTRNN_INSTANCE(Rnn<Tanh>);
FASTRNN_INSTANCE(Rnn<Relu>);

}  // namespace cuda
}  // namespace fastrnn
