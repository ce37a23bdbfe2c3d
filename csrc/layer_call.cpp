// SPDX-License-Identifier: BSD-3-Clause
// A call of a module on the short way: options, weights and states from its __dict__, then every layer. See
// module_call.cpp.
#include "call.h"

#include <optional>

#include "cpu/flags.h"
#include "event.h"

namespace fastrnn {
namespace {

using at::IntArrayRef;

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

// The weights of one layer and direction, from the list of their names; false if one is missing or unusual. torch.nn's
// own list of them, `flat`, must hold the same: where it does not, a program has replaced some in one of the two
// places, and stack.py knows which counts.
bool weights_of(Attributes& module, const Stack& s, PyObject* row_names, PyObject* flat, size_t row,
                const Prepacked* prepacked, Tensors& tensors, Weights& weights) {
  if (!PyList_CheckExact(row_names) || PyList_GET_SIZE(row_names) != 2 + 2 * s.bias + (s.P != 0)) return false;
  const Tensor** const slots[] = {&weights.w_ih, &weights.w_hh, &weights.b_ih, &weights.b_hh, &weights.w_hr};
  static const Tensor none;
  const Py_ssize_t count = PyList_GET_SIZE(row_names), in_flat = static_cast<Py_ssize_t>(row) * count;
  if (PyList_GET_SIZE(flat) < in_flat + count) return false;
  Py_ssize_t next = 0;
  for (size_t slot = 0; slot < 5; ++slot) {
    if ((slot >= 2 && slot < 4 && !s.bias) || (slot == 4 && s.P == 0)) {
      if (prepacked != nullptr) prepacked->expect(row, slot, none);
      continue;
    }
    PyObject* const found = module.weight(PyList_GET_ITEM(row_names, next));
    if (found == nullptr || found != PyList_GET_ITEM(flat, in_flat + next)) return false;
    ++next;
    const Tensor* const tensor = tensors.add(found);
    if (tensor == nullptr) return false;
    if (prepacked != nullptr) prepacked->expect(row, slot, *tensor);
    *slots[slot] = tensor;
  }
  if (prepacked != nullptr) weights.packed = prepacked->direction(row);
  return true;
}

// What a call has beside input and states. Null: not given, or without effect.
struct Extras {
  const Tensor* lengths;         // [B]
  const Tensor* reset;           // [T, B], [B, T] with batch_first, [T] without a batch
  const Tensor* reset_state[2];  // as hx, or [L*D, 1, ...]
};

// A tensor of the type in a Python object, which may be None; false if it is something else.
bool dense_of(PyObject* object, at::ScalarType type, const Tensor*& found) {
  if (object == Py_None) return true;
  if (!THPVariable_CheckExact(object)) return false;
  found = &THPVariable_Unpack(object);
  return found->scalar_type() == type && is_dense(*found);
}

// The elements of a tensor that has them one behind the other, else null.
template <class Element>
const Element* elements_of(const Tensor& tensor) {
  const c10::TensorImpl& impl = *tensor.unsafeGetTensorImpl();
  if (!impl.is_contiguous() || !impl.has_storage()) return nullptr;
  const c10::Storage& storage = impl.unsafe_storage();
  const auto end = static_cast<size_t>(impl.storage_offset() + impl.numel()) * sizeof(Element);
  if (storage.data() == nullptr || end > storage.nbytes()) return nullptr;
  return static_cast<const Element*>(storage.data()) + impl.storage_offset();
}

// Whether every sequence takes all T steps, whether no state is replaced: then the call is one without lengths or
// resets, and nothing is done for them. False where it takes more to find out: the kernels ask again.
bool all_whole(const Tensor& lengths, int64_t T) {
  const auto* const values = elements_of<int64_t>(lengths);
  const int64_t count = lengths.numel();
  for (int64_t b = 0; b < count; ++b) {
    if (values == nullptr || values[b] != T) return false;
  }
  return true;
}

bool all_clear(const Tensor& reset) {
  const auto* const flags = elements_of<uint8_t>(reset);
  return flags != nullptr && !any_set(flags, reset.numel());
}

// Extras as modules take them, their shapes checked; false if one is unusual or wrong.
bool extras_of(PyObject* const* given, const Stack& s, const Tensor& x, int64_t T, int64_t B, Tensors& tensors,
               Extras& extras) {
  const bool unbatched = x.dim() == 2;
  const Tensor *lengths = nullptr, *reset = nullptr;
  if (!dense_of(given[0], at::kLong, lengths) || !dense_of(given[1], at::kBool, reset)) return false;
  if (lengths != nullptr) {
    if (unbatched || !lengths->sizes().equals({B})) return false;
    if (!all_whole(*lengths, T)) extras.lengths = tensors.hold(*lengths);
  }
  if (reset == nullptr) return given[2] == Py_None;
  const IntArrayRef flags = reset->sizes();
  if (!(unbatched ? flags.equals({T}) : s.batch_first ? flags.equals({B, T}) : flags.equals({T, B}))) return false;
  if (given[2] == Py_None && all_clear(*reset)) return true;
  extras.reset = tensors.hold(*reset);
  if (given[2] == Py_None) return true;
  if (!states_of(given[2], s.cell, tensors, extras.reset_state)) return false;
  const int64_t widths[2] = {s.R, s.H};
  for (int k = 0; k < 2; ++k) {
    if (extras.reset_state[k] == nullptr) continue;
    const IntArrayRef sizes = extras.reset_state[k]->sizes();
    if (unbatched
            ? !sizes.equals({s.L * s.D, widths[k]})
            : sizes.size() != 3 || sizes[0] != s.L * s.D || (sizes[1] != B && sizes[1] != 1) || sizes[2] != widths[k]) {
      return false;
    }
  }
  return true;
}

// All layers without gradient: the states of layer l are slices of those of the call, and its y is the x of the next.
LayerResults run_layers(const Stack& s, const c10::SmallVectorImpl<LayerArguments>& layers, const Tensor& x,
                        const Tensor* (&hx)[2], const Extras& extras, int64_t B) {
  const auto type = x.scalar_type();
  const bool lstm = s.cell == Cell::lstm;
  const Tensor* reset = extras.reset;
  Tensor turned;
  if (reset != nullptr && (s.batch_first || reset->dim() == 1)) {
    const IntArrayRef strides = reset->strides();
    const bool unbatched = strides.size() == 1;
    turned = alias(*reset, {x.size(0), B}, {strides[unbatched ? 0 : 1], strides[0]});
    reset = &turned;
  }
  LayerResults all;
  if (s.L > 1) {
    all.h_n = empty({s.L * s.D, B, s.R}, type);
    if (lstm) all.c_n = empty({s.L * s.D, B, s.H}, type);
  }
  for (int64_t l = 0; l < s.L; ++l) {
    const auto slice = [&](const Tensor& states, int64_t width) {
      const IntArrayRef strides = states.strides();
      const bool one = states.dim() == 2 || states.size(1) == 1;  // without B, or one row for the whole batch
      const int64_t along = one ? 0 : strides[1];
      return alias(states, {s.D, B, width}, {strides[0], along, states.stride(-1)}, l * s.D * strides[0]);
    };
    LayerArguments a = layers[static_cast<size_t>(l)];
    const Tensor below = std::move(all.y);
    a.x = l == 0 ? &x : &below;
    a.from_zero = hx[0] == nullptr;
    Tensor h0, c0, reset_h, reset_c;
    if (hx[0] != nullptr) a.h0 = &(h0 = slice(*hx[0], s.R));
    if (hx[1] != nullptr) a.c0 = &(c0 = slice(*hx[1], s.H));
    a.lengths = extras.lengths;
    a.reset = reset;
    if (extras.reset_state[0] != nullptr) a.reset_h = &(reset_h = slice(*extras.reset_state[0], s.R));
    if (extras.reset_state[1] != nullptr) a.reset_c = &(reset_c = slice(*extras.reset_state[1], s.H));
    LayerResults given;
    if (s.L > 1) {
      given.h_n = slice(all.h_n, s.R);
      if (lstm) given.c_n = slice(all.c_n, s.H);
    }
    const Event event(a);
    LayerResults made = cpu::layer_forward(a, checks::Checker(a).layer(), false, given);
    all.y = std::move(made.y);
    if (s.L == 1) all.h_n = std::move(made.h_n), all.c_n = std::move(made.c_n);
  }
  return all;
}

// One layer with gradient, through views that torch differentiates.
LayerResults record_layer(const Stack& s, LayerArguments a, const Tensor& input, const Tensor* (&hx)[2],
                          const Extras& extras, int64_t B, bool unbatched, bool recompute) {
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
  Tensor reset, reset_h, reset_c;
  a.lengths = extras.lengths;
  if (extras.reset != nullptr) {
    reset = unbatched ? extras.reset->unsqueeze(1) : s.batch_first ? extras.reset->transpose(0, 1) : *extras.reset;
    a.reset = &reset;
  }
  const auto rows = [&](const Tensor& state, int64_t width) {
    return unbatched ? state.unsqueeze(1) : state.size(1) == B ? state : state.expand({s.D, B, width});
  };
  if (extras.reset_state[0] != nullptr) a.reset_h = &(reset_h = rows(*extras.reset_state[0], s.R));
  if (extras.reset_state[1] != nullptr) a.reset_c = &(reset_c = rows(*extras.reset_state[1], s.H));
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

}  // namespace

PyObject* layer(PyObject* own, int64_t gates, bool recompute, PyObject* input, PyObject* hx, PyObject* const* given) {
  if (!ordinary_state()) Py_RETURN_NONE;
  Attributes module(own);
  if (!module.usual) Py_RETURN_NONE;
  const std::optional<Stack> found = stack_of(module, gates);
  if (!found) Py_RETURN_NONE;
  const Stack& s = *found;
  PyObject* const rows = module.object(names().all_weights);
  PyObject* const flat = module.object(names().flat_weights);
  if (rows == nullptr || !PyList_CheckExact(rows) || PyList_GET_SIZE(rows) != s.L * s.D) Py_RETURN_NONE;
  const Py_ssize_t weights = s.L * s.D * (2 + 2 * s.bias + (s.P != 0));
  if (flat == nullptr || !PyList_CheckExact(flat) || PyList_GET_SIZE(flat) != weights) Py_RETURN_NONE;

  Tensors tensors;
  const Tensor* x = tensors.add(input);
  if (x == nullptr) Py_RETURN_NONE;
  const bool unbatched = x->dim() == 2;
  if (!unbatched && x->dim() != 3) Py_RETURN_NONE;
  const bool swapped = s.batch_first && !unbatched;
  const int64_t T = x->size(swapped ? 1 : 0), B = unbatched ? 1 : x->size(swapped ? 0 : 1);
  if (T < 1 || x->size(-1) != s.I) Py_RETURN_NONE;
  const double steps = static_cast<double>(T) * static_cast<double>(B) * static_cast<double>(s.L * s.D);
  x = tensors.own_unless_short(steps, gates, s.H, std::max(s.I, s.D * s.H), static_cast<size_t>(7 + weights));
  const Tensor* states[2] = {};
  if (hx != Py_None && !states_of(hx, s.cell, tensors, states)) Py_RETURN_NONE;
  const int64_t widths[2] = {s.R, s.H};
  for (int k = 0; k < 2; ++k) {
    if (states[k] == nullptr) continue;
    const IntArrayRef sizes = states[k]->sizes();
    const bool fits = unbatched ? sizes.equals({s.L * s.D, widths[k]}) : sizes.equals({s.L * s.D, B, widths[k]});
    if (!fits) Py_RETURN_NONE;
  }
  Extras extras{};
  if (!extras_of(given, s, *x, T, B, tensors, extras)) Py_RETURN_NONE;

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
      if (!weights_of(module, s, PyList_GET_ITEM(rows, row), flat, static_cast<size_t>(row), prepacked, tensors,
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
    const Unlocked unlocked(tensors);
    if (recorded) {
      results = record_layer(s, layers[0], *x, states, extras, B, unbatched, recompute);
    } else {
      const c10::impl::ExcludeDispatchKeyGuard below(layers_above());
      const IntArrayRef strides = x->strides();
      Tensor major;  // x as [T, B, I]; x itself is not copied, which would count its Python object
      if (unbatched) major = alias(*x, {T, 1, s.I}, {strides[0], strides[0], strides[1]});
      if (swapped) major = alias(*x, {T, B, s.I}, {strides[1], strides[0], strides[2]});
      results = run_layers(s, layers, unbatched || swapped ? major : *x, states, extras, B);
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
}

PyObject* layer_call(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 8 && PyDict_Check(arguments[0]) && PyLong_Check(arguments[1]),
                   "layer_call: expected (own, gates, recompute, input, hx, lengths, reset, reset_state)");
  return layer(arguments[0], PyLong_AsLong(arguments[1]), arguments[2] == Py_True, arguments[3], arguments[4],
               arguments + 5);
  END_HANDLE_TH_ERRORS
}

}  // namespace fastrnn
