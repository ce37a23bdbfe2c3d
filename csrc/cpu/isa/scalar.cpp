// SPDX-License-Identifier: BSD-3-Clause
// One lane of plain C++: for machines without vector code here, and the truth that the vector code is read against.
// Nothing is fused: a software fused multiply-add would be a call.
#include <stdint.h>

#include "../table.h"

namespace fastrnn {
namespace cpu {
namespace {

template <class T>
struct Bits;
template <>
struct Bits<float> {
  using Integer = uint32_t;
  static constexpr int kMantissa = 23;
};
template <>
struct Bits<double> {
  using Integer = uint64_t;
  static constexpr int kMantissa = 52;
};

template <class T>
struct Single {
  using Scalar = T;
  static constexpr int kLanes = 1, kRegisters = 16;
  T v;

  static Single load(const T* p) { return {*p}; }
  static Single load_partial(const T*, int) { return {T(0)}; }
  void store(T* p) const { *p = v; }
  void store_partial(T*, int) const {}
  static Single broadcast(T a) { return {a}; }
  void keep() {}
  static Single zero() { return {T(0)}; }
  static Single one() { return {T(1)}; }
  friend Single operator+(Single a, Single b) { return {a.v + b.v}; }
  friend Single operator-(Single a, Single b) { return {a.v - b.v}; }
  friend Single operator*(Single a, Single b) { return {a.v * b.v}; }
  static Single fma(Single a, Single b, Single c) { return {a.v * b.v + c.v}; }
  // Both return b where a or b is NaN.
  static Single min(Single a, Single b) { return {a.v < b.v ? a.v : b.v}; }
  static Single max(Single a, Single b) { return {a.v > b.v ? a.v : b.v}; }
  static Single negated(Single x) { return {-x.v}; }
  // The low bits of what math.h rounded hold n plus the bias: moved into the exponent.
  static Single exp2(Single shifted) {
    typename Bits<T>::Integer bits;
    __builtin_memcpy(&bits, &shifted.v, sizeof(T));
    bits <<= Bits<T>::kMantissa;
    T scale;
    __builtin_memcpy(&scale, &bits, sizeof(T));
    return {scale};
  }
  static Single relu(Single x) { return max(zero(), x); }
  static Single where_positive(Single y, Single d) { return {y.v <= T(0) ? T(0) : d.v}; }
  static Single divide(Single n, Single d) { return {n.v / d.v}; }
  template <class W>
  static W sigmoid(W x) {
    return cpu::sigmoid(x);
  }
  template <class W>
  static W tanh(W x) {
    return cpu::tanh(x);
  }
  static constexpr int kColumns = 1;
  template <bool = false>
  static void columns(const T* from, int64_t, Single* column) {
    column->v = *from;
  }
};

}  // namespace

constinit const Kernels scalar_float = kernels<Single<float>>();
constinit const Kernels scalar_double = kernels<Single<double>>();

}  // namespace cpu
}  // namespace fastrnn
