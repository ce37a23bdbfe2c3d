// SPDX-License-Identifier: BSD-3-Clause
// Lanes of AVX2, FMA and F16C: 8 floats or 4 doubles. Compiled with those flags, called only where CPUID has them.
#include <immintrin.h>

#include "../table.h"

namespace fastrnn {
namespace cpu {
namespace {

// The first n of 8 (or 4) entries from 8 - n (4 - n) are set.
alignas(32) const int32_t kMask32[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};
alignas(32) const int64_t kMask64[8] = {-1, -1, -1, -1, 0, 0, 0, 0};

struct FloatAvx2 {
  using Scalar = float;
  static constexpr int kLanes = 8, kRegisters = 16;
  __m256 v;

  static FloatAvx2 load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static FloatAvx2 load_partial(const float* p, int n) { return {_mm256_maskload_ps(p, mask(n))}; }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store_partial(float* p, int n) const { _mm256_maskstore_ps(p, mask(n), v); }
  static FloatAvx2 broadcast(float a) { return {_mm256_set1_ps(a)}; }
  void keep() { asm("" : "+x"(v)); }  // in a register
  static FloatAvx2 zero() { return {_mm256_setzero_ps()}; }
  static FloatAvx2 one() { return broadcast(1.0f); }
  friend FloatAvx2 operator+(FloatAvx2 a, FloatAvx2 b) { return {_mm256_add_ps(a.v, b.v)}; }
  friend FloatAvx2 operator-(FloatAvx2 a, FloatAvx2 b) { return {_mm256_sub_ps(a.v, b.v)}; }
  friend FloatAvx2 operator*(FloatAvx2 a, FloatAvx2 b) { return {_mm256_mul_ps(a.v, b.v)}; }
  static FloatAvx2 fma(FloatAvx2 a, FloatAvx2 b, FloatAvx2 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  // Both return b where a or b is NaN.
  static FloatAvx2 min(FloatAvx2 a, FloatAvx2 b) { return {_mm256_min_ps(a.v, b.v)}; }
  static FloatAvx2 max(FloatAvx2 a, FloatAvx2 b) { return {_mm256_max_ps(a.v, b.v)}; }
  static FloatAvx2 negated(FloatAvx2 x) { return {-x.v}; }
  // The low bits of what math.h rounded hold n plus the bias: moved into the exponent.
  static FloatAvx2 exp2(FloatAvx2 shifted) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(shifted.v), 23))};
  }
  static FloatAvx2 relu(FloatAvx2 x) { return max(zero(), x); }
  static FloatAvx2 where_positive(FloatAvx2 y, FloatAvx2 d) {
    return {_mm256_and_ps(_mm256_cmp_ps(y.v, _mm256_setzero_ps(), _CMP_NLE_UQ), d.v)};
  }
  static FloatAvx2 divide(FloatAvx2 n, FloatAvx2 d) { return {_mm256_div_ps(n.v, d.v)}; }
  template <class W>
  static W sigmoid(W x) {
    return cpu::sigmoid(x);
  }
  template <class W>
  static W tanh(W x) {
    return cpu::tanh(x);
  }

  // column[c][lane] = from[lane][c]. Rows four apart are put together as they are read, so that what is left is a 4 by
  // 4 transpose within halves.
  static constexpr int kColumns = 4;
  template <bool kGrouped = false>
  static void columns(const float* from, int64_t from_row, FloatAvx2* column) {
    __m256 a[4];  // a[j]: rows j, j+4
    const BlockRows<8, float, kGrouped> row(from, from_row);
    unroll<4>([&](auto j) __attribute__((always_inline)) {
      const __m256 one = _mm256_castps128_ps256(_mm_loadu_ps(row.template at<j.value>()));
      a[j.value] = _mm256_insertf128_ps(one, _mm_loadu_ps(row.template at<j.value + 4>()), 1);
    });
    const __m256 low01 = _mm256_unpacklo_ps(a[0], a[1]), high01 = _mm256_unpackhi_ps(a[0], a[1]);
    const __m256 low23 = _mm256_unpacklo_ps(a[2], a[3]), high23 = _mm256_unpackhi_ps(a[2], a[3]);
    column[0].v = _mm256_shuffle_ps(low01, low23, 0x44);
    column[1].v = _mm256_shuffle_ps(low01, low23, 0xee);
    column[2].v = _mm256_shuffle_ps(high01, high23, 0x44);
    column[3].v = _mm256_shuffle_ps(high01, high23, 0xee);
  }

  // The same of elements of 16 bits: use(c, column c) for each. They are turned over as they are, within halves of four
  // rows and eight columns.
  static constexpr int kWidenedColumns = 8;
  template <bool kGrouped = false, class Element, class Use>
  static inline __attribute__((always_inline)) void widened_columns(const Element* from, int64_t from_row,
                                                                    const Use& use) {
    __m256i a[4];  // a[j]: rows j, j+4
    const BlockRows<8, Element, kGrouped> row(from, from_row);
    unroll<4>([&](auto j) __attribute__((always_inline)) {
      const __m128i one = eight(row.template at<j.value>()), two = eight(row.template at<j.value + 4>());
      a[j.value] = _mm256_inserti128_si256(_mm256_castsi128_si256(one), two, 1);
    });
    const __m256i low01 = _mm256_unpacklo_epi16(a[0], a[1]), high01 = _mm256_unpackhi_epi16(a[0], a[1]);
    const __m256i low23 = _mm256_unpacklo_epi16(a[2], a[3]), high23 = _mm256_unpackhi_epi16(a[2], a[3]);
    const __m256i pairs[4] = {_mm256_unpacklo_epi32(low01, low23), _mm256_unpackhi_epi32(low01, low23),
                              _mm256_unpacklo_epi32(high01, high23), _mm256_unpackhi_epi32(high01, high23)};
    unroll<4>([&](auto j) __attribute__((always_inline)) {  // of either half columns 2j and 2j+1
      const __m256i both = _mm256_permute4x64_epi64(pairs[j.value], 0xd8);
      use(Index<2 * j.value>{}, widened(_mm256_castsi256_si128(both), from));
      use(Index<2 * j.value + 1>{}, widened(_mm256_extracti128_si256(both, 1), from));
    });
  }

 private:
  template <class Element>
  static __m128i eight(const Element* from) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  }
  static FloatAvx2 widened(__m128i elements, const Float16*) { return {_mm256_cvtph_ps(elements)}; }
  static FloatAvx2 widened(__m128i elements, const Bfloat16*) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(elements), 16))};
  }
  static __m256i mask(int n) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kMask32 + 8 - n)); }
};

struct DoubleAvx2 {
  using Scalar = double;
  static constexpr int kLanes = 4, kRegisters = 16;
  __m256d v;

  static DoubleAvx2 load(const double* p) { return {_mm256_loadu_pd(p)}; }
  static DoubleAvx2 load_partial(const double* p, int n) { return {_mm256_maskload_pd(p, mask(n))}; }
  void store(double* p) const { _mm256_storeu_pd(p, v); }
  void store_partial(double* p, int n) const { _mm256_maskstore_pd(p, mask(n), v); }
  static DoubleAvx2 broadcast(double a) { return {_mm256_set1_pd(a)}; }
  void keep() { asm("" : "+x"(v)); }
  static DoubleAvx2 zero() { return {_mm256_setzero_pd()}; }
  static DoubleAvx2 one() { return broadcast(1.0); }
  friend DoubleAvx2 operator+(DoubleAvx2 a, DoubleAvx2 b) { return {_mm256_add_pd(a.v, b.v)}; }
  friend DoubleAvx2 operator-(DoubleAvx2 a, DoubleAvx2 b) { return {_mm256_sub_pd(a.v, b.v)}; }
  friend DoubleAvx2 operator*(DoubleAvx2 a, DoubleAvx2 b) { return {_mm256_mul_pd(a.v, b.v)}; }
  static DoubleAvx2 fma(DoubleAvx2 a, DoubleAvx2 b, DoubleAvx2 c) { return {_mm256_fmadd_pd(a.v, b.v, c.v)}; }
  static DoubleAvx2 min(DoubleAvx2 a, DoubleAvx2 b) { return {_mm256_min_pd(a.v, b.v)}; }
  static DoubleAvx2 max(DoubleAvx2 a, DoubleAvx2 b) { return {_mm256_max_pd(a.v, b.v)}; }
  static DoubleAvx2 negated(DoubleAvx2 x) { return {-x.v}; }
  static DoubleAvx2 exp2(DoubleAvx2 shifted) {
    return {_mm256_castsi256_pd(_mm256_slli_epi64(_mm256_castpd_si256(shifted.v), 52))};
  }
  static DoubleAvx2 relu(DoubleAvx2 x) { return max(zero(), x); }
  static DoubleAvx2 where_positive(DoubleAvx2 y, DoubleAvx2 d) {
    return {_mm256_and_pd(_mm256_cmp_pd(y.v, _mm256_setzero_pd(), _CMP_NLE_UQ), d.v)};
  }
  static DoubleAvx2 divide(DoubleAvx2 n, DoubleAvx2 d) { return {_mm256_div_pd(n.v, d.v)}; }
  template <class W>
  static W sigmoid(W x) {
    return cpu::sigmoid(x);
  }
  template <class W>
  static W tanh(W x) {
    return cpu::tanh(x);
  }

  static constexpr int kColumns = 2;  // as above, rows two apart
  template <bool kGrouped = false>
  static void columns(const double* from, int64_t from_row, DoubleAvx2* column) {
    __m256d a[2];  // a[j]: rows j, j+2
    unroll<2>([&](auto j) __attribute__((always_inline)) {
      const double* row = from + j.value * from_row;
      const __m256d one = _mm256_castpd128_pd256(_mm_loadu_pd(row));
      a[j.value] = _mm256_insertf128_pd(one, _mm_loadu_pd(row + 2 * from_row), 1);
    });
    column[0].v = _mm256_unpacklo_pd(a[0], a[1]);
    column[1].v = _mm256_unpackhi_pd(a[0], a[1]);
  }

 private:
  static __m256i mask(int n) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kMask64 + 4 - n)); }
};

}  // namespace

constinit const Kernels avx2_float = kernels<FloatAvx2>();
constinit const Kernels avx2_double = kernels<DoubleAvx2>();

}  // namespace cpu
}  // namespace fastrnn
