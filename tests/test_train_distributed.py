# SPDX-License-Identifier: BSD-3-Clause
"""examples/train_distributed.py in tiny runs: by torchrun and alone, both wrappers, interrupted and resumed."""

from __future__ import annotations

import os
import subprocess
import sys
import types

import pytest
from load_example import EXAMPLES, load_example

EXAMPLE = EXAMPLES / "train_distributed.py"
TINY = ["--hidden", "8", "--length", "6", "--batch", "16", "--print-every", "1"]


@pytest.fixture(scope="module")
def example() -> types.ModuleType:
    return load_example("train_distributed")


def by_torchrun(*options: object) -> list[str]:
    """The errors that two processes print, step by step."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", EXAMPLE, *options]
    result = subprocess.run(
        [str(part) for part in command], env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return [line.split()[3] for line in result.stdout.splitlines() if line.startswith("step")]


def test_two_processes_resume_what_one_began(example, tmp_path, capsys):
    """A run of one process under DDP, gone on by two under FSDP2, is a run of one process without interruption."""
    whole = example.main([*TINY, "--checkpoints", str(tmp_path / "whole"), "--steps", "6"])
    checkpoints = ["--checkpoints", str(tmp_path / "parts")]
    begun = example.main([*TINY, *checkpoints, "--steps", "3", "--save-every", "2"])
    assert example.saved_steps(tmp_path / "parts") == [2, 3]
    resumed = by_torchrun(*TINY, *checkpoints, "--steps", "6", "--wrapper", "fsdp", "--resume")
    assert len(resumed) == 3
    assert begun + [float(error) for error in resumed] == pytest.approx(whole, abs=2e-5)  # printed with five digits
    assert example.saved_steps(tmp_path / "parts") == [2, 3, 6]


@pytest.mark.parametrize(("cell", "wrapper"), [("lstm", "ddp"), ("gru", "fsdp"), ("rnn", "ddp")])
def test_run_learns(example, cell, wrapper, tmp_path, capsys):
    options = [*TINY, "--steps", "40", "--lr", "0.02", "--cell", cell, "--wrapper", wrapper]
    losses = example.main([*options, "--checkpoints", str(tmp_path)])
    assert len(losses) == 40
    assert sum(losses[-10:]) < 0.75 * sum(losses[:10])


def test_batch_has_the_sum_of_the_two_marked_numbers(example):
    x, target = example.make_batch(3, 0, 9, 50)
    assert (x[..., 1].sum(0) == 2).all()
    assert (x[:4, :, 1].sum(0) == 1).all()
    marked = x[..., 0].T[x[..., 1].T == 1].view(50, 2)
    assert (marked.sum(1) == target).all()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("--steps 0", "--steps must be above zero"),
        ("--lr nan", "--lr must be above zero"),
        ("--length 1", "--length must be 2 or more"),
        ("--resume --checkpoints nowhere", "no checkpoint in nowhere"),
        ("--wrapper horovod", "invalid choice"),
    ],
)
def test_bad_options_are_refused_with_a_reason(example, options, reason, capsys):
    with pytest.raises(SystemExit) as stop:
        example.main(options.split())
    assert stop.value.code == 2
    assert reason in " ".join(capsys.readouterr().err.split())
