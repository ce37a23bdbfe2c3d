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
// Terms i and i + 16 of a block are a pair: two vectors become one without a shuffle.
constexpr int64_t kPairDistance = kBlockTerms / 2;

__m512i bits(__m512 x) { return _mm512_castps_si512(x); }

// What a float is made of, each part a bfloat16 in the upper half of its lane; below it the last one has what may be
// cut off, zero for a number. Rounded to nearest, ties away, in integers: a conversion would hold up the one port that
// also shuffles. A NaN of any kind is NaN in the first or in the last part, and both have a product with all of the
// other operand.
struct Parts {
  __m512i part[kParts];
  explicit Parts(__m512 x) {
    for (int j = 0; j < kParts - 1; ++j) {
      part[j] = _mm512_and_si512(_mm512_add_epi32(bits(x), _mm512_set1_epi32(0x8000)), upper());
      x = _mm512_sub_ps(x, _mm512_castsi512_ps(part[j]));
    }
    part[kParts - 1] = bits(x);
  }
  static __m512i upper() { return _mm512_set1_epi32(static_cast<int>(0xffff0000u)); }
};

__mmask16 mask(int64_t n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : static_cast<__mmask16>((1u << n) - 1); }

// Pairs of terms, the first in the lower half of a lane -> to[part*part_step + lane*2 + which].
inline __attribute__((always_inline)) void store_pairs(__m512 first, __m512 second, Bfloat16* to, int64_t part_step) {
  const Parts low(first), high(second);
  unroll<kParts>([&](auto j) __attribute__((always_inline)) {
    constexpr int kFirstOrSecondAndThird = 0xf8;
    const __m512i both = _mm512_ternarylogic_epi32(_mm512_srli_epi32(low.part[j.value], 16), high.part[j.value],
                                                   Parts::upper(), kFirstOrSecondAndThird);
    _mm512_storeu_si512(to + j.value * part_step, both);
  });
}

// A block of terms of a row, of which `terms` exist -> to[part*part_step + pair*2 + which].
inline __attribute__((always_inline)) void cut_terms(const float* from, int64_t terms, Bfloat16* to,
                                                     int64_t part_step) {
  if (terms >= kBlockTerms) {
    store_pairs(_mm512_loadu_ps(from), _mm512_loadu_ps(from + kPairDistance), to, part_step);
  } else {
    store_pairs(_mm512_maskz_loadu_ps(mask(terms), from),
                _mm512_maskz_loadu_ps(mask(terms - kPairDistance), from + kPairDistance), to, part_step);
  }
}

// 16 columns of two rows, of which `lanes` exist, either null: zero -> to[part*part_step + lane*2 + row].
inline __attribute__((always_inline)) void cut_pair(const float* first, const float* second, __mmask16 lanes,
                                                    Bfloat16* to, int64_t part_step) {
  store_pairs(first ? _mm512_maskz_loadu_ps(lanes, first) : _mm512_setzero_ps(),
              second ? _mm512_maskz_loadu_ps(lanes, second) : _mm512_setzero_ps(), to, part_step);
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
      for (int64_t pair = 0; pair < kPairDistance; ++pair) {
        const float* const one = a + (j + pair) * a_row + column;
        const float* const other = one + kPairDistance * a_row;
        __builtin_prefetch(one + kBlockTerms * a_row, 0, 3);
        __builtin_prefetch(other + kBlockTerms * a_row, 0, 3);
        cut_pair(j + pair < k ? one : nullptr, j + pair + kPairDistance < k ? other : nullptr, lanes,
                 pairs + pair * 2 * kBlockLanes, kBlock);
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

// A block of terms of 16 rows, of which n and `terms` exist -> [row][term], a part kBlock elements after the other;
// asks for the lines of those two blocks on.
inline __attribute__((always_inline)) void cut_sixteen(const float* from, int64_t from_row, int64_t n, int64_t terms,
                                                       Bfloat16* to, int64_t following = 0) {
  for (int64_t row = 0; row < kBlockRows; ++row, from += row < n ? from_row : 0) {
    __builtin_prefetch(from + 2 * kBlockTerms, 0, 3);
    __builtin_prefetch(from + 2 * kBlockTerms + 16, 0, 3);
    if (following) {
      __builtin_prefetch(from + following, 0, 2);
      __builtin_prefetch(from + following + 16, 0, 2);
    }
    cut_terms(from, row < n ? terms : 0, to + row * kBlockTerms, kBlock);
  }
}

// Likewise -> [pair of terms][row][2], a part part_step elements after the other.
void pack_sixteen(const float* from, int64_t from_row, int64_t n, int64_t terms, Bfloat16* to, int64_t part_step) {
  alignas(64) Bfloat16 rows[kParts * kBlock];
  cut_sixteen(from, from_row, n, terms, rows);
  for (int part = 0; part < kParts; ++part) {
    BlocksAvx512::transpose(rows + part * kBlock, kBlockTerms, to + part * part_step);
  }
}

void pack_few(const float* from, int64_t from_row, int64_t n, int64_t k, Bfloat16* to) {
  for (int64_t j = 0; j < k; j += kBlockTerms, to += kParts * kBlock) {
    pack_sixteen(from + j, from_row, n, k - j, to, kBlock);
  }
}

void pack_gates(const float* w, int64_t k, int64_t units, int64_t unit, int64_t blocks, int gates, Bfloat16* to) {
  const int64_t vectors = blocks * gates;
  for (int64_t j = 0; j < k; j += kBlockTerms) {
    for (int64_t v = 0; v < vectors; ++v, to += kBlock) {
      const int64_t first_unit = unit + v / gates * kBlockLanes;
      const float* const from = w + (v % gates * units + first_unit) * k + j;
      pack_sixteen(from, k, units - first_unit, k - j, to, vectors * kBlock);
    }
    to += (kParts - 1) * vectors * kBlock;
  }
}

void pack_columns(const float* const* row, int64_t k, int64_t column, int64_t end, Bfloat16* to) {
  const int64_t vectors = (end - column + kBlockLanes - 1) / kBlockLanes;
  for (int64_t pair = 0; pair < kPairDistance; ++pair) {
    const float* const one = pair < k ? row[pair] + column : nullptr;
    const float* const other = pair + kPairDistance < k ? row[pair + kPairDistance] + column : nullptr;
    for (int64_t v = 0; v < vectors; ++v) {
      cut_pair(one ? one + v * kBlockLanes : nullptr, other ? other + v * kBlockLanes : nullptr,
               mask(end - column - v * kBlockLanes), to + v * kBlock + pair * 2 * kBlockLanes, vectors * kBlock);
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

// What multiply_few multiplies at once: 16 rows of w each of four vectors. Tiles 0 to 3 hold the sums, 4 to 6 in turn
// the rows of w, 7 those of x.
struct FewRows {
  const float* from[4];  // the rows of a vector
  int64_t exist[4];      // how many of them there are
  int64_t following[4];  // elements on, the rows that are multiplied next, for the second-level cache; 0: none
};

// sums[4][row of w][row of x] of one chain of terms [begin, end). While a block is multiplied the next one is cut.
__attribute__((noinline)) void few_rows(const FewRowsArgs& t, const FewRows& rows, int64_t begin, int64_t end,
                                        float* sums) {
  alignas(64) Bfloat16 cut[2][4][kParts][kBlock];
  const auto cut_vector = [&](int64_t k, int which, int j) __attribute__((always_inline)) {
    cut_sixteen(rows.from[j] + k, t.k, rows.exist[j], t.k - k, cut[which][j][0], rows.following[j]);
  };
  for (int j = 0; j < 4; ++j) cut_vector(begin, 0, j);
  asm volatile("" ::: "memory");
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  int which = 0;
  const Bfloat16* x = t.x + begin * kParts * kBlockLanes;
  for (int64_t k = begin; k < end; k += kBlockTerms, which ^= 1, x += kParts * kBlock) {
    const auto add = [&](int left, int right) __attribute__((always_inline)) {
      _tile_loadd(7, x + left * kBlock, 64);
      _tile_loadd(4, cut[which][0][right], 64);
      _tile_dpbf16ps(0, 4, 7);
      _tile_loadd(5, cut[which][1][right], 64);
      _tile_dpbf16ps(1, 5, 7);
      _tile_loadd(6, cut[which][2][right], 64);
      _tile_dpbf16ps(2, 6, 7);
      _tile_loadd(4, cut[which][3][right], 64);
      _tile_dpbf16ps(3, 4, 7);
    };
    int vector = 0;
    each_product([&](int left, int right) __attribute__((always_inline)) {
      add(left, right);
      if (vector < 4 && k + kBlockTerms < end) cut_vector(k + kBlockTerms, which ^ 1, vector);
      ++vector;
      asm volatile("" ::: "memory");
    });
  }
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + 256, 64);
  _tile_stored(2, sums + 512, 64);
  _tile_stored(3, sums + 768, 64);
  asm volatile("" ::: "memory");
}

void multiply_few(const FewRowsArgs& t) {
  alignas(64) float sums[4 * kBlockRows * kBlockLanes];
  const __m512i turned = _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                                            _mm512_set1_epi32(kBlockLanes));
  const int64_t vectors = t.blocks * t.gates;
  for (int64_t v = 0; v < vectors; v += 4) {
    FewRows rows;
    const auto row = [&](int64_t vector) {
      return vector % t.gates * t.units + t.unit + vector / t.gates * kBlockLanes;
    };
    for (int64_t j = 0; j < 4; ++j) {
      const int64_t vector = v + j < vectors ? v + j : v;
      rows.from[j] = t.w + row(vector) * t.k;
      rows.exist[j] = t.units - (t.unit + vector / t.gates * kBlockLanes);
      rows.following[j] = vector + 4 < vectors ? (row(vector + 4) - row(vector)) * t.k : 0;
    }
    for (int64_t begin = 0; begin < t.k; begin += kPartChain) {
      few_rows(t, rows, begin, t.k - begin < kPartChain ? t.k : begin + kPartChain, sums);
      for (int64_t j = 0; j < 4 && v + j < vectors; ++j) {
        for (int m = 0; m < t.rows; ++m) {
          float* const out = t.out + m * t.out_row + (v + j) * kBlockLanes;
          const __m512 sum = _mm512_i32gather_ps(turned, sums + j * kBlockRows * kBlockLanes + m, 4);
          const float* const from = begin ? out : t.init + (v + j) * kBlockLanes;
          _mm512_storeu_ps(out, _mm512_add_ps(_mm512_loadu_ps(from), sum));
        }
      }
    }
  }
}

void begin() { shape_tiles(kBlockRows); }
void end() { _tile_release(); }

}  // namespace

constinit const PartProducts amx_parts = {begin,       end,        multiply, multiply_few, pack_rows,
                                          pack_turned, pack_gates, pack_few, pack_columns};

}  // namespace cpu
}  // namespace fastrnn
