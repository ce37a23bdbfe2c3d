// SPDX-License-Identifier: BSD-3-Clause
// K vectors that take the same operations side by side, itself a lane class. The math of a cell is one long chain of
// dependent operations; two chains at once keep the multiply-add units busy. Used by the sweeps around a cell.
#pragma once
#include "../cells/cell.h"
#include "math.h"
#include "matmul.h"

namespace fastrnn {
namespace cpu {

template <class V, int K>
struct Group {
  using Scalar = typename V::Scalar;
  V v[K];

  template <class F>
  FASTRNN_INLINE static Group each(const F& f) {
    Group made;
    unroll<K>([&](auto j) __attribute__((always_inline)) { made.v[j.value] = f(j.value); });
    return made;
  }
  FASTRNN_INLINE static Group broadcast(Scalar a) {
    const V all = V::broadcast(a);
    return each([&](int) __attribute__((always_inline)) { return all; });
  }
  FASTRNN_INLINE static Group zero() { return broadcast(Scalar(0)); }
  FASTRNN_INLINE static Group one() { return broadcast(Scalar(1)); }
  FASTRNN_INLINE friend Group operator+(Group a, Group b) {
    return each([&](int j) __attribute__((always_inline)) { return a.v[j] + b.v[j]; });
  }
  FASTRNN_INLINE friend Group operator-(Group a, Group b) {
    return each([&](int j) __attribute__((always_inline)) { return a.v[j] - b.v[j]; });
  }
  FASTRNN_INLINE friend Group operator*(Group a, Group b) {
    return each([&](int j) __attribute__((always_inline)) { return a.v[j] * b.v[j]; });
  }
  FASTRNN_INLINE static Group fma(Group a, Group b, Group c) {
    return each([&](int j) __attribute__((always_inline)) { return V::fma(a.v[j], b.v[j], c.v[j]); });
  }
  FASTRNN_INLINE static Group min(Group a, Group b) {
    return each([&](int j) __attribute__((always_inline)) { return V::min(a.v[j], b.v[j]); });
  }
  FASTRNN_INLINE static Group max(Group a, Group b) {
    return each([&](int j) __attribute__((always_inline)) { return V::max(a.v[j], b.v[j]); });
  }
  FASTRNN_INLINE static Group divide(Group a, Group b) {
    return each([&](int j) __attribute__((always_inline)) { return V::divide(a.v[j], b.v[j]); });
  }
  FASTRNN_INLINE static Group negated(Group x) {
    return each([&](int j) __attribute__((always_inline)) { return V::negated(x.v[j]); });
  }
  FASTRNN_INLINE static Group exp2(Group shifted) {
    return each([&](int j) __attribute__((always_inline)) { return V::exp2(shifted.v[j]); });
  }
  FASTRNN_INLINE static Group relu(Group x) {
    return each([&](int j) __attribute__((always_inline)) { return V::relu(x.v[j]); });
  }
  FASTRNN_INLINE static Group where_positive(Group y, Group d) {
    return each([&](int j) __attribute__((always_inline)) { return V::where_positive(y.v[j], d.v[j]); });
  }
  FASTRNN_INLINE static Group fraction(Group x) {
    return each([&](int j) __attribute__((always_inline)) { return V::fraction(x.v[j]); });
  }
  FASTRNN_INLINE static Group scale(Group p, Group x) {
    return each([&](int j) __attribute__((always_inline)) { return V::scale(p.v[j], x.v[j]); });
  }
  FASTRNN_INLINE static Group near_reciprocal(Group d) {
    return each([&](int j) __attribute__((always_inline)) { return V::near_reciprocal(d.v[j]); });
  }
  FASTRNN_INLINE static Group sigmoid(Group x) { return V::sigmoid(x); }
  FASTRNN_INLINE static Group tanh(Group x) { return V::tanh(x); }
};

}  // namespace cpu
}  // namespace fastrnn
