// SPDX-License-Identifier: BSD-3-Clause
// The CPU as a backend of the operators, see doors.h; ops.cpp and module.cpp take it.
#pragma once
#include <ATen/EmptyTensor.h>

#include "../arguments.h"

namespace fastrnn {
namespace cpu {

struct Backend {
  static constexpr c10::DeviceType kDevice = c10::kCPU;
  static LayerResults forward(const LayerArguments& arguments, const Sizes& sizes, bool save) {
    return layer_forward(arguments, sizes, save);
  }
  static Gradients backward(const BackwardArguments& arguments, const Sizes& sizes) {
    return layer_backward(arguments, sizes);
  }
  static RowGradients row_gradients(const BackwardArguments& arguments, const Sizes& sizes) {
    return layer_row_gradients(arguments, sizes);
  }
  static Tensor nothing(const Tensor&, at::ScalarType type) { return at::detail::empty_cpu({0}, type); }
};

}  // namespace cpu
}  // namespace fastrnn
