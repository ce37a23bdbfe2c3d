// SPDX-License-Identifier: BSD-3-Clause
// LSTM with peepholes (Gers, Schraudolph & Schmidhuber 2002; equations 7 to 11 of Graves 2013, arXiv:1308.0850): the
// gates also see c, each unit its own, through a weight of the unit.
#pragma once
#include "cells/cell.h"

//   i = sigmoid(x_i + r_i + p_i*c)   f = sigmoid(x_f + r_f + p_f*c)   g = tanh(x_g + r_g)
//   c' = f*c + i*g                   o = sigmoid(x_o + r_o + p_o*c')  h' = o * tanh(c')
struct PeepholeLstm {
  static constexpr int kGates = 4, kStates = 2, kSaved = 4;
  static constexpr int kParameters = 3;  // p_i, p_f, p_o
  static constexpr int kStored = 4 + kParameters;
  static constexpr bool kProjects = false;
  static constexpr int kInput = 0, kRecurrent = 0;  // the gradients of both sides of a gate are the same
  FASTRNN_INLINE static constexpr int input_gate(int s) { return s; }
  FASTRNN_INLINE static constexpr int recurrent_gate(int s) { return s; }

  template <class V>
  FASTRNN_INLINE static void forward(const V* x, const V* r, const V* prev, V* next, V* saved, const V* p) {
    const V i = V::sigmoid(V::fma(p[0], prev[1], x[0] + r[0]));
    const V f = V::sigmoid(V::fma(p[1], prev[1], x[1] + r[1]));
    const V g = V::tanh(x[2] + r[2]);
    const V c = V::fma(f, prev[1], i * g);
    const V o = V::sigmoid(V::fma(p[2], c, x[3] + r[3]));
    next[0] = o * V::tanh(c);
    next[1] = c;
    saved[0] = i, saved[1] = f, saved[2] = g, saved[3] = o;
  }

  template <class V>
  FASTRNN_INLINE static void candidate(const V* saved, const V* prev, V* next) {
    next[1] = V::fma(saved[1], prev[1], saved[0] * saved[2]);
  }

  //   u = tanh(c')             d_o = dh' * u * o*(1-o)
  //   dc' = d_next_c + dh' * o * (1 - u^2) + d_o * p_o
  //   d_i = dc' * g * i*(1-i)  d_f = dc' * c * f*(1-f)   d_g = dc' * i * (1-g^2)
  //   dc = dc' * f + d_i * p_i + d_f * p_f               dh = 0, but for W_hh
  //   d_p_i = d_i * c          d_p_f = d_f * c           d_p_o = d_o * c'
  template <class V>
  FASTRNN_INLINE static void backward(const V* d_next, const V* saved, const V* prev, const V* next, V* d, V* d_prev,
                                      const V* p) {
    const V one = V::one();
    const V i = saved[0], f = saved[1], g = saved[2], o = saved[3];
    const V u = V::tanh(next[1]);
    const V d_o = d_next[0] * u * (o * (one - o));
    const V d_c = V::fma(d_o, p[2], V::fma(d_next[0] * o, one - u * u, d_next[1]));
    d[0] = d_c * g * (i * (one - i));
    d[1] = d_c * prev[1] * (f * (one - f));
    d[2] = d_c * i * (one - g * g);
    d[3] = d_o;
    d[4] = d[0] * prev[1];
    d[5] = d[1] * prev[1];
    d[6] = d_o * next[1];
    d_prev[0] = V::zero();
    d_prev[1] = V::fma(d_c, f, V::fma(d[0], p[0], d[1] * p[1]));
  }
};
