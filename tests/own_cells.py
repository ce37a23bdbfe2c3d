# SPDX-License-Identifier: BSD-3-Clause
"""The cells of examples/own_cell for the tests: compiled once for all processes, for plain C++ and what this machine
has; and random layers of them."""

from __future__ import annotations

import os
import shutil
import types
from functools import cache

import pytest
import torch
from load_example import EXAMPLES, load_example
from torch import Tensor

from fastrnn import extension

ROOT = EXAMPLES.parent
BUILT = ROOT / "build" / "own_cells"  # ninja finds there what an earlier run compiled
CELLS = ("MinimalGatedUnit", "PeepholeLSTM")


def missing() -> str:
    """Why no cell can be compiled here; empty if one can."""
    if extension.module is None:
        return f"the extension is not loaded: {extension.reason}"
    compiler = os.environ.get("CXX", "c++").split()[0]
    return "" if shutil.which(compiler) else f"there is no compiler {compiler}"


@cache
def own_cells() -> types.ModuleType:
    """examples/own_cell/own_cells.py; the test is skipped where it cannot be compiled."""
    if missing():
        pytest.skip(missing())
    before, isa = os.environ.get("TORCH_EXTENSIONS_DIR"), extension.module.isa()
    os.environ["TORCH_EXTENSIONS_DIR"] = str(BUILT)
    extension.module.select_isa(extension.module.available_isas()[-1])  # whatever the test runs on
    try:
        return load_example("own_cell/own_cells")
    finally:
        extension.module.select_isa(isa)
        del os.environ["TORCH_EXTENSIONS_DIR"]
        if before is not None:
            os.environ["TORCH_EXTENSIONS_DIR"] = before


def layer(
    cell: str,
    T: int = 5,
    B: int = 3,
    I: int = 4,  # noqa: E741  the dimension's name everywhere in fastrnn
    H: int = 7,
    D: int = 1,
    bias: bool = True,
    dtype: torch.dtype = torch.float64,
) -> tuple[object, Tensor, list[Tensor], list[Tensor | None]]:
    """The cell, x, states and weights, all random."""
    own = getattr(own_cells(), cell).cell
    states = [torch.rand(D, B, H, dtype=dtype) * 2 - 1 for _ in range(own.states)]
    weights: list[Tensor | None] = []
    for _ in range(D):
        bound = H**-0.5
        shapes = [(own.gates * H, I), (own.gates * H, H), (own.gates * H,), (own.gates * H,)]
        made = [torch.empty(shape, dtype=dtype).uniform_(-bound, bound) for shape in shapes]
        weights += made if bias else [*made[:2], None, None]
        if own.parameters:
            weights.append(torch.rand(own.parameters * H, dtype=dtype) - 0.5)
    return own, torch.randn(T, B, I, dtype=dtype), states, weights
