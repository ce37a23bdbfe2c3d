# SPDX-License-Identifier: BSD-3-Clause
"""What a card would allow: the least time of a layer, by arithmetic and by the latency of a step. Used by runner.py.

A step cannot start before the last one's h has reached every multiprocessor, so that it takes at least

    hop + max(flops of the step / peak, weights that do not fit on the chip / memory bandwidth)

where hop is the latency of handing h on: through the shared memory of a cluster where one cluster of 16 blocks holds
the weights and a few rows are all there is, else through the L2 cache. The input projection and the gradients of the
weights are large products, at peak. Directions run side by side. Rates are vendors' dense peaks, hops are estimates
(bench/probes measures them); the sum is a bound for a design that keeps the weights on the chip, not a promise.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..shapes import GATES, Shape


@dataclass(frozen=True)
class Limits:
    """One kind of card. flops: dense peak in FLOP/s by mode; on_chip, cluster: bytes of weights that fit."""

    flops: dict[str, float]
    memory: float  # bytes per second
    on_chip: float  # registers and shared memory together, what a kernel can use of them
    cluster: float  # 0: the card has no clusters
    cluster_hop: float  # seconds
    grid_hop: float  # seconds


_HOPPER_FLOPS = {"bfloat16": 989e12, "float16": 989e12, "tf32": 494e12, "float32": 67e12, "float64": 34e12}
_AMPERE_FLOPS = {"bfloat16": 312e12, "float16": 312e12, "tf32": 156e12, "float32": 19.5e12, "float64": 9.7e12}
CARDS = {
    "H200": Limits(_HOPPER_FLOPS, 4.8e12, 46e6, 3.28e6, 0.35e-6, 0.5e-6),
    "H100": Limits(_HOPPER_FLOPS, 3.35e12, 46e6, 3.28e6, 0.35e-6, 0.5e-6),
    "A100": Limits(_AMPERE_FLOPS, 2.0e12, 27e6, 0.0, 0.0, 0.7e-6),
}
ITEMSIZE = {"bfloat16": 2, "float16": 2, "tf32": 4, "float32": 4, "float64": 8}
FEW_ROWS = 8  # as many as one tile of the matrix units takes


def limits(name: str) -> Limits | None:
    """The limits of a card by its name ("NVIDIA H200"), None for one that CARDS does not know."""
    return next((found for part, found in CARDS.items() if part in name), None)


def step_seconds(cell: str, shape: Shape, mode: str, card: Limits) -> float:
    """The least time of one step of one layer, all its directions together."""
    a_direction = GATES[cell] * shape.H * shape.R + shape.P * shape.H
    weights = a_direction * ITEMSIZE[mode]
    arithmetic = 2 * a_direction * shape.B * shape.D / card.flops[mode]
    stored = 0.0 if weights * shape.D <= card.on_chip else weights * shape.D / card.memory
    clustered = weights <= card.cluster and shape.B <= FEW_ROWS
    return (card.cluster_hop if clustered else card.grid_hop) + max(arithmetic, stored)


def seconds(cell: str, shape: Shape, mode: str, card: Limits, *, training: bool, tokens: int | None = None) -> float:
    """The least time of a call: its steps one after the other, and the large products at peak.

    A backward has the steps of a forward, and two more products of the same size for each one of the forward, of which
    one, the product of each step with the recurrent weights, is in the steps.
    """
    tokens = shape.T * shape.B if tokens is None else tokens
    steps = shape.L * shape.T * step_seconds(cell, shape, mode, card)
    forward = shape.forward_flops(cell, tokens)
    recurrent = 2 * (GATES[cell] * shape.H * shape.R + shape.P * shape.H) * tokens * shape.D * shape.L
    products = 3 * forward - 2 * recurrent if training else forward - recurrent
    return steps * (2 if training else 1) + products / card.flops[mode]
