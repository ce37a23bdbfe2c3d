# SPDX-License-Identifier: BSD-3-Clause
"""CellModule: layers of a cell of one's own, with what torch.nn's recurrent modules have. Users derive from it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from . import extended
from .own_cells import OwnCell

Device = torch.device | str | int | None


class CellModule(nn.Module):
    """Layers of a cell of one's own over a whole sequence. A subclass names the cell:

        class MinimalGatedUnit(fastrnn.CellModule):
            cell = fastrnn.load_cell("minimal_gated_unit.h", "MinimalGatedUnit", step)

    Parameters have torch.nn's names and shapes: weight_ih_l0 [G*H, I], weight_hh_l0 [G*H, H], bias_ih_l0 and bias_hh_l0
    [G*H], of further layers l1, l2, ..., of the other direction with _reverse. A cell with parameters of its own has
    them in weight_unit_l0 [parameters*H], block after block. Initial values: uniform in (-1/sqrt(H), 1/sqrt(H)).

    Args:
        input_size: I, features of the input.
        hidden_size: H, units of a layer.
        num_layers: L, layers one above the other.
        bias: whether the layers have the two biases b_ih and b_hh.
        batch_first: whether input and output are [B, T, ...] instead of [T, B, ...]; states never are.
        dropout: probability with which the outputs of each layer but the last are zeroed in training.
        bidirectional: whether each layer also reads the sequence backwards, with weights of its own.
        device: where to create the parameters.
        dtype: their type.
    Raises:
        TypeError: the class has no cell. ValueError: a size or probability is not one.
    """

    cell: OwnCell

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if not isinstance(getattr(self, "cell", None), OwnCell):
            raise TypeError(f"fastrnn.CellModule: {name}.cell must be a fastrnn.OwnCell; see fastrnn.load_cell")
        for size_name, size in (("input_size", input_size), ("hidden_size", hidden_size), ("num_layers", num_layers)):
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"fastrnn.{name}: {size_name} must be a positive integer, got {size!r}")
        if not 0 <= dropout <= 1:
            raise ValueError(f"fastrnn.{name}: dropout must be a probability, in [0, 1], got {dropout}")
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.bias, self.batch_first, self.dropout, self.bidirectional = bias, batch_first, dropout, bidirectional
        rows, directions = self.cell.gates * hidden_size, 2 if bidirectional else 1
        for layer in range(num_layers):
            features = input_size if layer == 0 else directions * hidden_size
            for suffix in self._suffixes(layer):
                shapes: dict[str, tuple[int, ...]] = {"weight_ih": (rows, features), "weight_hh": (rows, hidden_size)}
                if bias:
                    shapes |= {"bias_ih": (rows,), "bias_hh": (rows,)}
                if self.cell.parameters:
                    shapes["weight_unit"] = (self.cell.parameters * hidden_size,)
                for stem, shape in shapes.items():
                    setattr(self, stem + suffix, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self.reset_parameters()

    def _suffixes(self, layer: int) -> tuple[str, ...]:
        return (f"_l{layer}", f"_l{layer}_reverse") if self.bidirectional else (f"_l{layer}",)

    def reset_parameters(self) -> None:
        """Draws new initial values for all parameters."""
        bound = 1 / math.sqrt(self.hidden_size)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def extra_repr(self) -> str:
        shown = f"{self.input_size}, {self.hidden_size}"
        plain = {"num_layers": 1, "bias": True, "batch_first": False, "dropout": 0.0, "bidirectional": False}
        return shown + "".join(
            f", {name}={getattr(self, name)}" for name, usual in plain.items() if getattr(self, name) != usual
        )

    def _layer_weights(self, layer: int) -> list[Tensor | None]:
        """Read at every call: a parametrization or functional_call may have replaced them."""
        parameters = self._parameters  # looked at first: torch.nn.Module finds an attribute in .5 us

        def find(name: str) -> Tensor:
            parameter = parameters.get(name)
            return getattr(self, name) if parameter is None else parameter

        weights: list[Tensor | None] = []
        for suffix in self._suffixes(layer):
            weights += [find("weight_ih" + suffix), find("weight_hh" + suffix)]
            weights += [find("bias_ih" + suffix), find("bias_hh" + suffix)] if self.bias else [None, None]
            if self.cell.parameters:
                weights.append(find("weight_unit" + suffix))
        return weights

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Any = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
        reset_state: Any = None,
    ) -> tuple[Any, Any]:
        """Runs the layers over a whole sequence.

        Args:
            input: [T, B, I]; [B, T, I] with batch_first; [T, I] for one sequence without a batch; or a PackedSequence,
                which is padded for the call: lengths cost less.
            hx: the initial states, [L*D, B, H] (without B for an unbatched input); of a cell with two states the pair
                (h, c). Zeros if not given.
            lengths: int64 [B], steps of each sequence, from 0 to T in any order; on the CPU or the input's device. What
                lies behind the end of a sequence is not read; y is zero there, and the final state is that at the end.
            reset: bool [T, B], [B, T] with batch_first, [T] without a batch: where the state before step t is replaced;
                see fastrnn.LSTM.
            reset_state: what replaces it, in the form of hx; one row, [L*D, 1, H], stands for the whole batch. Zeros if
                not given.
        Returns:
            (y, h_n), with two states (y, (h_n, c_n)). y has the form of the input with D*H in place of I, the states
            the form of hx. Differentiable any number of times; the derivative reads y, which must not be changed in
            place before (autograd says so).
        Raises:
            TypeError, ValueError, RuntimeError: an argument does not fit; the message names it.
        """
        name, directions = type(self).__name__, 2 if self.bidirectional else 1
        if isinstance(input, PackedSequence):
            for option, given in (("lengths", lengths), ("reset", reset), ("reset_state", reset_state)):
                if given is not None:
                    raise ValueError(f"fastrnn.{name}: {option} goes with a padded input, not with a PackedSequence")
            return self._packed(input, hx)
        if not isinstance(input, Tensor):
            raise TypeError(f"fastrnn.{name}: input must be a Tensor or a PackedSequence, got {type(input).__name__}")
        if input.dim() not in (2, 3) or input.shape[-1] != self.input_size:
            wanted = f"[T, B, {self.input_size}] or [T, {self.input_size}]"
            raise ValueError(f"fastrnn.{name}: input must be {wanted}, got {list(input.shape)}")
        weight = self.weight_ih_l0
        if input.device != weight.device:
            raise ValueError(f"fastrnn.{name}: input must be on {weight.device} like the weights, got {input.device}")
        if input.dtype is not weight.dtype and not extended.autocast_on(input.device):
            raise ValueError(f"fastrnn.{name}: input must be {weight.dtype} like the weights, got {input.dtype}")
        single = input.dim() == 2
        x = input.unsqueeze(1) if single else input.transpose(0, 1) if self.batch_first else input
        rows, batch = directions * self.num_layers, x.shape[1]
        states = self._states("hx", hx, x, (rows, batch), single)
        if lengths is not None:
            if single:
                raise ValueError(f"fastrnn.{name}: lengths go with a batch, got input {list(input.shape)}")
            extended.check_lengths(name, lengths, batch, x.device, False)
        resets = None
        if reset is not None:
            letters = "[T]" if single else "[B, T]" if self.batch_first else "[T, B]"
            extended.check_reset(name, reset, letters, tuple(input.shape[:-1]), x.device, False)
            reset = reset.unsqueeze(1) if single else reset.transpose(0, 1) if self.batch_first else reset
            resets = None if reset_state is None else self._states("reset_state", reset_state, x, (rows, batch), single)
        elif reset_state is not None:
            raise ValueError(f"fastrnn.{name}: reset_state is given without reset")

        finals = []
        for layer in range(self.num_layers):
            if layer and self.dropout and self.training:
                x = torch.dropout(x, self.dropout, True)
            own = slice(layer * directions, (layer + 1) * directions)
            x, *ends = self.cell.layer(
                x,
                [state[own] for state in states] if self.num_layers > 1 else states,
                self._layer_weights(layer),
                lengths=lengths,
                reset=reset,
                reset_states=None if resets is None else [state[own] for state in resets],
            )
            finals.append(ends)
        last = [ends[0] if len(ends) == 1 else torch.cat(ends) for ends in zip(*finals, strict=True)]
        if single:
            x, last = x.squeeze(1), [state.squeeze(1) for state in last]
        elif self.batch_first:
            x = x.transpose(0, 1)
        return x, (last[0] if self.cell.states == 1 else tuple(last))

    def _packed(self, input: PackedSequence, hx: Any) -> tuple[PackedSequence, Any]:
        padded, lengths = pad_packed_sequence(input, self.batch_first)
        y, last = self(padded, hx, lengths=lengths)
        order = input.sorted_indices
        if order is not None:
            y, lengths = y.index_select(0 if self.batch_first else 1, order), lengths[order.cpu()]
        data = pack_padded_sequence(y, lengths, self.batch_first).data
        return PackedSequence(data, input.batch_sizes, order, input.unsorted_indices), last

    def _states(self, name: str, given: Any, x: Tensor, lead: tuple[int, int], single: bool) -> list[Tensor]:
        """States as [L*D, B, H] each, checked; zeros if not given."""
        if given is None:
            return [x.new_zeros((*lead, self.hidden_size))] * self.cell.states
        function = type(self).__name__
        states = (given,) if self.cell.states == 1 else given
        if not isinstance(states, (tuple, list)) or len(states) != self.cell.states:
            raise TypeError(f"fastrnn.{function}: {name} must be a pair (h, c), got {type(given).__name__}")
        letters, shape = ("[L*D, H]", lead[:1]) if single else ("[L*D, B, H]", lead)
        if name == "reset_state" and not single:
            one_row = (lead[0], 1, self.hidden_size)
            states = [s.expand(*shape, -1) if isinstance(s, Tensor) and s.shape == one_row else s for s in states]
        for k, state in enumerate(states):
            each = name if len(states) == 1 else f"{name}[{k}]"
            extended.check_operand(function, each, state, letters, (*shape, self.hidden_size), x, mask=False)
        return [state.unsqueeze(1) if single else state for state in states]
