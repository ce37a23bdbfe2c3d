// SPDX-License-Identifier: BSD-3-Clause
// The derivative of the layer operators as a C++ autograd function: 12 us less in a training step of one layer than one
// in Python (T = 1, B = 1, H = 64; docs/architecture.md has the machine). What is not plain in a backward - grad mode
// on, a transform, a dispatch mode, a compiler's tensors - goes to derivatives.continue_backward() in Python.
#include "derivative.h"

#include <ATen/EmptyTensor.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/utils/pybind.h>

#include <cstring>
#include <string>

#include "checks.h"
#include "event.h"

namespace fastrnn {

Tensor alias(const Tensor& tensor, at::IntArrayRef sizes, at::IntArrayRef strides, int64_t offset) {
  Tensor made = at::detail::make_tensor<at::TensorImpl>(c10::Storage(tensor.storage()),
                                                        c10::DispatchKeySet(c10::DispatchKey::CPU), tensor.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(sizes, strides, tensor.storage_offset() + offset);
  return made;
}

bool transform_active() {
  return c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode);
}

bool is_dense(const Tensor& tensor) {
  using c10::DispatchKey, c10::DispatchKeySet;
  constexpr DispatchKeySet kCpu(DispatchKey::CPU);
  constexpr DispatchKeySet kUsual =
      kCpu | DispatchKeySet({DispatchKey::ADInplaceOrView, DispatchKey::AutogradCPU, DispatchKey::AutocastCPU});
  const DispatchKeySet keys = tensor.key_set();
  return keys.has_all(kCpu) && (keys.raw_repr() & ~kUsual.raw_repr()) == 0;
}

bool is_plain(const Tensor& tensor) {
  if (!is_dense(tensor)) return false;
  const auto type = tensor.scalar_type();
  return type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf;
}

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr const char* kNames[] = {"lstm_layer", "gru_layer", "rnn_layer", "rnn_layer"};  // by Cell

int state_count(Cell cell) { return cell == Cell::lstm ? 2 : 1; }

// Arguments of a layer that are neither differentiable nor masks; undefined: not given.
struct Extras {
  Tensor batch_sizes, lengths, reset;
};

// Bit k of `given`: differentiable argument k of the schema is there. The tensors stand in a list without gaps.
struct Description {
  Cell cell;
  int64_t given;
  Recording recording;

  int64_t pack() const {
    return given | static_cast<int64_t>(cell) << 16 | int64_t{recording.step} << 20 |
           int64_t{recording.recompute} << 21;
  }
  static Description unpack(int64_t bits) {
    Description d{static_cast<Cell>(bits >> 16 & 15), bits & 0xffff, {}};
    d.recording.step = bits >> 20 & 1;
    d.recording.recompute = bits >> 21 & 1;
    return d;
  }
};

Tensor one_step(const Tensor& rows) {
  return alias(rows, {1, rows.size(0), rows.size(1)}, {rows.stride(0), rows.stride(0), rows.stride(1)});
}

const Tensor* pointer(const Tensor& tensor) { return tensor.defined() ? &tensor : nullptr; }

// The layer's arguments from a list without gaps. `stepped` keeps the three-dimensional aliases of a cell's tensors.
LayerArguments arguments_of(const Description& d, at::TensorList tensors, const Extras& extras,
                            std::array<Tensor, 3>& stepped) {
  const Tensor* given[kMaxGradients] = {};
  for (size_t position = 0, next = 0; position < kMaxGradients; ++position) {
    if (d.given >> position & 1) given[position] = &tensors[next++];
  }
  const int inputs = 1 + state_count(d.cell);
  if (d.recording.step) {
    for (int k = 0; k < inputs; ++k) {
      stepped[k] = one_step(*given[k]);
      given[k] = &stepped[k];
    }
  }
  const Tensor* const* next = given;
  LayerArguments a{};
  a.name = kNames[static_cast<int>(d.cell)];
  a.cell = d.cell;
  a.x = *next++;
  a.h0 = *next++;
  if (d.cell == Cell::lstm) a.c0 = *next++;
  for (Weights& w : a.weights) {
    w.w_ih = *next++, w.w_hh = *next++, w.b_ih = *next++, w.b_hh = *next++;
    if (d.cell == Cell::lstm) w.w_hr = *next++;
  }
  a.reset_h = *next++;
  if (d.cell == Cell::lstm) a.reset_c = *next++;
  a.batch_sizes = pointer(extras.batch_sizes);
  a.lengths = pointer(extras.lengths);
  a.reset = pointer(extras.reset);
  return a;
}

// Whether the backward computes without what stands at this position of the schema: biases; W_ih where x wants no
// gradient; W_hh of a single step whose h0 wants none. A program may change these in place before it, as an optimizer
// does between the backwards of two calls of one cell. With lengths or resets weights count as read.
bool unread(const Description& d, const LayerArguments& a, int64_t T, const variable_list& given, size_t position) {
  const auto inputs = static_cast<size_t>(1 + state_count(d.cell));
  const size_t slots = d.cell == Cell::lstm ? 5 : 4;
  if (d.recording.recompute || position < inputs || position >= inputs + 2 * slots) return false;
  const size_t slot = (position - inputs) % slots;
  if (slot == 2 || slot == 3) return true;
  if (a.lengths != nullptr || a.reset != nullptr) return false;
  if (slot == 0) return !given[0].requires_grad();
  return slot == 1 && T == 1 && a.batch_sizes == nullptr && !given[1].requires_grad();
}

Tensor copy_of(const Tensor& dense) {
  Tensor copy(at::detail::empty_cpu(dense.sizes(), dense.scalar_type()));
  std::memcpy(copy.mutable_data_ptr(), dense.const_data_ptr(), dense.nbytes());
  return copy;
}

// Without GIL: reads no Python object.
bool direct(at::TensorList tensors) {
  if (at::GradMode::is_enabled() || c10::impl::TorchDispatchModeTLS::stack_len() != 0 || transform_active() ||
      torch::autograd::ForwardADLevel::try_get_by_idx(0) != nullptr) {
    return false;
  }
  for (const Tensor& tensor : tensors) {
    if (!tensor.defined() || tensor.scalar_type() == at::kLong || tensor.scalar_type() == at::kBool) continue;
    if (!is_plain(tensor)) return false;
  }
  return true;
}

variable_list in_python(const Description& d, at::TensorList saved, const variable_list& gradients,
                        const std::vector<bool>& wanted) {
  namespace py = pybind11;
  const py::gil_scoped_acquire gil;
  const auto object = [](const Tensor& tensor) -> py::object {
    return tensor.defined() ? py::cast(tensor) : py::object(py::none());
  };
  py::list tensors, wants, rest, cotangents;
  size_t next = 0;
  for (int position = 0; position < gradient_count(d.cell); ++position) {
    const bool given = d.given >> position & 1;
    tensors.append(given ? object(saved[next]) : py::object(py::none()));
    wants.append(given && wanted[next]);
    next += given;
  }
  for (; next < saved.size(); ++next) rest.append(object(saved[next]));
  for (const Tensor& gradient : gradients) cotangents.append(object(gradient));
  const py::object found = py::module_::import("fastrnn.derivatives")
                               .attr("continue_backward")(kNames[static_cast<int>(d.cell)], tensors, rest, cotangents,
                                                          wants, d.cell == Cell::rnn_relu, d.recording.step);
  variable_list results;
  int position = 0;
  for (const py::handle gradient : found) {
    if (d.given >> position++ & 1) results.push_back(gradient.is_none() ? Tensor() : gradient.cast<Tensor>());
  }
  return results;
}

class Layer : public torch::autograd::Function<Layer> {
 public:
  static constexpr bool is_traceable = true;  // a compiler's tensors take the way through Python, to the operator

  static variable_list forward(AutogradContext* ctx, at::TensorList tensors, const Description& d,
                               const Extras& extras) {
    const c10::impl::ExcludeDispatchKeyGuard below(layers_above());
    std::array<Tensor, 3> stepped;
    const LayerArguments a = arguments_of(d, tensors, extras, stepped);
    const Sizes sizes = checks::Checker(a).layer();
    LayerResults r = cpu::layer_forward(a, sizes, !d.recording.recompute);
    ctx->saved_data.emplace("description", d.pack());
    ctx->set_materialize_grads(false);
    variable_list saved(tensors.begin(), tensors.end());
    set_apart(ctx, d, a, sizes.T, saved);
    const Tensor y = d.recording.recompute ? Tensor() : d.recording.own_y ? copy_of(r.y) : r.y;
    saved.insert(saved.end(), {extras.batch_sizes, extras.lengths, extras.reset, y, r.gates, r.cells});
    ctx->save_for_backward(std::move(saved));
    if (!d.recording.step) return lstm_of(d) ? variable_list{r.y, r.h_n, r.c_n} : variable_list{r.y, r.h_n};
    for (Tensor* state : {&r.h_n, &r.c_n}) {
      if (state->defined()) {
        state->unsafeGetTensorImpl()->set_sizes_contiguous({state->size(1), state->size(2)});
      }
    }
    return lstm_of(d) ? variable_list{r.h_n, r.c_n} : variable_list{r.h_n};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    const Description d = Description::unpack(ctx->saved_data.at("description").toInt());
    variable_list saved = ctx->get_saved_variables();
    const size_t count = saved.size() - kKept;
    const bool changed = put_back(ctx, saved);
    std::vector<bool> wanted(count);
    for (size_t k = 0; k < count; ++k) wanted[k] = ctx->needs_input_grad(k);
    variable_list found;
    bool defined = false;
    for (const Tensor& gradient : gradients) defined |= gradient.defined();
    if (!defined) {
      found.resize(count);
    } else if (direct(saved) && direct(gradients)) {
      found = by_kernels(d, saved, count, gradients, wanted);
    } else {
      TORCH_CHECK(
          !changed,
          "one of the variables needed for gradient computation has been modified by an inplace operation: a "
          "weight or bias of ",
          kNames[static_cast<int>(d.cell)],
          ". A derivative that is differentiated in turn computes the layer once more, from all its arguments.");
      found = in_python(d, saved, gradients, wanted);
    }
    found.resize(count + 2);  // Description and Extras have no gradient
    return found;
  }

 private:
  static constexpr size_t kKept = 6;  // after the tensors: extras, y, gates, cells

  // What the backward does not read is kept beside the saved tensors, with its version: only the second derivative
  // computes from it, and must find it unchanged.
  static void set_apart(AutogradContext* ctx, const Description& d, const LayerArguments& a, int64_t T,
                        variable_list& saved) {
    std::vector<int64_t> places;  // in `saved`, each followed by the version, -1 if it has none
    for (size_t position = 0, k = 0; position < kMaxGradients; ++position) {
      if ((d.given >> position & 1) == 0) continue;
      if (unread(d, a, T, saved, position)) {
        places.insert(places.end(), {static_cast<int64_t>(k), version_of(saved[k])});
        ctx->saved_data.emplace(key(k),
                                std::move(saved[k]));  // one by one: compiled autograd traces no tensor in a list
        saved[k] = Tensor();
      }
      ++k;
    }
    if (!places.empty()) ctx->saved_data.emplace("places", std::move(places));
  }

  // Whether one of them was changed. What a compiler traces in their place has versions of its own.
  static bool put_back(AutogradContext* ctx, variable_list& saved) {
    const auto found = ctx->saved_data.find("places");
    if (found == ctx->saved_data.end()) return false;
    const std::vector<int64_t> places = found->second.toIntVector();
    bool changed = false;
    for (size_t j = 0; j < places.size(); j += 2) {
      const auto k = static_cast<size_t>(places[j]);
      saved[k] = ctx->saved_data.at(key(k)).toTensor();
      changed |= is_dense(saved[k]) && version_of(saved[k]) != places[j + 1];
    }
    return changed;
  }

  static std::string key(size_t k) { return {static_cast<char>('a' + k)}; }

  static int64_t version_of(const Tensor& tensor) {
    return tensor.is_inference() ? -1 : static_cast<int64_t>(tensor._version());
  }

  static bool lstm_of(const Description& d) { return d.cell == Cell::lstm; }

  static variable_list by_kernels(const Description& d, const variable_list& saved, size_t count,
                                  const variable_list& gradients, const std::vector<bool>& wanted) {
    const c10::impl::ExcludeDispatchKeyGuard below(layers_above());
    std::array<Tensor, 3> stepped;
    std::array<Tensor, 3> cotangents;
    const at::TensorList tensors(saved.data(), count);
    BackwardArguments b{};
    const Extras extras{saved[count], saved[count + 1], saved[count + 2]};
    b.layer = arguments_of(d, tensors, extras, stepped);
    checks::Checker checker(b.layer);
    const Sizes sizes = checker.layer();
    Tensor y = saved[count + 3], gates = saved[count + 4], cells = saved[count + 5];
    if (d.recording.recompute) {
      const Event event(b.layer);
      LayerResults again = cpu::layer_forward(b.layer, sizes, true);
      y = again.y, gates = again.gates, cells = again.cells;
    }
    size_t next = d.recording.step ? 1 : 0;  // of cotangents: d_y, d_h_n, d_c_n
    for (const Tensor& gradient : gradients) {
      cotangents[next++] = !gradient.defined() || !d.recording.step ? gradient : one_step(gradient);
    }
    b.d_y = pointer(cotangents[0]), b.d_h_n = pointer(cotangents[1]), b.d_c_n = pointer(cotangents[2]);
    b.y = &y;
    b.gates = pointer(gates), b.cells = pointer(cells);
    for (size_t position = 0, k = 0; position < kMaxGradients; ++position) {
      if (d.given >> position & 1) b.needs |= int64_t{wanted[k++]} << position;
    }
    // An LSTM of which only c_n is used: after a single step the projection has no part in it, and no gradient.
    if (b.d_y == nullptr && b.d_h_n == nullptr && sizes.P != 0 && sizes.T == 1)
      b.needs &= ~(int64_t{1} << 7 | int64_t{1} << 12);
    checker.backward(b, sizes, gradient_count(d.cell));
    const Event event(b.layer, Event::kBackward);
    Gradients all = cpu::layer_backward(b, sizes);
    variable_list found;
    found.reserve(count + 2);
    for (size_t position = 0; position < kMaxGradients; ++position) {
      if ((d.given >> position & 1) == 0) continue;
      Tensor& gradient = all[position];
      if ((b.needs >> position & 1) == 0) {
        found.emplace_back();
        continue;
      }
      const auto inputs = static_cast<size_t>(1 + state_count(d.cell));
      if (d.recording.step && position < inputs) {
        gradient.unsafeGetTensorImpl()->set_sizes_contiguous({gradient.size(1), gradient.size(2)});
      }
      found.push_back(std::move(gradient));
    }
    return found;
  }
};

}  // namespace

LayerResults layer_with_gradient(const LayerArguments& a, const Recording& recording) {
  Description d{a.cell, 0, recording};
  c10::SmallVector<Tensor, kMaxGradients> tensors;
  int position = 0;
  const auto add = [&](const Tensor* tensor) {
    if (tensor != nullptr) {
      d.given |= int64_t{1} << position;
      tensors.push_back(*tensor);
    }
    ++position;
  };
  add(a.x), add(a.h0);
  if (a.cell == Cell::lstm) add(a.c0);
  for (const Weights& w : a.weights) {
    add(w.w_ih), add(w.w_hh), add(w.b_ih), add(w.b_hh);
    if (a.cell == Cell::lstm) add(w.w_hr);
  }
  add(a.reset_h);
  if (a.cell == Cell::lstm) add(a.reset_c);
  const auto given = [](const Tensor* tensor) { return tensor == nullptr ? Tensor() : *tensor; };
  const Extras extras{given(a.batch_sizes), given(a.lengths), given(a.reset)};
  const Event event(a, Event::kForward, true);
  variable_list found = Layer::apply(at::TensorList(tensors), d, extras);
  LayerResults results;
  size_t next = 0;
  if (!recording.step) results.y = std::move(found[next++]);
  results.h_n = std::move(found[next++]);
  if (a.cell == Cell::lstm) results.c_n = std::move(found[next]);
  return results;
}

}  // namespace fastrnn
