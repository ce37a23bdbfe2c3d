# SPDX-License-Identifier: BSD-3-Clause
"""Two recurrent cells of one's own at the speed of the built-in ones: the module of each, and a small measurement.

    python examples/own_cell/own_cells.py            # compiles both cells once, trains each, and measures them

A cell is a C++ header and the same step in plain PyTorch. docs/own-cells.md goes through it line by line.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import fastrnn

HERE = Path(__file__).resolve().parent
Tensors = tuple[Tensor, ...]


def minimal_gated_unit_step(x: Tensors, r: Tensors, state: Tensors, parameters: Tensors) -> Tensors:
    """One step of a minimal gated unit (Zhou et al. 2016), f applied after the product as torch.nn.GRU does.

    Args:
        x, r: W_ih x + b_ih and W_hh h + b_hh of the gates f n, [B, H] each. state: (h,). parameters: none.
    Returns:
        (h',)
    """
    (h,) = state
    f = torch.sigmoid(x[0] + r[0])
    n = torch.tanh(x[1] + f * r[1])
    return ((1 - f) * h + f * n,)


def peephole_lstm_step(x: Tensors, r: Tensors, state: Tensors, parameters: Tensors) -> Tensors:
    """One step of an LSTM with peepholes (Gers et al. 2002; Graves 2013, equations 7 to 11).

    Args:
        x, r: W_ih x + b_ih and W_hh h + b_hh of the gates i f g o, [B, H] each. state: (h, c). parameters: p_i, p_f,
            p_o, [H] each.
    Returns:
        (h', c')
    """
    _, c = state
    p_i, p_f, p_o = parameters
    i = torch.sigmoid(x[0] + r[0] + p_i * c)
    f = torch.sigmoid(x[1] + r[1] + p_f * c)
    c = f * c + i * torch.tanh(x[2] + r[2])
    o = torch.sigmoid(x[3] + r[3] + p_o * c)
    return o * torch.tanh(c), c


class MinimalGatedUnit(fastrnn.CellModule):
    """Layers of minimal gated units; arguments as fastrnn.CellModule."""

    cell = fastrnn.load_cell(HERE / "minimal_gated_unit.h", "MinimalGatedUnit", minimal_gated_unit_step)


class PeepholeLSTM(fastrnn.CellModule):
    """Layers of LSTM cells with peepholes; arguments as fastrnn.CellModule."""

    cell = fastrnn.load_cell(HERE / "peephole_lstm.h", "PeepholeLstm", peephole_lstm_step)


def train(layer: nn.Module, steps: int, generator: torch.Generator) -> tuple[float, float]:
    """Learns to say how many of the last 8 inputs were positive; returns the first and the last loss."""
    readout = nn.Linear(layer.hidden_size, 1)
    optimizer = torch.optim.Adam([*layer.parameters(), *readout.parameters()], lr=0.01)
    losses = []
    for _ in range(steps):
        x = torch.randn(24, 32, layer.input_size, generator=generator)
        target = (x[-8:, :, 0] > 0).float().mean(0)
        optimizer.zero_grad()
        loss = (readout(layer(x)[0][-1])[:, 0] - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses[0], sum(losses[-5:]) / 5


def milliseconds(calls: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """The median of each, all called in turn."""
    times: list[list[float]] = [[] for _ in calls]
    for repeat in range(repeats + 2):
        for call, of in zip(calls, times, strict=True):
            begin = time.perf_counter()
            call()
            if repeat > 1:
                of.append(1e3 * (time.perf_counter() - begin))
    return [statistics.median(of) for of in times]


def infer(module: nn.Module, x: Tensor) -> None:
    """A call as in inference."""
    with torch.inference_mode():
        module(x)


def learn(module: nn.Module, x: Tensor) -> None:
    """A call and its gradients, that of x too."""
    module(x.detach().requires_grad_())[0].sum().backward()


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Runs the program; returns what it prints: losses, and the time of built-in cells over ours for equal work."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=150, help="training steps of each cell; 0: none")
    parser.add_argument("--repeats", type=int, default=25, help="measurements of each call; 0: none")
    parser.add_argument("--threads", type=int, default=1, help="threads of the measurement")
    options = parser.parse_args(arguments)
    if min(options.steps, options.repeats) < 0 or options.threads < 1:
        parser.error("--steps and --repeats must not be negative, --threads must be positive")
    figures: dict[str, float] = {}
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    # Built-in cells of as much work: a unit of two gates stands halfway between those of one and of three.
    peers = {PeepholeLSTM: (fastrnn.LSTM,), MinimalGatedUnit: (fastrnn.RNN, fastrnn.GRU)}
    for own in peers if options.steps else ():
        first, last = train(own(4, 32), options.steps, generator)
        figures |= {f"{own.__name__}_first_loss": first, f"{own.__name__}_last_loss": last}
        print(f"{own.__name__}: loss {first:.4f} -> {last:.4f}")
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    for own, built_in in peers.items():
        for hidden in (128, 256) if options.repeats else ():
            x = torch.randn(100, 16, hidden, generator=generator)
            modules = [kind(hidden, hidden) for kind in (own, *built_in)]
            for pass_ in (infer, learn):
                ours, *theirs = milliseconds([partial(pass_, module, x) for module in modules], options.repeats)
                speed = statistics.mean(theirs) / ours
                figures[f"{own.__name__}_{pass_.__name__}_{hidden}"] = speed
                names = ", ".join(f"{k.__name__} {t:.2f} ms" for k, t in zip(built_in, theirs, strict=True))
                print(f"T 100, B 16, H {hidden}, {pass_.__name__}: {own.__name__} {ours:.2f} ms, {names}: {speed:.2f}")
    torch.set_num_threads(before)
    return figures


if __name__ == "__main__":
    main()
