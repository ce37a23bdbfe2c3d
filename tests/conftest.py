# SPDX-License-Identifier: BSD-3-Clause
"""Fixtures of all tests: the instruction sets of this machine, and a fixed seed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fastrnn import extension


def _isas() -> list[object]:
    if extension.module is None:
        reason = f"the extension is not loaded: {extension.reason}"
        return [pytest.param("none", marks=pytest.mark.skip(reason=reason))]
    return list(extension.module.available_isas())


@pytest.fixture(params=_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The test once for each instruction set that this machine has; the one chosen before is restored."""
    before = extension.module.isa()
    extension.module.select_isa(request.param)
    yield request.param
    extension.module.select_isa(before)


@pytest.fixture
def compiled() -> object:
    """The module fastrnn._C; the test is skipped where it is not loaded."""
    if extension.module is None:
        pytest.skip(f"the extension is not loaded: {extension.reason}")
    return extension.module


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
