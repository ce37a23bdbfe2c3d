// SPDX-License-Identifier: BSD-3-Clause
// torch.ops.fastrnn.*: the operators under the dispatcher, and their kernels for the CPU; those for CUDA come from
// cuda/device.cpp where it is built. Derivatives and fake kernels are registered in fastrnn/operators.py.
#include <torch/library.h>

#include "cpu/backend.h"
#include "doors.h"
#include "schemas.h"

TORCH_LIBRARY(fastrnn, m) { fastrnn::define_operators(m); }

TORCH_LIBRARY_IMPL(fastrnn, CPU, m) {
  fastrnn::doors::for_each_operator<fastrnn::cpu::Backend>(
      [&](const char* name, auto function) { m.impl(name, function); });
}
