// SPDX-License-Identifier: BSD-3-Clause
// A layer with its derivative, for eager calls past the dispatcher: module_call.cpp (modules) and module.cpp (the
// functions fastrnn._C.*_layer_with_gradient) call it. Compilers and transforms take the derivative that
// fastrnn/registration.py registers.
#pragma once
#include "arguments.h"

namespace fastrnn {

// How a layer is recorded, beside its arguments.
struct Recording {
  bool step = false;       // x [B, I] and states [B, R] of a cell: one step, and no y among the results
  bool own_y = false;      // keep a copy of y, so that a program may change the one that is returned
  bool recompute = false;  // keep nothing but the arguments: the backward runs the forward once more
};

// y, h_n and c_n, recorded. Called where gradients are on and a tensor of the layer wants one.
LayerResults layer_with_gradient(const LayerArguments& arguments, const Recording& recording);

// The same memory under other sizes, known to nobody but the kernels; offset in elements.
Tensor alias(const Tensor& tensor, at::IntArrayRef sizes, at::IntArrayRef strides, int64_t offset = 0);
// Whether a transform of torch.func is active.
bool transform_active();
// An ordinary dense tensor of the CPU without lazy bits: read as it is. is_plain: of a dtype of the kernels, too.
bool is_dense(const Tensor& tensor);
bool is_plain(const Tensor& tensor);

}  // namespace fastrnn
