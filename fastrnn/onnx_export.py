# SPDX-License-Identifier: BSD-3-Clause
"""A layer as ONNX's own operator, LSTM, GRU or RNN, while torch.onnx.export(..., dynamo=True) runs; called by
autograd.py and extended.py in place of the kernel.

torch.nn's modules become a loop over steps there, or one of a fixed length. What differs between the two worlds is
dealt with here, in ordinary operations on the weights, which ONNX Runtime folds when it loads a model:

- gates: torch's i f g o are ONNX's i o f c, r z n are z r h; the GRU applies r after the product
  (linear_before_reset = 1), as torch does;
- the two biases stand behind one another in one tensor, directions are a dimension of every weight, and of y;
- a packed batch is padded, and its lengths are given as sequence_lens, as are those of a padded one.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_OPERATORS = {"lstm_layer": "LSTM", "gru_layer": "GRU", "rnn_layer": "RNN"}
_GATE_ORDER = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN": (0,)}  # where ONNX's gates stand among torch's
_HALF = (torch.bfloat16, torch.float16)
_NO_PROJECTION = "ONNX's LSTM has no projection, so a module with proj_size cannot become ONNX"


def layer(
    operator: Any,
    tensors: Sequence[Tensor | None],
    batch_sizes: Tensor | None,
    options: Sequence[bool],
    lengths: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """One layer with its directions, for torch.onnx's exporter; stands for the operator's call and computes nothing.

    Args:
        operator: its Operator of operators.py.
        tensors: x, the initial states and the weights of two directions, as for the operator.
        batch_sizes: as for the operator.
        options: of an RNN whether it has relu, else empty.
        lengths: int64 [B], steps of each sequence of a padded batch, or None.

    Returns:
        y and the final states, shaped as those of the operator.

    Raises:
        NotImplementedError: ONNX has no such layer (an LSTM with a projection).
    """
    results = operator.results
    x, *states = [tensor for tensor in tensors[:results] if tensor is not None]  # all of them
    weights = tensors[results:]
    half = len(weights) // 2
    directions = [weights[:half]] if weights[half] is None else [weights[:half], weights[half:]]
    if half == 5 and weights[4] is not None:
        raise NotImplementedError(f"fastrnn.{operator.name}: {_NO_PROJECTION}")
    name = _OPERATORS[operator.name]
    dtype = x.dtype
    if dtype in _HALF:  # as in the kernels: float32 inside, rounded at the end
        x, *states = (tensor.float() for tensor in (x, *states))
        directions = [[None if weight is None else weight.float() for weight in row] for row in directions]
    if batch_sizes is None:
        y, *finals = _symbol(name, x, states, directions, None if lengths is None else lengths.to(torch.int32), options)
    else:
        index, valid, lengths = _padding(batch_sizes, states[0].shape[1])
        padded = x.index_select(0, index.flatten()).unflatten(0, index.shape)
        y, *finals = _symbol(name, padded, states, directions, lengths, options)
        y = _pack(y, index, valid, x.shape[0])
    if dtype in _HALF:
        y, *finals = (tensor.to(dtype) for tensor in (y, *finals))
    return y, *finals


def refuse_operator(name: str) -> None:
    """For the fake kernels: while torch.onnx exports none of fastrnn's own operators may enter a graph, since ONNX has
    none of them. It comes to that only if layer() was not asked, as by extended.py, or refused and torch.onnx tries
    another way.

    Raises:
        NotImplementedError: torch.onnx exports.
    """
    exporter = sys.modules.get("torch.onnx")  # that import takes 45 ms, and nobody exports before it
    if exporter is not None and exporter.is_in_onnx_export():
        raise NotImplementedError(
            f"fastrnn.{name}: ONNX has no such operator. {_NO_PROJECTION}, nor can a call with reset, an LSTM's with "
            "return_all_states, a module with zoneout, or one with recurrent or weight dropout in training. Anything "
            "else can: give torch.onnx.export the module, not a program that torch.export has made of it"
        )


def _symbol(
    name: str,
    x: Tensor,
    states: Sequence[Tensor],
    directions: Sequence[Sequence[Any]],
    lengths: Tensor | None,
    options: Sequence[bool],
) -> tuple[Tensor, ...]:
    """ONNX's operator. directions: the weights of each, of which the biases may be None. lengths: int32 [B], steps of
    each sequence; y is zero behind them."""
    D, order = len(directions), _GATE_ORDER[name]
    w_ih, w_hh = (_reordered(torch.stack([row[k] for row in directions]), order) for k in (0, 1))
    H = w_hh.shape[2]
    bias = None
    if any(b is not None for row in directions for b in row[2:4]):
        zeros = w_ih.new_zeros(w_ih.shape[1])
        pair = [torch.stack([zeros if row[k] is None else row[k] for row in directions]) for k in (2, 3)]
        bias = torch.cat([_reordered(biases, order) for biases in pair], 1)
    attributes: dict[str, Any] = {"hidden_size": H, "direction": "forward" if D == 1 else "bidirectional"}
    if name == "GRU":
        attributes["linear_before_reset"] = 1
    if options and options[0]:
        attributes["activations"] = ["Relu"] * D
    T, B = x.shape[0], x.shape[1]
    shapes = [[T, D, B, H], *[[D, B, H]] * len(states)]
    dtypes = [x.dtype] * len(shapes)
    inputs = (x, w_ih, w_hh, bias, lengths, *states)
    y, *finals = torch.onnx.ops.symbolic_multi_out(name, inputs, attributes, dtypes=dtypes, shapes=shapes)
    return y.transpose(1, 2).flatten(2), *finals


def _reordered(weights: Tensor, order: Sequence[int]) -> Tensor:
    """Weights or biases, [D, G*H, ...], with their gates in another order."""
    if len(order) == 1:
        return weights
    gates = weights.chunk(len(order), 1)
    return torch.cat([gates[k] for k in order], 1)


def _padding(batch_sizes: Tensor, B: int) -> tuple[Tensor, Tensor, Tensor]:
    """For a packed batch: index [T, B], the packed row at each step, of a sequence that has ended the last row of that
    step; valid [T, B], whether it has not ended; and lengths, int32 [B]."""
    rows, sizes = torch.arange(B), batch_sizes.unsqueeze(1)
    valid = rows < sizes
    first = batch_sizes.cumsum(0).unsqueeze(1) - sizes
    return first + torch.minimum(rows, sizes - 1), valid, valid.sum(0).to(torch.int32)


def _pack(y: Tensor, index: Tensor, valid: Tensor, N: int) -> Tensor:
    """[T, B, ...] as packed rows [N, ...]. Every padded row writes its place into `source`, those that are not valid
    into one entry behind the rest; so that no shape depends on data."""
    target = torch.where(valid, index, N).flatten()
    source = target.new_zeros(N + 1).scatter(0, target, torch.arange(target.shape[0]))
    return y.flatten(0, 1).index_select(0, source[:N])
