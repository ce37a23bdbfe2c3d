// SPDX-License-Identifier: BSD-3-Clause
// Memory of the card as a recurrent kernel sees it: latency of one load that depends on the last, from L2 and from
// device memory; bandwidth of all multiprocessors that read one array in turns (weights that stay in L2), the same few
// kilobytes each (the state that every block needs), and device memory.
#include <algorithm>
#include <numeric>
#include <random>
#include <vector>

#include "probe.cuh"

namespace {

constexpr int kLine = 128;  // bytes
constexpr int kHops = 20000;
constexpr int kThreads = 512;

// Follows `hops` links from the place where the last call ended, so that a call finds in the cache only what an array
// that fits there leaves in it; L1 is passed by, as it is by a kernel that reads what others wrote.
__global__ void chase(const unsigned* lines, int hops, unsigned* end) {
  unsigned place = *end;
  for (int hop = 0; hop < hops; ++hop) place = __ldcg(&lines[static_cast<size_t>(place) * (kLine / 4)]);
  *end = place;
}

// The array `rounds` times: by all blocks together, or whole by each of them.
__global__ void __launch_bounds__(kThreads)
    read(const uint4* data, size_t count, int rounds, bool whole, unsigned* sum) {
  const size_t threads = whole ? kThreads : static_cast<size_t>(gridDim.x) * kThreads;
  const size_t first = whole ? threadIdx.x : static_cast<size_t>(blockIdx.x) * kThreads + threadIdx.x;
  unsigned total = 0;
  for (int round = 0; round < rounds; ++round) {
#pragma unroll 4
    for (size_t place = first; place < count; place += threads) {
      const uint4 found = __ldcg(&data[place]);
      total += found.x + found.y + found.z + found.w;
    }
  }
  atomicAdd(sum, total);
}

__global__ void fill_ones(unsigned* data, size_t count) {
  const size_t threads = static_cast<size_t>(gridDim.x) * blockDim.x;
  for (size_t n = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x; n < count; n += threads) data[n] = 1;
}

// Nanoseconds a load, over an array of `bytes` whose lines form one random cycle.
double latency(size_t bytes) {
  const unsigned lines = static_cast<unsigned>(bytes / kLine);
  std::vector<unsigned> order(lines);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin() + 1, order.end(), std::mt19937(1));
  std::vector<unsigned> links(bytes / 4);
  for (unsigned n = 0; n < lines; ++n) links[static_cast<size_t>(order[n]) * (kLine / 4)] = order[(n + 1) % lines];
  Buffer<unsigned> data(bytes / 4), end(1);
  CHECK(cudaMemcpy(data.data(), links.data(), bytes, cudaMemcpyHostToDevice));
  // Every line of an array that fits into L2 is there after the first call, which is not counted.
  const int hops = std::max<int>(kHops, std::min<unsigned>(lines, 10 * kHops));
  unsigned followed = 0;
  const double least = least_seconds(nullptr, [&] {
    chase<<<1, 1>>>(data.data(), hops, end.data());
    followed += hops;
  });
  REQUIRE(end.first() == order[followed % lines]);
  return least / hops * 1e9;
}

// Bytes per second, all blocks together.
double bandwidth(size_t bytes, int rounds, bool whole, int blocks) {
  Buffer<unsigned> data(bytes / 4), sum(1);
  fill_ones<<<blocks, 256>>>(data.data(), bytes / 4);
  const auto* vectors = reinterpret_cast<const uint4*>(data.data());
  const auto work = [&] { read<<<blocks, kThreads>>>(vectors, bytes / 16, rounds, whole, sum.data()); };
  work();
  CHECK(cudaDeviceSynchronize());
  const unsigned a_pass = static_cast<unsigned>(bytes / 4 * rounds) * (whole ? blocks : 1);
  REQUIRE(sum.first() == a_pass);  // modulo 2^32, as the sum on the card
  const double least = least_seconds(nullptr, work);
  return static_cast<double>(bytes) * rounds * (whole ? blocks : 1) / least;
}

}  // namespace

int main() {
  const cudaDeviceProp card = properties();
  constexpr size_t kMebi = 1 << 20;
  const int blocks = 2 * card.multiProcessorCount;
  Json json;
  json.text("probe", "memory");
  json.text("card", card.name);
  json.number("l2_bytes", card.l2CacheSize);
  json.number("latency_1_mib_ns", latency(kMebi));
  json.number("latency_16_mib_ns", latency(16 * kMebi));
  json.number("latency_512_mib_ns", latency(512 * kMebi));
  json.number("shared_64_kib_gbs", bandwidth(kMebi / 16, 200, true, blocks) * 1e-9);
  json.number("shared_256_kib_gbs", bandwidth(kMebi / 4, 50, true, blocks) * 1e-9);
  json.number("l2_2_mib_gbs", bandwidth(2 * kMebi, 200, false, blocks) * 1e-9);
  json.number("l2_16_mib_gbs", bandwidth(16 * kMebi, 50, false, blocks) * 1e-9);
  json.number("memory_2_gib_gbs", bandwidth(2048 * kMebi, 1, false, blocks) * 1e-9);
  json.print();
}
