// SPDX-License-Identifier: BSD-3-Clause
// float16 and bfloat16 to float and back, for the kernels that compute them in float. Used by operands.h and layer.cpp.
#pragma once
#include <c10/core/ScalarType.h>

#include <cstdint>

namespace fastrnn {
namespace cpu {

// n elements of `type`, kHalf or kBFloat16, to float.
void widen(c10::ScalarType type, const void* from, float* to, int64_t n);

// n floats to `type`, rounded to nearest, ties to even.
void narrow(c10::ScalarType type, const float* from, void* to, int64_t n);

}  // namespace cpu
}  // namespace fastrnn
