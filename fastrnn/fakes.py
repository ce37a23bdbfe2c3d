# SPDX-License-Identifier: BSD-3-Clause
"""Results of the operators torch.ops.fastrnn.* without data, for torch.compile, torch.export and the meta device.

registration.py registers them. They refuse what the operators refuse, with checks.py, so that a mistake shows when a
model is compiled or exported.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import checks, onnx_export
from .operators import Operator


def _padded(units: int) -> int:
    """csrc/cpu/layer.h: padded()."""
    return (units + 15) // 16 * 16


def register(operator: Operator) -> None:
    """Registers those of one operator. No shape depends on data: B is that of h0, packed or not."""
    count, results = operator.tensors, operator.results
    per_direction = (count - results) // 2

    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        onnx_export.refuse_operator(operator.name)
        checks.check_layer(operator, arguments[:count], arguments[count : operator.given])
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
        tensors, extras = arguments[results : results + count], arguments[results + count : results + operator.given]
        saved = arguments[results + operator.given :][: 1 + operator.buffers]
        needs, *of_cells = arguments[results + operator.given + 1 + operator.buffers + operator.options :]
        checks.check_backward(operator, tensors, extras, arguments[:results], saved, needs, *of_cells)
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
