# SPDX-License-Identifier: BSD-3-Clause
"""The layers without modules, for code that holds its own weights: lstm(), gru(), rnn().

Each checks its arguments and calls the kernel through autograd.py; where the kernels do not go, torch's own functions
compute the same (other devices, dtypes and tensor classes) or reference.py does (torch.func, forward-mode AD).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import autograd, extended, operators

Weights = Sequence[Tensor | None]
_WEIGHT_NAMES = ("w_ih", "w_hh", "b_ih", "b_hh", "w_hr")


def lstm(
    x: Tensor,
    state: tuple[Tensor, Tensor] | None = None,
    *,
    weights: Weights,
    reverse_weights: Weights | None = None,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    reset_state: tuple[Tensor, Tensor] | None = None,
    h_mask: Tensor | None = None,
    zoneout_h: Tensor | None = None,
    zoneout_c: Tensor | None = None,
    return_all_states: bool = False,
    recompute: bool = False,
) -> tuple[Any, ...]:
    """One LSTM layer over a whole sequence.

    Args:
        x: [T, B, I], or packed [N, I] if batch_sizes is given; float32, float64, bfloat16 or float16.
        state: (h, c), the initial states: h [D, B, R], c [D, B, H]; zeros if None. R is P with a projection, else H.
        weights: (w_ih, w_hh), (w_ih, w_hh, b_ih, b_hh) or (w_ih, w_hh, b_ih, b_hh, w_hr): w_ih [4*H, I],
            w_hh [4*H, R], b_ih and b_hh [4*H], w_hr [P, H]; gates in the order i f g o. All but the first two may be
            None.
        reverse_weights: the same for a second direction, from the last step to the first; D is 2 if given, else 1.
        batch_sizes: CPU int64 [T], rows of each step, non-increasing, sum N; as in a PackedSequence.
        lengths: int64 [B], steps of each sequence of a padded batch, from 0 to T in any order; on the CPU or x's
            device. What lies behind the end is not read; y is zero there, and the final state is that at the end.
        reset: bool [T, B], where the state before step t is replaced; in the reverse direction the state on its way
            from step t to step t-1. Not with batch_sizes.
        reset_state: (h, c), what replaces it, [D, B, R] and [D, B, H]; zeros if None.
        h_mask: [D, B, R], multiplies the h that W_hh multiplies, and no other (recurrent dropout).
        zoneout_h: [T, B, D*R] or [N, D*R], how much of h before a step stays, from 0 to 1: 0 and 1 drawn at random in
            training, their expectation in evaluation. May be expanded. Neither this nor another mask has a gradient.
        zoneout_c: the same for c, [T, B, D*H] or [N, D*H].
        return_all_states: whether the states at every step are returned, too.
        recompute: keep nothing for the backward, which then runs the forward once more; the same bits.
    Returns:
        y: [T, B, D*R] or [N, D*R], h at every step. state: (h, c) after the last step, h [D, B, R], c [D, B, H].
        With return_all_states also (h, c) at every step: y, and c [T, B, D*H] or [N, D*H].
        Differentiable any number of times: once by kernels, further through reference.py.
    Raises:
        ValueError: a shape, dtype or device does not fit; the message names the argument.
        TypeError: an argument that must be a tensor, or a sequence of them, is not.
        RuntimeError: the numbers in batch_sizes or lengths do not fit x, found by the kernel.
    Source: Hochreiter & Schmidhuber 1997, with the forget gate of Gers et al. 2000 and the projection of Sak et al.
        2014; equations of torch.nn.LSTM.
    """
    directions = _directions("lstm", weights, reverse_weights, 5)
    if state is None:
        states: tuple[Tensor, ...] = ()
    elif isinstance(state, (tuple, list)) and len(state) == 2:
        states = tuple(state)
    else:
        raise TypeError(f"fastrnn.lstm: state must be a pair (h, c), got {_kind(state)}")
    states = _check("lstm", 4, x, states, ("h", "c"), directions, batch_sizes)
    rung = autograd.route((x, *states, *directions[0], *directions[1]))
    if rung == "torch" and x.is_cuda:
        rung = _cuda_rung(4, x, states, directions)
    if rung != "kernel":
        _check_more("lstm", x, states, ("h", "c"), directions, batch_sizes)
    if return_all_states or not (lengths is reset is h_mask is zoneout_h is zoneout_c is None and reset_state is None):
        zoneouts = (zoneout_h, zoneout_c)
        extras = extended.given("lstm", x, states, batch_sizes, lengths, reset, reset_state, h_mask, zoneouts)
        tensors = (x, *states, *directions[0], *directions[1])
        y, h, c, *cells = extended.layer(operators.LSTM, tensors, batch_sizes, extras, (), return_all_states, recompute)
        return (y, (h, c), (y, extended.side_by_side(cells[0], y))) if return_all_states else (y, (h, c))
    if rung == "torch":
        y, h, c = _stock(torch.lstm, x, states, directions, batch_sizes)
    else:
        arguments: Any = (x, *states, *directions[0], *directions[1], batch_sizes)
        y, h, c = autograd.lstm_layer(*arguments, recompute=recompute)
    return y, (h, c)


def gru(
    x: Tensor,
    state: Tensor | None = None,
    *,
    weights: Weights,
    reverse_weights: Weights | None = None,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    reset_state: Tensor | None = None,
    h_mask: Tensor | None = None,
    zoneout_h: Tensor | None = None,
    return_all_states: bool = False,
    recompute: bool = False,
) -> tuple[Any, ...]:
    """One GRU layer over a whole sequence.

    Args:
        x: [T, B, I], or packed [N, I] if batch_sizes is given; float32, float64, bfloat16 or float16.
        state: h, the initial state [D, B, H]; zeros if None.
        weights: (w_ih, w_hh) or (w_ih, w_hh, b_ih, b_hh): w_ih [3*H, I], w_hh [3*H, H], b_ih and b_hh [3*H]; gates in
            the order r z n. The biases may be None.
        reverse_weights: the same for a second direction, from the last step to the first; D is 2 if given, else 1.
        batch_sizes: CPU int64 [T], rows of each step, non-increasing, sum N; as in a PackedSequence.
        lengths: int64 [B], steps of each sequence of a padded batch, from 0 to T in any order; on the CPU or x's
            device. What lies behind the end is not read; y is zero there, and the final state is that at the end.
        reset: bool [T, B], where the state before step t is replaced; in the reverse direction the state on its way
            from step t to step t-1. Not with batch_sizes.
        reset_state: what replaces it, [D, B, H]; zeros if None.
        h_mask: [D, B, H], multiplies the h that W_hh multiplies, and no other (recurrent dropout).
        zoneout_h: [T, B, D*H] or [N, D*H], how much of h before a step stays, from 0 to 1: 0 and 1 drawn at random in
            training, their expectation in evaluation. May be expanded. Neither this nor another mask has a gradient.
        return_all_states: whether the states at every step are returned, too.
        recompute: keep nothing for the backward, which then runs the forward once more; the same bits.
    Returns:
        y: [T, B, D*H] or [N, D*H], h at every step. state: h after the last step, [D, B, H].
        With return_all_states also h at every step, which is y.
        Differentiable any number of times: once by kernels, further through reference.py.
    Raises:
        ValueError: a shape, dtype or device does not fit; the message names the argument.
        TypeError: an argument that must be a tensor, or a sequence of them, is not.
        RuntimeError: the numbers in batch_sizes or lengths do not fit x, found by the kernel.
    Source: Cho et al. 2014, in the variant of torch.nn.GRU, which applies r to W_hn h + b_hn.
    """
    directions = _directions("gru", weights, reverse_weights, 4)
    states = _check("gru", 3, x, () if state is None else (state,), ("state",), directions, batch_sizes)
    rung = autograd.route((x, *states, *directions[0], *directions[1]))
    if rung == "torch" and x.is_cuda:
        rung = _cuda_rung(3, x, states, directions)
    if rung != "kernel":
        _check_more("gru", x, states, ("state",), directions, batch_sizes)
    if return_all_states or not (lengths is reset is reset_state is h_mask is zoneout_h is None):
        extras = extended.given("gru", x, states, batch_sizes, lengths, reset, reset_state, h_mask, (zoneout_h,))
        tensors = (x, *states, *directions[0], *directions[1])
        y, h = extended.layer(operators.GRU, tensors, batch_sizes, extras, (), recompute=recompute)
        return (y, h, y) if return_all_states else (y, h)
    if rung == "torch":
        return _stock(torch.gru, x, states[0], directions, batch_sizes)
    arguments: Any = (x, *states, *directions[0], *directions[1], batch_sizes)
    return autograd.gru_layer(*arguments, recompute=recompute)


def rnn(
    x: Tensor,
    state: Tensor | None = None,
    *,
    weights: Weights,
    reverse_weights: Weights | None = None,
    nonlinearity: str = "tanh",
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    reset_state: Tensor | None = None,
    h_mask: Tensor | None = None,
    zoneout_h: Tensor | None = None,
    return_all_states: bool = False,
    recompute: bool = False,
) -> tuple[Any, ...]:
    """One Elman RNN layer over a whole sequence.

    Args:
        x: [T, B, I], or packed [N, I] if batch_sizes is given; float32, float64, bfloat16 or float16.
        state: h, the initial state [D, B, H]; zeros if None.
        weights: (w_ih, w_hh) or (w_ih, w_hh, b_ih, b_hh): w_ih [H, I], w_hh [H, H], b_ih and b_hh [H]. The biases may
            be None.
        reverse_weights: the same for a second direction, from the last step to the first; D is 2 if given, else 1.
        nonlinearity: "tanh" or "relu".
        batch_sizes: CPU int64 [T], rows of each step, non-increasing, sum N; as in a PackedSequence.
        lengths: int64 [B], steps of each sequence of a padded batch, from 0 to T in any order; on the CPU or x's
            device. What lies behind the end is not read; y is zero there, and the final state is that at the end.
        reset: bool [T, B], where the state before step t is replaced; in the reverse direction the state on its way
            from step t to step t-1. Not with batch_sizes.
        reset_state: what replaces it, [D, B, H]; zeros if None.
        h_mask: [D, B, H], multiplies the h that W_hh multiplies, and no other (recurrent dropout).
        zoneout_h: [T, B, D*H] or [N, D*H], how much of h before a step stays, from 0 to 1: 0 and 1 drawn at random in
            training, their expectation in evaluation. May be expanded. Neither this nor another mask has a gradient.
        return_all_states: whether the states at every step are returned, too.
        recompute: keep nothing for the backward, which then runs the forward once more; the same bits.
    Returns:
        y: [T, B, D*H] or [N, D*H], h at every step. state: h after the last step, [D, B, H].
        With return_all_states also h at every step, which is y.
        Differentiable any number of times: once by kernels, further through reference.py.
    Raises:
        ValueError: a shape, dtype or device does not fit, or nonlinearity is neither of the two; the message names the
            argument.
        TypeError: an argument that must be a tensor, or a sequence of them, is not.
        RuntimeError: the numbers in batch_sizes or lengths do not fit x, found by the kernel.
    Source: Elman 1990; equations of torch.nn.RNN.
    """
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f'fastrnn.rnn: nonlinearity must be "tanh" or "relu", got {nonlinearity!r}')
    relu = nonlinearity == "relu"
    directions = _directions("rnn", weights, reverse_weights, 4)
    states = _check("rnn", 1, x, () if state is None else (state,), ("state",), directions, batch_sizes)
    rung = autograd.route((x, *states, *directions[0], *directions[1]))
    if rung == "torch" and x.is_cuda:
        rung = _cuda_rung(1, x, states, directions)
    if rung != "kernel":
        _check_more("rnn", x, states, ("state",), directions, batch_sizes)
    if return_all_states or not (lengths is reset is reset_state is h_mask is zoneout_h is None):
        extras = extended.given("rnn", x, states, batch_sizes, lengths, reset, reset_state, h_mask, (zoneout_h,))
        tensors = (x, *states, *directions[0], *directions[1])
        y, h = extended.layer(operators.RNN, tensors, batch_sizes, extras, (relu,), recompute=recompute)
        return (y, h, y) if return_all_states else (y, h)
    if rung == "torch":
        return _stock(torch.rnn_relu if relu else torch.rnn_tanh, x, states[0], directions, batch_sizes)
    arguments: Any = (x, *states, *directions[0], *directions[1], batch_sizes, relu)
    return autograd.rnn_layer(*arguments, recompute=recompute)


def _kind(value: Any) -> str:
    """A value as an error message shows it."""
    return f"{len(value)} values" if isinstance(value, (tuple, list)) else type(value).__name__


def _directions(function: str, weights: Weights, reverse: Weights | None, most: int) -> tuple[Weights, Weights]:
    """Both directions' weights, filled up with None to `most` each, in the order of the operator."""
    rows = []
    for argument, given, suffix in (("weights", weights, ""), ("reverse_weights", reverse, "_reverse")):
        if given is None and suffix:
            rows.append((None,) * most)
            continue
        if not isinstance(given, (tuple, list)):
            raise TypeError(f"fastrnn.{function}: {argument} must be a tuple of tensors, got {_kind(given)}")
        if not 2 <= len(given) <= most:
            names = ", ".join(_WEIGHT_NAMES[:most])
            raise ValueError(f"fastrnn.{function}: {argument} must be 2 to {most} of ({names}), got {_kind(given)}")
        for position, weight in enumerate(given):
            if not isinstance(weight, Tensor) and (weight is not None or position < 2):
                name = _WEIGHT_NAMES[position] + suffix
                raise TypeError(f"fastrnn.{function}: {name} must be a Tensor, got {_kind(weight)}")
        rows.append((*given, *(None,) * (most - len(given))))
    return rows[0], rows[1]


def _check(
    function: str,
    gates: int,
    x: Tensor,
    states: tuple[Tensor, ...],
    state_names: tuple[str, ...],
    directions: tuple[Weights, Weights],
    batch_sizes: Tensor | None,
) -> tuple[Tensor, ...]:
    """Checks types and shapes of a layer's arguments; returns the initial states, zeros if none were given."""
    if not isinstance(x, Tensor):
        raise TypeError(f"fastrnn.{function}: x must be a Tensor, got {_kind(x)}")
    if batch_sizes is None:
        if x.dim() != 3:
            raise ValueError(f"fastrnn.{function}: x must be [T, B, I], got {list(x.shape)}")
        if x.shape[0] == 0:
            raise ValueError(f"fastrnn.{function}: x must have at least one time step, got {list(x.shape)}")
    else:
        if not isinstance(batch_sizes, Tensor):
            raise TypeError(f"fastrnn.{function}: batch_sizes must be a Tensor, got {_kind(batch_sizes)}")
        if batch_sizes.dim() != 1 or batch_sizes.dtype is not torch.int64 or not batch_sizes.is_cpu:
            got = f"{batch_sizes.dtype} {list(batch_sizes.shape)} on {batch_sizes.device}"
            raise ValueError(f"fastrnn.{function}: batch_sizes must be int64 [T] on the CPU, got {got}")
        if batch_sizes.shape[0] == 0:
            raise ValueError(f"fastrnn.{function}: batch_sizes must have at least one time step, got none")
        if x.dim() != 2:
            raise ValueError(f"fastrnn.{function}: x must be [N, I] when batch_sizes is given, got {list(x.shape)}")

    projection = directions[0][4] if len(directions[0]) == 5 else None
    w_hh: Any = directions[0][1]  # _directions has seen that it is a Tensor
    if w_hh.dim() != 2 or w_hh.shape[0] == 0 or w_hh.shape[0] % gates:
        raise _misfit(function, gates, projection, "w_hh", w_hh, "[G*H, R] with H >= 1")
    if x.shape[-1] == 0:
        raise ValueError(f"fastrnn.{function}: x must have at least one feature, got {list(x.shape)}")
    I, rows = x.shape[-1], w_hh.shape[0]  # noqa: E741
    H = R = rows // gates
    if projection is not None:
        R = projection.shape[0]
    D = 1 if directions[1][0] is None else 2
    for row, suffix in zip(directions[:D], ("", "_reverse"), strict=False):
        for name, weight, letters, shape in (
            ("w_ih", row[0], "[G*H, I]", (rows, I)),
            ("w_hh", row[1], "[G*H, R]", (rows, R)),
            ("b_ih", row[2], "[G*H]", (rows,)),
            ("b_hh", row[3], "[G*H]", (rows,)),
            ("w_hr", row[4] if len(row) == 5 else None, "[P, H]", (R, H)),
        ):
            if weight is not None and weight.shape != shape:
                raise _misfit(function, gates, projection, name + suffix, weight, letters, shape)
        if len(row) == 5 and (row[4] is None) != (projection is None):
            raise ValueError(f"fastrnn.{function}: w_hr must be given for both directions or for none")

    widths = (R, H)[: len(state_names)]
    for state, name in zip(states, state_names, strict=False):
        if not isinstance(state, Tensor):
            raise TypeError(f"fastrnn.{function}: {name} must be a Tensor, got {_kind(state)}")
    if batch_sizes is None:
        B = x.shape[1]
    else:
        B = states[0].shape[1] if states and states[0].dim() == 3 else int(batch_sizes[0])
    for state, name, letter, width in zip(states, state_names, "RH", widths, strict=False):
        if state.shape != (D, B, width):
            raise _misfit(function, gates, projection, name, state, f"[D, B, {letter}]", (D, B, width))
    return states or tuple(x.new_zeros((D, B, width)) for width in widths)


def _misfit(
    function: str,
    gates: int,
    projection: Tensor | None,
    name: str,
    tensor: Tensor,
    letters: str,
    shape: tuple[int, ...] | None = None,
) -> ValueError:
    """The error for a tensor of the wrong shape: fastrnn.lstm: w_hh must be [4*H, H] = [256, 64], got [256, 128]."""
    letters = letters.replace("G*", f"{gates}*" if gates > 1 else "").replace("R", "H" if projection is None else "P")
    expected = "" if shape is None else f" = {list(shape)}"
    return ValueError(f"fastrnn.{function}: {name} must be {letters}{expected}, got {list(tensor.shape)}")


def _check_more(
    function: str,
    x: Tensor,
    states: Sequence[Tensor],
    state_names: Sequence[str],
    directions: tuple[Weights, Weights],
    batch_sizes: Tensor | None,
) -> None:
    """Checks what route() and the operator have checked for the kernel, and torch's functions and the reference do not
    all look at: every tensor has x's dtype (or autocast is on) and device, and batch_sizes fit."""
    if batch_sizes is not None:
        sizes, B = batch_sizes.tolist(), states[0].shape[1]
        if sizes[0] != B or sum(sizes) != x.shape[0] or sizes[-1] < 1 or sizes != sorted(sizes, reverse=True):
            rule = f"non-increasing from B = {B}, at least 1, with the sum N = {x.shape[0]}"
            raise ValueError(f"fastrnn.{function}: batch_sizes must be {rule}, got {sizes}")
    named: list[tuple[str, Tensor | None]] = [*zip(state_names, states, strict=True)]
    for row, suffix in zip(directions, ("", "_reverse"), strict=True):
        named += [(name + suffix, weight) for name, weight in zip(_WEIGHT_NAMES, row, strict=False)]
    kind = x.device.type
    mixed = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    for name, tensor in named:
        if tensor is not None and (tensor.device != x.device or (tensor.dtype is not x.dtype and not mixed)):
            got, expected = f"{tensor.dtype} on {tensor.device}", f"{x.dtype} on {x.device}"
            raise ValueError(f"fastrnn.{function}: {name} must be {expected} like x, got {got}")


def _cuda_rung(gates: int, x: Tensor, states: tuple[Tensor, ...], directions: tuple[Weights, Weights]) -> str:
    """The rung of a layer on CUDA, for which route() says "torch"; without extras, of which extended.py decides."""
    tensors = (x, *states, *directions[0], *directions[1])
    w_hh = directions[0][1]
    assert w_hh is not None
    return autograd.cuda_route(tensors, gates, w_hh.shape[0] // gates, states[0].shape[1], torch.is_grad_enabled())[0]


def _stock(
    layer: Callable[..., Any], x: Tensor, states: Any, directions: tuple[Weights, Weights], batch_sizes: Tensor | None
) -> Any:
    """The same layer by torch's own function, which takes two biases or none."""
    rows: list[list[Any]] = [list(row) for row in directions if row[0] is not None]
    biased = any(bias is not None for row in rows for bias in row[2:4])
    flat = []
    for row in rows:
        if biased:
            row[2:4] = [bias if bias is not None else row[0].new_zeros(row[0].shape[0]) for bias in row[2:4]]
        flat += [weight for weight in row if weight is not None]
    train = torch.is_grad_enabled()  # cuDNN keeps what its backward needs in training mode alone
    if batch_sizes is None:
        return layer(x, states, flat, biased, 1, 0.0, train, len(rows) == 2, False)
    return layer(x, batch_sizes, states, flat, biased, 1, 0.0, train, len(rows) == 2)
