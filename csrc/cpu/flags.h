// SPDX-License-Identifier: BSD-3-Clause
// Flags of one byte each, as torch keeps bool: layer_call.cpp, layer.cpp and rows.h look through those of resets.
#pragma once
#include <stdint.h>

namespace fastrnn {
namespace {  // compiled once per instruction set: nothing here may be shared

// Whether one of n flags is set. Eight at a time and no more: most calls have a few, for which a loop of whole vectors
// takes several times as long to begin as these take in all.
inline bool any_set(const uint8_t* flags, int64_t n) {
  int64_t k = 0;
  for (; k + 8 <= n; k += 8) {
    uint64_t eight;
    __builtin_memcpy(&eight, flags + k, 8);
    if (eight != 0) return true;
  }
  for (; k < n; ++k) {
    if (flags[k] != 0) return true;
  }
  return false;
}

}  // namespace
}  // namespace fastrnn
