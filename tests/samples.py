# SPDX-License-Identifier: BSD-3-Clause
"""Random layers for the tests: one set of tensors that reference.py, the kernels and torch.nn can be called with."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

CELLS = ("lstm", "gru", "rnn_tanh", "rnn_relu")
GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
WEIGHT_NAMES = ("w_ih", "w_hh", "b_ih", "b_hh", "w_hr")


@dataclass(frozen=True)
class Sample:
    """The arguments of one layer. state is (h0,) or (h0, c0); weights has one row of 5 (LSTM) or 4 per direction."""

    cell: str
    x: Tensor
    state: tuple[Tensor, ...]
    weights: tuple[tuple[Tensor | None, ...], ...]
    batch_sizes: Tensor | None = None

    @property
    def operator(self) -> str:
        return "rnn_layer" if self.cell.startswith("rnn") else f"{self.cell}_layer"

    def tensors(self) -> list[Tensor | None]:
        """x, the state and the weights of two directions, None where there is none: the operators' first arguments."""
        rows = [*self.weights, *([(None,) * len(self.weights[0])] if len(self.weights) == 1 else [])]
        return [self.x, *self.state, *(weight for row in rows for weight in row)]

    def tail(self) -> list[object]:
        """What follows the tensors in the Python functions of reference.py and autograd.py."""
        return [self.batch_sizes, *([self.cell == "rnn_relu"] if self.cell.startswith("rnn") else [])]

    def arguments(self) -> list[object]:
        return [*self.tensors(), *self.tail()]

    def with_tensors(self, tensors: Sequence[Tensor | None]) -> Sample:
        """The same layer with other tensors, in the order of tensors()."""
        states, width = len(self.state), len(self.weights[0])
        rest = tensors[1 + states :]
        weights = tuple(tuple(rest[d * width : (d + 1) * width]) for d in range(len(self.weights)))
        return replace(self, x=tensors[0], state=tuple(tensors[1 : 1 + states]), weights=weights)

    def to(self, dtype: torch.dtype, requires_grad: bool = False) -> Sample:
        """A detached copy in another dtype."""
        return self.with_tensors(
            [None if t is None else t.detach().to(dtype).clone().requires_grad_(requires_grad) for t in self.tensors()]
        )

    def names(self) -> list[str]:
        """Names of tensors(), for messages."""
        weights = WEIGHT_NAMES[: len(self.weights[0])]
        inputs = ("x", "h0", "c0")[: 1 + len(self.state)]
        return [*inputs, *weights, *(f"{name}_reverse" for name in weights)]


def sample(
    cell: str,
    T: int = 5,
    B: int = 3,
    I: int = 4,  # noqa: E741  the dimension's name everywhere in fastrnn
    H: int = 7,
    P: int = 0,
    D: int = 1,
    bias: bool = True,
    lengths: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float64,
    requires_grad: bool = False,
    seed: int = 0,
) -> Sample:
    """A layer with random weights of torch.nn's size; lengths (non-increasing, B of them) makes it packed."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1) * scale

    R, G, bound = P or H, GATES[cell], max(H, 1) ** -0.5
    batch_sizes = None
    if lengths is not None:
        batch_sizes = torch.tensor([sum(length > t for length in lengths) for t in range(max(lengths))])
        B, rows = len(lengths), (sum(lengths),)
    else:
        rows = (T, B)
    state = (draw(D, B, R), draw(D, B, H)) if cell == "lstm" else (draw(D, B, H),)
    weights = []
    for _ in range(D):
        row = [draw(G * H, I, scale=bound), draw(G * H, R, scale=bound)]
        row += [draw(G * H, scale=bound), draw(G * H, scale=bound)] if bias else [None, None]
        row += [draw(P, H, scale=bound) if P else None] if cell == "lstm" else []
        weights.append(tuple(row))
    made = Sample(cell, draw(*rows, I), state, tuple(weights), batch_sizes)
    return made.to(dtype, requires_grad)


def stock(layer: Sample) -> tuple[Tensor, ...]:
    """torch.nn on the same tensors, differentiable in them: (y, h_n) or (y, h_n, c_n)."""
    w_ih, w_hh = layer.weights[0][:2]
    bias = layer.weights[0][2] is not None
    H, R = w_hh.shape[0] // GATES[layer.cell], w_hh.shape[1]
    options = {"bias": bias, "bidirectional": len(layer.weights) == 2, "dtype": layer.x.dtype}
    if layer.cell == "lstm":
        module = torch.nn.LSTM(w_ih.shape[1], H, proj_size=R if R != H else 0, **options)
    elif layer.cell == "gru":
        module = torch.nn.GRU(w_ih.shape[1], H, **options)
    else:
        module = torch.nn.RNN(w_ih.shape[1], H, nonlinearity=layer.cell.removeprefix("rnn_"), **options)
    names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0", "weight_hr_l0")
    parameters = {
        name + suffix: weight
        for row, suffix in zip(layer.weights, ("", "_reverse"), strict=False)
        for name, weight in zip(names, row, strict=False)
        if weight is not None
    }
    x = layer.x if layer.batch_sizes is None else PackedSequence(layer.x, layer.batch_sizes)
    hx = layer.state if layer.cell == "lstm" else layer.state[0]
    with warnings.catch_warnings():  # torch says that oneDNN knows no projections
        warnings.filterwarnings("ignore", "LSTM with projections is not supported with oneDNN")
        y, state = torch.func.functional_call(module, parameters, (x, hx), strict=True)
    y = y.data if isinstance(y, PackedSequence) else y
    return (y, *state) if isinstance(state, tuple) else (y, state)


def cotangents(outputs: Sequence[Tensor], seed: int = 1) -> list[Tensor]:
    """Random gradients of the outputs: a sum would hide what a wrong order of rows or units does."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype) for out in outputs]


def gradients(outputs: Sequence[Tensor], layer: Sample, seed: int = 1) -> dict[str, Tensor]:
    """The gradient of every tensor of the layer under random cotangents of every output."""
    wanted = {name: t for name, t in zip(layer.names(), layer.tensors(), strict=False) if t is not None}
    found = torch.autograd.grad(outputs, list(wanted.values()), cotangents(outputs, seed))
    return dict(zip(wanted, found, strict=True))
