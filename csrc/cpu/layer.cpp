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
      direction.packed = w.packed;
      if (w.packed == nullptr) {
        direction.w_ih = dense(w.w_ih);
        direction.w_hh = dense(w.w_hh);
        direction.b_ih = dense(w.b_ih);
        direction.b_hh = dense(w.b_hh);
        direction.w_hr = dense(w.w_hr);
      }
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

}  // namespace

LayerResults layer_forward(const LayerArguments& a, const Sizes& s, bool save, LayerResults given) {
  Operands operands(a.x->scalar_type());
  const at::ScalarType type = operands.type();
  const bool lstm = a.cell == Cell::lstm;
  const int64_t saved = saved_per_unit(a.cell) * padded(s.H);

  LayerResults results;
  const bool converted = operands.given() != type;
  results.y = empty_y(s, type);
  results.h_n = given.h_n.defined() && !converted ? given.h_n : empty({s.D, s.B, s.R}, type);
  if (lstm) results.c_n = given.c_n.defined() && !converted ? given.c_n : empty({s.D, s.B, s.H}, type);
  if (save && saved != 0) results.gates = empty({s.D, s.N, saved}, type);
  if (save && lstm) results.cells = empty({s.D, s.N, s.H}, type);

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
    for (int64_t d = 0; d < s.D; ++d) {
      TORCH_CHECK(layer.direction[d].packed == nullptr || layer.direction[d].packed->kernels == plan.kernels,
                  "fastrnn.prepacked: another instruction set was chosen inside the block");
    }
    with_scratch(plan.scratch_bytes, [&](void* scratch) { run_forward(layer, plan, scratch); });
  }
  if (converted) {  // gates and cells keep the type of the kernels
    const auto back = [&](Tensor& result, const Tensor& place) {
      result = place.defined() ? place.copy_(result) : result.to(operands.given());
    };
    back(results.y, given.y);
    back(results.h_n, given.h_n);
    if (lstm) back(results.c_n, given.c_n);
  }
  return results;
}

PackedLayer pack_layer(const LayerArguments& a, const Sizes& s, const Kernels* kernels) {
  Operands operands(a.x->scalar_type());
  const LayerForward layer = operands.layer(a, s);
  PackedLayer packed{};
  const size_t bytes = packed_bytes(layer) + kAlignment;
  for (int64_t d = 0; d < s.D; ++d) {
    packed.memory[d] = empty({static_cast<int64_t>(bytes)}, at::kByte);
    void* const memory = packed.memory[d].mutable_data_ptr();
    std::memset(memory, 0, bytes);
    packed.direction[d] = pack_weights(layer, static_cast<int>(d), kernels, aligned(memory));
  }
  return packed;
}

Gradients layer_backward(const BackwardArguments& b, const Sizes& s) {
  const LayerArguments& a = b.layer;
  Operands operands(a.x->scalar_type());
  const bool run = s.B > 0;
  LayerBackward layer{};

  Gradients gradients;
  int position = 0;
  // The next gradient of the schema, that of `tensor`: its array, or null when it is not wanted.
  const auto next = [&](const Tensor* tensor) -> void* {
    const bool wanted = tensor != nullptr && (b.needs >> position & 1) != 0;
    Tensor& gradient = gradients[position++];
    gradient = wanted ? empty(tensor->sizes(), operands.type()) : nothing(operands.given());
    if (!wanted) return nullptr;
    void* const data = gradient.mutable_data_ptr();
    if (!run && data != nullptr) std::memset(data, 0, gradient.nbytes());
    return data;
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

  if (run) {
    layer.forward = operands.layer(a, s);
    layer.forward.y = const_cast<void*>(operands.dense(b.y));  // read only in this pass, as gates and cells
    void* const gates = const_cast<void*>(operands.dense(b.gates));
    void* const cells = const_cast<void*>(operands.dense(b.cells));
    layer.d_y = operands.dense(b.d_y);
    const void* const d_h_n = operands.dense(b.d_h_n);
    const void* const d_c_n = operands.dense(b.d_c_n);
    const int64_t h_bytes = s.B * s.R * operands.bytes(), c_bytes = s.B * s.H * operands.bytes();
    for (int64_t d = 0; d < s.D; ++d) {
      layer.forward.direction[d].gates = slice(gates, d, s.N * saved_per_unit(a.cell) * padded(s.H) * operands.bytes());
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
  if (operands.given() != operands.type()) {
    for (int k = 0; k < gradient_count(a.cell); ++k) gradients[k] = gradients[k].to(operands.given());
  }
  return gradients;
}

}  // namespace cpu
}  // namespace fastrnn
