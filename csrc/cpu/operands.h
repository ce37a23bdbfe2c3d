// SPDX-License-Identifier: BSD-3-Clause
// The tensors of one call on the CPU as the kernels read them: pointers and strides, and the copies that are converted
// for it. Used by layer.cpp.
#pragma once
#include <ATen/EmptyTensor.h>
#include <c10/util/SmallVector.h>

#include <cstdint>
#include <cstring>
#include <utility>

#include "../arguments.h"
#include "flags.h"
#include "layer.h"

namespace fastrnn {
namespace cpu {

// Not through the dispatcher, which takes longer than the allocation itself.
inline Tensor empty(at::IntArrayRef sizes, at::ScalarType type) { return Tensor(at::detail::empty_cpu(sizes, type)); }

inline Tensor nothing(at::ScalarType type) { return empty({0}, type); }

// An array [D, ...] or null, split by direction.
inline const void* slice(const void* data, int64_t direction, int64_t bytes) {
  return data == nullptr ? nullptr : static_cast<const char*>(data) + direction * bytes;
}
inline void* slice(void* data, int64_t direction, int64_t bytes) {
  return data == nullptr ? nullptr : static_cast<char*>(data) + direction * bytes;
}

// The tensors of one call as the kernels read them: element type float or double, row-major; with products in bfloat16
// x, y, h and the weights stay as they are.
class Operands {
 public:
  Operands(at::ScalarType given, bool rounded)
      : given_(given),
        type_(given == at::kDouble ? at::kDouble : at::kFloat),
        element_(rounded ? at::kBFloat16 : type_),
        bytes_(type_ == at::kDouble ? 8 : 4) {}

  // The type of the kernels, of gates, cells and final states; that of x and y; the type of every tensor outside.
  at::ScalarType type() const { return type_; }
  at::ScalarType element() const { return element_; }
  at::ScalarType given() const { return given_; }
  int64_t bytes() const { return bytes_; }
  int64_t element_bytes() const { return element_ == at::kBFloat16 ? 2 : bytes_; }

  Strided strided(const Tensor* tensor, at::ScalarType type) {
    if (tensor == nullptr) return Strided{};
    const bool adjacent = tensor->stride(-1) == 1 || tensor->size(-1) == 1;
    const Tensor& read = readable(*tensor, type) && adjacent ? *tensor : convert(*tensor, type);
    return Strided{read.const_data_ptr(), read.dim() == 3 ? read.stride(0) : 0, read.stride(-2)};
  }

  const void* dense(const Tensor* tensor, at::ScalarType type) {
    if (tensor == nullptr) return nullptr;
    const bool as_it_is = readable(*tensor, type) && tensor->is_contiguous();
    return as_it_is ? tensor->const_data_ptr() : convert(*tensor, type).const_data_ptr();
  }
  const void* dense(const Tensor* tensor) { return dense(tensor, type_); }

  // Everything that the forward pass reads; both passes start here.
  LayerForward layer(const LayerArguments& a, const Sizes& s) {
    LayerForward layer{};
    layer.cell = a.cell;
    layer.own = a.own;
    layer.is_double = type_ == at::kDouble;
    layer.is_bfloat16 = element_ == at::kBFloat16;
    layer.T = s.T, layer.B = s.B, layer.I = s.I, layer.H = s.H, layer.P = s.P, layer.D = s.D, layer.N = s.N;
    layer.batch_sizes = s.batch_sizes;
    layer.step_rows = s.B;
    const Strided x = strided(a.x, element_);  // through its strides, so that batch_first views are not copied
    layer.x = x.data, layer.x_stride_t = x.stride_t, layer.x_stride_b = x.stride_b;
    layer.zoneout_h = strided(a.zoneout_h, type_);
    layer.zoneout_c = strided(a.zoneout_c, type_);
    const void* const h_mask = dense(a.h_mask);
    const void* reset_h = dense(a.reset_h, element_);
    const void* reset_c = dense(a.reset_c);
    if (a.reset != nullptr) layer.reset = flags(*a.reset);
    if (layer.reset != nullptr) {
      layer.reset_by_row = reset_h != nullptr;
      if (reset_h == nullptr) reset_h = reset_c = zeros(s.R > s.H ? s.R : s.H);
    }
    const bool zero_c = a.from_zero && states_per_unit(a) == 2;
    const void* const h0 = a.from_zero ? zeros(s.D * s.B * s.R) : dense(a.h0, element_);
    const void* const c0 = zero_c ? zeros(s.D * s.B * s.H) : dense(a.c0);
    for (int64_t d = 0; d < s.D; ++d) {
      const Weights& w = a.weights[d];
      DirectionForward& direction = layer.direction[d];
      direction.packed = w.packed;
      if (w.packed == nullptr) {
        direction.w_ih = dense(w.w_ih, element_);
        direction.w_hh = dense(w.w_hh, element_);
        direction.b_ih = dense(w.b_ih);
        direction.b_hh = dense(w.b_hh);
        direction.w_hr = dense(w.w_hr, element_);
      }
      direction.parameters = dense(w.parameters);
      direction.h0 = slice(h0, d, s.B * s.R * element_bytes());
      direction.c0 = slice(c0, d, s.B * s.H * bytes_);
      direction.h_mask = slice(h_mask, d, s.B * s.R * bytes_);
      direction.reset_h = layer.reset_by_row ? slice(reset_h, d, s.B * s.R * element_bytes()) : reset_h;
      direction.reset_c = layer.reset_by_row ? slice(reset_c, d, s.B * s.H * bytes_) : reset_c;
    }
    if (s.lengths != nullptr) ragged(layer, s);
    return layer;
  }

 private:
  static bool readable(const Tensor& tensor, at::ScalarType type) {
    constexpr c10::DispatchKeySet kLazy{c10::DispatchKey::Negative, c10::DispatchKey::ZeroTensor};
    return tensor.scalar_type() == type && !tensor.key_set().has_any(kLazy);
  }

  const void* zeros(int64_t n) {
    alignas(64) static constexpr char kZeros[8192]{};
    if (n * bytes_ <= static_cast<int64_t>(sizeof(kZeros))) return kZeros;
    copies_.push_back(empty({n}, type_));
    std::memset(copies_.back().mutable_data_ptr(), 0, static_cast<size_t>(n * bytes_));
    return copies_.back().const_data_ptr();
  }

  // Where states are replaced, [T, B]; null where none is: then the call is one without resets.
  const uint8_t* flags(const Tensor& given) {
    const Tensor& reset = readable(given, at::kBool) ? given : convert(given, at::kBool);
    const auto* from = static_cast<const uint8_t*>(reset.const_data_ptr());
    const int64_t T = reset.size(0), B = reset.size(1), stride_t = reset.stride(0), stride_b = reset.stride(1);
    if (reset.is_contiguous()) return any_set(from, T * B) ? from : nullptr;
    copies_.push_back(empty({T, B}, at::kByte));  // by hand: torch takes longer to begin a copy than this to make it
    uint8_t any = 0;
    auto* const rows = static_cast<uint8_t*>(copies_.back().mutable_data_ptr());
    for (int64_t b = 0; b < B; ++b) {
      for (int64_t t = 0; t < T; ++t) any |= rows[t * B + b] = from[t * stride_t + b * stride_b];
    }
    return any != 0 ? rows : nullptr;
  }

  // Sequences of lengths of their own: sorted, longest first, those of no step left out.
  void ragged(LayerForward& layer, const Sizes& s) {
    copies_.push_back(empty({s.B + 2 * s.T + 1}, at::kLong));
    int64_t* const order = copies_.back().mutable_data_ptr<int64_t>();
    int64_t* const batch_sizes = order + s.B;
    int64_t* const next = batch_sizes + s.T;  // of each length, the place in order of the next such sequence
    std::memset(next, 0, static_cast<size_t>(s.T + 1) * sizeof(int64_t));
    for (int64_t b = 0; b < s.B; ++b) ++next[s.lengths[b]];
    int64_t place = 0, steps = 0, rows = 0;
    for (int64_t length = s.T; length > 0; --length) {
      const int64_t count = next[length];
      next[length] = place;
      place += count;
      batch_sizes[length - 1] = place;
      rows += place;
      if (place > 0 && steps == 0) steps = length;
    }
    for (int64_t b = 0; b < s.B; ++b) {
      if (s.lengths[b] > 0) order[next[s.lengths[b]]++] = b;
    }
    layer.T = steps, layer.B = place, layer.N = rows;
    layer.order = order, layer.batch_sizes = batch_sizes;
  }

  const Tensor& convert(const Tensor& tensor, at::ScalarType type) {
    Tensor copy = empty(tensor.sizes(), type);
    copy.copy_(tensor);
    copies_.push_back(std::move(copy));
    return copies_.back();
  }

  at::ScalarType given_, type_, element_;
  int64_t bytes_;
  c10::SmallVector<Tensor, 4> copies_;  // keeps what is not the caller's alive until the kernels are done
};

}  // namespace cpu
}  // namespace fastrnn
