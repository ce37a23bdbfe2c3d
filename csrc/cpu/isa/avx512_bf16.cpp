// SPDX-License-Identifier: BSD-3-Clause
// Products of bfloat16 by AVX512_BF16: a dot product of pairs in each of 16 lanes an instruction. Compiled with that
// and AVX-512, called only where CPUID has them.
#include "bfloat16.h"

#include "../table_blocks.h"

namespace fastrnn {
namespace cpu {
namespace {

// Rows that the registers hold beside the operands, as in matmul.h.
constexpr int kMostDots = 6;

// M rows by N vectors of BlockArgs.
template <int M, int N>
__attribute__((noinline)) void dot_tile(const BlockArgs& t) {
  __m512 acc[M * N];
  unroll<M>([&](auto m) __attribute__((always_inline)) {
    unroll<N>([&](auto v) __attribute__((always_inline)) {
      acc[m.value * N + v.value] = _mm512_loadu_ps(t.init + m.value * t.init_row + v.value * 16);
    });
  });
  for (const BlockTerms& terms : t.terms) {
    const Bfloat16* a = terms.a;
    const Bfloat16* w = terms.w;
    const int64_t a_row = terms.a_row;
    for (int64_t k = terms.k, pair = 0; k > 0; k -= 2) {
      __m512bh b[N];
      unroll<N>([&](auto v) __attribute__((always_inline)) {
        b[v.value] = __builtin_bit_cast(__m512bh, _mm512_loadu_si512(w + v.value * kBlock));
        if constexpr (M > 1) asm("" : "+v"(b[v.value]));  // kept in a register, as in matmul.h
      });
      unroll<M>([&](auto m) __attribute__((always_inline)) {
        int both;
        __builtin_memcpy(&both, a + m.value * a_row, sizeof both);
        const __m512bh s = __builtin_bit_cast(__m512bh, _mm512_set1_epi32(both));
        unroll<N>([&](auto v) __attribute__((always_inline)) {
          acc[m.value * N + v.value] = _mm512_dpbf16_ps(acc[m.value * N + v.value], s, b[v.value]);
        });
      });
      a += 2;
      w += 32;
      if (++pair == kBlockTerms / 2) {
        pair = 0;
        w += (N - 1) * kBlock;
      }
    }
  }
  unroll<M>([&](auto m) __attribute__((always_inline)) {
    unroll<N>([&](auto v) __attribute__((always_inline)) {
      _mm512_storeu_ps(t.out + m.value * t.out_row + v.value * 16, acc[m.value * N + v.value]);
    });
  });
}

struct DotBlocks : BlocksAvx512 {
  static constexpr int kEqualRows = 1;

  void end() {}

  static void multiply(const BlockArgs& t, int nv) {
    static constexpr void (*tiles[4][kMostDots])(const BlockArgs&) = {
        {dot_tile<1, 1>, dot_tile<2, 1>, dot_tile<3, 1>, dot_tile<4, 1>, dot_tile<5, 1>, dot_tile<6, 1>},
        {dot_tile<1, 2>, dot_tile<2, 2>, dot_tile<3, 2>, dot_tile<4, 2>, dot_tile<5, 2>, dot_tile<6, 2>},
        {dot_tile<1, 3>, dot_tile<2, 3>, dot_tile<3, 3>, dot_tile<4, 3>, dot_tile<5, 3>, dot_tile<6, 3>},
        {dot_tile<1, 4>, dot_tile<2, 4>, dot_tile<3, 4>, dot_tile<4, 4>, dot_tile<5, 4>, dot_tile<6, 4>}};
    BlockArgs part = t;
    const RowTiles cut(t.rows, kMostDots);
    for (int64_t j = 0; j < cut.tiles; ++j) {
      const int64_t first = cut.first(j);
      for (int n = 0; n < 2; ++n) part.terms[n].a = t.terms[n].a + first * t.terms[n].a_row;
      part.init = t.init + first * t.init_row;
      part.out = t.out + first * t.out_row;
      tiles[nv - 1][cut.first(j + 1) - first - 1](part);
    }
  }
};

}  // namespace

constinit const Kernels avx512_bfloat16 = block_kernels<RoundedLanes, DotBlocks>();

}  // namespace cpu
}  // namespace fastrnn
