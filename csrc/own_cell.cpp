// SPDX-License-Identifier: BSD-3-Clause
// Layers of a cell that another library brings: loads the library (cpu/own_cell.h), and runs its kernels with the
// checks, threads and scratch of the cells here. fastrnn/own_cells.py calls it and has the derivative.
#include "own_cell.h"

#include <dlfcn.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "arguments.h"
#include "checks.h"
#include "cpu/kernels.h"
#include "event.h"

namespace fastrnn {
namespace {

using Tensors = std::vector<std::optional<Tensor>>;

// A library with a cell of its own. It stays loaded, as fastrnn itself does.
class Library {
 public:
  explicit Library(const std::string& path) {
    void* const handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (handle == nullptr) fail(path, std::string("does not load: ") + dlerror());
    void* const entry = dlsym(handle, "fastrnn_own_cell");
    if (entry == nullptr) fail(path, "has no fastrnn_own_cell: it was not made by fastrnn.build_cell");
    cell_ = reinterpret_cast<const cpu::OwnCell* (*)()>(entry)();
    if (cell_->layout != cpu::kOwnLayout)
      fail(path, "was compiled from the headers of another fastrnn: build it again");
  }

  const cpu::OwnCell& cell() const { return *cell_; }
  std::string sources() const { return cell_->sources; }
  int64_t gates() const { return cell_->gates; }
  int64_t states() const { return cell_->states; }
  int64_t parameters() const { return cell_->parameters; }
  std::vector<std::string> isas() const {
    std::vector<std::string> names;
    for (int64_t k = 0; k < cell_->isa_count; ++k) names.emplace_back(cell_->isas[k].name);
    return names;
  }

 private:
  [[noreturn]] static void fail(const std::string& path, const std::string& why) {
    C10_THROW_ERROR(Error, c10::str("fastrnn.OwnCell: ", path, " ", why));
  }

  const cpu::OwnCell* cell_;
};

// Hands out the tensors of a list, null for None.
class Reader {
 public:
  Reader(const char* name, const Tensors& tensors) : name_(name), tensors_(tensors) {}

  const Tensor* next() {
    TORCH_CHECK_VALUE(position_ < tensors_.size(), "fastrnn.", name_, ": too few tensors, got ", tensors_.size());
    const std::optional<Tensor>& tensor = tensors_[position_++];
    return tensor.has_value() && tensor->defined() ? &*tensor : nullptr;
  }

  void end() const {
    TORCH_CHECK_VALUE(position_ == tensors_.size(), "fastrnn.", name_, ": got ", tensors_.size(), " tensors, not ",
                      position_);
  }

 private:
  const char* name_;
  const Tensors& tensors_;
  size_t position_ = 0;
};

// tensors: x, h0, (c0), of two directions w_ih, w_hh, b_ih, b_hh, (parameters), then lengths, batch_sizes, reset,
// reset_h, (reset_c).
LayerArguments arguments(const char* name, const cpu::OwnCell& cell, const Tensors& tensors) {
  Reader reader(name, tensors);
  LayerArguments a{};
  a.name = name;
  a.cell = Cell::own;
  a.own = &cell;
  a.x = reader.next();
  a.h0 = reader.next();
  if (cell.states == 2) a.c0 = reader.next();
  for (Weights& w : a.weights) {
    w.w_ih = reader.next();
    w.w_hh = reader.next();
    w.b_ih = reader.next();
    w.b_hh = reader.next();
    if (cell.parameters != 0) w.parameters = reader.next();
  }
  a.lengths = reader.next();
  a.batch_sizes = reader.next();
  a.reset = reader.next();
  a.reset_h = reader.next();
  if (cell.states == 2) a.reset_c = reader.next();
  reader.end();
  return a;
}

std::optional<Tensor> maybe(Tensor tensor) {
  return tensor.defined() ? std::optional<Tensor>(std::move(tensor)) : std::nullopt;
}

// y, h_n, c_n, gates, cells; None for what the cell does not have, or is not saved.
Tensors own_layer(const Library& library, const Tensors& tensors, bool save) {
  const c10::impl::ExcludeDispatchKeyGuard below(layers_above());
  const LayerArguments a = arguments("own_layer", library.cell(), tensors);
  const Event event(a);
  LayerResults r = cpu::layer_forward(a, checks::Checker(a).layer(), save);
  return {maybe(r.y), maybe(r.h_n), maybe(r.c_n), maybe(r.gates), maybe(r.cells)};
}

// d_of: gradients of y, h_n, c_n. saved: y, gates, cells. Bit k of needs: the gradient of the k-th of `tensors` with a
// gradient is wanted: x, states, weights, reset_h, (reset_c). Those that are not come out as [0].
std::vector<Tensor> own_layer_backward(const Library& library, const Tensors& d_of, const Tensors& tensors,
                                       const Tensors& saved, int64_t needs) {
  const c10::impl::ExcludeDispatchKeyGuard below(layers_above());
  const char* const name = "own_layer_backward";
  BackwardArguments b{};
  b.layer = arguments(name, library.cell(), tensors);
  Reader gradients(name, d_of), kept(name, saved);
  b.d_y = gradients.next();
  b.d_h_n = gradients.next();
  b.d_c_n = gradients.next();
  gradients.end();
  b.y = kept.next();
  b.gates = kept.next();
  b.cells = kept.next();
  kept.end();
  b.needs = needs;
  const int64_t states = library.cell().states, slots = library.cell().parameters != 0 ? 5 : 4;
  const int64_t count = 1 + states + 2 * slots + states;
  checks::Checker checker(b.layer);
  const Sizes sizes = checker.layer();
  checker.backward(b, sizes, static_cast<int>(count));
  const Event event(b.layer, Event::kBackward);
  Gradients found = cpu::layer_backward(b, sizes);
  return {std::make_move_iterator(found.begin()), std::make_move_iterator(found.begin() + count)};
}

}  // namespace

void define_own_cells(pybind11::module_& m) {
  py::class_<Library>(m, "OwnCell", "A library with a cell of its own, made by fastrnn.build_cell.")
      .def(py::init([](const std::string& path) {
        HANDLE_TH_ERRORS
        return Library(path);
        END_HANDLE_TH_ERRORS_PYBIND
      }))
      .def_property_readonly("sources", &Library::sources, "Digest of the headers that it was compiled from.")
      .def_property_readonly("gates", &Library::gates)
      .def_property_readonly("states", &Library::states)
      .def_property_readonly("parameters", &Library::parameters)
      .def_property_readonly("isas", &Library::isas, "Instruction sets that it was compiled for.");
  m.def("own_isa", [] { return std::string(cpu::own_isa()); }, "The instruction set to compile a cell for.");
  m.def("own_layer", torch::wrap_pybind_function_no_gil(own_layer));
  m.def("own_layer_backward", torch::wrap_pybind_function_no_gil(own_layer_backward));
}

}  // namespace fastrnn
