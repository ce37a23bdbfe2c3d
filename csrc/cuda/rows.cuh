// SPDX-License-Identifier: BSD-3-Clause
// What the bodies of forward.cuh and backward.cuh know of the row that a thread works on: whether it takes part in the
// step, whether its state is replaced, and what its state was before.
#pragma once
#include "steps.h"

namespace fastrnn {
namespace cuda {

// The one row of one direction that a thread works on.
struct Row {
  const Layer& layer;
  const Step& step;
  int64_t d, b;

  FASTRNN_INLINE Row(const Layer& of, int64_t direction, int64_t sequence)
      : layer(of), step(of.step[direction]), d(direction), b(sequence) {}

  FASTRNN_INLINE int64_t length() const {
    const int64_t given = layer.lengths[b];
    return given < 0 ? 0 : given > layer.T ? layer.T : given;
  }
  FASTRNN_INLINE bool reaches(int64_t t) const { return layer.lengths == nullptr || t < length(); }
  FASTRNN_INLINE bool exists() const { return b < step.rows; }
  FASTRNN_INLINE bool takes_part() const { return exists() && reaches(step.t); }
  FASTRNN_INLINE bool has_earlier() const { return b < step.earlier_rows && reaches(step.earlier_t); }
  FASTRNN_INLINE bool has_later() const { return b < step.later_rows && reaches(step.later_t); }

  // reset[t] stands between steps t-1 and t, whichever way the sweep crosses it; reset[0] replaces the initial state of
  // direction 0 alone.
  FASTRNN_INLINE bool flagged(int64_t t) const { return layer.reset[t * layer.B + b] != 0; }
  FASTRNN_INLINE bool replaced_before() const {
    if (layer.reset == nullptr) return false;
    return d == 0 ? flagged(step.t) : has_earlier() && flagged(step.earlier_t);
  }
  FASTRNN_INLINE bool replaced_after() const {
    return layer.reset != nullptr && has_later() && flagged(d == 0 ? step.later_t : step.t);
  }

  // Of the first unit of this row in arrays [D, B, width], [D, N, width] and [N, D*width].
  FASTRNN_INLINE int64_t in_batch(int64_t width) const { return (d * layer.B + b) * width; }
  FASTRNN_INLINE int64_t in_rows(int64_t width) const { return (d * layer.N + step.row + b) * width; }
  FASTRNN_INLINE int64_t in_y(int64_t row, int64_t width) const { return ((row + b) * layer.D + d) * width; }
  FASTRNN_INLINE int64_t in_spread(const Spread& spread, int64_t width) const {
    const int64_t row =
        layer.packed ? (step.row + b) * spread.stride_b : step.t * spread.stride_t + b * spread.stride_b;
    return row + d * width;
  }
};

// An array that may be missing stands for zeros.
template <class A, int W>
FASTRNN_INLINE void load_or_zero(A (&to)[W], const void* data, int64_t index, Element element) {
  if (data == nullptr) {
    fill(to, A(0));
  } else {
    load(to, data, index, element);
  }
}

// to *= mask, where there is one.
template <class A, int W>
FASTRNN_INLINE void mask_h(A (&to)[W], const Row& row, int64_t j) {
  if (row.layer.h_mask == nullptr) return;
  A mask[W];
  load(mask, row.layer.h_mask, row.in_batch(row.layer.R) + j, row.layer.element);
  for (int w = 0; w < W; ++w) to[w] = to[w] * mask[w];
}

// The state before the step, as the backward pass finds it again: h from y, c from cells.
template <class A, int W>
FASTRNN_INLINE void h_before(A (&to)[W], const Row& row, int64_t j) {
  const Layer& l = row.layer;
  if (row.replaced_before()) {
    load_or_zero(to, l.reset_h, row.in_batch(l.R) + j, l.element);
  } else if (row.has_earlier()) {
    load(to, l.y, row.in_y(row.step.earlier_row, l.R) + j, l.element);
  } else {
    load(to, l.h0, row.in_batch(l.R) + j, l.element);
  }
}
template <class A, int W>
FASTRNN_INLINE void c_before(A (&to)[W], const Row& row, int64_t j) {
  const Layer& l = row.layer;
  if (row.replaced_before()) {
    load_or_zero(to, l.reset_c, row.in_batch(l.H) + j, l.element);
  } else if (row.has_earlier()) {
    load(to, l.cells, (row.d * l.N + row.step.earlier_row + row.b) * l.H + j);
  } else {
    load(to, l.c0, row.in_batch(l.H) + j, l.element);
  }
}

}  // namespace cuda
}  // namespace fastrnn
