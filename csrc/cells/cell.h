// SPDX-License-Identifier: BSD-3-Clause
// The contract between a cell and the loops that run it. A cell is the math of one unit at one step; it knows neither
// tensors nor loops nor instruction sets. It is a public interface, too: docs/own-cells.md builds a cell on it.
//
// The lane class V holds several units (or one) and has + - *, V::fma(a, b, c) = a*b + c, V::one(), V::zero(),
// V::sigmoid, V::tanh, V::relu, V::where_positive(y, d), d where y is positive or NaN, and on the CPU V::divide(n, d),
// V::min, V::max and V::broadcast(number).
//
// A cell is a struct with
//   kGates   G, the row blocks of w_ih and w_hh, 1 to 4
//   kStates  S, 1 (h) or 2 (h, c)
//   kSaved   lanes that forward keeps for backward, per unit
//   kStored  gradients that backward leaves, per unit, in the order of `d`: those of gates, then those of parameters
//   kParameters   weights of each unit itself, [kParameters*H] in all (peepholes); 0 for most
//   kInput, kRecurrent   index in d of the first gradient of the input gates (d_x) and of the recurrent gates (d_r);
//            both are windows of G consecutive entries. They are the same window unless the two gradients differ (GRU).
//   input_gate(s), recurrent_gate(s)   the gate (row block of w_ih, w_hh) of the s-th entry of that window
//   forward(x, r, prev, next, saved)   x[G] = W_ih x + b_ih, r[G] = W_hh h + b_hh, prev[S], next[S], saved[kSaved]
//   backward(d_next, saved, prev, next, d, d_prev)   d_next[S] = dL/dnext; d[kStored]; d_prev[S] holds what reaches the
//            previous state other than through W_hh (the loops add d_r * W_hh to d_prev[0])
//   candidate(saved, prev, next)   next as forward left it, computed again with the same bits: what was stored may be a
//            blend with prev (zoneout). Two states need it. With one, the loops undo the blend where nothing is saved,
//            and where something is, backward must not read next
//   kProjects   whether h may be projected before it recurs; then unprojected(saved, next) gives h again in backward.
//            Such a cell has two states, no parameters, and besides:
//   kOutput  index in saved of all that unprojected() reads beside next[1]
//   update(x, r, prev, next, saved)   forward but for h
// With kParameters > 0, forward and backward have one more argument, parameters[kParameters], and the last kParameters
// entries of d are dL/dparameters of this row and unit, which the loops sum over rows in ascending order.
// With two states the loops carry h past the cell: prev[0], and in backward next[0], are zero there, since a projected
// h has another width. Multiply-adds are written as V::fma wherever one is meant; the compiler must not contract the
// rest.
#pragma once

#if defined(__CUDACC__)
#define FASTRNN_INLINE __host__ __device__ __forceinline__
#else
#define FASTRNN_INLINE inline __attribute__((always_inline))
#endif
