// SPDX-License-Identifier: BSD-3-Clause
// The cells by name and what each has per unit, for code that handles all of them alike; the headers of cells/ have the
// same numbers as constants, and the tables of the sweeps hold the two together.
#pragma once
#include <stdint.h>

namespace fastrnn {

// own: one that another library brings, see cpu/own_cell.h.
enum class Cell : int { lstm, gru, rnn_tanh, rnn_relu, own };

// `static`: compiled once per instruction set, shared by none.
static constexpr int64_t gates_per_unit(Cell cell) { return cell == Cell::lstm ? 4 : cell == Cell::gru ? 3 : 1; }
static constexpr int64_t states_per_unit(Cell cell) { return cell == Cell::lstm ? 2 : 1; }
// Blocks that forward keeps for backward (RNN needs y alone), and gradients of gates that backward leaves.
static constexpr int64_t saved_per_unit(Cell cell) { return cell == Cell::lstm || cell == Cell::gru ? 4 : 0; }
static constexpr int64_t stored_per_unit(Cell cell) { return cell == Cell::lstm || cell == Cell::gru ? 4 : 1; }
// Likewise of whatever names its cell so, a LayerForward for one.
template <class Layer>
static constexpr int64_t gates_per_unit(const Layer& a) {
  return a.own ? a.own->gates : gates_per_unit(a.cell);
}
template <class Layer>
static constexpr int64_t states_per_unit(const Layer& a) {
  return a.own ? a.own->states : states_per_unit(a.cell);
}
template <class Layer>
static constexpr int64_t saved_per_unit(const Layer& a) {
  return a.own ? a.own->saved : saved_per_unit(a.cell);
}
template <class Layer>
static constexpr int64_t stored_per_unit(const Layer& a) {
  return a.own ? a.own->stored : stored_per_unit(a.cell);
}
// Units are padded to 16 in saved and scratch arrays, whatever the instruction set.
static constexpr int64_t padded(int64_t units) { return (units + 15) / 16 * 16; }

}  // namespace fastrnn
