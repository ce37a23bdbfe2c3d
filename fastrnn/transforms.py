# SPDX-License-Identifier: BSD-3-Clause
"""The door for torch.func: a layer under any nesting of vmap, grad and vjp, on the kernels; called by autograd.py.

Forward-mode AD (jvp, jacfwd, hessian) is the reference's business, which autograd.py calls instead.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .batching import Dims, batched
from .derivatives import backward_of_all, keep


class TransformedLayer(torch.autograd.Function):
    """apply(*arguments, operator): the outputs of an operator, arguments in the order of its schema."""

    @staticmethod
    def forward(*given: Any) -> tuple[Tensor, ...]:
        *arguments, operator = given
        return operator.overload(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *arguments, operator = inputs
        keep(operator, ctx, arguments, output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return *backward_of_all(ctx, gradients, transformed=True), None

    @staticmethod
    def vmap(info: Any, in_dims: Dims, *given: Any) -> tuple[tuple[Tensor, ...], Dims]:
        *arguments, operator = given

        def run(*arguments: Any) -> tuple[Tensor, ...]:
            return TransformedLayer.apply(*arguments, operator)  # type: ignore[no-untyped-call]

        return batched(operator, run, info.batch_size, in_dims[:-1], arguments)
