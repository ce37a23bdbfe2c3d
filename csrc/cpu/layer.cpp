// SPDX-License-Identifier: BSD-3-Clause
// Tensors -> pointers on the CPU: fills LayerForward and LayerBackward, allocates results and scratch, runs the
// kernels. ops.cpp calls it with checked arguments and with autograd and every other dispatch layer switched off.
#include "layer.h"

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <c10/util/SmallVector.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "../arguments.h"

namespace fastrnn {
namespace cpu {
namespace {

using at::IntArrayRef;

// Not through the dispatcher, which takes longer than the allocation itself.
Tensor empty(IntArrayRef sizes, at::ScalarType type) { return Tensor(at::detail::empty_cpu(sizes, type)); }

Tensor nothing(at::ScalarType type) { return empty({0}, type); }

// An array [D, ...] or null, split by direction.
const void* slice(const void* data, int64_t direction, int64_t bytes) {
  return data == nullptr ? nullptr : static_cast<const char*>(data) + direction * bytes;
}
void* slice(void* data, int64_t direction, int64_t bytes) {
  return data == nullptr ? nullptr : static_cast<char*>(data) + direction * bytes;
}

constexpr size_t kAlignment = 64;

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
    static thread_local Kept kept;
    if (void* const memory = kept.at_least(bytes)) return run(memory);
  }
  const Tensor memory = empty({static_cast<int64_t>(bytes + kAlignment)}, at::kByte);
  const auto address = reinterpret_cast<uintptr_t>(memory.mutable_data_ptr());
  run(reinterpret_cast<void*>((address + kAlignment - 1) / kAlignment * kAlignment));
}

// The tensors of one call as the kernels read them: element type float or double, row-major.
class Operands {
 public:
  explicit Operands(at::ScalarType given)
      : given_(given), type_(given == at::kDouble ? at::kDouble : at::kFloat), bytes_(type_ == at::kDouble ? 8 : 4) {}

  // The type of the kernels, of gates and of cells; the type of every other tensor.
  at::ScalarType type() const { return type_; }
  at::ScalarType given() const { return given_; }
  int64_t bytes() const { return bytes_; }

  const void* dense(const Tensor* tensor) {
    if (tensor == nullptr) return nullptr;
    return readable(*tensor) && tensor->is_contiguous() ? tensor->const_data_ptr() : convert(*tensor).const_data_ptr();
  }

  // Everything that the forward pass reads; both passes start here.
  LayerForward layer(const LayerArguments& a, const Sizes& s) {
    LayerForward layer{};
    layer.cell = a.cell;
    layer.is_double = type_ == at::kDouble;
    layer.T = s.T, layer.B = s.B, layer.I = s.I, layer.H = s.H, layer.P = s.P, layer.D = s.D, layer.N = s.N;
    layer.batch_sizes = s.batch_sizes;
    input(layer, *a.x);
    const void* const h0 = dense(a.h0);
    const void* const c0 = dense(a.c0);
    for (int64_t d = 0; d < s.D; ++d) {
      const Weights& w = a.weights[d];
      DirectionForward& direction = layer.direction[d];
      direction.w_ih = dense(w.w_ih);
      direction.w_hh = dense(w.w_hh);
      direction.b_ih = dense(w.b_ih);
      direction.b_hh = dense(w.b_hh);
      direction.w_hr = dense(w.w_hr);
      direction.h0 = slice(h0, d, s.B * s.R * bytes_);
      direction.c0 = slice(c0, d, s.B * s.H * bytes_);
    }
    return layer;
  }

 private:
  bool readable(const Tensor& tensor) const {
    constexpr c10::DispatchKeySet kLazy{c10::DispatchKey::Negative, c10::DispatchKey::ZeroTensor};
    return tensor.scalar_type() == type_ && !tensor.key_set().has_any(kLazy);
  }

  // x is read through its strides when its features are adjacent, so that batch_first views are not copied.
  void input(LayerForward& layer, const Tensor& x) {
    const bool adjacent = x.stride(-1) == 1 || x.size(-1) == 1;
    const Tensor& read = readable(x) && adjacent ? x : convert(x);
    layer.x = read.const_data_ptr();
    layer.x_stride_b = read.stride(-2);
    layer.x_stride_t = read.dim() == 3 ? read.stride(0) : 0;
  }

  const Tensor& convert(const Tensor& tensor) {
    Tensor copy = empty(tensor.sizes(), type_);
    copy.copy_(tensor);
    copies_.push_back(std::move(copy));
    return copies_.back();
  }

  at::ScalarType given_, type_;
  int64_t bytes_;
  c10::SmallVector<Tensor, 4> copies_;  // keeps converted tensors alive until the kernels are done
};

// y has the shape of x with features [D*R].
Tensor empty_y(const Sizes& s, at::ScalarType type) {
  return s.batch_sizes == nullptr ? empty({s.T, s.B, s.D * s.R}, type) : empty({s.N, s.D * s.R}, type);
}

// A gradient in the type of the kernels: [0] in the given type when it is not wanted, zeros when the batch is empty.
Tensor gradient(const Tensor* of, bool wanted, const Operands& operands, bool run) {
  if (of == nullptr || !wanted) return nothing(operands.given());
  Tensor made = empty(of->sizes(), operands.type());
  if (!run && made.numel() > 0) std::memset(made.mutable_data_ptr(), 0, made.nbytes());
  return made;
}

// Where the kernels write a gradient, null when it is not wanted.
void* place(const Tensor& gradient, const Tensor* of, bool wanted) {
  return of != nullptr && wanted ? gradient.mutable_data_ptr() : nullptr;
}

// Fills in what the backward pass reads, and runs it; `layer` says which gradients of x and of weights are wanted.
void run(LayerBackward& layer, const BackwardArguments& b, const Sizes& s, Operands& operands, void* d_h0, void* d_c0) {
  const Cell cell = b.layer.cell;
  layer.forward = operands.layer(b.layer, s);
  layer.forward.y = const_cast<void*>(operands.dense(b.y));  // read only in this pass, as gates and cells
  void* const gates = const_cast<void*>(operands.dense(b.gates));
  void* const cells = const_cast<void*>(operands.dense(b.cells));
  layer.d_y = operands.dense(b.d_y);
  const void* const d_h_n = operands.dense(b.d_h_n);
  const void* const d_c_n = operands.dense(b.d_c_n);
  const int64_t h_bytes = s.B * s.R * operands.bytes(), c_bytes = s.B * s.H * operands.bytes();
  for (int64_t d = 0; d < s.D; ++d) {
    layer.forward.direction[d].gates = slice(gates, d, s.N * saved_per_unit(cell) * padded(s.H) * operands.bytes());
    layer.forward.direction[d].cells = slice(cells, d, s.N * s.H * operands.bytes());
    DirectionBackward& direction = layer.direction[d];
    direction.d_h_n = slice(d_h_n, d, h_bytes);
    direction.d_c_n = slice(d_c_n, d, c_bytes);
    direction.d_h0 = slice(d_h0, d, h_bytes);
    direction.d_c0 = slice(d_c0, d, c_bytes);
  }
  const Plan plan = plan_backward(layer, at::get_num_threads());
  with_scratch(plan.scratch_bytes, [&](void* scratch) { run_backward(layer, plan, scratch); });
}

}  // namespace

LayerResults layer_forward(const LayerArguments& a, const Sizes& s, bool save) {
  Operands operands(a.x->scalar_type());
  const at::ScalarType type = operands.type();
  const bool lstm = a.cell == Cell::lstm;
  const int64_t saved = saved_per_unit(a.cell) * padded(s.H);

  LayerResults results;
  results.y = empty_y(s, type);
  results.h_n = empty({s.D, s.B, s.R}, type);
  if (lstm) results.c_n = empty({s.D, s.B, s.H}, type);
  if (saved != 0) results.gates = save ? empty({s.D, s.N, saved}, type) : nothing(type);
  if (lstm) results.cells = save ? empty({s.D, s.N, s.H}, type) : nothing(type);

  if (s.B > 0) {
    LayerForward layer = operands.layer(a, s);
    layer.y = results.y.mutable_data_ptr();
    void* const h_n = results.h_n.mutable_data_ptr();
    void* const c_n = lstm ? results.c_n.mutable_data_ptr() : nullptr;
    void* const gates = save && saved != 0 ? results.gates.mutable_data_ptr() : nullptr;
    void* const cells = save && lstm ? results.cells.mutable_data_ptr() : nullptr;
    for (int64_t d = 0; d < s.D; ++d) {
      DirectionForward& direction = layer.direction[d];
      direction.h_n = slice(h_n, d, s.B * s.R * operands.bytes());
      direction.c_n = slice(c_n, d, s.B * s.H * operands.bytes());
      direction.gates = slice(gates, d, s.N * saved * operands.bytes());
      direction.cells = slice(cells, d, s.N * s.H * operands.bytes());
    }
    const Plan plan = plan_forward(layer, at::get_num_threads());
    with_scratch(plan.scratch_bytes, [&](void* scratch) { run_forward(layer, plan, scratch); });
  }
  if (operands.given() != type) {  // gates and cells keep the type of the kernels
    results.y = results.y.to(operands.given());
    results.h_n = results.h_n.to(operands.given());
    if (lstm) results.c_n = results.c_n.to(operands.given());
  }
  return results;
}

Gradients layer_backward(const BackwardArguments& b, const Sizes& s) {
  const LayerArguments& a = b.layer;
  Operands operands(a.x->scalar_type());
  LayerBackward layer{};

  Gradients gradients;
  int position = 0;
  // The next gradient of the schema, that of `tensor`: its array, or null when it is not wanted.
  const auto next = [&](const Tensor* tensor) {
    const bool wanted = (b.needs >> position & 1) != 0;
    gradients[position] = gradient(tensor, wanted, operands, s.B > 0);
    return place(gradients[position++], tensor, wanted);
  };
  const bool lstm = a.cell == Cell::lstm;
  layer.d_x = next(a.x);
  void* const d_h0 = next(a.h0);
  void* const d_c0 = lstm ? next(a.c0) : nullptr;
  for (int64_t d = 0; d < 2; ++d) {
    const Weights& w = a.weights[d];
    DirectionBackward& direction = layer.direction[d];
    direction.d_w_ih = next(w.w_ih);
    direction.d_w_hh = next(w.w_hh);
    direction.d_b_ih = next(w.b_ih);
    direction.d_b_hh = next(w.b_hh);
    direction.d_w_hr = lstm ? next(w.w_hr) : nullptr;
  }
  if (s.B > 0) run(layer, b, s, operands, d_h0, d_c0);
  if (operands.given() != operands.type()) {
    for (int k = 0; k < gradient_count(a.cell); ++k) gradients[k] = gradients[k].to(operands.given());
  }
  return gradients;
}

RowGradients layer_row_gradients(const BackwardArguments& b, const Sizes& s) {
  const LayerArguments& a = b.layer;
  Operands operands(a.x->scalar_type());
  const int64_t stored = stored_per_unit(a.cell) * s.H;
  const bool lstm = a.cell == Cell::lstm;
  const auto wanted = [&](int position) { return (b.needs >> position & 1) != 0; };

  RowGradients rows;
  rows.d_x = gradient(a.x, wanted(0), operands, s.B > 0);
  rows.d_h0 = gradient(a.h0, wanted(1), operands, s.B > 0);
  if (lstm) rows.d_c0 = gradient(a.c0, wanted(2), operands, s.B > 0);
  rows.d_gates = empty({s.D, s.N, stored}, operands.type());
  if (lstm) rows.d_h = s.P ? empty({s.D, s.N, s.P}, operands.type()) : nothing(operands.type());
  if (s.B > 0) {
    LayerBackward layer{};
    layer.d_x = place(rows.d_x, a.x, wanted(0));
    for (int64_t d = 0; d < s.D; ++d) {
      DirectionBackward& direction = layer.direction[d];
      direction.d_gates = slice(rows.d_gates.mutable_data_ptr(), d, s.N * stored * operands.bytes());
      if (s.P) direction.d_h = slice(rows.d_h.mutable_data_ptr(), d, s.N * s.P * operands.bytes());
    }
    run(layer, b, s, operands, place(rows.d_h0, a.h0, wanted(1)), lstm ? place(rows.d_c0, a.c0, wanted(2)) : nullptr);
  }
  if (operands.given() != operands.type()) {
    rows.d_x = rows.d_x.to(operands.given());
    rows.d_h0 = rows.d_h0.to(operands.given());
    if (lstm) rows.d_c0 = rows.d_c0.to(operands.given());
  }
  return rows;
}

}  // namespace cpu
}  // namespace fastrnn
