// SPDX-License-Identifier: BSD-3-Clause
// What it costs to start a kernel: one after the other in a stream, as nodes of a CUDA graph, and a replay of a graph;
// whether a cooperative launch can be captured into a graph, and runs right there.
#include <chrono>

#include "probe.cuh"

namespace {

constexpr int kLaunches = 1000;
constexpr int kNodes = 200;
constexpr int kReplays = 20;

__global__ void tick(unsigned* count) {
  if (threadIdx.x == 0 && blockIdx.x == 0) *count += 1;
}

// Every block arrives, and waits until all have.
__global__ void meet(unsigned* arrivals, unsigned* faults) {
  if (threadIdx.x != 0) return;
  const unsigned before = atomicAdd(arrivals, 1);
  const unsigned target = (before / gridDim.x + 1) * gridDim.x;
  for (unsigned polls = 0; polls < kMostPolls; ++polls) {
    if (atomicAdd(arrivals, 0) >= target) return;
  }
  atomicAdd(faults, 1);
}

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

cudaGraphExec_t instantiated(cudaGraph_t graph) {
  cudaGraphExec_t executable;
  CHECK(cudaGraphInstantiate(&executable, graph, 0));
  return executable;
}

void launches_in_a_stream(Json& json, cudaStream_t stream) {
  Buffer<unsigned> count(1);
  const auto all = [&] {
    for (int n = 0; n < kLaunches; ++n) tick<<<1, 32, 0, stream>>>(count.data());
  };
  all();
  CHECK(cudaStreamSynchronize(stream));
  const double start = now();
  all();
  const double enqueued = now() - start;
  CHECK(cudaStreamSynchronize(stream));
  json.number("eager_enqueue_us", enqueued / kLaunches * 1e6);
  json.number("eager_kernel_us", seconds(stream, all) / kLaunches * 1e6);
  REQUIRE(count.first() == 3 * kLaunches);
  double least = 1e9;
  for (int repetition = 0; repetition < 50; ++repetition) {
    const double before = now();
    tick<<<1, 32, 0, stream>>>(count.data());
    CHECK(cudaStreamSynchronize(stream));
    const double taken = now() - before;
    least = taken < least ? taken : least;
  }
  json.number("launch_and_wait_us", least * 1e6);
}

void nodes_of_a_graph(Json& json, cudaStream_t stream, int nodes) {
  Buffer<unsigned> count(1);
  cudaGraph_t graph;
  CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (int n = 0; n < nodes; ++n) tick<<<1, 32, 0, stream>>>(count.data());
  CHECK(cudaStreamEndCapture(stream, &graph));
  const cudaGraphExec_t executable = instantiated(graph);
  const auto replays = [&] {
    for (int n = 0; n < kReplays; ++n) CHECK(cudaGraphLaunch(executable, stream));
  };
  replays();
  const double taken = seconds(stream, replays);
  REQUIRE(count.first() == static_cast<unsigned>(2 * kReplays * nodes));
  json.number(named("graph_of_%d_kernels_us", nodes), taken / kReplays * 1e6);
  json.number(named("graph_of_%d_kernels_us_each", nodes), taken / kReplays / nodes * 1e6);
  CHECK(cudaGraphExecDestroy(executable));
  CHECK(cudaGraphDestroy(graph));
}

void cooperative_launch_in_a_graph(Json& json, cudaStream_t stream, int blocks) {
  Buffer<unsigned> arrivals(1), faults(1);
  unsigned *first = arrivals.data(), *second = faults.data();
  void* arguments[] = {&first, &second};
  cudaGraph_t graph = nullptr;
  CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  const cudaError_t launched =
      cudaLaunchCooperativeKernel(reinterpret_cast<void*>(meet), blocks, 32, arguments, 0, stream);
  const cudaError_t ended = cudaStreamEndCapture(stream, &graph);
  if (launched != cudaSuccess || ended != cudaSuccess) {
    cudaGetLastError();
    json.text("cooperative_in_graph", cudaGetErrorString(launched != cudaSuccess ? launched : ended));
    return;
  }
  const cudaGraphExec_t executable = instantiated(graph);
  for (int n = 0; n < kReplays; ++n) CHECK(cudaGraphLaunch(executable, stream));
  CHECK(cudaStreamSynchronize(stream));
  REQUIRE(faults.first() == 0);
  REQUIRE(arrivals.first() == static_cast<unsigned>(kReplays * blocks));
  json.text("cooperative_in_graph", "works");
  const double taken = seconds(stream, [&] { CHECK(cudaGraphLaunch(executable, stream)); });
  json.number("cooperative_in_graph_us", taken * 1e6);
  CHECK(cudaGraphExecDestroy(executable));
  CHECK(cudaGraphDestroy(graph));
}

}  // namespace

int main() {
  const cudaDeviceProp card = properties();
  Json json;
  json.text("probe", "launch");
  json.text("card", card.name);
  cudaStream_t stream;
  CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  launches_in_a_stream(json, stream);
  nodes_of_a_graph(json, stream, 1);
  nodes_of_a_graph(json, stream, kNodes);
  cooperative_launch_in_a_graph(json, stream, card.multiProcessorCount);
  CHECK(cudaStreamDestroy(stream));
  json.print();
}
