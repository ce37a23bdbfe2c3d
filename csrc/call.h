// SPDX-License-Identifier: BSD-3-Clause
// What a call of a module and one of a cell share on the short way: attributes and weights out of the module's
// __dict__, the tensors of the call, states and results. Included by module_call.cpp, layer_call.cpp and cell_call.cpp.
#pragma once
#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/object_ptr.h>
#include <torch/csrc/utils/pybind.h>

#include "arguments.h"
#include "checks.h"
#include "derivative.h"
#include "prepacked.h"

namespace fastrnn {

// Names of attributes, interned once.
struct Names {
  PyObject *parameters, *all_weights, *flat_weights, *input_size, *hidden_size, *num_layers, *bias, *batch_first,
      *dropout, *bidirectional, *proj_size, *mode, *training, *nonlinearity, *prepacked, *current_level;
  PyObject* cell_weights[4];
  PyObject* forward_ad;  // the __dict__ of torch.autograd.forward_ad

  Names();
};

const Names& names();

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
  // As read_weights() of fastrnn/stack.py reads them, but for a property of the class.
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
bool ordinary_state();

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
  c10::SmallVector<Tensor, 12> held_;  // owners: another thread may replace a weight while the kernels run
};

// Memory of the CPU, without torch's dispatcher; zeros() fills it.
Tensor empty(at::IntArrayRef sizes, at::ScalarType type);
Tensor zeros(at::IntArrayRef sizes, at::ScalarType type);

// What a kernel has just made, under other sizes.
inline void set_sizes(Tensor& fresh, at::IntArrayRef sizes) {
  fresh.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
}

// (first, second), or first alone if `both` is false.
PyObject* wrapped(Tensor&& first, Tensor&& second, bool both);

// The initial states as a call gives them, (h, c) or h; false if they have another form.
bool states_of(PyObject* hx, Cell cell, Tensors& tensors, const Tensor* (&states)[2]);

// Raises if a call that needs a gradient is made inside `with fastrnn.prepacked(module):`.
void refuse_gradient(const Prepacked* prepacked, bool recorded);

// layer_call(own, gates, recompute, input, hx, lengths, reset, reset_state) and cell_call(own, gates, input, hx): own
// is the module's __dict__.
PyObject* layer_call(PyObject*, PyObject* const* arguments, Py_ssize_t count);
PyObject* cell_call(PyObject*, PyObject* const* arguments, Py_ssize_t count);

}  // namespace fastrnn
