// SPDX-License-Identifier: BSD-3-Clause
// Everything that is compiled once per lane class, gathered into the table that run.cpp calls. Included by isa/*.cpp.
// With FASTRNN_CELL and FASTRNN_CELL_HEADER the table of a library with a cell of its own, and of that cell alone.
#pragma once
#if defined(FASTRNN_CELL)
#include FASTRNN_CELL_HEADER
#else
#include "../cells/gru.h"
#include "../cells/lstm.h"
#include "../cells/rnn.h"
#endif
#include "activation.h"
#include "backward.h"
#include "forward.h"
#include "gradients.h"
#include "kernels.h"
#include "pack.h"

namespace fastrnn {
namespace cpu {

#if defined(FASTRNN_CELL)

template <class V>
constexpr Kernels kernels() {
  using C = FASTRNN_CELL;
  Kernels table{};
  constexpr int own = static_cast<int>(Cell::own);
  table.lanes = V::kLanes;
  table.forward[own] = forward<C, V>;
  table.backward[own] = backward<C, V>;
  table.gradients[own] = gradients<C, V>;
  table.pack[own] = pack_direction<C, V>;
  table.activation = activation<V>;
  return table;
}

#else

template <class C>
constexpr bool agrees(Cell cell) {
  return C::kGates == gates_per_unit(cell) && C::kStates == states_per_unit(cell) &&
         C::kSaved == saved_per_unit(cell) && C::kStored == stored_per_unit(cell);
}
static_assert(agrees<Lstm>(Cell::lstm) && agrees<Gru>(Cell::gru));
static_assert(agrees<Rnn<Tanh>>(Cell::rnn_tanh) && agrees<Rnn<Relu>>(Cell::rnn_relu));

// The cells, in the order of enum Cell. A new cell is one more line in each row.
template <class V>
constexpr Kernels kernels() {
  return {V::kLanes,
          {forward<Lstm, V>, forward<Gru, V>, forward<Rnn<Tanh>, V>, forward<Rnn<Relu>, V>, nullptr},
          {backward<Lstm, V>, backward<Gru, V>, backward<Rnn<Tanh>, V>, backward<Rnn<Relu>, V>, nullptr},
          {gradients<Lstm, V>, gradients<Gru, V>, gradients<Rnn<Tanh>, V>, gradients<Rnn<Relu>, V>, nullptr},
          {pack_direction<Lstm, V>, pack_direction<Gru, V>, pack_direction<Rnn<Tanh>, V>, pack_direction<Rnn<Relu>, V>,
           nullptr},
          activation<V>,
          0};
}

#endif

}  // namespace cpu
}  // namespace fastrnn
