// SPDX-License-Identifier: BSD-3-Clause
// The product of a few rows with weights as they lie in memory: for a call too short to pay for packing, and for the
// first rows of others, which packs them besides (forward.h). A block of V::kLanes rows of the weights is turned over
// in registers, some columns at a time, and feeds the same sums in the same order as the tile of matmul.h: the bits are
// those of the packed product.
#pragma once
#include "layer.h"
#include "matmul.h"
#include "pack.h"

namespace fastrnn {
namespace cpu {

template <class Scalar>
struct DirectArgs {
  int64_t k;           // length of the reduction, a multiple of V::kColumns (16 bits: kWidenedColumns), as is chain
  int64_t chain;       // as TileArgs
  int64_t rows;        // of the product: M, or fewer of the tallest tile's
  const Scalar* a;     // [M] rows, a_row apart, or [k][M]: DirectTiles::turns
  int64_t a_row;       //
  const void* w[2];    // [lanes] rows of k elements, w_row apart; a piece of the result each
  int64_t w_row;       //
  const Scalar* init;  // [N][lanes], the same for every row
  Scalar* out;         // [M] rows of [N][lanes], out_row elements apart
  int64_t out_row;
  // Where kPacks:
  Scalar* packed[2];  // the panel of each piece, [k] rows packed_row elements apart
  int64_t packed_row;
  bool passes_caches;  // panels are stored past the caches, which do not hold them anyway, if the lane class can
};

template <class V>
struct DirectTiles;

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
  constexpr bool kTurned = DirectTiles<V>::turns(M);  // and addresses of weights have few registers
  const Scalar* a = t.a;
  const int64_t a_row = t.a_row, w_row = t.w_row, packed_row = t.packed_row;
  const auto element = [&](auto m, auto c)
                           __attribute__((always_inline)) { return a[kTurned ? c * M + m : m * a_row + c]; };
  const auto go_on = [&](int columns) __attribute__((always_inline)) { a += kTurned ? columns * M : columns; };
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
          V::template widened_columns<kTurned>(w[n.value], w_row, [&](auto c, V column) __attribute__((always_inline)) {
            unroll<M>([&](auto m) __attribute__((always_inline)) {
              const V s = V::broadcast(element(m.value, c.value));
              acc[m.value * N + n.value] = V::fma(s, column, acc[m.value * N + n.value]);
            });
          });
          w[n.value] += V::kWidenedColumns;
        });
        go_on(V::kWidenedColumns);
      }
    } else {
      // The next columns of piece n.
      const auto add = [&](auto n, auto columns) __attribute__((always_inline)) {
        constexpr int C = decltype(columns)::value;
        V column[C];
        if constexpr (C == V::kColumns) {
          V::template columns<kTurned>(w[n.value], w_row, column);
        } else {
          V::template half_lines<kTurned>(w[n.value], w_row, column);
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
            const V s = V::broadcast(element(m.value, c.value));
            acc[m.value * N + n.value] = V::fma(s, column[c.value], acc[m.value * N + n.value]);
          });
        });
        w[n.value] += C;
      };
      if constexpr (kHalfLines) {
        for (; k >= V::kHalfLine; k -= V::kHalfLine) {
          unroll<N>([&](auto n) __attribute__((always_inline)) { add(n, Index<V::kHalfLine>{}); });
          go_on(V::kHalfLine);
        }
      }
      for (; k > 0; k -= V::kColumns) {
        unroll<N>([&](auto n) __attribute__((always_inline)) { add(n, Index<V::kColumns>{}); });
        go_on(V::kColumns);
      }
    }
    Scalar* out = t.out;
    unroll<M>([&](auto m) __attribute__((always_inline)) {
      if (M == DirectTiles<V>::kMostRows && m.value >= t.rows) return;
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

// The tiles there are: of 1 to 8 rows, and with 32 registers of 12, which serve 9 to 12.
template <class V>
struct DirectTiles {
  using Function = void (*)(const DirectArgs<typename V::Scalar>&);
  static constexpr int kMostRows = V::kRegisters >= 32 ? 12 : 8;
  static_assert(kMostRows <= kDirectRows && V::kLanes <= 16);  // the room there is (ForwardTask::few_rows)

  // Pieces at a time: of one or two rows a piece alone would wait for its own additions. Three rows, and two with 16
  // registers, wait, too; but GCC reads the columns of both pieces at once and spills (docs/architecture.md, left
  // undone).
  static constexpr int kPaired = V::kRegisters >= 32 ? 2 : 1;
  static constexpr int pieces(int64_t rows) { return rows <= kPaired ? 2 : 1; }
  // More rows are read from [k][height] (turn_rows): elements of eight rows 2 KB apart, beside the lines of the
  // weights, do not fit their sets of the first-level cache (H = 512: 1.1 to 1.15 times as long).
  static constexpr bool turns(int64_t rows) { return rows > kPaired; }
  static constexpr int height(int64_t rows) { return rows <= 8 ? static_cast<int>(rows) : kMostRows; }

  template <bool kPacks, class Element = typename V::Scalar>
  static Function get(int64_t rows, int n) {
    static constexpr Function one[9] = {
        direct_tile<V, 1, 1, kPacks, Element>,        direct_tile<V, 2, 1, kPacks, Element>,
        direct_tile<V, 3, 1, kPacks, Element>,        direct_tile<V, 4, 1, kPacks, Element>,
        direct_tile<V, 5, 1, kPacks, Element>,        direct_tile<V, 6, 1, kPacks, Element>,
        direct_tile<V, 7, 1, kPacks, Element>,        direct_tile<V, 8, 1, kPacks, Element>,
        direct_tile<V, kMostRows, 1, kPacks, Element>};
    static constexpr Function two[2] = {direct_tile<V, 1, 2, kPacks, Element>,
                                        direct_tile<V, kPaired, 2, kPacks, Element>};
    return n == 2 ? two[rows - 1] : one[rows <= 8 ? rows - 1 : 8];
  }
};

// Rows of the left operand of such products, as the tiles of their number read them.
template <class Scalar>
struct FewRows {
  const Scalar* a;
  int64_t a_row, n;
};

// Those that a product with weights in place takes of n rows of k elements: all, or the first of more, of which the
// others find the weights packed. `place`: room for kMostRows of them, and a vector.
template <class V>
FewRows<typename V::Scalar> few_rows(const typename V::Scalar* a, int64_t a_row, int64_t n, int64_t k,
                                     typename V::Scalar* place) {
  using Tiles = DirectTiles<V>;
  constexpr int64_t kMost = Tiles::kMostRows;
  const int64_t rows = n <= kMost ? n : n - kMost < 3 ? kMost - 4 : kMost;  // a tile of one or two others is slow
  if (!Tiles::turns(rows)) return {a, a_row, rows};
  turn_rows<V>(a, a_row, rows, k, place, Tiles::height(rows));
  return {place, 0, rows};
}

// Panels of G gates of the weights of a layer, read in place.
template <class V, int G, int64_t kTerms>
class DirectPanels {
  using Scalar = typename V::Scalar;
  static constexpr int64_t L = V::kLanes;

 public:
  DirectPanels(const LayerForward& layer, const Panels& units) : layer_(layer), units_(units) {}

  // Where w holds a piece (a block of units, one gate) of panel p: V::kLanes rows of k elements.
  const void* source(const void* w, int64_t p, int64_t piece, int64_t k) const {
    const Given<Scalar> weights{w, layer_.conversion};
    return weights.at((piece % G * layer_.H + (units_.first(p) + piece / G) * L) * k);
  }

  // to[rows][pieces] = bias + rows * w for the `pieces` pieces from panel p on, which go to `packed` besides, if there
  // is one; past the caches, if they are not read again soon.
  void multiply(const void* w, const Scalar* bias, int64_t p, int pieces, const FewRows<Scalar>& rows, int64_t k,
                Scalar* to, int64_t to_row, Scalar* packed = nullptr, bool passes_caches = false) const {
    const int most = DirectTiles<V>::pieces(rows.n);
    DirectArgs<Scalar> args{};
    args.k = k;
    args.chain = kTerms;
    args.rows = rows.n;
    args.a = rows.a;
    args.a_row = rows.a_row;
    args.w_row = k;
    args.out_row = to_row;
    const int64_t width = units_.width(p) * G;  // pieces of a panel
    args.packed_row = width * L;
    args.passes_caches = passes_caches;
    for (int piece = 0; piece < pieces; piece += most) {
      const int count = pieces - piece < most ? 1 : most;
      for (int j = 0; j < count; ++j) {
        args.w[j] = source(w, p, piece + j, k);
        const int64_t panel = (piece + j) / width, column = (piece + j) % width;
        args.packed[j] = packed ? packed + (panel * width * k + column) * L : nullptr;
      }
      args.init = bias + (units_.first(p) * G + piece) * L;
      args.out = to + piece * L;
      tile(rows.n, count, packed != nullptr)(args);
    }
  }

 private:
  typename DirectTiles<V>::Function tile(int64_t rows, int pieces, bool packs) const {
    using Tiles = DirectTiles<V>;
    if constexpr (kTurnsWidening<V>) {
      if (layer_.conversion) {
        return layer_.conversion->is_half ? Tiles::template get<false, Float16>(rows, pieces)
                                          : Tiles::template get<false, Bfloat16>(rows, pieces);
      }
    }
    return packs ? Tiles::template get<true>(rows, pieces) : Tiles::template get<false>(rows, pieces);
  }

  const LayerForward& layer_;
  const Panels& units_;
};

}  // namespace cpu
}  // namespace fastrnn
