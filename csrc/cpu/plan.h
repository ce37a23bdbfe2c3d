// SPDX-License-Identifier: BSD-3-Clause
// The choices of plan.cpp, of sizes and of what meeting.cpp measures. Used by run.cpp.
#pragma once
#include "kernels.h"

namespace fastrnn {
namespace cpu {

constexpr int kMostThreads = 256;

static inline int64_t width_of_h(const LayerForward& layer) { return layer.P ? layer.P : layer.H; }

// The kernels of the instruction set chosen now.
const Kernels& kernels_for(const LayerForward& layer);

// Whether so many threads can run at once here and now.
bool can_share(int threads);

// How at most `threads` threads share a layer, by estimates of what each way takes; its products are multiply-adds.
Plan choose(const LayerForward& layer, const Kernels& kernels, int threads, bool backward);

// meeting.cpp: what a round of waiting takes, in ns, as last measured; and whether it has not been for a while and many
// calls.
double round_time();
bool is_round_time_due();
// Rounds in which so many members meet (barrier.cpp).
static inline int rounds_of(int members) {
  int rounds = 0;
  while (1 << rounds < members) ++rounds;
  return rounds;
}

// One thread; with the products of another plan.
Plan serial_plan(const Kernels& kernels);
Plan serial_plan(const Plan& plan);

// The products in parts (parts.h) of W_ih x, of d_x, and of the gradients of weights, whose bits are those of one batch
// anyway; null: multiply-adds.
const PartProducts* input_parts(const LayerForward& layer, const Kernels& kernels);
const PartProducts* input_gradient_parts(const LayerForward& layer, const Kernels& kernels);
const PartProducts* weight_parts(const LayerForward& layer, const Kernels& kernels);

}  // namespace cpu
}  // namespace fastrnn
