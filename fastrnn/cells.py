# SPDX-License-Identifier: BSD-3-Clause
"""LSTMCell, GRUCell and RNNCell: drop-in for torch.nn's cells, one step of a layer on the fused kernels.

Users call them; a cell is the layer's operator with T = 1, reached through `fastrnn.autograd`. What the kernels do not
take, and what is wrong, goes to torch.nn's own forward.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.compiler import is_compiling

from . import autograd, folding, tracing
from .direct_calls import DirectCalls
from .scripting import scriptable
from .stack import States, Weights, read_weights, refuse_recording
from .stock import HasStock

_NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def _short_way(cell: nn.RNNCellBase, gates: int, input: Tensor, hx: Any) -> Any:
    """The whole call in csrc/module_call.cpp, as a node of torch.fx, or on the batch of all members of a vmap; None if
    it is neither."""
    if is_compiling():
        return None
    output = None if autograd._C is None else autograd._C.cell_call(cell.__dict__, gates, input, hx)
    if output is None:
        output = tracing.as_leaf(cell, input, hx, {})
    return folding.cell(cell, _FORWARDS[gates], input, hx) if output is None else output


def _layer_arguments(
    cell: nn.RNNCellBase, x: Tensor, states: States, count: int
) -> tuple[Tensor, States, Weights] | None:
    """The arguments of the layer operator for one step: x [1, B, I], `count` states [1, B, H], and the weights.

    None if the kernels do not take them; torch.nn's forward then computes, or says what is wrong.
    """
    weights = read_weights(cell, _NAMES)
    refuse_recording(cell, [x, *states, *weights])
    if weights[0] is None or weights[1] is None or autograd.route([x, *states, *weights]) == "torch":
        return None
    units = cell.hidden_size
    shape = x.shape
    if len(shape) == 2:
        batch, features = shape
        expected: tuple[int, ...] = (batch, units)
    elif len(shape) == 1:
        (features,) = shape
        batch, expected = 1, (units,)
    else:
        return None
    if features != cell.input_size or features == 0 or units == 0:
        return None
    for state in states:
        if state.shape != expected:
            return None
    if len(shape) == 1:
        x = x[None]
        states = tuple([state[None] for state in states])
    if not states:
        return x[None], (x.new_zeros((1, batch, units)),) * count, weights
    return x[None], tuple([state[None] for state in states]), weights


def _one_step(x: Tensor, state: Tensor) -> Tensor:
    """The final state [1, B, H] of a layer in the form that belongs to the input x: [B, H] or [H]."""
    return state[0] if x.dim() == 2 else state[0, 0]


class LSTMCell(HasStock, DirectCalls, nn.LSTMCell):
    """torch.nn.LSTMCell on the fused kernels: the same constructor, parameters, call and results.

    Args:
        input_size: I, features of the input.
        hidden_size: H, units.
        bias: whether the cell has the two biases b_ih and b_hh.
        device: where to create the parameters.
        dtype: their type: float32, float64, bfloat16 or float16 for the kernels; any other runs torch.nn's code.

    Source: see fastrnn.LSTM.
    """

    @classmethod
    def _direct_call_kind(cls) -> int:
        return -4 if cls.forward is _FORWARDS[4] else 0

    def __prepare_scriptable__(self) -> nn.Module:
        return scriptable(self)

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """One step.

        Args:
            input: [B, I], or [I] without a batch, of the weights' dtype.
            hx: the pair (h, c), [B, H] each, or [H]; zeros if not given.

        Returns:
            (h', c') of the form of hx; differentiable any number of times.

        Raises:
            ValueError, RuntimeError, TypeError: an argument does not fit; the same type as torch.nn raises.
        """
        output: tuple[Tensor, Tensor] | None = _short_way(self, 4, input, hx)
        if output is not None:
            return output
        if hx is None or (isinstance(hx, (tuple, list)) and len(hx) == 2):
            arguments = _layer_arguments(self, input, () if hx is None else tuple(hx), 2)
            if arguments is not None:
                x, states, weights = arguments
                layer: Any = (x, *states, *weights, *(None,) * 7)
                _, h, c = autograd.lstm_layer(*layer)
                return _one_step(input, h), _one_step(input, c)
        return super().forward(input, hx)


class GRUCell(HasStock, DirectCalls, nn.GRUCell):
    """torch.nn.GRUCell on the fused kernels: the same constructor, parameters, call and results.

    Args:
        input_size: I, features of the input.
        hidden_size: H, units.
        bias: whether the cell has the two biases b_ih and b_hh.
        device: where to create the parameters.
        dtype: their type: float32, float64, bfloat16 or float16 for the kernels; any other runs torch.nn's code.

    Source: see fastrnn.GRU.
    """

    @classmethod
    def _direct_call_kind(cls) -> int:
        return -3 if cls.forward is _FORWARDS[3] else 0

    def __prepare_scriptable__(self) -> nn.Module:
        return scriptable(self)

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """One step.

        Args:
            input: [B, I], or [I] without a batch, of the weights' dtype.
            hx: h, [B, H] or [H]; zeros if not given.

        Returns:
            h' of the form of hx; differentiable any number of times.

        Raises:
            ValueError, RuntimeError, TypeError: an argument does not fit; the same type as torch.nn raises.
        """
        output: Tensor | None = _short_way(self, 3, input, hx)
        if output is not None:
            return output
        arguments = _layer_arguments(self, input, () if hx is None else (hx,), 1)
        if arguments is None:
            return super().forward(input, hx)
        x, states, weights = arguments
        layer: Any = (x, *states, *weights, *(None,) * 5)
        _, h = autograd.gru_layer(*layer)
        return _one_step(input, h)


class RNNCell(HasStock, DirectCalls, nn.RNNCell):
    """torch.nn.RNNCell on the fused kernels: the same constructor, parameters, call and results.

    Args:
        input_size: I, features of the input.
        hidden_size: H, units.
        bias: whether the cell has the two biases b_ih and b_hh.
        nonlinearity: "tanh" or "relu"; as in torch.nn, another value is refused at the first call.
        device: where to create the parameters.
        dtype: their type: float32, float64, bfloat16 or float16 for the kernels; any other runs torch.nn's code.

    Source: see fastrnn.RNN.
    """

    @classmethod
    def _direct_call_kind(cls) -> int:
        return -1 if cls.forward is _FORWARDS[1] else 0

    def __prepare_scriptable__(self) -> nn.Module:
        return scriptable(self)

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """One step.

        Args:
            input: [B, I], or [I] without a batch, of the weights' dtype.
            hx: h, [B, H] or [H]; zeros if not given.

        Returns:
            h' of the form of hx; differentiable any number of times.

        Raises:
            ValueError, RuntimeError, TypeError: an argument does not fit; the same type as torch.nn raises.
        """
        output: Tensor | None = _short_way(self, 1, input, hx)
        if output is not None:
            return output
        if self.nonlinearity in ("tanh", "relu"):
            arguments = _layer_arguments(self, input, () if hx is None else (hx,), 1)
            if arguments is not None:
                x, states, weights = arguments
                relu = self.nonlinearity == "relu"
                layer: Any = (x, *states, *weights, *(None,) * 5, relu)
                _, h = autograd.rnn_layer(*layer)
                return _one_step(input, h)
        return super().forward(input, hx)


_FORWARDS: dict[int, Any] = {4: LSTMCell.forward, 3: GRUCell.forward, 1: RNNCell.forward}  # by gates
