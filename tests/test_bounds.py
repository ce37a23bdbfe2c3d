# SPDX-License-Identifier: BSD-3-Clause
"""Kernels read and write nothing beside their arguments: guarded.py, in a process of its own for each vector code."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from apart import HANGING

PROGRAM = Path(__file__).with_name("guarded.py")
# The byte behind, or before, an argument.
TOUCH = """
import ctypes, torch
from guarded import Guards
at_end = {at_end}
tensor = Guards(at_end).copy(torch.ones(5, dtype=torch.float64))
assert tensor.sum() == 5
ctypes.string_at(tensor.data_ptr() + (tensor.nbytes if at_end else -1), 1)
"""


@pytest.mark.parametrize("code", ["avx2", "avx512", "avx512_bf16", "amx"])
def test_nothing_beside_an_argument_is_touched(code, compiled):
    if code not in compiled.available_isas():
        pytest.skip(f"this machine has no {code}")
    done = subprocess.run([sys.executable, PROGRAM, code], capture_output=True, text=True, timeout=HANGING)
    assert (done.returncode, done.stdout) == (0, "2016 calls\n"), done.stderr


@pytest.mark.parametrize("at_end", [True, False])
def test_guards_guard(at_end):
    command = [sys.executable, "-c", TOUCH.format(at_end=at_end)]
    done = subprocess.run(command, cwd=PROGRAM.parent, capture_output=True, text=True, timeout=HANGING)
    assert done.returncode == -signal.SIGSEGV, done.stderr
