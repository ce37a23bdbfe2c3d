// SPDX-License-Identifier: BSD-3-Clause
// How a call runs: with which kernels and products, and how threads share it. Called by run.cpp before it lays out the
// scratch.
#include "plan.h"

#include <omp.h>
#include <pthread.h>
#include <unistd.h>

#include <atomic>

namespace fastrnn {
namespace cpu {

namespace {

// GNU OpenMP does not survive a fork: a child whose parent ran a team must not open one.
std::atomic<bool> forked{false};
const int fork_handler = pthread_atfork(nullptr, nullptr, [] { forked = true; });

// What of a second-level cache weights may take beside all else and come from it at every step.
double near_bytes() {
  static const double bytes = [] {
#if defined(_SC_LEVEL2_CACHE_SIZE)
    const long cache = sysconf(_SC_LEVEL2_CACHE_SIZE);
    if (cache > 0) return 0.7 * static_cast<double>(cache);
#endif
    return 1.5e6;
  }();
  return bytes;
}

// The math of a cell for a vector of units, which no other row shares.
double cell_time(Cell cell) { return cell == Cell::lstm ? 25 : cell == Cell::gru || cell == Cell::own ? 10 : 6; }

// Times in ns, from measurements on the machines named in docs/architecture.md; only ratios matter. What sets a
// backward, and a single step, apart was not measured on AMX: there both are taken for a forward of many steps.
struct Cost {
  const LayerForward& layer;
  const Kernels& kernels;
  const bool backward;
  const double round;  // of waiting (meeting.cpp)
  double width() const { return static_cast<double>(layer.P ? layer.P : layer.H); }
  double gates() const { return static_cast<double>(gates_per_unit(layer)); }
  double size() const { return layer.is_double ? 8 : layer.is_bfloat16 ? 2 : 4; }
  bool in_blocks_of_rows() const { return kernels.equal_rows > 1; }
  // One step of `rows` rows on 1/parts of the units; backward with its share of what follows the steps.
  double step(double rows, double parts) const {
    const double units = static_cast<double>(layer.H) / parts;
    return (backward ? 1.5 : 1) * (in_blocks_of_rows() ? block_step(rows, units) : forward_step(rows, units));
  }
  // The larger of arithmetic and of streaming the weights, and a part of the latter that does not overlap. Fewer than
  // three rows wait for the weights, wherever these lie. In bfloat16, but on AMX, all takes half the time.
  double forward_step(double rows, double units) const {
    const double recurrent = width() * (rows < 3 ? 3 : rows), input = static_cast<double>(layer.I) * rows;
    const double weights = gates() * units * width() * size();
    const bool far = weights > near_bytes();
    const double streamed = weights / (far ? 60.0 : 110.0);
    const double computed = (gates() * units * (recurrent + input) / 6.5 + rows * units * cell_time(layer.cell)) /
                            kernels.lanes * (layer.is_bfloat16 ? 0.5 : 1);
    return (computed > streamed ? computed : streamed) + streamed * (far ? 0.35 : 0.1);
  }
  // On AMX a block of rows takes as long as one row.
  double block_step(double rows, double units) const {
    const double blocks =
        static_cast<double>((static_cast<int64_t>(rows) + kernels.equal_rows - 1) / kernels.equal_rows);
    const double weights = gates() * units * (width() + static_cast<double>(layer.I));
    return weights * blocks * static_cast<double>(kernels.equal_rows) / 800 + weights * 2 / 60 * 0.5 +
           rows * units * (gates() * 0.4 + 1) / kernels.lanes;
  }
  // Packing the weights, shared by `used` threads, `members` to a direction. Forward, threads that share units, and a
  // thread alone, pack where they use and stay in the cache, and a single step of few rows reads the weights in place;
  // threads that share rows write the packed weights for each other.
  double packing(int used, int members, bool split_rows) const {
    if (layer.direction[0].packed && !backward) return 0;
    double each = 0.3;
    if (!backward && split_rows && members > 1) {
      each = 0.8 * far();
    } else if (!backward && layer.T == 1 && layer.B < 5 && !layer.is_bfloat16) {
      each = 0.05 * static_cast<double>(layer.B + 1);
    } else if (backward && layer.T == 1 && !layer.is_bfloat16 && !(split_rows && members > 1)) {
      each = 0.2;  // backward.h: recur_by_rows
    }
    if (layer.is_bfloat16 && !in_blocks_of_rows()) each *= 0.3;
    return gates() * static_cast<double>(layer.H * layer.D) * (width() + static_cast<double>(layer.I)) * each / used;
  }
  // What a call on more than one thread costs besides: its region, and backward a barrier, behind which the gate
  // gradients are read out of other cores' caches.
  double region() const {
    if (!backward) return 1000 + 20 * round;
    return 2000 + 40 * round + static_cast<double>(layer.N * layer.H * layer.D) * gates() * size() * 0.1 * far();
  }
  // How much longer than between cores that share a cache many lines take from one to the other.
  double far() const { return round > 100 ? round / 100 : 1; }
  // What members that share units wait for at each step: to meet, and one way more of what the others made, of which a
  // core asks for some 16 lines at a time.
  double meeting(int members, double share) const {
    const double lines = static_cast<double>(layer.B) * width() * size() * (1 - share) / 64;
    return round * (rounds_of(members) + 1 + lines / 16);
  }
};

// What threads that share units deal out: the panels of the sweep, or blocks of units with products in bfloat16.
int64_t unit_shares(const LayerForward& layer, const Kernels& kernels, bool backward) {
  const int64_t blocks = (layer.H + kernels.lanes - 1) / kernels.lanes, gates = gates_per_unit(layer);
  if (layer.is_bfloat16) return blocks;
  const int64_t panel = backward ? 4 : gates <= 2 ? 4 / gates : 1;  // kForwardPanel
  return (blocks + panel - 1) / panel;
}

// What a round may take: in one cache, and across sockets.
constexpr double kNearRound = 30, kFarRound = 1000;  // ns
constexpr double kUneven = 1.05;                     // members that meet at every step wait for the slowest of them

std::atomic<Split> forced{Split::chosen};
std::atomic<bool> parts_forced{false};

// As many threads as there is work for, one at least, whether it pays or not.
Plan forced_plan(const LayerForward& layer, const Kernels& kernels, int threads, bool together, bool units) {
  const int64_t blocks = (layer.H + kernels.lanes - 1) / kernels.lanes;
  const int64_t parts = units ? blocks : layer.B;
  int members = threads / (together ? 2 : 1);
  if (members > parts) members = static_cast<int>(parts);
  return Plan{&kernels, members * (together ? 2 : 1), members, together, units && members > 1, 0};
}

// The least of what one thread, rows and units would take.
Plan cheapest(const Cost& cost, int threads) {
  const LayerForward& layer = cost.layer;
  const bool together = layer.D == 2;
  const int64_t shares = unit_shares(layer, cost.kernels, cost.backward);
  const double T = static_cast<double>(layer.T), B = static_cast<double>(layer.B);
  double best = T * cost.step(B, 1) * static_cast<double>(layer.D) + cost.packing(1, 1, false);
  Plan chosen = serial_plan(cost.kernels);
  for (int members = together ? 1 : 2; members * (together ? 2 : 1) <= threads; ++members) {
    const int used = members * (together ? 2 : 1);
    // The longest share of rows counts; fewer rows than members leave some idle.
    const int64_t rows = (layer.B + members - 1) / members;
    const double by_rows =
        T * cost.step(static_cast<double>(rows), 1) + cost.packing(used, members, true) + cost.region();
    if (by_rows < best && members <= layer.B)
      best = by_rows, chosen = Plan{&cost.kernels, used, members, together, false, 0};
    const double share = static_cast<double>((shares + members - 1) / members) / static_cast<double>(shares);
    const double by_units = T * (cost.step(B, 1 / share) * kUneven + cost.meeting(members, share)) +
                            cost.packing(used, members, false) + cost.region();
    if (by_units < best && members > 1 && members <= shares && !layer.P) {
      best = by_units, chosen = Plan{&cost.kernels, used, members, together, true, 0};
    }
  }
  return chosen;
}

bool same(const Plan& a, const Plan& b) { return a.members == b.members && a.split_units == b.split_units; }

const PartProducts* part_products(const LayerForward& layer, const Kernels& kernels) {
  const bool whole_floats = !layer.is_double && !layer.is_bfloat16 && layer.conversion == nullptr;
  return whole_floats && kernels.lanes == 16 ? chosen_isa().parts : nullptr;
}

const PartProducts* input_parts_from(int64_t weights, const LayerForward& layer, const Kernels& kernels) {
  const bool pays = layer.I >= 32 && gates_per_unit(layer) * layer.H * layer.I >= weights;
  return pays || parts_forced ? part_products(layer, kernels) : nullptr;
}

}  // namespace

const Kernels& kernels_for(const LayerForward& layer) {
  if (layer.is_bfloat16) return *chosen_isa().of_bfloat16;
  if (layer.own) return own_kernels(*layer.own, layer.is_double);
  return layer.is_double ? *chosen_isa().of_double : *chosen_isa().of_float;
}

Plan serial_plan(const Kernels& kernels) { return Plan{&kernels, 1, 1, false, false, 0}; }

bool can_share(int threads) { return threads > 1 && !forked && !omp_in_parallel(); }

Plan choose(const LayerForward& layer, const Kernels& kernels, int threads, bool backward) {
  if (threads > kMostThreads) threads = kMostThreads;
  if (!can_share(threads)) return serial_plan(kernels);
  const bool together = layer.D == 2;
  const Split wish = forced;
  if (wish != Split::chosen) return forced_plan(layer, kernels, threads, together, wish == Split::units && !layer.P);
  const auto with = [&](double round) {
    return cheapest(Cost{layer, kernels, backward && kernels.equal_rows <= 1, round}, threads);
  };
  if (is_round_time_due() && !same(with(kNearRound), with(kFarRound))) {
    measure_round_time(threads);
  }
  return with(round_time());
}

// Bits must be those of any other number of rows: the size of W_ih decides. Calls of one step pay for what sequences
// gain (Granite Rapids, LSTM, B = 1: 1.5 times as long at H = 128 and 256, 1.2 times at 512), and small layers are
// called so.
const PartProducts* input_parts(const LayerForward& layer, const Kernels& kernels) {
  return input_parts_from(1 << 20, layer, kernels);
}

// Here training sequences of one row and one step lose (1.2 times as long at H = 128 and 256), and 100 steps of 16 rows
// or more gain up to a tenth.
const PartProducts* input_gradient_parts(const LayerForward& layer, const Kernels& kernels) {
  return input_parts_from(1 << 15, layer, kernels);
}

const PartProducts* weight_parts(const LayerForward& layer, const Kernels& kernels) {
  if (layer.direction[0].h_mask) return nullptr;
  const bool pays = layer.N >= 64 && gates_per_unit(layer) * layer.H * (layer.I + width_of_h(layer)) >= 32768;
  return pays || parts_forced ? part_products(layer, kernels) : nullptr;
}

Plan serial_plan(const Plan& plan) {
  Plan serial = serial_plan(*plan.kernels);
  serial.input_parts = plan.input_parts, serial.weight_parts = plan.weight_parts;
  return serial;
}

void force_split(Split split) { forced = split; }
void force_parts(bool always) { parts_forced = always; }

}  // namespace cpu
}  // namespace fastrnn
