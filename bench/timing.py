# SPDX-License-Identifier: BSD-3-Clause
"""How a call is timed: interleaved blocks, medians with quartiles, and when a row counts as lost. Used by runner.py."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

ROUNDS, FEWEST_ROUNDS = 6, 4  # how often each contender's turn comes; fewer for calls of seconds
LONG_ROW = 8  # a row may take this many times its share of time before rounds are left out
SAMPLE_SECONDS = 100e-6  # shorter calls are timed in bunches of about this
QUIET_SLICE_SECONDS = 4e-3
QUIET_LIMIT_SECONDS = 0.1


@dataclass(frozen=True)
class Timing:
    """Seconds per call: the median and the quartiles of its samples."""

    median: float
    q1: float
    q3: float
    samples: int
    calls: int  # in each sample

    @property
    def spread(self) -> float:
        """The interquartile range."""
        return self.q3 - self.q1


def summary(samples: Sequence[float], calls: int = 1) -> Timing:
    """Median and quartiles (linear between samples)."""
    if len(samples) < 2:
        return Timing(samples[0], samples[0], samples[0], len(samples), calls)
    q1, median, q3 = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(median, q1, q3, len(samples), calls)


def is_lost(ours: Timing, peer: Timing) -> bool:
    """Whether we are slower by more than the noise: the two interquartile ranges together."""
    return ours.median - peer.median > ours.spread + peer.spread


def wait_until_quiet() -> None:
    """Returns when this process uses no more CPU: when the workers of the last contender have stopped spinning.

    libgomp's spin for some milliseconds after a parallel region, ONNX Runtime's for some tens; on a machine with few
    cores they would take them from the next contender. Two quiet slices, because CPU time is counted in ticks of 4 ms.
    """
    quiet, start = 0, time.perf_counter()
    while quiet < 2 and time.perf_counter() - start < QUIET_LIMIT_SECONDS:
        used = time.process_time()
        time.sleep(QUIET_SLICE_SECONDS)
        quiet = quiet + 1 if time.process_time() - used < QUIET_SLICE_SECONDS / 8 else 0


def _bunch(function: Callable[[], object], calls: int) -> float:
    """Seconds per call of `calls` calls."""
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) / calls


def interleaved(functions: Mapping[str, Callable[[], object]], seconds: float, threads: int) -> dict[str, Timing]:
    """Times every function in turn, again and again: a machine that changes its speed changes it for all of them.

    A turn is an untimed call, then samples for an equal share of `seconds`; at least FEWEST_ROUNDS samples for each
    function, however long it takes.
    """
    calls, samples_per_turn, round_seconds = {}, {}, 0.0
    for name, function in functions.items():
        function()
        once = _bunch(function, 1)
        if once < SAMPLE_SECONDS:
            once = min(once, _bunch(function, 20))
        calls[name] = max(1, math.ceil(SAMPLE_SECONDS / max(once, 1e-7)))
        turn = seconds / (ROUNDS * len(functions))
        samples_per_turn[name] = max(1, min(50, int(turn / (calls[name] * once))))
        round_seconds += max(turn, once)
    samples: dict[str, list[float]] = {name: [] for name in functions}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(max(FEWEST_ROUNDS, min(ROUNDS, int(LONG_ROW * seconds / round_seconds)))):
            for name, function in functions.items():
                if threads > 1:
                    wait_until_quiet()
                if samples_per_turn[name] > 1 or calls[name] > 1:
                    _bunch(function, calls[name])
                samples[name] += [_bunch(function, calls[name]) for _ in range(samples_per_turn[name])]
    finally:
        if collecting:
            gc.enable()
    return {name: summary(found, calls[name]) for name, found in samples.items()}
