# SPDX-License-Identifier: BSD-3-Clause
"""What torch's dispatcher is told of the operators torch.ops.fastrnn.*: derivatives, batching, results without data.

Importing it registers all three; autograd.py does so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import extension, fakes, flops
from .batching import Dims, batched
from .derivatives import backward, extended_backward
from .operators import GRU, LSTM, RNN, Operator

_functorch_active = torch._C._are_functorch_transforms_active


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
        flops.tell_counters()
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
        flops.tell_counters()
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


_library = torch.library.Library("fastrnn", "FRAGMENT")  # what is registered lives as long as this object

if extension.module is not None:
    for _operator in (LSTM, GRU, RNN):
        _register_derivative(_operator)
        _register_no_derivative(_operator.backward_name)
        _register_no_derivative(f"{_operator.name}_row_gradients")
        fakes.register(_operator)
        _register_vmap(_operator)
