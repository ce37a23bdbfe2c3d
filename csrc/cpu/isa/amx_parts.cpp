// SPDX-License-Identifier: BSD-3-Clause
// The products of parts.h on the tiles of Intel's AMX. Compiled with AMX, AVX-512 and AVX512_BF16, called only where
// CPUID has them and the system grants the tiles.
#include "../parts.h"

#include "../kernels.h"
#include "amx.h"

namespace fastrnn {
namespace cpu {
namespace {

constexpr int kParts = 3;
constexpr int64_t kChainBlocks = kPartChain / kBlockTerms;

// What a float is made of, as floats that bfloat16 holds.
struct Parts {
  __m512 part[kParts];
  explicit Parts(__m512 x) {
    unroll<kParts>([&](auto j) __attribute__((always_inline)) {
      const __m512i bits = _mm512_cvtepu16_epi32(__builtin_bit_cast(__m256i, _mm512_cvtneps_pbh(x)));
      part[j.value] = _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
      x = _mm512_sub_ps(x, part[j.value]);
    });
  }
};

__mmask16 mask(int64_t n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : static_cast<__mmask16>((1u << n) - 1); }

// 32 terms of a row, of which `terms` exist -> to[part*part_step + term].
void cut_terms(const float* from, int64_t terms, Bfloat16* to, int64_t part_step) {
  __m512 low = _mm512_maskz_loadu_ps(mask(terms), from), high = _mm512_maskz_loadu_ps(mask(terms - 16), from + 16);
  for (int j = 0; j < kParts; ++j, to += part_step) {
    const __m512i both = __builtin_bit_cast(__m512i, _mm512_cvtne2ps_pbh(high, low));
    _mm512_storeu_si512(to, both);
    const __m512i low_bits = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(both));
    const __m512i high_bits = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(both, 1));
    low = _mm512_sub_ps(low, _mm512_castsi512_ps(_mm512_slli_epi32(low_bits, 16)));
    high = _mm512_sub_ps(high, _mm512_castsi512_ps(_mm512_slli_epi32(high_bits, 16)));
  }
}

// 16 columns of two rows, of which `lanes` exist, either null: zero -> to[part*part_step + lane*2 + row].
inline __attribute__((always_inline)) void cut_pair(const float* even, const float* odd, __mmask16 lanes, Bfloat16* to,
                                                    int64_t part_step) {
  const Parts low(even ? _mm512_maskz_loadu_ps(lanes, even) : _mm512_setzero_ps());
  const Parts high(odd ? _mm512_maskz_loadu_ps(lanes, odd) : _mm512_setzero_ps());
  unroll<kParts>([&](auto j) __attribute__((always_inline)) {
    const __m512i both = _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(low.part[j.value]), 16),
                                         _mm512_castps_si512(high.part[j.value]));
    _mm512_storeu_si512(to + j.value * part_step, both);
  });
}

void pack_rows(const float* from, int64_t from_row, int64_t n, int64_t k, Bfloat16* to) {
  for (int64_t row = 0; row < n; ++row, from += from_row, to += part_row(k)) {
    for (int64_t j = 0; j < k; j += kBlockTerms) {
      __builtin_prefetch(from + from_row + j, 0, 3);
      __builtin_prefetch(from + from_row + j + 16, 0, 3);
      cut_terms(from + j, k - j, to + j, in_blocks(k));
    }
  }
}

void pack_turned(const float* a, int64_t a_row, int64_t k, int64_t columns, Bfloat16* to) {
  for (int64_t column = 0; column < columns; column += kBlockLanes, to += kBlockLanes * part_row(k)) {
    const __mmask16 lanes = mask(columns - column);
    for (int64_t j = 0; j < k; j += kBlockTerms) {
      alignas(64) Bfloat16 pairs[kParts * kBlock], turned[kBlock];
      for (int64_t term = 0; term < kBlockTerms; term += 2) {
        const float* const even = a + (j + term) * a_row + column;
        __builtin_prefetch(even + kBlockTerms * a_row, 0, 3);
        __builtin_prefetch(even + (kBlockTerms + 1) * a_row, 0, 3);
        cut_pair(j + term < k ? even : nullptr, j + term + 1 < k ? even + a_row : nullptr, lanes,
                 pairs + term * kBlockLanes, kBlock);
      }
      for (int part = 0; part < kParts; ++part) {
        BlocksAvx512::transpose(pairs + part * kBlock, 2 * kBlockLanes, turned);
        Bfloat16* const place = to + part * in_blocks(k) + j;
        for (int lane = 0; lane < kBlockLanes; ++lane) {
          _mm512_storeu_si512(place + lane * part_row(k), _mm512_load_si512(turned + lane * kBlockTerms));
        }
      }
    }
  }
}

void pack_gates(const float* w, int64_t k, int64_t units, int64_t unit, int64_t blocks, int gates, Bfloat16* to) {
  const int64_t vectors = blocks * gates;
  for (int64_t j = 0; j < k; j += kBlockTerms) {
    for (int64_t v = 0; v < vectors; ++v, to += kBlock) {
      const int64_t first_unit = unit + v / gates * kBlockLanes;
      const float* const from = w + (v % gates * units + first_unit) * k + j;
      alignas(64) Bfloat16 rows[kParts * kBlock];
      for (int64_t row = 0; row < kBlockLanes; ++row) {
        cut_terms(from + (first_unit + row < units ? row * k : 0), first_unit + row < units ? k - j : 0,
                  rows + row * kBlockTerms, kBlock);
      }
      for (int part = 0; part < kParts; ++part) {
        BlocksAvx512::transpose(rows + part * kBlock, kBlockTerms, to + part * vectors * kBlock);
      }
    }
    to += (kParts - 1) * vectors * kBlock;
  }
}

void pack_columns(const float* const* row, int64_t k, int64_t column, int64_t end, Bfloat16* to) {
  const int64_t vectors = (end - column + kBlockLanes - 1) / kBlockLanes;
  for (int64_t term = 0; term < kBlockTerms; term += 2) {
    const float* const even = term < k ? row[term] + column : nullptr;
    const float* const odd = term + 1 < k ? row[term + 1] + column : nullptr;
    for (int64_t v = 0; v < vectors; ++v) {
      cut_pair(even ? even + v * kBlockLanes : nullptr, odd ? odd + v * kBlockLanes : nullptr,
               mask(end - column - v * kBlockLanes), to + v * kBlock + term * kBlockLanes, vectors * kBlock);
    }
  }
}

// Calls product(left part, right part) for the products that count, in the order that all tiles keep.
template <class Product>
inline __attribute__((always_inline)) void each_product(const Product& product) {
  product(0, 2);
  product(0, 1);
  product(1, 1);
  product(1, 0);
  product(2, 0);
  product(0, 0);
}

struct Chain {
  const Bfloat16 *a, *w;
  int64_t blocks, a_row_bytes, a_part, w_part;
  float* sums;  // [32][4*16]
};
constexpr int64_t kSumsRow = 4 * kBlockLanes;

// 16 rows by N vectors. Tiles 0 to 3 hold the sums, 4 the rows of a, 5 to 7 in turn the right operand.
template <int N>
__attribute__((noinline)) void sixteen(const Chain& c) {
  asm volatile("" ::: "memory");
  _tile_zero(0);
  if constexpr (N > 1) _tile_zero(1);
  if constexpr (N > 2) _tile_zero(2);
  if constexpr (N > 3) _tile_zero(3);
  const auto add = [&](const Bfloat16* a, const Bfloat16* w) __attribute__((always_inline)) {
    _tile_loadd(4, a, c.a_row_bytes);
    _tile_loadd(5, w, 64);
    _tile_dpbf16ps(0, 4, 5);
    if constexpr (N > 1) {
      _tile_loadd(6, w + kBlock, 64);
      _tile_dpbf16ps(1, 4, 6);
    }
    if constexpr (N > 2) {
      _tile_loadd(7, w + 2 * kBlock, 64);
      _tile_dpbf16ps(2, 4, 7);
    }
    if constexpr (N > 3) {
      _tile_loadd(5, w + 3 * kBlock, 64);
      _tile_dpbf16ps(3, 4, 5);
    }
  };
  for (int64_t k = 0; k < c.blocks; ++k) {
    const Bfloat16* const a = c.a + k * kBlockTerms;
    const Bfloat16* const w = c.w + k * kParts * c.w_part;
    each_product([&](int left, int right)
                     __attribute__((always_inline)) { add(a + left * c.a_part, w + right * c.w_part); });
  }
  _tile_stored(0, c.sums, kSumsRow * 4);
  if constexpr (N > 1) _tile_stored(1, c.sums + 16, kSumsRow * 4);
  if constexpr (N > 2) _tile_stored(2, c.sums + 32, kSumsRow * 4);
  if constexpr (N > 3) _tile_stored(3, c.sums + 48, kSumsRow * 4);
  asm volatile("" ::: "memory");
}

// 32 rows by N vectors. Tiles 0 to 3 hold the sums, 4 and 5 the rows of a, 6 and 7 the right operand. From product to
// product one operand stays, and the tiles of the other are loaded as soon as they are free.
template <int N>
__attribute__((noinline)) void thirty_two(const Chain& c) {
  asm volatile("" ::: "memory");
  _tile_zero(0);
  _tile_zero(2);
  if constexpr (N > 1) {
    _tile_zero(1);
    _tile_zero(3);
  }
  const int64_t lower = kBlockRows * c.a_row_bytes / 2;
  // The product of what is loaded, then the next right operand.
  const auto multiply_then_right = [&](const Bfloat16* w) __attribute__((always_inline)) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(2, 5, 6);
    _tile_loadd(6, w, 64);
    if constexpr (N > 1) {
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
      _tile_loadd(7, w + kBlock, 64);
    }
  };
  // Likewise, then the next left operand.
  const auto multiply_then_left = [&](const Bfloat16* a) __attribute__((always_inline)) {
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (N > 1) _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(4, a, c.a_row_bytes);
    _tile_dpbf16ps(2, 5, 6);
    if constexpr (N > 1) _tile_dpbf16ps(3, 5, 7);
    _tile_loadd(5, a + lower, c.a_row_bytes);
  };
  // Into the first-level cache, a block of terms ahead.
  const auto fetch_left = [&](const Bfloat16* from) __attribute__((always_inline)) {
    for (int row = 0; row < kPartRows; ++row, from += c.a_row_bytes / 2) __builtin_prefetch(from, 0, 3);
  };
  const auto fetch_right = [&](const Bfloat16* from) __attribute__((always_inline)) {
    for (int line = 0; line < N * 16; ++line, from += 32) __builtin_prefetch(from, 0, 3);
  };
  const Bfloat16 *a = c.a, *w = c.w;
  for (int64_t k = c.blocks; k > 0; --k, a += kBlockTerms, w += kParts * c.w_part) {
    _tile_loadd(4, a, c.a_row_bytes);
    _tile_loadd(5, a + lower, c.a_row_bytes);
    _tile_loadd(6, w + 2 * c.w_part, 64);
    if constexpr (N > 1) _tile_loadd(7, w + 2 * c.w_part + kBlock, 64);
    const Bfloat16 *const a_next = a + kBlockTerms, *const w_next = w + kParts * c.w_part;
    fetch_left(a_next);
    multiply_then_right(w + c.w_part);
    fetch_right(w_next + 2 * c.w_part);
    multiply_then_left(a + c.a_part);
    fetch_right(w_next + c.w_part);
    multiply_then_right(w);
    fetch_left(a_next + c.a_part);
    multiply_then_left(a + 2 * c.a_part);
    fetch_right(w_next);
    multiply_then_left(a);
    fetch_left(a_next + 2 * c.a_part);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(2, 5, 6);
    if constexpr (N > 1) {
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c.sums, kSumsRow * 4);
  _tile_stored(2, c.sums + kBlockRows * kSumsRow, kSumsRow * 4);
  if constexpr (N > 1) {
    _tile_stored(1, c.sums + 16, kSumsRow * 4);
    _tile_stored(3, c.sums + kBlockRows * kSumsRow + 16, kSumsRow * 4);
  }
  asm volatile("" ::: "memory");
}

void multiply(const PartArgs& t) {
  alignas(64) float sums[kPartRows * kSumsRow];
  const int vectors = (t.columns + kBlockLanes - 1) / kBlockLanes;
  const float* from = t.init;
  int64_t from_row = t.init_row;
  for (int m = 0; from == t.out && m < t.rows; ++m) fetch(from + m * from_row, t.columns);
  int64_t begin = 0;
  do {
    Chain chain{t.a + begin * kBlockTerms,
                t.w + begin * kParts * vectors * kBlock,
                t.blocks - begin < kChainBlocks ? t.blocks - begin : kChainBlocks,
                t.a_row * 2,
                t.blocks * kBlockTerms,
                vectors * kBlock,
                sums};
    if (t.rows <= kBlockRows) {
      static constexpr void (*products[])(const Chain&) = {sixteen<1>, sixteen<2>, sixteen<3>, sixteen<4>};
      products[vectors - 1](chain);
    } else {
      for (int v = 0; v < vectors; v += 2, chain.w += 2 * kBlock, chain.sums += 2 * kBlockLanes) {
        vectors - v > 1 ? thirty_two<2>(chain) : thirty_two<1>(chain);
      }
    }
    for (int v = 0; v < vectors; ++v) {
      const __mmask16 lanes = mask(t.columns - v * kBlockLanes);
      for (int m = 0; m < t.rows; ++m) {
        __m512 sum = _mm512_load_ps(sums + m * kSumsRow + v * kBlockLanes);
        if (from) sum = _mm512_add_ps(_mm512_maskz_loadu_ps(lanes, from + m * from_row + v * kBlockLanes), sum);
        _mm512_mask_storeu_ps(t.out + m * t.out_row + v * kBlockLanes, lanes, sum);
      }
    }
    from = t.out, from_row = t.out_row;
    begin += kChainBlocks;
  } while (begin < t.blocks);
}

void begin() { shape_tiles(kBlockRows); }
void end() { _tile_release(); }

}  // namespace

constinit const PartProducts amx_parts = {begin, end, multiply, pack_rows, pack_turned, pack_gates, pack_columns};

}  // namespace cpu
}  // namespace fastrnn
