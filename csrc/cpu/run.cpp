// SPDX-License-Identifier: BSD-3-Clause
// From a plan to threads: lays out the scratch memory, opens the one parallel region and hands every thread its task.
// layer.cpp calls run_forward and run_backward; the plan is made in plan.cpp; the kernels are in isa/.
#include <omp.h>
#if defined(__x86_64__) || defined(__i386__)
#include <xmmintrin.h>
#endif

#include "plan.h"

namespace fastrnn {
namespace cpu {

namespace {

// Hands out pieces of the scratch block, each on its own cache lines. Without a block it only counts.
class Scratch {
 public:
  Scratch(void* begin, size_t element) : begin_(static_cast<char*>(begin)), element_(element) {}
  void* take(int64_t elements) { return bytes(static_cast<size_t>(elements) * element_); }
  void* rounded(int64_t elements) { return bytes(static_cast<size_t>(elements) * 2); }  // of bfloat16
  void* bytes(size_t n) {
    void* piece = begin_ ? begin_ + used_ : nullptr;
    used_ += (n + 127) / 64 * 64;  // one line between pieces: neighbours never share one
    return piece;
  }
  size_t used() const { return used_; }

 private:
  char* begin_;
  size_t element_, used_ = 0;
};

// Rows of input gates per chunk: about 256 KB of them, so that they are still cached when the steps read them, but at
// least 64 rows, since W_ih is streamed once a chunk, and 192 where they take no more than 768 KB, or 1.5 MB if a step
// has few. 192, 400 and 1000 rows measured equal up to H = 512 and 2 to 8 % slower at H = 1024 (Granite Rapids); on
// Zen 5 192 are 1.01 times as fast up to rows of 4 KB and .99 from 8 KB on, and 1.02 to 1.03 where a step has few. In
// parts (parts.h) W_ih is multiplied faster than it comes from the third-level cache: there 192 rows are 5 to 10 %
// faster than 64.
int64_t chunk_rows(const LayerForward& layer, int64_t rows, bool in_parts) {
  const int64_t row_bytes = padded(layer.H) * gates_per_unit(layer) * (layer.is_double ? 8 : 4);
  int64_t chunk = 256 * 1024 / row_bytes;
  const int64_t least = in_parts || row_bytes <= (rows < 8 ? 8192 : 4096) ? 192 : 64;
  if (chunk < least) chunk = least;
  if (chunk < rows) chunk = rows;
  const int64_t all = rows * layer.T;
  return chunk < all ? chunk : all;
}

int64_t most_rows(const LayerForward& layer, const Plan& plan) {
  return plan.split_units ? layer.B : (layer.B + plan.members - 1) / plan.members;
}

// Whether members would get unequal shares of the rows, longest first, if each took a block of them. If not, blocks are
// better: in turn, every row shares a cache line with one of another member (up to a fifth of a step at H = 40).
bool deals(const LayerForward& layer, int members) {
  if (!layer.batch_sizes) return false;
  const int64_t most = (layer.B + members - 1) / members;
  int64_t longest = 0;
  for (int64_t t = 0; t < layer.T; ++t) longest += layer.batch_sizes[t] < most ? layer.batch_sizes[t] : most;
  return longest * members > layer.N + layer.N / 16 + layer.T * members;
}

const int64_t* first_rows(const LayerForward& layer, Scratch& scratch) {
  if (!layer.batch_sizes) return nullptr;
  int64_t* first = static_cast<int64_t*>(scratch.bytes(static_cast<size_t>(layer.T) * sizeof(int64_t)));
  for (int64_t t = 0, n = 0; first && t < layer.T; n += layer.batch_sizes[t++]) first[t] = n;
  return first;
}

// Where the packed rows lie in an array [T, step_rows].
const int64_t* places(const LayerForward& layer, Scratch& scratch) {
  if (!layer.order) return nullptr;
  int64_t* place = static_cast<int64_t*>(scratch.bytes(static_cast<size_t>(layer.N) * sizeof(int64_t)));
  for (int64_t t = 0, n = 0; place && t < layer.T; ++t) {
    for (int64_t j = 0; j < layer.batch_sizes[t]; ++j) place[n++] = t * layer.step_rows + layer.order[j];
  }
  return place;
}

Signal* signals(int members, Scratch& scratch) {
  Signal* made = static_cast<Signal*>(scratch.bytes(static_cast<size_t>(members) * sizeof(Signal)));
  for (int member = 0; made && member < members; ++member) made[member].rounds = 0;
  return made;
}

// The region's threads take on the floating-point mode of the caller (denormals, rounding) and give theirs back.
class FloatingPointMode {
 public:
#if defined(__x86_64__) || defined(__i386__)
  explicit FloatingPointMode(unsigned caller) : own_(_mm_getcsr()) { _mm_setcsr(caller); }
  ~FloatingPointMode() { _mm_setcsr(own_); }
  static unsigned current() { return _mm_getcsr(); }

 private:
  unsigned own_;
#else
  explicit FloatingPointMode(unsigned) {}
  static unsigned current() { return 0; }
#endif
};

// Runs body(thread) on `threads` threads of one region. If the runtime grants fewer, `fewer` runs in their place on one
// thread: a team that waits for members who never come would hang.
template <class Body, class Fewer>
void run_region(int threads, const Body& body, const Fewer& fewer) {
  if (threads == 1) {
    body(0);
    return;
  }
  const unsigned mode = FloatingPointMode::current();
  bool granted = true;
#pragma omp parallel num_threads(threads)
  {
    if (omp_get_num_threads() == threads) {
      FloatingPointMode same(mode);
      body(omp_get_thread_num());
    } else if (omp_get_thread_num() == 0) {
      granted = false;
    }
  }
  if (!granted) fewer();
}

PackedWeights room_for_weights(const LayerForward& layer, const PartProducts* parts, Scratch& scratch) {
  const int64_t gates = padded(layer.H) * gates_per_unit(layer), R = width_of_h(layer);
  PackedWeights room{};
  room.parts = parts;
  if (parts) {
    room.w_ih = scratch.rounded(part_panel(layer.I, gates / 16));
  } else {
    room.w_ih = layer.is_bfloat16 ? scratch.rounded(gates * in_blocks(layer.I)) : scratch.take(gates * layer.I);
  }
  room.w_hh = layer.is_bfloat16 ? scratch.rounded(gates * in_blocks(R)) : scratch.take(gates * R);
  room.b_ih = scratch.take(gates);
  room.b_hh = scratch.take(gates);
  const int64_t projection = layer.P ? padded(R) : 0;
  room.w_hr = layer.is_bfloat16 ? scratch.rounded(projection * in_blocks(layer.H)) : scratch.take(projection * layer.H);
  return room;
}

void take_weights(const PackedWeights& from, ForwardTask& task) {
  task.w_ih = from.w_ih, task.w_hh = from.w_hh, task.b_ih = from.b_ih, task.b_hh = from.b_hh, task.w_hr = from.w_hr;
}

// Lays out tasks of every direction and member; directions that run one after the other share their scratch.
void lay_out(const LayerForward& layer, const Plan& plan, Scratch& scratch, ForwardTask (*tasks)[kMostThreads]) {
  const int64_t G = gates_per_unit(layer), Hp = padded(layer.H), Rp = padded(width_of_h(layer));
  const int64_t rows = most_rows(layer, plan), chunk = chunk_rows(layer, rows, plan.input_parts != nullptr);
  const int64_t* first = first_rows(layer, scratch);
  for (int d = 0; d < layer.D; ++d) {
    if (d == 1 && !plan.together) {
      for (int member = 0; tasks && member < plan.members; ++member) {
        tasks[1][member] = tasks[0][member];
        tasks[1][member].direction = 1;
        if (layer.direction[1].packed) take_weights(*layer.direction[1].packed, tasks[1][member]);
      }
      break;
    }
    ForwardTask shared{};
    shared.layer = &layer;
    shared.direction = d;
    shared.team = Team{0, plan.members, plan.split_units, deals(layer, plan.members), signals(plan.members, scratch)};
    shared.first_row = first;
    shared.chunk_rows = chunk;
    const PackedWeights* const packed = layer.direction[d].packed;
    shared.packed = packed != nullptr;
    shared.parts = plan.input_parts;
    take_weights(packed ? *packed : room_for_weights(layer, plan.input_parts, scratch), shared);
    for (int member = 0; member < plan.members; ++member) {
      if (member == 0 || !plan.split_units) {
        shared.h[0] = scratch.take(rows * Rp);
        shared.h[1] = scratch.take(rows * Rp);
        shared.c = scratch.take(states_per_unit(layer) == 2 ? rows * Hp : 0);
        const bool masked = layer.direction[0].h_mask != nullptr && !layer.is_bfloat16;
        for (int which = 0; which < 2; ++which) {
          shared.masked_h[which] = masked ? scratch.take(rows * Rp) : shared.h[which];
          if (layer.is_bfloat16) shared.masked_h[which] = scratch.rounded((rows + 15) * in_blocks(width_of_h(layer)));
        }
      }
      ForwardTask task = shared;
      task.team.member = member;
      task.x_gates = scratch.take(layer.is_bfloat16 ? (chunk + 15) * (Hp * G + 16) : chunk * Hp * G);
      task.x_rows =
          layer.is_bfloat16 ? scratch.rounded((chunk + 15) * in_blocks(layer.I)) : scratch.take(chunk * layer.I);
      task.few_rows = scratch.take(layer.is_bfloat16 || packed ? 0 : kDirectRows * (layer.I + width_of_h(layer)) + 16);
      task.x_parts = plan.input_parts ? scratch.rounded((chunk + 31) * part_row(layer.I)) : nullptr;
      const int64_t projected = layer.P ? rows : 0;
      task.cell_h =
          layer.is_bfloat16 ? scratch.rounded((projected + 15) * in_blocks(layer.H)) : scratch.take(projected * Hp);
      if (tasks) tasks[d][member] = task;
    }
  }
}

void lay_out(const LayerBackward& layer, const Plan& plan, Scratch& scratch, BackwardTask (*sweeps)[kMostThreads],
             GradientTask* gradients) {
  const LayerForward& forward = layer.forward;
  const int64_t G = gates_per_unit(forward), Hp = padded(forward.H), R = width_of_h(forward), Rp = padded(R);
  const int64_t stored = stored_per_unit(forward);
  const int64_t rows = most_rows(forward, plan), gates = G * forward.H;
  const bool rounded = forward.is_bfloat16;
  const int64_t d_gates = rounded ? (forward.N + 31 * plan.members) * gate_gradients_row(stored, forward.H)
                                  : forward.N * stored * forward.H + kOverread;
  const int64_t d_h =
      rounded ? (forward.N + 31 * plan.members) * in_blocks(forward.P) : forward.N * forward.P + kOverread;
  const auto operand = [&](int64_t n) { return rounded ? scratch.rounded(n) : scratch.take(n); };
  GradientTask gradient{};
  gradient.layer = &layer;
  gradient.team = Team{0, plan.threads, false, false, signals(plan.threads, scratch)};
  gradient.first_row = first_rows(forward, scratch);
  gradient.input_parts = plan.input_parts;
  gradient.weight_parts = plan.weight_parts;
  gradient.places = places(forward, scratch);
  for (int d = 0; d < forward.D; ++d) {
    const DirectionBackward& direction = layer.direction[d];
    const bool project_gradient = static_cast<bool>(direction.d_w_hr);
    BackwardTask shared{};
    shared.layer = &layer;
    shared.direction = d;
    shared.team = Team{0, plan.members, plan.split_units, deals(forward, plan.members), signals(plan.members, scratch)};
    shared.first_row = gradient.first_row;
    shared.w_hh = operand(Rp * (rounded ? in_blocks(gates) : gates));
    shared.w_hr = operand(forward.P ? Hp * (rounded ? in_blocks(forward.P) : forward.P) : 0);
    shared.d_gates = direction.d_gates ? direction.d_gates : operand(d_gates);
    shared.d_h = direction.d_h ? direction.d_h : operand(forward.P ? d_h : 0);
    void* cell_h = operand(project_gradient ? forward.N * forward.H : 0);
    shared.cell_h = project_gradient ? cell_h : nullptr;
    gradient.d_gates[d] = shared.d_gates;
    gradient.d_h[d] = shared.d_h;
    gradient.cell_h[d] = shared.cell_h;
    const int64_t terms = rounded ? in_blocks(gates) : gates;
    gradient.w_ih[d] = plan.input_parts ? scratch.rounded(part_panel(gates, padded(forward.I) / 16))
                                        : operand(layer.d_x ? padded(forward.I) * terms : 0);
    for (int member = 0; member < plan.members; ++member) {
      if (member == 0 || !plan.split_units) {
        shared.d_state = scratch.take(rows * Rp);
        shared.d_c = scratch.take(states_per_unit(forward) == 2 ? rows * Hp : 0);
      }
      shared.team.member = member;
      if (sweeps) sweeps[d][member] = shared;
    }
  }
  const int64_t of_h = R > forward.H ? R : forward.H, widest = forward.I > of_h ? forward.I : of_h;
  const int64_t widths = padded(forward.I) + Rp + (forward.P ? Hp : 0);
  gradient.panels = plan.weight_parts ? scratch.rounded(2 * part_panel(kSumRows, widths / 16))
                                      : operand(2 * (rounded ? kBlockSumRows : kSumRows) * widths);
  for (int thread = 0; thread < plan.threads; ++thread) {
    gradient.team.member = thread;
    gradient.strip = plan.weight_parts ? scratch.rounded(kStripColumns * part_row(kSumRows))
                                       : operand(rounded ? kBlockStripElements : kStripElements);
    gradient.d_gates_parts = plan.input_parts ? scratch.rounded(kPartInputRows * part_row(kPartChain)) : nullptr;
    const int64_t wide = input_block_rows(gates, sizeof(float));
    const bool narrows = forward.conversion && layer.d_x;
    gradient.wide_d_x = scratch.take(narrows ? (wide < forward.N ? wide : forward.N) * forward.I : 0);
    gradient.sums = scratch.take(kStripColumns + 16);
    const bool in_one_pass = layer.narrowing && forward.N <= sum_rows(rounded);
    gradient.strip_sums = scratch.take(in_one_pass ? kStripColumns * widest : 0);
    if (gradients) gradients[thread] = gradient;
  }
}

// Whether a call walks the panels of its weights downwards at its first step: where the call before with the same
// weights left off, whose last panels may still be in the caches. A bit of this thread's for each of 64 classes of
// addresses; weights that share one may find their panels in any order, as they would without.
bool begins_downwards(const DirectionForward& direction, int64_t steps) {
  static thread_local uint64_t downwards = 0;
  const void* const weights = direction.packed ? direction.packed->w_hh : direction.w_hh;
  const int bit = static_cast<int>(reinterpret_cast<uintptr_t>(weights) * 0x9E3779B97F4A7C15 >> 58);
  const bool down = (downwards >> bit & 1) != 0;
  downwards ^= static_cast<uint64_t>(steps & 1) << bit;
  return down;
}

size_t element(const LayerForward& layer) { return layer.is_double ? 8 : 4; }

// downwards: of each direction, as ForwardTask has it.
void forward_with(const LayerForward& layer, const Plan& plan, const bool (&downwards)[2], void* memory) {
  Scratch scratch(memory, element(layer));
  static thread_local ForwardTask tasks[2][kMostThreads];
  ForwardTask(*shared)[kMostThreads] = tasks;  // the caller's, for every thread of the region
  lay_out(layer, plan, scratch, shared);
  for (int d = 0; d < layer.D; ++d) {
    for (int member = 0; member < plan.members; ++member) shared[d][member].downwards = downwards[d];
  }
  const auto run = plan.kernels->forward[static_cast<int>(layer.cell)];
  run_region(
      plan.threads,
      [&](int thread) {
        if (plan.together) {
          run(shared[thread / plan.members][thread % plan.members]);
          return;
        }
        for (int d = 0; d < layer.D; ++d) run(shared[d][thread]);
      },
      [&] { forward_with(layer, serial_plan(plan), downwards, memory); });
}

void backward_with(const LayerBackward& layer, const Plan& plan, void* memory) {
  Scratch scratch(memory, element(layer.forward));
  static thread_local BackwardTask sweeps[2][kMostThreads];
  static thread_local GradientTask gradients[kMostThreads];
  BackwardTask(*sweep_tasks)[kMostThreads] = sweeps;
  GradientTask* gradient_tasks = gradients;
  lay_out(layer, plan, scratch, sweep_tasks, gradient_tasks);
  const auto sweep = plan.kernels->backward[static_cast<int>(layer.forward.cell)];
  const auto products = plan.kernels->gradients[static_cast<int>(layer.forward.cell)];
  run_region(
      plan.threads,
      [&](int thread) {
        if (plan.together) {
          sweep(sweep_tasks[thread / plan.members][thread % plan.members]);
        } else {
          for (int d = 0; d < layer.forward.D; ++d) sweep(sweep_tasks[d][thread]);
        }
        wait(gradient_tasks[thread].team);
        products(gradient_tasks[thread]);
      },
      [&] { backward_with(layer, serial_plan(plan), memory); });
}

}  // namespace

// The scratch covers the plan and that of one thread, which takes its place if the runtime grants fewer.
Plan plan_forward(const LayerForward& layer, int threads) {
  const Kernels& kernels = kernels_for(layer);
  Plan plan = choose(layer, kernels, threads, false);
  plan.input_parts = input_parts(layer, kernels);
  Scratch planned(nullptr, element(layer)), serial(nullptr, element(layer));
  lay_out(layer, plan, planned, nullptr);
  if (plan.threads > 1) lay_out(layer, serial_plan(plan), serial, nullptr);
  plan.scratch_bytes = planned.used() > serial.used() ? planned.used() : serial.used();
  return plan;
}

Plan plan_backward(const LayerBackward& layer, int threads) {
  const Kernels& kernels = kernels_for(layer.forward);
  Plan plan = choose(layer.forward, kernels, threads, true);
  plan.input_parts = layer.d_x ? input_gradient_parts(layer.forward, kernels) : nullptr;
  plan.weight_parts = weight_parts(layer.forward, kernels);
  Scratch planned(nullptr, element(layer.forward)), serial(nullptr, element(layer.forward));
  lay_out(layer, plan, planned, nullptr, nullptr);
  if (plan.threads > 1) lay_out(layer, serial_plan(plan), serial, nullptr, nullptr);
  plan.scratch_bytes = planned.used() > serial.used() ? planned.used() : serial.used();
  return plan;
}

void run_forward(const LayerForward& layer, const Plan& plan, void* scratch) {
  bool downwards[2] = {};
  for (int d = 0; d < layer.D; ++d) downwards[d] = begins_downwards(layer.direction[d], layer.T);
  forward_with(layer, plan, downwards, scratch);
}

void run_backward(const LayerBackward& layer, const Plan& plan, void* scratch) { backward_with(layer, plan, scratch); }

size_t packed_bytes(const LayerForward& layer, const PackedWeights* like) {
  Scratch counted(nullptr, element(layer));
  room_for_weights(layer, like ? like->parts : input_parts(layer, kernels_for(layer)), counted);
  return counted.used();
}

PackedWeights pack_weights(const LayerForward& layer, int direction, const PackedWeights* like, void* memory) {
  Scratch scratch(memory, element(layer));
  PackedWeights packed = room_for_weights(layer, like ? like->parts : input_parts(layer, kernels_for(layer)), scratch);
  packed.kernels = like ? like->kernels : &kernels_for(layer);
  packed.is_bfloat16 = layer.is_bfloat16;
  packed.kernels->pack[static_cast<int>(layer.cell)](layer, direction, packed);
  return packed;
}

void activate(Activation which, bool is_double, bool rounded, const void* x, void* y, int64_t n) {
  const Isa& isa = chosen_isa();
  (is_double ? isa.of_double : rounded && isa.of_bfloat16 ? isa.of_bfloat16 : isa.of_float)->activation(which, x, y, n);
}

}  // namespace cpu
}  // namespace fastrnn
