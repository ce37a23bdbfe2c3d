# SPDX-License-Identifier: BSD-3-Clause
"""The machine under the benchmark: its description, and its roofline measured in the same run. Used by runner.py.

The roofline comes from two functions of the extension (csrc/cpu/roofline.h). Where they are missing, every figure that
needs them is "not measured"; nothing is estimated.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import subprocess
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

import fastrnn
from fastrnn import info

KIB = 1024
BANDWIDTH_SIZES = tuple(KIB * 4**n for n in range(2, 9))  # bytes per thread, 16 KB to 64 MB
# What makes the same machine give other figures; recorded when set.
ENVIRONMENT = (
    *("FASTRNN_ISA", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "MKL_NUM_THREADS"),
    *("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "OMP_PROC_BIND", "OMP_PLACES", "GOMP_SPINCOUNT", "GOMP_CPU_AFFINITY"),
    *("KMP_BLOCKTIME", "KMP_AFFINITY", "MALLOC_CONF"),
)


def isa() -> str:
    """The instruction set of fastrnn's kernels, or "none" without them."""
    module = info.compiled()
    return module.isa() if module is not None else "none"


def checkout() -> Path:
    """The root of the source tree that this package lies in, or the working directory for an installed wheel."""
    root = Path(__file__).resolve().parent.parent
    return root if (root / "csrc").is_dir() else Path.cwd()


def commit() -> str:
    """The commit of the source tree, with + when a tracked file differs from it; empty outside git."""

    def git(*arguments: str) -> str:
        try:
            done = subprocess.run(["git", *arguments], cwd=checkout(), capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    if not (checkout() / "csrc").is_dir():
        return ""
    head = git("rev-parse", "--short=12", "HEAD")
    return head + ("+" if head and git("status", "--porcelain", "--untracked-files=no") else "")


def _first_line(path: str, key: str = "") -> str:
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[-1].strip() for line in lines if line.startswith(key)), "")


def _cpu() -> str:
    name = _first_line("/proc/cpuinfo", "model name") or platform.processor() or platform.machine()
    numbers = [_first_line("/proc/cpuinfo", key) for key in ("cpu family", "model\t", "stepping")]
    return f"{name} (family {numbers[0]}, model {numbers[1]}, stepping {numbers[2]})" if all(numbers) else name


def _caches() -> dict[str, str]:
    """Level and type of each cache of the first core, with its size as the kernel prints it."""
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = (_first_line(str(index / name)) for name in ("level", "type", "size"))
        if kind != "Instruction":
            found[f"L{level}"] = size
    return found


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def cores() -> int:
    """How many threads torch would use by itself: what --threads all means."""
    return torch.get_num_threads()


def describe() -> dict[str, object]:
    """Everything about the machine and the software that a reader of the figures needs; no path of this machine."""
    module = info.compiled()
    packages = ("onnxruntime", "onnx", "numpy", "matplotlib")
    return {
        "cpu": _cpu(),
        "logical_cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "caches": _caches(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "isa": isa(),
        "compiler": module.compiler() if module is not None else "",
        "openmp": sorted({Path(p).name for p in module.openmp_runtimes()}) if module is not None else [],
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "onednn": bool(torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "fastrnn": fastrnn.__version__,
        **{package: _version(package) for package in packages},
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
    }


@dataclass
class Roofline:
    """What the machine can do at best, all given threads together; empty where it was not measured."""

    fma: dict[int, float] = field(default_factory=dict)  # threads -> GFLOP/s
    bandwidth: dict[int, dict[int, float]] = field(default_factory=dict)  # threads -> bytes per thread -> GB/s

    def fma_seconds(self, flops: float, threads: int) -> float | None:
        """The least time for this many operations, by arithmetic."""
        return flops / (self.fma[threads] * 1e9) if threads in self.fma else None

    def cache_seconds(self, bytes_read: float, steps: int, threads: int) -> float | None:
        """The least time to read the same `bytes_read` at each of `steps` steps, cut in equal slices for the threads.

        Bandwidth at the size of a slice, interpolated over the logarithm of the size. A kernel can be somewhat faster:
        what it read last is still in a nearer cache when it walks back.
        """
        if threads not in self.bandwidth:
            return None
        curve = sorted(self.bandwidth[threads].items())
        size = bytes_read / threads
        below = max((point for point in curve if point[0] <= size), default=curve[0])
        above = min((point for point in curve if point[0] >= size), default=curve[-1])
        rate = below[1]
        if above[0] != below[0]:
            share = math.log(size / below[0]) / math.log(above[0] / below[0])
            rate = below[1] ** (1 - share) * above[1] ** share
        return bytes_read * steps / (rate * 1e9)


def _together(threads: int, measure: Callable[[], float]) -> float:
    """The sum of what `threads` threads measure at the same time."""
    found = [0.0] * threads
    start = threading.Barrier(threads)

    def work(n: int) -> None:
        start.wait()
        found[n] = measure()

    team = [threading.Thread(target=work, args=(n,)) for n in range(threads)]
    for thread in team:
        thread.start()
    for thread in team:
        thread.join()
    return sum(found)


def measure_peak(threads: int, dtype: torch.dtype) -> float | None:
    """GFLOP/s of so many threads together, in 25 ms; float32's for 16-bit types. None where it cannot be measured."""
    module = info.compiled()
    if not hasattr(module, "fma_peak"):
        return None
    return _together(threads, lambda: module.fma_peak(dtype == torch.float64))


def measure_round(threads: int) -> float | None:
    """ns for a cache line from core to core, as threads wait for each other. None for one, or where it cannot be
    measured."""
    module = info.compiled()
    return module.round_time() if threads > 1 and hasattr(module, "round_time") else None


def measure_roofline(threads: list[int], dtype: torch.dtype) -> Roofline:
    """Peak and bandwidth for each thread count, at the start of a run; 25 ms a figure."""
    module, roofline = info.compiled(), Roofline()
    if not hasattr(module, "read_bandwidth"):
        return roofline
    for count in threads:
        peak = measure_peak(count, dtype)
        roofline.fma |= {count: peak} if peak else {}
        roofline.bandwidth[count] = {
            size: _together(count, lambda size=size: module.read_bandwidth(size)) for size in BANDWIDTH_SIZES
        }
    return roofline
