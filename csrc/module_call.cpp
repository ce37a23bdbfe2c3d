// SPDX-License-Identifier: BSD-3-Clause
// The short way from a module's call to the kernels: layer_call() and cell_call() read weights and options from the
// module's __dict__, make the initial states and run every layer, in one call from Python. fastrnn/stack.py and
// cells.py try it first. It takes ordinary calls alone and answers None to all others, which then go the long way in
// Python: what is unusual or wrong is decided, and reported, there. What it returns has the same bits.
#include "module_call.h"

#include <ATen/EmptyTensor.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/jit/frontend/tracer.h>

#include <cstring>

#include "call.h"

namespace fastrnn {

Names::Names() {
  const auto name = [](const char* text) { return PyUnicode_InternFromString(text); };
  parameters = name("_parameters"), all_weights = name("_all_weights"), input_size = name("input_size");
  flat_weights = name("_flat_weights");
  hidden_size = name("hidden_size"), num_layers = name("num_layers"), bias = name("bias");
  batch_first = name("batch_first"), dropout = name("dropout"), bidirectional = name("bidirectional");
  proj_size = name("proj_size"), mode = name("mode"), training = name("training");
  nonlinearity = name("nonlinearity"), prepacked = name("_prepacked"), current_level = name("_current_level");
  compiled_call = name("_compiled_call_impl"), call_impl = name("_call_impl");
  call = name("__call__"), call_by_torch = name("_call_by_torch");
  forward = name("forward"), recompute = name("recompute");
  hooks[0] = name("_forward_hooks"), hooks[1] = name("_forward_pre_hooks");
  hooks[2] = name("_backward_hooks"), hooks[3] = name("_backward_pre_hooks");
  noise[0] = name("zoneout"), noise[1] = name("recurrent_dropout"), noise[2] = name("weight_dropout");
  arguments[0] = name("input"), arguments[1] = name("hx"), arguments[2] = name("lengths");
  arguments[3] = name("reset"), arguments[4] = name("reset_state");
  cell_weights[0] = name("weight_ih"), cell_weights[1] = name("weight_hh");
  cell_weights[2] = name("bias_ih"), cell_weights[3] = name("bias_hh");
  PyObject* const module = PyImport_ImportModule("torch.autograd.forward_ad");  // never given back
  if (module == nullptr) throw python_error();
  forward_ad = PyModule_GetDict(module);
}

const Names& names() {
  static const Names made;
  return made;
}

bool ordinary_state() {
  PyObject* const level = PyDict_GetItemWithError(names().forward_ad, names().current_level);
  return level != nullptr && PyLong_AsLong(level) < 0 && !at::autocast::is_autocast_enabled(at::kCPU) &&
         !torch::jit::tracer::isTracing() && c10::impl::TorchDispatchModeTLS::stack_len() == 0 &&
         at::impl::PythonTorchFunctionTLS::stack_len() == 0 && !transform_active();
}

Tensor empty(at::IntArrayRef sizes, at::ScalarType type) { return Tensor(at::detail::empty_cpu(sizes, type)); }

Tensor zeros(at::IntArrayRef sizes, at::ScalarType type) {
  Tensor made = empty(sizes, type);
  if (made.numel() != 0) std::memset(made.mutable_data_ptr(), 0, made.nbytes());
  return made;
}

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

namespace {

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

PyCFunction with_arguments(PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

PyMethodDef methods[] = {
    {"direct_call", with_arguments(direct_call), METH_FASTCALL,
     "direct_call(module, args, kwargs): a whole call, or None where torch.nn.Module.__call__ must take it."},
    {"watch_calls", with_arguments(watch_calls), METH_FASTCALL,
     "watch_calls(own_call, kind_of, *global_hooks): what direct_call asks of a class, and torch's dicts of hooks."},
    {"layer_call", with_arguments(layer_call), METH_FASTCALL,
     "layer_call(own, gates, recompute, input, hx, lengths, reset, reset_state): a module's forward, or None if it is "
     "not an ordinary call."},
    {"cell_call", with_arguments(cell_call), METH_FASTCALL,
     "cell_call(own, gates, input, hx): a cell's forward, or None if the call is not an ordinary one."},
    {"is_ordinary", is_ordinary, METH_O, "Whether the kernels take all of these tensors as they are."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

void define_module_calls(PyObject* module) {
  if (PyModule_AddFunctions(module, methods) != 0) throw python_error();
}

}  // namespace fastrnn
