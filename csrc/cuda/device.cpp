// SPDX-License-Identifier: BSD-3-Clause
// The GPU as a Machine and as a backend of the operators: torch's current stream, its cuBLAS handle and its device.
// The one file that sees both torch's CUDA headers and the kernels. NOTHING HERE HAS EVER RUN, see docs/cuda.md.
#include <ATen/Context.h>
#include <ATen/Functions.h>
#include <ATen/cuda/CUDAContextLight.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <limits>

#include "../doors.h"
#include "kernels.h"
#include "layer.h"

namespace fastrnn {
namespace cuda {
namespace {

void check(cudaError_t status, const char* what) {
  TORCH_CHECK(status == cudaSuccess, "fastrnn: ", what, ": ", cudaGetErrorString(status));
}

void check(cublasStatus_t status, const char* what) {
  TORCH_CHECK(status == CUBLAS_STATUS_SUCCESS, "fastrnn: ", what, ": cuBLAS status ", static_cast<int>(status));
}

cudaDataType_t cublas_type(Element element) {
  switch (element) {
    case Element::float64:
      return CUDA_R_64F;
    case Element::bfloat16:
      return CUDA_R_16BF;
    case Element::float16:
      return CUDA_R_16F;
    default:
      return CUDA_R_32F;
  }
}

int to_int(int64_t size) {
  TORCH_CHECK(size <= std::numeric_limits<int>::max(), "fastrnn: cuBLAS takes sizes below 2^31, got ", size);
  return static_cast<int>(size);
}

// The math mode of torch's handle for as long as it is ours. Whether float32 may be rounded to TF32 is said at every
// product; torch.nn's flag for recurrent layers decides, not that for matrix products. Torch's mode comes back at the
// end, also when a product throws; the handle belongs to this thread.
class OwnMathMode {
 public:
  explicit OwnMathMode(cublasHandle_t handle) : handle_(handle) {
    check(cublasGetMathMode(handle_, &before_), "cublasGetMathMode");
    constexpr int kMode = CUBLAS_DEFAULT_MATH | CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION;
    check(cublasSetMathMode(handle_, static_cast<cublasMath_t>(kMode)), "cublasSetMathMode");
  }
  OwnMathMode(const OwnMathMode&) = delete;
  OwnMathMode& operator=(const OwnMathMode&) = delete;
  ~OwnMathMode() { cublasSetMathMode(handle_, before_); }

 private:
  cublasHandle_t handle_;
  cublasMath_t before_{};
};

class Gpu : public Machine {
 public:
  explicit Gpu(c10::Device device)
      : guard_(device),
        stream_(c10::cuda::getCurrentCUDAStream(device.index())),
        handle_(at::cuda::getCurrentCUDABlasHandle()),
        mode_(handle_),
        tf32_(at::globalContext().allowTF32CuDNN(at::Float32Op::RNN)) {}

  // cuBLAS has columns first, so that out^T = b^T * a^T is what it is asked for.
  void multiply(const Product& p) override {
    const bool is_double = p.element == Element::float64;
    const cudaDataType_t type = cublas_type(p.element);
    const cudaDataType_t out_type = p.rounded ? type : is_double ? CUDA_R_64F : CUDA_R_32F;
    const cublasComputeType_t compute = is_double                                ? CUBLAS_COMPUTE_64F
                                        : p.element == Element::float32 && tf32_ ? CUBLAS_COMPUTE_32F_FAST_TF32
                                                                                 : CUBLAS_COMPUTE_32F;
    const double one = 1, added = p.added ? 1 : 0;
    const float one_float = 1, added_float = p.added ? 1 : 0;
    const void* const alpha = is_double ? static_cast<const void*>(&one) : &one_float;
    const void* const beta = is_double ? static_cast<const void*>(&added) : &added_float;
    check(cublasGemmStridedBatchedEx(handle_, p.b_transposed ? CUBLAS_OP_T : CUBLAS_OP_N,
                                     p.a_transposed ? CUBLAS_OP_T : CUBLAS_OP_N, to_int(p.n), to_int(p.m), to_int(p.k),
                                     alpha, p.b, type, to_int(p.b_row), p.b_next, p.a, type, to_int(p.a_row), p.a_next,
                                     beta, p.out, out_type, to_int(p.out_row), p.out_next, to_int(p.count), compute,
                                     CUBLAS_GEMM_DEFAULT),
          "cublasGemmStridedBatchedEx");
  }

  void forward(Stage stage, Cell cell, const Forward& a) override {
    check(launch_forward(stream_.stream(), stage, cell, a), "launch of a forward step");
  }
  void backward(Stage stage, Cell cell, const Backward& a) override {
    check(launch_backward(stream_.stream(), stage, cell, a), "launch of a backward step");
  }
  void sum(const Sums& a) override { check(launch_sum(stream_.stream(), a), "launch of the sums of the biases"); }
  void check_lengths(const int64_t* lengths, int64_t B, int64_t T) override {
    check(launch_check_lengths(stream_.stream(), lengths, B, T), "launch of the check of lengths");
  }

 private:
  const c10::cuda::CUDAGuard guard_;
  const c10::cuda::CUDAStream stream_;
  const cublasHandle_t handle_;
  const OwnMathMode mode_;
  const bool tf32_;
};

struct Backend {
  static constexpr c10::DeviceType kDevice = c10::kCUDA;
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

std::unique_ptr<Machine> machine_for(const Tensor& x) { return std::make_unique<Gpu>(x.device()); }

}  // namespace cuda
}  // namespace fastrnn

TORCH_LIBRARY_IMPL(fastrnn, CUDA, m) {
  fastrnn::doors::for_each_operator<fastrnn::cuda::Backend>(
      [&](const char* name, auto function) { m.impl(name, function); });
}
