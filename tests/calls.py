# SPDX-License-Identifier: BSD-3-Clause
"""Calls of the operators by argument name, through either door; for the tests of csrc."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from samples import Sample, cotangents
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastrnn import _C


def without_data(operator: str) -> Callable[..., tuple[Tensor, ...]]:
    """The operator's fake kernel, which torch.compile and torch.export call."""

    def run(*arguments: Any) -> tuple[Tensor, ...]:
        mode = FakeTensorMode()
        fakes = [mode.from_tensor(a) if isinstance(a, Tensor) and not a.is_meta else a for a in arguments]
        with mode:
            return getattr(torch.ops.fastrnn, operator).default(*fakes)

    return run


DOORS = {
    "dispatcher": lambda operator: getattr(torch.ops.fastrnn, operator).default,
    "direct": lambda operator: getattr(_C, operator),
}
CHECKED_DOORS = DOORS | {"fake": without_data}  # all that check their arguments
RESULTS = {
    "lstm_layer": ("y", "h_n", "c_n", "gates", "cells"),
    "gru_layer": ("y", "h_n", "gates"),
    "rnn_layer": ("y", "h_n"),
}


def schema(operator: str) -> torch._C.FunctionSchema:
    return getattr(torch.ops.fastrnn, operator).default._schema


def given(layer: Sample) -> dict[str, Any]:
    """The layer as arguments of its operator; an argument that is missing is None."""
    values = dict(zip(layer.names(), layer.tensors(), strict=False))
    return values | {"batch_sizes": layer.batch_sizes, "relu": layer.cell == "rnn_relu"}


def call(door: str, operator: str, values: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """Calls an operator with the values that its schema names, in the order of the schema."""
    return CHECKED_DOORS[door](operator)(*(values.get(argument.name) for argument in schema(operator).arguments))


def forward(door: str, layer: Sample, save: bool = False, **changed: Any) -> dict[str, Tensor]:
    values = given(layer) | {"save": save} | changed
    return dict(zip(RESULTS[layer.operator], call(door, layer.operator, values), strict=True))


def backward_values(layer: Sample, needs: int | None = None) -> dict[str, Any]:
    """All arguments of the backward operator, with random cotangents of every result; needs: all when None."""
    results = forward("direct", layer, save=True)
    values = given(layer) | {name: results.get(name) for name in ("y", "gates", "cells")}
    states = [results[name] for name in ("y", "h_n", "c_n") if name in results]
    values |= dict(zip(("d_y", "d_h_n", "d_c_n"), cotangents(states), strict=False))
    return values | {"needs": (1 << len(layer.tensors())) - 1 if needs is None else needs}


def backward(door: str, layer: Sample, **changed: Any) -> dict[str, Tensor]:
    """The gradients by the name of their tensor, also those that are empty."""
    operator = f"{layer.operator}_backward"
    found = call(door, operator, backward_values(layer) | changed)
    names = [result.name.removeprefix("d_") for result in schema(operator).returns]
    return dict(zip(names, found, strict=True))
