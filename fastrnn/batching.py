# SPDX-License-Identifier: BSD-3-Clause
"""torch.vmap over the operators: one call of the kernel where the weights are shared, one for each member where they
are not. operators.py registers the rule; autograd.py lets a call under vmap alone come here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack
from torch.autograd import forward_ad

Dims = tuple[int | None, ...]


def only_vmap_active() -> bool:
    """Whether every active transform is a vmap, so that nothing but shapes is transformed."""
    return forward_ad._current_level < 0 and all(level.key() == TransformType.Vmap for level in get_interpreter_stack())


def batched(operator: Any, info: Any, in_dims: Dims, *arguments: Any) -> tuple[tuple[Tensor, ...], Dims]:
    """The rule as torch.library.register_vmap wants it: the outputs, and where in each the new dimension stands.

    in_dims says where it stands in each argument, None where an argument has none. Gradients are recorded below vmap,
    on the tensors given here, so that it is they that decide whether the derivative's buffers are saved.
    """
    *given, save = arguments
    recorded = torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in given)
    given.append(save or recorded)
    results = operator.results
    extras = given[operator.tensors : operator.tensors + 2 + operator.after_batch_sizes]
    extended = any(extra is not None for extra in extras)  # ragged batches, resets, masks: of one member each
    if extended or any(dim is not None for dim in in_dims[results:]):
        return _one_by_one(operator, info.batch_size, in_dims, given)
    return _folded(operator, info.batch_size, in_dims, given)


def _one_by_one(operator: Any, members: int, in_dims: Dims, arguments: list[Any]) -> tuple[tuple[Tensor, ...], Dims]:
    outputs = [
        operator.overload(*(a if dim is None else a.select(dim, v) for a, dim in zip(arguments, in_dims, strict=True)))
        for v in range(members)
    ]
    stacked = tuple(torch.stack(same) for same in zip(*outputs, strict=True))
    return stacked, (0,) * len(stacked)


def _folded(operator: Any, members: int, in_dims: Dims, arguments: list[Any]) -> tuple[tuple[Tensor, ...], Dims]:
    """V members of B rows each are V*B rows of one batch: x [T, V*B, I], states [D, V*B, R]."""
    results = operator.results
    for position in range(results):
        tensor, dim = arguments[position], in_dims[position]
        spread = tensor.unsqueeze(1).expand(-1, members, -1, -1) if dim is None else tensor.movedim(dim, 1)
        arguments[position] = spread.flatten(1, 2)
    outputs = operator.overload(*arguments)
    shape = (members, outputs[1].shape[1] // members)
    unfolded = [output.unflatten(1, shape) for output in outputs[:results]]
    dims: list[int | None] = [1] * results
    for buffer in outputs[results:]:  # [D, T*V*B, ...], or [0] when nothing is saved
        if arguments[-1]:
            unfolded.append(buffer.unflatten(1, (-1, *shape)).movedim(2, 0).flatten(2, 3))
            dims.append(0)
        else:
            unfolded.append(buffer)
            dims.append(None)
    return tuple(unfolded), tuple(dims)
