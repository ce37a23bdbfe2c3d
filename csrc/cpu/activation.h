// SPDX-License-Identifier: BSD-3-Clause
// sigmoid and tanh of a lane class over an array, as the cells compute them. Included by table.h and table_blocks.h.
#pragma once
#include "kernels.h"
#include "matmul.h"

namespace fastrnn {
namespace cpu {

template <class V>
void activation(Activation which, const void* x, void* y, int64_t n) {
  const typename V::Scalar* from = static_cast<const typename V::Scalar*>(x);
  typename V::Scalar* to = static_cast<typename V::Scalar*>(y);
  for (int64_t j = 0; j < n; j += V::kLanes) {
    const int lanes = n - j < V::kLanes ? static_cast<int>(n - j) : V::kLanes;
    const V a = load_lanes<V>(from + j, lanes);
    store_lanes(which == Activation::sigmoid ? V::sigmoid(a) : V::tanh(a), to + j, lanes);
  }
}

}  // namespace cpu
}  // namespace fastrnn
