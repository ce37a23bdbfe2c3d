// SPDX-License-Identifier: BSD-3-Clause
// The schemas of the nine operators; one look shows them all. ops.cpp registers them.
#pragma once
#include <torch/library.h>

#include <vector>

namespace fastrnn {

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

inline void define_operators(torch::Library& m) {
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

}  // namespace fastrnn
