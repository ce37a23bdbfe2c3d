// SPDX-License-Identifier: BSD-3-Clause
// The lane class of CUDA: one unit in a register, on which csrc/cells run. Multiply-adds are explicit, and the files
// that include this are compiled with -fmad=false. expf and tanhf of CUDA have errors of at most 2 ulp (CUDA C++
// Programming Guide, mathematical functions); no fast variant is used, whatever the dtype.
#pragma once
#include <math.h>

#include "../cells/cell.h"

namespace fastrnn {
namespace cuda {

FASTRNN_INLINE float exp_of(float a) { return expf(a); }
FASTRNN_INLINE double exp_of(double a) { return exp(a); }
FASTRNN_INLINE float tanh_of(float a) { return tanhf(a); }
FASTRNN_INLINE double tanh_of(double a) { return tanh(a); }
FASTRNN_INLINE float fma_of(float a, float b, float c) { return fmaf(a, b, c); }
FASTRNN_INLINE double fma_of(double a, double b, double c) { return fma(a, b, c); }

template <class A>
struct Lane {
  using Scalar = A;
  static constexpr int kLanes = 1;
  A v;

  FASTRNN_INLINE friend Lane operator+(Lane a, Lane b) { return {a.v + b.v}; }
  FASTRNN_INLINE friend Lane operator-(Lane a, Lane b) { return {a.v - b.v}; }
  FASTRNN_INLINE friend Lane operator*(Lane a, Lane b) { return {a.v * b.v}; }
  FASTRNN_INLINE static Lane one() { return {A(1)}; }
  FASTRNN_INLINE static Lane zero() { return {A(0)}; }
  FASTRNN_INLINE static Lane fma(Lane a, Lane b, Lane c) { return {fma_of(a.v, b.v, c.v)}; }
  FASTRNN_INLINE static Lane sigmoid(Lane a) { return {A(1) / (A(1) + exp_of(-a.v))}; }
  FASTRNN_INLINE static Lane tanh(Lane a) { return {tanh_of(a.v)}; }
  FASTRNN_INLINE static Lane relu(Lane a) { return {a.v < A(0) ? A(0) : a.v}; }
  FASTRNN_INLINE static Lane where_positive(Lane y, Lane d) { return {y.v <= A(0) ? A(0) : d.v}; }
};

}  // namespace cuda
}  // namespace fastrnn
