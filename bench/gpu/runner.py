# SPDX-License-Identifier: BSD-3-Clause
"""Measures the rows: checks every contender against float64, then times them together. Called by __main__.py."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict

import torch

from ..check import Outputs, distance, worst_excess
from ..peers import Problem, make_problem
from ..shapes import GATES
from ..timing import Timing, is_lost
from . import cudnn, floor
from .backend import Backend, arithmetic, interleaved
from .contenders import OURS, STOCK, Contender, reference, to_device
from .shapes import MODES, Row

Maker = Callable[[Problem], Contender]
# What a peer may differ by from float64, relative to 1 + the largest value: enough to know that it computed the same.
PEER_TOLERANCE = {"float64": 1e-8, "float32": 2e-3, "tf32": 5e-2, "float16": 0.1, "bfloat16": 0.3}


def measure(row: Row, backend: Backend, makers: Mapping[str, Maker], seconds: float) -> dict[str, object]:
    """One row of the result.

    Args:
        row: what to measure.
        backend: where.
        makers: the contenders (`contenders.makers`).
        seconds: of samples, for each contender.
    Returns:
        The row, with "times" and "accuracy" by contender; a contender that could not run is in "failed", one with
        wrong numbers in "wrong", each with the reason, and neither is timed.
    """
    found = _labels(row, backend)
    with arithmetic(row.mode), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            problem = to_device(
                make_problem(row.cell, row.shape, row.pass_, getattr(torch, MODES[row.mode])), backend.device
            )
            ready, judged = _checked(problem, row, backend, makers)
            found |= {**judged, "tokens": problem.tokens}
            with torch.inference_mode(not problem.training):
                timings = interleaved(backend, {name: made.function for name, made in ready.items()}, seconds)
        except RuntimeError as error:  # out of memory, above all
            return {**found, "error": _first_line(error)}
        found |= _figures(row, problem.tokens, timings, backend)
    found["warnings"] = sorted({_first_line(warning.message) for warning in said})
    return found


def _first_line(error: object) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]


def _labels(row: Row, backend: Backend) -> dict[str, object]:
    shape = row.shape
    labels: dict[str, object] = {
        "cell": row.cell,
        "shape": shape.name,
        "source": shape.source,
        **{letter: getattr(shape, letter) for letter in "TBIHPDL"},
        "mode": row.mode,
        "pass": row.pass_,
        "level": row.level,
    }
    return labels | {"algorithm": algorithms(row, backend)}


def algorithms(row: Row, backend: Backend) -> str:
    """cuDNN's algorithm in torch.nn's call, `forward/backward` where the pass trains and the two differ."""
    if backend.card is None:
        return "no CUDA device"
    release = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if not cudnn.is_used(row.mode, backend.card, release, torch.backends.cudnn.version() or 0):
        return cudnn.NO_CUDNN
    packed = row.pass_.startswith("packed")
    passes = (False, True) if row.pass_.endswith("training") else (False,)
    names = [cudnn.algorithm(row.cell, row.shape, row.mode, backend.card, packed=packed, backward=b) for b in passes]
    return "/".join(dict.fromkeys(names))


def _checked(
    problem: Problem, row: Row, backend: Backend, makers: Mapping[str, Maker]
) -> tuple[dict[str, Contender], dict[str, object]]:
    """The contenders with right numbers, and what was found: accuracy, failed, wrong."""
    exact = reference(problem)
    ready: dict[str, Contender] = {}
    accuracy: dict[str, float] = {}
    failed: dict[str, str] = {}
    wrong: dict[str, str] = {}
    stock: Outputs = {}
    for name, make in makers.items():
        try:
            with torch.inference_mode(not problem.training):
                contender = make(problem)
                outputs = contender.outputs()
            backend.synchronize()
        except RuntimeError as error:
            failed[name] = _first_line(error)
            continue
        stock = stock or outputs
        accuracy[name], fault = worst_excess(outputs, stock, exact)
        is_wrong = not accuracy[name] <= 1 if name.startswith(OURS) else not _is_same(outputs, exact, row.mode)
        if is_wrong:
            wrong[name] = f"{fault}: {accuracy[name]:.3g} times the error that the rule allows"
        else:
            ready[name] = contender
    return ready, {"accuracy": accuracy, "failed": failed, "wrong": wrong}


def _is_same(outputs: Outputs, exact: Outputs, mode: str) -> bool:
    return outputs.keys() == exact.keys() and all(
        distance(value, exact[name]) <= PEER_TOLERANCE[mode] * (1 + exact[name].abs().max().item())
        for name, value in outputs.items()
    )


def _figures(row: Row, tokens: int, timings: Mapping[str, Timing], backend: Backend) -> dict[str, object]:
    """Times, ratios to torch.nn, rates, and the floor of the card."""
    shape, training = row.shape, row.pass_.endswith("training")
    flops = shape.forward_flops(row.cell, tokens) * (3 if training else 1)
    itemsize = floor.ITEMSIZE[row.mode]
    # The recurrent weights at every step, which a kernel that keeps them on the chip does not read at all.
    weights = shape.recurrent_bytes(row.cell, itemsize) * shape.T * shape.D * shape.L * (2 if training else 1)
    traffic = least_bytes(row, tokens)
    steps = shape.T * shape.L
    least = None
    if backend.limits is not None:
        least = floor.seconds(row.cell, shape, row.mode, backend.limits, training=training, tokens=tokens)
    stock = timings.get(STOCK)
    return {
        "times": {name: asdict(timing) for name, timing in timings.items()},
        "ratio": {name: stock.median / timing.median for name, timing in timings.items()} if stock else {},
        "lost": [name for name, t in timings.items() if name.startswith(OURS) and stock and is_lost(t, stock)],
        "us_per_step": {name: timing.median * 1e6 / steps for name, timing in timings.items()},
        "tflops": {name: flops / timing.median * 1e-12 for name, timing in timings.items()},
        "weights_gbs": {name: weights / timing.median * 1e-9 for name, timing in timings.items()},
        "memory_gbs": {name: traffic / timing.median * 1e-9 for name, timing in timings.items()},
        "floor": least,
        "over_floor": {name: timing.median / least for name, timing in timings.items()} if least else {},
    }


def least_bytes(row: Row, tokens: int) -> int:
    """What a call must move through the card's memory: weights, x and y once; when it trains also their gradients,
    and the saved gates and states written and read again."""
    shape, itemsize = row.shape, floor.ITEMSIZE[row.mode]
    widths = [shape.I] + [shape.D * shape.R] * (shape.L - 1)
    inputs = sum(GATES[row.cell] * shape.H * (width + shape.R) + shape.P * shape.H for width in widths) * shape.D
    sequences = tokens * sum(width + shape.D * shape.R for width in widths)
    if not row.pass_.endswith("training"):
        return (inputs + sequences) * itemsize
    saved = tokens * shape.D * shape.L * shape.H * {"lstm": 5, "gru": 4, "rnn": 0}[row.cell]
    return (3 * inputs + 3 * sequences + 2 * saved) * itemsize
