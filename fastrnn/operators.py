# SPDX-License-Identifier: BSD-3-Clause
"""What PyTorch must know of the operators torch.ops.fastrnn.*: derivatives, shapes of the results, batching.

Importing it registers all three; autograd.py does so. The eager door has its derivative in csrc/derivative.cpp, which
comes here where a backward is not plain. Schemas and kernels are csrc/ops.cpp's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from . import extension, reference
from .batching import batched, only_vmap_active

_functorch_active = torch._C._are_functorch_transforms_active


def transforms_active() -> bool:
    """Whether torch.func (vmap, grad, jvp, ...) or a level of forward-mode AD is active."""
    return _functorch_active() or forward_ad._current_level >= 0


def needs_reference() -> bool:
    """Whether a call made now must take the reference: under every transform but vmap, which batching.py handles.

    The registered derivative of an operator would give forward-mode AD a tangent of zero and no error.
    """
    return transforms_active() and (is_compiling() or not only_vmap_active())


@dataclass(frozen=True)
class Operator:
    """What sets the layer operators of the cells apart. Arguments stand in the order of the schema in csrc/ops.cpp:
    x, the initial states, the weights of two directions; lengths, batch_sizes and other extras; options; save."""

    name: str
    gates: int
    tensors: int  # differentiable arguments, which come first; as many gradients come out of the backward operator
    results: int  # outputs that are differentiable: y and one or two final states
    buffers: int  # outputs after them, for the derivative alone: gates, and cells for an LSTM
    after_batch_sizes: int  # extras that follow batch_sizes in the schema, none of them built yet
    options: int  # bools between the extras and save
    reference: Callable[..., tuple[Tensor, ...]]

    def extras(self, batch_sizes: Tensor | None) -> tuple[Tensor | None, ...]:
        """The extras, of which today only batch_sizes can be given."""
        return (None, batch_sizes, *(None,) * self.after_batch_sizes)

    @property
    def overload(self) -> Callable[..., tuple[Tensor, ...]]:
        """The operator as torch's dispatcher sees it."""
        return getattr(torch.ops.fastrnn, self.name).default

    @property
    def backward_name(self) -> str:
        return f"{self.name}_backward"


# fmt: off
LSTM = Operator("lstm_layer", gates=4, tensors=13, results=3, buffers=2, after_batch_sizes=6, options=0,
                reference=reference.lstm_layer)
GRU = Operator("gru_layer", gates=3, tensors=10, results=2, buffers=1, after_batch_sizes=4, options=0,
               reference=reference.gru_layer)
RNN = Operator("rnn_layer", gates=1, tensors=10, results=2, buffers=0, after_batch_sizes=4, options=1,
               reference=reference.rnn_layer)
# fmt: on
_BY_NAME = {operator.name: operator for operator in (LSTM, GRU, RNN)}


def backward(
    operator: Operator,
    tensors: Sequence[Tensor | None],
    kept: Sequence[Tensor | None],
    options: Sequence[bool],
    gradients: Sequence[Tensor | None],
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """The gradients of an operator's tensors, given those of y and the final states.

    Args:
        operator: whose.
        tensors: its differentiable arguments.
        kept: batch_sizes, y and the buffers. Where the forward kept nothing, y is None, or the buffers are empty.
        options: its options.
        gradients: of y and the final states, None for zero.
        wanted: which of the tensors need one.
    """
    count = operator.tensors
    if all(gradient is None for gradient in gradients):
        return (None,) * count
    batch_sizes, y, *buffers = kept
    if torch.is_grad_enabled() or transforms_active():  # create_graph, vmap of the backward, forward over reverse
        return _differentiable_backward(operator, tensors, (batch_sizes, *options), gradients, wanted)

    extras = operator.extras(batch_sizes)
    buffers = buffers[: operator.buffers]
    if y is None or any(buffer.shape == (0,) for buffer in buffers):  # not kept: run the forward once more
        y, *rest = operator.overload(*tensors, *extras, *options, True)
        buffers = rest[operator.results - 1 :]
    needs = 0
    for position, want in enumerate(wanted):
        if want:
            needs |= 1 << position
    run = getattr(torch.ops.fastrnn, operator.backward_name).default
    found = run(*gradients, *tensors, *extras, y, *buffers, *options, needs)
    return tuple([gradient if want else None for gradient, want in zip(found, wanted, strict=True)])


def continue_backward(
    name: str,
    tensors: Sequence[Tensor | None],
    kept: Sequence[Tensor | None],
    gradients: Sequence[Tensor | None],
    wanted: Sequence[bool],
    relu: bool,
    step: bool,
) -> tuple[Tensor | None, ...]:
    """The backward of the eager door where it is not plain; csrc/derivative.cpp calls it.

    Args:
        name: of the operator.
        tensors, kept, gradients, wanted: as for backward().
        relu: the option of rnn_layer.
        step: x is [B, I], the states are [B, R] as a cell has them, and there is no gradient of y.
    """
    operator = _BY_NAME[name]
    options, results = (relu,) * operator.options, operator.results
    if not step:
        return backward(operator, tensors, kept, options, gradients, wanted)
    inputs = [tensor.unsqueeze(0) for tensor in tensors[:results]]
    cotangents = [None, *(None if gradient is None else gradient.unsqueeze(0) for gradient in gradients)]
    found = backward(operator, [*inputs, *tensors[results:]], kept, options, cotangents, wanted)
    return *(None if gradient is None else gradient.squeeze(0) for gradient in found[:results]), *found[results:]


def _differentiable_backward(
    operator: Operator,
    tensors: Sequence[Tensor | None],
    tail: Sequence[Any],
    gradients: Sequence[Tensor | None],
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """The same gradients as a differentiable expression: the reference, recomputed and differentiated.

    Each tensor enters as an alias of its own. Without that, a gradient would also run through the arguments that depend
    on one another (h0 computed from x, one weight for both directions) and be counted twice.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        entries = [t.view_as(t) if want else t for t, want in zip(tensors, wanted, strict=True)]
        outputs = operator.reference(*entries, *tail)
        pairs = [(o, g) for o, g in zip(outputs, gradients, strict=True) if g is not None and o.requires_grad]
        sought = [entry for entry, want in zip(entries, wanted, strict=True) if want]
        if not pairs or not sought:
            return (None,) * len(tensors)
        found = iter(
            torch.autograd.grad(
                [output for output, _ in pairs],
                sought,
                [gradient for _, gradient in pairs],
                create_graph=create_graph,
                allow_unused=True,
            )
        )
    return tuple(next(found) if want else None for want in wanted)


def _register_derivative(operator: Operator) -> None:
    count, results = operator.tensors, operator.results
    undifferentiated = (None,) * (2 + operator.after_batch_sizes + operator.options + 1)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        buffers = output[results:]
        ctx.save_for_backward(*inputs[:count], inputs[count + 1], output[0], *buffers)
        ctx.mark_non_differentiable(*buffers)
        ctx.set_materialize_grads(False)
        ctx.options = inputs[len(inputs) - 1 - operator.options : -1]

    def backward_of_all(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # read once: under checkpointing each read unpacks again
        wanted = ctx.needs_input_grad[:count]
        found = backward(operator, saved[:count], saved[count:], ctx.options, gradients[:results], wanted)
        return *found, *undifferentiated

    torch.library.register_autograd(f"fastrnn::{operator.name}", backward_of_all, setup_context=setup_context)


def _padded(units: int) -> int:
    """csrc/cpu/layer.h: padded()."""
    return (units + 15) // 16 * 16


def _register_fakes(operator: Operator) -> None:
    """Results without data. No shape depends on data: B is that of h0, packed or not."""
    count, results = operator.tensors, operator.results
    per_direction = (count - results) // 2

    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        x, h0, weights = arguments[0], arguments[1], arguments[results:count]
        directions = 1 if weights[per_direction] is None else 2
        units = weights[1].shape[0] // operator.gates
        width = weights[1].shape[1]
        batch, rows = h0.shape[1], x.shape[:-1]
        outputs = [x.new_empty((*rows, directions * width)), x.new_empty((directions, batch, width))]
        if results == 3:
            outputs.append(x.new_empty((directions, batch, units)))
        dtype = torch.float64 if x.dtype is torch.float64 else torch.float32  # of the kernels
        for features in (4 * _padded(units), units)[: operator.buffers]:
            shape = (directions, math.prod(rows), features) if arguments[-1] else (0,)
            outputs.append(x.new_empty(shape, dtype=dtype))
        return tuple(outputs)

    def backward(*arguments: Any) -> tuple[Tensor, ...]:
        tensors, needs = arguments[results : results + count], arguments[-1]
        x = tensors[0]
        return tuple(
            x.new_empty(tensor.shape if tensor is not None and needs >> position & 1 else (0,))
            for position, tensor in enumerate(tensors)
        )

    torch.library.register_fake(f"fastrnn::{operator.name}", forward)
    torch.library.register_fake(f"fastrnn::{operator.backward_name}", backward)


if extension.module is not None:
    for _operator in (LSTM, GRU, RNN):
        _register_derivative(_operator)
        _register_fakes(_operator)
        torch.library.register_vmap(f"fastrnn::{_operator.name}", partial(batched, _operator))
