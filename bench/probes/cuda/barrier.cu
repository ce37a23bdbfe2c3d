// SPDX-License-Identifier: BSD-3-Clause
// A barrier among the blocks of a grid, as one step of a recurrent kernel needs it: every block publishes a word, waits
// for all others, and reads its neighbour's word. Microseconds a step for grid.sync() of cooperative groups and for a
// counter with release and acquire, at several numbers of blocks; and one hop, from a block to another through L2.
#include <cooperative_groups.h>

#include <algorithm>

#include "probe.cuh"

namespace {

constexpr int kThreads = 256;
constexpr int kSteps = 2000;

struct Exchange {
  unsigned* words;    // [2, blocks]: of even and odd steps
  unsigned* counter;  // arrivals since the start
  unsigned* faults;   // wrong words, and waits that gave up
};

__device__ void add_release(unsigned* counter) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}

__device__ void store_release(unsigned* word, unsigned value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(word), "r"(value) : "memory");
}

__device__ unsigned load_acquire(const unsigned* word) {
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
  return value;
}

// Whether the word reached `target` before the polls ran out.
__device__ bool wait_for(const unsigned* word, unsigned target) {
  for (unsigned polls = 0; polls < kMostPolls; ++polls) {
    if (load_acquire(word) >= target) return true;
  }
  return false;
}

// The word that block b publishes before step t. A block is at most one step ahead of another, so that two copies do.
__device__ unsigned word_of(unsigned t, unsigned b) { return t * 1024 + b + 1; }

__device__ void publish(const Exchange& exchange, unsigned t) {
  if (threadIdx.x == 0) __stcg(&exchange.words[(t & 1) * gridDim.x + blockIdx.x], word_of(t, blockIdx.x));
}

__device__ void verify(const Exchange& exchange, unsigned t) {
  if (threadIdx.x != 0) return;
  const unsigned neighbour = (blockIdx.x + 1) % gridDim.x;
  if (__ldcg(&exchange.words[(t & 1) * gridDim.x + neighbour]) != word_of(t, neighbour)) atomicAdd(exchange.faults, 1);
}

__global__ void __launch_bounds__(kThreads) with_grid_sync(Exchange exchange) {
  const auto grid = cooperative_groups::this_grid();
  for (unsigned t = 0; t < kSteps; ++t) {
    publish(exchange, t);
    grid.sync();
    verify(exchange, t);
  }
}

__global__ void __launch_bounds__(kThreads) with_counter(Exchange exchange) {
  __shared__ bool arrived;
  for (unsigned t = 0; t < kSteps; ++t) {
    publish(exchange, t);
    __syncthreads();
    if (threadIdx.x == 0) {
      add_release(exchange.counter);
      arrived = wait_for(exchange.counter, (t + 1) * gridDim.x);
      if (!arrived) atomicAdd(exchange.faults, 1);
    }
    __syncthreads();
    if (!arrived) return;
    verify(exchange, t);
  }
}

// Two blocks hand a number to and fro: two hops a step.
__global__ void ping_pong(Exchange exchange) {
  if (threadIdx.x != 0) return;
  for (unsigned t = 0; t < kSteps; ++t) {
    const unsigned mine = 2 * t + 1 + blockIdx.x;
    if (blockIdx.x == 0) store_release(exchange.counter, mine);
    if (!wait_for(exchange.counter, 2 * t + 2 - blockIdx.x)) {
      atomicAdd(exchange.faults, 1);
      return;
    }
    if (blockIdx.x == 1) store_release(exchange.counter, mine);
  }
}

// Microseconds a step of a kernel, launched cooperatively: the blocks are on the card together, or the launch fails.
double step_microseconds(void (*kernel)(Exchange), int blocks, int threads) {
  Buffer<unsigned> words(2 * blocks), counter(1), faults(1);
  Exchange exchange{words.data(), counter.data(), faults.data()};
  void* arguments[] = {&exchange};
  double least = 1e9;
  for (int repetition = 0; repetition < 5; ++repetition) {
    counter.clear();
    const double now = seconds(nullptr, [&] {
      CHECK(cudaLaunchCooperativeKernel(reinterpret_cast<void*>(kernel), blocks, threads, arguments, 0, nullptr));
    });
    REQUIRE(faults.first() == 0);
    if (repetition > 0) least = std::min(least, now);
  }
  return least / kSteps * 1e6;
}

}  // namespace

int main() {
  const cudaDeviceProp card = properties();
  Json json;
  json.text("probe", "barrier");
  json.text("card", card.name);
  json.number("steps", kSteps);
  json.number("one_hop_us", step_microseconds(ping_pong, 2, 32) / 2);
  for (const int blocks : {8, 16, 32, 64, 128, 132}) {
    if (blocks > card.multiProcessorCount) continue;
    json.number(named("grid_sync_%d_blocks_us", blocks), step_microseconds(with_grid_sync, blocks, kThreads));
    json.number(named("counter_%d_blocks_us", blocks), step_microseconds(with_counter, blocks, kThreads));
  }
  json.print();
}
