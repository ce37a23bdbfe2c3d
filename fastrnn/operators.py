# SPDX-License-Identifier: BSD-3-Clause
"""What PyTorch must know of the operators torch.ops.fastrnn.*: derivatives, shapes of the results, batching.

Importing it registers all three; autograd.py does so and shares backward() with its own door. Schemas and kernels are
csrc/ops.cpp's.
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

from . import checks, extension, onnx_export, reference
from .batching import batched, only_vmap_active
from .extras import Extras, reference_layer

_functorch_active = torch._C._are_functorch_transforms_active
_dispatch_modes = torch._C._len_torch_dispatch_stack
_is_legacy_batchedtensor = torch._C._functorch.is_legacy_batchedtensor


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
    after_batch_sizes: int  # extras that follow batch_sizes in the schema
    options: int  # bools between the extras and save
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


def backward(operator: Operator, ctx: Any, gradients: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """The gradients of an operator's tensors, given those of y and the final states; both doors end here.

    ctx.saved_tensors holds the tensors, batch_sizes (all extras if ctx.extended), y and the buffers; ctx.options the
    operator's options; ctx.saved whether the forward filled the buffers; ctx.direct whether it went past the
    dispatcher. If ctx.extended, the gradients may have that of c at every step behind them, and the result goes on with
    the gradients of the extras.
    """
    if ctx.extended:
        return _extended_backward(operator, ctx, gradients)
    count = operator.tensors
    saved = ctx.saved_tensors  # read once: under checkpointing each read unpacks again
    tensors, (batch_sizes, y, *buffers) = saved[:count], saved[count:]
    wanted = ctx.needs_input_grad[:count]
    undefined, direct = True, ctx.direct and not is_compiling() and not _dispatch_modes()
    for gradient in gradients:
        if gradient is not None:
            undefined = False
            # is_grads_batched hands over several gradients in one wrapper, which the dispatcher unrolls
            if direct and (type(gradient) is not Tensor or _is_legacy_batchedtensor(gradient)):
                direct = False
    if undefined:
        return (None,) * count
    if torch.is_grad_enabled() or transforms_active():  # create_graph, vmap of the backward, forward over reverse

        def again(*entries: Tensor | None) -> tuple[Tensor, ...]:
            return operator.reference(*entries, batch_sizes, *ctx.options)

        return _differentiable_backward(again, tensors, gradients, wanted)

    extras = operator.extras(batch_sizes)
    if not ctx.saved:  # called through torch.ops with save=False although a gradient was needed: run it once more
        buffers = operator.overload(*tensors, *extras, *ctx.options, True)[operator.results :]
    needs = 0
    for position, want in enumerate(wanted):
        if want:
            needs |= 1 << position
    if direct:
        run = getattr(extension.module, operator.backward_name)
    else:
        run = getattr(torch.ops.fastrnn, operator.backward_name).default
    d_cells = (None,) * (operator.results - 2)
    found = run(*gradients, *tensors, *extras, y, *buffers, *ctx.options, needs, *d_cells)
    return tuple([gradient if want else None for gradient, want in zip(found, wanted, strict=False)])


def _extended_backward(operator: Operator, ctx: Any, gradients: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """backward() of a call with extras, of which reset_h and reset_c are differentiable."""
    count, given, states = operator.tensors, 2 + operator.after_batch_sizes, operator.results - 1
    saved = ctx.saved_tensors
    tensors, extras, (y, *buffers) = saved[:count], saved[count : count + given], saved[count + given :]
    if not ctx.saved:
        gradients = gradients[: operator.results]  # c at every step was not a result
    first = 3  # reset_h: after lengths, batch_sizes and reset
    wanted = (*ctx.needs_input_grad[:count], *ctx.needs_input_grad[count + first : count + first + states])
    if all(gradient is None for gradient in gradients):
        found: Sequence[Tensor | None] = (None,) * len(wanted)
    elif torch.is_grad_enabled() or transforms_active():

        def again(*entries: Tensor | None) -> tuple[Tensor, ...]:
            changed = (*extras[:first], *entries[count:], *extras[first + states :])
            return operator.extended_reference(entries[:count], changed, ctx.options)

        arguments = (*tensors, *extras[first : first + states])
        found = _differentiable_backward(again, arguments, gradients, wanted)
    else:
        if not ctx.saved:
            buffers = operator.overload(*tensors, *extras, *ctx.options, True)[operator.results :]
        needs = sum(1 << position for position, want in enumerate(wanted) if want)
        of_cells = gradients[operator.results :] if states == 2 else ()
        plain = all(g is None or (type(g) is Tensor and not _is_legacy_batchedtensor(g)) for g in gradients)
        direct = plain and ctx.direct and not is_compiling() and not _dispatch_modes()
        name = operator.backward_name
        run = getattr(extension.module, name) if direct else getattr(torch.ops.fastrnn, name).default
        if direct and states == 2 and not of_cells:
            of_cells = (None,)
        found = run(*gradients[: operator.results], *tensors, *extras, y, *buffers, *ctx.options, needs, *of_cells)
        found = [gradient if want else None for gradient, want in zip(found, wanted, strict=True)]
    rest = given - first - states
    return *found[:count], *(None,) * first, *found[count:], *(None,) * rest


def _differentiable_backward(
    again: Callable[..., tuple[Tensor, ...]],
    tensors: Sequence[Tensor | None],
    gradients: Sequence[Tensor | None],
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """The same gradients as a differentiable expression: the reference, `again`, recomputed and differentiated.

    Each tensor enters as an alias of its own. Without that, a gradient would also run through the arguments that depend
    on one another (h0 computed from x, one weight for both directions) and be counted twice.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        entries = [t.view_as(t) if want and t is not None else t for t, want in zip(tensors, wanted, strict=True)]
        outputs = again(*entries)
        pairs = [(o, g) for o, g in zip(outputs, gradients, strict=False) if g is not None and o.requires_grad]
        sought = [entry for entry, want in zip(entries, wanted, strict=True) if want and entry is not None]
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
    results = operator.results
    given = operator.tensors + 2 + operator.after_batch_sizes
    undifferentiated = (None,) * (operator.options + 1)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[:given], output[0], *output[results:])
        ctx.mark_non_differentiable(*output[results : results + 1])  # gates; cells, c at every step, have a gradient
        ctx.set_materialize_grads(False)
        ctx.options = inputs[given : given + operator.options]
        ctx.saved, ctx.direct, ctx.extended = inputs[-1], False, True

    def backward_of_all(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return *backward(operator, ctx, (*gradients[:results], *gradients[results + 1 :])), *undifferentiated

    torch.library.register_autograd(f"fastrnn::{operator.name}", backward_of_all, setup_context=setup_context)


def _padded(units: int) -> int:
    """csrc/cpu/layer.h: padded()."""
    return (units + 15) // 16 * 16


def _register_fakes(operator: Operator) -> None:
    """Results without data. No shape depends on data: B is that of h0, packed or not."""
    count, results = operator.tensors, operator.results
    per_direction = (count - results) // 2

    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        onnx_export.refuse_operator(operator.name)
        checks.check_layer(operator, arguments[:count], arguments[count + 1])
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
        tensors, extras = arguments[results : results + count], arguments[results + count :]  # and what follows
        needs = extras[2 + operator.after_batch_sizes + 1 + operator.buffers + operator.options]
        saved = extras[2 + operator.after_batch_sizes :][: 1 + operator.buffers]
        checks.check_backward(operator, tensors, extras[1], arguments[:results], saved, needs)
        tensors = (*tensors, *extras[3 : 2 + results])  # reset_h, reset_c
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
