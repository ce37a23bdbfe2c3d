// SPDX-License-Identifier: BSD-3-Clause
// The product of a few rows with weights as they lie in memory: for a call too short to pay for packing, and for the
// first step of a longer one, which packs them besides (forward.h). A block of V::kLanes rows of the weights is turned
// over in registers, some columns at a time, and feeds the same sums in the same order as the tile of matmul.h: the
// bits are those of the packed product.
#pragma once
#include "matmul.h"

namespace fastrnn {
namespace cpu {

template <class Scalar>
struct DirectArgs {
  int64_t k;           // length of the reduction, a multiple of V::kColumns (16 bits: kWidenedColumns), as is chain
  int64_t chain;       // as TileArgs
  const Scalar* a;     // a[m][k] at a[m*a_row + k]
  int64_t a_row;       //
  const void* w[2];    // [lanes] rows of k elements, w_row apart; a piece of the result each
  int64_t w_row;       //
  const Scalar* init;  // [N][lanes], the same for every row
  Scalar* out;         // [M] rows of [N][lanes], out_row elements apart
  int64_t out_row;
  // Where kPacks:
  Scalar* packed[2];   // the panel of each piece, [k] rows packed_row elements apart
  int64_t packed_row;  //
  bool passes_caches;  // panels are stored past the caches, which do not hold them anyway, if the lane class can
};

template <class V>
constexpr bool kCanStream = requires(V v, typename V::Scalar* to) { v.stream(to); };

// out[m][n] = init[n] + sum over k of a[m][k] * w[n][:][k]     m < M rows, n < N pieces of V::kLanes weight rows
// kPacks: and the pieces go to their panels. Element: of w; if it has 16 bits, k and chain are multiples of
// V::kWidenedColumns, and nothing is packed.
template <class V, int M, int N, bool kPacks, class Element>
__attribute__((noinline)) void direct_tile(const DirectArgs<typename V::Scalar>& t) {
  using Scalar = typename V::Scalar;
  constexpr int L = V::kLanes;
  constexpr bool kHalfLines = kHasHalfLines<V>, kWidens = sizeof(Element) != sizeof(Scalar);
  static_assert(!(kWidens && kPacks));
  const Scalar* a = t.a;
  const int64_t a_row = t.a_row, w_row = t.w_row, packed_row = t.packed_row;
  const Element* w[N];
  Scalar* packed[N];
  unroll<N>([&](auto n) __attribute__((always_inline)) {
    w[n.value] = static_cast<const Element*>(t.w[n.value]), packed[n.value] = t.packed[n.value];
  });
  const bool streams = t.passes_caches;
  // A quarter of the rows' lines, 64 terms ahead: 5 to 18 % faster than without (AVX2 code on Granite Rapids). Two
  // pieces whose rows are 4 KB apart share one set of the first-level cache, where more lines would drive out those in
  // use (14 % slower). With half lines it would be 5 to 20 % slower (Ice Lake): so many rows at once keep the
  // hardware's own prefetching busy.
  const int64_t ahead = N == 2 && w_row * static_cast<int64_t>(sizeof(Scalar)) % 4096 == 0 ? 0 : 64;
  const Scalar* from = t.init;
  int64_t from_row = 0;
  for (int64_t left = t.k;;) {
    V acc[M * N];
    unroll<M * N>([&](auto j) __attribute__((always_inline)) { acc[j.value] = V::zero(); });
    int64_t k = left < t.chain ? left : t.chain;
    if constexpr (kWidens) {
      for (; k > 0; k -= V::kWidenedColumns) {
        unroll<N>([&](auto n) __attribute__((always_inline)) {
          V::widened_columns(w[n.value], w_row, [&](auto c, V column) __attribute__((always_inline)) {
            unroll<M>([&](auto m) __attribute__((always_inline)) {
              const V s = V::broadcast(a[m.value * a_row + c.value]);
              acc[m.value * N + n.value] = V::fma(s, column, acc[m.value * N + n.value]);
            });
          });
          w[n.value] += V::kWidenedColumns;
        });
        a += V::kWidenedColumns;
      }
    } else {
      // The next columns of piece n.
      const auto add = [&](auto n, auto columns) __attribute__((always_inline)) {
        constexpr int C = decltype(columns)::value;
        V column[C];
        if constexpr (C == V::kColumns) {
          V::columns(w[n.value], w_row, column);
        } else {
          V::half_lines(w[n.value], w_row, column);
        }
        if constexpr (!kHalfLines && L >= 4) {
          const Scalar* row = w[n.value] + ahead + (k / C & 3) * (L / 4) * w_row;
          unroll<L / 4>([&](auto j)
                            __attribute__((always_inline)) { __builtin_prefetch(row + j.value * w_row, 0, 3); });
        }
        if constexpr (kPacks) {
          Scalar* const to = packed[n.value];
          if (kCanStream<V> && streams) {
            unroll<C>([&](auto c) __attribute__((always_inline)) {
              if constexpr (kCanStream<V>) column[c.value].stream(to + c.value * packed_row);
            });
          } else {
            unroll<C>([&](auto c) __attribute__((always_inline)) { column[c.value].store(to + c.value * packed_row); });
          }
          packed[n.value] = to + C * packed_row;
        }
        unroll<C>([&](auto c) __attribute__((always_inline)) {
          unroll<M>([&](auto m) __attribute__((always_inline)) {
            const V s = V::broadcast(a[m.value * a_row + c.value]);
            acc[m.value * N + n.value] = V::fma(s, column[c.value], acc[m.value * N + n.value]);
          });
        });
        w[n.value] += C;
      };
      if constexpr (kHalfLines) {
        for (; k >= V::kHalfLine; k -= V::kHalfLine) {
          unroll<N>([&](auto n) __attribute__((always_inline)) { add(n, Index<V::kHalfLine>{}); });
          a += V::kHalfLine;
        }
      }
      for (; k > 0; k -= V::kColumns) {
        unroll<N>([&](auto n) __attribute__((always_inline)) { add(n, Index<V::kColumns>{}); });
        a += V::kColumns;
      }
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

  template <bool kPacks, class Element = typename V::Scalar>
  static Function get(int m, int n) {
    static constexpr Function one[kMostRows] = {
        direct_tile<V, 1, 1, kPacks, Element>, direct_tile<V, 2, 1, kPacks, Element>,
        direct_tile<V, 3, 1, kPacks, Element>, direct_tile<V, 4, 1, kPacks, Element>,
        direct_tile<V, 5, 1, kPacks, Element>, direct_tile<V, 6, 1, kPacks, Element>,
        direct_tile<V, 7, 1, kPacks, Element>, direct_tile<V, 8, 1, kPacks, Element>};
    static constexpr Function two[2] = {direct_tile<V, 1, 2, kPacks, Element>,
                                        direct_tile<V, kPaired, 2, kPacks, Element>};
    return n == 2 ? two[m - 1] : one[m - 1];
  }
};

}  // namespace cpu
}  // namespace fastrnn
