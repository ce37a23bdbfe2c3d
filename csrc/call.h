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
      *dropout, *bidirectional, *proj_size, *mode, *training, *nonlinearity, *prepacked, *current_level, *compiled_call,
      *call_impl, *call, *call_by_torch, *forward, *recompute;
  PyObject *hooks[4], *noise[3];  // a module's own
  PyObject* arguments[5];         // of forward
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
//
// A call of a few microseconds borrows them from their Python objects and keeps Python's lock, which nobody waits for
// longer than that: to hold a tensor of torch 2.13 asks for the lock, and together with giving it back and taking it
// this is .2 us. Any other call owns them: another thread may replace a weight while the kernels run.
class Tensors {
 public:
  bool usual = true;
  bool requires_grad = false;

  // What was added before and the rest: owned, `most` of them in all, if the call is not short, or may record a
  // gradient. `rows` of a step of one row each, of G*H gates from so many inputs and units. Returns the first, which is
  // the only one so far.
  const Tensor* own_unless_short(double rows, int64_t gates, int64_t H, int64_t inputs, size_t most) {
    constexpr double kShort = 1 << 19;  // multiply-adds: 5 us with AVX-512
    constexpr double kRow = 1 << 13;    // what a row of one step costs beside them, in multiply-adds
    const double product = static_cast<double>(gates * padded(H)) * static_cast<double>(inputs + H);
    owns_ = rows * (product + kRow) >= kShort || at::GradMode::is_enabled();
    if (!owns_) return first_;
    held_.reserve(most);
    held_.push_back(*first_);
    return first_ = &held_.back();
  }
  bool owns() const { return owns_; }

  // A tensor that need not be like the others, owned as they are; its address stays.
  const Tensor* hold(const Tensor& tensor) {
    if (!owns_) return &tensor;
    held_.push_back(tensor);
    return &held_.back();
  }

  // The tensor in a Python object; its address stays.
  const Tensor* add(PyObject* object) {
    if (!usual || !THPVariable_CheckExact(object)) {
      usual = false;
      return nullptr;
    }
    const Tensor& tensor = THPVariable_Unpack(object);
    if (!is_plain(tensor) || (first_ != nullptr && tensor.dtype() != first_->dtype())) {
      usual = false;
      return nullptr;
    }
    requires_grad |= tensor.requires_grad();
    const Tensor* const found = hold(tensor);
    if (first_ == nullptr) first_ = found;
    return found;
  }

 private:
  bool owns_ = false;
  const Tensor* first_ = nullptr;
  c10::SmallVector<Tensor, 12> held_;
};

// Python's lock is given back while this lives, if the call owns its tensors.
class Unlocked {
 public:
  explicit Unlocked(const Tensors& tensors) : state_(tensors.owns() ? PyEval_SaveThread() : nullptr) {}
  Unlocked(const Unlocked&) = delete;
  Unlocked& operator=(const Unlocked&) = delete;
  ~Unlocked() {
    if (state_ != nullptr) PyEval_RestoreThread(state_);
  }

 private:
  PyThreadState* state_;
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

// The forward of a module, of a cell; own is its __dict__, extras are lengths, reset and reset_state. None if it is not
// an ordinary call.
PyObject* layer(PyObject* own, int64_t gates, bool recompute, PyObject* input, PyObject* hx, PyObject* const* extras);
PyObject* cell(PyObject* own, int64_t gates, PyObject* input, PyObject* hx);

// As Python calls them: see the table in module_call.cpp.
PyObject* layer_call(PyObject*, PyObject* const* arguments, Py_ssize_t count);
PyObject* cell_call(PyObject*, PyObject* const* arguments, Py_ssize_t count);
PyObject* direct_call(PyObject*, PyObject* const* arguments, Py_ssize_t count);
PyObject* watch_calls(PyObject*, PyObject* const* arguments, Py_ssize_t count);

}  // namespace fastrnn
