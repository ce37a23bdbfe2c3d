# SPDX-License-Identifier: BSD-3-Clause
"""The layer operators torch.ops.fastrnn.* as Python sees them: what sets them apart, and when they cannot be called.

Schemas are those of csrc/schemas.h; the derivatives stand in derivatives.py, what the dispatcher is told in
registration.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from . import reference
from .batching import forward_mode_active, only_vmap_active
from .extras import Extras, reference_layer

_functorch_active = torch._C._are_functorch_transforms_active


def transforms_active() -> bool:
    """Whether torch.func (vmap, grad, jvp, ...) or a level of forward-mode AD is active."""
    return _functorch_active() or forward_ad._current_level >= 0


def needs_reference() -> bool:
    """Whether a call made now must take the reference: under forward-mode AD, and where a compiler meets a transform.

    vmap, grad and vjp stay on the kernels (transforms.py); an operator has no forward-mode derivative.
    """
    return transforms_active() and (is_compiling() or forward_mode_active())


def extended_needs_reference() -> bool:
    """The same for a call with lengths, resets or masks, whose derivatives have no rules for torch.func."""
    return transforms_active() and (is_compiling() or not only_vmap_active())


@dataclass(frozen=True)
class Operator:
    """What sets the layer operators of the cells apart. Arguments stand in the order of csrc/schemas.h:
    x, the initial states, the weights of two directions; lengths, batch_sizes and other extras; options; save."""

    name: str
    gates: int
    tensors: int  # differentiable arguments, which come first; as many gradients come out of the backward operator
    results: int  # outputs that are differentiable: y and one or two final states
    buffers: int  # outputs after them, for the derivative alone: gates, and cells for an LSTM
    after_batch_sizes: int  # extras that follow batch_sizes in the schema
    options: int  # bools between the extras and save
    # Which of the gradients of gates that the backward sweep leaves are those of the rows of w_ih and of w_hh, in their
    # order; None: all, as they are (csrc/cells/*.h: kInput, kRecurrent, input_gate, recurrent_gate).
    input_gates: list[int] | None
    recurrent_gates: list[int] | None
    reference: Callable[..., tuple[Tensor, ...]]

    def extras(self, batch_sizes: Tensor | None) -> tuple[Tensor | None, ...]:
        """The extras of a call that has batch_sizes at most."""
        return (None, batch_sizes, *(None,) * self.after_batch_sizes)

    def extended_reference(
        self, tensors: Sequence[Tensor | None], extras: Sequence[Tensor | None], options: Sequence[bool]
    ) -> tuple[Tensor, ...]:
        """The reference of a call with any extras; of an LSTM also c at every step."""
        named, batch_sizes = Extras.of_arguments(extras)
        return reference_layer(self.gates, tensors, batch_sizes, named, *options)

    @property
    def given(self) -> int:
        """How many tensors the schema has in front of the options: the differentiable ones and the extras."""
        return self.tensors + 2 + self.after_batch_sizes

    @staticmethod
    def has_extras(extras: Sequence[Tensor | None]) -> bool:
        """Whether a call has other extras than batch_sizes."""
        return any(extra is not None for position, extra in enumerate(extras) if position != 1)

    def options_of(self, arguments: Sequence[Any]) -> tuple[bool, ...]:
        """The options among the arguments of the operator, in the order of the schema."""
        return tuple(arguments[len(arguments) - 1 - self.options : -1])

    @property
    def overload(self) -> Callable[..., tuple[Tensor, ...]]:
        """The operator as torch's dispatcher sees it."""
        return getattr(torch.ops.fastrnn, self.name).default

    @property
    def backward_name(self) -> str:
        return f"{self.name}_backward"

    @property
    def backward_overload(self) -> Callable[..., tuple[Tensor, ...]]:
        return getattr(torch.ops.fastrnn, self.backward_name).default

    @property
    def row_gradients_overload(self) -> Callable[..., tuple[Tensor, ...]]:
        """The backward without the sums over rows, see csrc/schemas.h."""
        return getattr(torch.ops.fastrnn, f"{self.name}_row_gradients").default


# fmt: off
LSTM = Operator("lstm_layer", gates=4, tensors=13, results=3, buffers=2, after_batch_sizes=6, options=0,
                input_gates=None, recurrent_gates=None, reference=reference.lstm_layer)
GRU = Operator("gru_layer", gates=3, tensors=10, results=2, buffers=1, after_batch_sizes=4, options=0,
               input_gates=[1, 2, 0], recurrent_gates=[1, 2, 3], reference=reference.gru_layer)
RNN = Operator("rnn_layer", gates=1, tensors=10, results=2, buffers=0, after_batch_sizes=4, options=1,
               input_gates=None, recurrent_gates=None, reference=reference.rnn_layer)
# fmt: on
BY_NAME = {operator.name: operator for operator in (LSTM, GRU, RNN)}
