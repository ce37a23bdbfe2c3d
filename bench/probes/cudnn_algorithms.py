# SPDX-License-Identifier: BSD-3-Clause
"""cuDNN's algorithms against each other, by torch.nn alone: needs a GPU and no extension.

    python -m bench.probes.cudnn_algorithms          # bench/results/cudnn.json
    python -m bench.probes.cudnn_algorithms --device cpu --steps 3      # tests the program

PyTorch takes the algorithm by sizes, and always STANDARD for a PackedSequence. So each layer is timed on a padded
batch, with the algorithm that PyTorch takes for it, and on the same batch packed at full length, with STANDARD:
microseconds a step, forward and forward with backward, for each mode of arithmetic.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from ..gpu.backend import Backend, Cpu, Cuda, arithmetic, interleaved
from ..gpu.runner import algorithms
from ..gpu.shapes import MODES, Row
from ..shapes import Shape

RESULTS = Path(__file__).resolve().parent.parent / "results"
BATCH = 32
UNITS = (64, 128, 160, 192, 256, 512, 768, 1024)
SECONDS = 0.05


def rows(steps: int) -> Iterator[Row]:
    """What is timed, small layers first."""
    for units in UNITS:
        shape = Shape(f"h{units}", steps, BATCH, units, units, "probe")
        for mode in MODES:
            if mode != "float64":
                yield from (Row(cell, shape, mode, p, 0) for cell in ("lstm", "gru") for p in ("inference", "training"))


def measure(row: Row, backend: Backend) -> dict[str, object]:
    """Microseconds a step, padded and packed, with the algorithm of each."""
    shape, training = row.shape, row.pass_ == "training"
    with arithmetic(row.mode):
        dtype = getattr(torch, MODES[row.mode])
        module = getattr(nn, row.cell.upper())(shape.I, shape.H, device=backend.device, dtype=dtype).train(training)
        x = torch.randn(shape.T, shape.B, shape.I, device=backend.device, dtype=dtype)
        packed = pack_padded_sequence(x, torch.full((shape.B,), shape.T))
        d_y = torch.randn(shape.T, shape.B, shape.H, device=backend.device, dtype=dtype)

        def call(argument: torch.Tensor | PackedSequence) -> None:
            y = module(argument)[0]
            if training:
                data = y.data if isinstance(y, PackedSequence) else y
                torch.autograd.grad(data, list(module.parameters()), d_y.view_as(data))

        with torch.inference_mode(not training):
            functions = {"padded": lambda: call(x), "packed": lambda: call(packed)}
            timings = interleaved(backend, functions, SECONDS)
    names = {"padded": row.pass_, "packed": f"packed-{row.pass_}"}
    return {
        "cell": row.cell,
        "mode": row.mode,
        "pass": row.pass_,
        "T": shape.T,
        "B": shape.B,
        "H": shape.H,
        **{f"{kind}_us": timing.median * 1e6 / shape.T for kind, timing in timings.items()},
        **{f"{kind}_is": algorithms(Row(row.cell, shape, row.mode, name, 0), backend) for kind, name in names.items()},
    }


def main(argv: Sequence[str] | None = None) -> int:
    """0, or 1 where there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to test the program")
    parser.add_argument("--steps", type=int, default=512, metavar="T", help="length of the sequences (default 512)")
    parser.add_argument("--output", type=Path, default=RESULTS / "cudnn.json", metavar="FILE")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("this probe needs a CUDA device that torch can see", file=sys.stderr)
        return 1
    backend: Backend = Cuda() if options.device == "cuda" else Cpu()
    found: list[dict[str, object]] = []
    print(f"{'':<35}{'padded':>10}{'':<34}{'packed':>10}")
    for row in rows(options.steps):
        try:
            one = measure(row, backend)
        except RuntimeError as error:
            print(f"{row.cell} H{row.shape.H} {row.mode} {row.pass_}: {str(error).splitlines()[0]}")
            continue
        found.append(one)
        label = f"{one['cell']:<5}H{one['H']:<6}{one['mode']:<10}{one['pass']:<13}"
        print(f"{label}{one['padded_us']:>10.2f} {one['padded_is']:<33}{one['packed_us']:>10.2f} {one['packed_is']}")
        result = {"machine": backend.describe(), "unit": "microseconds a step", "rows": found}
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
