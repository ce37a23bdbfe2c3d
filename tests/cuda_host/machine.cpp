// SPDX-License-Identifier: BSD-3-Clause
// The layers of csrc/cuda on the host: layer.cpp, sweep.cpp and the bodies of the kernels as they are, over tensors of
// the CPU. Every thread of every launch is a turn of a loop, and a product is three loops with sums in double, rounded
// to the type that cuBLAS is asked for: its own order of summation is not imitated. Registers the operators as
// torch.ops.fastrnn_on_host; built and called by tests/cuda_host.py.
#include <ATen/Functions.h>
#include <torch/library.h>

#include <stdexcept>
#include <vector>

#include "cuda/layer.h"
#include "cuda/threads.h"
#include "doors.h"
#include "schemas.h"

namespace fastrnn {
namespace cuda {
namespace {

template <class A>
A read(const void* data, int64_t index, Element element) {
  A value[1];
  load(value, data, index, element);
  return value[0];
}

template <class A>
void product(const Product& p) {
  const Element out_element = p.rounded                       ? p.element
                              : p.element == Element::float64 ? Element::float64
                                                              : Element::float32;
  std::vector<A> a(p.m * p.k), b(p.k * p.n);
  for (int64_t c = 0; c < p.count; ++c) {
    for (int64_t m = 0; m < p.m; ++m) {
      for (int64_t k = 0; k < p.k; ++k) {
        const int64_t at = c * p.a_next + (p.a_transposed ? k * p.a_row + m : m * p.a_row + k);
        a[m * p.k + k] = read<A>(p.a, at, p.element);
      }
    }
    for (int64_t n = 0; n < p.n; ++n) {
      for (int64_t k = 0; k < p.k; ++k) {
        const int64_t at = c * p.b_next + (p.b_transposed ? n * p.b_row + k : k * p.b_row + n);
        b[n * p.k + k] = read<A>(p.b, at, p.element);
      }
    }
    for (int64_t m = 0; m < p.m; ++m) {
      for (int64_t n = 0; n < p.n; ++n) {
        double sum = 0;
        for (int64_t k = 0; k < p.k; ++k) sum += double{a[m * p.k + k]} * double{b[n * p.k + k]};
        const int64_t at = c * p.out_next + m * p.out_row + n;
        const A before = p.added ? read<A>(p.out, at, out_element) : A(0);
        const A made[1] = {static_cast<A>(before + sum)};
        store(made, p.out, at, out_element);
      }
    }
  }
}

struct Loop {
  template <class Body, int W, class Arguments>
  void operator()(const Arguments& arguments, const Grid& grid) const {
    Thread thread{};
    for (thread.block_z = 0; thread.block_z < grid.grid_z; ++thread.block_z)
      for (thread.block_y = 0; thread.block_y < grid.grid_y; ++thread.block_y)
        for (thread.block_x = 0; thread.block_x < grid.grid_x; ++thread.block_x)
          for (thread.y = 0; thread.y < grid.block_y; ++thread.y)
            for (thread.x = 0; thread.x < grid.block_x; ++thread.x) run_thread<Body, W>(arguments, grid, thread);
  }
};

class Host : public Machine {
 public:
  int64_t most_input_gates() const override { return 64; }  // so that small layers take several chunks
  void multiply(const Product& p) override {
    if (p.element == Element::float64) return product<double>(p);
    product<float>(p);
  }
  void forward(Stage stage, Cell cell, const Forward& a) override { cuda::forward(Loop(), stage, cell, a); }
  void backward(Stage stage, Cell cell, const Backward& a) override { cuda::backward(Loop(), stage, cell, a); }
  void sum(const Sums& a) override { cuda::sum(Loop(), a); }
  void check_lengths(const int64_t*, int64_t, int64_t) override {}
};

// The host in the place of a CUDA device.
struct Backend {
  static constexpr c10::DeviceType kDevice = c10::kCPU;
  static LayerResults forward(const LayerArguments& arguments, const Sizes& sizes, bool save) {
    return layer_forward(arguments, sizes, save);
  }
  static Gradients backward(const BackwardArguments& arguments, const Sizes& sizes) {
    return layer_backward(arguments, sizes);
  }
  static RowGradients row_gradients(const BackwardArguments& arguments, const Sizes& sizes) {
    return layer_row_gradients(arguments, sizes);
  }
  static Tensor nothing(const Tensor& y, at::ScalarType type) { return at::empty({0}, y.options().dtype(type)); }
};

}  // namespace

std::unique_ptr<Machine> machine_for(const Tensor&) { return std::make_unique<Host>(); }

}  // namespace cuda
}  // namespace fastrnn

TORCH_LIBRARY(fastrnn_on_host, m) { fastrnn::define_operators(m); }

TORCH_LIBRARY_IMPL(fastrnn_on_host, CPU, m) {
  fastrnn::doors::for_each_operator<fastrnn::cuda::Backend>(
      [&](const char* name, auto function) { m.impl(name, function); });
}
