// SPDX-License-Identifier: BSD-3-Clause
// The table of the kernels with products in bfloat16, as table.h those in float and double. Included by isa/*.cpp.
#pragma once
#include "../cells/gru.h"
#include "../cells/lstm.h"
#include "../cells/rnn.h"
#include "activation.h"
#include "backward_blocks.h"
#include "forward_blocks.h"
#include "gradients_blocks.h"
#include "kernels.h"

namespace fastrnn {
namespace cpu {

// The cells, in the order of enum Cell.
template <class V, class Blocks>
constexpr Kernels block_kernels() {
  return {V::kLanes,
          {forward_blocks<Lstm, V, Blocks>, forward_blocks<Gru, V, Blocks>, forward_blocks<Rnn<Tanh>, V, Blocks>,
           forward_blocks<Rnn<Relu>, V, Blocks>},
          {backward_blocks<Lstm, V, Blocks>, backward_blocks<Gru, V, Blocks>, backward_blocks<Rnn<Tanh>, V, Blocks>,
           backward_blocks<Rnn<Relu>, V, Blocks>},
          {gradient_blocks<Lstm, V, Blocks>, gradient_blocks<Gru, V, Blocks>, gradient_blocks<Rnn<Tanh>, V, Blocks>,
           gradient_blocks<Rnn<Relu>, V, Blocks>},
          {pack_direction_blocks<Lstm, V, Blocks>, pack_direction_blocks<Gru, V, Blocks>,
           pack_direction_blocks<Rnn<Tanh>, V, Blocks>, pack_direction_blocks<Rnn<Relu>, V, Blocks>},
          activation<V>,
          Blocks::kEqualRows};
}

}  // namespace cpu
}  // namespace fastrnn
