# SPDX-License-Identifier: BSD-3-Clause
"""What denormals cost: a call whose input decays into them over the call's time of an ordinary input.

Two inputs, one that falls from 1 to 1e-44 in the course of the sequence and one that is denormal from the start;
forward, and forward with backward; of torch.nn and of fastrnn; with denormals kept (torch's default), and flushed by
`torch.set_flush_denormal(True)`. One thread. The figures of docs/numerics.md come from here:

    python bench/probes/denormals.py
"""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn

import fastrnn

T, B, H = 100, 4, 128
CALLS = 5


def seconds(module: nn.Module, x: Tensor, training: bool) -> float:
    """The fastest of a few calls."""
    taken = []
    for _ in range(CALLS + 1):
        start = time.perf_counter()
        with torch.set_grad_enabled(training):
            y = module(x)[0]
            if training:
                y.sum().backward()
        taken.append(time.perf_counter() - start)
    return min(taken[1:])


def main() -> None:
    torch.set_num_threads(1)
    ordinary = torch.randn(T, B, H, generator=torch.Generator().manual_seed(0))
    inputs = {"decay": ordinary * torch.logspace(0, -44, T).view(T, 1, 1), "denormal": 1e-40 * ordinary}
    print(f"T = {T}, B = {B}, I = H = {H}: time over that of an ordinary input\n")
    print("library  module  pass       ordinary    decay  denormal   flushed: decay  denormal")
    for kind in ("LSTM", "GRU", "RNN"):
        for name, library in (("torch", nn), ("fastrnn", fastrnn)):
            module = getattr(library, kind)(H, H)
            for training in (False, True):
                base = seconds(module, ordinary, training)
                ratios = []
                for flush in (False, True):
                    torch.set_flush_denormal(flush)
                    ratios += [seconds(module, x, training) / base for x in inputs.values()]
                torch.set_flush_denormal(False)
                kept_decay, kept, flushed_decay, flushed = ratios
                print(
                    f"{name:8} {kind:7} {'training' if training else 'inference':9} {1e3 * base:7.2f} ms"
                    f" {kept_decay:8.1f} {kept:9.1f} {flushed_decay:16.2f} {flushed:9.2f}"
                )


if __name__ == "__main__":
    main()
