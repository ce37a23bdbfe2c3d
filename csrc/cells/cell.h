// SPDX-License-Identifier: BSD-3-Clause
// The contract between a cell and the loops that run it. A cell is the math of one unit at one step; it knows neither
// tensors nor loops nor instruction sets. The lane class V holds several units (or one) and has + - *, V::fma(a, b, c)
// = a*b + c, V::one(), V::zero(), V::sigmoid, V::tanh, V::relu and V::where_positive(y, d), d where y is
// positive or NaN.
//
// A cell is a struct with
//   kGates   G, the row blocks of w_ih and w_hh
//   kStates  S, 1 (h) or 2 (h, c)
//   kSaved   lanes that forward keeps for backward, per unit
//   kStored  gate gradients that backward leaves, per unit, in the order of `d`
//   kInput, kRecurrent   index in d of the first gradient of the input gates (d_x) and of the recurrent gates (d_r);
//            both are windows of G consecutive entries. They are the same window unless the two gradients differ (GRU).
//   input_gate(s), recurrent_gate(s)   the gate (row block of w_ih, w_hh) of the s-th entry of that window
//   forward(x, r, prev, next, saved)   x[G] = W_ih x + b_ih, r[G] = W_hh h + b_hh, prev[S], next[S], saved[kSaved]
//   backward(d_next, saved, prev, next, d, d_prev)   d_next[S] = dL/dnext; d[kStored]; d_prev[S] holds what reaches the
//            previous state other than through W_hh (the loops add d_r * W_hh to d_prev[0])
//   candidate(saved, prev, next)   next as forward left it, computed again with the same bits: what was stored may be a
//            blend with prev (zoneout). For cells that save something and whose backward reads next; the loops undo the
//            blend of the others
//   kProjects   whether h may be projected before it recurs; then unprojected(saved, next) gives h again in backward
// Multiply-adds are written as V::fma wherever one is meant; the compiler must not contract the rest.
#pragma once

#if defined(__CUDACC__)
#define FASTRNN_INLINE __host__ __device__ __forceinline__
#else
#define FASTRNN_INLINE inline __attribute__((always_inline))
#endif
