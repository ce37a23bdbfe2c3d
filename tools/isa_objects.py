# SPDX-License-Identifier: BSD-3-Clause
"""Finds the objects that setup.py compiled and reads their symbols; used by the checks of this directory."""

import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build/ninja"


class Symbol(NamedTuple):
    """One defined symbol: nm's letter for its kind, and its name."""

    kind: str
    name: str


def objects() -> list[Path]:
    """Every object of the extension, ISA objects among them."""
    found = sorted((BUILD / "csrc").rglob("*.o"))
    return found or sys.exit(f"no objects under {BUILD}: build the extension first (make test)")


def isa_objects() -> list[Path]:
    """The objects of csrc/cpu/isa, compiled for one instruction set each."""
    return [path for path in objects() if path.parent.name == "isa"]


def symbols(path: Path, *, demangle: bool = False) -> list[Symbol]:
    """What `path` defines."""
    command = ["nm", "--defined-only", "--format=posix", *(["--demangle"] if demangle else []), str(path)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    # Posix format: name, kind, value, size; a demangled name may hold spaces.
    return [Symbol(kind=kind, name=name) for name, kind, *_ in (line.rsplit(maxsplit=3) for line in lines)]
