// SPDX-License-Identifier: BSD-3-Clause
// Lanes of AVX-512 (F, BW, DQ, VL): 16 floats or 8 doubles. Compiled with those flags, called only where CPUID has
// them.
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 takes the deliberately undefined operand of its own intrinsics for a mistake (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>

#include "../table.h"

namespace fastrnn {
namespace cpu {
namespace {

struct FloatAvx512 {
  using Scalar = float;
  static constexpr int kLanes = 16, kRegisters = 32;
  __m512 v;

  static FloatAvx512 load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static FloatAvx512 load_partial(const float* p, int n) { return {_mm512_maskz_loadu_ps(mask(n), p)}; }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store_partial(float* p, int n) const { _mm512_mask_storeu_ps(p, mask(n), v); }
  static FloatAvx512 broadcast(float a) { return {_mm512_set1_ps(a)}; }
  static FloatAvx512 zero() { return {_mm512_setzero_ps()}; }
  static FloatAvx512 one() { return broadcast(1.0f); }
  friend FloatAvx512 operator+(FloatAvx512 a, FloatAvx512 b) { return {_mm512_add_ps(a.v, b.v)}; }
  friend FloatAvx512 operator-(FloatAvx512 a, FloatAvx512 b) { return {_mm512_sub_ps(a.v, b.v)}; }
  friend FloatAvx512 operator*(FloatAvx512 a, FloatAvx512 b) { return {_mm512_mul_ps(a.v, b.v)}; }
  static FloatAvx512 fma(FloatAvx512 a, FloatAvx512 b, FloatAvx512 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  // Both return b where a or b is NaN.
  static FloatAvx512 min(FloatAvx512 a, FloatAvx512 b) { return {_mm512_min_ps(a.v, b.v)}; }
  static FloatAvx512 max(FloatAvx512 a, FloatAvx512 b) { return {_mm512_max_ps(a.v, b.v)}; }
  static FloatAvx512 exp2(FloatAvx512 n, FloatAvx512) { return {_mm512_scalef_ps(_mm512_set1_ps(1.0f), n.v)}; }
  static FloatAvx512 relu(FloatAvx512 x) { return max(zero(), x); }
  static FloatAvx512 where_positive(FloatAvx512 y, FloatAvx512 d) {
    return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(y.v, _mm512_setzero_ps(), _CMP_NLE_UQ), d.v)};
  }
  // An approximate reciprocal with a Newton step and the remainder takes 12 % longer on Granite Rapids, 15 % on Zen 5.
  static FloatAvx512 divide(FloatAvx512 n, FloatAvx512 d) { return {_mm512_div_ps(n.v, d.v)}; }
  static FloatAvx512 sigmoid(FloatAvx512 x) { return cpu::sigmoid(x); }
  static FloatAvx512 tanh(FloatAvx512 x) { return cpu::tanh(x); }

  // to[k][lane] = from[lane][k], 16 by 16. Quarters of four rows, four apart, are put together as they are read, so
  // that what is left are four 4 by 4 transposes within quarters: 32 shuffles, where whole rows would need 64.
  static void transpose(const float* from, int64_t from_row, float* to, int64_t to_row) {
    unroll<4>([&](auto quarter) __attribute__((always_inline)) {
      __m512 a[4];  // a[j]: rows j, j+4, j+8, j+12
      unroll<4>([&](auto j) __attribute__((always_inline)) {
        const float* row = from + j.value * from_row + 4 * quarter.value;
        const __m512 one = _mm512_castps128_ps512(_mm_loadu_ps(row));
        const __m512 two = _mm512_insertf32x4(one, _mm_loadu_ps(row + 4 * from_row), 1);
        const __m512 three = _mm512_insertf32x4(two, _mm_loadu_ps(row + 8 * from_row), 2);
        a[j.value] = _mm512_insertf32x4(three, _mm_loadu_ps(row + 12 * from_row), 3);
      });
      const __m512d low01 = _mm512_castps_pd(_mm512_unpacklo_ps(a[0], a[1]));
      const __m512d high01 = _mm512_castps_pd(_mm512_unpackhi_ps(a[0], a[1]));
      const __m512d low23 = _mm512_castps_pd(_mm512_unpacklo_ps(a[2], a[3]));
      const __m512d high23 = _mm512_castps_pd(_mm512_unpackhi_ps(a[2], a[3]));
      float* column = to + 4 * quarter.value * to_row;
      _mm512_storeu_ps(column, _mm512_castpd_ps(_mm512_unpacklo_pd(low01, low23)));
      _mm512_storeu_ps(column + to_row, _mm512_castpd_ps(_mm512_unpackhi_pd(low01, low23)));
      _mm512_storeu_ps(column + 2 * to_row, _mm512_castpd_ps(_mm512_unpacklo_pd(high01, high23)));
      _mm512_storeu_ps(column + 3 * to_row, _mm512_castpd_ps(_mm512_unpackhi_pd(high01, high23)));
    });
  }

 private:
  static __mmask16 mask(int n) { return static_cast<__mmask16>((1u << n) - 1); }
};

struct DoubleAvx512 {
  using Scalar = double;
  static constexpr int kLanes = 8, kRegisters = 32;
  __m512d v;

  static DoubleAvx512 load(const double* p) { return {_mm512_loadu_pd(p)}; }
  static DoubleAvx512 load_partial(const double* p, int n) { return {_mm512_maskz_loadu_pd(mask(n), p)}; }
  void store(double* p) const { _mm512_storeu_pd(p, v); }
  void store_partial(double* p, int n) const { _mm512_mask_storeu_pd(p, mask(n), v); }
  static DoubleAvx512 broadcast(double a) { return {_mm512_set1_pd(a)}; }
  static DoubleAvx512 zero() { return {_mm512_setzero_pd()}; }
  static DoubleAvx512 one() { return broadcast(1.0); }
  friend DoubleAvx512 operator+(DoubleAvx512 a, DoubleAvx512 b) { return {_mm512_add_pd(a.v, b.v)}; }
  friend DoubleAvx512 operator-(DoubleAvx512 a, DoubleAvx512 b) { return {_mm512_sub_pd(a.v, b.v)}; }
  friend DoubleAvx512 operator*(DoubleAvx512 a, DoubleAvx512 b) { return {_mm512_mul_pd(a.v, b.v)}; }
  static DoubleAvx512 fma(DoubleAvx512 a, DoubleAvx512 b, DoubleAvx512 c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
  static DoubleAvx512 min(DoubleAvx512 a, DoubleAvx512 b) { return {_mm512_min_pd(a.v, b.v)}; }
  static DoubleAvx512 max(DoubleAvx512 a, DoubleAvx512 b) { return {_mm512_max_pd(a.v, b.v)}; }
  static DoubleAvx512 exp2(DoubleAvx512 n, DoubleAvx512) { return {_mm512_scalef_pd(_mm512_set1_pd(1.0), n.v)}; }
  static DoubleAvx512 relu(DoubleAvx512 x) { return max(zero(), x); }
  static DoubleAvx512 where_positive(DoubleAvx512 y, DoubleAvx512 d) {
    return {_mm512_maskz_mov_pd(_mm512_cmp_pd_mask(y.v, _mm512_setzero_pd(), _CMP_NLE_UQ), d.v)};
  }
  static DoubleAvx512 divide(DoubleAvx512 n, DoubleAvx512 d) { return {_mm512_div_pd(n.v, d.v)}; }
  static DoubleAvx512 sigmoid(DoubleAvx512 x) { return cpu::sigmoid(x); }
  static DoubleAvx512 tanh(DoubleAvx512 x) { return cpu::tanh(x); }

  static void transpose(const double* from, int64_t from_row, double* to, int64_t to_row) {
    __m512d a[8], b[8];
    unroll<8>([&](auto j) __attribute__((always_inline)) { a[j.value] = _mm512_loadu_pd(from + j.value * from_row); });
    unroll<4>([&](auto j) __attribute__((always_inline)) {  // b[2j + c]: columns c, c+2, c+4, c+6 of rows 2j, 2j+1
      b[2 * j.value] = _mm512_unpacklo_pd(a[2 * j.value], a[2 * j.value + 1]);
      b[2 * j.value + 1] = _mm512_unpackhi_pd(a[2 * j.value], a[2 * j.value + 1]);
    });
    unroll<2>([&](auto c) __attribute__((always_inline)) {
      const __m512d even_low = _mm512_shuffle_f64x2(b[c.value], b[2 + c.value], 0x88);
      const __m512d odd_low = _mm512_shuffle_f64x2(b[c.value], b[2 + c.value], 0xdd);
      const __m512d even_high = _mm512_shuffle_f64x2(b[4 + c.value], b[6 + c.value], 0x88);
      const __m512d odd_high = _mm512_shuffle_f64x2(b[4 + c.value], b[6 + c.value], 0xdd);
      _mm512_storeu_pd(to + c.value * to_row, _mm512_shuffle_f64x2(even_low, even_high, 0x88));
      _mm512_storeu_pd(to + (2 + c.value) * to_row, _mm512_shuffle_f64x2(odd_low, odd_high, 0x88));
      _mm512_storeu_pd(to + (4 + c.value) * to_row, _mm512_shuffle_f64x2(even_low, even_high, 0xdd));
      _mm512_storeu_pd(to + (6 + c.value) * to_row, _mm512_shuffle_f64x2(odd_low, odd_high, 0xdd));
    });
  }

 private:
  static __mmask8 mask(int n) { return static_cast<__mmask8>((1u << n) - 1); }
};

}  // namespace

constinit const Kernels avx512_float = kernels<FloatAvx512>();
constinit const Kernels avx512_double = kernels<DoubleAvx512>();

}  // namespace cpu
}  // namespace fastrnn
