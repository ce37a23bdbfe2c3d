// SPDX-License-Identifier: BSD-3-Clause
// Loops over constants, for arrays of vectors that must stay in registers.
#pragma once

namespace fastrnn {
namespace cpu {

template <int J>
struct Index {
  static constexpr int value = J;
};

// Calls f(Index<0>), ..., f(Index<N-1>), expanded.
template <int N, int J = 0, class F>
inline __attribute__((always_inline)) void unroll(const F& f) {
  if constexpr (J < N) {
    f(Index<J>{});
    unroll<N, J + 1>(f);
  }
}

}  // namespace cpu
}  // namespace fastrnn
