# SPDX-License-Identifier: BSD-3-Clause
"""A layer of a cell of one's own: its kernels from a library of own_builds.py, its derivative of derivatives, and its
results where the kernels do not go, from one step in plain PyTorch. own_modules.py calls it, and users do.

The way of a call: the kernels for ordinary CPU tensors, eager; the step, in a loop over time, for everything else
(other devices and dtypes, torch.func, forward-mode AD, dispatch modes, autocast). A compiler breaks its graph here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from . import autograd, extension
from .derivatives import differentiable_backward
from .extras import sweep
from .operators import transforms_active
from .own_builds import build_cell, sources_digest
from .reference import State

_C: Any = extension.module
_dispatch_modes = torch._C._len_torch_dispatch_stack

Gates = tuple[Tensor, ...]
# (W_ih x + b_ih of each gate, W_hh h + b_hh of each gate, state, parameters) -> state after the step.
CellStep = Callable[[Gates, Gates, State, Gates], State]


class OwnCell:
    """A recurrent cell of one's own: a library that build_cell made, and the same step in plain PyTorch.

    Args:
        library: what build_cell returned.
        step: step(x, r, state, parameters) -> state, one step of one direction. x and r are tuples of G tensors
            [B, H], the gates' W_ih x + b_ih and W_hh h + b_hh; state is (h,) or (h, c); parameters the tuple of the
            cell's weights of each unit, [H] each. Plain PyTorch, nothing in place: it is differentiated where the
            kernels have no derivative, and computes what they do not take.
    Attributes:
        gates: G. states: 1 or 2. parameters: weights of each unit. isas: instruction sets that it was compiled for.
    Raises:
        RuntimeError: the library was built with another version of fastrnn, or cannot be loaded.
    """

    def __init__(self, library: str | os.PathLike[str], step: CellStep) -> None:
        if _C is None:
            raise RuntimeError(f"fastrnn.OwnCell: fastrnn's own kernels are not there: {extension.reason}")
        self._library = _C.OwnCell(os.fspath(library))
        if self._library.sources != sources_digest():
            raise RuntimeError(f"fastrnn.OwnCell: {library} was built with another fastrnn: build it again")
        self.step = step
        self.gates: int = self._library.gates
        self.states: int = self._library.states
        self.parameters: int = self._library.parameters
        self.isas: tuple[str, ...] = tuple(self._library.isas)
        self._uncompiled: Any = torch.compiler.disable(_layer)  # here, since it imports the compiler

    def layer(
        self,
        x: Tensor,
        states: Sequence[Tensor],
        weights: Sequence[Tensor | None],
        *,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
        reset_states: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, ...]:
        """One layer with its one or two directions over a whole sequence.

        Args:
            x: [T, B, I]; float32 or float64, or bfloat16 or float16, which are computed as float32.
            states: h0 and, with two states, c0: [D, B, H] each.
            weights: for each direction w_ih [G*H, I], w_hh [G*H, H], b_ih and b_hh [G*H] or None, and for a cell with
                parameters these, [parameters*H].
            lengths: int64 [B], steps of each sequence, from 0 to T; y is zero past them.
            reset: bool [T, B], where the state before step t is replaced; as in fastrnn.LSTM.
            reset_states: what replaces it, in the form of states; zeros if not given.
        Returns:
            y: [T, B, D*H]. Then h_n and, with two states, c_n: [D, B, H]. Differentiable any number of times; the
            kernels' first derivative has the same bits for any number of threads.
        Raises:
            ValueError, RuntimeError: a tensor does not fit; the message names it.
        """
        slots = 5 if self.parameters else 4
        if len(states) != self.states or len(weights) not in (slots, 2 * slots):
            raise ValueError(
                f"fastrnn.OwnCell.layer: {self.states} states and {slots} or {2 * slots} weights are expected, "
                f"got {len(states)} and {len(weights)}"
            )
        rest = (None,) * (2 * slots - len(weights))
        replacements = (None,) * self.states if reset_states is None else tuple(reset_states)
        tensors = (x, *states, *weights, *rest, lengths, None, reset, *replacements)
        if torch.compiler.is_compiling():
            found: tuple[Tensor, ...] = self._uncompiled(self, tensors)
            return found
        return _layer(self, tensors)


def load_cell(
    header: str | os.PathLike[str],
    struct: str,
    step: CellStep,
    *,
    isas: Sequence[str] | None = None,
    directory: str | os.PathLike[str] | None = None,
    verbose: bool = False,
) -> OwnCell:
    """Compiles a cell of one's own, or finds it compiled, and loads it: OwnCell(build_cell(...), step).

    Args:
        header, struct, isas, directory, verbose: as build_cell has them.
        step: as OwnCell has it.
    Returns:
        The cell, for CellModule.
    Raises:
        RuntimeError, ValueError, FileNotFoundError: see build_cell and OwnCell.
    """
    library = build_cell(header, struct, isas=isas, directory=directory, verbose=verbose)
    return OwnCell(library, step)


# ---- tensors in one list: x, states, weights of two directions, lengths, None (batch_sizes), reset, replacements -----


def _layer(cell: OwnCell, tensors: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    floating = (*tensors[: -3 - cell.states], *tensors[-cell.states :])
    if autograd.route(floating) != "kernel" or _dispatch_modes() or transforms_active():
        return _reference(cell, tensors)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in floating):
        return tuple(_OwnLayer.apply(cell, *tensors))  # type: ignore[no-untyped-call]
    return tuple(_C.own_layer(cell._library, tensors, False)[: 1 + cell.states])


class _OwnLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, cell: OwnCell, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        y, h_n, c_n, gates, cells = _C.own_layer(cell._library, tensors, True)
        ctx.save_for_backward(*tensors, y, gates, cells)
        ctx.set_materialize_grads(False)
        ctx.cell = cell
        return (y, h_n) if c_n is None else (y, h_n, c_n)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        cell: OwnCell = ctx.cell
        *tensors, y, gates, cells = ctx.saved_tensors
        needed = ctx.needs_input_grad[1:]
        states, first = cell.states, len(tensors) - cell.states
        # Without lengths, batch_sizes and reset, which have no gradient.
        differentiable = [*range(first - 3), *range(first, len(tensors))]
        wanted = [needed[position] for position in differentiable]
        if all(gradient is None for gradient in gradients):
            found: Sequence[Tensor | None] = (None,) * len(wanted)
        elif torch.is_grad_enabled() or transforms_active():  # create_graph

            def again(*entries: Tensor | None) -> tuple[Tensor, ...]:
                fixed = tensors[first - 3 : first]
                return _reference(cell, (*entries[:-states], *fixed, *entries[-states:]))

            found = differentiable_backward(again, [tensors[k] for k in differentiable], gradients, wanted)
        else:
            needs = sum(1 << position for position, want in enumerate(wanted) if want)
            d_of = (*gradients, *(None,) * (3 - len(gradients)))
            found = _C.own_layer_backward(cell._library, d_of, tensors, (y, gates, cells), needs)
        result: list[Tensor | None] = [None] * len(tensors)
        for position, want, gradient in zip(differentiable, wanted, found, strict=True):
            result[position] = gradient if want else None
        return None, *result


class _Step:
    """One step of one direction, as extras.sweep calls it."""

    def __init__(self, cell: OwnCell, weights: Sequence[Tensor | None]) -> None:
        self.cell, self.weights = cell, weights
        parameters = weights[4] if cell.parameters else None
        self.parameters = () if parameters is None else parameters.chunk(cell.parameters)

    def project(self, x: Tensor) -> Tensor:
        w_ih, b_ih = self.weights[0], self.weights[2]
        assert w_ih is not None
        return linear(x, w_ih, b_ih)

    def __call__(self, projected: Tensor, state: State, entering: Tensor) -> State:
        w_hh, b_hh = self.weights[1], self.weights[3]
        assert w_hh is not None
        x = projected.chunk(self.cell.gates, dim=-1)
        r = linear(entering, w_hh, b_hh).chunk(self.cell.gates, dim=-1)
        return tuple(self.cell.step(x, r, state, self.parameters))


def _reference(cell: OwnCell, tensors: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """The layer by the step in plain PyTorch, which can be differentiated any number of times."""
    x, *starts = [tensor for tensor in tensors[: 1 + cell.states] if tensor is not None]
    weights = tensors[1 + cell.states : -3 - cell.states]
    lengths, _, reset, *replacements = tensors[-3 - cell.states :]
    if lengths is not None:
        lengths = lengths.to(x.device)
        exists = (torch.arange(x.shape[0], device=x.device)[:, None] < lengths)[:, :, None]
        x = torch.where(exists, x, x.new_zeros(()))  # NaN in the padding must not meet a gradient of zero
    slots = len(weights) // 2
    swept = []
    for direction in range(1 if weights[slots] is None else 2):
        step: Any = _Step(cell, weights[direction * slots : (direction + 1) * slots])
        start = tuple(state[direction] for state in starts)
        others = tuple(None if state is None else state[direction] for state in replacements)
        swept.append(sweep(step, x, start, direction == 1, lengths, reset, others, None, (None,) * cell.states))
    y = torch.cat([every[0] for every, _ in swept], dim=-1)
    return y, *(torch.stack(ends) for ends in zip(*(final for _, final in swept), strict=True))
