// SPDX-License-Identifier: BSD-3-Clause
// Rows of a step that lie at one stride, which is most calls: the cell forward as a loop that asks nothing, and the
// step from row to row of its derivative. Included by forward_steps.h and backward_steps.h, which have the other rows.
#pragma once
#include "parameters.h"

namespace fastrnn {
namespace cpu {

// Where the cell of one step reads and writes: what is the same for all rows and units. A copy on the stack of
// activate_rows, whose readers are inlined: after every store a compiler reads members of *this again.
template <class Scalar, class Element>
struct ForwardPlaces {
  Scalar* r;                   // sums of the first row and unit; no longer needed once the row's cell has read them
  const Scalar *x, *h_before;  // x: of the first row of the step, as x_gates() (not with kSummed)
  Scalar *h_after, *c, *cells, *gates;
  Element *y, *operand;  // y: null where it is made of h after the step
  int which;
  int64_t t, first, unit, r_row;                  // of r: the first row and unit, and the size of a row
  int64_t H, h_row, c_row, x_row, x_unit, y_row;  // x_unit: the first of x
  int64_t index, index_stride;                    // row of y, gates and cells of the row `first`
  bool ordered, whole, projected;
};

// Whether activate_line() can take the units from `unit` on: they fill a vector, and all or nothing is saved.
template <class Cell, class V, class Places>
FASTRNN_INLINE bool is_line(const Places& places, int64_t unit, bool saves) {
  constexpr int L = V::kLanes;
  if (places.ordered || places.projected || !places.y || places.H - unit < L) return false;
  if (!saves) return true;
  if (L < 16 && places.H - unit <= L && places.H < places.c_row) return false;  // leaves the rest of a block of gates
  return (Cell::kSaved == 0 || places.gates) && (Cell::kStates == 1 || places.cells);
}

// Of a cell whose h is made of c and one gate, when nothing is saved: all c first, then all h. Both loops are short
// enough for a core to have several rows under way. The output gate waits in the place of the first gate's sums. One
// thread of Zen 5: cycles of a vector 55 -> 47, forward of LSTM, H = 64, 100, 128, 256 1.03, 1.02, 1.01, 1.01 times as
// fast; where gates are saved, equal.
template <class Cell, class V>
FASTRNN_INLINE void activate_line_in_two(const ForwardPlaces<typename V::Scalar, typename V::Scalar>& places,
                                         int64_t unit, int m) {
  using Scalar = typename V::Scalar;
  constexpr int L = V::kLanes, G = Cell::kGates;
  Scalar* const sums = places.r + (unit - places.unit) * G;
  Scalar* const states = places.c + places.first * places.c_row + unit;
  const Scalar* const inputs = places.x + places.first * places.x_row + (unit - places.x_unit) * G;
  for (int j = 0; j < m; ++j) {
    V xs[G], rs[G], prev[Cell::kStates], next[Cell::kStates], saved[Cell::kSaved];
    Scalar *const r = sums + j * places.r_row, *const c = states + j * places.c_row;
    const Scalar* const x = inputs + j * places.x_row;
    unroll<G>([&](auto g) __attribute__((always_inline)) {
      xs[g.value] = V::load(x + g.value * L);
      rs[g.value] = V::load(r + g.value * L);
    });
    prev[0] = V::zero();
    prev[1] = V::load(c);
    Cell::update(xs, rs, prev, next, saved);
    next[1].store(c);
    saved[Cell::kOutput].store(r);
  }
  Scalar* const h = places.h_after + places.first * places.h_row + unit;
  Scalar* const y = places.y + places.index * places.y_row + unit;
  for (int j = 0; j < m; ++j) {
    V next[Cell::kStates], saved[Cell::kSaved];
    saved[Cell::kOutput] = V::load(sums + j * places.r_row);
    next[1] = V::load(states + j * places.c_row);
    const V made = Cell::unprojected(saved, next);
    made.store(h + j * places.h_row);
    made.store(y + j * places.index_stride * places.y_row);
  }
}

// The math of a cell without parameters for m rows and a vector of units; one row at a time, since more in turn are no
// faster.
template <class Cell, class V, bool kSaves>
FASTRNN_INLINE void activate_line(const ForwardPlaces<typename V::Scalar, typename V::Scalar>& places, int64_t unit,
                                  int m) {
  using Scalar = typename V::Scalar;
  constexpr int L = V::kLanes, G = Cell::kGates;
  constexpr bool kStates2 = Cell::kStates == 2, kSavesGates = kSaves && Cell::kSaved > 0;
  if constexpr (Cell::kProjects && !kSaves) {
    if (core.cell_in_two) return activate_line_in_two<Cell, V>(places, unit, m);
  }
  const Scalar* r = places.r + (unit - places.unit) * G;
  const Scalar* x = places.x + places.first * places.x_row + (unit - places.x_unit) * G;
  const Scalar* h_before = places.h_before + places.first * places.h_row + unit;
  Scalar* h_after = places.h_after + places.first * places.h_row + unit;
  Scalar* y = places.y + places.index * places.y_row + unit;
  Scalar *c = nullptr, *cells = nullptr, *gates = nullptr;
  if constexpr (kStates2) c = places.c + places.first * places.c_row + unit;
  if constexpr (kStates2 && kSaves) cells = places.cells + places.index * places.H + unit;
  if constexpr (kSavesGates) gates = places.gates + saved_offset<Cell>(places.index, places.c_row, unit);
  const int64_t y_step = places.index_stride * places.y_row, cells_step = places.index_stride * places.H;
  const int64_t gates_step = places.index_stride * places.c_row * Cell::kSaved;
  for (int left = m;;) {
    V xs[G], rs[G], prev[Cell::kStates], next[Cell::kStates], saved[Cell::kSaved + 1];
    unroll<G>([&](auto g) __attribute__((always_inline)) {
      xs[g.value] = V::load(x + g.value * L);
      rs[g.value] = V::load(r + g.value * L);
    });
    if constexpr (kStates2) {
      prev[0] = V::zero();
      prev[1] = V::load(c);
    } else {
      prev[0] = V::load(h_before);
    }
    forward_cell<Cell, V>(xs, rs, prev, next, saved, nullptr);
    next[0].store(h_after);
    next[0].store(y);
    if constexpr (kStates2) {
      next[1].store(c);
      if constexpr (kSaves) next[1].store(cells);
    }
    if constexpr (kSavesGates) {
      unroll<Cell::kSaved>([&](auto k) __attribute__((always_inline)) { saved[k.value].store(gates + k.value * 16); });
    }
    if (--left == 0) return;
    r += places.r_row, x += places.x_row, h_before += places.h_row, h_after += places.h_row, y += y_step;
    if constexpr (kStates2) c += places.c_row;
    if constexpr (kStates2 && kSaves) cells += cells_step;
    if constexpr (kSavesGates) gates += gates_step;
  }
}

// Elements from one row to the next of what BackwardRow names.
struct RowSteps {
  int64_t gates, cells, before, y, d_state, d_c, d_gates;
};

// One row at one step: where its units begin in all that the derivative of a cell reads and writes.
template <class Scalar, class Element, class Before>
struct BackwardRow {
  int64_t row, t;  // row of the states; time
  // Null where the cell or the call has none.
  const Scalar *gates, *cells, *d_cells;
  const Before* before;  // c (or h) before the step
  const Element *y, *d_y;
  Scalar *d_state, *d_c;  // d_state: not with a projection, whose d_h comes whole through W_hr
  Element *d_gates, *cell_h;

  FASTRNN_INLINE void next(const RowSteps& steps) {
    ++row;
    if (gates) gates += steps.gates;
    if (cells) cells += steps.cells;
    if (d_cells) d_cells += steps.cells;
    before += steps.before;
    if (y) y += steps.y;
    if (d_y) d_y += steps.y;
    if (d_state) d_state += steps.d_state;
    if (d_c) d_c += steps.d_c;
    d_gates += steps.d_gates;
    if (cell_h) cell_h += steps.cells;
  }

  // Asks for what units [first, first + units) of the next row are read from; its c or h of this step was the `before`
  // of the step after.
  template <class Cell>
  FASTRNN_INLINE void fetch_next(const RowSteps& steps, int64_t first, int64_t units) const {
    const int64_t block = first / 16 * 16, end = (first + units + 15) / 16 * 16;
    if (Cell::kSaved > 0) fetch(gates + steps.gates + block * Cell::kSaved, (end - block) * Cell::kSaved);
    fetch(before + steps.before + first, units);
    if (d_y) fetch(d_y + steps.y + first, units);
  }
};

}  // namespace cpu
}  // namespace fastrnn
