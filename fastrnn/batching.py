# SPDX-License-Identifier: BSD-3-Clause
"""torch.vmap over the layers: one call of the kernel where the weights are shared, one for each member where they are
not. registration.py registers the rule for torch.ops.fastrnn, transforms.py and gradients.py have it for torch.func.

V members of B rows each are V*B rows of one batch, the members side by side: row b of member v is row b*V + v, padded
and packed alike. So the rows of one member are as far apart as those of the other, and none has to be copied.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch._C._functorch import TransformType, get_interpreter_stack
from torch.autograd import forward_ad

Dims = tuple[int | None, ...]
_DIFFERENTIATED_BACKWARDS = (TransformType.Vmap, TransformType.Grad)


def forward_mode_active() -> bool:
    """Whether a level of forward-mode AD or any other transform than vmap, grad and vjp is active."""
    if forward_ad._current_level >= 0:
        return True
    return any(level.key() not in _DIFFERENTIATED_BACKWARDS for level in get_interpreter_stack() or ())


def only_vmap_active() -> bool:
    """Whether every active transform is a vmap, so that nothing but shapes is transformed."""
    return forward_ad._current_level < 0 and all(level.key() == TransformType.Vmap for level in get_interpreter_stack())


def fold(tensor: Tensor, dim: int | None, members: int, rows: int) -> Tensor:
    """The members of a tensor put into its dimension `rows`; dim: where they stand, None: all have this one."""
    if dim is None:
        shape = [-1] * (tensor.dim() + 1)
        shape[rows + 1] = members
        spread = tensor.unsqueeze(rows + 1).expand(shape)
    else:
        spread = tensor.movedim(dim, rows + 1)
    return spread.flatten(rows, rows + 1)


def unfold(tensor: Tensor, members: int, rows: int) -> Tensor:
    """fold() undone: the members stand in dimension rows + 1."""
    return torch.unflatten(tensor, rows, (tensor.shape[rows] // members, members))


def rows_of(operator: Any, packed: bool) -> tuple[int, ...]:
    """Which dimension of x and of the initial states (y and the final states) has the rows that fold() multiplies."""
    return (0 if packed else 1, *(1,) * (operator.results - 1))


def one_by_one(
    run: Callable[..., Sequence[Tensor]], members: int, in_dims: Dims, arguments: Sequence[Any]
) -> list[tuple[Tensor, ...]]:
    """run(*arguments) for each member."""
    return [
        tuple(run(*(a if dim is None else a.select(dim, v) for a, dim in zip(arguments, in_dims, strict=True))))
        for v in range(members)
    ]


def through_vmap(
    operator: Any,
    layer: Callable[..., tuple[Tensor, ...]],
    tensors: Sequence[Tensor | None],
    batch_sizes: Tensor | None,
    options: Sequence[bool],
) -> tuple[Tensor, ...]:
    """layer(*tensors, batch_sizes, *options) where vmap is the innermost transform, with what is left of them below it.

    torch.func would find the rule through custom_function_call, the dispatcher through torch.library.register_vmap;
    either takes .3 to .5 ms a call, this .05 (machine B of docs/architecture.md).
    """
    level = _functorch.peek_interpreter_stack().level()
    unwrapped: list[Any] = [(None, None) if t is None else _functorch._unwrap_batched(t, level) for t in tensors]
    values, dims = zip(*unwrapped, strict=True)
    this_level = _functorch.pop_dynamic_layer_stack()
    try:
        members = next((value.shape[dim] for value, dim in unwrapped if dim is not None), None)
        if members is None:
            return layer(*values, batch_sizes, *options)

        def run(*arguments: Any) -> tuple[Tensor, ...]:
            return layer(*arguments[: operator.tensors], arguments[operator.tensors + 1], *options)

        arguments = (*values, *operator.extras(batch_sizes), *options, False)
        in_dims = (*dims, *(None,) * (len(arguments) - len(dims)))
        outputs, out_dims = batched(operator, run, members, in_dims, arguments)
    finally:
        _functorch.push_dynamic_layer_stack(this_level)
    dims_out: Any = out_dims  # a number each: nothing is saved for a derivative
    return tuple(_functorch._add_batch_dim(o, dim, level) for o, dim in zip(outputs, dims_out, strict=True))


def batched(
    operator: Any, run: Callable[..., tuple[Tensor, ...]], members: int, in_dims: Dims, arguments: Sequence[Any]
) -> tuple[tuple[Tensor, ...], Dims]:
    """The rule for a forward operator: its outputs, and where in each the new dimension stands.

    Args:
        operator: operators.Operator.
        run: computes the operator (its differentiable outputs may be all that it returns), whatever transforms are
            left below this vmap.
        members: size of the dimension.
        in_dims: where it stands in each argument, None where an argument has none.
        arguments: in the order of the schema. Gradients may be recorded below this vmap, on the tensors given here,
            so that it is they that decide whether the derivative's buffers are saved.
    """
    *arguments, save = arguments
    results, count = operator.results, operator.tensors
    saved = save or (torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments))
    arguments.append(saved)
    batch_sizes = arguments[count + 1]
    extras = [a for position, a in enumerate(arguments[count : -1 - operator.options]) if position != 1]
    if any(dim is not None for dim in in_dims[results:]) or any(extra is not None for extra in extras):
        each = one_by_one(run, members, in_dims, arguments)
        stacked = tuple(torch.stack(same) for same in zip(*each, strict=True))
        return stacked, (0,) * len(stacked)
    rows = rows_of(operator, batch_sizes is not None)
    for position in range(results):
        arguments[position] = fold(arguments[position], in_dims[position], members, rows[position])
    if batch_sizes is not None:
        arguments[count + 1] = batch_sizes * members
    outputs = run(*arguments)
    unfolded = [unfold(output, members, row) for output, row in zip(outputs, rows, strict=False)]
    dims: list[int | None] = [row + 1 for row in rows]
    for buffer in outputs[results:]:  # [D, N, ...], or [0] when nothing is saved
        unfolded.append(unfold(buffer, members, 1) if saved else buffer)
        dims.append(2 if saved else None)
    return tuple(unfolded), tuple(dims)
