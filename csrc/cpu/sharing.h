// SPDX-License-Identifier: BSD-3-Clause
// What members of a team ask for ahead of a step: lines that another core may hold. Used by both sweeps.
#pragma once
#include "matmul.h"
#include "rows.h"

namespace fastrnn {
namespace cpu {

// Lines that are about to be written, 4 KB of them at most.
template <class Scalar>
inline __attribute__((always_inline)) void fetch_to_write(Scalar* p, int64_t n) {
  constexpr int64_t kSize = sizeof(Scalar), kMost = 4096 / kSize;
  for (int64_t j = 0; j < n && j < kMost; j += 64 / kSize) __builtin_prefetch(p + j, 1, 3);
}

// Where members share units: what the others made of `rows` rows of n elements, all but [first, end), all at once. A
// product would wait for one line of another core after the other.
template <class Element>
inline __attribute__((always_inline)) void fetch_others(const Element* p, int64_t rows, int64_t row_size, int64_t n,
                                                        int64_t first, int64_t end) {
  for (int64_t row = 0; row < rows; ++row, p += row_size) {
    fetch(p, first);
    fetch(p + end, n - end);
  }
}

// Where members share rows: the first lines of what the cell is about to store for n rows, of which the first is row
// `first` of y, cells and gates. A processor that fetches ahead of what one member stores takes them from another.
template <class Cell, class Scalar, class Element>
inline __attribute__((always_inline)) void fetch_results(const LayerForward& layer, const DirectionForward& direction,
                                                         int64_t first, int64_t n, int64_t column, int64_t y_row,
                                                         int64_t row_units) {
  if (!layer.conversion) fetch_to_write(static_cast<Element*>(layer.y) + first * y_row + column, n * y_row);
  if (direction.cells) fetch_to_write(static_cast<Scalar*>(direction.cells) + first * layer.H, n * layer.H);
  if (Cell::kSaved > 0 && direction.gates) {
    Scalar* const gates = static_cast<Scalar*>(direction.gates);
    fetch_to_write(gates + saved_offset<Cell>(first, row_units, 0), n * row_units * Cell::kSaved);
  }
}

}  // namespace cpu
}  // namespace fastrnn
