# SPDX-License-Identifier: BSD-3-Clause
"""The rule that every result of fastrnn is held to, whatever the dtype, ISA or shape."""

from __future__ import annotations

import torch
from torch import Tensor


def error(result: Tensor, exact: Tensor) -> float:
    """The largest absolute difference to the float64 result."""
    return (result.detach().double() - exact.detach().double()).abs().max().item() if exact.numel() else 0.0


def bound(peer: Tensor, exact: Tensor) -> float:
    """How far a result may be from float64, given torch's result in the same dtype: twice torch's error, and a floor
    of 4 units in the last place of the largest entry, where torch happens to be nearly exact. The floor for float64 is
    32, since `exact` then is the peer itself, whose error is of the same order as ours and not seen."""
    largest = exact.detach().abs().max().item() if exact.numel() else 0.0
    floor = 32 if peer.dtype is torch.float64 else 4
    return 2 * error(peer, exact) + floor * torch.finfo(peer.dtype).eps * largest


def assert_accurate(ours: Tensor, peer: Tensor, exact: Tensor, name: str) -> None:
    """err(ours, float64) <= 2 * err(torch in the same dtype, float64) + 4 * eps * max|float64|."""
    assert ours.shape == exact.shape, f"{name}: shape {tuple(ours.shape)}, expected {tuple(exact.shape)}"
    assert ours.dtype == peer.dtype, f"{name}: dtype {ours.dtype}, expected {peer.dtype}"
    ours_error, allowed = error(ours, exact), bound(peer, exact)
    assert ours_error <= allowed, (
        f"{name}: error {ours_error:.3g} is above {allowed:.3g}; torch's own error is {error(peer, exact):.3g}"
    )
