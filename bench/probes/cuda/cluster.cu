// SPDX-License-Identifier: BSD-3-Clause
// Handing a state on within a cluster of blocks (compute capability 9.0): microseconds a step for the barrier of the
// cluster, with a word read from the neighbour's shared memory, and for st.async into the shared memory of every block
// with one wait on an mbarrier, 512 bytes from each block to each; alone, and with as many clusters as fit.
#include <cooperative_groups.h>

#include <algorithm>

#include "probe.cuh"

namespace {

constexpr int kSteps = 2000;
constexpr int kThreads = 32;
[[maybe_unused]] constexpr int kMostRanks = 16;

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

__device__ unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// The same place in the shared memory of another block of the cluster.
__device__ unsigned address_at(unsigned address, unsigned rank) {
  unsigned mapped;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
  return mapped;
}

__device__ bool wait_for_phase(unsigned barrier, unsigned parity) {
  for (unsigned polls = 0; polls < kMostWaits; ++polls) {
    unsigned done;
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
    if (done) return true;
  }
  return false;
}

#endif

__global__ void __launch_bounds__(kThreads) with_barrier([[maybe_unused]] unsigned* faults) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  auto cluster = cooperative_groups::this_cluster();
  const unsigned rank = cluster.block_rank(), neighbour = (rank + 1) % cluster.num_blocks();
  __shared__ unsigned words[2];
  const unsigned* theirs = cluster.map_shared_rank(words, neighbour);
  for (unsigned t = 0; t < kSteps; ++t) {
    if (threadIdx.x == 0) words[t & 1] = t * kMostRanks + rank;
    cluster.sync();
    if (threadIdx.x == 0 && theirs[t & 1] != t * kMostRanks + neighbour) atomicAdd(faults, 1);
  }
  cluster.sync();  // nobody leaves while its shared memory is read
#endif
}

__global__ void __launch_bounds__(kThreads) with_messages([[maybe_unused]] unsigned* faults) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  auto cluster = cooperative_groups::this_cluster();
  const unsigned rank = cluster.block_rank(), ranks = cluster.num_blocks();
  __shared__ alignas(16) uint4 inbox[2][kMostRanks][kThreads];
  __shared__ alignas(8) unsigned long long barriers[2];
  if (threadIdx.x == 0) {
    for (auto& barrier : barriers) {
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(&barrier)) : "memory");
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  cluster.sync();
  const unsigned bytes = ranks * kThreads * sizeof(uint4);
  for (unsigned t = 0; t < kSteps; ++t) {
    const unsigned half = t & 1, parity = (t >> 1) & 1;
    const unsigned barrier = shared_address(&barriers[half]), place = shared_address(&inbox[half][rank][threadIdx.x]);
    if (threadIdx.x == 0) {
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
    }
    const unsigned value = t * kMostRanks + rank;
    for (unsigned target = 0; target < ranks; ++target) {
      asm volatile(
          "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %1, %1, %2}, [%3];" ::"r"(
              address_at(place, target)),
          "r"(value), "r"(threadIdx.x), "r"(address_at(barrier, target))
          : "memory");
    }
    const bool arrived = wait_for_phase(barrier, parity);
    unsigned wrong = arrived ? 0 : 1;
    for (unsigned source = 0; source < ranks; ++source) {
      const uint4 found = inbox[half][source][threadIdx.x];
      wrong += found.x != t * kMostRanks + source || found.w != threadIdx.x;
    }
    if (wrong) atomicAdd(faults, wrong);
    // Messages of the next step but one may come as soon as this block has sent those of the next.
    __syncwarp();
    if (!__all_sync(0xffffffffu, arrived)) break;
  }
  cluster.sync();
#endif
}

cudaLaunchConfig_t configuration(int blocks, int ranks, cudaLaunchAttribute* attribute) {
  attribute->id = cudaLaunchAttributeClusterDimension;
  attribute->val.clusterDim.x = ranks;
  attribute->val.clusterDim.y = 1;
  attribute->val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(kThreads);
  config.attrs = attribute;
  config.numAttrs = 1;
  return config;
}

double step_microseconds(void (*kernel)(unsigned*), int clusters, int ranks) {
  Buffer<unsigned> faults(1);
  cudaLaunchAttribute attribute;
  const cudaLaunchConfig_t config = configuration(clusters * ranks, ranks, &attribute);
  const double least = least_seconds(nullptr, [&] { CHECK(cudaLaunchKernelEx(&config, kernel, faults.data())); });
  REQUIRE(faults.first() == 0);
  return least / kSteps * 1e6;
}

}  // namespace

int main() {
  const cudaDeviceProp card = properties();
  Json json;
  json.text("probe", "cluster");
  json.text("card", card.name);
  if (card.major < 9) {
    json.text("skipped", "the card has no clusters of blocks");
    json.print();
    return 0;
  }
  json.number("steps", kSteps);
  for (auto* kernel : {with_barrier, with_messages}) {
    CHECK(cudaFuncSetAttribute(reinterpret_cast<void*>(kernel), cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  }
  for (const int ranks : {2, 4, 8, 16}) {
    cudaLaunchAttribute attribute;
    const cudaLaunchConfig_t config = configuration(ranks, ranks, &attribute);
    int clusters = 0;
    if (cudaOccupancyMaxActiveClusters(&clusters, with_messages, &config) != cudaSuccess || clusters < 1) {
      cudaGetLastError();  // this size is not to be had: the error is dealt with
      continue;
    }
    json.number(named("resident_clusters_of_%d_blocks", ranks), clusters);
    json.number(named("barrier_%d_blocks_us", ranks), step_microseconds(with_barrier, 1, ranks));
    json.number(named("messages_%d_blocks_us", ranks), step_microseconds(with_messages, 1, ranks));
    // At most one block a multiprocessor, as a kernel that fills the registers would run.
    const int many = std::min(clusters, card.multiProcessorCount / ranks);
    json.number(named("messages_%d_blocks_%d_clusters_us", ranks, many), step_microseconds(with_messages, many, ranks));
  }
  json.print();
}
