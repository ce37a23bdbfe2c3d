// SPDX-License-Identifier: BSD-3-Clause
// The whole call of a module or cell, from its __call__ on (fastrnn/direct_calls.py): torch.nn.Module.__call__ asks for
// hooks in Python and packs the arguments three times, which takes .7 us, and .9 us with one given by name, of a call
// of 3 to 7 us. Here they are asked for in .1 us. None: torch would do more than to call forward, or the call is not an
// ordinary one.
#include <torch/csrc/jit/frontend/tracer.h>

#include <algorithm>
#include <iterator>

#include "call.h"

namespace fastrnn {
namespace {

// What does not depend on the instance, given by watch_calls(). References are kept for ever.
struct Watched {
  PyObject* own_call;         // DirectCalls.__call__
  PyObject* kind_of;          // of a class: its gates, those of a cell negative; 0: torch's __call__ takes its calls
  PyObject* global_hooks[4];  // torch's dicts
  // What is known of classes, by their version tags: Python gives a class a tag that no other has or had, and a new one
  // after every change of the class or of a base; 0 until then.
  struct Known {
    unsigned int tag;
    int kind;
  } classes[16];
} watched{};

PyObject* whole_call(PyObject* module, PyObject* arguments, PyObject* named);

int kind_of(PyTypeObject* type) {
  constexpr unsigned int kPlaces = std::size(decltype(watched.classes){});
  if (const unsigned int tag = type->tp_version_tag; tag != 0) {
    const Watched::Known& known = watched.classes[tag % kPlaces];
    if (known.tag == tag) return known.kind;
  }
  if (watched.kind_of == nullptr) return 0;
  THPObjectPtr of_class(PyObject_GetAttr(reinterpret_cast<PyObject*>(type), names().call));  // gives it a tag
  if (!of_class) throw python_error();
  const unsigned int tag = type->tp_version_tag;
  THPObjectPtr answer(PyObject_CallOneArg(watched.kind_of, reinterpret_cast<PyObject*>(type)));
  if (!answer) throw python_error();
  const long kind = PyLong_AsLong(answer);
  if (kind == -1 && PyErr_Occurred()) throw python_error();
  // Another thread, or the question itself, may have changed the class meanwhile: then it is asked again next time.
  if (tag == 0 || type->tp_version_tag != tag) return static_cast<int>(kind);
  // Without a frame and a dict of Python's for __call__: .2 us. Python puts its own function back into the slot of a
  // class, and of those derived from it, when the __call__ of one of them or of a base is replaced.
  if (kind != 0 && of_class.get() == watched.own_call) type->tp_call = whole_call;
  watched.classes[tag % kPlaces] = {tag, static_cast<int>(kind)};
  return static_cast<int>(kind);
}

// An entry of a dict, or null.
PyObject* find(PyObject* dict, PyObject* name) {
  PyObject* const found = PyDict_GetItemWithError(dict, name);
  if (found == nullptr && PyErr_Occurred()) throw python_error();
  return found;
}

// Whether torch.nn.Module.__call__ would do nothing but call the module's forward, which is that of its class.
bool only_forward(PyObject* own) {
  if (torch::jit::tracer::isTracing()) return false;
  for (PyObject* const hooks : watched.global_hooks) {
    if (PyDict_GET_SIZE(hooks) != 0) return false;
  }
  // torch.profiler knows a module by the frame of torch.nn.Module.__call__; debuggers stop in frames.
  const PyThreadState* const thread = PyThreadState_Get();
  if (thread->c_profilefunc != nullptr || thread->c_tracefunc != nullptr) return false;
  for (PyObject* const name : names().hooks) {
    PyObject* const hooks = find(own, name);
    if (hooks == nullptr || !PyDict_Check(hooks) || PyDict_GET_SIZE(hooks) != 0) return false;
  }
  PyObject* const compiled = find(own, names().compiled_call);
  return (compiled == nullptr || compiled == Py_None) && find(own, names().call_impl) == nullptr &&
         find(own, names().forward) == nullptr;
}

// What forward() takes, by place or by name; false if there is something else.
struct Given {
  PyObject* arguments[5] = {nullptr, Py_None, Py_None, Py_None, Py_None};  // input, hx, lengths, reset, reset_state
  bool extras = false;  // whether one of the last three is given, be it as None

  bool read(PyObject* tuple, PyObject* dict) {
    const Py_ssize_t count = PyTuple_GET_SIZE(tuple);
    if (count > 2) return false;
    for (Py_ssize_t k = 0; k < count; ++k) arguments[k] = PyTuple_GET_ITEM(tuple, k);
    if (dict == nullptr) return arguments[0] != nullptr;
    Py_ssize_t place = 0;
    const auto& known = names().arguments;
    for (PyObject *name, *value; PyDict_Next(dict, &place, &name, &value);) {
      const Py_ssize_t k = std::find(known, std::end(known), name) - known;
      if (k == std::ssize(arguments) || k < count) return false;
      arguments[k] = value;
      extras |= k > 1;
    }
    return arguments[0] != nullptr;
  }
};

PyObject* call(PyObject* module, PyObject* arguments, PyObject* named) {
  const int kind = kind_of(Py_TYPE(module));
  if (kind == 0) Py_RETURN_NONE;
  THPObjectPtr own(PyObject_GenericGetDict(module, nullptr));
  if (!own) throw python_error();
  Given given;
  if (!only_forward(own) || !given.read(arguments, named)) Py_RETURN_NONE;
  if (kind < 0) {
    if (given.extras) Py_RETURN_NONE;
    return cell(own, -kind, given.arguments[0], given.arguments[1]);
  }
  for (PyObject* const option : names().noise) {
    if (find(own, option) != nullptr) Py_RETURN_NONE;
  }
  PyObject* const recompute = find(own, names().recompute);
  if (recompute != nullptr && !PyBool_Check(recompute)) Py_RETURN_NONE;
  return layer(own, kind, recompute == Py_True, given.arguments[0], given.arguments[1], given.arguments + 2);
}

// In the slot for __call__ of the classes that kind_of() knows: as DirectCalls.__call__.
PyObject* whole_call(PyObject* module, PyObject* arguments, PyObject* named) {
  HANDLE_TH_ERRORS
  THPObjectPtr output(call(module, arguments, named));
  if (!output || output.get() != Py_None) return output.release();
  THPObjectPtr by_torch(PyObject_GetAttr(module, names().call_by_torch));
  return by_torch ? PyObject_Call(by_torch, arguments, named) : nullptr;
  END_HANDLE_TH_ERRORS
}

}  // namespace

PyObject* watch_calls(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 6 && PyCallable_Check(arguments[1]) &&
                       std::all_of(arguments + 2, arguments + 6, [](PyObject* hooks) { return PyDict_Check(hooks); }),
                   "watch_calls: expected (own_call, kind_of, hooks, hooks, hooks, hooks)");
  std::for_each(arguments, arguments + 6, [](PyObject* object) { Py_INCREF(object); });
  watched = {};
  watched.own_call = arguments[0];
  watched.kind_of = arguments[1];
  std::copy(arguments + 2, arguments + 6, watched.global_hooks);
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

PyObject* direct_call(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 3 && PyTuple_Check(arguments[1]) && PyDict_Check(arguments[2]),
                   "direct_call: expected (module, args, kwargs)");
  return call(arguments[0], arguments[1], arguments[2]);
  END_HANDLE_TH_ERRORS
}

}  // namespace fastrnn
