# SPDX-License-Identifier: BSD-3-Clause
"""Every cell and layer in plain PyTorch: the readable and differentiable twin of the kernels.

autograd.py calls it where a kernel cannot go (derivatives of derivatives, torch.func, forward-mode AD) and the tests
use it as truth. It is typed from the equations, independently of csrc, so that one mistake cannot sit in both. Nothing
is done in place and nothing depends on dtype, device or tensor class: every function here can be differentiated any
number of times, in both modes, and works under vmap, jvp and grad of torch.func.

Letters: T time, B batch, I input, H hidden units, P projection, D directions; R is P with a projection, else H.
Arguments of the layers stand in the order of the operators; weights that do not exist are None.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

State = tuple[Tensor, ...]
# (projected input of one step [B, G*H], state before it) -> state after it; the first entry of a state is h.
Step = Callable[[Tensor, State], State]


def lstm_step(
    x: Tensor,
    h: Tensor,
    c: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    w_hr: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of an LSTM.

        i = sigmoid(W_ii x + b_ii + W_hi h + b_hi)        g = tanh(W_ig x + b_ig + W_hg h + b_hg)
        f = sigmoid(W_if x + b_if + W_hf h + b_hf)        o = sigmoid(W_io x + b_io + W_ho h + b_ho)
        c' = f * c + i * g        h' = o * tanh(c'), with a projection h' = W_hr (o * tanh(c'))

    Args:
        x: [..., I].
        h: [..., R].
        c: [..., H].
        w_ih: [4*H, I], gates in the order i f g o.
        w_hh: [4*H, R].
        b_ih: [4*H] or None.
        b_hh: [4*H] or None.
        w_hr: [P, H] or None.
    Returns:
        h: [..., R]. c: [..., H]. Differentiable any number of times.
    Source: Hochreiter & Schmidhuber 1997, with the forget gate of Gers et al. 2000 and the projection of Sak et al.
        2014; equations of torch.nn.LSTMCell.
    """
    return _lstm_step(linear(x, w_ih, b_ih), h, c, w_hh, b_hh, w_hr)


def _lstm_step(
    projected: Tensor, h: Tensor, c: Tensor, w_hh: Tensor, b_hh: Tensor | None, w_hr: Tensor | None
) -> tuple[Tensor, Tensor]:
    i, f, g, o = (projected + linear(h, w_hh, b_hh)).chunk(4, dim=-1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    h = torch.sigmoid(o) * torch.tanh(c)
    return (h if w_hr is None else linear(h, w_hr)), c


def gru_step(
    x: Tensor,
    h: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Tensor:
    """One step of a GRU.

        r = sigmoid(W_ir x + b_ir + W_hr h + b_hr)        z = sigmoid(W_iz x + b_iz + W_hz h + b_hz)
        n = tanh(W_in x + b_in + r * (W_hn h + b_hn))     h' = (1 - z) * n + z * h = n + z * (h - n)

    Args:
        x: [..., I].
        h: [..., H].
        w_ih: [3*H, I], gates in the order r z n.
        w_hh: [3*H, H].
        b_ih: [3*H] or None.
        b_hh: [3*H] or None.
    Returns:
        h: [..., H]. Differentiable any number of times.
    Source: Cho et al. 2014, with the reset gate applied after the matrix product; equations of torch.nn.GRUCell.
    """
    return _gru_step(linear(x, w_ih, b_ih), h, w_hh, b_hh)


def _gru_step(
    projected: Tensor, h: Tensor, w_hh: Tensor, b_hh: Tensor | None, entering: Tensor | None = None
) -> Tensor:
    """entering: what W_hh multiplies, where that is not h itself (recurrent dropout)."""
    x_r, x_z, x_n = projected.chunk(3, dim=-1)
    h_r, h_z, h_n = linear(h if entering is None else entering, w_hh, b_hh).chunk(3, dim=-1)
    r = torch.sigmoid(x_r + h_r)
    z = torch.sigmoid(x_z + h_z)
    n = torch.tanh(x_n + r * h_n)
    return n + z * (h - n)


def rnn_step(
    x: Tensor,
    h: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """One step of an Elman RNN: h' = tanh(W_ih x + b_ih + W_hh h + b_hh), or relu of the same sum.

    Args:
        x: [..., I].
        h: [..., H].
        w_ih: [H, I].
        w_hh: [H, H].
        b_ih: [H] or None.
        b_hh: [H] or None.
        relu: max(0, .) instead of tanh.
    Returns:
        h: [..., H]. Differentiable any number of times (relu: its derivative at 0 is 0).
    Source: Elman 1990; equations of torch.nn.RNNCell.
    """
    return _rnn_step(linear(x, w_ih, b_ih), h, w_hh, b_hh, relu)


def _rnn_step(projected: Tensor, h: Tensor, w_hh: Tensor, b_hh: Tensor | None, relu: bool) -> Tensor:
    summed = projected + linear(h, w_hh, b_hh)
    return torch.relu(summed) if relu else torch.tanh(summed)


def _sweep(
    step: Step, projected: Tensor, start: State, sizes: Sequence[int] | None, reverse: bool
) -> tuple[Tensor, State]:
    """Runs one direction over time.

    projected is [T, B, G*H], or [N, G*H] if sizes (the rows of each step, non-increasing) are given. Packed rows end
    early: going forward, a row's final state is set aside when its sequence ends; going backward, a row enters with its
    initial state at its own last step.
    """
    steps = list(projected.unbind(0) if sizes is None else projected.split(list(sizes)))
    state = tuple(entry[: steps[-1].shape[0]] for entry in start) if reverse else start
    outputs: list[Tensor] = []
    ended: list[State] = []
    for now in reversed(steps) if reverse else steps:
        rows, before = now.shape[0], state[0].shape[0]
        if rows < before:
            ended.append(tuple(entry[rows:] for entry in state))
            state = tuple(entry[:rows] for entry in state)
        elif rows > before:
            state = tuple(torch.cat((entry, first[before:rows])) for entry, first in zip(state, start, strict=True))
        state = step(now, state)
        outputs.append(state[0])
    if reverse:
        outputs.reverse()
    y = torch.stack(outputs) if sizes is None else torch.cat(outputs)
    if ended:
        ended.append(state)
        state = tuple(torch.cat(entries) for entries in zip(*reversed(ended), strict=True))
    return y, state


def _layer(
    steps: Sequence[Step],
    projected: Sequence[Tensor],
    starts: Sequence[State],
    batch_sizes: Tensor | None,
) -> tuple[Tensor, State]:
    """Runs the one or two directions of a layer; the outputs side by side, the final states stacked over D."""
    sizes = None if batch_sizes is None else batch_sizes.tolist()
    swept = [
        _sweep(step, rows, start, sizes, direction == 1)
        for direction, (step, rows, start) in enumerate(zip(steps, projected, starts, strict=True))
    ]
    y = swept[0][0] if len(swept) == 1 else torch.cat([outputs for outputs, _ in swept], dim=-1)
    return y, tuple(torch.stack(finals) for finals in zip(*(state for _, state in swept), strict=True))


def lstm_layer(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    w_hr: Tensor | None = None,
    w_ih_reverse: Tensor | None = None,
    w_hh_reverse: Tensor | None = None,
    b_ih_reverse: Tensor | None = None,
    b_hh_reverse: Tensor | None = None,
    w_hr_reverse: Tensor | None = None,
    batch_sizes: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One LSTM layer with its one or two directions over a whole sequence; lstm_step at every step.

    Args:
        x: [T, B, I], or packed [N, I] if batch_sizes is given.
        h0: [D, B, R].
        c0: [D, B, H].
        w_ih, w_hh, b_ih, b_hh, w_hr: as in lstm_step; with _reverse: of the direction from the last step to the first.
        batch_sizes: CPU int64 [T], rows of each step, non-increasing, sum N, first B; as in a PackedSequence.
    Returns:
        y: [T, B, D*R] or [N, D*R]. h_n: [D, B, R]. c_n: [D, B, H]. Differentiable any number of times.
    """

    def step(w_hh: Tensor, b_hh: Tensor | None, w_hr: Tensor | None) -> Step:
        return lambda projected, state: _lstm_step(projected, state[0], state[1], w_hh, b_hh, w_hr)

    steps, projected = [step(w_hh, b_hh, w_hr)], [linear(x, w_ih, b_ih)]
    if w_ih_reverse is not None and w_hh_reverse is not None:
        steps.append(step(w_hh_reverse, b_hh_reverse, w_hr_reverse))
        projected.append(linear(x, w_ih_reverse, b_ih_reverse))
    y, (h_n, c_n) = _layer(steps, projected, list(zip(h0.unbind(0), c0.unbind(0), strict=True)), batch_sizes)
    return y, h_n, c_n


def gru_layer(
    x: Tensor,
    h0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    w_ih_reverse: Tensor | None = None,
    w_hh_reverse: Tensor | None = None,
    b_ih_reverse: Tensor | None = None,
    b_hh_reverse: Tensor | None = None,
    batch_sizes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One GRU layer with its one or two directions over a whole sequence; gru_step at every step.

    Args:
        x: [T, B, I], or packed [N, I] if batch_sizes is given.
        h0: [D, B, H].
        w_ih, w_hh, b_ih, b_hh: as in gru_step; with _reverse: of the direction from the last step to the first.
        batch_sizes: as in lstm_layer.
    Returns:
        y: [T, B, D*H] or [N, D*H]. h_n: [D, B, H]. Differentiable any number of times.
    """

    def step(w_hh: Tensor, b_hh: Tensor | None) -> Step:
        return lambda projected, state: (_gru_step(projected, state[0], w_hh, b_hh),)

    steps, projected = [step(w_hh, b_hh)], [linear(x, w_ih, b_ih)]
    if w_ih_reverse is not None and w_hh_reverse is not None:
        steps.append(step(w_hh_reverse, b_hh_reverse))
        projected.append(linear(x, w_ih_reverse, b_ih_reverse))
    y, (h_n,) = _layer(steps, projected, [(h,) for h in h0.unbind(0)], batch_sizes)
    return y, h_n


def rnn_layer(
    x: Tensor,
    h0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    w_ih_reverse: Tensor | None = None,
    w_hh_reverse: Tensor | None = None,
    b_ih_reverse: Tensor | None = None,
    b_hh_reverse: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    relu: bool = False,
) -> tuple[Tensor, Tensor]:
    """One Elman RNN layer with its one or two directions over a whole sequence; rnn_step at every step.

    Args:
        x: [T, B, I], or packed [N, I] if batch_sizes is given.
        h0: [D, B, H].
        w_ih, w_hh, b_ih, b_hh: as in rnn_step; with _reverse: of the direction from the last step to the first.
        batch_sizes: as in lstm_layer.
        relu: max(0, .) instead of tanh.
    Returns:
        y: [T, B, D*H] or [N, D*H]. h_n: [D, B, H]. Differentiable any number of times.
    """

    def step(w_hh: Tensor, b_hh: Tensor | None) -> Step:
        return lambda projected, state: (_rnn_step(projected, state[0], w_hh, b_hh, relu),)

    steps, projected = [step(w_hh, b_hh)], [linear(x, w_ih, b_ih)]
    if w_ih_reverse is not None and w_hh_reverse is not None:
        steps.append(step(w_hh_reverse, b_hh_reverse))
        projected.append(linear(x, w_ih_reverse, b_ih_reverse))
    y, (h_n,) = _layer(steps, projected, [(h,) for h in h0.unbind(0)], batch_sizes)
    return y, h_n
