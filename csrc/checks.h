// SPDX-License-Identifier: BSD-3-Clause
// Every check of an operator's arguments, with one message style; doors.h calls it before anything is computed:
//   fastrnn.lstm_layer: w_hh must be [4*H, R] = [256, 64], got [256, 128]
// A tensor that passes can be read through its pointer, sizes and strides: the kernels below check nothing again.
// Types of exceptions are torch.nn's: ValueError for the rank of x and for weights of another dtype than x,
// RuntimeError for everything else.
#pragma once
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <string>

#include "arguments.h"

namespace fastrnn {
namespace checks {

using at::IntArrayRef;

// No dimension, and no array in elements, may be larger, so that no size or offset in bytes overflows below.
constexpr int64_t kMaxDimension = INT32_MAX;
constexpr int64_t kMaxElements = int64_t{1} << 48;

inline std::string dtype_name(at::ScalarType type) { return std::string(c10::getDtypeNames(type).first); }

// A rule as a reader sees it: [G*H, R] becomes [4*H, R], [3*H, R] or [H, R].
inline std::string spell(int64_t gates, std::string rule) {
  const size_t at = rule.find("G*");
  if (at == std::string::npos) return rule;
  return rule.replace(at, 2, gates == 1 ? "" : std::to_string(gates) + "*");
}

// The checks of one call. Messages are built only when one fails: a call with T = 1 takes a few microseconds in all.
class Checker {
 public:
  // device: where the kernels run that are going to read the tensors.
  explicit Checker(const LayerArguments& arguments, c10::DeviceType device = c10::kCPU)
      : arguments_(arguments), device_(device) {}

  // Checks every argument of a forward call and returns what they say about the layer.
  Sizes layer() {
    const LayerArguments& a = arguments_;
    readable("x", a.x);
    dtype_ = a.x->scalar_type();
    if (dtype_ != at::kFloat && dtype_ != at::kDouble && dtype_ != at::kBFloat16 && dtype_ != at::kHalf) {
      fail("x must be float32, float64, bfloat16 or float16, got ", dtype_name(dtype_));
    }
    Sizes s{};
    if (a.batch_sizes == nullptr) {
      if (a.x->dim() != 3) fail_value("x must be [T, B, I], got ", a.x->sizes());
      s.T = a.x->size(0), s.B = a.x->size(1), s.I = a.x->size(2);
      if (s.T < 1) fail("x must have at least one time step, got [T, B, I] = ", a.x->sizes());
    } else {
      if (a.x->dim() != 2) fail_value("x must be [N, I] when batch_sizes is given, got ", a.x->sizes());
      s.N = a.x->size(0), s.I = a.x->size(1);
    }
    if (s.I < 1) fail("x must have at least one feature, got ", a.x->sizes());

    operand("w_hh", a.weights[0].w_hh);
    const int64_t gates = gates_per_unit(a);
    const IntArrayRef w_hh = a.weights[0].w_hh->sizes();
    if (w_hh.size() != 2 || w_hh[0] < 1 || w_hh[0] % gates != 0) {
      fail("w_hh must be ", spell(gates, "[G*H, R]"), " with H >= 1, got ", w_hh);
    }
    s.H = w_hh[0] / gates;
    s.R = s.H;
    if (a.weights[0].w_hr != nullptr) {
      operand("w_hr", a.weights[0].w_hr);
      const IntArrayRef w_hr = a.weights[0].w_hr->sizes();
      if (w_hr.size() != 2 || w_hr[0] < 1) fail("w_hr must be [P, H] with P >= 1, got ", w_hr);
      s.P = s.R = w_hr[0];
    }
    s.D = a.weights[1].w_ih != nullptr ? 2 : 1;
    if (a.batch_sizes == nullptr) {
      bound("T", s.T), bound("B", s.B);
      s.N = s.T * s.B;
    } else {
      packed(s);
    }
    bound("I", s.I), bound("H", s.H), bound("R", s.R);
    // In double: sizes up to 2^31 multiply to far beyond 64 bits. Nothing is wider than the gates, 4 at most, and what
    // is kept of them.
    const int64_t blocks = std::max({int64_t{4}, saved_per_unit(a), stored_per_unit(a)});
    const auto widest = static_cast<double>(std::max({s.I, 2 * s.R, blocks * padded(s.H)}));
    if (static_cast<double>(s.N) * widest > kMaxElements || widest * widest > kMaxElements) {
      fail("the layer is too large: N = ", s.N, ", I = ", s.I, ", H = ", s.H, ", R = ", s.R);
    }

    if (!a.from_zero) {
      operand("h0", a.h0, "[D, B, R]", {s.D, s.B, s.R});
      if (states_per_unit(a) == 2) operand("c0", a.c0, "[D, B, H]", {s.D, s.B, s.H});
    }
    weights(s);
    if (a.lengths != nullptr) lengths(s);
    resets(s);
    if (a.h_mask != nullptr) operand("h_mask", a.h_mask, "[D, B, R]", {s.D, s.B, s.R});
    if (a.zoneout_h != nullptr) like_y("zoneout_h", a.zoneout_h, s, "[T, B, D*R]", "[N, D*R]", s.D * s.R);
    if (a.zoneout_c != nullptr) like_y("zoneout_c", a.zoneout_c, s, "[T, B, D*H]", "[N, D*H]", s.D * s.H);
    return s;
  }

  // Checks what a backward call has beside the arguments of the forward call; `gradients` can be asked for.
  void backward(const BackwardArguments& b, const Sizes& s, int gradients) {
    const LayerArguments& a = arguments_;
    if (b.needs < 0 || b.needs >= int64_t{1} << gradients) {
      fail("needs must be in [0, 2^", gradients, "), got ", b.needs);
    }
    like_y("y", b.y, s, "[T, B, D*R]", "[N, D*R]", s.D * s.R);
    if (b.d_y != nullptr) like_y("d_y", b.d_y, s, "[T, B, D*R]", "[N, D*R]", s.D * s.R);
    if (b.d_h_n != nullptr) operand("d_h_n", b.d_h_n, "[D, B, R]", {s.D, s.B, s.R});
    if (b.d_c_n != nullptr) operand("d_c_n", b.d_c_n, "[D, B, H]", {s.D, s.B, s.H});

    dtype_ = dtype_ == at::kDouble ? at::kDouble : at::kFloat;  // of what the forward saves
    if (saved_per_unit(a) != 0) {
      operand("gates", b.gates, a.own ? "[D, N, saved*padded(H)]" : "[D, N, 4*padded(H)]",
              {s.D, s.N, saved_per_unit(a) * padded(s.H)});
    }
    if (states_per_unit(a) == 2) operand("cells", b.cells, "[D, N, H]", {s.D, s.N, s.H});
    if (b.d_cells != nullptr) operand("d_cells", b.d_cells, "[D, N, H]", {s.D, s.N, s.H});
  }

 private:
  template <class... Parts>
  [[noreturn]] C10_NOINLINE void fail(const Parts&... parts) const {
    C10_THROW_ERROR(Error, c10::str("fastrnn.", arguments_.name, ": ", parts...));
  }
  template <class... Parts>
  [[noreturn]] C10_NOINLINE void fail_value(const Parts&... parts) const {
    C10_THROW_ERROR(ValueError, c10::str("fastrnn.", arguments_.name, ": ", parts...));
  }

  void bound(const char* letter, int64_t size) const {
    if (size > kMaxDimension) fail(letter, " must be at most ", kMaxDimension, ", got ", size);
  }

  // The tensor is there, is an ordinary dense tensor of the device and its memory holds all its elements.
  void readable(const char* name, const Tensor* tensor) const {
    if (tensor == nullptr || !tensor->defined()) fail(name, " must be given");
    if (device_ == c10::kCPU) return readable_on_cpu(name, tensor);
    if (!tensor->device().is_cuda()) fail(name, " must be on a CUDA device like x, got ", tensor->device());
    if (tensor->device() != arguments_.x->device()) {
      fail(name, " must be on ", arguments_.x->device(), " like x, got ", tensor->device());
    }
    constexpr c10::DispatchKeySet kDenseCuda(c10::DispatchKey::CUDA);
    dense(name, tensor, kDenseCuda);
  }

  void readable_on_cpu(const char* name, const Tensor* tensor) const {
    if (tensor == nullptr || !tensor->defined()) fail(name, " must be given");
    if (C10_UNLIKELY(!tensor->device().is_cpu())) fail(name, " must be on the CPU, got ", tensor->device());
    constexpr c10::DispatchKeySet kDenseCpu(c10::DispatchKey::CPU);
    dense(name, tensor, kDenseCpu);
  }

  void dense(const char* name, const Tensor* tensor, c10::DispatchKeySet keys) const {
    if (C10_UNLIKELY(!tensor->key_set().has_all(keys))) {
      fail(name, " must be a dense tensor, got layout ", tensor->layout(), ", dtype ", tensor->dtype());
    }
    if (C10_UNLIKELY(!holds_its_elements(*tensor))) {
      fail(name, " has no memory of its own (a tensor subclass, a functorch wrapper, or a storage that was freed)");
    }
  }

  static bool holds_its_elements(const Tensor& tensor) {
    if (tensor._is_zerotensor() || tensor.numel() == 0) return true;  // read as zeros, or not at all
    if (!tensor.has_storage() || tensor.const_data_ptr() == nullptr) return false;
    const IntArrayRef sizes = tensor.sizes(), strides = tensor.strides();
    int64_t end = tensor.storage_offset() + 1;
    for (size_t axis = 0; axis < sizes.size(); ++axis) end += (sizes[axis] - 1) * strides[axis];
    return static_cast<size_t>(end) * tensor.itemsize() <= tensor.storage().nbytes();
  }

  void operand(const char* name, const Tensor* tensor) const {
    readable(name, tensor);
    if (C10_UNLIKELY(tensor->scalar_type() != dtype_)) {
      const std::string wanted = dtype_name(dtype_), got = dtype_name(tensor->scalar_type());
      if (name[0] == 'w' || name[0] == 'b') fail_value(name, " must be ", wanted, " like x, got ", got);
      fail(name, " must be ", wanted, ", got ", got);
    }
  }

  void operand(const char* name, const Tensor* tensor, const char* rule, std::initializer_list<int64_t> sizes) const {
    operand(name, tensor);
    if (C10_UNLIKELY(!tensor->sizes().equals(sizes))) {
      fail(name, " must be ", spell(gates_per_unit(arguments_), rule), " = ", IntArrayRef(sizes), ", got ",
           tensor->sizes());
    }
  }

  void weights(const Sizes& s) const {
    static constexpr const char* kNames[2][5] = {
        {"w_ih", "w_hh", "b_ih", "b_hh", "w_hr"},
        {"w_ih_reverse", "w_hh_reverse", "b_ih_reverse", "b_hh_reverse", "w_hr_reverse"}};
    const int64_t rows = gates_per_unit(arguments_) * s.H;
    for (int64_t d = 0; d < s.D; ++d) {
      const Weights& w = arguments_.weights[d];
      operand(kNames[d][0], w.w_ih, "[G*H, I]", {rows, s.I});
      operand(kNames[d][1], w.w_hh, "[G*H, R]", {rows, s.R});
      if (w.b_ih != nullptr) operand(kNames[d][2], w.b_ih, "[G*H]", {rows});
      if (w.b_hh != nullptr) operand(kNames[d][3], w.b_hh, "[G*H]", {rows});
      if (s.P != 0) operand(kNames[d][4], w.w_hr, "[P, H]", {s.P, s.H});
      if (s.P == 0 && w.w_hr != nullptr) fail(kNames[d][4], " is given without w_hr");
      if (arguments_.own != nullptr && arguments_.own->parameters != 0) {
        operand(d == 0 ? "parameters" : "parameters_reverse", w.parameters, "[parameters*H]",
                {arguments_.own->parameters * s.H});
      }
    }
    if (s.D == 2) return;
    const Weights& w = arguments_.weights[1];
    const Tensor* const rest[] = {w.w_hh, w.b_ih, w.b_hh, w.w_hr};
    for (int k = 0; k < 4; ++k) {
      if (rest[k] != nullptr) fail(kNames[1][k + 1], " is given without w_ih_reverse");
    }
  }

  // A tensor with a row of `features` for each step of each sequence.
  void like_y(const char* name, const Tensor* tensor, const Sizes& s, const char* padded, const char* packed,
              int64_t features) const {
    if (s.batch_sizes == nullptr) {
      operand(name, tensor, padded, {s.T, s.B, features});
    } else {
      operand(name, tensor, packed, {s.N, features});
    }
  }

  void lengths(Sizes& s) const {
    constexpr c10::DispatchKeySet kLazy({c10::DispatchKey::Negative, c10::DispatchKey::ZeroTensor});
    const Tensor& tensor = *arguments_.lengths;
    if (arguments_.batch_sizes != nullptr) fail("lengths and batch_sizes must not both be given");
    const bool values_are_here = tensor.defined() && tensor.device().is_cpu();
    if (values_are_here) {
      readable_on_cpu("lengths", &tensor);
    } else {
      readable("lengths", &tensor);
    }
    if (tensor.scalar_type() != at::kLong) fail("lengths must be int64, got ", dtype_name(tensor.scalar_type()));
    if (!tensor.sizes().equals({s.B})) fail("lengths must be [B] = ", IntArrayRef({s.B}), ", got ", tensor.sizes());
    if (!values_are_here) return;  // nobody waits to see them: the kernels bound them, and report
    const Tensor dense = tensor.key_set().has_any(kLazy) ? tensor.clone() : tensor;
    const int64_t* const given = s.B == 0 ? nullptr : dense.const_data_ptr<int64_t>();
    const int64_t stride = dense.stride(0);
    int64_t b = 0;
    while (b < s.B && given[b * stride] == s.T) ++b;
    if (b == s.B) return;  // every sequence takes every step: a call without lengths
    s.lengths_owner = at::detail::empty_cpu({s.B}, at::kLong);  // nobody writes to it after the checks
    int64_t* const values = s.lengths_owner.mutable_data_ptr<int64_t>();
    for (b = 0; b < s.B; ++b) {
      values[b] = given[b * stride];
      if (values[b] < 0 || values[b] > s.T) {
        fail("lengths must be from 0 to T = ", s.T, ", got ", values[b], " for sequence ", b);
      }
    }
    s.lengths = values;
  }

  void resets(const Sizes& s) const {
    const LayerArguments& a = arguments_;
    const bool cells = states_per_unit(a) == 2;
    if (a.reset == nullptr) {
      if (a.reset_h != nullptr || a.reset_c != nullptr) fail("reset_h and reset_c are given without reset");
      return;
    }
    if (a.batch_sizes != nullptr) fail("reset and batch_sizes must not both be given; lengths go with reset");
    readable("reset", a.reset);
    if (a.reset->scalar_type() != at::kBool) fail("reset must be bool, got ", dtype_name(a.reset->scalar_type()));
    if (!a.reset->sizes().equals({s.T, s.B})) {
      fail("reset must be [T, B] = ", IntArrayRef({s.T, s.B}), ", got ", a.reset->sizes());
    }
    if (cells && (a.reset_h == nullptr) != (a.reset_c == nullptr)) fail("reset_h and reset_c must be given together");
    if (a.reset_h != nullptr) operand("reset_h", a.reset_h, "[D, B, R]", {s.D, s.B, s.R});
    if (a.reset_c != nullptr) operand("reset_c", a.reset_c, "[D, B, H]", {s.D, s.B, s.H});
  }

  // batch_sizes decides T and B of a packed layer: positive, not increasing, sum N.
  void packed(Sizes& s) const {
    const Tensor& tensor = *arguments_.batch_sizes;
    readable_on_cpu("batch_sizes", &tensor);
    if (tensor.scalar_type() != at::kLong) fail("batch_sizes must be int64, got ", dtype_name(tensor.scalar_type()));
    if (tensor.dim() != 1) fail("batch_sizes must be [T], got ", tensor.sizes());
    s.T = tensor.size(0);
    if (s.T < 1) fail("batch_sizes must have at least one time step, got ", tensor.sizes());
    if (s.T > s.N) fail("batch_sizes must be positive and sum to N = ", s.N, ", got T = ", s.T, " steps");
    bound("T", s.T), bound("N", s.N);
    s.batch_sizes_owner = tensor.clone(at::MemoryFormat::Contiguous);  // nobody writes to it after the checks
    s.batch_sizes = s.batch_sizes_owner.const_data_ptr<int64_t>();
    s.B = s.batch_sizes[0];
    int64_t sum = 0;
    for (int64_t t = 0; t < s.T; ++t) {
      const int64_t rows = s.batch_sizes[t];
      if (rows < 1) fail("batch_sizes must be positive, got ", rows, " at step ", t);
      if (t > 0 && rows > s.batch_sizes[t - 1]) {
        fail("batch_sizes must not increase, got ", s.batch_sizes[t - 1], " then ", rows, " at step ", t);
      }
      if (rows > s.N - sum) fail("batch_sizes must sum to the rows of x, N = ", s.N, ", got more");
      sum += rows;
    }
    if (sum != s.N) fail("batch_sizes must sum to the rows of x, N = ", s.N, ", got ", sum);
  }

  const LayerArguments& arguments_;
  const c10::DeviceType device_;
  at::ScalarType dtype_ = at::kFloat;
};

}  // namespace checks
}  // namespace fastrnn
