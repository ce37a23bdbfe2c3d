// SPDX-License-Identifier: BSD-3-Clause
// The elements of x, y and the weights, as the sweeps load and store them: those of the lane class itself; or bfloat16
// which the products work on, beside states, gates and a cell in float; or of 16 bits, which become floats where they
// are read (Given).
#pragma once
#include <stdint.h>

#include "rows.h"

namespace fastrnn {
namespace cpu {

struct Bfloat16 {
  uint16_t bits;  // the upper half of a float
  inline __attribute__((always_inline)) operator float() const {
    return __builtin_bit_cast(float, static_cast<uint32_t>(bits) << 16);
  }
};

struct Float16 {
  uint16_t bits;
};

// An array of Element, or of elements of 16 bits that `conversion` makes floats.
template <class Element>
struct Given {
  const void* data;
  const Conversion* conversion;
  inline __attribute__((always_inline)) const void* at(int64_t j) const {
    if (conversion) return static_cast<const uint16_t*>(data) + j;
    return static_cast<const Element*>(data) + j;
  }
};

// One of two types.
template <bool first, class A, class B>
struct Chosen {
  using Type = A;
};
template <class A, class B>
struct Chosen<false, A, B> {
  using Type = B;
};

// Elements of the lane class's own type.
template <class V>
struct SameElements {
  using Element = typename V::Scalar;
  static constexpr bool kRounds = false;
  static inline __attribute__((always_inline)) V load(const Element* from, int lanes) {
    return load_lanes<V>(from, lanes);
  }
  static inline __attribute__((always_inline)) void store(V v, Element* to, int lanes) { store_lanes(v, to, lanes); }
};

}  // namespace cpu
}  // namespace fastrnn
