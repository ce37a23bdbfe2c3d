// SPDX-License-Identifier: BSD-3-Clause
// The bodies of the backward kernels around the products, as those of forward.cuh, and the sums for the biases.
#pragma once
#include "lane.h"
#include "rows.cuh"

namespace fastrnn {
namespace cuda {

template <class A>
struct BeginBackward {
  FASTRNN_INLINE static void run(const Backward& a, int64_t d, int64_t b, int64_t j) {
    const Layer& l = a.layer;
    const Row row(l, d, b);
    A gradient[1];
    if (j < l.R) {
      const int64_t at = row.in_batch(l.R) + j;
      load_or_zero(gradient, a.d_h_n, at, l.element);
      store(gradient, a.d_h, at);
      gradient[0] = A(0);
      store(gradient, a.through, at);
    }
    if (l.c0 != nullptr && j < l.H) {
      const int64_t at = row.in_batch(l.H) + j;
      load_or_zero(gradient, a.d_c_n, at, l.element);
      store(gradient, a.d_c, at);
    }
  }
};

// All that has come to the state after this row's step: through W_hh and past it.
template <class A, int W>
FASTRNN_INLINE void arriving(A (&d_h)[W], const Backward& a, const Row& row, int64_t j) {
  const int64_t at = row.in_batch(row.layer.R) + j;
  A through[W];
  load(through, a.through, at);
  mask_h(through, row, j);
  load(d_h, a.d_h, at);
  for (int w = 0; w < W; ++w) d_h[w] = d_h[w] + through[w];
}

// What has come to a state that was replaced belongs to the one that replaced it.
template <class A, int W>
FASTRNN_INLINE void hand_over(A (&gradient)[W], void* d_reset, int64_t at) {
  if (d_reset != nullptr) {
    A sum[W];
    load(sum, d_reset, at);
    for (int w = 0; w < W; ++w) sum[w] = sum[w] + gradient[w];
    store(sum, d_reset, at);
  }
  fill(gradient, A(0));
}

// Rows of zeros where nothing was computed, for the products over all N rows.
template <class A, int W>
FASTRNN_INLINE void clear(void* data, int64_t index, Element element) {
  A zero[W];
  fill(zero, A(0));
  store(zero, data, index, element);
}

// dL/dh of what the cell or the projection has made; leaves in d_h what goes past it, and keeps what W_hh multiplied.
// False: the row does not take part, and what has come stays in d_h.
template <class A, int W>
FASTRNN_INLINE bool arrive(A (&made)[W], const Backward& a, const Row& row, int64_t j) {
  const Layer& l = row.layer;
  const int64_t at = row.in_batch(l.R) + j, in_rows = row.in_rows(l.R) + j;
  arriving(made, a, row, j);
  if (!row.takes_part()) {
    store(made, a.d_h, at);
    clear<A, W>(a.entered, in_rows, l.element);
    return false;
  }
  if (row.replaced_after()) hand_over(made, a.d_reset_h, at);
  if (a.d_y != nullptr) {
    A d_y[W];
    load(d_y, a.d_y, row.in_y(row.step.row, l.R) + j, l.element);
    for (int w = 0; w < W; ++w) made[w] = made[w] + d_y[w];
  }
  A past[W];
  fill(past, A(0));
  if (l.zoneout_h.data != nullptr) {
    A keep[W];
    load(keep, l.zoneout_h.data, row.in_spread(l.zoneout_h, l.R) + j, l.element);
    for (int w = 0; w < W; ++w) past[w] = keep[w] * made[w], made[w] = (A(1) - keep[w]) * made[w];
  }
  store(past, a.d_h, at);
  A entered[W];
  h_before(entered, row, j);
  mask_h(entered, row, j);
  store(entered, a.entered, in_rows, l.element);
  return true;
}

// With a projection, before the product with W_hr.
template <class A, int W>
struct ProjectBackward {
  FASTRNN_INLINE static void run(const Backward& a, int64_t d, int64_t b, int64_t j) {
    const Row row(a.layer, d, b);
    if (!row.exists()) return;
    A d_h[W];
    if (!arrive(d_h, a, row, j)) fill(d_h, A(0));
    store(d_h, a.d_projected, row.in_rows(a.layer.R) + j, a.layer.element);
  }
};

template <class Cell, class A, int W>
struct CellBackward {
  FASTRNN_INLINE static void run(const Backward& a, int64_t d, int64_t b, int64_t j) {
    using V = Lane<A>;
    constexpr int S = Cell::kSaved, kStored = Cell::kStored;
    constexpr bool kHasC = Cell::kStates == 2, kReadsH = !kHasC;  // prev[0] and next[0]
    const Layer& l = a.layer;
    const Row row(l, d, b);
    if (!row.exists()) return;
    const bool projects = Cell::kProjects && a.d_unprojected != nullptr;
    const int64_t in_c = row.in_batch(l.H) + j;
    const int64_t in_d_gates = row.in_rows(kStored * l.H) + j;
    A d_h[W];
    if (projects ? !row.takes_part() : !arrive(d_h, a, row, j)) {
      for (int s = 0; s < kStored; ++s) clear<A, W>(a.d_gates, in_d_gates + s * l.H, l.element);
      if (projects) clear<A, W>(a.unprojected, row.in_rows(l.H) + j, l.element);
      return;
    }
    if (projects) load(d_h, a.d_unprojected, in_c);

    A d_c[W], c_past[W], before[W], after[W], saved[S + 1][W], d_gates[kStored][W];
    for (int s = 0; s < S; ++s) load(saved[s], l.gates, row.in_rows(l.gates_row) + s * l.H + j);
    bool again = false;  // c as the cell had made it, before the blend
    if constexpr (kHasC) {
      load(d_c, a.d_c, in_c);
      if (row.replaced_after()) hand_over(d_c, a.d_reset_c, in_c);
      if (a.d_cells != nullptr) {
        A of_cells[W];
        load(of_cells, a.d_cells, row.in_rows(l.H) + j);
        for (int w = 0; w < W; ++w) d_c[w] = d_c[w] + of_cells[w];
      }
      fill(c_past, A(0));
      again = l.zoneout_c.data != nullptr;
      if (again) {
        A keep[W];
        load(keep, l.zoneout_c.data, row.in_spread(l.zoneout_c, l.H) + j, l.element);
        for (int w = 0; w < W; ++w) c_past[w] = keep[w] * d_c[w], d_c[w] = (A(1) - keep[w]) * d_c[w];
      }
      c_before(before, row, j);
      load(after, l.cells, row.in_rows(l.H) + j);
    } else {
      h_before(before, row, j);
      load(after, l.y, row.in_y(row.step.row, l.R) + j, l.element);
      if (S == 0 && l.zoneout_h.data != nullptr) {  // undo the blend; where all of it stayed, the gradient is 0 anyway
        A keep[W];
        load(keep, l.zoneout_h.data, row.in_spread(l.zoneout_h, l.R) + j, l.element);
        for (int w = 0; w < W; ++w) {
          const A made = A(1) - keep[w];
          after[w] = (after[w] - keep[w] * before[w]) / (made > A(1e-30) ? made : A(1e-30));
        }
      }
    }

    A full[W], past[W];
    for (int w = 0; w < W; ++w) {
      V saved_w[S + 1], prev[Cell::kStates], next[Cell::kStates], d_next[Cell::kStates], d_w[kStored];
      V d_prev[Cell::kStates];
      for (int s = 0; s < S; ++s) saved_w[s] = {saved[s][w]};
      prev[0] = {kReadsH ? before[w] : A(0)};
      next[0] = {kReadsH ? after[w] : A(0)};
      d_next[0] = {d_h[w]};
      if constexpr (kHasC) {
        prev[1] = {before[w]};
        next[1] = {after[w]};
        d_next[1] = {d_c[w]};
        if (again) Cell::candidate(saved_w, prev, next);
        full[w] = Cell::unprojected(saved_w, next).v;
      }
      Cell::backward(d_next, saved_w, prev, next, d_w, d_prev);
      for (int s = 0; s < kStored; ++s) d_gates[s][w] = d_w[s].v;
      past[w] = d_prev[0].v;
      if constexpr (kHasC) d_c[w] = d_prev[1].v + c_past[w];
    }

    for (int s = 0; s < kStored; ++s) store(d_gates[s], a.d_gates, in_d_gates + s * l.H, l.element);
    if constexpr (kHasC) {
      store(d_c, a.d_c, in_c);
      if (projects) store(full, a.unprojected, row.in_rows(l.H) + j, l.element);
    } else {  // h reaches past W_hh (GRU), beside what zoneout keeps
      A d_past[W];
      load(d_past, a.d_h, in_c);
      for (int w = 0; w < W; ++w) d_past[w] = d_past[w] + past[w];
      store(d_past, a.d_h, in_c);
    }
  }
};

// What has come to the initial states; layer.step is the first step of each sweep.
template <class A>
struct EndBackward {
  FASTRNN_INLINE static void run(const Backward& a, int64_t d, int64_t b, int64_t j) {
    const Layer& l = a.layer;
    const Row row(l, d, b);
    const bool replaced = d == 0 && row.takes_part() && row.replaced_before();
    A gradient[1];
    if (j < l.R) {
      const int64_t at = row.in_batch(l.R) + j;
      arriving(gradient, a, row, j);
      if (replaced) hand_over(gradient, a.d_reset_h, at);
      if (a.d_h0 != nullptr) store(gradient, a.d_h0, at);
    }
    if (l.c0 != nullptr && j < l.H) {
      const int64_t at = row.in_batch(l.H) + j;
      load(gradient, a.d_c, at);
      if (replaced) hand_over(gradient, a.d_reset_c, at);
      if (a.d_c0 != nullptr) store(gradient, a.d_c0, at);
    }
  }
};

// ---- gradients of the biases ---------------------------------------------------------------------------------------

// b: the part of kSumRows rows; j: the column of d_gates.
template <class A>
struct SumRows {
  FASTRNN_INLINE static void run(const Sums& a, int64_t d, int64_t b, int64_t j) {
    const int64_t width = a.stored * a.H, parts = (a.N + kSumRows - 1) / kSumRows;
    const int64_t end = (b + 1) * kSumRows < a.N ? (b + 1) * kSumRows : a.N;
    A sum[1] = {A(0)}, entry[1];
    for (int64_t n = b * kSumRows; n < end; ++n) {
      load(entry, a.d_gates, (d * a.N + n) * width + j, a.element);
      sum[0] = sum[0] + entry[0];
    }
    store(sum, a.partial, (d * parts + b) * width + j);
  }
};

template <class A>
struct SumParts {
  FASTRNN_INLINE static void run(const Sums& a, int64_t d, int64_t, int64_t j) {
    const int64_t width = a.stored * a.H, parts = (a.N + kSumRows - 1) / kSumRows, s = j / a.H, unit = j % a.H;
    A sum[1] = {A(0)}, entry[1];
    for (int64_t part = 0; part < parts; ++part) {
      load(entry, a.partial, (d * parts + part) * width + j);
      sum[0] = sum[0] + entry[0];
    }
    const int64_t input = s - a.input_first, recurrent = s - a.recurrent_first;
    if (a.d_b_ih[d] != nullptr && input >= 0 && input < a.G) {
      store(sum, a.d_b_ih[d], a.input_gate[input] * a.H + unit, a.element);
    }
    if (a.d_b_hh[d] != nullptr && recurrent >= 0 && recurrent < a.G) {
      store(sum, a.d_b_hh[d], a.recurrent_gate[recurrent] * a.H + unit, a.element);
    }
  }
};

}  // namespace cuda
}  // namespace fastrnn
