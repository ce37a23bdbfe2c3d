# SPDX-License-Identifier: BSD-3-Clause
"""Training by several processes, with DistributedDataParallel or FSDP2, checkpoints, and a run that goes on from one.

The task is the adding problem (Hochreiter & Schmidhuber 1997): a sequence of numbers, two of which are marked; the
model reads all and then says the sum of the two. Guessing 1 every time has a squared error of 1/6; a model that carries
the two numbers through the sequence comes near 0. Every batch is made from the number of its step, and each process
takes its share of it, so that a run is the same whatever the number of processes, and wherever it was interrupted.

    torchrun --nproc-per-node=2 examples/train_distributed.py                             # seconds on two cores
    torchrun --nproc-per-node=2 examples/train_distributed.py --wrapper fsdp --cell gru
    torchrun --nproc-per-node=2 examples/train_distributed.py --resume --steps 600        # 200 steps more
    python examples/train_distributed.py                                                  # one process

A checkpoint may be resumed by another number of processes, and by the other wrapper: torch.distributed.checkpoint
stores whole tensors and cuts them as the run that loads them needs.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import torch.distributed.checkpoint
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastrnn

CELLS = {"lstm": fastrnn.LSTM, "gru": fastrnn.GRU, "rnn": fastrnn.RNN}
CHECKPOINTS = Path("train_distributed.checkpoints")
GUESS = 1 / 6  # the variance of the sum of two numbers from [0, 1)


class Adder(nn.Module):
    """Reads a sequence [T, B, 2] in both directions and says one number a row, [B]."""

    def __init__(self, cell: str, hidden: int) -> None:
        super().__init__()
        self.recurrent = CELLS[cell](2, hidden, num_layers=2, bidirectional=True)
        self.head = nn.Linear(4 * hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.recurrent(x)
        return self.head(torch.cat([y[0], y[-1]], dim=1)).sum(1)


def make_batch(step: int, seed: int, steps_in_time: int, rows: int) -> tuple[Tensor, Tensor]:
    """The whole batch of a step: numbers and marks [T, B, 2], sums [B]. One mark lies in each half of a row."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    x = torch.zeros(steps_in_time, rows, 2)
    x[..., 0] = torch.rand(steps_in_time, rows, generator=generator)
    half = steps_in_time // 2
    every_row = torch.arange(rows)
    for start in (0, half):
        x[start + torch.randint(half, (rows,), generator=generator), every_row, 1] = 1
    return x, (x[..., 0] * x[..., 1]).sum(0)


def build(options: argparse.Namespace) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The same initial weights in every process, wrapped, and the optimizer of what the wrapper made of them."""
    torch.manual_seed(options.seed)
    model: nn.Module = Adder(options.cell, options.hidden)
    if options.wrapper == "fsdp":
        fully_shard(model.recurrent)
        fully_shard(model)
    else:
        model = DistributedDataParallel(model)
    return model, torch.optim.Adam(model.parameters(), lr=options.lr)


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> dict[str, Any]:
    """All that a run needs to go on; the names are those of the bare model, whatever the wrapper."""
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments, "step": step}


def saved_steps(folder: Path) -> list[int]:
    """The checkpoints that are complete, by their steps: the file .metadata is written last."""
    return sorted(int(path.parent.name) for path in folder.glob("*/.metadata"))


def save(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Every process writes its part of a new checkpoint; those before it stay."""
    if step not in saved_steps(folder):
        torch.distributed.checkpoint.save(state_of(model, optimizer, step), checkpoint_id=folder / str(step))


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Fills the model and the optimizer from the last checkpoint; the number of steps already made."""
    state = state_of(model, optimizer, 0)
    torch.distributed.checkpoint.load(state, checkpoint_id=folder / str(saved_steps(folder)[-1]))
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return state["step"]


def train(options: argparse.Namespace, rank: int, processes: int) -> list[float]:
    """Trains from the start or from the last checkpoint, and saves; the mean loss of every step over all processes."""
    model, optimizer = build(options)
    first = load(options.checkpoints, model, optimizer) if options.resume else 0
    share = options.batch // processes
    rows = slice(rank * share, (rank + 1) * share)
    losses = []
    for step in range(first, options.steps):
        x, target = make_batch(step, options.seed, options.length, options.batch)
        loss = (model(x[:, rows]) - target[rows]).square().mean()
        optimizer.zero_grad()
        loss.backward()  # both wrappers average the gradients over the processes
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        mean = loss.detach()
        torch.distributed.all_reduce(mean)
        losses.append(mean.item() / processes)
        if rank == 0 and ((step + 1) % options.print_every == 0 or step + 1 == options.steps):
            recent = losses[-options.print_every :]
            error = sum(recent) / len(recent)
            bar = "#" * round(40 * min(error / GUESS, 1.5))
            print(f"step {step + 1:5}   error {error:.5f}   {bar}", flush=True)
        if (step + 1) % options.save_every == 0 or step + 1 == options.steps:
            save(options.checkpoints, model, optimizer, step + 1)
    return losses


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options; leaves with a sentence on stderr and status 2 where they make no sense."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--wrapper", choices=["ddp", "fsdp"], default="ddp")
    add("--cell", choices=list(CELLS), default="lstm")
    add("--hidden", type=int, default=32, help="units per layer and direction")
    add("--length", type=int, default=20, help="numbers per sequence")
    add("--batch", type=int, default=64, help="sequences per step, of all processes together")
    add("--steps", type=int, default=400, help="in all, those before a checkpoint included")
    add("--lr", type=float, default=0.01)
    add("--seed", type=int, default=0)
    add("--print-every", type=int, default=50)
    add("--threads", type=int, help="of each process; by default the cores shared out evenly")
    add("--checkpoints", type=Path, default=CHECKPOINTS, help="the folder where they go, each under its step")
    add(
        "--save-every", type=int, default=200, help="steps from one checkpoint to the next; the end has one in any case"
    )
    add("--resume", action="store_true", help="go on from the last checkpoint")
    options = parser.parse_args(argv)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    numbers = {name.replace("_", "-"): value for name, value in vars(options).items() if type(value) in (int, float)}
    sizes = [(name, value) for name, value in numbers.items() if name != "seed"]
    rules = [
        *(
            (0 < value < math.inf, f"--{name.replace('_', '-')} must be above zero, got {value}")
            for name, value in sizes
        ),
        (options.length >= 2, "--length must be 2 or more: two numbers are marked"),
        (options.batch % processes == 0, f"--batch must be a multiple of the {processes} processes"),
        (not options.resume or saved_steps(options.checkpoints), f"--resume: no checkpoint in {options.checkpoints}"),
    ]
    for holds, message in rules:
        if not holds:
            parser.error(message)
    return options


def main(argv: Sequence[str] | None = None) -> list[float]:
    """One process of the run: torchrun starts several and tells each its number; alone it is a group of one."""
    options = parse_options(argv)
    if "RANK" in os.environ:
        torch.distributed.init_process_group("gloo")
    else:
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    rank, processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
    torch.set_num_threads(options.threads or max(1, len(os.sched_getaffinity(0)) // processes))
    if rank == 0:
        size = f"{options.cell.upper()} 2 x {options.hidden}"
        print(f"{size}, {options.wrapper}, processes: {processes}; a guess has the error {GUESS:.5f}")
    try:
        return train(options, rank, processes)
    finally:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
    if any(argument.endswith("fsdp") for argument in sys.argv):
        # Past Python's own ending. FSDP2's caches keep the destroyed group alive, and with it gloo's threads; one that
        # still lets go of its last tensors while Python ends aborts the process, in 1 of 30 runs or so. The abort is
        # that of pytorch/pytorch#179291, which was closed without a remedy.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
