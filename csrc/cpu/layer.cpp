// SPDX-License-Identifier: BSD-3-Clause
// Tensors -> pointers on the CPU: fills LayerForward and LayerBackward, allocates results and scratch, runs the
// kernels. doors.h calls it with checked arguments and with autograd and every other dispatch layer switched off.
#include "layer.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "../arguments.h"
#include "kernels.h"
#include "operands.h"

namespace fastrnn {
namespace cpu {
namespace {

constexpr size_t kAlignment = 64;

void* aligned(void* memory) {
  const auto address = reinterpret_cast<uintptr_t>(memory);
  return reinterpret_cast<void*>((address + kAlignment - 1) / kAlignment * kAlignment);
}

// The scratch of a thread, kept from call to call: memory fresh from the system costs 1.5 us for each page of 4 KB on a
// virtual machine, 15 ms for the 40 MB of a large layer.
class Kept {
 public:
  Kept() = default;
  Kept(const Kept&) = delete;
  Kept& operator=(const Kept&) = delete;
  ~Kept() { std::free(memory_); }
  // Null if the system has none.
  void* at_least(size_t bytes) {
    if (bytes > bytes_) {
      std::free(memory_);
      bytes_ = (bytes + kAlignment - 1) / kAlignment * kAlignment;
      memory_ = std::aligned_alloc(kAlignment, bytes_);
      if (memory_ == nullptr) bytes_ = 0;
    }
    return memory_;
  }

 private:
  void* memory_ = nullptr;
  size_t bytes_ = 0;
};

// One for both passes: with one for each, GRU and RNN of H >= 1024 took up to 5 % more than torch.nn at their peak.
Kept& kept_scratch() {
  static thread_local Kept kept;
  return kept;
}

// Calls run(scratch) with `bytes` of uninitialised memory, 64-byte aligned: on the stack where little is needed, kept
// by the thread up to kMostKept, beyond that allocated for this call.
template <class Run>
void with_scratch(size_t bytes, Run run) {
  constexpr size_t kSmall = 16384, kMostKept = size_t{64} << 20;
  if (bytes <= kSmall) {
    alignas(kAlignment) char memory[kSmall];
    return run(memory);
  }
  if (bytes <= kMostKept) {
    if (void* const memory = kept_scratch().at_least(bytes)) return run(memory);
  }
  const Tensor memory = empty({static_cast<int64_t>(bytes + kAlignment)}, at::kByte);
  run(aligned(memory.mutable_data_ptr()));
}

// How elements of 16 bits reach the kernels. Products in parts want whole arrays of floats.
Operands::Elements elements(const LayerArguments& a) {
  const at::ScalarType given = a.x->scalar_type();
  if (given != at::kHalf && given != at::kBFloat16) return Operands::Elements::whole;
  if (a.own == nullptr && given == at::kBFloat16 && multiplies_bfloat16()) return Operands::Elements::rounded;
  return multiplies_in_parts() ? Operands::Elements::whole : Operands::Elements::converted;
}

// Writes zeros into the rows of an array [D, T, B, row_bytes] that lie past the ends of their sequences.
void clear_padding(void* data, const Sizes& s, int64_t directions, int64_t row_bytes) {
  char* rows = static_cast<char*>(data);
  for (int64_t d = 0; rows != nullptr && d < directions; ++d, rows += s.T * s.B * row_bytes) {
    for (int64_t b = 0; b < s.B; ++b) {
      for (int64_t t = s.lengths[b]; t < s.T; ++t) {
        std::memset(rows + (t * s.B + b) * row_bytes, 0, static_cast<size_t>(row_bytes));
      }
    }
  }
}

// Sequences of no step: `to` [D, B, row_bytes] becomes there what `from` is, or zero where that is null.
void pass_on_state(void* to, const void* from, const Sizes& s, int64_t row_bytes) {
  for (int64_t row = 0; to != nullptr && row < s.D * s.B; ++row) {
    if (s.lengths[row % s.B] != 0) continue;
    char* const place = static_cast<char*>(to) + row * row_bytes;
    if (from != nullptr) {
      std::memcpy(place, static_cast<const char*>(from) + row * row_bytes, static_cast<size_t>(row_bytes));
    } else {
      std::memset(place, 0, static_cast<size_t>(row_bytes));
    }
  }
}

// y has the shape of x with features [D*R].
Tensor empty_y(const Sizes& s, at::ScalarType type) {
  return s.batch_sizes == nullptr ? empty({s.T, s.B, s.D * s.R}, type) : empty({s.N, s.D * s.R}, type);
}

// A gradient, and where the kernels write it: in its place, or where it waits for being converted.
struct Gradient {
  Tensor made;              // [0] when it is not wanted
  void* written = nullptr;  // null when it is not wanted
  bool converts = false;

  Gradient() = default;
  // `type`: what the kernels write; `filled`: they do, else it is zero.
  Gradient(const Tensor* of, bool wanted, Operands& operands, bool filled, at::ScalarType type) {
    if (of == nullptr || !wanted) {
      made = nothing(operands.given());
      return;
    }
    made = empty(of->sizes(), operands.given());
    converts = type != operands.given();
    written = converts ? operands.room(made.numel()) : made.mutable_data_ptr();
    const int64_t bytes = made.numel() * (converts ? operands.bytes() : static_cast<int64_t>(made.element_size()));
    if (!filled && bytes > 0) std::memset(written, 0, static_cast<size_t>(bytes));
  }

  // That of a weight, which the kernels narrow themselves; `summed`: after sums of all its elements.
  static Gradient of_weight(const Tensor* of, bool wanted, Operands& operands, bool filled, bool summed,
                            WeightGradient& place) {
    if (!wanted || of == nullptr || operands.type() == operands.given()) {
      Gradient gradient(of, wanted, operands, filled, operands.type());
      place = WeightGradient{gradient.written, nullptr};
      return gradient;
    }
    Gradient gradient;
    gradient.made = empty(of->sizes(), operands.given());
    place = WeightGradient{summed ? operands.room(gradient.made.numel()) : nullptr,
                           static_cast<uint16_t*>(gradient.made.mutable_data_ptr())};
    if (!filled) gradient.made.zero_();
    return gradient;
  }

  Tensor finished(const Operands& operands) {
    if (converts) operands.narrow_to(made, written);
    return std::move(made);
  }
};

// Fills in what the backward pass reads, and runs it; `layer` says which gradients of x and of weights are wanted.
void run(LayerBackward& layer, const BackwardArguments& b, const Sizes& s, Operands& operands, void* d_h0, void* d_c0) {
  layer.forward = operands.layer(b.layer, s);
  layer.forward.y =
      const_cast<void*>(operands.dense(b.y, operands.element()));  // read only in this pass, as gates and cells
  void* const gates = const_cast<void*>(operands.dense(b.gates));
  void* const cells = const_cast<void*>(operands.dense(b.cells));
  layer.d_y = operands.dense(b.d_y, operands.element());
  const void* const d_cells = operands.dense(b.d_cells);
  const void* const d_h_n = operands.dense(b.d_h_n);
  const void* const d_c_n = operands.dense(b.d_c_n);
  const int64_t h_bytes = s.B * s.R * operands.bytes(), c_bytes = s.B * s.H * operands.bytes();
  for (int64_t d = 0; d < s.D; ++d) {
    layer.forward.direction[d].gates = slice(gates, d, s.N * saved_per_unit(b.layer) * padded(s.H) * operands.bytes());
    layer.forward.direction[d].cells = slice(cells, d, s.N * s.H * operands.bytes());
    DirectionBackward& direction = layer.direction[d];
    direction.d_h_n = slice(d_h_n, d, h_bytes);
    direction.d_c_n = slice(d_c_n, d, c_bytes);
    direction.d_cells = slice(d_cells, d, s.N * s.H * operands.bytes());
    direction.d_h0 = slice(d_h0, d, h_bytes);
    direction.d_c0 = slice(d_c0, d, c_bytes);
  }
  const Plan plan = plan_backward(layer, at::get_num_threads());
  with_scratch(plan.scratch_bytes, [&](void* scratch) { run_backward(layer, plan, scratch); });
}

}  // namespace

LayerResults layer_forward(const LayerArguments& a, const Sizes& s, bool save, LayerResults given) {
  Operands operands(a.x->scalar_type(), elements(a));
  const at::ScalarType type = operands.type();
  const bool two_states = states_per_unit(a) == 2;
  const int64_t saved = saved_per_unit(a) * padded(s.H);

  LayerResults results;
  results.y = empty_y(s, operands.given());
  results.h_n = given.h_n.defined() ? given.h_n : empty({s.D, s.B, s.R}, operands.given());
  if (two_states) results.c_n = given.c_n.defined() ? given.c_n : empty({s.D, s.B, s.H}, operands.given());
  // Where the kernels write a result: where it is, or where it waits for being converted. Gates and cells are theirs.
  const auto place = [&](const Tensor& result, at::ScalarType written) -> void* {
    if (!result.defined()) return nullptr;
    return written == operands.given() ? result.mutable_data_ptr() : operands.room(result.numel());
  };
  if (save && saved != 0) results.gates = empty({s.D, s.N, saved}, type);
  if (save && two_states) results.cells = empty({s.D, s.N, s.H}, type);

  if (s.B > 0) {
    LayerForward layer = operands.layer(a, s);
    layer.y = place(results.y, operands.element());
    void* const h_n = place(results.h_n, type);
    void* const c_n = place(results.c_n, type);
    void* const gates = save && saved != 0 ? results.gates.mutable_data_ptr() : nullptr;
    void* const cells = save && two_states ? results.cells.mutable_data_ptr() : nullptr;
    for (int64_t d = 0; d < s.D; ++d) {
      DirectionForward& direction = layer.direction[d];
      direction.h_n = slice(h_n, d, s.B * s.R * operands.bytes());
      direction.c_n = slice(c_n, d, s.B * s.H * operands.bytes());
      direction.gates = slice(gates, d, s.N * saved * operands.bytes());
      direction.cells = slice(cells, d, s.N * s.H * operands.bytes());
    }
    if (s.lengths != nullptr) {
      clear_padding(layer.y, s, 1, s.D * s.R * operands.element_bytes());
      clear_padding(gates, s, s.D, saved * operands.bytes());
      clear_padding(cells, s, s.D, s.H * operands.bytes());
      pass_on_state(h_n, operands.dense(a.h0), s, s.R * operands.bytes());
      pass_on_state(c_n, layer.direction[0].c0, s, s.H * operands.bytes());
    }
    if (layer.N > 0) {
      const Plan plan = plan_forward(layer, at::get_num_threads());
      for (int64_t d = 0; d < s.D; ++d) {
        const PackedWeights* const packed = layer.direction[d].packed;
        TORCH_CHECK(packed == nullptr || (packed->kernels == plan.kernels && packed->parts == plan.input_parts),
                    "fastrnn.prepacked: another instruction set was chosen inside the block");
      }
      with_scratch(plan.scratch_bytes, [&](void* scratch) { run_forward(layer, plan, scratch); });
    }
    if (operands.element() != operands.given()) operands.narrow_to(results.y, layer.y);
    if (type != operands.given()) {
      operands.narrow_to(results.h_n, h_n);
      if (two_states) operands.narrow_to(results.c_n, c_n);
    }
  }
  return results;
}

PackedLayer pack_layer(const LayerArguments& a, const Sizes& s, const PackedWeights* like) {
  // Another instruction set may have been chosen since `like` was packed.
  const auto as_like = like && like->is_bfloat16 ? Operands::Elements::rounded : Operands::Elements::whole;
  Operands operands(a.x->scalar_type(), like ? as_like : elements(a));
  const LayerForward layer = operands.layer(a, s);
  PackedLayer packed{};
  const size_t bytes = packed_bytes(layer, like) + kAlignment;
  for (int64_t d = 0; d < s.D; ++d) {
    packed.memory[d] = empty({static_cast<int64_t>(bytes)}, at::kByte);
    void* const memory = packed.memory[d].mutable_data_ptr();
    std::memset(memory, 0, bytes);
    packed.direction[d] = pack_weights(layer, static_cast<int>(d), like, aligned(memory));
  }
  return packed;
}

Gradients layer_backward(const BackwardArguments& b, const Sizes& s) {
  const LayerArguments& a = b.layer;
  Operands operands(a.x->scalar_type(), elements(a));
  const bool runs = s.B > 0 && (s.lengths == nullptr ||
                                std::any_of(s.lengths, s.lengths + s.B, [](int64_t length) { return length > 0; }));
  LayerBackward layer{};

  c10::SmallVector<Gradient, kMaxGradients> made;
  // The next gradient of the schema, that of `tensor`: where the kernels write it, null when it is not wanted.
  const auto next = [&](const Tensor* tensor, bool filled) {
    const bool wanted = (b.needs >> made.size() & 1) != 0;
    const at::ScalarType type = made.empty() ? operands.element() : operands.type();
    return made.emplace_back(tensor, wanted, operands, filled, type).written;
  };
  const bool summed = s.N > sum_rows(elements(a) == Operands::Elements::rounded);
  const auto next_weight = [&](const Tensor* tensor, WeightGradient& place) {
    const bool wanted = (b.needs >> made.size() & 1) != 0;
    made.push_back(Gradient::of_weight(tensor, wanted, operands, runs, summed, place));
  };
  const bool two_states = states_per_unit(a) == 2;
  if (operands.type() != operands.given()) layer.narrowing = &conversion(operands.given());
  layer.d_x = next(a.x, runs);
  void* const d_h0 = next(a.h0, runs);
  void* const d_c0 = two_states ? next(a.c0, runs) : nullptr;
  for (int64_t d = 0; d < 2; ++d) {
    const Weights& w = a.weights[d];
    DirectionBackward& direction = layer.direction[d];
    next_weight(w.w_ih, direction.d_w_ih);
    next_weight(w.w_hh, direction.d_w_hh);
    direction.d_b_ih = next(w.b_ih, runs);
    direction.d_b_hh = next(w.b_hh, runs);
    if (a.cell == Cell::lstm) next_weight(w.w_hr, direction.d_w_hr);
    direction.d_parameters = a.own != nullptr && a.own->parameters != 0 ? next(w.parameters, runs) : nullptr;
  }
  void* const d_reset_h = next(a.reset_h, false);  // added to
  void* const d_reset_c = two_states ? next(a.reset_c, false) : nullptr;
  const int64_t h_bytes = s.B * s.R * operands.bytes(), c_bytes = s.B * s.H * operands.bytes();
  for (int64_t d = 0; d < s.D; ++d) {
    layer.direction[d].d_reset_h = slice(d_reset_h, d, h_bytes);
    layer.direction[d].d_reset_c = slice(d_reset_c, d, c_bytes);
  }
  if (s.lengths != nullptr) {
    pass_on_state(d_h0, operands.dense(b.d_h_n), s, s.R * operands.bytes());
    pass_on_state(d_c0, operands.dense(b.d_c_n), s, s.H * operands.bytes());
    clear_padding(layer.d_x, s, 1, s.I * operands.element_bytes());
  }
  if (runs) run(layer, b, s, operands, d_h0, d_c0);
  Gradients gradients;
  for (size_t k = 0; k < made.size(); ++k) gradients[k] = made[k].finished(operands);
  return gradients;
}

RowGradients layer_row_gradients(const BackwardArguments& b, const Sizes& s) {
  const LayerArguments& a = b.layer;
  Operands operands(a.x->scalar_type(), Operands::Elements::whole);
  const int64_t stored = stored_per_unit(a.cell) * s.H;
  const bool lstm = a.cell == Cell::lstm;
  const auto wanted = [&](int position) { return (b.needs >> position & 1) != 0; };

  RowGradients rows;
  Gradient d_x(a.x, wanted(0), operands, s.B > 0, operands.type());
  Gradient d_h0(a.h0, wanted(1), operands, s.B > 0, operands.type());
  Gradient d_c0(lstm ? a.c0 : nullptr, lstm && wanted(2), operands, s.B > 0, operands.type());
  rows.d_gates = empty({s.D, s.N, stored}, operands.type());
  if (lstm) rows.d_h = s.P ? empty({s.D, s.N, s.P}, operands.type()) : nothing(operands.type());
  if (s.B > 0) {
    LayerBackward layer{};
    layer.d_x = d_x.written;
    for (int64_t d = 0; d < s.D; ++d) {
      DirectionBackward& direction = layer.direction[d];
      direction.d_gates = slice(rows.d_gates.mutable_data_ptr(), d, s.N * stored * operands.bytes());
      if (s.P) direction.d_h = slice(rows.d_h.mutable_data_ptr(), d, s.N * s.P * operands.bytes());
    }
    run(layer, b, s, operands, d_h0.written, d_c0.written);
  }
  rows.d_x = d_x.finished(operands);
  rows.d_h0 = d_h0.finished(operands);
  if (lstm) rows.d_c0 = d_c0.finished(operands);
  return rows;
}

}  // namespace cpu
}  // namespace fastrnn
