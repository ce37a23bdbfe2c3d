// SPDX-License-Identifier: BSD-3-Clause
// What the cores of this machine do well, apart from select.cpp because a library with a cell of its own asks, too.
#include "kernels.h"

namespace fastrnn {
namespace cpu {
namespace {

Core core_of_this_machine() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  // Zen 5 and 4, measured on Zen 5, one thread, time before over after. Not asking near: forward of LSTM, B = 16 to 64,
  // H = 128, 256, 512, 1024 1.00, 1.01, 1.01, 1.02. Asking row by row: backward of LSTM, H = 128, 256 1.04, 1.05, GRU,
  // H = 128 1.02. Longer passes: LSTM, GRU and RNN, H = 512 to 1760 1.01 to 1.02 both ways; backward of LSTM, H = 128,
  // 256 1.02. 1 MB kept: LSTM, H = 256, B = 4, 8, 16 1.02, 1.01, 1.00, RNN, H = 512, B = 4, 16 1.02, 1.00; with 4 MB
  // LSTM, H = 512 takes 1.02 times as long. The cell in two loops: lines.h.
  if (__builtin_cpu_is("amd") && __builtin_cpu_supports("avx512f")) {
    return {.asks_near = false,
            .asks_rows = true,
            .cell_in_two = true,
            .kept_bytes = 1024 * 1024,
            .forward_pass = 512,
            .backward_pass = 1024};
  }
  // Intel's before Golden Cove load twice a cycle. Measured on Ice Lake.
  const bool loads_twice =
      __builtin_cpu_is("haswell") || __builtin_cpu_is("broadwell") || __builtin_cpu_is("skylake") ||
      __builtin_cpu_is("skylake-avx512") || __builtin_cpu_is("cascadelake") || __builtin_cpu_is("cooperlake") ||
      __builtin_cpu_is("cannonlake") || __builtin_cpu_is("icelake-client") || __builtin_cpu_is("icelake-server") ||
      __builtin_cpu_is("tigerlake") || __builtin_cpu_is("rocketlake");
  const bool asks_near = !loads_twice;
#else
  const bool asks_near = true;
#endif
  constexpr int64_t kHalfOfSmall = 512 * 1024;  // half of a small second-level cache
  return {.asks_near = asks_near,
          .asks_rows = false,
          .cell_in_two = false,
          .kept_bytes = kHalfOfSmall,
          .forward_pass = 0,
          .backward_pass = 0};
}

}  // namespace

const Core core = core_of_this_machine();

}  // namespace cpu
}  // namespace fastrnn
