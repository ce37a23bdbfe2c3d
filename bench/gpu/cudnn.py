# SPDX-License-Identifier: BSD-3-Clause
"""Which of cuDNN's algorithms PyTorch takes for a call of nn.LSTM, GRU or RNN, by sizes. Used by runner.py.

PyTorch decides by itself and offers no switch: `get_algo` and its heuristics in aten/src/ATen/native/cudnn/RNN.cpp
(torch 2.11 to 2.13), restated here from that source. PERSIST_DYNAMIC is never taken. Forward and backward ask
separately.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..shapes import Shape

STANDARD = "STANDARD"
PERSIST_STATIC = "PERSIST_STATIC"
SMALL_H = "PERSIST_STATIC_SMALL_H"
NO_CUDNN = "none: PyTorch's own kernels"

# The largest H for SMALL_H: (forward, backward).
SMALL_H_LIMITS = {"lstm": (192, 128), "gru": (192, 128), "rnn": (384, 256)}


@dataclass(frozen=True)
class Card:
    """What PyTorch asks a GPU about: compute capability and the number of multiprocessors."""

    major: int
    minor: int
    multiprocessors: int


def algorithm(cell: str, shape: Shape, mode: str, card: Card, *, packed: bool = False, backward: bool = False) -> str:
    """cuDNN's algorithm for one call.

    Args:
        cell: lstm, gru or rnn.
        shape: the sizes, with projection, layers and directions.
        mode: float64, float32, tf32, bfloat16 or float16.
        card: the GPU.
        packed: whether the input is a PackedSequence.
        backward: of the backward; of the forward if not.
    """
    if shape.P or packed or mode == "float64":
        return STANDARD
    if card.major >= 6 and SMALL_H_LIMITS[cell][backward] >= shape.H:
        return SMALL_H
    if mode == "float16" and _sizes_persist(shape) and _card_persists(cell, shape, card):
        return PERSIST_STATIC
    return STANDARD


def _sizes_persist(shape: Shape) -> bool:
    whole = shape.H % 128 == 0 and shape.I % 128 == 0
    return shape.L == 1 and shape.D == 1 and shape.H <= 1024 and whole


def _card_persists(cell: str, shape: Shape, card: Card) -> bool:
    T, B = shape.T, shape.B
    if card.major == 7:
        even = (B % 16 == 0 and B not in (80, 112)) or B == 8
        long = (T >= 40 and B <= 128) or (T >= 20 and B <= 96) or (T >= 10 and B <= 32)
        return card.minor != 5 and even and long
    if card.major < 8 or card.multiprocessors < 98 or card.minor == 6 or cell == "gru":
        return False
    narrow = cell == "lstm" or B < 96 or shape.H < 896
    return B % 8 == 0 and B <= 128 and narrow


def is_used(mode: str, card: Card, torch_version: tuple[int, int], cudnn_version: int) -> bool:
    """Whether PyTorch calls cuDNN at all: bfloat16 only since torch 2.10 with cuDNN 9.13 on compute capability 8.0."""
    return mode != "bfloat16" or (torch_version >= (2, 10) and cudnn_version >= 91300 and card.major >= 8)
