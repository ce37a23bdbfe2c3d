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

  // column[c][lane] = from[lane][c]. Quarters of four rows, four apart, are put together as they are read, so that what
  // is left is a 4 by 4 transpose within quarters.
  static constexpr int kColumns = 4;
  static void columns(const float* from, int64_t from_row, FloatAvx512* column) {
    __m512 a[4];  // a[j]: rows j, j+4, j+8, j+12
    unroll<4>([&](auto j) __attribute__((always_inline)) {
      const float* row = from + j.value * from_row;
      const __m512 one = _mm512_castps128_ps512(_mm_loadu_ps(row));
      const __m512 two = _mm512_insertf32x4(one, _mm_loadu_ps(row + 4 * from_row), 1);
      const __m512 three = _mm512_insertf32x4(two, _mm_loadu_ps(row + 8 * from_row), 2);
      a[j.value] = _mm512_insertf32x4(three, _mm_loadu_ps(row + 12 * from_row), 3);
    });
    const __m512d low01 = _mm512_castps_pd(_mm512_unpacklo_ps(a[0], a[1]));
    const __m512d high01 = _mm512_castps_pd(_mm512_unpackhi_ps(a[0], a[1]));
    const __m512d low23 = _mm512_castps_pd(_mm512_unpacklo_ps(a[2], a[3]));
    const __m512d high23 = _mm512_castps_pd(_mm512_unpackhi_ps(a[2], a[3]));
    column[0].v = _mm512_castpd_ps(_mm512_unpacklo_pd(low01, low23));
    column[1].v = _mm512_castpd_ps(_mm512_unpackhi_pd(low01, low23));
    column[2].v = _mm512_castpd_ps(_mm512_unpacklo_pd(high01, high23));
    column[3].v = _mm512_castpd_ps(_mm512_unpackhi_pd(high01, high23));
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

  static constexpr int kColumns = 2;  // as above, quarters of two rows
  static void columns(const double* from, int64_t from_row, DoubleAvx512* column) {
    __m512d a[2];  // a[j]: rows j, j+2, j+4, j+6
    unroll<2>([&](auto j) __attribute__((always_inline)) {
      const double* row = from + j.value * from_row;
      const __m512d one = _mm512_castpd128_pd512(_mm_loadu_pd(row));
      const __m512d two = _mm512_insertf64x2(one, _mm_loadu_pd(row + 2 * from_row), 1);
      const __m512d three = _mm512_insertf64x2(two, _mm_loadu_pd(row + 4 * from_row), 2);
      a[j.value] = _mm512_insertf64x2(three, _mm_loadu_pd(row + 6 * from_row), 3);
    });
    column[0].v = _mm512_unpacklo_pd(a[0], a[1]);
    column[1].v = _mm512_unpackhi_pd(a[0], a[1]);
  }

 private:
  static __mmask8 mask(int n) { return static_cast<__mmask8>((1u << n) - 1); }
};

}  // namespace

constinit const Kernels avx512_float = kernels<FloatAvx512>();
constinit const Kernels avx512_double = kernels<DoubleAvx512>();

}  // namespace cpu
}  // namespace fastrnn
