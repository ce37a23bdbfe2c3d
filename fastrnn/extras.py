# SPDX-License-Identifier: BSD-3-Clause
"""What a layer can be given beside its tensors: lengths, resets, masks; and the plain PyTorch of a layer that has them.

reference.py has the equations of a step; here stands the loop that sorts out which rows take part, which states are
replaced, and what of a state stays. Like there, nothing is done in place or depends on dtype, device or class, so that
the result can be differentiated any number of times and in both modes. Called by operators.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from . import reference
from .reference import State


class Extras(NamedTuple):
    """Arguments of the operators after the weights; None where one is not given. Masks have no gradient.

    lengths: [B], int64, steps of each sequence, from 0 to T. reset: [T, B], bool, where the state before step t is
    replaced: by reset_h [D, B, R] and reset_c [D, B, H], else by zeros. h_mask: [D, B, R], multiplies the h that W_hh
    multiplies. zoneout_h: [T, B, D*R] or [N, D*R], zoneout_c likewise with D*H: how much of the state before a step
    stays, from 0 to 1.
    """

    lengths: Tensor | None = None
    reset: Tensor | None = None
    reset_h: Tensor | None = None
    reset_c: Tensor | None = None
    h_mask: Tensor | None = None
    zoneout_h: Tensor | None = None
    zoneout_c: Tensor | None = None

    def arguments(self, lstm: bool, batch_sizes: Tensor | None) -> tuple[Tensor | None, ...]:
        """In the order of the schema, which leaves out what belongs to c where there is none."""
        lengths, reset, reset_h, reset_c, h_mask, zoneout_h, zoneout_c = self
        if lstm:
            return lengths, batch_sizes, reset, reset_h, reset_c, h_mask, zoneout_h, zoneout_c
        return lengths, batch_sizes, reset, reset_h, h_mask, zoneout_h

    @classmethod
    def of_arguments(cls, arguments: Sequence[Tensor | None]) -> tuple[Extras, Tensor | None]:
        """The reverse: the extras, and batch_sizes."""
        if len(arguments) == 8:
            lengths, batch_sizes, *rest = arguments
            return cls(lengths, *rest), batch_sizes
        lengths, batch_sizes, reset, reset_h, h_mask, zoneout_h = arguments
        return cls(lengths, reset, reset_h, None, h_mask, zoneout_h), batch_sizes


def reference_layer(
    gates: int,
    tensors: Sequence[Tensor | None],
    batch_sizes: Tensor | None,
    extras: Extras,
    relu: bool = False,
) -> tuple[Tensor, ...]:
    """A layer with its one or two directions over a whole sequence, as the operators compute it.

    Args:
        gates: 4 for an LSTM, 3 for a GRU, 1 for an RNN.
        tensors: x, the initial states and the weights of two directions, in the order of the operator.
        batch_sizes: CPU int64 [T], rows of each step, or None; with neither lengths nor reset.
        extras: what else is given.
        relu: of an RNN: max(0, .) instead of tanh.
    Returns:
        y: [T, B, D*R] or [N, D*R]. The final states, [D, B, R] and for an LSTM [D, B, H]. For an LSTM also c at every
        step, [D, T*B, H] or [D, N, H]. Zeros past the end of a sequence. Differentiable any number of times.
    """
    states = 2 if gates == 4 else 1
    x, *starts = [tensor for tensor in tensors[: 1 + states] if tensor is not None]  # all of them
    weights = tensors[1 + states :]
    rows = None
    if batch_sizes is not None:
        rows, steps = _places(batch_sizes, x.device)
        x = x[rows]
        zoneout_h, zoneout_c = (None if t is None else t[rows] for t in (extras.zoneout_h, extras.zoneout_c))
        extras = extras._replace(lengths=steps, zoneout_h=zoneout_h, zoneout_c=zoneout_c)
    lengths, zoneouts = extras.lengths, [extras.zoneout_h, extras.zoneout_c][:states]
    if lengths is not None:
        lengths = lengths.to(x.device)
        exists = (torch.arange(x.shape[0], device=x.device)[:, None] < lengths)[:, :, None]
        # Before anything is computed from it: what the padding holds, NaN perhaps, must not meet a gradient of zero.
        x = torch.where(exists, x, x.new_zeros(()))
        zoneouts = [None if t is None else torch.where(exists, t, t.new_zeros(())) for t in zoneouts]

    width = len(weights) // 2
    swept = []
    for direction in range(1 if weights[width] is None else 2):
        row = weights[direction * width : (direction + 1) * width]
        replacements = [extras.reset_h, extras.reset_c][:states]
        swept.append(
            sweep(
                _Step(gates, row, relu),
                x,
                tuple(start[direction] for start in starts),
                direction == 1,
                lengths,
                extras.reset,
                tuple(None if state is None else state[direction] for state in replacements),
                None if extras.h_mask is None else extras.h_mask[direction],
                tuple(
                    None if keep is None else _part(keep, direction, start.shape)
                    for keep, start in zip(zoneouts, starts, strict=True)
                ),
            )
        )
    everything = [torch.cat([every[0] for every, _ in swept], dim=-1)]
    finals = [torch.stack(entries) for entries in zip(*(final for _, final in swept), strict=True)]
    cells = [torch.stack([every[1].flatten(0, 1) for every, _ in swept])] if gates == 4 else []
    if rows is not None:
        places = exists.flatten().nonzero()[:, 0]  # packed rows stand in the order of the padded ones
        everything = [everything[0].flatten(0, 1)[places]]
        cells = [entry[:, places] for entry in cells]
    return *everything, *finals, *cells


def _places(batch_sizes: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where packed rows lie in a padded batch: [T, B] rows of the packed tensor, 0 in the padding; and the lengths."""
    sizes = batch_sizes.to(device)
    places = torch.arange(int(batch_sizes[0]), device=device)
    exists = places < sizes[:, None]
    return torch.where(exists, (sizes.cumsum(0) - sizes)[:, None] + places, 0), exists.sum(0)


def _part(keep: Tensor, direction: int, shape: torch.Size) -> Tensor:
    return keep[..., direction * shape[-1] : (direction + 1) * shape[-1]]


class _Step:
    """One step of one direction."""

    def __init__(self, gates: int, weights: Sequence[Tensor | None], relu: bool) -> None:
        self.gates, self.weights, self.relu = gates, weights, relu

    def project(self, x: Tensor) -> Tensor:
        w_ih, b_ih = self.weights[0], self.weights[2]
        assert w_ih is not None
        return linear(x, w_ih, b_ih)

    def __call__(self, projected: Tensor, state: State, entering: Tensor) -> State:
        """The state after the step; entering: the h that W_hh multiplies."""
        _, w_hh, _, b_hh, *rest = self.weights
        assert w_hh is not None
        if self.gates == 4:
            return reference._lstm_step(projected, entering, state[1], w_hh, b_hh, rest[0])
        if self.gates == 3:
            return (reference._gru_step(projected, state[0], w_hh, b_hh, entering),)
        return (reference._rnn_step(projected, entering, w_hh, b_hh, self.relu),)


def sweep(
    step: _Step,
    x: Tensor,
    start: State,
    reverse: bool,
    lengths: Tensor | None,
    reset: Tensor | None,
    replacements: tuple[Tensor | None, ...],
    h_mask: Tensor | None,
    zoneouts: tuple[Tensor | None, ...],
) -> tuple[list[Tensor], State]:
    """Runs one direction over time: every state of every step, [T, B, ...] each, and the state that each row ends with.

    A row that has not begun (reverse) or has ended (forward) keeps its state; its outputs are zeros.
    """
    steps = x.shape[0]
    projected = step.project(x)
    state: State = start
    made_at: list[State] = [()] * steps
    for t in reversed(range(steps)) if reverse else range(steps):
        before = state
        if reset is not None and (not reverse or t + 1 < steps):
            flags = reset[t + reverse]
            if reverse and lengths is not None:
                flags = flags & (t + 1 < lengths)
            before = tuple(
                torch.where(flags[:, None], entry.new_zeros(()) if other is None else other, entry)
                for entry, other in zip(state, replacements, strict=True)
            )
        made = step(projected[t], before, before[0] if h_mask is None else before[0] * h_mask)
        made = tuple(
            entry if keep is None else keep[t] * old + (1 - keep[t]) * entry
            for entry, old, keep in zip(made, before, zoneouts, strict=True)
        )
        if lengths is None:
            state = made_at[t] = made
        else:
            takes_part = (t < lengths)[:, None]
            state = tuple(torch.where(takes_part, new, old) for new, old in zip(made, state, strict=True))
            made_at[t] = tuple(torch.where(takes_part, entry, entry.new_zeros(())) for entry in made)
    return [torch.stack(entries) for entries in zip(*made_at, strict=True)], state
