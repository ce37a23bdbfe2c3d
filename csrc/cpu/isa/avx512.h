// SPDX-License-Identifier: BSD-3-Clause
// The lane class of AVX-512 (F, BW, DQ, VL) in float: 16 lanes. Included by the files compiled with those flags, each
// of which has a class of its own: nothing here is shared by two objects.
#pragma once
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 takes the deliberately undefined operand of its own intrinsics for a mistake (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>

#include "../math.h"
#include "../matmul.h"

namespace fastrnn {
namespace cpu {
namespace {

// sigmoid and tanh of math.h.
struct ExactMath {
  template <class W>
  static W sigmoid(W x) {
    return cpu::sigmoid(x);
  }
  template <class W>
  static W tanh(W x) {
    return cpu::tanh(x);
  }
};

// Math: how sigmoid and tanh are computed.
template <class Math>
struct FloatLanes {
  using Scalar = float;
  static constexpr int kLanes = 16, kRegisters = 32;
  __m512 v;

  static FloatLanes load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static FloatLanes load_partial(const float* p, int n) { return {_mm512_maskz_loadu_ps(mask(n), p)}; }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void stream(float* p) const { _mm512_stream_ps(p, v); }  // past the caches; p on a line
  void store_partial(float* p, int n) const { _mm512_mask_storeu_ps(p, mask(n), v); }
  static FloatLanes broadcast(float a) { return {_mm512_set1_ps(a)}; }
  void keep() { asm("" : "+v"(v)); }  // in a register
  static FloatLanes zero() { return {_mm512_setzero_ps()}; }
  static FloatLanes one() { return broadcast(1.0f); }
  friend FloatLanes operator+(FloatLanes a, FloatLanes b) { return {_mm512_add_ps(a.v, b.v)}; }
  friend FloatLanes operator-(FloatLanes a, FloatLanes b) { return {_mm512_sub_ps(a.v, b.v)}; }
  friend FloatLanes operator*(FloatLanes a, FloatLanes b) { return {_mm512_mul_ps(a.v, b.v)}; }
  static FloatLanes fma(FloatLanes a, FloatLanes b, FloatLanes c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  // Both return b where a or b is NaN.
  static FloatLanes min(FloatLanes a, FloatLanes b) { return {_mm512_min_ps(a.v, b.v)}; }
  static FloatLanes max(FloatLanes a, FloatLanes b) { return {_mm512_max_ps(a.v, b.v)}; }
  static FloatLanes negated(FloatLanes x) { return {-x.v}; }  // where it is an operand of fma it costs nothing
  // The low bits of what math.h rounded hold n plus the bias: moved into the exponent. scalef would take two slots and
  // five times as long.
  static FloatLanes exp2(FloatLanes shifted) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(shifted.v), 23))};
  }
  static FloatLanes relu(FloatLanes x) { return max(zero(), x); }
  static FloatLanes where_positive(FloatLanes y, FloatLanes d) {
    return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(y.v, _mm512_setzero_ps(), _CMP_NLE_UQ), d.v)};
  }
  // An approximate reciprocal with a Newton step and the remainder takes 12 % longer on Granite Rapids, 15 % on Zen 5.
  static FloatLanes divide(FloatLanes n, FloatLanes d) { return {_mm512_div_ps(n.v, d.v)}; }
  // x less the whole number below it (0 for infinities), p * 2^that number, and 1/d to 14 bits.
  static FloatLanes fraction(FloatLanes x) {
    return {_mm512_reduce_ps(x.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)};
  }
  static FloatLanes scale(FloatLanes p, FloatLanes x) { return {_mm512_scalef_ps(p.v, x.v)}; }
  static FloatLanes near_reciprocal(FloatLanes d) { return {_mm512_rcp14_ps(d.v)}; }
  template <class W>
  static W sigmoid(W x) {
    return Math::sigmoid(x);
  }
  template <class W>
  static W tanh(W x) {
    return Math::tanh(x);
  }

  // column[c][lane] = from[lane][c]. Quarters of four rows, four apart, are put together as they are read, so that what
  // is left is a 4 by 4 transpose within quarters.
  static constexpr int kColumns = 4;
  template <bool kGrouped = false>
  static void columns(const float* from, int64_t from_row, FloatLanes* column) {
    __m512 a[4];  // a[j]: rows j, j+4, j+8, j+12
    const BlockRows<16, float, kGrouped> row(from, from_row);
    unroll<4>([&](auto j) __attribute__((always_inline)) {
      const __m512 one = _mm512_castps128_ps512(_mm_loadu_ps(row.template at<j.value>()));
      const __m512 two = _mm512_insertf32x4(one, _mm_loadu_ps(row.template at<j.value + 4>()), 1);
      const __m512 three = _mm512_insertf32x4(two, _mm_loadu_ps(row.template at<j.value + 8>()), 2);
      a[j.value] = _mm512_insertf32x4(three, _mm_loadu_ps(row.template at<j.value + 12>()), 3);
    });
    __m512d turned[4];
    transpose(a, turned);
    unroll<4>([&](auto j) __attribute__((always_inline)) { column[j.value].v = _mm512_castpd_ps(turned[j.value]); });
  }

  // The same of half a cache line of every row, with fewer shuffles to a column. Rows four apart are put together as
  // they are read.
  static constexpr int kHalfLine = 8;
  template <bool kGrouped = false>
  static void half_lines(const float* from, int64_t from_row, FloatLanes* column) {
    __m512d low[4], high[4];  // [j]: column j in quarters 0 and 2, column j + 4 in 1 and 3, of rows 0 to 7 and 8 to 15
    const BlockRows<16, float, kGrouped> row(from, from_row);
    eight_rows<0>(row, low);
    eight_rows<8>(row, high);
    unroll<4>([&](auto j) __attribute__((always_inline)) {
      column[j.value].v = _mm512_castpd_ps(_mm512_shuffle_f64x2(low[j.value], high[j.value], 0x88));
      column[j.value + 4].v = _mm512_castpd_ps(_mm512_shuffle_f64x2(low[j.value], high[j.value], 0xdd));
    });
  }

  // The same of elements of 16 bits: use(c, column c) for each. They are turned over as they are, within quarters of
  // four rows and eight columns.
  static constexpr int kWidenedColumns = 8;
  template <bool kGrouped = false, class Element, class Use>
  static inline __attribute__((always_inline)) void widened_columns(const Element* from, int64_t from_row,
                                                                    const Use& use) {
    __m512i a[4];  // a[j]: rows j, j+4, j+8, j+12
    const BlockRows<16, Element, kGrouped> row(from, from_row);
    unroll<4>([&](auto j) __attribute__((always_inline)) {
      const __m512i one = _mm512_castsi128_si512(eight(row.template at<j.value>()));
      const __m512i two = _mm512_inserti32x4(one, eight(row.template at<j.value + 4>()), 1);
      const __m512i three = _mm512_inserti32x4(two, eight(row.template at<j.value + 8>()), 2);
      a[j.value] = _mm512_inserti32x4(three, eight(row.template at<j.value + 12>()), 3);
    });
    const __m512i low01 = _mm512_unpacklo_epi16(a[0], a[1]), high01 = _mm512_unpackhi_epi16(a[0], a[1]);
    const __m512i low23 = _mm512_unpacklo_epi16(a[2], a[3]), high23 = _mm512_unpackhi_epi16(a[2], a[3]);
    const __m512i pairs[4] = {_mm512_unpacklo_epi32(low01, low23), _mm512_unpackhi_epi32(low01, low23),
                              _mm512_unpacklo_epi32(high01, high23), _mm512_unpackhi_epi32(high01, high23)};
    const __m512i evens_first = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
    unroll<4>([&](auto j) __attribute__((always_inline)) {  // of every quarter columns 2j and 2j+1
      const __m512i both = _mm512_permutexvar_epi64(evens_first, pairs[j.value]);
      use(Index<2 * j.value>{}, widened(_mm512_castsi512_si256(both), from));
      use(Index<2 * j.value + 1>{}, widened(_mm512_extracti64x4_epi64(both, 1), from));
    });
  }

 private:
  template <class Element>
  static __m128i eight(const Element* from) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  }
  static FloatLanes widened(__m256i elements, const Float16*) { return {_mm512_cvtph_ps(elements)}; }
  static FloatLanes widened(__m256i elements, const Bfloat16*) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(elements), 16))};
  }
  template <int R, class Rows>
  static inline __attribute__((always_inline)) void eight_rows(const Rows& row, __m512d* column) {
    __m512 a[4];  // a[j]: rows R + j, R + j + 4
    unroll<4>([&](auto j) __attribute__((always_inline)) {
      const __m512 one = _mm512_castps256_ps512(_mm256_loadu_ps(row.template at<R + j.value>()));
      a[j.value] = _mm512_insertf32x8(one, _mm256_loadu_ps(row.template at<R + j.value + 4>()), 1);
    });
    transpose(a, column);
  }
  // Of every quarter of four vectors.
  static void transpose(const __m512* a, __m512d* column) {
    const __m512d low01 = _mm512_castps_pd(_mm512_unpacklo_ps(a[0], a[1]));
    const __m512d high01 = _mm512_castps_pd(_mm512_unpackhi_ps(a[0], a[1]));
    const __m512d low23 = _mm512_castps_pd(_mm512_unpacklo_ps(a[2], a[3]));
    const __m512d high23 = _mm512_castps_pd(_mm512_unpackhi_ps(a[2], a[3]));
    column[0] = _mm512_unpacklo_pd(low01, low23);
    column[1] = _mm512_unpackhi_pd(low01, low23);
    column[2] = _mm512_unpacklo_pd(high01, high23);
    column[3] = _mm512_unpackhi_pd(high01, high23);
  }
  static __mmask16 mask(int n) { return static_cast<__mmask16>((1u << n) - 1); }
};

using FloatAvx512 = FloatLanes<ExactMath>;

}  // namespace

}  // namespace cpu
}  // namespace fastrnn
