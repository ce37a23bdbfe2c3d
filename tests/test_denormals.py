# SPDX-License-Identifier: BSD-3-Clause
"""Inputs that decay into denormals: every step is right by the measure of its own size.

That torch.set_flush_denormal is followed by every thread, programs.py looks at.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from twins import CELLS, twins

SMALLEST = 2.0**-149


def results(module: torch.nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The output, and d_x under cotangents of ones, of which those of late steps are as small as x."""
    x = x.detach().requires_grad_()
    y = module(x)[0]
    (d_x,) = torch.autograd.grad(y, x, x.detach().abs().amax((1, 2), keepdim=True).expand_as(y))
    return {"y": y.detach(), "d_x": d_x}


@pytest.mark.parametrize("cell", CELLS)
def test_steps_that_decay_into_denormals_are_right(cell, isa):
    """err(ours) <= 2 * err(torch) + 4 * eps * max|float64|, in each step alone, as far as denormals have the digits."""
    T, B, H = 48, 3, 20
    assert torch.set_flush_denormal(False)
    ours, theirs = twins(cell, 9, H, bias=False)
    x = torch.randn(T, B, 9) * torch.logspace(0, -45, T).view(T, 1, 1)
    assert ((x != 0) & (x.abs() < 2.0**-126)).any()
    found, peer = results(ours, x), results(theirs, x)
    exact = results(copy.deepcopy(theirs).double(), x.double())
    for name in found:
        for t in range(T):
            one, other, truth = (tensors[name][t].double() for tensors in (found, peer, exact))
            largest = truth.abs().max()
            allowed = 2 * (other - truth).abs().max() + 4 * 2.0**-23 * largest + 16 * SMALLEST
            assert (one - truth).abs().max() <= allowed, f"{name}[{t}], of {largest:.1e}"
            assert (largest < 1e-43) or one.abs().max() > 0, f"{name}[{t}] is flushed"
