# SPDX-License-Identifier: BSD-3-Clause
"""What the GPU benchmark measures, most important rows first: a run that runs out of time has lost the least.

Used by runner.py. A row is a cell, a shape, a mode of arithmetic and a pass; its level says when it is measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ..shapes import Shape

# Arithmetic: dtype of the tensors, and whether float32 products may use TF32. torch.nn's default on a GPU is "tf32".
MODES = {"bfloat16": "bfloat16", "float16": "float16", "tf32": "float32", "float32": "float32", "float64": "float64"}
PASSES = {
    "inference": "one forward call without gradient",
    "training": "forward and backward, gradients of x and of every weight",
    "packed-inference": "inference on a PackedSequence, lengths uniform in T/4..T",
    "packed-training": "training on a PackedSequence, lengths uniform in T/4..T",
    "reset-training": "training, the state zeroed at 2 % of the steps; torch.nn is called once a step",
}
LAYER = ("inference", "training")
FAST, EXACT = ("bfloat16", "tf32"), ("float16", "float32")
ALL = (*FAST, *EXACT)


@dataclass(frozen=True)
class Row:
    """One row of the table."""

    cell: str
    shape: Shape
    mode: str
    pass_: str
    level: int


def _shape(name: str, T: int, B: int, I: int, H: int, source: str, **more: int) -> Shape:  # noqa: E741
    return Shape(name, T, B, I, H, source, **more)


_MIDDLE = _shape("middle-h512", 512, 32, 512, 512, "where cuDNN runs its standard algorithm")
_LARGE = _shape("large-h1024", 512, 64, 1024, 1024, "where cuDNN runs its standard algorithm")
_MIDDLE_DEEP = _shape("middle-h512-deep", 512, 32, 512, 512, "the same, 2 layers both ways", L=2, D=2)
_LARGE_DEEP = _shape("large-h1024-deep", 512, 64, 1024, 1024, "the same, 2 layers both ways", L=2, D=2)
_TRAP = _shape("small-h-trap", 2058, 62, 16, 168, "xwang233's cudnn-rnn-bench-62143: SMALL_H slower than STANDARD")
_SINGLE = _shape("single-h256", 512, 1, 256, 256, "one sequence: latency alone")
_FLASH = _shape("flashrnn-h768", 1024, 16, 768, 768, "FlashRNN's published point; cuDNN is at its best in float16")
_FASTRNNS = _shape("pytorch-fastrnns", 100, 64, 512, 512, "default of pytorch/benchmarks/fastrnns")
_HUGE = _shape("huge-h2048", 512, 128, 2048, 2048, "weights beyond the chip in float32")
_SMALL = _shape("small-h72", 2721, 6, 128, 72, "xwang233's cudnn-rnn-bench-62143: SMALL_H at its best")
_SMALL_DEEP = _shape("small-h40-deep", 2560, 3, 368, 40, "xwang233's cudnn-rnn-bench-62143, 4 layers", L=4)
_SPEECH = _shape("speech", 400, 32, 80, 320, "80 mel features, 3 layers both ways", L=3, D=2)
_SHORT = _shape("short-h512", 16, 32, 512, 512, "a short window: what a call costs beside its steps")
_STEP = _shape("step-h512", 1, 32, 512, 512, "DeepBench, training set, GRU; one step")
_RL = _shape("rl-h256", 128, 128, 256, 256, "recurrent PPO, 128 environments")
_PROJECTION = _shape("projection", 100, 32, 512, 1024, "Sak et al. 2014: 1024 projected to 512", P=512)
_DEEPBENCH = (
    ("lstm", _shape("deepbench-lstm-h512", 25, 32, 512, 512, "DeepBench, training set")),
    ("lstm", _shape("deepbench-lstm-h2048", 25, 32, 2048, 2048, "DeepBench, training set")),
    ("lstm", _shape("deepbench-lstm-h4096", 25, 32, 4096, 4096, "DeepBench, training set")),
    ("lstm", _shape("deepbench-lstm-h256", 150, 16, 256, 256, "DeepBench, training set")),
    ("gru", _shape("deepbench-gru-h1024", 1500, 32, 1024, 1024, "DeepBench, training set")),
    ("gru", _shape("deepbench-gru-h2816", 187, 32, 2816, 2816, "DeepBench, training set")),
    ("rnn", _shape("deepbench-rnn-h1760", 50, 32, 1760, 1760, 'DeepBench, training set, "vanilla"')),
)
_GATED = ("lstm", "gru")


def _rows() -> Iterator[tuple[int, Iterable[str], Shape, Iterable[str], Iterable[str]]]:
    """(level, cells, shape, modes, passes); a level is measured before the next."""
    for shape in (_MIDDLE, _LARGE):
        yield 0, _GATED, shape, FAST, LAYER
    yield 0, _GATED, _TRAP, FAST, LAYER
    yield 0, ("lstm",), _SINGLE, FAST, LAYER
    yield 0, ("lstm",), _FLASH, ("float16",), LAYER
    for shape in (_MIDDLE_DEEP, _LARGE_DEEP):
        yield 1, _GATED, shape, FAST, LAYER
    for shape in (_MIDDLE, _LARGE):
        yield 1, _GATED, shape, EXACT, LAYER
    yield 1, ("lstm",), _FLASH, ("bfloat16", "tf32"), LAYER
    yield 1, ("gru",), _SINGLE, FAST, LAYER
    yield 2, ("lstm", "gru", "rnn"), _FASTRNNS, ALL, LAYER
    yield 2, ("rnn",), _MIDDLE, FAST, LAYER
    yield 2, _GATED, _MIDDLE, ("bfloat16",), ("packed-inference", "packed-training")
    yield 2, _GATED, _RL, ("bfloat16", "tf32"), ("training", "reset-training")
    yield 2, _GATED, _SHORT, FAST, LAYER
    yield 2, ("lstm", "gru"), _STEP, FAST, LAYER
    yield 3, _GATED, _SMALL, ("float16", "tf32"), LAYER
    yield 3, ("lstm",), _SMALL_DEEP, ("tf32",), LAYER
    yield 3, _GATED, _SPEECH, FAST, LAYER
    yield 3, ("lstm",), _PROJECTION, FAST, LAYER
    yield 3, ("lstm",), _HUGE, FAST, LAYER
    for cell, shape in _DEEPBENCH:
        yield 4, (cell,), shape, ("float16", "bfloat16", "tf32"), LAYER
    yield 4, ("lstm", "gru", "rnn"), _FASTRNNS, ("float64",), LAYER


def rows() -> list[Row]:
    """Every row, in the order of measurement."""
    found = [
        Row(cell, shape, mode, pass_, level)
        for level, cells, shape, modes, passes in _rows()
        for mode in modes
        for cell in cells
        for pass_ in passes
    ]
    return sorted(found, key=lambda row: row.level)


def small(row: Row) -> Row:
    """The same row with sizes that a CPU computes in milliseconds, for runs that test the program."""
    shape = row.shape
    sizes = {"T": min(shape.T, 5), "B": min(shape.B, 3), "I": min(shape.I, 6), "H": min(shape.H, 8)}
    projection = {"P": min(shape.P, 4)} if shape.P else {}
    return Row(row.cell, Shape(**{**vars(shape), **sizes, **projection}), row.mode, row.pass_, row.level)
