// SPDX-License-Identifier: BSD-3-Clause
// Packs the weights of a module for the calls of a block, and finds what has become of the weights since. Called by
// fastrnn/prepacking.py (through module.cpp) at both ends of the block, by module_call.cpp in between.
#include "prepacked.h"

#include <ATen/EmptyTensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <array>
#include <cstring>

#include "checks.h"

namespace fastrnn {
namespace {

uint32_t version_of(const Tensor& tensor) { return tensor.is_inference() ? 0 : tensor._version(); }

Tensor zeros(at::IntArrayRef sizes, at::ScalarType type) {
  Tensor made(at::detail::empty_cpu(sizes, type));
  std::memset(made.mutable_data_ptr(), 0, made.nbytes());
  return made;
}

}  // namespace

bool Prepacked::Source::holds(const Tensor& now) const {
  if (!now.is_same(tensor)) return false;
  if (!tensor.defined()) return true;
  return now.const_data_ptr() == data && now.sizes() == sizes && now.strides() == strides &&
         now.scalar_type() == type && version_of(now) == version && now.requires_grad() == requires_grad;
}

void Prepacked::refuse(const Source& source, const Tensor& now) {
  const std::string what = [&]() -> std::string {
    if (!now.is_same(source.tensor)) return "is another tensor than the one that was packed";
    if (now.sizes() != source.sizes || now.strides() != source.strides) return "has another shape than when packed";
    if (now.scalar_type() != source.type) return "has another dtype than when packed";
    if (now.const_data_ptr() != source.data) return "lies elsewhere in memory than when packed";
    if (now.requires_grad() != source.requires_grad) return "has another requires_grad than when packed";
    return "was written to after it was packed";
  }();
  TORCH_CHECK(false, "fastrnn.prepacked: ", source.name, " ", what,
              "; change weights outside the block and enter it again");
}

Prepacked::Prepacked(Cell cell, int64_t directions, const Rows& rows, const Names& names)
    : cell_(cell), directions_(static_cast<size_t>(directions)) {
  TORCH_CHECK_VALUE(directions >= 1 && directions <= 2 && !rows.empty() && rows.size() % directions_ == 0 &&
                        rows.size() == names.size(),
                    "fastrnn.prepacked: ", rows.size(), " rows of weights do not make layers");
  for (size_t row = 0; row < rows.size(); ++row) {
    TORCH_CHECK_VALUE(rows[row].size() == kSlots && names[row].size() == kSlots, "fastrnn.prepacked: a row has ",
                      rows[row].size(), " weights, not ", kSlots);
    for (size_t slot = 0; slot < kSlots; ++slot) {
      const Tensor weight = rows[row][slot].value_or(Tensor());
      Source source{};
      source.name = names[row][slot];
      if (weight.defined()) {
        source.tensor = weight;
        source.data = weight.const_data_ptr();
        source.sizes = weight.sizes().vec();
        source.strides = weight.strides().vec();
        source.type = weight.scalar_type();
        source.version = version_of(weight);
        source.requires_grad = weight.requires_grad();
      }
      sources_.push_back(std::move(source));
    }
  }
  for (size_t layer = 0; layer < rows.size() / directions_; ++layer) layers_.push_back(pack(layer, nullptr));
}

// The checks of a call with one step and one row, which look at every weight; then its layout.
PackedLayer Prepacked::pack(size_t layer, const cpu::PackedWeights* like) const {
  const c10::impl::ExcludeDispatchKeyGuard below(layers_above());
  const Source* const first = &sources_[layer * directions_ * kSlots];
  TORCH_CHECK(first[0].tensor.defined() && first[0].tensor.dim() == 2, "fastrnn.prepacked: ", first[0].name,
              " must be [G*H, I]");
  TORCH_CHECK(first[1].tensor.defined() && first[1].tensor.dim() == 2, "fastrnn.prepacked: ", first[1].name,
              " must be [G*H, R]");
  const auto type = first[0].tensor.scalar_type();
  const auto D = static_cast<int64_t>(directions_);
  const Tensor x = zeros({1, 1, first[0].tensor.size(1)}, type);
  const Tensor h0 = zeros({D, 1, first[1].tensor.size(1)}, type);
  const Tensor c0 = zeros({D, 1, first[1].tensor.size(0) / gates_per_unit(cell_)}, type);
  LayerArguments a{};
  a.name = "prepacked";
  a.cell = cell_;
  a.x = &x, a.h0 = &h0;
  if (cell_ == Cell::lstm) a.c0 = &c0;
  for (size_t d = 0; d < directions_; ++d) {
    const auto at = [&](size_t slot) -> const Tensor* {
      const Tensor& tensor = first[d * kSlots + slot].tensor;
      return tensor.defined() ? &tensor : nullptr;
    };
    a.weights[d] = Weights{at(0), at(1), at(2), at(3), at(4), nullptr, nullptr};
  }
  return cpu::pack_layer(a, checks::Checker(a).layer(), like);
}

std::vector<std::string> Prepacked::changed(const Rows& now) const {
  std::vector<std::string> found;
  for (size_t row = 0; row < sources_.size() / kSlots; ++row) {
    for (size_t slot = 0; slot < kSlots; ++slot) {
      const Source& source = sources_[row * kSlots + slot];
      if (!source.holds(now.at(row).at(slot).value_or(Tensor()))) found.push_back(source.name);
    }
  }
  if (!found.empty()) return found;  // of another shape, perhaps: nothing that could be packed the same way
  for (size_t layer = 0; layer < layers_.size(); ++layer) {
    const PackedLayer again = pack(layer, &layers_[layer].direction[0]);
    for (size_t d = 0; d < directions_; ++d) {
      const auto ends = [](const Tensor& memory, const cpu::PackedWeights& p) {
        const auto* end = static_cast<const char*>(memory.const_data_ptr()) + memory.nbytes();
        return std::array<const char*, kSlots + 1>{static_cast<const char*>(p.w_ih), static_cast<const char*>(p.w_hh),
                                                   static_cast<const char*>(p.b_ih), static_cast<const char*>(p.b_hh),
                                                   static_cast<const char*>(p.w_hr), end};
      };
      const auto now = ends(again.memory[d], again.direction[d]);
      const auto then = ends(layers_[layer].memory[d], layers_[layer].direction[d]);
      for (size_t slot = 0; slot < kSlots; ++slot) {
        const Source& source = sources_[(layer * directions_ + d) * kSlots + slot];
        if (!source.tensor.defined()) continue;
        // The blocks may begin at other offsets from their alignment: what both hold is the shorter of the last ones.
        const auto bytes = std::min(now[slot + 1] - now[slot], then[slot + 1] - then[slot]);
        if (std::memcmp(now[slot], then[slot], static_cast<size_t>(bytes)) != 0) found.push_back(source.name);
      }
    }
  }
  return found;
}

}  // namespace fastrnn
