# SPDX-License-Identifier: BSD-3-Clause
"""Operations of the operators for torch.utils.flop_counter.FlopCounterMode, which knows torch's own alone.

As of torch's operators the matrix products are counted, two operations a multiply-add; the gate math is not, nor are
the elementwise operations of a loop over cells. registration.py, autograd.py and extended.py call tell_counters() where
a dispatch mode may be active: importing torch's counter would take 4 ms, and more where it finds triton.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _python_dispatch

from . import extension
from .operators import GRU, LSTM, RNN, Operator

_COUNTER = "torch.utils.flop_counter"
_dispatch_modes = torch._C._len_torch_dispatch_stack

Formula = Callable[..., int]


class _Layer:
    """The sizes of a call, from its arguments in the order of the schema from x on."""

    def __init__(self, operator: Operator, arguments: Sequence[Any]) -> None:
        x, h0, lengths = arguments[0], arguments[1], arguments[operator.tensors]
        w_hh = arguments[operator.results + 1]
        w_hr = arguments[operator.results + 4] if operator is LSTM else None
        self.directions: int = h0.shape[0]
        self.batch: int = h0.shape[1]
        self.tokens: int = math.prod(x.shape[:-1])
        if type(lengths) is Tensor and not lengths.is_meta:  # of a fake one the values are unknown
            self.batch = int(lengths.count_nonzero())
            self.tokens = int(lengths.sum())
        self.input: int = w_hh.shape[0] * x.shape[-1]  # elements of w_ih, of w_hh, of w_hr
        self.recurrent: int = w_hh.shape[0] * w_hh.shape[1]
        self.projection: int = 0 if w_hr is None else w_hr.shape[0] * w_hr.shape[1]

    def forward(self) -> int:
        """Every token meets every weight once."""
        return 2 * self.directions * self.tokens * (self.input + self.recurrent + self.projection)

    def sweep(self, wanted: Callable[[int], bool]) -> int:
        """The part of a backward that leaves the gradients of gates, x and states. A sequence's first step multiplies
        by w_hh for d_h0 alone."""
        recurrent = self.tokens - (0 if wanted(1) else self.batch)
        of_x = self.input * self.tokens * wanted(0)
        return 2 * self.directions * (of_x + self.recurrent * recurrent + self.projection * self.tokens)


def _formulas(operator: Operator) -> dict[Any, Formula]:
    results, slots = operator.results, (operator.tensors - operator.results) // 2

    def forward(*arguments: Any, **_: Any) -> int:
        return _Layer(operator, arguments).forward()

    def backward(*arguments: Any, **_: Any) -> int:
        layer = _Layer(operator, arguments[results:])
        # After y, the buffers and the options; d_cells may follow.
        needs = arguments[results + operator.given + 1 + operator.buffers + operator.options]
        total = layer.sweep(lambda position: bool(needs >> position & 1))
        of_weights = {0: layer.input, 1: layer.recurrent, 4: layer.projection}  # by their place in a direction
        for direction in range(layer.directions):
            for place, elements in of_weights.items():
                if place < slots and needs >> (results + direction * slots + place) & 1:
                    total += 2 * layer.tokens * elements
        return total

    def row_gradients(*arguments: Any, **_: Any) -> int:
        needs = arguments[-1]  # the products for the weights are torch's own, and counted
        return _Layer(operator, arguments[results:]).sweep(lambda position: bool(needs >> position & 1))

    names = (operator.name, operator.backward_name, f"{operator.name}_row_gradients")
    packets = [getattr(torch.ops.fastrnn, name) for name in names]
    return dict(zip(packets, (forward, backward, row_gradients), strict=True))


_FORMULAS: dict[Any, Formula] = {}


def register() -> None:
    """Registers the formulas with torch's counter where it is imported, for counters that are made from then on."""
    module: Any = sys.modules.get(_COUNTER)
    if module is None or extension.module is None or _FORMULAS:
        return
    for operator in (LSTM, GRU, RNN):
        _FORMULAS.update(_formulas(operator))
    for packet, formula in _FORMULAS.items():
        if packet not in module.flop_registry:  # a program may have brought its own
            module.register_flop_formula(packet, get_raw=True)(formula)


def tell_counters() -> None:
    """Registers the formulas, and hands them to the counters that are active, which were made before."""
    if not _dispatch_modes() or _COUNTER not in sys.modules:
        return
    register()
    for mode in _python_dispatch._get_current_dispatch_mode_stack():
        registry = getattr(getattr(mode, "counter", None), "flop_registry", None)
        if isinstance(registry, dict):
            for packet, formula in _FORMULAS.items():
                registry.setdefault(packet, formula)


register()
