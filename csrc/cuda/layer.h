// SPDX-License-Identifier: BSD-3-Clause
// One layer on CUDA: what the operators call with checked arguments, every dispatch layer above the backends switched
// off. layer.cpp turns tensors into pointers; nothing in it is CUDA's, so that the tests run it on tensors of the CPU.
#pragma once
#include <memory>

#include "../arguments.h"
#include "machine.h"

namespace fastrnn {
namespace cuda {

// The machine of a call whose tensors are on x's device: device.cpp has the GPU, on the current stream.
std::unique_ptr<Machine> machine_for(const Tensor& x);

LayerResults layer_forward(const LayerArguments& arguments, const Sizes& sizes, bool save);
Gradients layer_backward(const BackwardArguments& arguments, const Sizes& sizes);
RowGradients layer_row_gradients(const BackwardArguments& arguments, const Sizes& sizes);

}  // namespace cuda
}  // namespace fastrnn
