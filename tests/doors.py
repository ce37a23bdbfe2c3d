# SPDX-License-Identifier: BSD-3-Clause
"""The two differentiable doors to a layer, in the same form, for the tests of derivatives and transforms."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from samples import Sample
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastrnn import autograd

Door = Callable[[Sample], Sequence[Tensor]]


def eager(layer: Sample) -> Sequence[Tensor]:
    return getattr(autograd, layer.operator)(*layer.arguments())


def registered(layer: Sample, save: bool = True) -> Sequence[Tensor]:
    results = 3 if layer.cell == "lstm" else 2
    return getattr(torch.ops.fastrnn, layer.operator)(*operator_arguments(layer, save))[:results]


def operator_arguments(layer: Sample, save: bool) -> list[Any]:
    extras = [None, layer.batch_sizes, *[None] * (6 if layer.cell == "lstm" else 4)]
    return [*layer.tensors(), *extras, *layer.tail()[1:], save]


def as_function(layer: Sample, door: Door) -> tuple[Callable[..., Sequence[Tensor]], list[Tensor]]:
    """The layer as a function of its tensors, without the None, for torch's checks and transforms."""

    def function(*tensors: Tensor) -> Sequence[Tensor]:
        given = iter(tensors)
        return door(layer.with_tensors([None if t is None else next(given) for t in layer.tensors()]))

    return function, [t for t in layer.tensors() if t is not None]


def assert_close(ours: Tensor | None, expected: Tensor | None, name: str) -> None:
    assert ours is not None, f"{name}: no gradient"
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12, msg=lambda message: f"{name}: {message}")


@contextmanager
def monitored(calls: list[str]) -> Iterator[None]:
    """Appends the name of each forward operator that runs to `calls`."""

    class Monitor(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "fastrnn":
                calls.append(func._opname)
            return func(*args, **(kwargs or {}))

    with Monitor():
        yield
