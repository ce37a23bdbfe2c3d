# SPDX-License-Identifier: BSD-3-Clause
"""Layers so large that the kernels take another way: sums in passes over a panel, and W_hh larger than 8 MB, which few
rows fetch ahead (csrc/cpu/matmul.h). Results are torch.nn's, and the bits those of every other way to call them."""

from __future__ import annotations

import pytest
import torch
from twins import assert_as_accurate, random_state, tensors_of, twins

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
