// SPDX-License-Identifier: BSD-3-Clause
// What the cores of this machine do well, apart from select.cpp because a library with a cell of its own asks, too.
#include "kernels.h"

namespace fastrnn {
namespace cpu {
namespace {

// Intel's before Golden Cove. Measured on Ice Lake; the others have the same two ports for loads.
bool loads_twice_a_cycle() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_is("haswell") || __builtin_cpu_is("broadwell") || __builtin_cpu_is("skylake") ||
         __builtin_cpu_is("skylake-avx512") || __builtin_cpu_is("cascadelake") || __builtin_cpu_is("cooperlake") ||
         __builtin_cpu_is("cannonlake") || __builtin_cpu_is("icelake-client") || __builtin_cpu_is("icelake-server") ||
         __builtin_cpu_is("tigerlake") || __builtin_cpu_is("rocketlake");
#else
  return false;
#endif
}

}  // namespace

const bool asks_near = !loads_twice_a_cycle();

}  // namespace cpu
}  // namespace fastrnn
