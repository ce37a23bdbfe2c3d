// SPDX-License-Identifier: BSD-3-Clause
// The short way from a module's call to the kernels: layer_call() and cell_call() read weights and options from the
// module's __dict__, make the initial states and run every layer, in one call from Python. fastrnn/modules.py and
// cells.py try it first. It takes ordinary calls alone and answers None to all others, which then go the long way in
// Python: what is unusual or wrong is decided, and reported, there. What it returns has the same bits.
#include "module_call.h"

#include <ATen/EmptyTensor.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <c10/util/SmallVector.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/jit/frontend/tracer.h>
#include <torch/csrc/utils/object_ptr.h>
#include <torch/csrc/utils/pybind.h>

#include <cstring>
#include <initializer_list>
#include <optional>

#include "arguments.h"
#include "checks.h"
#include "derivative.h"
#include "prepacked.h"

namespace fastrnn {
namespace {

using at::IntArrayRef;
using Held = c10::SmallVector<Tensor, 12>;  // owners: another thread may replace a weight while the kernels run

// Names of attributes, interned once.
struct Names {
  PyObject *parameters, *all_weights, *flat_weights, *input_size, *hidden_size, *num_layers, *bias, *batch_first,
      *dropout, *bidirectional, *proj_size, *mode, *training, *nonlinearity, *prepacked, *current_level;
  PyObject* cell_weights[4];
  PyObject* forward_ad;  // the __dict__ of torch.autograd.forward_ad

  Names() {
    const auto name = [](const char* text) { return PyUnicode_InternFromString(text); };
    parameters = name("_parameters"), all_weights = name("_all_weights"), input_size = name("input_size");
    flat_weights = name("_flat_weights");
    hidden_size = name("hidden_size"), num_layers = name("num_layers"), bias = name("bias");
    batch_first = name("batch_first"), dropout = name("dropout"), bidirectional = name("bidirectional");
    proj_size = name("proj_size"), mode = name("mode"), training = name("training");
    nonlinearity = name("nonlinearity"), prepacked = name("_prepacked"), current_level = name("_current_level");
    cell_weights[0] = name("weight_ih"), cell_weights[1] = name("weight_hh");
    cell_weights[2] = name("bias_ih"), cell_weights[3] = name("bias_hh");
    PyObject* const module = PyImport_ImportModule("torch.autograd.forward_ad");  // never given back
    if (module == nullptr) throw python_error();
    forward_ad = PyModule_GetDict(module);
  }
};

const Names& names() {
  static const Names made;
  return made;
}

// The attributes of a module, from its __dict__. One that is missing, or not of the type that torch.nn gives it, makes
// the call unusual.
class Attributes {
 public:
  explicit Attributes(PyObject* own) : own_(own), parameters_(find(own, names().parameters)) {
    usual = parameters_ != nullptr && PyDict_Check(parameters_);
  }
  bool usual;

  PyObject* object(PyObject* name) {
    PyObject* const found = find(own_, name);
    if (found == nullptr) usual = false;
    return found;
  }
  int64_t size(PyObject* name) {
    PyObject* const found = object(name);
    if (found == nullptr || !PyLong_CheckExact(found)) return usual = false;
    int overflow = 0;
    const int64_t value = PyLong_AsLongLongAndOverflow(found, &overflow);
    if (value < 0 || overflow != 0) usual = false;
    return value;
  }
  bool flag(PyObject* name) {
    PyObject* const found = object(name);
    if (found != Py_True && found != Py_False) usual = false;
    return found == Py_True;
  }
  // Null: none, or its block is over. `owner` keeps it alive: another thread may leave the block meanwhile.
  const Prepacked* prepacked(THPObjectPtr& owner) {
    PyObject* const found = find(own_, names().prepacked);
    if (found == nullptr || found == Py_None) return nullptr;
    const auto* const prepacked = pybind11::handle(found).cast<const Prepacked*>();
    if (!prepacked->open()) return nullptr;
    owner = THPObjectPtr::dup(found);
    return prepacked;
  }
  // As read_weights() of fastrnn/modules.py reads them, but for a property of the class.
  PyObject* weight(PyObject* name) {
    PyObject* found = find(own_, name);
    if (found == nullptr && usual) found = find(parameters_, name);
    if (found == nullptr) usual = false;
    return found;
  }

 private:
  static PyObject* find(PyObject* dict, PyObject* name) {
    PyObject* const found = PyDict_GetItemWithError(dict, name);
    if (found == nullptr && PyErr_Occurred()) throw python_error();
    return found;
  }
  PyObject *own_, *parameters_;
};

// Whether nothing wants to see or change what torch computes. fastrnn/autograd.py: route() has the same list.
bool ordinary_state() {
  PyObject* const level = PyDict_GetItemWithError(names().forward_ad, names().current_level);
  return level != nullptr && PyLong_AsLong(level) < 0 && !at::autocast::is_autocast_enabled(at::kCPU) &&
         !torch::jit::tracer::isTracing() && c10::impl::TorchDispatchModeTLS::stack_len() == 0 &&
         at::impl::PythonTorchFunctionTLS::stack_len() == 0 && !transform_active();
}

// The tensors of one call. All must be ordinary dense tensors of the CPU, of one dtype, without lazy bits.
class Tensors {
 public:
  bool usual = true;
  bool requires_grad = false;

  explicit Tensors(size_t most) { held_.reserve(most); }

  // The tensor in a Python object; its address stays.
  const Tensor* add(PyObject* object) {
    if (!usual || !THPVariable_CheckExact(object)) {
      usual = false;
      return nullptr;
    }
    const Tensor& tensor = THPVariable_Unpack(object);
    if (!is_plain(tensor) || (!held_.empty() && tensor.dtype() != held_[0].dtype())) {
      usual = false;
      return nullptr;
    }
    requires_grad |= tensor.requires_grad();
    held_.push_back(tensor);
    return &held_.back();
  }

 private:
  Held held_;
};

Tensor empty(IntArrayRef sizes, at::ScalarType type) { return Tensor(at::detail::empty_cpu(sizes, type)); }

// What a kernel has just made, under other sizes.
void set_sizes(Tensor& fresh, IntArrayRef sizes) { fresh.unsafeGetTensorImpl()->set_sizes_contiguous(sizes); }

Tensor zeros(IntArrayRef sizes, at::ScalarType type) {
  Tensor made = empty(sizes, type);
  if (made.numel() != 0) std::memset(made.mutable_data_ptr(), 0, made.nbytes());
  return made;
}

// (first, second), or first alone if `both` is false.
PyObject* wrapped(Tensor&& first, Tensor&& second, bool both) {
  THPObjectPtr one(THPVariable_Wrap(std::move(first)));
  if (!one) throw python_error();
  if (!both) return one.release();
  THPObjectPtr two(THPVariable_Wrap(std::move(second)));
  if (!two) throw python_error();
  PyObject* const made = PyTuple_Pack(2, one.get(), two.get());
  if (made == nullptr) throw python_error();
  return made;
}

// The initial states as a call gives them, (h, c) or h; false if they have another form.
bool states_of(PyObject* hx, Cell cell, Tensors& tensors, const Tensor* (&states)[2]) {
  if (cell != Cell::lstm) {
    states[0] = tensors.add(hx);
    return tensors.usual;
  }
  if (!PyTuple_CheckExact(hx) || PyTuple_GET_SIZE(hx) != 2) return false;
  states[0] = tensors.add(PyTuple_GET_ITEM(hx, 0));
  states[1] = tensors.add(PyTuple_GET_ITEM(hx, 1));
  return tensors.usual;
}

void refuse_gradient(const Prepacked* prepacked, bool recorded) {
  TORCH_CHECK(prepacked == nullptr || !recorded,
              "fastrnn.prepacked: a call inside the block needs a gradient; use torch.no_grad() or "
              "torch.inference_mode(), or train outside the block");
}

// ---- layers --------------------------------------------------------------------------------------------------------

// What the module's options say about a call.
struct Stack {
  Cell cell;
  int64_t I, H, P, R, L, D;
  bool bias, batch_first;
};

std::optional<Stack> stack_of(Attributes& module, int64_t gates) {
  Stack s{};
  s.cell = gates == 4 ? Cell::lstm : gates == 3 ? Cell::gru : Cell::rnn_tanh;
  if (gates == 1) {
    PyObject* const mode = module.object(names().mode);
    if (mode == nullptr || !PyUnicode_Check(mode)) return std::nullopt;
    if (PyUnicode_CompareWithASCIIString(mode, "RNN_RELU") == 0) {
      s.cell = Cell::rnn_relu;
    } else if (PyUnicode_CompareWithASCIIString(mode, "RNN_TANH") != 0) {
      return std::nullopt;
    }
  }
  s.I = module.size(names().input_size);
  s.H = module.size(names().hidden_size);
  s.L = module.size(names().num_layers);
  s.P = s.cell == Cell::lstm ? module.size(names().proj_size) : 0;
  s.R = s.P != 0 ? s.P : s.H;
  s.bias = module.flag(names().bias);
  s.batch_first = module.flag(names().batch_first);
  s.D = module.flag(names().bidirectional) ? 2 : 1;
  if (!module.usual || s.I < 1 || s.H < 1 || s.L < 1) return std::nullopt;
  if (s.L > 1 && module.flag(names().training)) {
    PyObject* const dropout = module.object(names().dropout);
    if (!module.usual || !PyFloat_Check(dropout) || PyFloat_AS_DOUBLE(dropout) != 0) return std::nullopt;
  }
  return s;
}

// The weights of one layer and direction, from the list of their names; false if one is missing or unusual.
bool weights_of(Attributes& module, const Stack& s, PyObject* row_names, size_t row, const Prepacked* prepacked,
                Tensors& tensors, Weights& weights) {
  if (!PyList_CheckExact(row_names) || PyList_GET_SIZE(row_names) != 2 + 2 * s.bias + (s.P != 0)) return false;
  const Tensor** const slots[] = {&weights.w_ih, &weights.w_hh, &weights.b_ih, &weights.b_hh, &weights.w_hr};
  static const Tensor none;
  Py_ssize_t next = 0;
  for (size_t slot = 0; slot < 5; ++slot) {
    if ((slot >= 2 && slot < 4 && !s.bias) || (slot == 4 && s.P == 0)) {
      if (prepacked != nullptr) prepacked->expect(row, slot, none);
      continue;
    }
    PyObject* const found = module.weight(PyList_GET_ITEM(row_names, next++));
    if (found == nullptr) return false;
    const Tensor* const tensor = tensors.add(found);
    if (tensor == nullptr) return false;
    if (prepacked != nullptr) prepacked->expect(row, slot, *tensor);
    *slots[slot] = tensor;
  }
  if (prepacked != nullptr) weights.packed = prepacked->direction(row);
  return true;
}

// All layers without gradient: the states of layer l are slices of those of the call, and its y is the x of the next.
LayerResults run_layers(const Stack& s, const c10::SmallVectorImpl<LayerArguments>& layers, const Tensor& x,
                        const Tensor* (&hx)[2], int64_t B) {
  const auto type = x.scalar_type();
  const bool lstm = s.cell == Cell::lstm;
  LayerResults all;
  all.y = x;
  if (s.L > 1) {
    all.h_n = empty({s.L * s.D, B, s.R}, type);
    if (lstm) all.c_n = empty({s.L * s.D, B, s.H}, type);
  }
  Tensor zero_h, zero_c;
  if (hx[0] == nullptr) {
    zero_h = zeros({s.D, B, s.R}, type);
    if (lstm) zero_c = s.R == s.H ? zero_h : zeros({s.D, B, s.H}, type);
  }
  for (int64_t l = 0; l < s.L; ++l) {
    const auto slice = [&](const Tensor& states, int64_t width) {
      const IntArrayRef strides = states.strides();
      const int64_t along = states.dim() == 3 ? strides[1] : strides[0];  // an unbatched state has no B
      return alias(states, {s.D, B, width}, {strides[0], along, states.stride(-1)}, l * s.D * strides[0]);
    };
    LayerArguments a = layers[static_cast<size_t>(l)];
    const Tensor below = all.y;
    const Tensor h0 = hx[0] == nullptr ? zero_h : slice(*hx[0], s.R);
    const Tensor c0 = !lstm ? Tensor() : hx[0] == nullptr ? zero_c : slice(*hx[1], s.H);
    a.x = &below, a.h0 = &h0;
    if (lstm) a.c0 = &c0;
    LayerResults given;
    if (s.L > 1) {
      given.h_n = slice(all.h_n, s.R);
      if (lstm) given.c_n = slice(all.c_n, s.H);
    }
    LayerResults made = cpu::layer_forward(a, checks::Checker(a).layer(), false, given);
    all.y = std::move(made.y);
    if (s.L == 1) all.h_n = std::move(made.h_n), all.c_n = std::move(made.c_n);
  }
  return all;
}

// One layer with gradient, through views that torch differentiates.
LayerResults record_layer(const Stack& s, LayerArguments a, const Tensor& input, const Tensor* (&hx)[2], int64_t B,
                          bool unbatched, bool recompute) {
  const auto type = input.scalar_type();
  const bool lstm = s.cell == Cell::lstm;
  const Tensor x = unbatched ? input.unsqueeze(1) : s.batch_first ? input.transpose(0, 1) : input;
  Tensor h0, c0;
  if (hx[0] == nullptr) {
    h0 = zeros({s.D, B, s.R}, type);
    if (lstm) c0 = s.R == s.H ? h0 : zeros({s.D, B, s.H}, type);
  } else {
    h0 = unbatched ? hx[0]->unsqueeze(1) : *hx[0];
    if (lstm) c0 = unbatched ? hx[1]->unsqueeze(1) : *hx[1];
  }
  a.x = &x, a.h0 = &h0;
  if (lstm) a.c0 = &c0;
  // torch's own LSTM saves y as well, where oneDNN computes it; elsewhere a program may change what torch returns.
  Recording recording;
  recording.own_y = !(lstm && type == at::kFloat && s.D == 1 && s.P == 0);
  recording.recompute = recompute;
  LayerResults r = layer_with_gradient(a, recording);
  if (unbatched) {
    r.y = r.y.squeeze(1), r.h_n = r.h_n.squeeze(1);
    if (lstm) r.c_n = r.c_n.squeeze(1);
  } else if (s.batch_first) {
    r.y = r.y.transpose(0, 1);
  }
  return r;
}

// Whether torch.nn's own list `_flat_weights` holds the weights that have the names; where it does not, a program has
// replaced some in one of the two places, and modules.py knows which counts.
bool list_agrees(Attributes& module, PyObject* rows) {
  PyObject* const flat = module.object(names().flat_weights);
  if (flat == nullptr || !PyList_CheckExact(flat)) return false;
  Py_ssize_t position = 0;
  for (Py_ssize_t row = 0; row < PyList_GET_SIZE(rows); ++row) {
    PyObject* const own = PyList_GET_ITEM(rows, row);
    if (!PyList_CheckExact(own)) return false;
    for (Py_ssize_t k = 0; k < PyList_GET_SIZE(own); ++k, ++position) {
      if (position >= PyList_GET_SIZE(flat)) return false;
      if (module.weight(PyList_GET_ITEM(own, k)) != PyList_GET_ITEM(flat, position)) return false;
    }
  }
  return position == PyList_GET_SIZE(flat);
}

// layer_call(own, gates, recompute, input, hx): own is the module's __dict__.
PyObject* layer_call(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 5 && PyDict_Check(arguments[0]) && PyLong_Check(arguments[1]),
                   "layer_call: expected (own, gates, recompute, input, hx)");
  PyObject *const input = arguments[3], *const hx = arguments[4];
  if (!ordinary_state()) Py_RETURN_NONE;
  Attributes module(arguments[0]);
  if (!module.usual) Py_RETURN_NONE;
  const std::optional<Stack> found = stack_of(module, PyLong_AsLong(arguments[1]));
  if (!found) Py_RETURN_NONE;
  const Stack& s = *found;
  PyObject* const rows = module.object(names().all_weights);
  if (rows == nullptr || !PyList_CheckExact(rows) || PyList_GET_SIZE(rows) != s.L * s.D || !list_agrees(module, rows)) {
    Py_RETURN_NONE;
  }

  Tensors tensors(static_cast<size_t>(3 + s.L * s.D * 5));
  const Tensor* const x = tensors.add(input);
  const Tensor* states[2] = {};
  if (x == nullptr || (hx != Py_None && !states_of(hx, s.cell, tensors, states))) Py_RETURN_NONE;
  const bool unbatched = x->dim() == 2;
  if (!unbatched && x->dim() != 3) Py_RETURN_NONE;
  const bool swapped = s.batch_first && !unbatched;
  const int64_t T = x->size(swapped ? 1 : 0), B = unbatched ? 1 : x->size(swapped ? 0 : 1);
  if (T < 1 || x->size(-1) != s.I) Py_RETURN_NONE;
  const int64_t widths[2] = {s.R, s.H};
  for (int k = 0; k < 2; ++k) {
    if (states[k] == nullptr) continue;
    const IntArrayRef sizes = states[k]->sizes();
    const bool fits = unbatched ? sizes.equals({s.L * s.D, widths[k]}) : sizes.equals({s.L * s.D, B, widths[k]});
    if (!fits) Py_RETURN_NONE;
  }

  THPObjectPtr owner;
  const Prepacked* const prepacked = module.prepacked(owner);
  const Cell cell = s.cell;
  c10::SmallVector<LayerArguments, 2> layers;
  for (int64_t l = 0; l < s.L; ++l) {
    LayerArguments a{};
    a.name = cell == Cell::lstm ? "lstm_layer" : cell == Cell::gru ? "gru_layer" : "rnn_layer";
    a.cell = cell;
    for (int64_t d = 0; d < s.D; ++d) {
      const int64_t row = l * s.D + d;
      if (!weights_of(module, s, PyList_GET_ITEM(rows, row), static_cast<size_t>(row), prepacked, tensors,
                      a.weights[d])) {
        Py_RETURN_NONE;
      }
    }
    layers.push_back(a);
  }
  const bool recorded = tensors.requires_grad && at::GradMode::is_enabled();
  refuse_gradient(prepacked, recorded);
  if (recorded && s.L > 1) Py_RETURN_NONE;

  LayerResults results;
  {
    const pybind11::gil_scoped_release free;
    if (recorded) {
      results = record_layer(s, layers[0], *x, states, B, unbatched, arguments[2] == Py_True);
    } else {
      const c10::impl::ExcludeDispatchKeyGuard below(layers_above());
      const IntArrayRef strides = x->strides();
      const Tensor major = unbatched ? alias(*x, {T, 1, s.I}, {strides[0], strides[0], strides[1]})
                           : swapped ? alias(*x, {T, B, s.I}, {strides[1], strides[0], strides[2]})
                                     : *x;
      results = run_layers(s, layers, major, states, B);
      const int64_t width = s.D * s.R;
      if (unbatched) {
        set_sizes(results.y, {T, width});
        set_sizes(results.h_n, {s.L * s.D, s.R});
        if (results.c_n.defined()) set_sizes(results.c_n, {s.L * s.D, s.H});
      } else if (swapped) {
        results.y.unsafeGetTensorImpl()->set_sizes_and_strides(IntArrayRef{B, T, width},
                                                               IntArrayRef{width, (B > 0 ? B : 1) * width, 1});
      }
    }
  }
  THPObjectPtr final(wrapped(std::move(results.h_n), std::move(results.c_n), cell == Cell::lstm));
  THPObjectPtr y(THPVariable_Wrap(std::move(results.y)));
  if (!y) throw python_error();
  return PyTuple_Pack(2, y.get(), final.get());
  END_HANDLE_TH_ERRORS
}

// ---- cells ---------------------------------------------------------------------------------------------------------

// One step without gradient: h', and c' for an LSTM. x is [B, I] or [I].
LayerResults run_step(LayerArguments a, const Tensor& x, const Tensor* (&hx)[2], int64_t B, int64_t I, int64_t H) {
  const c10::impl::ExcludeDispatchKeyGuard below(layers_above());
  const bool unbatched = x.dim() == 1;
  const auto one = [&](const Tensor& tensor, int64_t width) {
    const int64_t along = unbatched ? tensor.stride(0) : tensor.stride(1);
    const int64_t down = unbatched ? width : tensor.stride(0);
    return alias(tensor, {1, B, width}, {down, down, along});
  };
  const Tensor steps = one(x, I);
  Tensor h0, c0;
  if (hx[0] == nullptr) {
    h0 = c0 = zeros({1, B, H}, x.scalar_type());
  } else {
    h0 = one(*hx[0], H);
    if (hx[1] != nullptr) c0 = one(*hx[1], H);
  }
  a.x = &steps, a.h0 = &h0;
  if (a.cell == Cell::lstm) a.c0 = &c0;
  LayerResults r = cpu::layer_forward(a, checks::Checker(a).layer(), false);
  for (Tensor* state : {&r.h_n, &r.c_n}) {
    if (!state->defined()) continue;
    if (unbatched) {
      set_sizes(*state, {H});
    } else {
      set_sizes(*state, {B, H});
    }
  }
  return r;
}

// The same with gradient.
LayerResults record_step(LayerArguments a, const Tensor& input, const Tensor* (&hx)[2], int64_t B, int64_t H) {
  const bool unbatched = input.dim() == 1;
  const Tensor x = unbatched ? input.unsqueeze(0) : input;
  Tensor h0, c0;
  if (hx[0] == nullptr) {
    h0 = c0 = zeros({B, H}, x.scalar_type());
  } else {
    h0 = unbatched ? hx[0]->unsqueeze(0) : *hx[0];
    if (hx[1] != nullptr) c0 = unbatched ? hx[1]->unsqueeze(0) : *hx[1];
  }
  a.x = &x, a.h0 = &h0;
  if (a.cell == Cell::lstm) a.c0 = &c0;
  Recording recording;
  recording.step = true;
  LayerResults r = layer_with_gradient(a, recording);
  if (unbatched) {
    r.h_n = r.h_n.squeeze(0);
    if (r.c_n.defined()) r.c_n = r.c_n.squeeze(0);
  }
  return r;
}

// cell_call(own, gates, input, hx): own is the cell's __dict__.
PyObject* cell_call(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 4 && PyDict_Check(arguments[0]) && PyLong_Check(arguments[1]),
                   "cell_call: expected (own, gates, input, hx)");
  PyObject *const input = arguments[2], *const hx = arguments[3];
  if (!ordinary_state()) Py_RETURN_NONE;
  Attributes module(arguments[0]);
  if (!module.usual) Py_RETURN_NONE;
  const int64_t gates = PyLong_AsLong(arguments[1]);
  LayerArguments a{};
  a.cell = gates == 4 ? Cell::lstm : gates == 3 ? Cell::gru : Cell::rnn_tanh;
  a.name = gates == 4 ? "lstm_layer" : gates == 3 ? "gru_layer" : "rnn_layer";
  if (gates == 1) {
    PyObject* const nonlinearity = module.object(names().nonlinearity);
    if (nonlinearity == nullptr || !PyUnicode_Check(nonlinearity)) Py_RETURN_NONE;
    if (PyUnicode_CompareWithASCIIString(nonlinearity, "relu") == 0) {
      a.cell = Cell::rnn_relu;
    } else if (PyUnicode_CompareWithASCIIString(nonlinearity, "tanh") != 0) {
      Py_RETURN_NONE;
    }
  }
  const int64_t I = module.size(names().input_size), H = module.size(names().hidden_size);
  if (!module.usual || I < 1 || H < 1) Py_RETURN_NONE;

  Tensors tensors(7);
  const Tensor* const x = tensors.add(input);
  const Tensor* states[2] = {};
  if (x == nullptr || (hx != Py_None && !states_of(hx, a.cell, tensors, states))) Py_RETURN_NONE;
  if ((x->dim() != 1 && x->dim() != 2) || x->size(-1) != I) Py_RETURN_NONE;
  const bool unbatched = x->dim() == 1;
  const int64_t B = unbatched ? 1 : x->size(0);
  for (const Tensor* state : states) {
    if (state == nullptr) continue;
    if (!(unbatched ? state->sizes().equals({H}) : state->sizes().equals({B, H}))) Py_RETURN_NONE;
  }

  THPObjectPtr owner;
  const Prepacked* const prepacked = module.prepacked(owner);
  Weights& w = a.weights[0];
  const Tensor** const slots[] = {&w.w_ih, &w.w_hh, &w.b_ih, &w.b_hh};
  for (size_t slot = 0; slot < 4; ++slot) {
    static const Tensor none;
    PyObject* const weight = module.weight(names().cell_weights[slot]);
    if (weight == nullptr || (weight == Py_None && slot < 2)) Py_RETURN_NONE;
    const Tensor* const tensor = weight == Py_None ? nullptr : tensors.add(weight);
    if (!tensors.usual) Py_RETURN_NONE;
    if (prepacked != nullptr) prepacked->expect(0, slot, tensor == nullptr ? none : *tensor);
    *slots[slot] = tensor;
  }
  if (prepacked != nullptr) w.packed = prepacked->direction(0);
  const bool recorded = tensors.requires_grad && at::GradMode::is_enabled();
  refuse_gradient(prepacked, recorded);

  LayerResults results;
  {
    const pybind11::gil_scoped_release free;
    results = recorded ? record_step(a, *x, states, B, H) : run_step(a, *x, states, B, I, H);
  }
  return wrapped(std::move(results.h_n), std::move(results.c_n), a.cell == Cell::lstm);
  END_HANDLE_TH_ERRORS
}

// is_ordinary(tensors): whether the kernels take all of them as they are; None stands for one that does not exist.
PyObject* is_ordinary(PyObject*, PyObject* given) {
  HANDLE_TH_ERRORS
  THPObjectPtr sequence(PySequence_Fast(given, "is_ordinary: expected a sequence"));
  if (!sequence) throw python_error();
  const Py_ssize_t n = PySequence_Fast_GET_SIZE(sequence.get());
  const Tensor* first = nullptr;
  for (Py_ssize_t k = 0; k < n; ++k) {
    PyObject* const object = PySequence_Fast_GET_ITEM(sequence.get(), k);
    if (object == Py_None) continue;
    if (!THPVariable_CheckExact(object)) Py_RETURN_FALSE;
    const Tensor& tensor = THPVariable_Unpack(object);
    if (!is_plain(tensor) || (first != nullptr && tensor.dtype() != first->dtype())) Py_RETURN_FALSE;
    if (first == nullptr) first = &tensor;
  }
  Py_RETURN_TRUE;
  END_HANDLE_TH_ERRORS
}

PyMethodDef methods[] = {
    {"layer_call", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(layer_call)), METH_FASTCALL,
     "layer_call(own, gates, recompute, input, hx): a module's forward, or None if the call is not an ordinary one."},
    {"cell_call", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(cell_call)), METH_FASTCALL,
     "cell_call(own, gates, input, hx): a cell's forward, or None if the call is not an ordinary one."},
    {"is_ordinary", is_ordinary, METH_O, "Whether the kernels take all of these tensors as they are."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

void define_module_calls(PyObject* module) {
  if (PyModule_AddFunctions(module, methods) != 0) throw python_error();
}

}  // namespace fastrnn
