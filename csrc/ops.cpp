// SPDX-License-Identifier: BSD-3-Clause
// The nine operators: their schemas, and the two doors to the same functions: torch.ops.fastrnn.* (the dispatcher) and
// fastrnn._C.* (pybind11: no dispatcher, no autograd). Derivatives and fake kernels are registered in
// fastrnn/autograd.py. fastrnn._C also tells how it was built and which instruction set runs.
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <fstream>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "arguments.h"
#include "checks.h"
#include "cpu/layer.h"
#include "cpu/roofline.h"
#include "derivative.h"
#include "module_call.h"
#include "prepacked.h"

// ---- schemas -------------------------------------------------------------------------------------------------------
// d_* is the gradient of *. Bit k of `needs`: output k of the backward is wanted; those that are not come out as [0].
// *_row_gradients is the backward without the sums over rows, for gradients of the weights that are summed otherwise
// (one for each sample): d_gates [D, N, stored*H] and d_h [D, N, P] are always wanted, see cpu/layer.h.
// clang-format off
#define WEIGHTS "Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh"
#define WEIGHTS_REVERSE "Tensor? w_ih_reverse, Tensor? w_hh_reverse, Tensor? b_ih_reverse, Tensor? b_hh_reverse"
#define LSTM_INPUTS "Tensor x, Tensor h0, Tensor c0, " \
  WEIGHTS ", Tensor? w_hr, " WEIGHTS_REVERSE ", Tensor? w_hr_reverse, " \
  "Tensor? lengths, Tensor? batch_sizes, Tensor? reset, Tensor? reset_h, Tensor? reset_c, Tensor? h_mask, " \
  "Tensor? zoneout_h, Tensor? zoneout_c"
#define GRU_INPUTS "Tensor x, Tensor h0, " WEIGHTS ", " WEIGHTS_REVERSE ", " \
  "Tensor? lengths, Tensor? batch_sizes, Tensor? reset, Tensor? reset_h, Tensor? h_mask, Tensor? zoneout_h"
#define RNN_INPUTS GRU_INPUTS

#define D_WEIGHTS "Tensor d_w_ih, Tensor d_w_hh, Tensor d_b_ih, Tensor d_b_hh"
#define D_WEIGHTS_REVERSE \
  "Tensor d_w_ih_reverse, Tensor d_w_hh_reverse, Tensor d_b_ih_reverse, Tensor d_b_hh_reverse"
#define LSTM_GRADIENTS "(Tensor d_x, Tensor d_h0, Tensor d_c0, " \
  D_WEIGHTS ", Tensor d_w_hr, " D_WEIGHTS_REVERSE ", Tensor d_w_hr_reverse, Tensor d_reset_h, Tensor d_reset_c)"
#define GRU_GRADIENTS "(Tensor d_x, Tensor d_h0, " D_WEIGHTS ", " D_WEIGHTS_REVERSE ", Tensor d_reset_h)"
#define RNN_GRADIENTS GRU_GRADIENTS

TORCH_LIBRARY(fastrnn, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  m.def("lstm_layer(" LSTM_INPUTS ", bool save)"
        " -> (Tensor y, Tensor h_n, Tensor c_n, Tensor gates, Tensor cells)", tags);
  m.def("gru_layer(" GRU_INPUTS ", bool save) -> (Tensor y, Tensor h_n, Tensor gates)", tags);
  m.def("rnn_layer(" RNN_INPUTS ", bool relu, bool save) -> (Tensor y, Tensor h_n)", tags);

  m.def("lstm_layer_backward(Tensor? d_y, Tensor? d_h_n, Tensor? d_c_n, " LSTM_INPUTS ", "
        "Tensor y, Tensor gates, Tensor cells, int needs, Tensor? d_cells=None) -> " LSTM_GRADIENTS, tags);
  m.def("gru_layer_backward(Tensor? d_y, Tensor? d_h_n, " GRU_INPUTS ", "
        "Tensor y, Tensor gates, int needs) -> " GRU_GRADIENTS, tags);
  m.def("rnn_layer_backward(Tensor? d_y, Tensor? d_h_n, " RNN_INPUTS ", "
        "Tensor y, bool relu, int needs) -> " RNN_GRADIENTS, tags);

  m.def("lstm_layer_row_gradients(Tensor? d_y, Tensor? d_h_n, Tensor? d_c_n, " LSTM_INPUTS ", "
        "Tensor y, Tensor gates, Tensor cells, int needs)"
        " -> (Tensor d_x, Tensor d_h0, Tensor d_c0, Tensor d_gates, Tensor d_h)", tags);
  m.def("gru_layer_row_gradients(Tensor? d_y, Tensor? d_h_n, " GRU_INPUTS ", "
        "Tensor y, Tensor gates, int needs) -> (Tensor d_x, Tensor d_h0, Tensor d_gates)", tags);
  m.def("rnn_layer_row_gradients(Tensor? d_y, Tensor? d_h_n, " RNN_INPUTS ", "
        "Tensor y, bool relu, int needs) -> (Tensor d_x, Tensor d_h0, Tensor d_gates)", tags);
}
// clang-format on

namespace fastrnn {
namespace {

// ---- from a flat argument list to structs --------------------------------------------------------------------------

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
    if (cpu::saved_per_unit(cell) != 0) b.gates = tensor();
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

LayerResults forward(const LayerArguments& arguments, bool save) {
  return cpu::layer_forward(arguments, checks::Checker(arguments).layer(), save);
}

// gates or cells as an operator returns them: [0] when not saved.
Tensor or_nothing(Tensor saved, const Tensor& y) {
  if (saved.defined()) return saved;
  return at::detail::empty_cpu({0}, y.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
}

template <size_t... k>
auto tuple_of(Gradients&& gradients, std::index_sequence<k...>) {
  return std::make_tuple(std::move(gradients[k])...);
}

template <int count>
auto backward(const BackwardArguments& arguments) {
  checks::Checker checker(arguments.layer);
  const Sizes sizes = checker.layer();
  checker.backward(arguments, sizes, count);
  return tuple_of(cpu::layer_backward(arguments, sizes), std::make_index_sequence<count>());
}

RowGradients row_gradients(const BackwardArguments& arguments) {
  const LayerArguments& a = arguments.layer;
  const bool extended = a.lengths || a.reset || a.reset_h || a.reset_c || a.h_mask || a.zoneout_h || a.zoneout_c;
  TORCH_CHECK_NOT_IMPLEMENTED(!extended, "fastrnn.", a.name, ": lengths, resets and masks are not supported here");
  checks::Checker checker(a);
  const Sizes sizes = checker.layer();
  checker.backward(arguments, sizes, arguments.layer.cell == Cell::lstm ? 3 : 2);
  return cpu::layer_row_gradients(arguments, sizes);
}

Cell rnn_cell(bool relu) { return relu ? Cell::rnn_relu : Cell::rnn_tanh; }

// ---- the operators -------------------------------------------------------------------------------------------------

auto lstm_layer(Reader& next) {
  LayerResults r = forward(next.layer("lstm_layer", Cell::lstm), next.integer());
  return std::make_tuple(r.y, r.h_n, r.c_n, or_nothing(r.gates, r.y), or_nothing(r.cells, r.y));
}

auto gru_layer(Reader& next) {
  LayerResults r = forward(next.layer("gru_layer", Cell::gru), next.integer());
  return std::make_tuple(r.y, r.h_n, or_nothing(r.gates, r.y));
}

auto rnn_layer(Reader& next) {
  LayerArguments a = next.layer("rnn_layer", Cell::rnn_tanh);
  a.cell = rnn_cell(next.integer());
  LayerResults r = forward(a, next.integer());
  return std::make_tuple(std::move(r.y), std::move(r.h_n));
}

auto lstm_layer_backward(Reader& next) {
  BackwardArguments b = next.backward("lstm_layer_backward", Cell::lstm);
  b.d_cells = next.tensor();
  b.needs = next.integer();
  return backward<gradient_count(Cell::lstm)>(b);
}

auto gru_layer_backward(Reader& next) {
  BackwardArguments b = next.backward("gru_layer_backward", Cell::gru);
  b.needs = next.integer();
  return backward<gradient_count(Cell::gru)>(b);
}

auto rnn_layer_backward(Reader& next) {
  BackwardArguments b = next.backward("rnn_layer_backward", Cell::rnn_tanh);
  b.layer.cell = rnn_cell(next.integer());
  b.needs = next.integer();
  return backward<gradient_count(Cell::rnn_tanh)>(b);
}

auto lstm_layer_row_gradients(Reader& next) {
  BackwardArguments b = next.backward("lstm_layer_row_gradients", Cell::lstm);
  b.needs = next.integer();
  RowGradients r = row_gradients(b);
  return std::make_tuple(std::move(r.d_x), std::move(r.d_h0), std::move(r.d_c0), std::move(r.d_gates),
                         std::move(r.d_h));
}

auto gru_layer_row_gradients(Reader& next) {
  BackwardArguments b = next.backward("gru_layer_row_gradients", Cell::gru);
  b.needs = next.integer();
  RowGradients r = row_gradients(b);
  return std::make_tuple(std::move(r.d_x), std::move(r.d_h0), std::move(r.d_gates));
}

auto rnn_layer_row_gradients(Reader& next) {
  BackwardArguments b = next.backward("rnn_layer_row_gradients", Cell::rnn_tanh);
  b.layer.cell = rnn_cell(next.integer());
  b.needs = next.integer();
  RowGradients r = row_gradients(b);
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

// ---- the same with gradient, for eager calls -----------------------------------------------------------------------
// Arguments as the operator's; `save` means that gates and cells are kept, and not computed again by the backward.

LayerResults with_gradient(const LayerArguments& a, bool save) {
  TORCH_CHECK(a.h_mask == nullptr && a.zoneout_h == nullptr && a.zoneout_c == nullptr, "fastrnn.", a.name,
              "_with_gradient: takes no masks");
  Recording recording;
  recording.recompute = !save;
  return layer_with_gradient(a, recording);
}

auto lstm_layer_with_gradient(Reader& next) {
  LayerResults r = with_gradient(next.layer("lstm_layer", Cell::lstm), next.integer());
  return std::make_tuple(r.y, r.h_n, r.c_n);
}

auto gru_layer_with_gradient(Reader& next) {
  LayerResults r = with_gradient(next.layer("gru_layer", Cell::gru), next.integer());
  return std::make_tuple(r.y, r.h_n);
}

auto rnn_layer_with_gradient(Reader& next) {
  LayerArguments a = next.layer("rnn_layer", Cell::rnn_tanh);
  a.cell = rnn_cell(next.integer());
  LayerResults r = with_gradient(a, next.integer());
  return std::make_tuple(r.y, r.h_n);
}

template <auto body, class Signature>
struct Recorded;
template <auto body, class... A>
struct Recorded<body, Types<A...>> {
  static auto call(A... argument) {
    Reader reader;
    (reader.add(argument), ...);
    return body(reader);
  }
};

template <class Define>
void for_each_recorded(Define define) {
  define("lstm_layer_with_gradient", &Recorded<lstm_layer_with_gradient, decltype(lstm_inputs + flag)>::call);
  define("gru_layer_with_gradient", &Recorded<gru_layer_with_gradient, decltype(gru_inputs + flag)>::call);
  define("rnn_layer_with_gradient", &Recorded<rnn_layer_with_gradient, decltype(rnn_inputs + flag + flag)>::call);
}

// Calls define(name, function) for every operator.
template <class Define>
void for_each_operator(Define define) {
  define("lstm_layer", &Operator<lstm_layer, decltype(lstm_inputs + flag)>::call);
  define("gru_layer", &Operator<gru_layer, decltype(gru_inputs + flag)>::call);
  define("rnn_layer", &Operator<rnn_layer, decltype(rnn_inputs + flag + flag)>::call);
  using LstmRows = decltype(lstm_cotangents + lstm_inputs + given + given + given + integer);
  using LstmBackward = decltype(LstmRows() + maybe);  // d_cells
  using GruBackward = decltype(gru_cotangents + gru_inputs + given + given + integer);
  using RnnBackward = decltype(rnn_cotangents + rnn_inputs + given + flag + integer);
  define("lstm_layer_backward", &Operator<lstm_layer_backward, LstmBackward>::call);
  define("gru_layer_backward", &Operator<gru_layer_backward, GruBackward>::call);
  define("rnn_layer_backward", &Operator<rnn_layer_backward, RnnBackward>::call);
  define("lstm_layer_row_gradients", &Operator<lstm_layer_row_gradients, LstmRows>::call);
  define("gru_layer_row_gradients", &Operator<gru_layer_row_gradients, GruBackward>::call);
  define("rnn_layer_row_gradients", &Operator<rnn_layer_row_gradients, RnnBackward>::call);
}

// ---- facts about the build and the process -------------------------------------------------------------------------

std::vector<std::string> available_isas() {
  std::array<const char*, 16> names;
  const int count = cpu::available_isas(names.data(), static_cast<int>(names.size()));
  return {names.begin(), names.begin() + count};
}

void select_isa(const std::string& name) {
  if (cpu::select_isa(name.c_str())) return;
  std::string known;
  for (const std::string& isa : available_isas()) known += (known.empty() ? "" : ", ") + isa;
  C10_THROW_ERROR(ValueError, c10::str("fastrnn.select_isa: name must be one of ", known, ", got ", name));
}

// Paths of the OpenMP runtimes mapped into this process; two of them mean two thread pools that fight for the cores.
std::vector<std::string> openmp_runtimes() {
  std::vector<std::string> paths;
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);) {
    const size_t path = line.find('/');
    if (path == std::string::npos) continue;
    const std::string file = line.substr(line.rfind('/') + 1);
    const bool runtime = file.rfind("libgomp", 0) == 0 || file.rfind("libiomp", 0) == 0 || file.rfind("libomp", 0) == 0;
    if (!runtime) continue;
    const std::string found = line.substr(path);
    if (std::find(paths.begin(), paths.end(), found) == paths.end()) paths.push_back(found);
  }
  return paths;
}

// The plan of a layer of these sizes here and now, for fastrnn.explain: (threads, of them in the team of one direction,
// whether the directions run together, whether a team shares units instead of rows, bytes of scratch). Backward chooses
// by the same sizes.
std::tuple<int, int, bool, bool, size_t> plan(const std::string& cell, bool double_precision, int64_t T, int64_t B,
                                              int64_t I, int64_t H, int64_t P, int64_t D) {
  TORCH_CHECK_VALUE(cell == "lstm" || cell == "gru" || cell == "rnn", "fastrnn.plan: lstm, gru or rnn, got ", cell);
  TORCH_CHECK_VALUE(T > 0 && B > 0 && I > 0 && H > 0 && P >= 0 && (D == 1 || D == 2),
                    "fastrnn.plan: T, B, I and H must be positive, and D must be 1 or 2");
  cpu::LayerForward layer{};
  layer.cell = cell == "lstm" ? Cell::lstm : cell == "gru" ? Cell::gru : Cell::rnn_tanh;
  layer.is_double = double_precision;
  layer.T = T, layer.B = B, layer.I = I, layer.H = H, layer.P = P, layer.D = D, layer.N = T * B;
  const cpu::Plan chosen = cpu::plan_forward(layer, at::get_num_threads());
  return {chosen.threads, chosen.members, chosen.together, chosen.split_units, chosen.scratch_bytes};
}

const char* compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

TORCH_LIBRARY_IMPL(fastrnn, CPU, m) {
  for_each_operator([&](const char* name, auto function) { m.impl(name, function); });
}

}  // namespace
}  // namespace fastrnn

// A copy of a module, or one that is read from a file, is not inside the block: its packed weights become None.
static void define_prepacked(py::module_& m) {
  using fastrnn::Cell, fastrnn::Prepacked;
  py::class_<Prepacked>(m, "Prepacked", "Packed weights of a module and what they were packed from.")
      .def(py::init(
          [](const std::string& cell, int64_t directions, const Prepacked::Rows& rows, const Prepacked::Names& names) {
            TORCH_CHECK_VALUE(cell == "lstm" || cell == "gru" || cell == "rnn",
                              "fastrnn.prepacked: cell is lstm, gru or rnn");
            return Prepacked(cell == "lstm"  ? Cell::lstm
                             : cell == "gru" ? Cell::gru
                                             : Cell::rnn_tanh,
                             directions, rows, names);
          }))
      .def("close", &Prepacked::close, "Ends its use: the block is over.")
      .def("changed", torch::wrap_pybind_function_no_gil(&Prepacked::changed),
           "Names of the weights that are not, or do not hold, what was packed.")
      .def("__deepcopy__", [](const Prepacked&, const py::dict&) { return py::none(); })
      .def("__copy__", [](const Prepacked&) { return py::none(); })
      .def("__reduce__", [](const Prepacked&) { return py::make_tuple(py::type::of(py::none()), py::tuple()); });
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "The operators of fastrnn without the dispatcher and without autograd, and facts about the build.";
  fastrnn::for_each_operator(
      [&](const char* name, auto function) { m.def(name, torch::wrap_pybind_function_no_gil(function)); });
  fastrnn::for_each_recorded(
      [&](const char* name, auto function) { m.def(name, torch::wrap_pybind_function_no_gil(function)); });
  fastrnn::define_module_calls(m.ptr());
  define_prepacked(m);
  m.def("isa", [] { return std::string(fastrnn::cpu::isa_name()); }, "The instruction set in use.");
  m.def("available_isas", &fastrnn::available_isas, "Instruction sets compiled in and supported here, best last.");
  m.def("select_isa", torch::wrap_pybind_function(fastrnn::select_isa), "Switches to an available instruction set.");
  m.def("openmp_runtimes", &fastrnn::openmp_runtimes, "Paths of the OpenMP runtimes in this process.");
  m.def("plan", torch::wrap_pybind_function(fastrnn::plan),
        "How the threads share a layer: (threads, members, together, split_units, scratch_bytes).");
  m.def("compiler", &fastrnn::compiler, "Name and version of the compiler that built this module.");

  using no_gil = py::call_guard<py::gil_scoped_release>;
  m.def(
      "force_split",
      [](const std::string& split) {
        TORCH_CHECK_VALUE(split == "chosen" || split == "rows" || split == "units",
                          "fastrnn.force_split: chosen, rows or units, got ", split);
        using fastrnn::cpu::Split;
        fastrnn::cpu::force_split(split == "rows" ? Split::rows : split == "units" ? Split::units : Split::chosen);
      },
      "How threads share a layer: chosen by its size, or forced, for the tests.");
  m.def(
      "activation",
      [](const std::string& name, const at::Tensor& x) {
        TORCH_CHECK_VALUE(name == "sigmoid" || name == "tanh", "fastrnn.activation: sigmoid or tanh, got ", name);
        TORCH_CHECK(x.device().is_cpu() && (x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble),
                    "fastrnn.activation: x must be float32 or float64 on the CPU");
        const at::Tensor from = x.contiguous();
        at::Tensor to = from.clone();
        const bool sigmoid = name == "sigmoid";
        fastrnn::cpu::activate(sigmoid ? fastrnn::cpu::Activation::sigmoid : fastrnn::cpu::Activation::tanh,
                               x.scalar_type() == at::kDouble, from.const_data_ptr(), to.data_ptr(), from.numel());
        return to;
      },
      "sigmoid or tanh as the cells compute it, on the chosen instruction set; for the tests of its accuracy");
  m.def(
      "fma_peak",
      [](bool double_precision) { return fastrnn::cpu::fma_peak(fastrnn::cpu::isa_name(), double_precision); },
      no_gil(), "Peak of the calling thread with the instruction set in use, in GFLOP/s.");
  m.def(
      "read_bandwidth", [](size_t bytes) { return fastrnn::cpu::read_bandwidth(fastrnn::cpu::isa_name(), bytes); },
      no_gil(), "Read bandwidth of the calling thread over so many bytes, in GB/s.");
}
