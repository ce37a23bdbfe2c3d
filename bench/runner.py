# SPDX-License-Identifier: BSD-3-Clause
"""Measures the rows: checks the numbers of a problem, then times it against its peers. Called by __main__.py."""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass

import torch
from torch import nn

import fastrnn

from . import machine
from .check import Outputs, WrongNumbersError, distance, worst_excess
from .machine import Roofline
from .peers import ONNX_RUNTIME, TORCH, OnnxContender, Problem, TorchContender, make_problem, onnx_runtime_missing
from .shapes import CALLS, PASSES, SHAPES, Shape
from .timing import Timing, interleaved, is_lost, wait_until_quiet

OURS = "fastrnn"
Row = dict[str, object]
# What a peer with its own approximations of tanh and sigmoid may differ by: enough to know that it computed the same.
PEER_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Task:
    """One problem, to be measured at some thread counts; each gives a row."""

    shape: Shape
    cell: str
    pass_: str
    threads: tuple[int, ...]


def plan(
    *,
    full: bool,
    cells: Iterable[str],
    passes: Iterable[str],
    threads: Iterable[int],
    patterns: Iterable[str] = (),
    shapes: Iterable[Shape] = SHAPES,
) -> list[Task]:
    """What to measure, in the order of the table. Shapes named by a pattern (`rl`, `grid-*`) are taken whole."""
    patterns, threads = tuple(patterns), tuple(sorted(set(threads)))
    tasks = []
    for cell in cells:
        for shape in shapes:
            named = any(fnmatch.fnmatch(shape.name, pattern) for pattern in patterns)
            chosen = shape.cells if full or named else shape.quick
            if cell not in chosen or (patterns and not named):
                continue
            for pass_ in PASSES:
                if pass_ in shape.passes and pass_ in passes:
                    counts = threads if full or named or pass_ not in CALLS else threads[:1]
                    tasks.append(Task(shape, cell, pass_, counts))
    return tasks


def row_count(tasks: Iterable[Task]) -> int:
    """How many rows these tasks give."""
    return sum(len(task.threads) for task in tasks)


@contextlib.contextmanager
def thread_count(threads: int) -> Iterator[None]:
    """torch.set_num_threads for a block."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def reference(problem: Problem) -> Outputs:
    """torch.nn's outputs in float64, on the same numbers."""
    return TorchContender("float64", nn, problem.double()).outputs()


def check_outputs(found: dict[str, Outputs], exact: Outputs) -> float:
    """Compares every contender with float64. Returns our worst error as a fraction of what the rule allows.

    Raises:
        WrongNumbersError: ours is beyond the rule of check.py, or a peer does not compute the same thing.
    """
    worst, where = worst_excess(found[OURS], found[TORCH], exact)
    if not worst <= 1:
        raise WrongNumbersError(f"fastrnn's {where} is wrong: {worst:.3g} times the error that the rule allows")
    for peer, outputs in found.items():
        for name, value in outputs.items():
            other = exact[name][-len(value) :] if name in ("h_n", "c_n") else exact[name]  # ONNX: the last layer's only
            scale = 1 + other.abs().max().item()
            if not distance(value, other) <= PEER_TOLERANCE * scale * (1 if value.dtype == torch.float32 else 50):
                raise WrongNumbersError(f"{peer} does not compute the same {name}: it is not a peer here")
    return worst


def measure(task: Task, roofline: Roofline, dtype: torch.dtype, seconds: float) -> Iterator[Row]:
    """Checks one problem, then yields its rows; a row with "error" instead of timings where the numbers are wrong."""
    problem = make_problem(task.cell, task.shape, task.pass_, dtype)
    pair = [TorchContender(OURS, fastrnn, problem), TorchContender(TORCH, nn, problem)]
    with thread_count(max(task.threads)):
        exact = reference(problem)
    missing = onnx_runtime_missing(problem)
    for threads in task.threads:
        with thread_count(threads):
            contenders = [*pair, *([] if missing else [OnnxContender(problem, threads)])]
            row: Row = {**_labels(task, threads, dtype), "tokens": problem.tokens}
            try:
                row["accuracy"] = check_outputs({c.name: c.outputs() for c in contenders}, exact)
            except WrongNumbersError as error:
                yield {**row, "error": str(error)}
                continue
            functions: dict[str, Callable[[], object]] = {c.name: c.function() for c in contenders}
            wait_until_quiet()
            peak = machine.measure_peak(threads, dtype)  # again for every row: a shared machine's clock moves by 15 %
            way = machine.measure_round(threads)  # likewise: which cores run the threads is the system's choice
            with torch.inference_mode(not problem.training):
                timings = interleaved(functions, seconds, threads)
            ways = [way, machine.measure_round(threads)]
            now = Roofline({threads: peak} if peak else {}, roofline.bandwidth)
            yield {**row, "fma_peak": peak, "round_ns": ways, **_figures(problem, timings, now, threads)}


def _labels(task: Task, threads: int, dtype: torch.dtype) -> Row:
    shape = task.shape
    sizes = {letter: getattr(shape, letter) for letter in "TBIHPDL"}
    return {
        "cell": task.cell,
        "shape": shape.name,
        "source": shape.source,
        **sizes,
        "pass": task.pass_,
        "threads": threads,
        "dtype": str(dtype).removeprefix("torch."),
        "isa": machine.isa(),
    }


def _figures(problem: Problem, timings: dict[str, Timing], roofline: Roofline, threads: int) -> Row:
    ours = timings[OURS]
    peers = {name: timing for name, timing in timings.items() if name != OURS}
    shape, passes = problem.shape, 3 if problem.training else 1
    flops = shape.forward_flops(problem.cell, problem.tokens) * passes
    # Read at least once per step and direction by the forward sweep, and by the backward one.
    steps = shape.T * shape.D * shape.L * (2 if problem.training else 1)
    fma = roofline.fma_seconds(flops, threads)
    cache = roofline.cache_seconds(shape.recurrent_bytes(problem.cell, problem.x.itemsize), steps, threads)
    fractions = {
        "fraction_fma": None if fma is None else fma / ours.median,
        "fraction_cache": None if cache is None else cache / ours.median,
    }
    return {
        "ours": asdict(ours),
        "peers": {name: asdict(timing) for name, timing in peers.items()},
        "ratio": {name: timing.median / ours.median for name, timing in peers.items()},
        "lost": [name for name, timing in peers.items() if is_lost(ours, timing)],
        "gflops": flops / ours.median * 1e-9,
        **fractions,
    }


def missing_peers(tasks: Iterable[Task], dtype: torch.dtype) -> str:
    """Why ONNX Runtime takes no part in rows in which it could, or an empty string."""
    for task in tasks:
        if (
            task.pass_ in ("inference", "packed-inference", "lengths-inference", "call", "prepacked-call")
            and not task.shape.P
        ):
            small = Shape("probe", 1, 1, 1, 1, "")
            reason = onnx_runtime_missing(make_problem(task.cell, small, "inference", dtype))
            return f"{ONNX_RUNTIME}: {reason}" if reason else ""
    return ""
