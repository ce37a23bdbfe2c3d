// SPDX-License-Identifier: BSD-3-Clause
// The register tile: the one matrix product of this library. Projection, recurrence and every gradient run on it.
//
// out[m][v] = init[m][v] + sum over k of a[m][k] * w[k][v]      m < M rows, v < NP*NV vectors of V::kLanes
//
// The sum runs in ascending k, in chains of `chain` fused multiply-adds that start from zero and are added to the
// result one after the other, whatever M, NV and NP are: bits do not depend on the tile. One chain over all of k would
// have five times the error of a blocked matrix product at k = 4096; chains of 128 cost 2 % more than chains of 256.
// All indices of the accumulators are compile-time constants; an array that the compiler cannot take apart would
// live in memory and cost up to three times (tools/check_spills.py looks at the disassembly).
#pragma once
#include <stdint.h>

#include "pack.h"

namespace fastrnn {
namespace cpu {

// Larger weights than this come from far at every step, and packing them would only drive other things out of the
// caches.
constexpr int64_t kFarBytes = 8 * 1024 * 1024;

template <class Scalar>
struct TileArgs {
  int64_t k;        // length of the reduction, may be 0
  int64_t chain;    // of it, terms in one chain
  const Scalar* a;  // a[m][k] at a[m*a_row + k*a_step]
  int64_t a_row, a_step;
  const Scalar* w;  // packed panel [k][NV][lanes]; the next of NP panels w_panel elements later
  int64_t w_panel;
  const Scalar* init;  // [NP*NV][lanes], of row m init_row*m elements later (0: one row for all); null: zero
  int64_t init_row;
  const char* ahead;   // fetched into the second-level cache while the tile runs, a line for each k; null: nothing.
                       // Tiles of a single panel and few sums fetch nothing unless `far`
  int64_t ahead_step;  // bytes from the line of one k to that of the next, 64 or less
  bool far;            // W_hh, which this is, is larger than kFarBytes
  Scalar* out;         // [M] rows of [NP*NV][lanes], out_row elements apart
  int64_t out_row;
};

// Terms of one chain: of the sweeps of LSTM and GRU; of everything else, where rounding shows more.
constexpr int64_t kChain = 256, kShortChain = 128;

// Panels larger than this do not stay in the first-level cache while a few tiles pass.
constexpr int64_t kNearBytes = 32 * 1024;
// Terms of a longer sum that all tiles of a panel of four vectors take before the next terms, a multiple of `chain`:
// where a chain is not larger, the part of the panel at work stays in the first-level cache, and the second-level one
// need not hold whole panels beside all else. Time of whole panels over that in passes (Ice Lake): RNN of 1760 units,
// B = 32, 1.12, of 1024 1.02 to 1.05; LSTM, B = 64, H = 512 and 1024 .99, 1.02 (AVX-512), 1.05, 1.01 (AVX2).
// Where the core wants longer ones, `least` terms (core.cpp), only the second-level cache keeps the part at work.
template <class V>
constexpr int64_t pass_terms(int64_t chain, int64_t least = 0) {
  constexpr int64_t kNear = kNearBytes / (4 * V::kLanes * static_cast<int64_t>(sizeof(typename V::Scalar)));
  const int64_t terms = kNear < least ? least : kNear;
  return (terms < chain ? chain : terms) / chain * chain;  // a pass ends where a chain does
}
// Terms of the next of the passes over `left` terms: a rest of less than half a pass is none of its own, whose few
// terms would have to fetch the next panel.
static constexpr int64_t next_pass(int64_t pass, int64_t left) { return left < pass + pass / 2 ? left : pass; }
// Terms of the reduction by which a tile asks ahead for such a panel's lines, into the first-level cache. 8 and 32 are
// equal; without, 1 to 6 % slower at B = 4 to 64 (Granite Rapids). Tiles of few rows wait for the second-level cache
// whatever they ask: 3 to 8 % slower with it (there; 9 to 17 % on Ice Lake). Pairs of panels ask where the caller has
// them fetch something, since their lines come from further away then. Cores with two ports for loads do not ask
// (core.asks_near): there it takes the place of loads that the tile waits for (Ice Lake: LSTM of 128 and 256 units 1.05
// to 1.06 times as fast without it at B = 4 and 8, 1.01 to 1.04 at 16 and 64).
constexpr int kNearTerms = 16;

// Whether a tile of one panel with so many sums fetches what `ahead` names, also of weights that are not far.
template <class V>
constexpr bool fetches(int sums) {
  return sums >= (V::kLanes > 1 ? V::kRegisters / 2 : 16);
}

template <class V, int M, int NV, int NP>
__attribute__((noinline)) void tile(const TileArgs<typename V::Scalar>& t) {
  using Scalar = typename V::Scalar;
  constexpr int N = NV * NP, L = V::kLanes;
  const Scalar* a = t.a;
  const Scalar* w = t.w;
  const int64_t a_row = t.a_row, a_step = t.a_step, w_panel = t.w_panel;
  // AVX2's tiles of one panel, of at most twelve sums, fetch and do not ask; with no fetching they are 1.05 (H = 256)
  // to 1.25 times as slow (H = 512 and more, Ice Lake). What is far is fetched by tiles of any size: RNN of 1760 units,
  // B = 1, 2, 3 1.03, 1.08, 1.11 times as fast, backward of LSTM of 1024 units 1.02, 1.03, 1.06; nearer weights 1 to 8
  // % slower.
  constexpr bool kManyRows = M * N >= 16, kAsks = kManyRows || NP == 2;
  constexpr bool kFetches = kAsks || fetches<V>(M * N);
  const bool wishes = t.ahead != nullptr && (kFetches || (L > 1 && t.far));
  const bool streams = wishes || (kManyRows && t.k * NV * L * static_cast<int64_t>(sizeof(Scalar)) > kNearBytes);
  const bool asks = kAsks && streams && core.asks_near;
  // A tile that asks without a wish touches the first line of `a` again and again, and needs no fourth loop.
  const char* ahead = t.ahead ? t.ahead : reinterpret_cast<const char*>(t.a);
  const int64_t ahead_step = t.ahead ? t.ahead_step : 0;
  const Scalar* from = t.init;
  int64_t from_row = t.init_row;
  for (int64_t left = t.k;;) {
    V acc[M * N];
    unroll<M * N>([&](auto j) __attribute__((always_inline)) { acc[j.value] = V::zero(); });
    const auto add_terms = [&](auto fetches, auto near) __attribute__((always_inline)) {
      for (int64_t k = left < t.chain ? left : t.chain; k > 0; --k) {
        // The smaller operand set stays in registers, the other is read one by one: the other order spills on AVX2. A
        // vector of w is kept, since GCC 12 would read it again for each of two or three rows, more often than a core
        // can: three rows of an RNN took longer than four.
        if constexpr (N <= M) {
          V b[N];
          unroll<N>([&](auto v) __attribute__((always_inline)) {
            b[v.value] = V::load(w + (v.value / NV) * w_panel + (v.value % NV) * L);
            if constexpr (M > 1) b[v.value].keep();
          });
          unroll<M>([&](auto m) __attribute__((always_inline)) {
            const V s = V::broadcast(a[m.value * a_row]);
            unroll<N>([&](auto v) __attribute__((always_inline)) {
              acc[m.value * N + v.value] = V::fma(s, b[v.value], acc[m.value * N + v.value]);
            });
          });
        } else {
          V s[M];
          unroll<M>([&](auto m) __attribute__((always_inline)) { s[m.value] = V::broadcast(a[m.value * a_row]); });
          unroll<N>([&](auto v) __attribute__((always_inline)) {
            V b = V::load(w + (v.value / NV) * w_panel + (v.value % NV) * L);
            if constexpr (M > 1) b.keep();
            unroll<M>([&](auto m) __attribute__((always_inline)) {
              acc[m.value * N + v.value] = V::fma(s[m.value], b, acc[m.value * N + v.value]);
            });
          });
        }
        if constexpr (decltype(fetches)::value != 0) {
          __builtin_prefetch(ahead, 0, 2);
          ahead += ahead_step;
        }
        if constexpr (decltype(near)::value != 0) {
          unroll<N>([&](auto v) __attribute__((always_inline)) {
            __builtin_prefetch(w + (v.value / NV) * w_panel + (kNearTerms * NV + v.value % NV) * L, 0, 3);
          });
        }
        a += a_step;
        w += NV * L;
      }
    };
    if (asks) {
      add_terms(Index<kAsks>{}, Index<kAsks>{});
    } else if (wishes) {
      add_terms(Index<(L > 1)>{}, Index<0>{});
    } else {
      add_terms(Index<0>{}, Index<0>{});
    }
    Scalar* out = t.out;
    const int64_t out_row = t.out_row;
    unroll<M>([&](auto m) __attribute__((always_inline)) {
      unroll<N>([&](auto v) __attribute__((always_inline)) {
        V sum = acc[m.value * N + v.value];
        if (from) sum = V::load(from + m.value * from_row + v.value * L) + sum;
        sum.store(out + m.value * out_row + v.value * L);
      });
    });
    left -= t.chain;
    if (left <= 0) return;
    from = out;
    from_row = out_row;
  }
}

// Asks for the cache lines of `n` elements from p on: what the code after a tile reads, while the tile runs.
template <class Scalar>
inline __attribute__((always_inline)) void fetch(const Scalar* p, int64_t n) {
  for (int64_t j = 0; j < n; j += static_cast<int64_t>(64 / sizeof(Scalar))) __builtin_prefetch(p + j, 0, 3);
}

// The instances: as many rows as the registers hold beside the operands; two panels at once while rows are few.
template <class V>
struct Tiles {
  using Scalar = typename V::Scalar;
  using Function = void (*)(const TileArgs<Scalar>&);
  static constexpr bool kWide = V::kRegisters >= 32;
  static constexpr int kRows4 = kWide ? 6 : 3, kRows3 = kWide ? 8 : 4, kRows2 = kWide ? 8 : 5, kRows1 = 8;
  static constexpr int kMostRows = 8;
  static constexpr int kPaired = kWide ? 3 : 1;  // rows up to which two panels run at once

  // Rows of the largest tile for panels of nv vectors.
  static constexpr int rows(int nv) { return nv == 4 ? kRows4 : nv == 3 ? kRows3 : nv == 2 ? kRows2 : kRows1; }

  static Function get(int m, int nv, int np) {
    static constexpr Function one[4][kMostRows] = {
        {tile<V, 1, 1, 1>, tile<V, 2, 1, 1>, tile<V, 3, 1, 1>, tile<V, 4, 1, 1>, tile<V, 5, 1, 1>, tile<V, 6, 1, 1>,
         tile<V, 7, 1, 1>, tile<V, 8, 1, 1>},
        {tile<V, 1, 2, 1>, tile<V, 2, 2, 1>, tile<V, 3, 2, 1>, tile<V, 4, 2, 1>, tile<V, 5, 2, 1>, tile < V,
         kWide ? 6 : 1, 2, 1 >, tile < V, kWide ? 7 : 1, 2, 1 >, tile < V, kWide ? 8 : 1, 2, 1 > },
        {tile<V, 1, 3, 1>,
         tile<V, 2, 3, 1>,
         tile<V, 3, 3, 1>,
         tile<V, 4, 3, 1>,
         tile < V,
         kWide ? 5 : 1,
         3,
         1 >
         , tile < V, kWide ? 6 : 1, 3, 1 >, tile < V, kWide ? 7 : 1, 3, 1 >, tile < V, kWide ? 8 : 1, 3, 1 > },
        {tile<V, 1, 4, 1>, tile<V, 2, 4, 1>, tile<V, 3, 4, 1>, tile < V, kWide ? 4 : 1, 4, 1 >, tile < V, kWide ? 5 : 1,
         4, 1 >, tile < V, kWide ? 6 : 1, 4, 1 >, nullptr, nullptr}};
    static constexpr Function two[2][3] = {
        {tile<V, 1, 3, 2>, tile < V, kWide ? 2 : 1, 3, 2 >, tile < V, kWide ? 3 : 1, 3, 2 > },
        {tile<V, 1, 4, 2>, tile < V, kWide ? 2 : 1, 4, 2 >, tile < V, kWide ? 3 : 1, 4, 2 > }};
    return np == 2 ? two[nv - 3][m - 1] : one[nv - 1][m - 1];
  }
};

namespace {

// Cuts n rows into tiles of nearly equal height, none above `most`. The higher ones come first: the first tile of a
// panel waits for the weights, and has the more to do with each (16 rows as 6 + 5 + 5, not 5 + 5 + 6: minimal gated
// unit of 128 units 1 % faster beside a GRU, whose tiles are of 8 rows).
struct RowTiles {
  int64_t n, tiles;
  RowTiles(int64_t rows, int most) : n(rows), tiles((rows + most - 1) / most) {
    least_ = tiles ? n / tiles : 0;
    higher_ = n - least_ * tiles;
  }
  int64_t first(int64_t tile) const { return tile * least_ + (tile < higher_ ? tile : higher_); }
  // Tiles, of `most` rows at most, whose sums fit `buffer` rows; where not all do, nearly as many each time.
  int64_t together(int64_t buffer, int most) const {
    if (n <= buffer) return tiles;
    const int64_t fit = buffer / most, times = (tiles + fit - 1) / fit;
    return (tiles + times - 1) / times;
  }

 private:
  int64_t least_, higher_;  // rows of the low tiles, and how many tiles have one more
};

// How tiles that work on one panel share in fetching the next one, each a part of it from term to term. A line on its
// way from the third-level cache takes a place among the dozen that the tile's own lines pass through: the slower they
// come, the better, and up to four times as many tiles take part as it would take at a line a term (LSTM, B = 64, Ice
// Lake: forward 1.04 to 1.09 times as fast at H = 512, 1.12 to 1.18 at 1024).
// With few tiles the last part of the panel is left out; a narrower panel than this one is overrun, which fetches in
// vain.
struct Ahead {
  int64_t k, step, shares;  // terms of a tile, bytes of a term, tiles that fetch
  Ahead(int64_t tiles, int64_t k_, int64_t bytes_a_term) : k(k_), step(64), shares((bytes_a_term + 63) / 64) {
    if (tiles <= shares) return;
    shares = tiles < 4 * shares ? tiles : 4 * shares;
    step = (bytes_a_term + shares - 1) / shares;
  }
  // The share of the q-th tile in the panel that begins at `panel`; null: none.
  template <class Scalar>
  void set(TileArgs<Scalar>& args, int64_t q, const Scalar* panel) const {
    args.ahead = panel && q < shares ? reinterpret_cast<const char*>(panel) + q * k * step : nullptr;
    args.ahead_step = step;
  }
};

}  // namespace

}  // namespace cpu
}  // namespace fastrnn
