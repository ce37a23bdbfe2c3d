// SPDX-License-Identifier: BSD-3-Clause
// A call of a cell on the short way: one step, with its weights and states from the cell's __dict__. See
// module_call.cpp.
#include "call.h"
#include "event.h"

namespace fastrnn {
namespace {

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
  a.x = &steps;
  a.from_zero = hx[0] == nullptr;
  Tensor h0, c0;
  if (hx[0] != nullptr) a.h0 = &(h0 = one(*hx[0], H));
  if (hx[1] != nullptr) a.c0 = &(c0 = one(*hx[1], H));
  const Event event(a);
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

}  // namespace

PyObject* cell(PyObject* own, int64_t gates, PyObject* input, PyObject* hx) {
  if (!ordinary_state()) Py_RETURN_NONE;
  Attributes module(own);
  if (!module.usual) Py_RETURN_NONE;
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

  Tensors tensors;
  const Tensor* x = tensors.add(input);
  if (x == nullptr || (x->dim() != 1 && x->dim() != 2) || x->size(-1) != I) Py_RETURN_NONE;
  const bool unbatched = x->dim() == 1;
  const int64_t B = unbatched ? 1 : x->size(0);
  x = tensors.own_unless_short(static_cast<double>(B), gates, H, I, 7);
  const Tensor* states[2] = {};
  if (hx != Py_None && !states_of(hx, a.cell, tensors, states)) Py_RETURN_NONE;
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
    const Unlocked unlocked(tensors);
    results = recorded ? record_step(a, *x, states, B, H) : run_step(a, *x, states, B, I, H);
  }
  return wrapped(std::move(results.h_n), std::move(results.c_n), a.cell == Cell::lstm);
}

PyObject* cell_call(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 4 && PyDict_Check(arguments[0]) && PyLong_Check(arguments[1]),
                   "cell_call: expected (own, gates, input, hx)");
  return cell(arguments[0], PyLong_AsLong(arguments[1]), arguments[2], arguments[3]);
  END_HANDLE_TH_ERRORS
}

}  // namespace fastrnn
