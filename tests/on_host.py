# SPDX-License-Identifier: BSD-3-Clause
"""The layers of csrc/cuda on the host, for the tests: builds tests/cuda_host once and calls its operators by name.

The loops over time, the arithmetic of sizes and pointers, the bodies of the kernels and how threads share them are the
files that run on a GPU; products and launches are loops. Built into build/cuda_host, again when a source changes.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from samples import Sample, cotangents
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("csrc/cuda/sweep.cpp", "csrc/cuda/layer.cpp", "tests/cuda_host/machine.cpp")
TORCH = Path(torch.__file__).parent
CXX = shlex.split(os.environ.get("CXX", "c++"))
FLAGS = ["-O1", "-std=c++20", "-ffp-contract=off", "-fPIC", "-Wall", "-Wextra", "-Werror", "-I", str(ROOT / "csrc")]
FLAGS += ["-isystem", str(TORCH / "include"), f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
RESULTS = {
    "lstm_layer": ("y", "h_n", "c_n", "gates", "cells"),
    "gru_layer": ("y", "h_n", "gates"),
    "rnn_layer": ("y", "h_n"),
}


@functools.cache
def operators() -> Any:
    """torch.ops.fastrnn_on_host; the test is skipped where there is no compiler."""
    if shutil.which(CXX[0]) is None:
        pytest.skip(f"no C++ compiler: {CXX[0]}")
    files = sorted([*(ROOT / "csrc").rglob("*.h"), *(ROOT / "csrc").rglob("*.cuh"), *(ROOT / s for s in SOURCES)])
    key = hashlib.sha256(f"{torch.__version__} {CXX} {FLAGS}".encode())
    for file in files:
        key.update(file.read_bytes())
    library = ROOT / "build/cuda_host" / f"{key.hexdigest()[:16]}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            objects = [f"{folder}/{k}.o" for k in range(len(SOURCES))]
            commands = [[*CXX, *FLAGS, "-c", s, "-o", o] for s, o in zip(SOURCES, objects, strict=True)]
            linked = f"{folder}/linked.so"
            libraries = [f"-L{TORCH / 'lib'}", "-lc10", "-ltorch_cpu", "-ltorch"]
            for command in (*commands, [*CXX, "-shared", *objects, "-o", linked, *libraries]):
                done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
                assert done.returncode == 0, done.stderr[:4000]
            shutil.copy2(linked, f"{library}.{os.getpid()}")
            os.replace(f"{library}.{os.getpid()}", library)
    torch.ops.load_library(library)
    return torch.ops.fastrnn_on_host


def call(operator: str, values: dict[str, Any]) -> tuple[Tensor, ...]:
    """Calls an operator with the values that its schema names; an argument that is missing is None."""
    overload = getattr(operators(), operator).default
    return overload(*(values.get(argument.name) for argument in overload._schema.arguments))


def given(layer: Sample) -> dict[str, Any]:
    """The layer as arguments of its operator."""
    values = dict(zip(layer.names(), layer.tensors(), strict=False))
    return values | {"batch_sizes": layer.batch_sizes, "relu": layer.cell == "rnn_relu"}


def forward(layer: Sample, save: bool = True, **more: Any) -> dict[str, Tensor]:
    found = call(layer.operator, given(layer) | {"save": save} | more)
    return dict(zip(RESULTS[layer.operator], found, strict=True))


def backward_values(layer: Sample, **more: Any) -> dict[str, Any]:
    """Arguments of the backward operator with random cotangents of y, the final states and, of an LSTM, every c."""
    results = forward(layer, **{k: v for k, v in more.items() if k != "needs"})
    values = given(layer) | {name: results.get(name) for name in ("y", "gates", "cells")}
    names = [name for name in ("y", "h_n", "c_n", "cells") if name in results]
    values |= {f"d_{n}": g for n, g in zip(names, cotangents([results[n] for n in names]), strict=True)}
    return values | {"needs": (1 << (15 if layer.cell == "lstm" else 11)) - 1} | more


def backward(layer: Sample, **more: Any) -> dict[str, Tensor]:
    """The gradients by the name of their tensor, without those of tensors that are not given."""
    operator = f"{layer.operator}_backward"
    values = backward_values(layer, **more)
    schema = getattr(operators(), operator).default._schema
    found = zip((result.name.removeprefix("d_") for result in schema.returns), call(operator, values), strict=True)
    return {name: gradient for name, gradient in found if values.get(name) is not None}
