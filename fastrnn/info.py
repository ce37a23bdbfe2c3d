# SPDX-License-Identifier: BSD-3-Clause
"""`python -m fastrnn info`: what this installation can do, why not more, and a self-test against torch.nn."""

from __future__ import annotations

import importlib
import os
import platform
import time
from types import ModuleType

import torch

from . import __version__, extension, functional, tiers


def main() -> int:
    """Prints the report; returns 1 if the self-test fails, else 0."""
    lines = report()
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        print(f"{name:<{width}}  {value}", flush=True)
    started = time.perf_counter()
    failures = self_test()
    took = f"{time.perf_counter() - started:.1f} s"
    print(f"{'self-test':<{width}}  {'; '.join(failures) or 'passed: outputs and gradients equal torch.nn'} ({took})")
    return 1 if failures else 0


def report() -> list[tuple[str, str]]:
    """The facts, as pairs of a name and a value."""
    build, module = _build(), extension.module
    lines = [
        ("fastrnn", f"{__version__}, Python {platform.python_version()}, {platform.platform()}"),
        ("torch", _torch(build)),
        ("extension", "loaded" if module is not None else f"not loaded: {extension.reason}"),
        ("C++ ABI", f"_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"),
    ]
    if module is None:
        lines.append(("what to do", extension.ADVICE))
    if build is not None:
        lines.append(("flags", build.FLAGS if isinstance(build.FLAGS, str) else " ".join(build.FLAGS)))
    if module is not None:
        lines += [
            ("compiler", module.compiler()),
            ("instruction set", f"{module.isa()}, of {' '.join(module.available_isas())}"),
        ]
    lines += [
        ("FASTRNN_ISA", os.environ.get("FASTRNN_ISA", "not set")),
        ("threads", f"{torch.get_num_threads()} of {os.cpu_count()} CPUs"),
        ("OpenMP", _openmp(module)),
        ("CUDA", _cuda(build)),
    ]
    return lines


def compiled() -> ModuleType | None:
    """The compiled module, or None without it, for facts about the build and the CPU.

    isa() and available_isas() name instruction sets, compiler() and openmp_runtimes() tell of the build,
    fma_peak(double_precision) measures the calling thread's peak in GFLOP/s, read_bandwidth(bytes) its reads in GB/s,
    round_time() the ns that torch's threads take to meet.
    """
    return extension.module


def _build() -> ModuleType | None:
    try:
        return importlib.import_module("fastrnn._build")
    except ImportError:
        return None


def _torch(build: ModuleType | None) -> str:
    running = f"{torch.__version__} running"
    if build is None:
        return f"{running}, nothing built"
    fault = extension.mismatch(build.TORCH_VERSION, build.CXX11_ABI)
    return f"{running}, {build.TORCH_VERSION} built for: {'they match' if fault is None else 'they do NOT match'}"


def _openmp(module: ModuleType | None) -> str:
    if module is None:
        return "unknown, the extension is not loaded"
    runtimes = module.openmp_runtimes()
    listed = ", ".join(runtimes) or "none"
    if len(runtimes) > 1:
        return f"WARNING: {len(runtimes)} runtimes in one process, their threads compete: {listed}"
    return listed


def _cuda(build: ModuleType | None) -> str:
    built = getattr(build, "CUDA", "not built")
    if torch.version.cuda is None:
        return f"{built}; the running torch has no CUDA either"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    code = f"tier {tiers.forced()}" if tiers.has_kernels() else "torch.nn's code is used"
    return f"{built}; torch is built for CUDA {torch.version.cuda} and finds {device}: {code}"


def self_test() -> list[str]:
    """Every cell, float32 and float64, forward and backward, against torch.nn; the failures, none if all is well."""
    failures = []
    generator = torch.Generator().manual_seed(0)
    for name, gates, layer, stock in (
        ("LSTM", 4, functional.lstm, torch.nn.LSTM),
        ("GRU", 3, functional.gru, torch.nn.GRU),
        ("RNN", 1, functional.rnn, torch.nn.RNN),
    ):
        for dtype, tolerance in ((torch.float32, 1e-4), (torch.float64, 1e-12)):
            I, H = 10, 19  # noqa: E741  no multiples of a vector's width
            module = stock(I, H, dtype=dtype)
            shapes = ((gates * H, I), (gates * H, H), (gates * H,), (gates * H,))
            with torch.no_grad():
                for parameter, shape in zip(module.parameters(), shapes, strict=True):
                    parameter.copy_((torch.rand(shape, generator=generator, dtype=torch.float64) - 0.5) * 0.5)
            x = torch.randn((5, 3, I), generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
            cotangent = torch.randn((5, 3, H), generator=generator, dtype=torch.float64).to(dtype)
            inputs = [x, *module.parameters()]
            try:
                results = []
                for y in (layer(x, weights=tuple(module.parameters()))[0], module(x)[0]):
                    results.append([y, *torch.autograd.grad(y, inputs, cotangent)])
                worst = max((a - b).abs().max().item() for a, b in zip(*results, strict=True))
            except Exception as error:  # the report must reach the reader whatever is broken
                failures.append(f"FAILED: {name} {dtype}: {error}")
                continue
            if not worst <= tolerance:
                failures.append(f"FAILED: {name} {dtype} differs from torch.nn by {worst:.3g}, allowed {tolerance:.3g}")
    return failures
