# SPDX-License-Identifier: BSD-3-Clause
"""What test_cuda.py needs of a GPU, and a stand-in for it: the CPU, with streams and graphs that are none.

On a machine without a GPU the tests run on the stand-in: that proves their Python and nothing about CUDA.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor


class StandIn:
    """The CPU in the place of a GPU."""

    name = "stand-in"
    device = torch.device("cpu")

    @contextlib.contextmanager
    def busy_stream(self) -> Iterator[None]:
        """No stream."""
        yield

    def captured(self, function: Callable[[], object]) -> Callable[[], object]:
        """No graph: the results of the first call, overwritten by each further one."""
        kept = function()

        def replay() -> object:
            for old, new in zip(kept, function(), strict=True):
                old.data.copy_(new)
            return kept

        return replay

    @contextlib.contextmanager
    def without_synchronisation(self) -> Iterator[None]:
        """Nothing to forbid."""
        yield

    def synchronize(self) -> None:
        """Nothing is under way."""


class Gpu:
    """The current CUDA device."""

    name = "cuda"

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())

    @contextlib.contextmanager
    def busy_stream(self) -> Iterator[None]:
        """A stream of its own as the current one, with work before the block that takes tens of milliseconds: what
        runs on another stream in the block runs too early."""
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            torch.cuda._sleep(100_000_000)  # cycles
            yield
        torch.cuda.current_stream(self.device).wait_stream(stream)

    def captured(self, function: Callable[[], tuple[Tensor, ...]]) -> Callable[[], object]:
        """A CUDA graph of one call: each replay overwrites the results that it returns."""
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(3):
                function()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        self.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            kept = function()

        def replay() -> object:
            graph.replay()
            return kept

        return replay

    @contextlib.contextmanager
    def without_synchronisation(self) -> Iterator[None]:
        """A block in which torch raises where it waits for the device."""
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def synchronize(self) -> None:
        """Waits; an error of a kernel is raised here."""
        torch.cuda.synchronize(self.device)
