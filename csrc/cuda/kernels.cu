// SPDX-License-Identifier: BSD-3-Clause
// The kernels of tier 0: the bodies of forward.cuh and backward.cuh with a thread for each piece of W units, as
// threads.h deals them out.
#undef NDEBUG  // the assertion on lengths is part of every build
#include "kernels.h"

#include <cassert>

#include "threads.h"

namespace fastrnn {
namespace cuda {
namespace {

__device__ __forceinline__ Thread this_thread() {
  return {blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x, threadIdx.y};
}

template <class Body, int W, class Arguments>
__global__ void __launch_bounds__(kBlock) step(const __grid_constant__ Arguments arguments, const Grid grid) {
  run_thread<Body, W>(arguments, grid, this_thread());
}

__global__ void check(const int64_t* lengths, int64_t B, int64_t T) {
  for (int64_t b = threadIdx.x; b < B; b += blockDim.x) assert(lengths[b] >= 0 && lengths[b] <= T);
}

struct Launch {
  cudaStream_t stream;
  template <class Body, int W, class Arguments>
  void operator()(const Arguments& arguments, const Grid& grid) const {
    const dim3 blocks(grid.grid_x, grid.grid_y, grid.grid_z), threads(grid.block_x, grid.block_y);
    step<Body, W><<<blocks, threads, 0, stream>>>(arguments, grid);
  }
};

}  // namespace

cudaError_t launch_forward(cudaStream_t stream, Stage stage, Cell cell, const Forward& arguments) {
  forward(Launch{stream}, stage, cell, arguments);
  return cudaGetLastError();
}

cudaError_t launch_backward(cudaStream_t stream, Stage stage, Cell cell, const Backward& arguments) {
  backward(Launch{stream}, stage, cell, arguments);
  return cudaGetLastError();
}

cudaError_t launch_sum(cudaStream_t stream, const Sums& arguments) {
  sum(Launch{stream}, arguments);
  return cudaGetLastError();
}

cudaError_t launch_check_lengths(cudaStream_t stream, const int64_t* lengths, int64_t B, int64_t T) {
  check<<<1, 256, 0, stream>>>(lengths, B, T);
  return cudaGetLastError();
}

}  // namespace cuda
}  // namespace fastrnn
