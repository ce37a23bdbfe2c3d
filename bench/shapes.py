# SPDX-License-Identifier: BSD-3-Clause
"""The problems that the benchmark measures: named sizes with a source, and their arithmetic. Used by runner.py."""

from __future__ import annotations

from dataclasses import dataclass

GATES = {"lstm": 4, "gru": 3, "rnn": 1}  # G; cells in the order of the tables
PASSES = {
    "inference": "one forward call without gradient",
    "training": "forward and backward, gradients of x and of every weight",
    "vmap": "inference, each sequence a member of torch.vmap; the peers take them as the batch that they are",
    "packed-inference": "inference on a PackedSequence, lengths uniform in T/4..T",
    "packed-training": "training on a PackedSequence, lengths uniform in T/4..T",
    "lengths-inference": "inference on a padded batch, lengths uniform in T/4..T; torch.nn packs and pads",
    "lengths-training": "training on a padded batch, lengths uniform in T/4..T; torch.nn packs and pads",
    "reset-inference": "inference, the state zeroed at 2 % of the steps; torch.nn is called once a step",
    "reset-training": "training, the state zeroed at 2 % of the steps; torch.nn is called once a step",
    "call": "one step of a layer from a given state, without gradient",
    "prepacked-call": "the same inside fastrnn.prepacked(layer)",
    "call-training": "one step of a layer from a given state, forward and backward",
    "cell": "one step of the cell module, without gradient",
}
# Passes of one step: latency, measured on one thread unless --full.
CALLS = ("call", "prepacked-call", "call-training", "cell")
EVERY_CELL = tuple(GATES)
LAYER = ("inference", "training")
MEMBERS = ("inference", "training", "vmap")
PACKED = ("inference", "training", "packed-inference", "packed-training", "lengths-inference", "lengths-training")
EPISODES = ("inference", "training", "reset-inference", "reset-training")


@dataclass(frozen=True)
class Shape:
    """One problem size: T steps, B rows, I inputs, H units, P projection (0: none), D directions, L layers."""

    name: str
    T: int
    B: int
    I: int  # noqa: E741 (the letter of the equations)
    H: int
    source: str
    cells: tuple[str, ...] = EVERY_CELL
    passes: tuple[str, ...] = LAYER
    quick: tuple[str, ...] = ()  # the cells that are measured without --full
    P: int = 0
    D: int = 1
    L: int = 1

    @property
    def R(self) -> int:  # noqa: N802
        """The width of h: P with a projection, else H."""
        return self.P or self.H

    def sizes(self) -> str:
        """The sizes as the tables print them, like `T100 B16 I80 H256 D2`."""
        unusual = {"P": self.P, "D": self.D * (self.D > 1), "L": self.L * (self.L > 1)}
        more = [f"{letter}{value}" for letter, value in unusual.items() if value]
        return " ".join([f"T{self.T} B{self.B} I{self.I} H{self.H}", *more])

    def forward_flops(self, cell: str, tokens: int | None = None) -> int:
        """Floating-point operations of the matrix products of one forward call over `tokens` (default T*B) tokens.

        2*G*H*(I + R) + 2*P*H a token and direction; the gate math is not counted, as usual. A training step counts
        three times this: forward, gradients of the inputs of each product, gradients of its weights.
        """
        tokens = self.T * self.B if tokens is None else tokens
        inputs = [self.I] + [self.D * self.R] * (self.L - 1)
        a_token = sum(2 * GATES[cell] * self.H * (width + self.R) + 2 * self.P * self.H for width in inputs)
        return a_token * tokens * self.D

    def recurrent_bytes(self, cell: str, itemsize: int = 4) -> int:
        """Bytes of w_hh (and w_hr) of one direction of one layer: what each step reads again, whatever the batch."""
        return (GATES[cell] * self.H * self.R + self.P * self.H) * itemsize


def _deepbench(T: int, B: int, H: int, cell: str, part: str, quick: bool = False) -> Shape:
    passes = LAYER if part == "training" else ("inference",)
    name = f"deepbench-{part}-{cell}-h{H}-b{B}" + (f"-t{T}" if T == 1 else "")
    return Shape(name, T, B, H, H, f"DeepBench, {part} set", (cell,), passes, (cell,) if quick else ())


def _deepbench_shapes() -> list[Shape]:
    """The RNN problems of baidu-research/DeepBench (code/kernels/rnn_problems.h) that fit: a call of at most about 20
    GFLOP, weights of at most 40 MB. Its "vanilla" is `rnn` here; its input is as wide as its hidden state."""
    training = [(25, B, 512, "lstm") for B in (16, 32, 64)] + [(25, B, 1024, "lstm") for B in (16, 32)]
    training += [(150, B, 256, "lstm") for B in (16, 32, 64)] + [(50, 8, 1536, "lstm")]
    training += [(50, B, 1760, "rnn") for B in (16, 32)] + [(1, 32, 512, "gru")]
    server = [(25, B, H, "lstm") for H in (512, 1024) for B in (1, 2, 4)] + [(150, B, 256, "lstm") for B in (1, 2, 4)]
    server += [(1, B, 512, "gru") for B in (1, 2, 4)] + [(1500, 1, 1024, "gru")]
    device = [(672, 1, 32, "rnn"), (96, 1, 64, "rnn")]  # its LSTM is in the server set
    quick = {(25, 16, 512, "lstm"), (1, 32, 512, "gru"), (25, 1, 1024, "lstm"), (672, 1, 32, "rnn")}
    parts = (("training", training), ("server", server), ("device", device))
    return [_deepbench(*problem, part, problem in quick) for part, problems in parts for problem in problems]


_USAGE = [
    Shape("pytorch-fastrnns", 100, 64, 512, 512, "default of pytorch/benchmarks/fastrnns", quick=("lstm",)),
    Shape("rl", 128, 16, 128, 128, "recurrent PPO: 128 steps, 128 units", passes=EPISODES, quick=EVERY_CELL),
    Shape("rl-atari", 128, 8, 512, 128, "CleanRL ppo_atari_lstm.py: nn.LSTM(512, 128)", ("lstm",), EPISODES),
    Shape("forecasting", 100, 64, 1, 40, "one time series, 40 units as in DeepAR", quick=EVERY_CELL),
    Shape("speech", 200, 16, 80, 256, "80 mel features, bidirectional acoustic model", quick=EVERY_CELL, D=2),
    Shape("language-model", 35, 20, 650, 650, "Zaremba et al. 2014, medium: 2 layers of 650", ("lstm",), L=2),
    Shape("projection", 20, 16, 40, 800, "Sak et al. 2014: 800 projected to 512", ("lstm",), quick=("lstm",), P=512),
]
_STREAMING = [
    Shape(f"streaming-h{H}", 100, 1, H, H, "streaming: one sequence at a time", quick=EVERY_CELL)
    for H in (64, 128, 256, 512)
]
# Sizes around the register tile (rows of 4, 6, 8; units of 16) and the caches (w_hh from 64 KB to 16 MB).
_GRID = [
    Shape("grid-h128-b16", 100, 16, 128, 128, "size grid"),
    Shape("grid-h256-b16", 100, 16, 256, 256, "size grid", quick=EVERY_CELL),
    Shape("grid-h256-b64", 50, 64, 256, 256, "size grid", passes=MEMBERS),
    Shape("grid-h512-b64", 30, 64, 512, 512, "size grid", passes=MEMBERS, quick=EVERY_CELL),
    Shape("members-h64-b64", 32, 64, 64, 64, "short members of a vmap", passes=("inference", "vmap"), quick=EVERY_CELL),
    Shape("members-t100-h64-b64", 100, 64, 64, 64, "members of a vmap", passes=("inference", "vmap"), quick=EVERY_CELL),
    Shape("grid-h1024-b64", 25, 64, 1024, 1024, "size grid; for the LSTM: DeepBench, training set", quick=("lstm",)),
    Shape("grid-h128-b4", 100, 4, 128, 128, "size grid"),
    Shape("grid-h256-b4", 100, 4, 256, 256, "size grid", quick=EVERY_CELL),
    Shape("grid-h512-b4", 100, 4, 512, 512, "size grid"),
    Shape("grid-h128-b8", 100, 8, 128, 128, "size grid", quick=EVERY_CELL),
    Shape("grid-h256-b8", 100, 8, 256, 256, "size grid"),
    Shape("grid-h512-b8", 100, 8, 512, 512, "size grid"),
    Shape("odd-h100", 60, 20, 40, 100, "size grid: no size fits a vector", quick=EVERY_CELL),
    Shape("odd-h80", 200, 8, 13, 80, "size grid: 13 features", quick=EVERY_CELL),
]
_RAGGED = [
    Shape("packed-h128", 100, 32, 128, 128, "ragged batch", passes=PACKED, quick=EVERY_CELL),
    Shape("packed-h64", 100, 16, 64, 64, "ragged batch", passes=PACKED),
]
_SINGLE = [Shape("call-h64-b1", 1, 1, 64, 64, "one step: control, audio callback", passes=CALLS, quick=EVERY_CELL)] + [
    Shape(f"call-h{H}-b{B}", 1, B, H, H, "one step", passes=CALLS[:2], quick=EVERY_CELL if (B, H) == (1, 256) else ())
    for H in (256, 512)
    for B in (1, 8)
]

SHAPES: tuple[Shape, ...] = (*_USAGE, *_STREAMING, *_GRID, *_deepbench_shapes(), *_RAGGED, *_SINGLE)
