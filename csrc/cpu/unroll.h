// SPDX-License-Identifier: BSD-3-Clause
// Loops over constants, for arrays of vectors that must stay in registers, and addresses that must.
#pragma once
#include <stdint.h>

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

// The rows of a block of N, from_row elements apart. kGrouped: by few addresses; any row lies at that of its group of
// four and a multiple of the distance, which a load adds for nothing. Left to itself, GCC works out all N addresses
// before a loop and keeps those that find no register in vectors, from which each load has to fetch its own: a single
// step of eight rows in place (GRU, H = 256) took 1.06 times as long; of one row, which leaves registers, .96 times.
template <int N, class Element, bool kGrouped>
class BlockRows {
 public:
  inline __attribute__((always_inline)) BlockRows(const Element* from, int64_t from_row)
      : row_(from_row * static_cast<int64_t>(sizeof(Element))), three_(3 * row_) {
    if constexpr (kGrouped) asm("" : "+r"(three_));
    for (int j = 0; j < (N + 3) / 4; ++j) {
      four_[j] = j < 3 ? reinterpret_cast<const char*>(from) + 4 * j * row_ : four_[2] + 4 * row_;
      if constexpr (kGrouped) asm("" : "+r"(four_[j]));
    }
  }
  template <int R>
  inline __attribute__((always_inline)) const Element* at() const {
    constexpr int kRest = R % 4;
    const int64_t offset = kRest == 3 ? three_ : kRest * row_;
    return reinterpret_cast<const Element*>(four_[R / 4] + offset);
  }

 private:
  int64_t row_, three_;  // bytes
  const char* four_[(N + 3) / 4];
};

}  // namespace cpu
}  // namespace fastrnn
