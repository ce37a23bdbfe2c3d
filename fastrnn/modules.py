# SPDX-License-Identifier: BSD-3-Clause
"""LSTM, GRU and RNN: drop-in for torch.nn's modules of the same name, running on the fused kernels.

Users call them. Each says what sets its cell apart: options, the operator of a layer, the form of the states; all else
is stack.py's. The cells are in cells.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import autograd, sequences
from .stack import Stack, States, Weights

Device = torch.device | str | int | None


class LSTM(Stack, nn.LSTM):
    """torch.nn.LSTM on the fused kernels: the same constructor, parameters, state_dict, call and results.

    Args:
        input_size: I, features of the input.
        hidden_size: H, units of a layer.
        num_layers: L, layers one above the other.
        bias: whether the layers have the two biases b_ih and b_hh.
        batch_first: whether input and output are [B, T, ...] instead of [T, B, ...]; states never are.
        dropout: probability with which the outputs of each layer but the last are zeroed in training.
        bidirectional: whether each layer also reads the sequence backwards, with weights of its own.
        proj_size: P > 0 projects h from H to P features.
        device: where to create the parameters.
        dtype: their type: float32, float64, bfloat16 or float16 for the kernels; any other runs torch.nn's code.
        zoneout: (p_h, p_c), probabilities with which an entry of h and of c keeps its value for a step in training; in
            evaluation that share of it stays.
        recurrent_dropout: probability with which an entry of h is zeroed on its way into W_hh, for a whole sequence.
        weight_dropout: probability with which an entry of W_hh is zeroed, for a whole call.
        recompute: keep nothing of the forward for the backward, which then runs each layer's forward once more: about a
            third more time in training, gradients with the same bits.

    Raises:
        TypeError, ValueError: an option that does not fit: a size that is no positive int, a probability outside of
            [0, 1], a projection as wide as H or wider; the same type as torch.nn raises where it has the option.

    Source: Hochreiter & Schmidhuber 1997, with the forget gate of Gers et al. 2000; the projection of Sak et al. 2014;
        equations, gate order (i f g o) and initial values of torch.nn.LSTM.
    """

    _fastrnn_weights_per_direction = 5
    _fastrnn_gates = 4

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        zoneout: tuple[float, float] = (0.0, 0.0),
        recurrent_dropout: float = 0.0,
        weight_dropout: float = 0.0,
        recompute: bool = False,
    ) -> None:
        super().__init__(
            input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size, device, dtype
        )
        self._set_recompute(recompute)
        sequences.set_noise(self, zoneout, recurrent_dropout, weight_dropout)

    def _fastrnn_layer(
        self, x: Tensor, states: States, weights: Weights, batch_sizes: Tensor | None
    ) -> tuple[Tensor, States]:
        arguments: Any = (x, *states, *weights, batch_sizes)
        y, h_n, c_n = autograd.lstm_layer(*arguments, recompute=self.recompute)
        return y, (h_n, c_n)

    def _fastrnn_split_states(self, hx: Any) -> States | None:
        return tuple(hx) if isinstance(hx, (tuple, list)) and len(hx) == 2 else None

    def _fastrnn_join_states(self, states: States) -> States:
        return states

    def _fastrnn_state_shapes(self, lead: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        return (*lead, self.proj_size or self.hidden_size), (*lead, self.hidden_size)

    def _fastrnn_zero_states(self, x: Tensor, lead: tuple[int, ...]) -> States:
        c0 = x.new_zeros((*lead, self.hidden_size))
        return (x.new_zeros((*lead, self.proj_size)) if self.proj_size else c0, c0)


class GRU(Stack, nn.GRU):
    """torch.nn.GRU on the fused kernels: the same constructor, parameters, state_dict, call and results.

    Args:
        input_size: I, features of the input.
        hidden_size: H, units of a layer.
        num_layers: L, layers one above the other.
        bias: whether the layers have the two biases b_ih and b_hh.
        batch_first: whether input and output are [B, T, ...] instead of [T, B, ...]; states never are.
        dropout: probability with which the outputs of each layer but the last are zeroed in training.
        bidirectional: whether each layer also reads the sequence backwards, with weights of its own.
        device: where to create the parameters.
        dtype: their type: float32, float64, bfloat16 or float16 for the kernels; any other runs torch.nn's code.
        zoneout: probability with which an entry of h keeps its value for a step in training; in evaluation that share
            of it stays.
        recurrent_dropout: probability with which an entry of h is zeroed on its way into W_hh, for a whole sequence.
        weight_dropout: probability with which an entry of W_hh is zeroed, for a whole call.
        recompute: keep nothing of the forward for the backward, which then runs each layer's forward once more: about a
            third more time in training, gradients with the same bits.

    Raises:
        TypeError, ValueError: an option that does not fit: a size that is no positive int, a probability outside of
            [0, 1], a projection; the same type as torch.nn raises where it has the option.

    Source: Cho et al. 2014, in the variant of torch.nn.GRU: gates r z n, and r applied to W_hn h + b_hn.
    """

    _fastrnn_gates = 3

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
        *,
        zoneout: float = 0.0,
        recurrent_dropout: float = 0.0,
        weight_dropout: float = 0.0,
        recompute: bool = False,
        **refused: object,
    ) -> None:
        # refused: proj_size, to which torch.nn answers with a ValueError of its own
        options = {"device": device, "dtype": dtype, **refused}
        super().__init__(input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, **options)
        self._set_recompute(recompute)
        sequences.set_noise(self, zoneout, recurrent_dropout, weight_dropout)

    def _fastrnn_layer(
        self, x: Tensor, states: States, weights: Weights, batch_sizes: Tensor | None
    ) -> tuple[Tensor, States]:
        arguments: Any = (x, *states, *weights, batch_sizes)
        y, h_n = autograd.gru_layer(*arguments, recompute=self.recompute)
        return y, (h_n,)


class RNN(Stack, nn.RNN):
    """torch.nn.RNN on the fused kernels: the same constructor, parameters, state_dict, call and results.

    Args:
        input_size: I, features of the input.
        hidden_size: H, units of a layer.
        num_layers: L, layers one above the other.
        nonlinearity: "tanh" or "relu".
        bias: whether the layers have the two biases b_ih and b_hh.
        batch_first: whether input and output are [B, T, ...] instead of [T, B, ...]; states never are.
        dropout: probability with which the outputs of each layer but the last are zeroed in training.
        bidirectional: whether each layer also reads the sequence backwards, with weights of its own.
        device: where to create the parameters.
        dtype: their type: float32, float64, bfloat16 or float16 for the kernels; any other runs torch.nn's code.
        zoneout: probability with which an entry of h keeps its value for a step in training; in evaluation that share
            of it stays.
        recurrent_dropout: probability with which an entry of h is zeroed on its way into W_hh, for a whole sequence.
        weight_dropout: probability with which an entry of W_hh is zeroed, for a whole call.
        recompute: keep nothing of the forward for the backward, which then runs each layer's forward once more: about a
            third more time in training, gradients with the same bits.

    Raises:
        TypeError, ValueError: an option that does not fit: a size that is no positive int, a probability outside of
            [0, 1], a projection, another nonlinearity; the same type as torch.nn raises where it has the option.

    Source: Elman 1990; equations of torch.nn.RNN.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        zoneout: float = 0.0,
        recurrent_dropout: float = 0.0,
        weight_dropout: float = 0.0,
        recompute: bool = False,
        **refused: object,
    ) -> None:
        # refused: proj_size, to which torch.nn answers with a ValueError of its own
        options = {"device": device, "dtype": dtype, **refused}
        super().__init__(
            input_size, hidden_size, num_layers, nonlinearity, bias, batch_first, dropout, bidirectional, **options
        )
        self._set_recompute(recompute)
        sequences.set_noise(self, zoneout, recurrent_dropout, weight_dropout)

    def _fastrnn_layer(
        self, x: Tensor, states: States, weights: Weights, batch_sizes: Tensor | None
    ) -> tuple[Tensor, States]:
        if self.mode not in ("RNN_TANH", "RNN_RELU"):
            raise AssertionError(f"fastrnn.{type(self).__name__}: mode must be RNN_TANH or RNN_RELU, got {self.mode}")
        arguments: Any = (x, *states, *weights, batch_sizes, self.mode == "RNN_RELU")
        y, h_n = autograd.rnn_layer(*arguments, recompute=self.recompute)
        return y, (h_n,)
