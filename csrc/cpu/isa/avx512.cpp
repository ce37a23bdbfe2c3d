// SPDX-License-Identifier: BSD-3-Clause
// Lanes of AVX-512 (F, BW, DQ, VL): 8 doubles, and the 16 floats of avx512.h. Compiled with those flags, called only
// where CPUID has them.
#include "avx512.h"

#include "../table.h"

namespace fastrnn {
namespace cpu {
namespace {

struct DoubleAvx512 {
  using Scalar = double;
  static constexpr int kLanes = 8, kRegisters = 32;
  __m512d v;

  static DoubleAvx512 load(const double* p) { return {_mm512_loadu_pd(p)}; }
  static DoubleAvx512 load_partial(const double* p, int n) { return {_mm512_maskz_loadu_pd(mask(n), p)}; }
  void store(double* p) const { _mm512_storeu_pd(p, v); }
  void stream(double* p) const { _mm512_stream_pd(p, v); }
  void store_partial(double* p, int n) const { _mm512_mask_storeu_pd(p, mask(n), v); }
  static DoubleAvx512 broadcast(double a) { return {_mm512_set1_pd(a)}; }
  void keep() { asm("" : "+v"(v)); }
  static DoubleAvx512 zero() { return {_mm512_setzero_pd()}; }
  static DoubleAvx512 one() { return broadcast(1.0); }
  friend DoubleAvx512 operator+(DoubleAvx512 a, DoubleAvx512 b) { return {_mm512_add_pd(a.v, b.v)}; }
  friend DoubleAvx512 operator-(DoubleAvx512 a, DoubleAvx512 b) { return {_mm512_sub_pd(a.v, b.v)}; }
  friend DoubleAvx512 operator*(DoubleAvx512 a, DoubleAvx512 b) { return {_mm512_mul_pd(a.v, b.v)}; }
  static DoubleAvx512 fma(DoubleAvx512 a, DoubleAvx512 b, DoubleAvx512 c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
  static DoubleAvx512 min(DoubleAvx512 a, DoubleAvx512 b) { return {_mm512_min_pd(a.v, b.v)}; }
  static DoubleAvx512 max(DoubleAvx512 a, DoubleAvx512 b) { return {_mm512_max_pd(a.v, b.v)}; }
  static DoubleAvx512 negated(DoubleAvx512 x) { return {-x.v}; }
  static DoubleAvx512 exp2(DoubleAvx512 shifted) {
    return {_mm512_castsi512_pd(_mm512_slli_epi64(_mm512_castpd_si512(shifted.v), 52))};
  }
  static DoubleAvx512 relu(DoubleAvx512 x) { return max(zero(), x); }
  static DoubleAvx512 where_positive(DoubleAvx512 y, DoubleAvx512 d) {
    return {_mm512_maskz_mov_pd(_mm512_cmp_pd_mask(y.v, _mm512_setzero_pd(), _CMP_NLE_UQ), d.v)};
  }
  static DoubleAvx512 divide(DoubleAvx512 n, DoubleAvx512 d) { return {_mm512_div_pd(n.v, d.v)}; }
  template <class W>
  static W sigmoid(W x) {
    return cpu::sigmoid(x);
  }
  template <class W>
  static W tanh(W x) {
    return cpu::tanh(x);
  }

  static constexpr int kColumns = 2;  // as in avx512.h, quarters of two rows
  template <bool kGrouped = false>
  static void columns(const double* from, int64_t from_row, DoubleAvx512* column) {
    __m512d a[2];  // a[j]: rows j, j+2, j+4, j+6
    const BlockRows<8, double, kGrouped> row(from, from_row);
    unroll<2>([&](auto j) __attribute__((always_inline)) {
      const __m512d one = _mm512_castpd128_pd512(_mm_loadu_pd(row.template at<j.value>()));
      const __m512d two = _mm512_insertf64x2(one, _mm_loadu_pd(row.template at<j.value + 2>()), 1);
      const __m512d three = _mm512_insertf64x2(two, _mm_loadu_pd(row.template at<j.value + 4>()), 2);
      a[j.value] = _mm512_insertf64x2(three, _mm_loadu_pd(row.template at<j.value + 6>()), 3);
    });
    column[0].v = _mm512_unpacklo_pd(a[0], a[1]);
    column[1].v = _mm512_unpackhi_pd(a[0], a[1]);
  }

  static constexpr int kHalfLine = 4;  // as in avx512.h, rows two apart
  template <bool kGrouped = false>
  static void half_lines(const double* from, int64_t from_row, DoubleAvx512* column) {
    __m512d a[4];  // rows 0 and 2, 1 and 3, 4 and 6, 5 and 7
    const BlockRows<8, double, kGrouped> row(from, from_row);
    unroll<4>([&](auto j) __attribute__((always_inline)) {
      constexpr int kFirst = j.value / 2 * 4 + j.value % 2;
      const __m512d one = _mm512_castpd256_pd512(_mm256_loadu_pd(row.template at<kFirst>()));
      a[j.value] = _mm512_insertf64x4(one, _mm256_loadu_pd(row.template at<kFirst + 2>()), 1);
    });
    const __m512d low02 = _mm512_unpacklo_pd(a[0], a[1]), low13 = _mm512_unpackhi_pd(a[0], a[1]);
    const __m512d high02 = _mm512_unpacklo_pd(a[2], a[3]), high13 = _mm512_unpackhi_pd(a[2], a[3]);
    column[0].v = _mm512_shuffle_f64x2(low02, high02, 0x88);
    column[1].v = _mm512_shuffle_f64x2(low13, high13, 0x88);
    column[2].v = _mm512_shuffle_f64x2(low02, high02, 0xdd);
    column[3].v = _mm512_shuffle_f64x2(low13, high13, 0xdd);
  }

 private:
  static __mmask8 mask(int n) { return static_cast<__mmask8>((1u << n) - 1); }
};

}  // namespace

constinit const Kernels avx512_float = kernels<FloatAvx512>();
constinit const Kernels avx512_double = kernels<DoubleAvx512>();

}  // namespace cpu
}  // namespace fastrnn
