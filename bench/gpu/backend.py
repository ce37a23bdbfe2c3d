# SPDX-License-Identifier: BSD-3-Clause
"""A device to measure on: how a call is timed, captured and described there. Used by runner.py and __main__.py.

`Cuda` is the GPU; `Cpu` stands in for it where there is none, so that all of the program but this file can be tested:
its clock is the processor's, and what it captures is the function itself.
"""

from __future__ import annotations

import contextlib
import math
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping

import torch

import fastrnn

from .. import machine
from ..timing import Timing, summary
from .cudnn import Card
from .floor import Limits, limits

WARM_UPS = 10
ROUNDS = 6  # how often each contender's turn comes
MOST_SAMPLES = 20  # in a turn
SAMPLE_SECONDS = 200e-6  # shorter calls are timed in bunches of about this: an event resolves half a microsecond
MATMUL_SIZE = 8192
COPY_BYTES = 4 << 30


class Cpu:
    """The stand-in."""

    name = "cpu"
    device = torch.device("cpu")
    card: Card | None = None
    limits: Limits | None = None

    def synchronize(self) -> None:
        """Nothing is under way."""

    def sample(self, function: Callable[[], object], calls: int) -> float:
        """Seconds per call of `calls` calls."""
        start = time.perf_counter()
        for _ in range(calls):
            function()
        return (time.perf_counter() - start) / calls

    def captured(self, function: Callable[[], object]) -> tuple[Callable[[], object], object]:
        """The function, and the result of one call: there are no graphs."""
        return function, function()

    def free(self) -> None:
        """Nothing is kept."""

    def describe(self) -> dict[str, object]:
        """What a reader of the figures needs to know about card and software."""
        return {"card": "none: the CPU stands in", **_software()}

    def ceilings(self) -> dict[str, float]:
        """Rates of this device in this run; not measured."""
        return {}


class Cuda:
    """The current CUDA device, on the current stream."""

    name = "cuda"

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        found = torch.cuda.get_device_properties(self.device)
        self.card: Card | None = Card(found.major, found.minor, found.multi_processor_count)
        self.limits: Limits | None = limits(found.name)

    def synchronize(self) -> None:
        """Waits for everything under way; an error of a kernel is raised here."""
        torch.cuda.synchronize(self.device)

    def sample(self, function: Callable[[], object], calls: int) -> float:
        """Seconds per call of `calls` calls, between two events on the current stream."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / calls

    def captured(self, function: Callable[[], object]) -> tuple[Callable[[], object], object]:
        """(the replay of a CUDA graph of one call, the result that each replay overwrites)."""
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(3):  # libraries allocate their workspaces outside the graph
                function()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        self.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            result = function()
        return graph.replay, result

    def free(self) -> None:
        """Gives memory back between rows, so that a large one finds it in one piece."""
        torch.cuda.empty_cache()

    def describe(self) -> dict[str, object]:
        """What a reader of the figures needs to know about card and software."""
        found = torch.cuda.get_device_properties(self.device)
        return {
            "card": found.name,
            "capability": f"{found.major}.{found.minor}",
            "multiprocessors": found.multi_processor_count,
            "memory_bytes": found.total_memory,
            "l2_bytes": getattr(found, "L2_cache_size", None),
            "driver": _driver("driver_version"),
            "clocks": _driver("clocks.sm,clocks.mem,clocks.max.sm"),
            "gpus": torch.cuda.device_count(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            **_software(),
        }

    def ceilings(self) -> dict[str, float]:
        """FLOP/s of a large product for each mode, and bytes/s of a large copy (read and written), in this run."""
        found = {}
        for mode, dtype in (("bfloat16", torch.bfloat16), ("float16", torch.float16), ("tf32", torch.float32)):
            with arithmetic(mode):
                a, b = (torch.randn(MATMUL_SIZE, MATMUL_SIZE, device=self.device, dtype=dtype) for _ in range(2))
                found[mode] = 2 * MATMUL_SIZE**3 / self._best(lambda a=a, b=b: a @ b)
        with arithmetic("float32"):
            a, b = (torch.randn(MATMUL_SIZE, MATMUL_SIZE, device=self.device) for _ in range(2))
            found["float32"] = 2 * MATMUL_SIZE**3 / self._best(lambda: a @ b)
        source = torch.empty(COPY_BYTES // 4, device=self.device).normal_()
        target = torch.empty_like(source)
        found["copy"] = 2 * COPY_BYTES / self._best(lambda: target.copy_(source))
        self.free()
        return found

    def _best(self, function: Callable[[], object]) -> float:
        self.sample(function, 3)
        return min(self.sample(function, 3) for _ in range(3))


Backend = Cpu | Cuda


@contextlib.contextmanager
def arithmetic(mode: str) -> Iterator[None]:
    """float32 products exact in the modes float32 and float64, for torch.nn with and without cuDNN alike. In every
    other they may use TF32, as by default: cuDNN leaves the matrix units where they may not, also for bfloat16."""
    settings = (torch.backends.cudnn.rnn, torch.backends.cudnn.conv, torch.backends.cuda.matmul)
    before = [setting.fp32_precision for setting in settings]
    for setting in settings:
        setting.fp32_precision = "ieee" if mode in ("float32", "float64") else "tf32"
    try:
        yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.fp32_precision = value


def interleaved(backend: Backend, functions: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, Timing]:
    """Times every function in turn, again and again, `seconds` each: a card that changes its clock does so for all.

    Each has WARM_UPS calls first and one in each turn; at least ROUNDS samples, however long a call takes.
    """
    calls, in_a_turn = {}, {}
    for name, function in functions.items():
        for _ in range(WARM_UPS):
            function()
        backend.synchronize()
        once = max(backend.sample(function, 3), 1e-7)
        calls[name] = max(1, math.ceil(SAMPLE_SECONDS / once))
        in_a_turn[name] = max(1, min(MOST_SAMPLES, int(seconds / (ROUNDS * calls[name] * once))))
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(ROUNDS):
        for name, function in functions.items():
            function()
            backend.synchronize()
            samples[name] += [backend.sample(function, calls[name]) for _ in range(in_a_turn[name])]
    return {name: summary(found, calls[name]) for name, found in samples.items()}


def _software() -> dict[str, object]:
    return {
        "torch": str(torch.__version__),
        "fastrnn": fastrnn.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": machine.describe()["cpu"],
    }


def _driver(query: str) -> str:
    """One answer of nvidia-smi for the first GPU, empty where it does not answer."""
    if shutil.which("nvidia-smi") is None:
        return ""
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout else ""
