// SPDX-License-Identifier: BSD-3-Clause
// What a round of waiting takes (barrier.cpp), which decides whether threads can share the units of a step. A cache
// line goes from core to core in 20 ns where both share a cache, and in 200 ns where they do not (Zen 5); which cores
// run the threads is the system's choice, and it changes: a virtual machine's cores move for seconds at a time. So the
// time is measured, now and then.
#include <omp.h>

#include <algorithm>
#include <atomic>
#include <chrono>

#include "plan.h"

namespace fastrnn {
namespace cpu {

namespace {

using Clock = std::chrono::steady_clock;

constexpr int kMeasured = 16;  // members that take part, at most
constexpr int kSamples = 5, kRounds = 4;
constexpr int kCalls = 32;            // from one measurement to the next, at least: it may have to wake the threads
constexpr int64_t kAge = 10'000'000;  // ns, likewise
constexpr int64_t kRest = 50;         // and so many times as long as the last one took, where threads lack cores

// A round takes longer where members share a core. For some milliseconds they may although there are others, when one
// was just woken: what is found once, and soon measured again, is not believed.
constexpr double kLacking = 3000;  // ns
constexpr int kDoubtedCalls = 4;

std::atomic<int> calls_left{0};
std::atomic<bool> doubted{false};
std::atomic<int64_t> due_at{0};
std::atomic<double> round_ns{200}, held_ns{0};

int64_t now() { return std::chrono::nanoseconds(Clock::now().time_since_epoch()).count(); }

}  // namespace

double round_time() {
  const double held = held_ns.load(std::memory_order_relaxed);
  return held > 0 ? held : round_ns.load(std::memory_order_relaxed);
}

void hold_round_time(double ns) { held_ns.store(ns, std::memory_order_relaxed); }

bool is_round_time_due() {
  if (calls_left.fetch_sub(1, std::memory_order_relaxed) > 0) return false;
  calls_left.store(kCalls, std::memory_order_relaxed);
  return now() > due_at.load(std::memory_order_relaxed);
}

// The middle one of a few samples: a member may lose its core in some.
double measure_round_time(int threads) {
  if (!can_share(threads)) return round_time();
  const int64_t begin = now();
  Signal signals[kMeasured] = {};
  const int members = std::min(threads, kMeasured);
  double samples[kSamples] = {};
  bool granted = true;
#pragma omp parallel num_threads(threads)
  {
    const int member = omp_get_thread_num();
    if (omp_get_num_threads() != threads) {
      if (member == 0) granted = false;
    } else if (member < members) {
      const Team team{member, members, true, false, signals};
      wait(team);
      for (double& sample : samples) {
        const int64_t before = now();
        for (int j = 0; j < kRounds; ++j) wait(team);
        if (member == 0) sample = static_cast<double>(now() - before) / (kRounds * rounds_of(members));
      }
    }
  }
  std::nth_element(samples, samples + kSamples / 2, samples + kSamples);
  const double found = granted ? samples[kSamples / 2] : round_time();
  const bool lacking = found > kLacking;
  if (!lacking || doubted.load(std::memory_order_relaxed)) round_ns.store(found, std::memory_order_relaxed);
  doubted.store(lacking, std::memory_order_relaxed);
  if (lacking) calls_left.store(kDoubtedCalls, std::memory_order_relaxed);
  const int64_t end = now();
  due_at.store(end + std::max(kAge, kRest * (end - begin)), std::memory_order_relaxed);
  return found;
}

}  // namespace cpu
}  // namespace fastrnn
