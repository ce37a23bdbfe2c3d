# SPDX-License-Identifier: BSD-3-Clause
"""The derivative of the layer operators: of one call, with and without lengths, resets and masks.

The Autograd kernels of registration.py and the functions of transforms.py and extended.py call it; the eager door has
its derivative in csrc/derivative.cpp, which comes here where a backward is not plain.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from . import extension
from .gradients import LayerGradients, reference_gradients
from .operators import BY_NAME, Operator, needs_reference, transforms_active

_dispatch_modes = torch._C._len_torch_dispatch_stack
_functorch_active = torch._C._are_functorch_transforms_active
_is_legacy_batchedtensor = torch._C._functorch.is_legacy_batchedtensor


def backward(
    operator: Operator,
    tensors: Sequence[Tensor | None],
    kept: Sequence[Tensor | None],
    options: Sequence[bool],
    gradients: Sequence[Tensor | None],
    wanted: Sequence[bool],
    transformed: bool = False,
) -> tuple[Tensor | None, ...]:
    """The gradients of an operator's tensors, given those of y and the final states.

    Args:
        operator: whose.
        tensors: its differentiable arguments.
        kept: batch_sizes, y and the buffers. Where the forward kept nothing, y is None, or the buffers are empty.
        options: its options.
        gradients: of y and the final states, None for zero.
        wanted: which of the tensors need one.
        transformed: recorded by torch.func, which differentiates every gradient as if it were needed again.
    """
    count = operator.tensors
    if all(gradient is None for gradient in gradients):
        return (None,) * count
    batch_sizes, y, *buffers = kept
    if operator.results == 3 and gradients[0] is None and gradients[1] is None:
        wanted = _without_projection(tensors, batch_sizes, wanted)
    functorch, reference = _functorch_active(), needs_reference()
    if functorch and reference:  # forward over reverse, by torch.func
        given = (*gradients, *tensors)
        pulled = iter(reference_gradients(operator, wanted, batch_sizes, options, given))
        return tuple([next(pulled) if want else None for want in wanted])
    transformed = (transformed or functorch) and not reference
    if not transformed and (reference or torch.is_grad_enabled()):  # create_graph; forward over reverse

        def again(*entries: Tensor | None) -> tuple[Tensor, ...]:
            return operator.reference(*entries, batch_sizes, *options)

        return differentiable_backward(again, tensors, gradients, wanted)

    extras = operator.extras(batch_sizes)
    buffers = buffers[: operator.buffers]
    if y is None or _are_empty(buffers):  # not kept: run the forward once more
        with torch.no_grad():
            outputs = operator.overload(*tensors, *extras, *options, True)
        y, buffers = outputs[0], [*outputs[operator.results :]]
    if transformed:
        found = LayerGradients.apply(  # type: ignore[no-untyped-call]
            operator, None, tuple(wanted), batch_sizes, tuple(options), *gradients, *tensors, y, *buffers
        )
        return tuple([gradient if want else None for gradient, want in zip(found, wanted, strict=True)])
    needs = 0
    for position, want in enumerate(wanted):
        if want:
            needs |= 1 << position
    run = operator.backward_overload
    d_cells = (None,) * (operator.results - 2)
    found = run(*gradients, *tensors, *extras, y, *buffers, *options, needs, *d_cells)
    return tuple([gradient if want else None for gradient, want in zip(found, wanted, strict=False)])


def _are_empty(buffers: Sequence[Tensor | None]) -> bool:
    """Whether the forward was told to fill none of them."""
    return any(buffer is not None and buffer.shape == (0,) for buffer in buffers)


def extended_backward(
    operator: Operator,
    saved: Sequence[Tensor | None],
    options: Sequence[bool],
    gradients: Sequence[Tensor | None],
    needed: Sequence[bool],
    direct: bool,
) -> tuple[Tensor | None, ...]:
    """The gradients of an operator's tensors and extras, of which reset_h and reset_c are differentiable.

    Args:
        operator: whose.
        saved: its differentiable arguments, all extras, y and the buffers. Where the forward kept nothing, y is None,
            or the buffers are empty.
        options: its options.
        gradients: of y, the final states and, of an LSTM, c at every step; None for zero.
        needed: which of the tensors and extras need one.
        direct: whether the forward went past the dispatcher.
    """
    count, given, states = operator.tensors, 2 + operator.after_batch_sizes, operator.results - 1
    tensors, extras, (y, *buffers) = saved[:count], saved[count : count + given], saved[count + given :]
    empty = _are_empty(buffers)
    if empty:
        gradients = gradients[: operator.results]  # c at every step was not a result
    first = 3  # reset_h: after lengths, batch_sizes and reset
    wanted = (*needed[:count], *needed[count + first : count + first + states])
    if all(gradient is None for gradient in gradients):
        found: Sequence[Tensor | None] = (None,) * len(wanted)
    elif torch.is_grad_enabled() or transforms_active():

        def again(*entries: Tensor | None) -> tuple[Tensor, ...]:
            changed = (*extras[:first], *entries[count:], *extras[first + states :])
            return operator.extended_reference(entries[:count], changed, options)

        arguments = (*tensors, *extras[first : first + states])
        found = differentiable_backward(again, arguments, gradients, wanted)
    else:
        if y is None or empty:  # not kept: run the forward once more
            outputs = operator.overload(*tensors, *extras, *options, True)
            y, buffers = outputs[0], [*outputs[operator.results :]]
        needs = sum(1 << position for position, want in enumerate(wanted) if want)
        of_cells = gradients[operator.results :] if states == 2 else ()
        plain = all(g is None or (type(g) is Tensor and not _is_legacy_batchedtensor(g)) for g in gradients)
        direct = direct and plain and not is_compiling() and not _dispatch_modes()
        name = operator.backward_name
        run = getattr(extension.module, name) if direct else getattr(torch.ops.fastrnn, name).default
        if direct and states == 2 and not of_cells:
            of_cells = (None,)
        found = run(*gradients[: operator.results], *tensors, *extras, y, *buffers, *options, needs, *of_cells)
        found = [gradient if want else None for gradient, want in zip(found, wanted, strict=True)]
    rest_count = given - first - states
    return *found[:count], *(None,) * first, *found[count:], *(None,) * rest_count


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
        tensors: its differentiable arguments, then reset_h and, of an LSTM, reset_c.
        kept: batch_sizes, lengths, reset, y and the buffers.
        gradients: as for backward().
        wanted: which of the tensors need one.
        relu: the option of rnn_layer.
        step: x is [B, I], the states are [B, R] as a cell has them, and there is no gradient of y.
    """
    operator = BY_NAME[name]
    options, results, count = (relu,) * operator.options, operator.results, operator.tensors
    batch_sizes, lengths, reset, *kept = kept
    if lengths is not None or reset is not None:
        extras = (lengths, batch_sizes, reset, *tensors[count:])
        extras += (None,) * (2 + operator.after_batch_sizes - len(extras))
        saved = (*tensors[:count], *extras, *kept[: 1 + operator.buffers])
        needed = (*wanted[:count], False, False, False, *wanted[count:])
        found = extended_backward(operator, saved, options, gradients, needed, direct=False)
        return *found[:count], *found[count + 3 : count + 2 + results]
    tensors, wanted, kept = tensors[:count], wanted[:count], (batch_sizes, *kept)
    if not step:
        return backward(operator, tensors, kept, options, gradients, wanted)
    inputs = [None if tensor is None else tensor.unsqueeze(0) for tensor in tensors[:results]]
    cotangents = [None, *(None if gradient is None else gradient.unsqueeze(0) for gradient in gradients)]
    found = backward(operator, [*inputs, *tensors[results:]], kept, options, cotangents, wanted)
    return *(None if gradient is None else gradient.squeeze(0) for gradient in found[:results]), *found[results:]


def differentiable_backward(
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
        entries = [_alias(t) if want and t is not None else t for t, want in zip(tensors, wanted, strict=True)]
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


def _without_projection(tensors: Sequence[Any], batch_sizes: Any, wanted: Any) -> Sequence[bool]:
    """What is wanted of an LSTM of which only c_n is used: after a single step the projection has no part in it, and
    its gradient is none, as in torch, rather than zero."""
    if tensors[7] is None or (tensors[0] if batch_sizes is None else batch_sizes).shape[0] > 1:
        return wanted
    return tuple([want and position not in (7, 12) for position, want in enumerate(wanted)])


def _alias(tensor: Tensor) -> Tensor:
    return tensor.view_as(tensor) if tensor.requires_grad else tensor.detach().requires_grad_()


def keep(operator: Operator, ctx: Any, arguments: Sequence[Any], output: tuple[Tensor, ...]) -> None:
    """Keeps what backward() needs after a call of the operator itself, without extras but batch_sizes; arguments in the
    order of its schema."""
    buffers = output[operator.results :]
    ctx.save_for_backward(*arguments[: operator.tensors], arguments[operator.tensors + 1], output[0], *buffers)
    ctx.mark_non_differentiable(*buffers)
    ctx.set_materialize_grads(False)
    ctx.operator, ctx.options = operator, operator.options_of(arguments)


def backward_of_all(
    ctx: Any, gradients: Sequence[Tensor | None], transformed: bool = False
) -> tuple[Tensor | None, ...]:
    """backward() for what keep() kept: a gradient, or None, for each argument in the schema."""
    operator, saved = ctx.operator, ctx.saved_tensors  # read once: under checkpointing each read unpacks again
    count, cotangents = operator.tensors, gradients[: operator.results]
    wanted = ctx.needs_input_grad[:count]
    found = backward(operator, saved[:count], saved[count:], ctx.options, cotangents, wanted, transformed)
    return *found, *(None,) * (2 + operator.after_batch_sizes + operator.options + 1)
