// SPDX-License-Identifier: BSD-3-Clause
// The simple recurrent network of Elman 1990 with tanh or relu, as torch.nn.RNN defines it.
// Included by the sweeps of csrc/cpu and csrc/cuda.
#pragma once
#include "cell.h"

namespace fastrnn {

struct Tanh {
  template <class V>
  FASTRNN_INLINE static V forward(V a) {
    return V::tanh(a);
  }
  template <class V>
  FASTRNN_INLINE static V backward(V y, V d_y) {
    return d_y * (V::one() - y * y);
  }
};

struct Relu {
  template <class V>
  FASTRNN_INLINE static V forward(V a) {
    return V::relu(a);
  }
  template <class V>
  FASTRNN_INLINE static V backward(V y, V d_y) {
    return V::where_positive(y, d_y);
  }
};

//   h' = activation(x + r)     d_a = dh' * activation'(a), written in terms of h'
template <class Activation>
struct Rnn {
  static constexpr int kGates = 1, kStates = 1, kSaved = 0, kStored = 1, kInput = 0, kRecurrent = 0;
  static constexpr int kParameters = 0;
  static constexpr bool kProjects = false;
  FASTRNN_INLINE static constexpr int input_gate(int s) { return s; }
  FASTRNN_INLINE static constexpr int recurrent_gate(int s) { return s; }

  template <class V>
  FASTRNN_INLINE static void forward(const V* x, const V* r, const V*, V* next, V*) {
    next[0] = Activation::forward(x[0] + r[0]);
  }

  template <class V>
  FASTRNN_INLINE static void backward(const V* d_next, const V*, const V*, const V* next, V* d, V* d_prev) {
    d[0] = Activation::backward(next[0], d_next[0]);
    d_prev[0] = V::zero();
  }
};

}  // namespace fastrnn
