# SPDX-License-Identifier: BSD-3-Clause
"""What PyTorch must know of the operators torch.ops.fastrnn.*: derivatives, shapes of the results, batching.

Importing it registers all three; autograd.py does so. The eager door has its derivative in csrc/derivative.cpp, which
comes here where a backward is not plain. Schemas and kernels are csrc/ops.cpp's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from . import checks, extension, onnx_export, reference
from .batching import Dims, batched, forward_mode_active, only_vmap_active
from .extras import Extras, reference_layer
from .gradients import LayerGradients, reference_gradients

_dispatch_modes = torch._C._len_torch_dispatch_stack
_functorch_active = torch._C._are_functorch_transforms_active
_is_legacy_batchedtensor = torch._C._functorch.is_legacy_batchedtensor


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
    """What sets the layer operators of the cells apart. Arguments stand in the order of the schema in csrc/ops.cpp:
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
        """The backward without the sums over rows, see csrc/ops.cpp."""
        return getattr(torch.ops.fastrnn, f"{self.name}_row_gradients").default


# fmt: off
LSTM = Operator("lstm_layer", gates=4, tensors=13, results=3, buffers=2, after_batch_sizes=6, options=0,
                input_gates=None, recurrent_gates=None, reference=reference.lstm_layer)
GRU = Operator("gru_layer", gates=3, tensors=10, results=2, buffers=1, after_batch_sizes=4, options=0,
               input_gates=[1, 2, 0], recurrent_gates=[1, 2, 3], reference=reference.gru_layer)
RNN = Operator("rnn_layer", gates=1, tensors=10, results=2, buffers=0, after_batch_sizes=4, options=1,
               input_gates=None, recurrent_gates=None, reference=reference.rnn_layer)
# fmt: on
_BY_NAME = {operator.name: operator for operator in (LSTM, GRU, RNN)}


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

        return _differentiable_backward(again, tensors, gradients, wanted)

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
        found = _differentiable_backward(again, arguments, gradients, wanted)
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
        tensors, kept, gradients, wanted: as for backward().
        relu: the option of rnn_layer.
        step: x is [B, I], the states are [B, R] as a cell has them, and there is no gradient of y.
    """
    operator = _BY_NAME[name]
    options, results = (relu,) * operator.options, operator.results
    if not step:
        return backward(operator, tensors, kept, options, gradients, wanted)
    inputs = [None if tensor is None else tensor.unsqueeze(0) for tensor in tensors[:results]]
    cotangents = [None, *(None if gradient is None else gradient.unsqueeze(0) for gradient in gradients)]
    found = backward(operator, [*inputs, *tensors[results:]], kept, options, cotangents, wanted)
    return *(None if gradient is None else gradient.squeeze(0) for gradient in found[:results]), *found[results:]


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


class _Recorded(torch.autograd.Function):
    """apply(*arguments, operator, keys): an operator called through the dispatcher while a gradient is needed."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[Tensor, ...]:
        *arguments, operator, keys = given
        output = _below_autograd(operator, keys, arguments)
        ctx.save_for_backward(*arguments[: operator.given], output[0], *output[operator.results :])
        ctx.mark_non_differentiable(*output[operator.results :][:1])  # gates; cells, c at every step, have a gradient
        ctx.set_materialize_grads(False)
        ctx.operator, ctx.options = operator, operator.options_of(arguments)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        operator, options = ctx.operator, ctx.options
        saved, of_cells = ctx.saved_tensors, gradients[operator.results + 1 :]
        count, extras = operator.tensors, saved[operator.tensors : operator.given]
        cotangents = gradients[: operator.results]
        # Where it does, backward() has the answer, which torch.func can transform.
        if any(gradient is not None for gradient in of_cells) or operator.has_extras(extras):
            needed = ctx.needs_input_grad[: operator.given]
            found = extended_backward(operator, saved, options, (*cotangents, *of_cells), needed, direct=False)
        else:
            kept = (extras[1], *saved[operator.given :])
            found = backward(operator, saved[:count], kept, options, cotangents, ctx.needs_input_grad[:count])
            found = (*found, *(None,) * len(extras))
        return *found, *(None,) * (operator.options + 1), None, None


def _below_autograd(operator: Operator, keys: torch.DispatchKeySet, arguments: Sequence[Any]) -> tuple[Tensor, ...]:
    with torch._C._AutoDispatchBelowAutograd():
        return operator.overload.redispatch(keys & torch._C._after_autograd_keyset, *arguments)  # type: ignore[attr-defined]


def _register_derivative(operator: Operator) -> None:
    """The kernel of the dispatcher's Autograd key.

    torch.library.register_autograd would do but for torch.func, where it refuses to be differentiated, and for
    forward-mode AD, where its tangent would be zero, and no error. A direct call of the operator is there what a
    composite of torch's own operators would be: the reference; what it does not have comes from the kernel. (Modules
    and functional forms do not come here under a transform, but through transforms.py.)
    """

    def kernel(keys: torch.DispatchKeySet, *arguments: Any) -> tuple[Tensor, ...]:
        recorded = torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments)
        if forward_ad._current_level >= 0 or (recorded and _functorch_active()):
            with torch.no_grad(), forward_ad._set_fwd_grad_enabled(False):
                buffers = _below_autograd(operator, keys, arguments)[operator.results :]
            extras = arguments[operator.tensors : operator.given]
            found = operator.extended_reference(arguments[: operator.tensors], extras, operator.options_of(arguments))
            cells = found[operator.results :] if arguments[-1] else buffers[1:]
            return *found[: operator.results], *buffers[:1], *cells
        if recorded:
            return _Recorded.apply(*arguments, operator, keys)  # type: ignore[no-untyped-call]
        return _below_autograd(operator, keys, arguments)

    _library.impl(operator.name, kernel, "Autograd", with_keyset=True)


def _register_no_derivative(name: str) -> None:
    """The same for the two operators of a backward pass: their derivative is gradients.py's, and not to be had from a
    direct call. Without this it would be zero in some cases, and no error."""
    overload = getattr(torch.ops.fastrnn, name).default

    def kernel(keys: torch.DispatchKeySet, *arguments: Any) -> tuple[Tensor, ...]:
        recorded = torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments)
        if recorded or (forward_ad._current_level >= 0 and any(map(_has_tangent, arguments))):
            raise NotImplementedError(f"fastrnn.{name}: no derivative here; that of fastrnn.functional has one")
        with torch._C._AutoDispatchBelowAutograd():
            return overload.redispatch(keys & torch._C._after_autograd_keyset, *arguments)

    _library.impl(name, kernel, "Autograd", with_keyset=True)


def _has_tangent(argument: Any) -> bool:
    return isinstance(argument, Tensor) and forward_ad.unpack_dual(argument).tangent is not None


def _register_vmap(operator: Operator) -> None:
    def rule(info: Any, in_dims: Dims, *arguments: Any) -> tuple[tuple[Tensor, ...], Dims]:
        return batched(operator, operator.overload, info.batch_size, in_dims, arguments)

    torch.library.register_vmap(f"fastrnn::{operator.name}", rule)


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

    def row_gradients(*arguments: Any) -> tuple[Tensor, ...]:
        x, h0, weights = arguments[results], arguments[results + 1], arguments[2 * results : results + count]
        directions = h0.shape[0]
        units, rows = weights[1].shape[0] // operator.gates, math.prod(x.shape[:-1])
        dtype = torch.float64 if x.dtype is torch.float64 else torch.float32
        outputs = [
            x.new_empty(tensor.shape if arguments[-1] >> position & 1 else (0,))
            for position, tensor in enumerate(arguments[results : 2 * results])
        ]
        stored = operator.gates if operator.recurrent_gates is None else 1 + operator.gates
        outputs.append(x.new_empty((directions, rows, stored * units), dtype=dtype))
        if results == 3:
            shape = (0,) if weights[4] is None else (directions, rows, h0.shape[2])
            outputs.append(x.new_empty(shape, dtype=dtype))
        return tuple(outputs)

    torch.library.register_fake(f"fastrnn::{operator.name}", forward)
    torch.library.register_fake(f"fastrnn::{operator.name}_row_gradients", row_gradients)
    torch.library.register_fake(f"fastrnn::{operator.backward_name}", backward)


_library = torch.library.Library("fastrnn", "FRAGMENT")  # what is registered lives as long as this object

if extension.module is not None:
    for _operator in (LSTM, GRU, RNN):
        _register_derivative(_operator)
        _register_no_derivative(_operator.backward_name)
        _register_no_derivative(f"{_operator.name}_row_gradients")
        _register_fakes(_operator)
        _register_vmap(_operator)
