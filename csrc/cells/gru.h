// SPDX-License-Identifier: BSD-3-Clause
// Gated recurrent unit (Cho et al. 2014) with the reset gate applied after the product, as torch.nn.GRU and cuDNN have
// it. Included by the sweeps of csrc/cpu and csrc/cuda.
#pragma once
#include "cell.h"

namespace fastrnn {

//   r = sigmoid(x_r + r_r)   z = sigmoid(x_z + r_z)   q = r_n = W_hn h + b_hn
//   n = tanh(x_n + r*q)      h' = n + z*(h - n)
struct Gru {
  static constexpr int kGates = 3, kStates = 1, kSaved = 4, kStored = 4, kInput = 0, kRecurrent = 1;
  static constexpr int kParameters = 0;
  static constexpr bool kProjects = false;
  // Stored gradients: [n of the input | r | z | n of the recurrence]; r and z stand once and serve both windows.
  FASTRNN_INLINE static constexpr int input_gate(int s) { return s == 0 ? 2 : s - 1; }
  FASTRNN_INLINE static constexpr int recurrent_gate(int s) { return s; }

  template <class V>
  FASTRNN_INLINE static void forward(const V* x, const V* r, const V* prev, V* next, V* saved) {
    const V reset = V::sigmoid(x[0] + r[0]);
    const V z = V::sigmoid(x[1] + r[1]);
    const V n = V::tanh(V::fma(reset, r[2], x[2]));
    next[0] = V::fma(z, prev[0] - n, n);
    saved[0] = reset, saved[1] = z, saved[2] = n, saved[3] = r[2];
  }

  //   d_n = dh' * (1-z) * (1-n^2)   d_z = dh' * (h-n) * z*(1-z)   d_r = d_n * q * r*(1-r)
  //   d_q = d_n * r                 dh = dh' * z, and through W_hh
  template <class V>
  FASTRNN_INLINE static void backward(const V* d_next, const V* saved, const V* prev, const V*, V* d, V* d_prev) {
    const V one = V::one();
    const V reset = saved[0], z = saved[1], n = saved[2], q = saved[3];
    const V d_n = d_next[0] * (one - z) * (one - n * n);
    d[0] = d_n;
    d[1] = d_n * q * (reset * (one - reset));
    d[2] = d_next[0] * (prev[0] - n) * (z * (one - z));
    d[3] = d_n * reset;
    d_prev[0] = d_next[0] * z;
  }
};

}  // namespace fastrnn
