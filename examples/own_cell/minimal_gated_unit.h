// SPDX-License-Identifier: BSD-3-Clause
// Minimal gated unit (Zhou, Wu, Zhang & Zhou 2016, arXiv:1603.09420). The paper multiplies f*h by W_n, which would need
// a second product in every step, after f. Here f is applied to W_n h + b_n, as torch.nn.GRU applies r and for the same
// reason (its documentation says so): one product gives both gates.
#pragma once
#include "cells/cell.h"

//   f = sigmoid(x_f + r_f)   q = r_n = W_hn h + b_hn   n = tanh(x_n + f*q)   h' = h + f*(n - h)
struct MinimalGatedUnit {
  static constexpr int kGates = 2, kStates = 1, kSaved = 3, kStored = 3, kParameters = 0;
  static constexpr bool kProjects = false;
  // Stored gradients: [n of the input | f | n of the recurrence]. f stands once and is in both windows.
  static constexpr int kInput = 0, kRecurrent = 1;
  FASTRNN_INLINE static constexpr int input_gate(int s) { return 1 - s; }
  FASTRNN_INLINE static constexpr int recurrent_gate(int s) { return s; }

  template <class V>
  FASTRNN_INLINE static void forward(const V* x, const V* r, const V* prev, V* next, V* saved) {
    const V f = V::sigmoid(x[0] + r[0]);
    const V n = V::tanh(V::fma(f, r[1], x[1]));
    next[0] = V::fma(f, n - prev[0], prev[0]);
    saved[0] = f, saved[1] = n, saved[2] = r[1];
  }

  //   d_n = dh' * f * (1-n^2)   d_q = d_n * f   d_f = (dh' * (n-h) + d_n * q) * f*(1-f)
  //   dh = dh' * (1-f), and through W_hh
  template <class V>
  FASTRNN_INLINE static void backward(const V* d_next, const V* saved, const V* prev, const V*, V* d, V* d_prev) {
    const V one = V::one();
    const V f = saved[0], n = saved[1], q = saved[2];
    const V d_n = d_next[0] * f * (one - n * n);
    d[0] = d_n;
    d[1] = V::fma(d_next[0], n - prev[0], d_n * q) * (f * (one - f));
    d[2] = d_n * f;
    d_prev[0] = d_next[0] * (one - f);
  }
};
