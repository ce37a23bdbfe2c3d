// SPDX-License-Identifier: BSD-3-Clause
// Tensors -> pointers on CUDA: allocates results and scratch, fills in LayerForward and LayerBackward, runs the sweep.
// All memory is asked for before the loop over time, from torch's allocator, whose blocks belong to the current stream.
#include "layer.h"

#include <ATen/Functions.h>

#include <cstdint>
#include <vector>

#include "sweep.h"

namespace fastrnn {
namespace cuda {
namespace {

Element element_of(at::ScalarType type) {
  switch (type) {
    case at::kDouble:
      return Element::float64;
    case at::kBFloat16:
      return Element::bfloat16;
    case at::kHalf:
      return Element::float16;
    default:
      return Element::float32;
  }
}

// The tensors of one call as the kernels read them: contiguous, row-major, at multiples of 16 bytes.
class Operands {
 public:
  explicit Operands(const Tensor& x)
      : given_(x.options()), sums_(given_.dtype(x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat)) {}

  // Of the tensors; of the math, of gates and of cells.
  const at::TensorOptions& given() const { return given_; }
  const at::TensorOptions& sums() const { return sums_; }

  const void* dense(const Tensor* tensor) {
    if (tensor == nullptr) return nullptr;
    const bool fits = readable(*tensor) && tensor->is_contiguous() && is_aligned(*tensor);
    return fits ? tensor->const_data_ptr() : copy(*tensor).const_data_ptr();
  }

  Spread spread(const Tensor* tensor) {
    if (tensor == nullptr) return Spread{};
    const bool adjacent = tensor->stride(-1) == 1 || tensor->size(-1) == 1;
    const Tensor& read = readable(*tensor) && adjacent && is_aligned(*tensor) ? *tensor : copy(*tensor);
    return Spread{read.const_data_ptr(), read.dim() == 3 ? read.stride(0) : 0, read.stride(-2)};
  }

  void* scratch(at::IntArrayRef sizes, const at::TensorOptions& options) {
    kept_.push_back(at::empty(sizes, options));
    return kept_.back().mutable_data_ptr();
  }

  // The weights of both directions next to each other.
  const void* side_by_side(const Tensor* first, const Tensor* second) {
    if (first == nullptr) return nullptr;
    if (second == nullptr) return dense(first);
    kept_.push_back(at::stack({*first, *second}));
    return kept_.back().const_data_ptr();
  }

  Layer layer(const LayerArguments& a, const Sizes& s) {
    Layer layer{};
    layer.element = element_of(a.x->scalar_type());
    layer.packed = s.batch_sizes != nullptr;
    layer.gates_row = 4 * padded(s.H);
    layer.T = s.T, layer.B = s.B, layer.H = s.H, layer.R = s.R, layer.D = s.D, layer.N = s.N;
    if (s.lengths != nullptr) {  // from pageable memory: the host may go on at once
      lengths_ = s.lengths_owner.to(given_.device(), at::kLong, /*non_blocking=*/true);
    } else if (a.lengths != nullptr && !a.lengths->device().is_cpu()) {
      lengths_ = a.lengths->contiguous();
    }
    if (lengths_.defined()) layer.lengths = lengths_.const_data_ptr<int64_t>();
    if (a.reset != nullptr) {
      kept_.push_back(a.reset->contiguous());
      layer.reset = static_cast<const uint8_t*>(kept_.back().const_data_ptr());
    }
    layer.h0 = dense(a.h0), layer.c0 = dense(a.c0);
    layer.reset_h = dense(a.reset_h), layer.reset_c = dense(a.reset_c);
    layer.h_mask = dense(a.h_mask);
    layer.zoneout_h = spread(a.zoneout_h), layer.zoneout_c = spread(a.zoneout_c);
    return layer;
  }

  cuda::Weights weights(const LayerArguments& a, const Sizes& s) {
    cuda::Weights weights{};
    for (int64_t d = 0; d < s.D; ++d) weights.w_ih[d] = dense(a.weights[d].w_ih);
    weights.w_hh = side_by_side(a.weights[0].w_hh, a.weights[1].w_hh);
    weights.w_hr = side_by_side(a.weights[0].w_hr, a.weights[1].w_hr);
    return weights;
  }

  // x with zeros past the ends of sequences, where there may be anything: NaN times a gradient of zero is NaN.
  const void* x_without_padding(const Tensor& x, const Sizes& s) {
    if (!lengths_.defined()) return dense(&x);
    const Tensor steps = at::arange(s.T, lengths_.options()).unsqueeze(1);
    kept_.push_back(x.masked_fill(steps.ge(lengths_).unsqueeze(2), 0).contiguous());
    return kept_.back().const_data_ptr();
  }

 private:
  static bool readable(const Tensor& tensor) {
    constexpr c10::DispatchKeySet kLazy{c10::DispatchKey::Negative, c10::DispatchKey::ZeroTensor};
    return !tensor.key_set().has_any(kLazy);
  }
  static bool is_aligned(const Tensor& tensor) {
    return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
  }
  const Tensor& copy(const Tensor& tensor) {
    Tensor made = at::empty(tensor.sizes(), given_.dtype(tensor.scalar_type()));
    made.copy_(tensor);
    kept_.push_back(std::move(made));
    return kept_.back();
  }

  at::TensorOptions given_, sums_;
  Tensor lengths_;
  std::vector<Tensor> kept_;  // what is not the caller's, until the work is on the stream
};

Tensor empty_y(const Sizes& s, const at::TensorOptions& options) {
  return s.batch_sizes == nullptr ? at::empty({s.T, s.B, s.D * s.R}, options) : at::empty({s.N, s.D * s.R}, options);
}

void* place(const Tensor& tensor) { return tensor.defined() ? tensor.mutable_data_ptr() : nullptr; }

// Everything that the backward pass reads, and its scratch; the caller adds what is wanted.
LayerBackward layer_of(const BackwardArguments& b, const Sizes& s, Operands& operands) {
  const LayerArguments& a = b.layer;
  const int64_t stored = stored_per_unit(a.cell) * s.H;
  const bool lstm = a.cell == Cell::lstm;
  LayerBackward layer{};
  layer.cell = a.cell;
  layer.I = s.I;
  layer.batch_sizes = s.batch_sizes;
  layer.weights = operands.weights(a, s);
  Backward& step = layer.step;
  step.layer = operands.layer(a, s);
  step.layer.y = const_cast<void*>(operands.dense(b.y));  // read only in this pass, as gates and cells
  step.layer.gates = const_cast<void*>(operands.dense(b.gates));
  step.layer.cells = const_cast<void*>(operands.dense(b.cells));
  step.d_y = operands.dense(b.d_y);
  step.d_h_n = operands.dense(b.d_h_n);
  step.d_c_n = operands.dense(b.d_c_n);
  step.d_cells = operands.dense(b.d_cells);
  step.d_gates = operands.scratch({s.D, s.N, stored}, operands.given());
  step.entered = operands.scratch({s.D, s.N, s.R}, operands.given());
  step.through = operands.scratch({s.D, s.B, s.R}, operands.sums());
  step.d_h = operands.scratch({s.D, s.B, s.R}, operands.sums());
  if (lstm) step.d_c = operands.scratch({s.D, s.B, s.H}, operands.sums());
  if (s.P != 0) {
    step.d_projected = operands.scratch({s.D, s.N, s.R}, operands.given());
    step.unprojected = operands.scratch({s.D, s.N, s.H}, operands.given());
    step.d_unprojected = operands.scratch({s.D, s.B, s.H}, operands.sums());
  }
  return layer;
}

}  // namespace

LayerResults layer_forward(const LayerArguments& a, const Sizes& s, bool save) {
  Operands operands(*a.x);
  const bool lstm = a.cell == Cell::lstm;
  const int64_t saved = saved_per_unit(a.cell) * padded(s.H);
  LayerResults results;
  results.y = empty_y(s, operands.given());
  results.h_n = at::empty({s.D, s.B, s.R}, operands.given());
  if (lstm) results.c_n = at::empty({s.D, s.B, s.H}, operands.given());
  if (save && saved != 0) results.gates = at::empty({s.D, s.N, saved}, operands.sums());
  if (save && lstm) results.cells = at::empty({s.D, s.N, s.H}, operands.sums());
  if (s.B == 0) return results;

  const std::unique_ptr<Machine> machine = machine_for(*a.x);
  LayerForward layer{};
  layer.cell = a.cell;
  layer.I = s.I;
  layer.batch_sizes = s.batch_sizes;
  layer.x = operands.dense(a.x);
  layer.weights = operands.weights(a, s);
  Forward& step = layer.step;
  step.layer = operands.layer(a, s);
  step.layer.y = place(results.y), step.layer.gates = place(results.gates), step.layer.cells = place(results.cells);
  for (int64_t d = 0; d < s.D; ++d) {
    step.b_ih[d] = operands.dense(a.weights[d].b_ih);
    step.b_hh[d] = operands.dense(a.weights[d].b_hh);
  }
  step.h_n = place(results.h_n), step.c_n = place(results.c_n);
  const int64_t gates = gates_per_unit(a.cell) * s.H;
  step.recurrent = operands.scratch({s.D, s.B, gates}, operands.sums());
  step.h = operands.scratch({s.D, s.B, s.R}, operands.sums());
  step.operand = operands.scratch({s.D, s.B, s.R}, operands.given());
  if (lstm) step.c = operands.scratch({s.D, s.B, s.H}, operands.sums());
  if (s.P != 0) {
    step.unprojected = operands.scratch({s.D, s.B, s.H}, operands.given());
    step.projected = operands.scratch({s.D, s.B, s.R}, operands.sums());
  }
  if (!results.gates.defined()) {
    const int64_t rows = chunk_rows(*machine, a.cell, s.T, s.B, s.H);
    layer.input_gates = operands.scratch({s.D, rows, gates}, operands.sums());
  }
  if (a.lengths != nullptr && s.lengths == nullptr && step.layer.lengths != nullptr) {
    machine->check_lengths(step.layer.lengths, s.B, s.T);
  }
  run_forward(*machine, layer);
  return results;
}

Gradients layer_backward(const BackwardArguments& b, const Sizes& s) {
  const LayerArguments& a = b.layer;
  Operands operands(*a.x);
  const bool lstm = a.cell == Cell::lstm;
  Gradients gradients;
  int position = 0;
  // The next gradient of the schema, that of `tensor`. `made` with what type, and how; undefined when not wanted.
  enum class Made { given, sums, added_to };
  const auto next = [&](const Tensor* tensor, Made made) -> void* {
    Tensor& gradient = gradients[position];
    const bool wanted = tensor != nullptr && (b.needs >> position & 1) != 0;
    ++position;
    if (!wanted) {
      gradient = at::empty({0}, operands.given());
      return nullptr;
    }
    const bool zeros = made == Made::added_to || s.B == 0;
    const at::TensorOptions& options = made == Made::given ? operands.given() : operands.sums();
    gradient = zeros ? at::zeros(tensor->sizes(), options) : at::empty(tensor->sizes(), options);
    return gradient.mutable_data_ptr();
  };
  LayerBackward layer{};
  std::unique_ptr<Machine> machine;
  if (s.B > 0) {
    machine = machine_for(*a.x);
    layer = layer_of(b, s, operands);
  }
  layer.d_x = next(a.x, Made::sums);
  layer.step.d_h0 = next(a.h0, Made::sums);
  if (lstm) layer.step.d_c0 = next(a.c0, Made::sums);
  bool reads_x = false, sums = false;
  for (int64_t d = 0; d < 2; ++d) {
    const fastrnn::Weights& w = a.weights[d];
    layer.d_w_ih[d] = next(w.w_ih, Made::given);
    layer.d_w_hh[d] = next(w.w_hh, Made::given);
    layer.d_b_ih[d] = next(w.b_ih, Made::given);
    layer.d_b_hh[d] = next(w.b_hh, Made::given);
    if (lstm) layer.d_w_hr[d] = next(w.w_hr, Made::given);
    reads_x = reads_x || layer.d_w_ih[d] != nullptr;
    sums = sums || layer.d_b_ih[d] != nullptr || layer.d_b_hh[d] != nullptr;
  }
  layer.step.d_reset_h = next(a.reset_h, Made::added_to);
  if (lstm) layer.step.d_reset_c = next(a.reset_c, Made::added_to);
  if (s.B > 0) {
    if (reads_x) layer.x = operands.x_without_padding(*a.x, s);
    if (sums) {
      const int64_t parts = (s.N + kSumRows - 1) / kSumRows;
      layer.partial = operands.scratch({s.D, parts, stored_per_unit(a.cell) * s.H}, operands.sums());
    }
    run_backward(*machine, layer);
  }
  for (int k = 0; k < gradient_count(a.cell); ++k) gradients[k] = gradients[k].to(operands.given());
  return gradients;
}

RowGradients layer_row_gradients(const BackwardArguments& b, const Sizes& s) {
  const LayerArguments& a = b.layer;
  Operands operands(*a.x);
  const bool lstm = a.cell == Cell::lstm;
  const auto gradient = [&](const Tensor* of, int bit) {
    const bool wanted = (b.needs >> bit & 1) != 0;
    return wanted ? at::zeros(of->sizes(), operands.sums()) : at::empty({0}, operands.given());
  };
  RowGradients rows;
  rows.d_x = gradient(a.x, 0);
  rows.d_h0 = gradient(a.h0, 1);
  if (lstm) rows.d_c0 = gradient(a.c0, 2);
  rows.d_gates = at::empty({s.D, s.N, stored_per_unit(a.cell) * s.H}, operands.given());
  if (lstm) rows.d_h = s.P != 0 ? at::empty({s.D, s.N, s.P}, operands.given()) : at::empty({0}, operands.sums());
  if (s.B > 0) {
    const std::unique_ptr<Machine> machine = machine_for(*a.x);
    LayerBackward layer = layer_of(b, s, operands);
    layer.step.d_gates = place(rows.d_gates);
    if (s.P != 0) layer.step.d_projected = place(rows.d_h);
    const auto wanted = [](const Tensor& tensor) { return tensor.defined() && tensor.numel() > 0; };
    layer.d_x = wanted(rows.d_x) ? place(rows.d_x) : nullptr;
    layer.step.d_h0 = wanted(rows.d_h0) ? place(rows.d_h0) : nullptr;
    layer.step.d_c0 = wanted(rows.d_c0) ? place(rows.d_c0) : nullptr;
    run_backward(*machine, layer);
  }
  rows.d_x = rows.d_x.to(operands.given());
  rows.d_h0 = rows.d_h0.to(operands.given());
  if (lstm) rows.d_c0 = rows.d_c0.to(operands.given());
  rows.d_gates = rows.d_gates.to(operands.sums());
  if (lstm) rows.d_h = rows.d_h.to(operands.sums());
  return rows;
}

}  // namespace cuda
}  // namespace fastrnn
