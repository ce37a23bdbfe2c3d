# SPDX-License-Identifier: BSD-3-Clause
"""16-bit layers without products of their own are float32 on the widened numbers, rounded at the end: bit for bit in
the forward pass, whatever lies where."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from twins import CELLS, tensors_of, twins

pytestmark = pytest.mark.usefixtures("isa")

DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])


def pair(cell: str, dtype: torch.dtype, *sizes: int, **options: object) -> tuple[nn.Module, nn.Module]:
    """A layer in `dtype`, and one in float32 with the same numbers."""
    low = twins(cell, *sizes, **options)[0].to(dtype)
    return low, copy.deepcopy(low).float()


@DTYPES
@pytest.mark.parametrize("sizes", [(3, 1, 5, 7), (4, 3, 33, 50), (2, 40, 64, 1030)], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_forward_is_float32_rounded(cell, sizes, dtype):
    T, B, I, H = sizes  # noqa: E741
    low, wide = pair(cell, dtype, I, H, bidirectional=H < 64, batch_first=True)
    x = torch.randn(B, T, I).to(dtype)
    for given in (x, x.transpose(0, 1).contiguous().transpose(0, 1), torch.cat([x, x], 2)[:, :, I:]):
        for found, expected in zip(tensors_of(low(given)), tensors_of(wide(given.float())), strict=True):
            assert torch.equal(found, expected.to(dtype))


@DTYPES
def test_every_value_is_widened_and_rounded_as_torch_does(dtype):
    low, wide = pair("rnn_relu", dtype, 1, 1)
    with torch.no_grad():
        for module in (low, wide):
            for name, value in module.named_parameters():
                value.fill_(1.0 if name == "weight_ih_l0" else 0.0)
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).reshape(1, -1, 1)
    found, expected = low(bits)[0], wide(bits.float())[0].to(dtype)
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0))


@DTYPES
@pytest.mark.parametrize("cell", CELLS)
def test_gradients_and_final_states_are_those_of_float32_nearly(cell, dtype):
    low, wide = pair(cell, dtype, 20, 24, num_layers=2, bidirectional=True)
    x = torch.randn(6, 5, 20).to(dtype)
    inputs = [x.clone().requires_grad_(), x.float().requires_grad_()]
    for module, leaf in zip((low, wide), inputs, strict=True):
        y, *states = tensors_of(module(leaf))
        (y.float().square().sum() + sum(state.float().sum() for state in states)).backward()
    names = [name for name, _ in low.named_parameters()]
    found = [inputs[0].grad, *(value.grad for value in low.parameters())]
    expected = [inputs[1].grad, *(value.grad for value in wide.parameters())]
    for name, a, b in zip(["x", *names], found, expected, strict=True):
        assert a.dtype == dtype
        assert (a.float() - b).abs().max() <= 16 * torch.finfo(dtype).eps * (1 + b.abs().max()), name


@DTYPES
def test_two_calls_at_once_and_a_failed_one_leave_the_kept_memory_in_order(dtype, threads):
    threads(2)
    low, wide = pair("lstm", dtype, 256, 40)
    x = torch.randn(20, 30, 256).to(dtype)  # large enough for both threads to widen it
    with pytest.raises(RuntimeError):
        low(x[..., :7])
    first, second = low(x)[0], low(x.flip(1))[0]
    assert torch.equal(first, wide(x.float())[0].to(dtype))
    assert torch.equal(second, first.flip(1))
