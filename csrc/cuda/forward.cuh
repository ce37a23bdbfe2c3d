// SPDX-License-Identifier: BSD-3-Clause
// The bodies of the forward kernels around the products, for W adjacent units [j, j+W) of sequence b of direction d.
// kernels.cu runs them as kernels, a thread each; the tests run the same bodies on the host. Every entry of an array is
// written by the one thread that owns its unit, so that nothing is atomic and no order is left to chance.
#pragma once
#include "lane.h"
#include "rows.cuh"

namespace fastrnn {
namespace cuda {

// The states before the first step. Sequences of no step end with the states they begin with.
template <class A>
struct BeginForward {
  FASTRNN_INLINE static void run(const Forward& a, int64_t d, int64_t b, int64_t j) {
    const Layer& l = a.layer;
    const Row row(l, d, b);
    const bool replaced = row.takes_part() && row.replaced_before(), empty = !row.reaches(0);
    A state[1];
    if (j < l.R) {
      const int64_t at = row.in_batch(l.R) + j;
      load(state, l.h0, at, l.element);
      if (empty) store(state, a.h_n, at, l.element);
      if (replaced) load_or_zero(state, l.reset_h, at, l.element);
      store(state, a.h, at);
      mask_h(state, row, j);
      store(state, a.operand, at, l.element);
    }
    if (l.c0 != nullptr && j < l.H) {
      const int64_t at = row.in_batch(l.H) + j;
      load(state, l.c0, at, l.element);
      if (empty) store(state, a.c_n, at, l.element);
      if (replaced) load_or_zero(state, l.reset_c, at, l.element);
      store(state, a.c, at);
    }
  }
};

// keep * before + (1 - keep) * made. Two products and a sum, none fused, as on the CPU.
template <class A, int W>
FASTRNN_INLINE void blend(A (&made)[W], const Row& row, const Spread& zoneout, int64_t width, int64_t j,
                          const A (&before)[W]) {
  A keep[W];
  load(keep, zoneout.data, row.in_spread(zoneout, width) + j, row.layer.element);
  for (int w = 0; w < W; ++w) made[w] = keep[w] * before[w] + (A(1) - keep[w]) * made[w];
}

// h as the cell or the projection has made it -> y, h_n, the next state and what W_hh multiplies.
template <class A, int W>
FASTRNN_INLINE void settle_h(const Forward& a, const Row& row, int64_t j, A (&h)[W]) {
  const Layer& l = a.layer;
  const int64_t at = row.in_batch(l.R) + j;
  if (l.zoneout_h.data != nullptr) {
    A before[W];
    load(before, a.h, at);
    blend(h, row, l.zoneout_h, l.R, j, before);
  }
  store(h, l.y, row.in_y(row.step.row, l.R) + j, l.element);
  if (!row.has_later()) store(h, a.h_n, at, l.element);
  if (row.replaced_after()) load_or_zero(h, l.reset_h, at, l.element);
  store(h, a.h, at);
  mask_h(h, row, j);
  store(h, a.operand, at, l.element);
}

template <class A, int W>
FASTRNN_INLINE void clear_y(const Row& row, int64_t j) {
  A zero[W];
  fill(zero, A(0));
  store(zero, row.layer.y, row.in_y(row.step.row, row.layer.R) + j, row.layer.element);
}

template <class Cell, class A, int W>
struct CellForward {
  FASTRNN_INLINE static void run(const Forward& a, int64_t d, int64_t b, int64_t j) {
    using V = Lane<A>;
    constexpr int G = Cell::kGates, S = Cell::kSaved;
    constexpr bool kHasC = Cell::kStates == 2;
    const Layer& l = a.layer;
    const Row row(l, d, b);
    if (!row.exists()) return;
    const bool projects = Cell::kProjects && a.projected != nullptr;
    const int64_t in_c = row.in_batch(l.H) + j, in_cells = row.in_rows(l.H) + j;
    if (!row.takes_part()) {  // padding
      if (!projects) clear_y<A, W>(row, j);
      if (kHasC && l.cells != nullptr) {
        A zero[W];
        fill(zero, A(0));
        store(zero, l.cells, in_cells);
      }
      return;
    }

    A x[G][W], r[G][W], h[W], c_before_step[W], c[W], saved[S + 1][W];
    for (int g = 0; g < G; ++g) {
      A bias[W];
      load(x[g], a.input[d], b * a.input_row + g * l.H + j);
      load(r[g], a.recurrent, (row.in_batch(G) + g) * l.H + j);
      if (a.b_ih[d] != nullptr) {
        load(bias, a.b_ih[d], g * l.H + j, l.element);
        for (int w = 0; w < W; ++w) x[g][w] = x[g][w] + bias[w];
      }
      if (a.b_hh[d] != nullptr) {
        load(bias, a.b_hh[d], g * l.H + j, l.element);
        for (int w = 0; w < W; ++w) r[g][w] = r[g][w] + bias[w];
      }
    }
    fill(h, A(0));
    if (!projects) load(h, a.h, in_c);  // R = H
    if (kHasC) load(c_before_step, a.c, in_c);

    for (int w = 0; w < W; ++w) {
      V x_w[G], r_w[G], prev[Cell::kStates], next[Cell::kStates], saved_w[S + 1];
      for (int g = 0; g < G; ++g) x_w[g] = {x[g][w]}, r_w[g] = {r[g][w]};
      prev[0] = {h[w]};
      if constexpr (kHasC) prev[1] = {c_before_step[w]};
      Cell::forward(x_w, r_w, prev, next, saved_w);
      h[w] = next[0].v;
      if constexpr (kHasC) c[w] = next[1].v;
      for (int s = 0; s < S; ++s) saved[s][w] = saved_w[s].v;
    }

    if (S != 0 && l.gates != nullptr) {
      const int64_t at = row.in_rows(l.gates_row) + j;
      for (int s = 0; s < S; ++s) store(saved[s], l.gates, at + s * l.H);
    }
    if constexpr (kHasC) {
      if (l.zoneout_c.data != nullptr) blend(c, row, l.zoneout_c, l.H, j, c_before_step);
      if (l.cells != nullptr) store(c, l.cells, in_cells);
      if (!row.has_later()) store(c, a.c_n, in_c, l.element);
      if (row.replaced_after()) load_or_zero(c, l.reset_c, in_c, l.element);
      store(c, a.c, in_c);
    }
    if (projects) {
      store(h, a.unprojected, in_c, l.element);
    } else {
      settle_h(a, row, j, h);
    }
  }
};

// Behind the product with W_hr.
template <class A, int W>
struct ProjectForward {
  FASTRNN_INLINE static void run(const Forward& a, int64_t d, int64_t b, int64_t j) {
    const Row row(a.layer, d, b);
    if (!row.exists()) return;
    if (!row.takes_part()) return clear_y<A, W>(row, j);
    A h[W];
    load(h, a.projected, row.in_batch(a.layer.R) + j);
    settle_h(a, row, j, h);
  }
};

}  // namespace cuda
}  // namespace fastrnn
