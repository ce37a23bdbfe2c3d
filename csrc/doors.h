// SPDX-License-Identifier: BSD-3-Clause
// From the flat argument list of an operator to the structs of arguments.h, through the checks, to a backend, and back.
// ops.cpp and cuda/device.cpp hand these functions to the dispatcher, module.cpp those of the CPU to pybind11.
//
// A Backend has kDevice, the type of device whose tensors it takes; forward, backward and row_gradients, with arguments
// and results as cpu::layer_forward and its siblings; and nothing(y, type), an empty tensor of y's device.
#pragma once
#include <c10/util/Exception.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <tuple>
#include <utility>

#include "arguments.h"
#include "checks.h"

namespace fastrnn {
namespace doors {

using Given = const Tensor&;                 // Tensor
using Maybe = const std::optional<Tensor>&;  // Tensor?

constexpr int kMostArguments = 29;  // of lstm_layer_backward

// Takes up the arguments of one call and hands them out again in the order of the schema.
class Reader {
 public:
  void add(Given tensor) { *tensors_end_++ = &tensor; }
  void add(Maybe tensor) { *tensors_end_++ = tensor.has_value() && tensor->defined() ? &*tensor : nullptr; }
  void add(bool flag) { *integers_end_++ = flag; }
  void add(int64_t integer) { *integers_end_++ = integer; }

  const Tensor* tensor() { return *tensor_++; }
  int64_t integer() { return *integer_++; }

  // A registered derivative knows nothing of forward mode: without this its tangent would be zero, and no error.
  void refuse_tangents(const char* name) const {
    for (const Tensor* const* tensor = tensors_; tensor != tensors_end_; ++tensor) {
      TORCH_CHECK_NOT_IMPLEMENTED(*tensor == nullptr || !(*tensor)->_fw_grad(0).defined(), "fastrnn.", name,
                                  ": no forward-mode derivative here; fastrnn.functional has it");
    }
  }

  LayerArguments layer(const char* name, Cell cell) {
    refuse_tangents(name);
    const bool lstm = cell == Cell::lstm;
    LayerArguments a{};
    a.name = name;
    a.cell = cell;
    a.x = tensor();
    a.h0 = tensor();
    if (lstm) a.c0 = tensor();
    for (Weights& w : a.weights) {
      w.w_ih = tensor();
      w.w_hh = tensor();
      w.b_ih = tensor();
      w.b_hh = tensor();
      if (lstm) w.w_hr = tensor();
    }
    a.lengths = tensor();
    a.batch_sizes = tensor();
    a.reset = tensor();
    a.reset_h = tensor();
    if (lstm) a.reset_c = tensor();
    a.h_mask = tensor();
    a.zoneout_h = tensor();
    if (lstm) a.zoneout_c = tensor();
    return a;
  }

  BackwardArguments backward(const char* name, Cell cell) {
    const bool lstm = cell == Cell::lstm;
    BackwardArguments b{};
    b.d_y = tensor();
    b.d_h_n = tensor();
    if (lstm) b.d_c_n = tensor();
    b.layer = layer(name, cell);
    b.y = tensor();
    if (saved_per_unit(cell) != 0) b.gates = tensor();
    if (lstm) b.cells = tensor();
    return b;
  }

 private:
  const Tensor* tensors_[kMostArguments];
  int64_t integers_[2];
  const Tensor** tensors_end_ = tensors_;
  const Tensor** tensor_ = tensors_;
  int64_t* integers_end_ = integers_;
  int64_t* integer_ = integers_;
};

template <class Backend>
LayerResults forward(const LayerArguments& arguments, bool save) {
  return Backend::forward(arguments, checks::Checker(arguments, Backend::kDevice).layer(), save);
}

// gates or cells as an operator returns them: [0] when not saved.
template <class Backend>
Tensor or_nothing(Tensor saved, const Tensor& y) {
  return saved.defined() ? saved : Backend::nothing(y, y.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
}

template <size_t... k>
auto tuple_of(Gradients&& gradients, std::index_sequence<k...>) {
  return std::make_tuple(std::move(gradients[k])...);
}

template <class Backend, int count>
auto backward(const BackwardArguments& arguments) {
  checks::Checker checker(arguments.layer, Backend::kDevice);
  const Sizes sizes = checker.layer();
  checker.backward(arguments, sizes, count);
  return tuple_of(Backend::backward(arguments, sizes), std::make_index_sequence<count>());
}

template <class Backend>
RowGradients row_gradients(const BackwardArguments& arguments) {
  const LayerArguments& a = arguments.layer;
  const bool extended = a.lengths || a.reset || a.reset_h || a.reset_c || a.h_mask || a.zoneout_h || a.zoneout_c;
  TORCH_CHECK_NOT_IMPLEMENTED(!extended, "fastrnn.", a.name, ": lengths, resets and masks are not supported here");
  checks::Checker checker(a, Backend::kDevice);
  const Sizes sizes = checker.layer();
  checker.backward(arguments, sizes, arguments.layer.cell == Cell::lstm ? 3 : 2);
  return Backend::row_gradients(arguments, sizes);
}

inline Cell rnn_cell(bool relu) { return relu ? Cell::rnn_relu : Cell::rnn_tanh; }

// ---- the operators -------------------------------------------------------------------------------------------------

template <class Backend>
auto lstm_layer(Reader& next) {
  LayerResults r = forward<Backend>(next.layer("lstm_layer", Cell::lstm), next.integer());
  return std::make_tuple(r.y, r.h_n, r.c_n, or_nothing<Backend>(r.gates, r.y), or_nothing<Backend>(r.cells, r.y));
}

template <class Backend>
auto gru_layer(Reader& next) {
  LayerResults r = forward<Backend>(next.layer("gru_layer", Cell::gru), next.integer());
  return std::make_tuple(r.y, r.h_n, or_nothing<Backend>(r.gates, r.y));
}

template <class Backend>
auto rnn_layer(Reader& next) {
  LayerArguments a = next.layer("rnn_layer", Cell::rnn_tanh);
  a.cell = rnn_cell(next.integer());
  LayerResults r = forward<Backend>(a, next.integer());
  return std::make_tuple(std::move(r.y), std::move(r.h_n));
}

template <class Backend>
auto lstm_layer_backward(Reader& next) {
  BackwardArguments b = next.backward("lstm_layer_backward", Cell::lstm);
  b.d_cells = next.tensor();
  b.needs = next.integer();
  return backward<Backend, gradient_count(Cell::lstm)>(b);
}

template <class Backend>
auto gru_layer_backward(Reader& next) {
  BackwardArguments b = next.backward("gru_layer_backward", Cell::gru);
  b.needs = next.integer();
  return backward<Backend, gradient_count(Cell::gru)>(b);
}

template <class Backend>
auto rnn_layer_backward(Reader& next) {
  BackwardArguments b = next.backward("rnn_layer_backward", Cell::rnn_tanh);
  b.layer.cell = rnn_cell(next.integer());
  b.needs = next.integer();
  return backward<Backend, gradient_count(Cell::rnn_tanh)>(b);
}

template <class Backend>
auto lstm_layer_row_gradients(Reader& next) {
  BackwardArguments b = next.backward("lstm_layer_row_gradients", Cell::lstm);
  b.needs = next.integer();
  RowGradients r = row_gradients<Backend>(b);
  return std::make_tuple(std::move(r.d_x), std::move(r.d_h0), std::move(r.d_c0), std::move(r.d_gates),
                         std::move(r.d_h));
}

template <class Backend>
auto gru_layer_row_gradients(Reader& next) {
  BackwardArguments b = next.backward("gru_layer_row_gradients", Cell::gru);
  b.needs = next.integer();
  RowGradients r = row_gradients<Backend>(b);
  return std::make_tuple(std::move(r.d_x), std::move(r.d_h0), std::move(r.d_gates));
}

template <class Backend>
auto rnn_layer_row_gradients(Reader& next) {
  BackwardArguments b = next.backward("rnn_layer_row_gradients", Cell::rnn_tanh);
  b.layer.cell = rnn_cell(next.integer());
  b.needs = next.integer();
  RowGradients r = row_gradients<Backend>(b);
  return std::make_tuple(std::move(r.d_x), std::move(r.d_h0), std::move(r.d_gates));
}

// ---- their C++ signatures, compared with the schemas when they are registered --------------------------------------

template <class... A>
struct Types {};
template <class... A, class... B>
constexpr Types<A..., B...> operator+(Types<A...>, Types<B...>) {
  return {};
}

constexpr Types<Given> given;
constexpr Types<Maybe> maybe;
constexpr Types<bool> flag;
constexpr Types<int64_t> integer;

constexpr auto weights = given + given + maybe + maybe;
constexpr auto weights_reverse = maybe + maybe + maybe + maybe;
constexpr auto gru_extras = maybe + maybe + maybe + maybe + maybe + maybe;
constexpr auto lstm_extras = gru_extras + maybe + maybe;
constexpr auto gru_inputs = given + given + weights + weights_reverse + gru_extras;
constexpr auto lstm_inputs = given + given + given + weights + maybe + weights_reverse + maybe + lstm_extras;
constexpr auto rnn_inputs = gru_inputs;
constexpr auto gru_cotangents = maybe + maybe;
constexpr auto lstm_cotangents = maybe + maybe + maybe;
constexpr auto rnn_cotangents = gru_cotangents;

template <auto body, class Signature>
struct Operator;
template <auto body, class... A>
struct Operator<body, Types<A...>> {
  static_assert(sizeof...(A) <= kMostArguments);
  static auto call(A... argument) {
    const c10::impl::ExcludeDispatchKeyGuard below(layers_above());
    Reader reader;
    (reader.add(argument), ...);
    return body(reader);
  }
};

// Calls define(name, function) for every operator.
template <class Backend, class Define>
void for_each_operator(Define define) {
  define("lstm_layer", &Operator<lstm_layer<Backend>, decltype(lstm_inputs + flag)>::call);
  define("gru_layer", &Operator<gru_layer<Backend>, decltype(gru_inputs + flag)>::call);
  define("rnn_layer", &Operator<rnn_layer<Backend>, decltype(rnn_inputs + flag + flag)>::call);
  using LstmRows = decltype(lstm_cotangents + lstm_inputs + given + given + given + integer);
  using LstmBackward = decltype(LstmRows() + maybe);  // d_cells
  using GruBackward = decltype(gru_cotangents + gru_inputs + given + given + integer);
  using RnnBackward = decltype(rnn_cotangents + rnn_inputs + given + flag + integer);
  define("lstm_layer_backward", &Operator<lstm_layer_backward<Backend>, LstmBackward>::call);
  define("gru_layer_backward", &Operator<gru_layer_backward<Backend>, GruBackward>::call);
  define("rnn_layer_backward", &Operator<rnn_layer_backward<Backend>, RnnBackward>::call);
  define("lstm_layer_row_gradients", &Operator<lstm_layer_row_gradients<Backend>, LstmRows>::call);
  define("gru_layer_row_gradients", &Operator<gru_layer_row_gradients<Backend>, GruBackward>::call);
  define("rnn_layer_row_gradients", &Operator<rnn_layer_row_gradients<Backend>, RnnBackward>::call);
}

}  // namespace doors
}  // namespace fastrnn
