// SPDX-License-Identifier: BSD-3-Clause
// Which thread of a launch does what: the arithmetic of blocks and threads, and the choice of a kernel's instance.
// launch(body, arguments, grid) is the one thing that differs between the device (kernels.cu) and the host (tests).
#pragma once
#include "../cells/gru.h"
#include "../cells/lstm.h"
#include "../cells/rnn.h"
#include "backward.cuh"
#include "forward.cuh"
#include "machine.h"

namespace fastrnn {
namespace cuda {

// The threads of one launch: x over pieces of W units, y over rows, z over directions.
struct Grid {
  int64_t pieces, rows, directions;
  unsigned block_x, block_y, grid_x, grid_y, grid_z;
};

// Not measured: what a block of one, two or eight warps would make of it.
constexpr unsigned kBlock = 128;

inline Grid grid_for(int64_t pieces, int64_t rows, int64_t directions) {
  constexpr int64_t kMostBlocks = 65535;  // of y and z
  Grid grid{pieces, rows, directions, kBlock, 1, 0, 0, static_cast<unsigned>(directions)};
  while (grid.block_x > 1 && grid.block_x / 2 >= pieces) grid.block_x /= 2;
  grid.block_y = kBlock / grid.block_x;
  grid.grid_x = static_cast<unsigned>((pieces + grid.block_x - 1) / grid.block_x);
  const int64_t blocks = (rows + grid.block_y - 1) / grid.block_y;
  grid.grid_y = static_cast<unsigned>(blocks < kMostBlocks ? blocks : kMostBlocks);
  return grid;
}

struct Thread {
  unsigned block_x, block_y, block_z, x, y;
};

// What one thread does. Rows are taken in strides where there are more than blocks.
template <class Body, int W, class Arguments>
FASTRNN_INLINE void run_thread(const Arguments& arguments, const Grid& grid, const Thread& thread) {
  const int64_t piece = int64_t{thread.block_x} * grid.block_x + thread.x;
  if (piece >= grid.pieces) return;
  const int64_t stride = int64_t{grid.grid_y} * grid.block_y;
  for (int64_t b = int64_t{thread.block_y} * grid.block_y + thread.y; b < grid.rows; b += stride) {
    Body::run(arguments, thread.block_z, b, piece * W);
  }
}

// ---- instances -----------------------------------------------------------------------------------------------------
// Four cells, forward and backward: float of one unit and of four, double of one. No kernel per dtype.

// Four units a thread where every row begins at a multiple of 16 bytes: loads of 16 bytes.
inline bool is_wide(const Layer& layer) {
  const auto fits = [](const Spread& spread) { return spread.stride_t % 4 == 0 && spread.stride_b % 4 == 0; };
  return layer.H % 4 == 0 && layer.R % 4 == 0 && fits(layer.zoneout_h) && fits(layer.zoneout_c);
}

// run(Type<A>, integral constant W)
template <class A>
struct Type {};
template <int W>
struct Width {};

template <class Run>
void with_instance(const Layer& layer, Run run) {
  if (layer.element == Element::float64) return run(Type<double>(), Width<1>());
  if (is_wide(layer)) return run(Type<float>(), Width<4>());
  run(Type<float>(), Width<1>());
}

template <class Run>
void with_cell(Cell cell, Run run) {
  switch (cell) {
    case Cell::lstm:
      return run(Type<Lstm>());
    case Cell::gru:
      return run(Type<Gru>());
    case Cell::rnn_tanh:
      return run(Type<Rnn<Tanh>>());
    case Cell::rnn_relu:
      return run(Type<Rnn<Relu>>());
    case Cell::own:  // of another library, which has kernels for the CPU alone
      return;
  }
}

// launch.template operator()<Body, W>(arguments, grid) runs Body for every piece of W units.
template <class Launch>
void forward(Launch launch, Stage stage, Cell cell, const Forward& a) {
  const Layer& l = a.layer;
  const int64_t widest = l.R > l.H ? l.R : l.H;
  const int64_t rows = l.step[0].rows > l.step[1].rows ? l.step[0].rows : l.step[1].rows;
  with_instance(l, [&]<class A, int W>(Type<A>, Width<W>) {
    switch (stage) {
      case Stage::begin:
        return launch.template operator()<BeginForward<A>, 1>(a, grid_for(widest, l.B, l.D));
      case Stage::cell:
        return with_cell(cell, [&]<class C>(Type<C>) {
          launch.template operator()<CellForward<C, A, W>, W>(a, grid_for(l.H / W, rows, l.D));
        });
      default:
        launch.template operator()<ProjectForward<A, W>, W>(a, grid_for(l.R / W, rows, l.D));
    }
  });
}

template <class Launch>
void backward(Launch launch, Stage stage, Cell cell, const Backward& a) {
  const Layer& l = a.layer;
  const int64_t widest = l.R > l.H ? l.R : l.H;
  const int64_t rows = l.step[0].rows > l.step[1].rows ? l.step[0].rows : l.step[1].rows;
  with_instance(l, [&]<class A, int W>(Type<A>, Width<W>) {
    switch (stage) {
      case Stage::begin:
        return launch.template operator()<BeginBackward<A>, 1>(a, grid_for(widest, l.B, l.D));
      case Stage::cell:
        return with_cell(cell, [&]<class C>(Type<C>) {
          launch.template operator()<CellBackward<C, A, W>, W>(a, grid_for(l.H / W, rows, l.D));
        });
      case Stage::project:
        return launch.template operator()<ProjectBackward<A, W>, W>(a, grid_for(l.R / W, rows, l.D));
      case Stage::end:
        launch.template operator()<EndBackward<A>, 1>(a, grid_for(widest, l.B, l.D));
    }
  });
}

template <class Launch>
void sum(Launch launch, const Sums& a) {
  const int64_t width = a.stored * a.H, parts = (a.N + kSumRows - 1) / kSumRows;
  const auto both = [&]<class A>(Type<A>) {
    launch.template operator()<SumRows<A>, 1>(a, grid_for(width, parts, a.D));
    launch.template operator()<SumParts<A>, 1>(a, grid_for(width, 1, a.D));
  };
  if (a.element == Element::float64) return both(Type<double>());
  both(Type<float>());
}

}  // namespace cuda
}  // namespace fastrnn
