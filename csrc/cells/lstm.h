// SPDX-License-Identifier: BSD-3-Clause
// Long short-term memory (Hochreiter & Schmidhuber 1997, forget gate of Gers et al. 2000), as torch.nn.LSTM defines it.
// Included by the sweeps of csrc/cpu and csrc/cuda.
#pragma once
#include "cell.h"

namespace fastrnn {

//   i = sigmoid(x_i + r_i)   f = sigmoid(x_f + r_f)   g = tanh(x_g + r_g)   o = sigmoid(x_o + r_o)
//   c' = f*c + i*g           h' = o * tanh(c')
struct Lstm {
  static constexpr int kGates = 4, kStates = 2, kSaved = 4, kStored = 4, kInput = 0, kRecurrent = 0;
  static constexpr int kParameters = 0;
  FASTRNN_INLINE static constexpr int input_gate(int s) { return s; }
  FASTRNN_INLINE static constexpr int recurrent_gate(int s) { return s; }

  // What a projection (torch.nn.LSTM's proj_size) multiplies, from what forward saved: o * tanh(c').
  static constexpr bool kProjects = true;
  static constexpr int kOutput = 3;  // of saved, o: all that it reads beside next[1]
  template <class V>
  FASTRNN_INLINE static V unprojected(const V* saved, const V* next) {
    return saved[kOutput] * V::tanh(next[1]);
  }

  // forward but for h', which is unprojected() of what this makes.
  template <class V>
  FASTRNN_INLINE static void update(const V* x, const V* r, const V* prev, V* next, V* saved) {
    const V i = V::sigmoid(x[0] + r[0]);
    const V f = V::sigmoid(x[1] + r[1]);
    const V g = V::tanh(x[2] + r[2]);
    const V o = V::sigmoid(x[3] + r[3]);
    next[1] = V::fma(f, prev[1], i * g);
    saved[0] = i, saved[1] = f, saved[2] = g, saved[3] = o;
  }

  template <class V>
  FASTRNN_INLINE static void forward(const V* x, const V* r, const V* prev, V* next, V* saved) {
    update(x, r, prev, next, saved);
    next[0] = unprojected(saved, next);
  }

  template <class V>
  FASTRNN_INLINE static void candidate(const V* saved, const V* prev, V* next) {
    next[1] = V::fma(saved[1], prev[1], saved[0] * saved[2]);
  }

  //   u = tanh(c')             dc' = d_next_c + dh' * o * (1 - u^2)
  //   d_i = dc' * g * i*(1-i)  d_f = dc' * c * f*(1-f)
  //   d_g = dc' * i * (1-g^2)  d_o = dh' * u * o*(1-o)
  //   dc = dc' * f             dh = 0, but for W_hh
  template <class V>
  FASTRNN_INLINE static void backward(const V* d_next, const V* saved, const V* prev, const V* next, V* d, V* d_prev) {
    const V one = V::one();
    const V i = saved[0], f = saved[1], g = saved[2], o = saved[3];
    const V u = V::tanh(next[1]);
    const V d_c = V::fma(d_next[0] * o, one - u * u, d_next[1]);
    d[0] = d_c * g * (i * (one - i));
    d[1] = d_c * prev[1] * (f * (one - f));
    d[2] = d_c * i * (one - g * g);
    d[3] = d_next[0] * u * (o * (one - o));
    d_prev[0] = V::zero();
    d_prev[1] = d_c * f;
  }
};

}  // namespace fastrnn
