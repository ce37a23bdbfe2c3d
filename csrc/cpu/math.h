// SPDX-License-Identifier: BSD-3-Clause
// sigmoid and tanh on lanes, from one reduced exponential. Used by the lane classes in isa/*.cpp; tests hold every
// instruction set to the bounds given here, where the exact result is a normal number. NaN and infinities go through;
// sigmoid ends at 1.2e-38 (2.2e-308) on the negative side.
//
// exp(x) = 2^n * (1 + p):  n = round(x / ln2),  r = x - n*ln2 in [-ln2/2, ln2/2],  p = expm1(r).
// ln2 is cut in two so that n*kLn2High is exact without a fused multiply-add as well.
#pragma once

namespace fastrnn {
namespace cpu {

template <class Scalar>
struct ExpConstants;

template <>
struct ExpConstants<float> {
  // 1.5 * 2^23 + 127: adding it rounds to an integer n, and leaves the exponent of 2^n in the lowest bits.
  static constexpr float kLog2e = 1.44269504f, kRound = 12583039.0f;
  static constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  static constexpr float kSigmoidLimit = 87.33655f;  // sigmoid(-limit) is the first result below the normal numbers
  static constexpr float kTanhLimit = 9.02f;         // tanh(9.02) rounds to 1
};

template <>
struct ExpConstants<double> {
  static constexpr double kLog2e = 1.4426950408889634, kRound = 6755399441056767.0;  // 1.5 * 2^52 + 1023
  static constexpr double kLn2High = 6.93145751953125e-1, kLn2Low = 1.42860682030941723212e-6;
  static constexpr double kSigmoidLimit = 708.3964185322643;
  static constexpr double kTanhLimit = 19.07;
};

// expm1 on [-ln2/2, ln2/2]: r + r^2 * q(r). float: degree 6, minimax, 3.1e-9 relative, evaluated after Estrin.
template <class V>
inline __attribute__((always_inline)) V expm1_reduced(V r, float) {
  const V r2 = r * r;
  const V q23 = V::fma(V::broadcast(1.6666520108e-1f), r, V::broadcast(4.9999993412e-1f));
  const V q45 = V::fma(V::broadcast(8.3687804291e-3f), r, V::broadcast(4.1668394217e-2f));
  const V q = V::fma(V::fma(V::broadcast(1.3814466740e-3f), r2, q45), r2, q23);
  return V::fma(r2, q, r);
}

// double: Taylor to degree 13, truncation 4e-18 relative to r; the first terms added last.
template <class V>
inline __attribute__((always_inline)) V expm1_reduced(V r, double) {
  const V r2 = r * r;
  const V r4 = r2 * r2;
  const V q23 = V::fma(V::broadcast(1.0 / 6), r, V::broadcast(0.5));
  const V q45 = V::fma(V::broadcast(1.0 / 120), r, V::broadcast(1.0 / 24));
  const V q67 = V::fma(V::broadcast(1.0 / 5040), r, V::broadcast(1.0 / 720));
  const V q89 = V::fma(V::broadcast(1.0 / 362880), r, V::broadcast(1.0 / 40320));
  const V qab = V::fma(V::broadcast(1.0 / 39916800), r, V::broadcast(1.0 / 3628800));
  const V qcd = V::fma(V::broadcast(1.0 / 6227020800.0), r, V::broadcast(1.0 / 479001600));
  const V high = V::fma(qcd, r2, qab);
  const V mid = V::fma(q89, r2, q67);
  const V low = V::fma(q45, r2, q23);
  const V q = V::fma(V::fma(high, r4, mid), r4, low);
  return V::fma(r2, q, r);
}

// scale = 2^n and p with exp(x) = scale * (1 + p), of -x where kNegated: a sign costs nothing in constants and operands
// of multiply-adds. |x| must keep 2^n normal: beyond that the exponent wraps.
template <bool kNegated, class V>
inline __attribute__((always_inline)) V reduced_exp(V x, V* scale) {
  using C = ExpConstants<typename V::Scalar>;
  const V shifted = V::fma(x, V::broadcast(kNegated ? -C::kLog2e : C::kLog2e), V::broadcast(C::kRound));
  const V n = shifted - V::broadcast(C::kRound);
  const V high = V::fma(n, V::broadcast(-C::kLn2High), kNegated ? V::negated(x) : x);
  const V r = V::fma(n, V::broadcast(-C::kLn2Low), high);
  *scale = V::exp2(shifted);
  return expm1_reduced(r, typename V::Scalar(0));
}

// 1 / (1 + exp(-x)) <= 2 ulp (float, fused multiply-add). The limit comes first in min and max: NaN goes through.
template <class V>
inline __attribute__((always_inline)) V sigmoid(V x) {
  const V limit = V::broadcast(ExpConstants<typename V::Scalar>::kSigmoidLimit);
  V scale;
  const V p = reduced_exp<true>(V::max(V::negated(limit), V::min(limit, x)), &scale);
  return V::divide(V::one(), scale + V::fma(p, scale, V::one()));
}

// (e - 1) / (e + 1) with e = exp(2x), the numerator from expm1 so that nothing cancels near 0. <= 3 ulp.
template <class V>
inline __attribute__((always_inline)) V tanh(V x) {
  const V limit = V::broadcast(ExpConstants<typename V::Scalar>::kTanhLimit);
  const V bounded = V::max(V::negated(limit), V::min(limit, x));
  V scale;
  const V p = reduced_exp<false>(bounded + bounded, &scale);
  return V::divide(V::fma(p, scale, scale - V::one()), V::fma(p, scale, scale + V::one()));
}

}  // namespace cpu
}  // namespace fastrnn
