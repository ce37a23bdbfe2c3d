# SPDX-License-Identifier: BSD-3-Clause
"""Processes, threads, signals and the floating-point mode: the programs of programs.py, each in a process of its own.

A program that hangs is ended, and fails.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import programs
import pytest
from apart import HANGING, run_apart

pytestmark = pytest.mark.usefixtures("compiled")


def run(_rank: int, name: str) -> None:
    getattr(programs, name)()


@pytest.mark.parametrize("name", [program.__name__ for program in programs.PROGRAMS])
def test_program(name):
    run_apart(run, name)


def test_fewer_threads_than_planned_are_enough():
    environment = os.environ | {"OMP_THREAD_LIMIT": "3"}  # read by the runtime as it is loaded
    command = [sys.executable, Path(programs.__file__), "fewer_threads_than_planned"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANGING)
    assert result.returncode == 0, result.stderr
