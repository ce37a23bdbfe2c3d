// SPDX-License-Identifier: BSD-3-Clause
// bfloat16 in AVX-512 with AVX512_BF16: loads, rounding stores and the layouts of blocks.h. Included by the files that
// add a product to it, amx.cpp and avx512_bf16.cpp; each has a class of its own.
#pragma once
#include "../blocks.h"
#include "avx512.h"

namespace fastrnn {
namespace cpu {
namespace {

// sigmoid and tanh where results are rounded to 8 bits: within 1.4e-5 of their value where that is a normal number, and
// never beyond 1, in two thirds of the instructions of math.h. NaN goes through.
struct ShortMath {
  // 1 / (1 + 2^t). The whole part of t is an exponent; at 126 the sum is still finite.
  template <class W>
  static W sigmoid(W x) {
    const W t = W::min(W::broadcast(126.0f), x * W::broadcast(-1.44269504f)), f = W::fraction(t);
    W power = W::fma(W::broadcast(1.342669e-2f), f, W::broadcast(5.224247e-2f));
    power = W::fma(W::fma(W::fma(power, f, W::broadcast(2.4128021e-1f)), f, W::broadcast(6.9304484e-1f)), f, W::one());
    return inverse(W::broadcast(-1.0f) - W::scale(power, t));
  }

  // x * (1 + ...) / (1 + ...), up to where it reaches 1.
  template <class W>
  static W tanh(W x) {
    const W limit = W::broadcast(5.96f), bounded = W::max(W::zero() - limit, W::min(limit, x)), z = bounded * bounded;
    const W over = W::fma(W::fma(W::broadcast(1.4627927e-3f), z, W::broadcast(1.1405424e-1f)), z, W::one());
    W under = W::fma(W::broadcast(-5.295727e-5f), z, W::broadcast(-1.7311404e-2f));
    under = W::fma(W::fma(under, z, W::broadcast(-4.4733352e-1f)), z, W::broadcast(-1.0f));
    return bounded * over * inverse(under);
  }

 private:
  // -1/d: 14 bits and one Newton step, 2 ulp. Of -d, since multiply-adds as lanes have them do not subtract.
  template <class W>
  static W inverse(W d) {
    const W guess = W::near_reciprocal(d);
    return guess * W::fma(d, guess, W::broadcast(-2.0f));
  }
};

using RoundedLanes = FloatLanes<ShortMath>;

struct BlocksAvx512 {
  using Element = Bfloat16;
  static constexpr bool kRounds = true;

  static RoundedLanes load(const Bfloat16* from, int lanes) {
    const __m256i bits = _mm256_maskz_loadu_epi16(mask(lanes), from);
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
  }
  // The instruction takes denormals for zero.
  static void store(RoundedLanes v, Bfloat16* to, int lanes) {
    const __m256bh rounded = _mm512_cvtneps_pbh(v.v);
    _mm256_mask_storeu_epi16(to, mask(lanes), __builtin_bit_cast(__m256i, rounded));
  }

  static void interleave(const Bfloat16* even, const Bfloat16* odd, int lanes, Bfloat16* to) {
    const __m512i low =
        even ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask(lanes), even)) : _mm512_setzero_si512();
    const __m512i high =
        odd ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask(lanes), odd)) : _mm512_setzero_si512();
    _mm512_storeu_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }

  static void scale_pairs(RoundedLanes even, RoundedLanes odd, Bfloat16* pairs) {
    const __m512i both = _mm512_loadu_si512(pairs);
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    const __m512 low = _mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32(both, 16)), even.v);
    const __m512 high = _mm512_mul_ps(_mm512_castsi512_ps(_mm512_and_si512(both, upper)), odd.v);
    const __m512i rounded_low = _mm512_cvtepu16_epi32(__builtin_bit_cast(__m256i, _mm512_cvtneps_pbh(low)));
    const __m512i rounded_high = _mm512_cvtepu16_epi32(__builtin_bit_cast(__m256i, _mm512_cvtneps_pbh(high)));
    _mm512_storeu_si512(pairs, _mm512_or_si512(rounded_low, _mm512_slli_epi32(rounded_high, 16)));
  }

  // Pairs move as floats: shuffles leave every bit alone.
  static void transpose(const Bfloat16* from, int64_t from_row, Bfloat16* to) {
    unroll<4>([&](auto quarter) __attribute__((always_inline)) {
      __m512 a[4];  // a[j]: pairs 4*quarter .. of rows j, j+4, j+8, j+12
      unroll<4>([&](auto j) __attribute__((always_inline)) {
        const Bfloat16* row = from + j.value * from_row + quarter.value * 8;
        const __m512 one = _mm512_castps128_ps512(piece(row));
        const __m512 two = _mm512_insertf32x4(one, piece(row + 4 * from_row), 1);
        const __m512 three = _mm512_insertf32x4(two, piece(row + 8 * from_row), 2);
        a[j.value] = _mm512_insertf32x4(three, piece(row + 12 * from_row), 3);
      });
      const __m512d low01 = _mm512_castps_pd(_mm512_unpacklo_ps(a[0], a[1]));
      const __m512d high01 = _mm512_castps_pd(_mm512_unpackhi_ps(a[0], a[1]));
      const __m512d low23 = _mm512_castps_pd(_mm512_unpacklo_ps(a[2], a[3]));
      const __m512d high23 = _mm512_castps_pd(_mm512_unpackhi_ps(a[2], a[3]));
      Bfloat16* const place = to + quarter.value * 4 * 32;
      _mm512_storeu_pd(place, _mm512_unpacklo_pd(low01, low23));
      _mm512_storeu_pd(place + 32, _mm512_unpackhi_pd(low01, low23));
      _mm512_storeu_pd(place + 64, _mm512_unpacklo_pd(high01, high23));
      _mm512_storeu_pd(place + 96, _mm512_unpackhi_pd(high01, high23));
    });
  }

 private:
  static __m128 piece(const Bfloat16* p) { return _mm_loadu_ps(reinterpret_cast<const float*>(p)); }
  static __mmask16 mask(int n) { return static_cast<__mmask16>((1u << n) - 1); }
};

}  // namespace

}  // namespace cpu
}  // namespace fastrnn
