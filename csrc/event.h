// SPDX-License-Identifier: BSD-3-Clause
// Calls that do not pass torch's dispatcher are events for torch.profiler all the same, under the operators' names:
// module.cpp, layer_call.cpp, cell_call.cpp, derivative.cpp and own_cell.cpp make one around each call of the kernels.
#pragma once
#include <ATen/SequenceNumber.h>
#include <ATen/record_function.h>

#include <array>
#include <cstddef>
#include <optional>
#include <utility>

#include "arguments.h"

namespace fastrnn {

// An event while it lives. Where nobody listens it costs some 30 ns of a call (docs/architecture.md: machine B).
class Event {
 public:
  enum Pass : size_t { kForward, kBackward, kRowGradients };

  // recorded: autograd's next node is that of this forward, and a profile joins it with its backward.
  explicit Event(const LayerArguments& a, Pass pass = kForward, bool recorded = false) {
    auto listeners = at::getStepCallbacksUnlessEmpty(at::RecordScope::FUNCTION);
    if (listeners.has_value()) [[unlikely]]
      begin(std::move(*listeners), a, pass, recorded);
  }

 private:
  void begin(at::StepCallbacks&& listeners, const LayerArguments& a, Pass pass, bool recorded) {
    static constexpr const char* kNames[][4] = {
        {"fastrnn::lstm_layer", "fastrnn::gru_layer", "fastrnn::rnn_layer", "fastrnn::own_layer"},
        {"fastrnn::lstm_layer_backward", "fastrnn::gru_layer_backward", "fastrnn::rnn_layer_backward",
         "fastrnn::own_layer_backward"},
        {"fastrnn::lstm_layer_row_gradients", "fastrnn::gru_layer_row_gradients", "fastrnn::rnn_layer_row_gradients",
         "fastrnn::own_layer_row_gradients"}};
    const size_t cell = a.cell == Cell::lstm ? 0 : a.cell == Cell::gru ? 1 : a.cell == Cell::own ? 3 : 2;
    const char* const name = kNames[pass][cell];
    const int64_t node = recorded ? static_cast<int64_t>(at::sequence_number::peek()) : -1;
    event_.emplace(std::move(listeners));
    if (!event_->needsInputs()) {
      event_->before(name, node);
      return;
    }
    const Weights& w = a.weights[0];
    std::array<c10::IValue, 7> inputs;  // None for those that are not there
    size_t next = 0;
    for (const Tensor* tensor : {a.x, a.h0, a.c0, w.w_ih, w.w_hh, w.b_ih, w.b_hh}) {
      if (tensor != nullptr) inputs[next] = *tensor;
      ++next;
    }
    event_->before(name, c10::ArrayRef<const c10::IValue>(inputs.data(), inputs.size()), node);
  }

  std::optional<at::RecordFunction> event_;
};

}  // namespace fastrnn
