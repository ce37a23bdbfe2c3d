// SPDX-License-Identifier: BSD-3-Clause
// The launches of kernels.cu, for device.cpp. Each puts its kernels on the stream and returns what the runtime says of
// the launch; none waits.
#pragma once
#include <cuda_runtime_api.h>

#include "machine.h"

namespace fastrnn {
namespace cuda {

cudaError_t launch_forward(cudaStream_t stream, Stage stage, Cell cell, const Forward& arguments);
cudaError_t launch_backward(cudaStream_t stream, Stage stage, Cell cell, const Backward& arguments);
cudaError_t launch_sum(cudaStream_t stream, const Sums& arguments);
// A device-side assertion fails where a value is outside 0..T: the next call that waits reports it.
cudaError_t launch_check_lengths(cudaStream_t stream, const int64_t* lengths, int64_t B, int64_t T);

}  // namespace cuda
}  // namespace fastrnn
