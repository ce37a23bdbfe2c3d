// SPDX-License-Identifier: BSD-3-Clause
// fastrnn._C: the door of eager calls on the CPU (pybind11: no dispatcher; without a gradient, or with the derivative
// of derivative.cpp), and facts about the build and the process.
#include <ATen/Parallel.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <array>
#include <fstream>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/backend.h"
#include "cpu/layer.h"
#include "cpu/roofline.h"
#include "derivative.h"
#include "doors.h"
#include "event.h"
#include "module_call.h"
#include "own_cell.h"
#include "prepacked.h"

namespace fastrnn {
namespace {

using namespace doors;

// The operators without gradient, for eager calls.
struct EagerBackend : cpu::Backend {
  static LayerResults forward(const LayerArguments& arguments, const Sizes& sizes, bool save) {
    const Event event(arguments);
    return cpu::Backend::forward(arguments, sizes, save);
  }
  static Gradients backward(const BackwardArguments& arguments, const Sizes& sizes) {
    const Event event(arguments.layer, Event::kBackward);
    return cpu::Backend::backward(arguments, sizes);
  }
  static RowGradients row_gradients(const BackwardArguments& arguments, const Sizes& sizes) {
    const Event event(arguments.layer, Event::kRowGradients);
    return cpu::Backend::row_gradients(arguments, sizes);
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
  fastrnn::doors::for_each_operator<fastrnn::EagerBackend>(
      [&](const char* name, auto function) { m.def(name, torch::wrap_pybind_function_no_gil(function)); });
  fastrnn::for_each_recorded(
      [&](const char* name, auto function) { m.def(name, torch::wrap_pybind_function_no_gil(function)); });
  fastrnn::define_module_calls(m.ptr());
  define_prepacked(m);
  fastrnn::define_own_cells(m);
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
  m.def("force_parts", &fastrnn::cpu::force_parts,
        "Whether float32 products on AMX are in parts of bfloat16 wherever they can be, for the tests.");
  m.def(
      "activation",
      [](const std::string& name, const at::Tensor& x, bool rounded) {
        TORCH_CHECK_VALUE(name == "sigmoid" || name == "tanh", "fastrnn.activation: sigmoid or tanh, got ", name);
        TORCH_CHECK(x.device().is_cpu() && (x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble),
                    "fastrnn.activation: x must be float32 or float64 on the CPU");
        const at::Tensor from = x.contiguous();
        at::Tensor to = from.clone();
        const bool sigmoid = name == "sigmoid";
        fastrnn::cpu::activate(sigmoid ? fastrnn::cpu::Activation::sigmoid : fastrnn::cpu::Activation::tanh,
                               x.scalar_type() == at::kDouble, rounded, from.const_data_ptr(), to.data_ptr(),
                               from.numel());
        return to;
      },
      "sigmoid or tanh as the cells compute it, on the chosen instruction set; rounded: as the cells of its products "
      "in "
      "bfloat16 do. For the tests of their accuracy.",
      pybind11::arg("name"), pybind11::arg("x"), pybind11::arg("rounded") = false);
  m.def(
      "fma_peak",
      [](bool double_precision) { return fastrnn::cpu::fma_peak(fastrnn::cpu::own_isa(), double_precision); }, no_gil(),
      "Peak of the calling thread with the instruction set in use, in GFLOP/s.");
  m.def("hold_round_time", &fastrnn::cpu::hold_round_time,
        "Lets choices go by so many ns in place of what round_time() measures, for the tests; 0 ends that.");
  m.def(
      "round_time", [] { return fastrnn::cpu::measure_round_time(at::get_num_threads()); }, no_gil(),
      "What a round of waiting takes the threads of a layer, two or more, in ns, measured now.");
  m.def(
      "read_bandwidth", [](size_t bytes) { return fastrnn::cpu::read_bandwidth(fastrnn::cpu::own_isa(), bytes); },
      no_gil(), "Read bandwidth of the calling thread over so many bytes, in GB/s.");
}
