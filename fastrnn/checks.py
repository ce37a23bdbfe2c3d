# SPDX-License-Identifier: BSD-3-Clause
"""What csrc/checks.h checks of an operator's arguments, for tensors without data, in the same words; called by the fake
kernels of fakes.py, so that a mistake shows when a model is compiled or exported and not when it runs.

Left to the kernels: numbers of lengths and batch_sizes, dtype of the latter, and sizes beyond 2^31. A condition on
symbolic sizes becomes a guard or an assertion of the graph.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from .extras import Extras

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_INPUTS = ("x", "h0", "c0")
_WEIGHTS = ("w_ih", "w_hh", "b_ih", "b_hh", "w_hr")


def check_layer(operator: Any, tensors: Sequence[Tensor | None], extras: Sequence[Tensor | None]) -> None:
    """Checks the arguments of a forward call.

    Args:
        operator: its Operator of operators.py.
        tensors: x, the initial states and the weights of two directions.
        extras: batch_sizes and the others, in the order of the schema.
    Raises:
        ValueError: the rank of x, or the dtype of a weight.
        RuntimeError: anything else that does not fit.
    """
    _Checker(operator, operator.name, tensors, extras).layer()


def check_backward(
    operator: Any,
    tensors: Sequence[Tensor | None],
    extras: Sequence[Tensor | None],
    gradients: Sequence[Tensor | None],
    saved: Sequence[Tensor],
    needs: int,
    d_cells: Tensor | None = None,
) -> None:
    """Checks the arguments of a backward call.

    Args:
        operator: its Operator of operators.py.
        tensors: as for check_layer.
        extras: as for check_layer.
        gradients: of y and the final states.
        saved: y, then the buffers.
        needs: a bit for each gradient that is wanted.
        d_cells: of an LSTM, the gradient of c at every step.
    Raises:
        ValueError: the rank of x, or the dtype of a weight.
        RuntimeError: anything else that does not fit.
    """
    checker = _Checker(operator, operator.backward_name, tensors, extras)
    checker.layer()
    checker.backward(gradients, saved, needs, d_cells)


class _Checker:
    """The checks of one call, in the order of csrc/checks.h."""

    def __init__(
        self, operator: Any, name: str, tensors: Sequence[Tensor | None], extras: Sequence[Tensor | None]
    ) -> None:
        self.operator, self.name = operator, name
        self.extras, self.batch_sizes = Extras.of_arguments(extras)
        inputs = operator.results
        self.inputs = dict(zip(_INPUTS, tensors[:inputs], strict=False))
        half = (len(tensors) - inputs) // 2
        weights = tensors[inputs:]
        self.weights = [dict(zip(_WEIGHTS, row, strict=False)) for row in (weights[:half], weights[half:])]

    def layer(self) -> None:
        self.x = x = self.on_device("x", self.inputs["x"])
        gates = self.operator.gates
        self.dtype = x.dtype
        if x.dtype not in _DTYPES:
            self.fail(f"x must be float32, float64, bfloat16 or float16, got {_dtype(x)}")
        if self.batch_sizes is None:
            if x.dim() != 3:
                self.fail(f"x must be [T, B, I], got {_sizes(x)}", ValueError)
            self.require(x.shape[0] >= 1, "x must have at least one time step, got [T, B, I] = ", x)
        elif x.dim() != 2:
            self.fail(f"x must be [N, I] when batch_sizes is given, got {_sizes(x)}", ValueError)
        self.I = x.shape[-1]
        self.require(self.I >= 1, "x must have at least one feature, got ", x)

        forward, reverse = self.weights
        w_hh, w_hr = self.operand("w_hh", forward["w_hh"]), forward.get("w_hr")
        rule = f"w_hh must be {self.spell('[G*H, R]')} with H >= 1, got "
        self.require(w_hh.dim() == 2 and w_hh.shape[0] >= 1 and w_hh.shape[0] % gates == 0, rule, w_hh)
        self.H = self.R = w_hh.shape[0] // gates
        if w_hr is not None:
            self.operand("w_hr", w_hr)
            self.require(w_hr.dim() == 2 and w_hr.shape[0] >= 1, "w_hr must be [P, H] with P >= 1, got ", w_hr)
            self.R = w_hr.shape[0]
        self.D = 1 if reverse["w_ih"] is None else 2
        if self.batch_sizes is None:
            self.B = x.shape[1]
        else:
            self.packed(x)
        self.operand("h0", self.inputs["h0"], "[D, B, R]", (self.D, self.B, self.R))
        if "c0" in self.inputs:
            self.operand("c0", self.inputs["c0"], "[D, B, H]", (self.D, self.B, self.H))
        self.check_weights(w_hr is not None)
        if self.extras.lengths is not None:
            self.check_lengths(self.extras.lengths)
        self.check_resets()
        shapes = self.of_rows(self.D * self.R), self.of_rows(self.D * self.H)
        if self.extras.h_mask is not None:
            self.operand("h_mask", self.extras.h_mask, "[D, B, R]", (self.D, self.B, self.R))
        for name, tensor, shape, letter in zip(("zoneout_h", "zoneout_c"), self.extras[5:], shapes, "RH", strict=True):
            if tensor is not None:
                self.operand(name, tensor, self.rule_of_rows(letter), shape)

    def of_rows(self, features: Any) -> tuple[Any, ...]:
        """The shape of what has a row for each step of each sequence; and how messages spell it."""
        return (*self.x.shape[:-1], features)

    def rule_of_rows(self, letter: str) -> str:
        return f"[T, B, D*{letter}]" if self.batch_sizes is None else f"[N, D*{letter}]"

    def check_lengths(self, lengths: Tensor) -> None:
        if self.batch_sizes is not None:
            self.fail("lengths and batch_sizes must not both be given")
        if not lengths.is_cpu:
            self.on_device("lengths", lengths)
        if lengths.dtype is not torch.int64:
            self.fail(f"lengths must be int64, got {_dtype(lengths)}")
        self.fits("lengths", lengths, "[B]", (self.B,))

    def check_resets(self) -> None:
        _, reset, *states = self.extras[:4]
        given = [state is not None for state in states]
        if reset is None:
            if any(given):
                self.fail("reset_h and reset_c are given without reset")
            return
        if self.batch_sizes is not None:
            self.fail("reset and batch_sizes must not both be given; lengths go with reset")
        self.on_device("reset", reset)
        if reset.dtype is not torch.bool:
            self.fail(f"reset must be bool, got {_dtype(reset)}")
        self.fits("reset", reset, "[T, B]", tuple(self.x.shape[:2]))
        if "c0" in self.inputs and given[0] != given[1]:
            self.fail("reset_h and reset_c must be given together")
        for name, state, letter in zip(("reset_h", "reset_c"), states, "RH", strict=True):
            if state is not None:
                width = self.R if letter == "R" else self.H
                self.operand(name, state, f"[D, B, {letter}]", (self.D, self.B, width))

    def packed(self, x: Tensor) -> None:
        """batch_sizes has no numbers here: B is taken from h0. Its dtype is left to the kernels as well, since torch's
        own pack_padded_sequence says float32 when it is traced."""
        sizes = self.on_cpu("batch_sizes", self.batch_sizes)
        if sizes.dim() != 1:
            self.fail(f"batch_sizes must be [T], got {_sizes(sizes)}")
        self.require(sizes.shape[0] >= 1, "batch_sizes must have at least one time step, got ", sizes)
        h0 = self.inputs["h0"]
        self.B = h0.shape[1] if h0 is not None and h0.dim() == 3 else 0

    def check_weights(self, projected: bool) -> None:
        rows = self.operator.gates * self.H
        rules = {
            "w_ih": ("[G*H, I]", (rows, self.I)),
            "w_hh": ("[G*H, R]", (rows, self.R)),
            "b_ih": ("[G*H]", (rows,)),
            "b_hh": ("[G*H]", (rows,)),
            "w_hr": ("[P, H]", (self.R, self.H)),
        }
        for row, suffix in zip(self.weights[: self.D], ("", "_reverse"), strict=False):
            for name, weight in row.items():
                required = name in ("w_ih", "w_hh") or (name == "w_hr" and projected)
                if name == "w_hr" and not projected and weight is not None:
                    self.fail(f"{name}{suffix} is given without w_hr")
                elif weight is not None or required:
                    self.operand(name + suffix, weight, *rules[name])
        if self.D == 1:
            for name, weight in self.weights[1].items():
                if weight is not None:
                    self.fail(f"{name}_reverse is given without w_ih_reverse")

    def backward(
        self, gradients: Sequence[Tensor | None], saved: Sequence[Tensor], needs: int, d_cells: Tensor | None
    ) -> None:
        count = self.operator.tensors + self.operator.results - 1  # and reset_h, reset_c
        if not 0 <= needs < 1 << count:
            self.fail(f"needs must be in [0, 2^{count}), got {needs}")
        x, (y, *buffers) = self.x, saved
        like_y = (self.rule_of_rows("R"), self.of_rows(self.D * self.R))
        states = (("[D, B, R]", (self.D, self.B, self.R)), ("[D, B, H]", (self.D, self.B, self.H)))
        self.operand("y", y, *like_y)
        for name, gradient, expected in zip(("d_y", "d_h_n", "d_c_n"), gradients, (like_y, *states), strict=False):
            if gradient is not None:
                self.operand(name, gradient, *expected)
        self.dtype = torch.float64 if self.dtype is torch.float64 else torch.float32  # of what the forward saves
        N = math.prod(x.shape[:-1])  # numel() would fix symbolic sizes
        padded = (self.H + 15) // 16 * 16
        shapes = (("[D, N, 4*padded(H)]", (self.D, N, 4 * padded)), ("[D, N, H]", (self.D, N, self.H)))
        for name, buffer, expected in zip(("gates", "cells"), buffers, shapes, strict=False):
            self.operand(name, buffer, *expected)
        if d_cells is not None:
            self.operand("d_cells", d_cells, *shapes[1])

    def operand(self, name: str, given: Tensor | None, rule: str = "", shape: tuple[int, ...] | None = None) -> Tensor:
        """The argument, which is a tensor of the right dtype and, if there is one, shape."""
        tensor = self.on_device(name, given)
        if tensor.dtype is not self.dtype:
            wanted, got = str(self.dtype)[6:], _dtype(tensor)
            if name[0] in "wb":
                self.fail(f"{name} must be {wanted} like x, got {got}", ValueError)
            self.fail(f"{name} must be {wanted}, got {got}")
        return tensor if shape is None else self.fits(name, tensor, rule, shape)

    def fits(self, name: str, tensor: Tensor, rule: str, shape: tuple[int, ...]) -> Tensor:
        message = f"{name} must be {self.spell(rule)} = [{', '.join(map(str, shape))}], got "
        self.require(tensor.dim() == len(shape), message, tensor)
        for size, expected in zip(tensor.shape, shape, strict=True):
            self.require(size == expected, message, tensor)
        return tensor

    def on_cpu(self, name: str, tensor: Tensor | None) -> Tensor:
        if tensor is None:
            self.fail(f"{name} must be given")
        if tensor.device.type not in ("cpu", "meta"):  # meta: without data on any device
            self.fail(f"{name} must be on the CPU, got {tensor.device}")
        return tensor

    def on_device(self, name: str, tensor: Tensor | None) -> Tensor:
        """The tensor, which is on the CPU, or on CUDA if x is."""
        x = self.inputs["x"]
        if tensor is None or x is None or not x.is_cuda:
            return self.on_cpu(name, tensor)
        if tensor.device != x.device:
            rule = f"on {x.device} like x" if tensor.is_cuda else "on a CUDA device like x"
            self.fail(f"{name} must be {rule}, got {tensor.device}")
        return tensor

    def require(self, condition: Any, message: str, tensor: Tensor) -> None:
        """condition may be symbolic: torch then keeps it with the graph. The sizes of the tensor end the message."""
        torch._check(condition, lambda: f"fastrnn.{self.name}: {message}{_sizes(tensor)}")

    def spell(self, rule: str) -> str:
        return rule.replace("G*", f"{self.operator.gates}*" if self.operator.gates > 1 else "")

    def fail(self, message: str, error: type[Exception] = RuntimeError) -> NoReturn:
        raise error(f"fastrnn.{self.name}: {message}")


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype)[6:]


def _sizes(tensor: Tensor) -> str:
    return f"[{', '.join(map(str, tensor.shape))}]"
