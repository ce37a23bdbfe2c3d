// SPDX-License-Identifier: BSD-3-Clause
// The product of a few rows with weights as they lie in memory, for a call too short to pay for packing (forward.h).
// A block of V::kLanes rows of the weights is turned over in registers, a few columns at a time, and feeds the same
// sums in the same order as the tile of matmul.h: the bits are those of the packed product.
#pragma once
#include "matmul.h"

namespace fastrnn {
namespace cpu {

template <class Scalar>
struct DirectArgs {
  int64_t k;           // length of the reduction, a multiple of V::kColumns, as is chain
  int64_t chain;       // as TileArgs
  const Scalar* a;     // a[m][k] at a[m*a_row + k]
  int64_t a_row;       //
  const Scalar* w[2];  // [lanes] rows of k elements, w_row apart; a piece of the result each
  int64_t w_row;       //
  const Scalar* init;  // [N][lanes], the same for every row
  Scalar* out;         // [M] rows of [N][lanes], out_row elements apart
  int64_t out_row;
};

// out[m][n] = init[n] + sum over k of a[m][k] * w[n][:][k]     m < M rows, n < N pieces of V::kLanes weight rows
template <class V, int M, int N>
__attribute__((noinline)) void direct_tile(const DirectArgs<typename V::Scalar>& t) {
  using Scalar = typename V::Scalar;
  constexpr int L = V::kLanes, C = V::kColumns;
  const Scalar* a = t.a;
  const int64_t a_row = t.a_row, w_row = t.w_row;
  const Scalar* w[N];
  unroll<N>([&](auto n) __attribute__((always_inline)) { w[n.value] = t.w[n.value]; });
  // A quarter of the rows' lines, 64 terms ahead: 5 to 18 % faster than without (Granite Rapids). Two pieces whose rows
  // are 4 KB apart share one set of the first-level cache, where more lines would drive out those in use (14 % slower).
  const int64_t ahead = N == 2 && w_row * static_cast<int64_t>(sizeof(Scalar)) % 4096 == 0 ? 0 : 64;
  const Scalar* from = t.init;
  int64_t from_row = 0;
  for (int64_t left = t.k;;) {
    V acc[M * N];
    unroll<M * N>([&](auto j) __attribute__((always_inline)) { acc[j.value] = V::zero(); });
    for (int64_t k = left < t.chain ? left : t.chain; k > 0; k -= C) {
      unroll<N>([&](auto n) __attribute__((always_inline)) {
        V column[C];
        V::columns(w[n.value], w_row, column);
        if constexpr (L >= 4) {
          const Scalar* row = w[n.value] + ahead + (k / C & 3) * (L / 4) * w_row;
          unroll<L / 4>([&](auto j)
                            __attribute__((always_inline)) { __builtin_prefetch(row + j.value * w_row, 0, 3); });
        }
        unroll<C>([&](auto c) __attribute__((always_inline)) {
          unroll<M>([&](auto m) __attribute__((always_inline)) {
            const V s = V::broadcast(a[m.value * a_row + c.value]);
            acc[m.value * N + n.value] = V::fma(s, column[c.value], acc[m.value * N + n.value]);
          });
        });
        w[n.value] += C;
      });
      a += C;
    }
    Scalar* out = t.out;
    unroll<M>([&](auto m) __attribute__((always_inline)) {
      unroll<N>([&](auto n) __attribute__((always_inline)) {
        const V sum = V::load(from + m.value * from_row + n.value * L) + acc[m.value * N + n.value];
        sum.store(out + m.value * t.out_row + n.value * L);
      });
    });
    left -= t.chain;
    if (left <= 0) return;
    from = out;
    from_row = t.out_row;
  }
}

template <class V>
struct DirectTiles {
  using Function = void (*)(const DirectArgs<typename V::Scalar>&);
  static constexpr int kMostRows = 8;

  // Pieces at a time: of one or two rows a piece alone would wait for its own additions.
  static constexpr int kPaired = V::kRegisters >= 32 ? 2 : 1;  // two rows would spill with 16 registers
  static constexpr int pieces(int m) { return m <= kPaired ? 2 : 1; }

  static Function get(int m, int n) {
    static constexpr Function one[kMostRows] = {direct_tile<V, 1, 1>, direct_tile<V, 2, 1>, direct_tile<V, 3, 1>,
                                                direct_tile<V, 4, 1>, direct_tile<V, 5, 1>, direct_tile<V, 6, 1>,
                                                direct_tile<V, 7, 1>, direct_tile<V, 8, 1>};
    static constexpr Function two[2] = {direct_tile<V, 1, 2>, direct_tile<V, kPaired, 2>};
    return n == 2 ? two[m - 1] : one[m - 1];
  }
};

}  // namespace cpu
}  // namespace fastrnn
