# SPDX-License-Identifier: BSD-3-Clause
"""The gradients of a layer as a function that torch.func can transform in turn; derivatives.backward() calls it while a
transform is active.

Under vmap they take one backward sweep over the folded batch, also for gradients of the weights, one set for each
member: the sweep leaves the gradients of the gates, and a batched product makes the sums over each member's rows. Its
own derivative is that of the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .batching import Dims, fold, one_by_one, rows_of, unfold

Given = Sequence[Any]  # tensors and, at places that the operator and the call tell, None
# Bytes that members of one call may add where all of them have the same layer and only the cotangents differ (jacrev):
# what the kernel reads is then copied for each of them.
_MOST_COPIED = 1 << 26


def reference_gradients(
    operator: Any, wanted: Sequence[bool], batch_sizes: Tensor | None, options: Sequence[bool], given: Given
) -> tuple[Tensor, ...]:
    """The wanted gradients as a differentiable expression: torch.func.vjp of the reference.

    Args:
        operator: operators.Operator.
        wanted: for each of the operator's tensors whether its gradient is.
        batch_sizes, options: of the forward call.
        given: the gradients of y and of the final states, None for zero; then the operator's tensors.
    """
    cotangents, tensors = given[: operator.results], given[operator.results :]

    def layer(*sought: Tensor) -> tuple[Tensor, ...]:
        entries = iter(sought)
        filled = [next(entries) if want else tensor for tensor, want in zip(tensors, wanted, strict=True)]
        outputs = operator.reference(*filled, batch_sizes, *options)
        return tuple(o for o, cotangent in zip(outputs, cotangents, strict=True) if cotangent is not None)

    pull: Any
    _, pull = torch.func.vjp(
        layer,  # type: ignore[misc]
        *(tensor for tensor, want in zip(tensors, wanted, strict=True) if want),
    )
    return pull(tuple(cotangent for cotangent in cotangents if cotangent is not None))


class LayerGradients(torch.autograd.Function):
    """apply(operator, members, wanted, batch_sizes, options, *given): a gradient for each of the operator's tensors,
    [0] where none is wanted.

    members is None for a layer as it is. Else its rows are those of so many members, and the gradients of weights are
    [members, ...], a set for each. given: gradients of y and the final states (None: zero), the operator's tensors, y,
    and the buffers that the forward saved.
    """

    @staticmethod
    def forward(
        operator: Any,
        members: int | None,
        wanted: tuple[bool, ...],
        batch_sizes: Tensor | None,
        options: tuple[bool, ...],
        *given: Any,
    ) -> tuple[Tensor, ...]:
        results, count = operator.results, operator.tensors
        cotangents, tensors, (y, *buffers) = given[:results], given[results:][:count], given[results + count :]
        arguments = (*cotangents, *tensors, *operator.extras(batch_sizes), y, *buffers, *options)
        if members is None or not any(wanted[results:]):
            return tuple(operator.backward_overload(*arguments, _bits(wanted))[:count])  # without those of resets
        of_rows = operator.row_gradients_overload(*arguments, _bits(wanted[:results]))
        of_weights = _weight_gradients(operator, members, wanted, batch_sizes, tensors, y, buffers, of_rows[results:])
        return (*of_rows[:results], *of_weights)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        operator, ctx.members, ctx.wanted, batch_sizes, ctx.options, *given = inputs
        ctx.operator = operator
        ctx.save_for_backward(batch_sizes, *given[: operator.results + operator.tensors])
        ctx.mark_non_differentiable(*(o for o, want in zip(output, ctx.wanted, strict=True) if not want))
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *seconds: Tensor | None) -> tuple[Tensor | None, ...]:
        """The derivative of the reference's gradients. y and the buffers are functions of the tensors, so that the
        tensors get all of it."""
        operator, wanted, members = ctx.operator, ctx.wanted, ctx.members
        batch_sizes, *given = ctx.saved_tensors
        present = [position for position, tensor in enumerate(given) if tensor is not None]

        def gradients(*entries: Tensor) -> tuple[Tensor, ...]:
            filled: list[Any] = [None] * len(given)
            for position, entry in zip(present, entries, strict=True):
                filled[position] = entry
            if members is None:
                return reference_gradients(operator, wanted, batch_sizes, ctx.options, filled)
            return _member_gradients(operator, members, wanted, batch_sizes, ctx.options, filled)

        pull: Any
        found, pull = torch.func.vjp(  # type: ignore[misc]
            gradients, *(given[position] for position in present)
        )
        asked = [second for second, want in zip(seconds, wanted, strict=True) if want]
        pulled = pull(tuple(torch.zeros_like(f) if a is None else a for f, a in zip(found, asked, strict=True)))
        results: list[Tensor | None] = [None] * len(given)
        for position, gradient in zip(present, pulled, strict=True):
            results[position] = gradient
        return *(None,) * 5, *results, *(None,) * (1 + operator.buffers)

    @staticmethod
    def vmap(
        info: Any,
        in_dims: Dims,
        operator: Any,
        members: int | None,
        wanted: tuple[bool, ...],
        batch_sizes: Tensor | None,
        options: tuple[bool, ...],
        *given: Any,
    ) -> tuple[tuple[Tensor, ...], Dims]:
        fixed, new = (operator, members, wanted, batch_sizes, options), info.batch_size
        results, count = operator.results, operator.tensors
        dims = in_dims[len(fixed) :]
        if any(dim is not None for dim in dims[2 * results : results + count]):  # of the weights
            outputs = one_by_one(partial(LayerGradients.apply, *fixed), new, dims, given)
            same = list(zip(*outputs, strict=True))
            return (
                tuple(torch.stack(each) if want else each[0] for each, want in zip(same, wanted, strict=True)),
                tuple(0 if want else None for want in wanted),
            )

        per_call = new
        if all(dim is None for dim in dims[results:]):
            copied = sum(t.nbytes for t in (*given[results:][:results], *given[results + count :]))
            per_call = max(1, min(new, _MOST_COPIED // max(copied, 1)))
        parts = [
            LayerGradients._folded(dims, fixed, [_some(t, d, v, per_call) for t, d in zip(given, dims, strict=True)], n)
            for v in range(0, new, per_call)
            for n in (min(per_call, new - v),)
        ]
        rows = rows_of(operator, batch_sizes is not None)
        out_dims: list[Any] = [*(row + 1 for row in rows), *(0 if members is None else 1 for _ in wanted[results:])]
        out_dims = [dim if want else None for dim, want in zip(out_dims, wanted, strict=True)]
        joined = [
            each[0] if dim is None or len(parts) == 1 else torch.cat(each, dim)
            for each, dim in zip(zip(*parts, strict=True), out_dims, strict=True)
        ]
        return tuple(joined), tuple(out_dims)

    @staticmethod
    def _folded(dims: Dims, fixed: tuple[Any, ...], given: Sequence[Tensor | None], new: int) -> list[Tensor]:
        """The gradients of `new` members that share the weights."""
        operator, members, wanted, batch_sizes, options = fixed
        results, count = operator.results, operator.tensors
        rows = rows_of(operator, batch_sizes is not None)
        places = (*rows, *rows, *(None,) * (count - results), rows[0], *(1,) * operator.buffers)
        folded = [
            tensor if tensor is None or place is None else fold(tensor, dim, new, place)
            for tensor, dim, place in zip(given, dims, places, strict=True)
        ]
        sizes = None if batch_sizes is None else batch_sizes * new
        found = LayerGradients.apply(  # type: ignore[no-untyped-call]
            operator, (members or 1) * new, wanted, sizes, options, *folded
        )
        outputs = []
        for gradient, want, place in zip(found, wanted, (*rows, *(None,) * (count - results)), strict=True):
            if not want or (place is None and members is None):
                outputs.append(gradient)
            else:
                outputs.append(unfold(gradient, new, 0 if place is None else place))
        return outputs


def _bits(wanted: Sequence[bool]) -> int:
    return sum(1 << position for position, want in enumerate(wanted) if want)


def _some(tensor: Tensor | None, dim: int | None, first: int, count: int) -> Tensor | None:
    """Members [first, first + count) of a tensor, as far as there are so many."""
    if tensor is None or dim is None or (first == 0 and tensor.shape[dim] <= count):
        return tensor
    return tensor.narrow(dim, first, min(count, tensor.shape[dim] - first))


def _member_gradients(
    operator: Any,
    members: int,
    wanted: Sequence[bool],
    batch_sizes: Tensor | None,
    options: Sequence[bool],
    given: Given,
) -> tuple[Tensor, ...]:
    """reference_gradients() for members folded into the batch; those of weights [members, ...]."""
    rows = rows_of(operator, batch_sizes is not None)
    places = (*rows, *rows, *(None,) * (operator.tensors - operator.results))
    sizes = None if batch_sizes is None else batch_sizes // members
    present = [position for position, tensor in enumerate(given) if tensor is not None]

    def of_one(*entries: Tensor) -> tuple[Tensor, ...]:
        filled: list[Tensor | None] = [None] * len(given)
        for position, entry in zip(present, entries, strict=True):
            filled[position] = entry
        return reference_gradients(operator, wanted, sizes, options, filled)

    unfolded = [
        given[position] if places[position] is None else unfold(given[position], members, places[position])
        for position in present
    ]
    in_dims = tuple(None if places[position] is None else places[position] + 1 for position in present)
    of_wanted = [place for place, want in zip(places[operator.results :], wanted, strict=True) if want]
    out_dims = tuple(0 if place is None else place + 1 for place in of_wanted)
    found = torch.func.vmap(of_one, in_dims, out_dims)(*unfolded)
    return tuple(
        gradient if place is None else gradient.flatten(place, place + 1)
        for gradient, place in zip(found, of_wanted, strict=True)
    )


def _weight_gradients(
    operator: Any,
    members: int,
    wanted: Sequence[bool],
    batch_sizes: Tensor | None,
    tensors: Given,
    y: Any,
    buffers: Given,
    of_rows: Sequence[Tensor],
) -> list[Tensor]:
    """A set of gradients of the weights for each member, from the gradients of the gates at every row.

    d_w_ih[v] = sum over its rows of d_gates^T x, d_w_hh[v] of d_gates^T (h one step before), d_b[v] of d_gates, and
    d_w_hr[v] of d_h^T (o * tanh(c)).
    """
    x, h0, weights = tensors[0], tensors[1], tensors[operator.results :]
    D, N = of_rows[0].shape[0], of_rows[0].shape[1] // members
    units, width = weights[1].shape[0] // operator.gates, h0.shape[2]
    dtype = of_rows[0].dtype  # of the kernels
    x = x.reshape(N, members, -1).to(dtype)
    outputs = y.reshape(N, members, D, width).to(dtype)
    firsts = h0.reshape(D, -1, members, width).to(dtype)
    found: list[Tensor] = []
    for d in range(2):
        kinds = wanted[operator.results :][d * len(weights) // 2 :][: len(weights) // 2]
        if not any(kinds):
            found += [x.new_empty(0)] * len(kinds)
            continue
        d_gates = of_rows[0][d].reshape(N, members, -1, units)
        d_input, d_recurrent = (
            (d_gates if order is None else d_gates[:, :, order]).reshape(N, members, operator.gates * units)
            for order in (operator.input_gates, operator.recurrent_gates)
        )
        before = torch.cat((firsts[d], outputs[:, :, d])).index_select(0, _row_before(batch_sizes, members, N, h0, d))
        sums: list[Any] = [
            lambda a=d_input: _by_member(a, x),
            lambda a=d_recurrent, h=before: _by_member(a, h),
            lambda a=d_input: a.sum(0),
            lambda a=d_recurrent: a.sum(0),
            lambda d=d: _by_member(of_rows[1][d].reshape(N, members, width), _cell_output(buffers, d, members, units)),
        ]
        found += [
            total().to(tensors[0].dtype) if want else x.new_empty(0)
            for total, want in zip(sums[: len(kinds)], kinds, strict=True)
        ]
    return found


def _by_member(a: Tensor, b: Tensor) -> Tensor:
    """[members, P, Q], the products a^T b of each member's rows; a is [N, members, P], b [N, members, Q]."""
    return torch.matmul(a.permute(1, 2, 0), b.permute(1, 0, 2))


def _row_before(batch_sizes: Tensor | None, members: int, N: int, h0: Tensor, direction: int) -> Tensor:
    """For each row of a member the row of (h0, y) that holds the h its step started from."""
    batch = h0.shape[1] // members
    if batch_sizes is None:
        return torch.arange(N) if direction == 0 else (torch.arange(N) + 2 * batch) % (N + batch)
    sizes = (batch_sizes // members).tolist()
    first, rows = [0], []
    for size in sizes:
        first.append(first[-1] + size)
    for t, size in enumerate(sizes):
        before = t + 1 if direction else t - 1
        carried = min(size, sizes[before]) if 0 <= before < len(sizes) else 0
        start = batch + first[before] if carried else 0
        rows += [start + b if b < carried else b for b in range(size)]
    return torch.tensor(rows)


def _cell_output(buffers: Sequence[Tensor], direction: int, members: int, units: int) -> Tensor:
    """o * tanh(c) at every row [N, members, H], which the projection multiplies. The saved gates lie in groups of 16
    units, as [group][gate][16]."""
    gates, cells = buffers[0][direction], buffers[1][direction]
    o = gates.unflatten(1, (-1, 4, 16))[:, :, 3].flatten(1)[:, :units]
    return (o * torch.tanh(cells)).unflatten(0, (-1, members))
