// SPDX-License-Identifier: BSD-3-Clause
// The tensors of one call on the CPU as the kernels read them: pointers and strides, and the copies that are converted
// for it. Used by layer.cpp.
#pragma once
#include <ATen/EmptyTensor.h>
#include <c10/util/SmallVector.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "../arguments.h"
#include "flags.h"
#include "half.h"
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

// Memory for what calls convert, kept by a thread from call to call as its scratch is, up to kMostKept bytes. Taken and
// given back like a stack.
class Room {
 public:
  struct Mark {
    size_t block, used;
  };

  static Room& of_thread() {
    static thread_local Room room;
    return room;
  }

  Mark mark() const { return {block_, used_}; }

  void* take(size_t bytes) {
    bytes = (bytes + 2 * kLine - 1) / kLine * kLine;  // a line between pieces, and none of no bytes
    while (block_ < blocks_.size() && used_ + bytes > blocks_[block_].bytes) ++block_, used_ = 0;
    if (block_ == blocks_.size()) {
      const size_t size = bytes < kLeast ? kLeast : bytes;
      blocks_.push_back({std::unique_ptr<void, Free>(std::aligned_alloc(kLine, size)), size});
      if (!blocks_.back().memory) {
        blocks_.pop_back();
        throw std::bad_alloc();
      }
    }
    used_ += bytes;
    return static_cast<char*>(blocks_[block_].memory.get()) + used_ - bytes;
  }

  void give_back(Mark mark) {
    block_ = mark.block, used_ = mark.used;
    size_t total = 0;
    for (const Block& block : blocks_) total += block.bytes;
    if (block_ == 0 && used_ == 0 && total > kMostKept) blocks_.clear();
  }

 private:
  static constexpr size_t kLine = 64, kLeast = 16384, kMostKept = size_t{64} << 20;
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  struct Block {
    std::unique_ptr<void, Free> memory;
    size_t bytes;
  };
  std::vector<Block> blocks_;
  size_t block_ = 0, used_ = 0;  // where the next piece goes
};

// The tensors of one call as the kernels read them: element type float or double, row-major. x, y, h and the weights
// stay as they are where kernels multiply bfloat16, or convert a row of 16-bit elements at a time.
class Operands {
 public:
  enum class Elements {
    whole,      // floats or doubles, converted here if need be
    rounded,    // bfloat16, which the kernels multiply
    converted,  // of 16 bits, which the kernels convert
  };

  Operands(at::ScalarType given, Elements elements)
      : given_(given),
        type_(given == at::kDouble ? at::kDouble : at::kFloat),
        element_(elements == Elements::whole ? type_ : given),
        bytes_(type_ == at::kDouble ? 8 : 4),
        rounded_(elements == Elements::rounded),
        mark_(Room::of_thread().mark()) {}
  Operands(const Operands&) = delete;
  Operands& operator=(const Operands&) = delete;
  ~Operands() { Room::of_thread().give_back(mark_); }

  // The type of the kernels, of gates, cells and final states; that of x and y; the type of every tensor outside.
  at::ScalarType type() const { return type_; }
  at::ScalarType element() const { return element_; }
  at::ScalarType given() const { return given_; }
  int64_t bytes() const { return bytes_; }
  int64_t element_bytes() const { return element_ == type_ ? bytes_ : 2; }

  Strided strided(const Tensor* tensor, at::ScalarType type) {
    if (tensor == nullptr) return Strided{};
    const bool adjacent = tensor->stride(-1) == 1 || tensor->size(-1) == 1;
    if (adjacent && widens(*tensor, type)) {
      return Strided{widened(*tensor), tensor->dim() == 3 ? tensor->stride(0) : 0, tensor->stride(-2)};
    }
    const Tensor& read = readable(*tensor, type) && adjacent ? *tensor : convert(*tensor, type);
    return Strided{read.const_data_ptr(), read.dim() == 3 ? read.stride(0) : 0, read.stride(-2)};
  }

  const void* dense(const Tensor* tensor, at::ScalarType type) {
    if (tensor == nullptr) return nullptr;
    if (tensor->is_contiguous()) {
      if (readable(*tensor, type)) return tensor->const_data_ptr();
      if (widens(*tensor, type)) return widened(*tensor);
    }
    return convert(*tensor, type).const_data_ptr();
  }
  const void* dense(const Tensor* tensor) { return dense(tensor, type_); }

  // n elements of the kernels' type, until this object goes.
  void* room(int64_t n) { return Room::of_thread().take(static_cast<size_t>(n * bytes_)); }

  // `made`, of the given type, becomes what the kernels wrote to `from`; whatever its strides.
  void narrow_to(Tensor& made, const void* from) const {
    const auto* floats = static_cast<const float*>(from);
    if (made.is_contiguous()) return narrow(given_, floats, made.mutable_data_ptr(), made.numel());
    Tensor whole = empty(made.sizes(), given_);
    narrow(given_, floats, whole.mutable_data_ptr(), whole.numel());
    made.copy_(whole);
  }

  // Everything that the forward pass reads; both passes start here.
  LayerForward layer(const LayerArguments& a, const Sizes& s) {
    LayerForward layer{};
    layer.cell = a.cell;
    layer.own = a.own;
    layer.is_double = type_ == at::kDouble;
    layer.is_bfloat16 = rounded_;
    layer.conversion = element_ == type_ || rounded_ ? nullptr : &conversion(element_);
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
  static bool is_lazy(const Tensor& tensor) {
    constexpr c10::DispatchKeySet kLazy{c10::DispatchKey::Negative, c10::DispatchKey::ZeroTensor};
    return tensor.key_set().has_any(kLazy);
  }

  static bool readable(const Tensor& tensor, at::ScalarType type) {
    return tensor.scalar_type() == type && !is_lazy(tensor);
  }

  static bool widens(const Tensor& tensor, at::ScalarType type) {
    const at::ScalarType from = tensor.scalar_type();
    return type == at::kFloat && (from == at::kHalf || from == at::kBFloat16) && !is_lazy(tensor) &&
           tensor.is_non_overlapping_and_dense();
  }

  // The elements of a dense tensor in float, in the order of its memory.
  const void* widened(const Tensor& tensor) {
    void* const to = room(tensor.numel());
    widen(tensor.scalar_type(), tensor.const_data_ptr(), static_cast<float*>(to), tensor.numel());
    return to;
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
  bool rounded_;
  Room::Mark mark_;
  c10::SmallVector<Tensor, 4> copies_;  // keeps what is not the caller's alive until the kernels are done
};

}  // namespace cpu
}  // namespace fastrnn
