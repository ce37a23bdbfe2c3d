// SPDX-License-Identifier: BSD-3-Clause
// float16 and bfloat16 to float and back, for the kernels that compute them in float. Used by operands.h and layer.cpp.
#pragma once
#include <c10/core/ScalarType.h>

#include <cstdint>

#include "layer.h"

namespace fastrnn {
namespace cpu {

// The conversions of `type`, kHalf or kBFloat16, by the best instructions that the machine has.
const Conversion& conversion(c10::ScalarType type);

// n elements of `type` to float and back, by several threads where they are many.
void widen(c10::ScalarType type, const void* from, float* to, int64_t n);
void narrow(c10::ScalarType type, const float* from, void* to, int64_t n);

}  // namespace cpu
}  // namespace fastrnn
