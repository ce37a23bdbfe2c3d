# SPDX-License-Identifier: BSD-3-Clause
"""Layers so large that the kernels take another way: sums in passes over a panel, and W_hh larger than 8 MB, which few
rows fetch ahead (csrc/cpu/matmul.h), or weights larger than 1 MB, which the backward of a single step reads from one
end to the other. Results are torch.nn's, and the bits those of every other way to call them."""

from __future__ import annotations

import pytest
import torch
from twins import assert_as_accurate, like, random_state, tensors_of, twins

import fastrnn

pytestmark = pytest.mark.usefixtures("isa")

# cell, I, H, P, B, dtype; T = 3, so that steps run on packed weights in both directions of the walk over panels
CASES = {
    "rnn of 8 MB": ("rnn_tanh", 20, 1460, 0, 2, torch.float32),
    "lstm of 8 MB": ("lstm", 20, 730, 0, 1, torch.float32),
    "lstm of 8 MB, 3 rows": ("lstm", 20, 730, 0, 3, torch.float32),
    "gru of 8 MB in float64": ("gru", 20, 600, 0, 2, torch.float64),
    "passes over W_ih and W_hr": ("lstm", 400, 400, 390, 17, torch.float32),
    "passes of one lane": ("rnn_tanh", 12, 1600, 0, 9, torch.float64),
    "passes of one lane in float32": ("rnn_relu", 12, 3100, 0, 9, torch.float32),
}


@pytest.mark.parametrize("name", CASES)
def test_results_are_torchs_and_bits_do_not_depend_on_the_call(name, threads):
    cell, features, units, projected, batch, dtype = CASES[name]
    options = {"proj_size": projected} if projected else {}
    ours, theirs = twins(cell, features, units, dtype=dtype, **options)
    x = torch.randn(3, batch, features, dtype=dtype)
    hx = random_state(cell, 1, batch, H=units, P=projected, dtype=dtype)
    threads(1)
    assert_as_accurate(ours, theirs, x, hx)
    expected = tensors_of(ours(x, hx))
    with torch.inference_mode():
        found = [tensors_of(ours(x, hx))]
        threads(2, "units")
        found.append(tensors_of(ours(x, hx)))
        with fastrnn.prepacked(ours):
            found.append(tensors_of(ours(x, hx)))
    for outputs in found:
        assert all(map(torch.equal, outputs, expected))


# cell, I, H, P, directions, dtype: W_ih or W_hh has more than 1 MB
SHORT = {
    "lstm": ("lstm", 530, 130, 0, 1, torch.float32),
    "lstm, two directions": ("lstm", 250, 270, 0, 2, torch.float32),
    "lstm with a projection": ("lstm", 200, 300, 280, 1, torch.float32),
    "gru in float64": ("gru", 310, 220, 0, 1, torch.float64),
    "rnn": ("rnn_tanh", 500, 600, 0, 1, torch.float32),
    "rnn in float16": ("rnn_relu", 500, 600, 0, 1, torch.float16),
}


@pytest.mark.parametrize("rows", [1, 3, 20])
@pytest.mark.parametrize("name", SHORT)
def test_gradients_of_few_rows_are_those_of_many(name, rows, threads):
    """Few rows read weights row by row, and write their gradients so: all gradients have the bits that they have among
    many rows, and on two threads."""
    cell, features, units, projected, directions, dtype = SHORT[name]
    options = {"proj_size": projected} if projected else {}
    ours, theirs = twins(cell, features, units, dtype=dtype, bidirectional=directions == 2, **options)
    x = torch.randn(1, 300, features).to(dtype)
    cotangent = torch.randn(1, 300, (projected or units) * directions).to(dtype)
    hx = random_state(cell, directions, 300, H=units, P=projected, dtype=dtype)
    few = x[:, :rows], like(hx, lambda state: state[:, :rows]), cotangent[:, :rows]
    threads(1)
    if dtype is not torch.float16:
        assert_as_accurate(ours, theirs, *few[:2])
    cotangent[:, rows:] = 0  # so that the other rows add nothing to the gradients of weights
    many, one = gradients(ours, x, hx, cotangent), gradients(ours, *few)
    for split in ("rows", "units"):
        threads(2, split)
        two = gradients(ours, *few)
        assert all(torch.equal(one[key], two[key]) for key in one)
    for key in one:
        assert torch.equal(one[key], many[key][:, :rows] if key in ("d_x", "d_h0", "d_c0") else many[key]), key


def gradients(module, x, hx, cotangent):
    x, hx = (like(argument, lambda t: t.detach().requires_grad_()) for argument in (x, hx))
    leaves = dict(zip(("d_x", "d_h0", "d_c0"), tensors_of((x, hx)), strict=False)) | dict(module.named_parameters())
    return dict(zip(leaves, torch.autograd.grad(module(x, hx)[0], list(leaves.values()), cotangent), strict=True))
