// SPDX-License-Identifier: BSD-3-Clause
// The packed weights of one module inside `with fastrnn.prepacked(module):`, and what they were packed from, so that a
// call can tell whether that still holds. fastrnn/prepacking.py makes one for each module; module_call.cpp reads it.
#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "arguments.h"

namespace fastrnn {

class Prepacked {
 public:
  // A row of 5 weights (w_ih, w_hh, b_ih, b_hh, w_hr; undefined: not there) for each layer and direction, and the names
  // under which their module has them.
  using Rows = std::vector<std::vector<std::optional<Tensor>>>;
  using Names = std::vector<std::vector<std::string>>;

  Prepacked(Cell cell, int64_t directions, const Rows& rows, const Names& names);

  // Weight `slot` of row `row` is `now`; throws, naming it, if it is not what was packed.
  void expect(size_t row, size_t slot, const Tensor& now) const {
    const Source& source = sources_[row * kSlots + slot];
    if (C10_UNLIKELY(!source.holds(now))) refuse(source, now);
  }
  const cpu::PackedWeights* direction(size_t row) const {
    return &layers_[row / directions_].direction[row % directions_];
  }

  // The names of the weights that are not what was packed: other tensors than `now`, or, packed again and compared,
  // other numbers.
  std::vector<std::string> changed(const Rows& now) const;

  // The block is over: whoever still has this object takes the weights themselves.
  void close() { open_ = false; }
  bool open() const { return open_; }

  static constexpr size_t kSlots = 5;

 private:
  // One weight at the time of packing.
  struct Source {
    std::string name;
    Tensor tensor;  // undefined: no such weight
    const void* data;
    std::vector<int64_t> sizes, strides;
    at::ScalarType type;
    uint32_t version;  // 0 for an inference tensor, which counts none
    bool requires_grad;

    bool holds(const Tensor& now) const;
  };

  [[noreturn]] static void refuse(const Source& source, const Tensor& now);
  PackedLayer pack(size_t layer, const cpu::PackedWeights* like) const;

  bool open_ = true;
  Cell cell_;
  size_t directions_;
  std::vector<Source> sources_;
  std::vector<PackedLayer> layers_;
};

}  // namespace fastrnn
