// SPDX-License-Identifier: BSD-3-Clause
// Calls of a cell with its per-unit parameters, if it has any. Used by both sweeps.
#pragma once
#include "group.h"
#include "rows.h"

namespace fastrnn {
namespace cpu {

// all [kParameters*H], block after block -> those of the units of K pieces, zero past H; the units of the first piece
// begin at `first`, those of the next `step` further on.
template <class Cell, class V, int K>
FASTRNN_INLINE void load_parameters(const typename V::Scalar* all, int64_t H, int64_t first, int64_t step,
                                    Group<V, K>* to) {
  if constexpr (Cell::kParameters > 0) {
    unroll<K>([&](auto j) __attribute__((always_inline)) {
      const int64_t unit = first + j.value * step;
      const int lanes = H - unit < V::kLanes ? static_cast<int>(H - unit) : V::kLanes;
      unroll<Cell::kParameters>([&](auto k) __attribute__((always_inline)) {
        to[k.value].v[j.value] = load_lanes<V>(all + k.value * H + unit, lanes);
      });
    });
  } else {
    (void)all, (void)H, (void)first, (void)step, (void)to;
  }
}

template <class Cell, class W>
FASTRNN_INLINE void forward_cell(const W* x, const W* r, const W* prev, W* next, W* saved, const W* parameters) {
  if constexpr (Cell::kParameters > 0) {
    Cell::forward(x, r, prev, next, saved, parameters);
  } else {
    (void)parameters;
    Cell::forward(x, r, prev, next, saved);
  }
}

template <class Cell, class W>
FASTRNN_INLINE void backward_cell(const W* d_next, const W* saved, const W* prev, const W* next, W* d, W* d_prev,
                                  const W* parameters) {
  if constexpr (Cell::kParameters > 0) {
    Cell::backward(d_next, saved, prev, next, d, d_prev, parameters);
  } else {
    (void)parameters;
    Cell::backward(d_next, saved, prev, next, d, d_prev);
  }
}

}  // namespace cpu
}  // namespace fastrnn
