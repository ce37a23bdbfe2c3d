# SPDX-License-Identifier: BSD-3-Clause
"""The benchmark on a GPU: `python -m bench.gpu` in a checkout, with or without fastrnn's kernels for CUDA."""

from __future__ import annotations

import argparse
import datetime
import fnmatch
import shlex
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from .. import machine
from .. import picture as matplotlib_picture
from ..report import read_json, write_json
from . import contenders, picture, report, runner, shapes
from .backend import Backend, Cpu, Cuda

NO_GPU = "the GPU benchmark needs a CUDA device that torch can see; --device cpu tests the program on small sizes"
RESERVE_SECONDS = 5.0  # of the time allowed, for the picture and the JSON


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, with defaults filled in."""
    parser = argparse.ArgumentParser("python -m bench.gpu", description=__doc__)
    add = parser.add_argument
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: small sizes, to test the program")
    add(
        "--minutes",
        type=float,
        default=9.0,
        metavar="M",
        help="time for all of it (default 9); rows beyond are left out",
    )
    add("--seconds", type=float, default=0.3, metavar="S", help="of samples for each contender of a row (default 0.3)")
    add("--level", type=int, default=9, metavar="N", help="rows up to this level, 0 being the most important")
    add(
        "--rows",
        default="*",
        metavar="PATTERN",
        help="rows whose `cell shape mode pass` fits, like 'gru middle-* tf32 *'",
    )
    add("--stock", action="store_true", help="torch.nn alone")
    add("--output", type=Path, metavar="FILE", help="the JSON (default: bench/results/gpu.json); the picture beside it")
    add("--markdown", type=Path, metavar="FILE", help="also write the table for the documentation")
    add("--from", type=Path, dest="source", metavar="FILE", help="measure nothing: show an earlier JSON again")
    add("--list", action="store_true", help="print the rows in their order, and stop")
    options = parser.parse_args(argv)
    options.output = options.output or machine.checkout() / "bench" / "results" / "gpu.json"
    return options


def chosen(options: argparse.Namespace) -> list[shapes.Row]:
    """The rows that the options name, small ones on the CPU."""
    rows = [
        row
        for row in shapes.rows()
        if row.level <= options.level
        and fnmatch.fnmatch(f"{row.cell} {row.shape.name} {row.mode} {row.pass_}", options.rows)
    ]
    return [shapes.small(row) for row in rows] if options.device == "cpu" else rows


def run(options: argparse.Namespace, backend: Backend, result: dict[str, object]) -> None:
    """Measures into result["rows"], the JSON written after each of them, until the time is used."""
    start, rows = time.perf_counter(), chosen(options)
    tiers, said = ({}, "left out by --stock") if options.stock else contenders.own_tiers(backend)
    result["fastrnn"] = said
    print(f"fastrnn: {said}")
    result["ceilings"] = backend.ceilings()
    for name, rate in result["ceilings"].items():
        print(f"{name}: {rate * 1e-12:.2f} T{'B' if name == 'copy' else 'FLOP'}/s in this run")
    makers = contenders.makers(backend, tiers)
    print(f"\n{report.HEADER}\n{'-' * len(report.HEADER)}", flush=True)
    longest = 0.0
    for number, row in enumerate(rows):
        now = time.perf_counter()
        if now - start + longest + RESERVE_SECONDS > options.minutes * 60:
            result["left_out"] = len(rows) - number
            return
        result["rows"].append({"order": number, **runner.measure(row, backend, makers, options.seconds)})
        backend.free()
        longest = max(0.8 * longest, time.perf_counter() - now)
        print(report.table_line(result["rows"][-1]), flush=True)
        result["seconds"] = round(time.perf_counter() - start, 1)
        write_json(result, options.output)
    result["complete"] = True


def show(options: argparse.Namespace, result: dict[str, object]) -> None:
    """Summary, picture, Markdown."""
    print("\n" + report.summary(result))
    missing = matplotlib_picture.available()
    image = options.output.with_suffix(".png")
    if missing:
        print(f"picture: {missing}")
    elif picture.draw(result, image):
        print(f"picture: {image.name}")
    if options.markdown:
        options.markdown.write_text(report.markdown(result), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; 0, or 1 where fastrnn's numbers are wrong or there is no GPU."""
    options = parse(argv)
    if options.list:
        for row in shapes.rows():
            print(f"{row.level}  {row.cell:<5}{row.shape.name:<22}{row.shape.sizes():<30}{row.mode:<9}{row.pass_}")
        return 0
    if options.source:
        result = read_json(options.source)
        options.output = options.source
        print(f"{report.HEADER}\n{'-' * len(report.HEADER)}")
        print("\n".join(map(report.table_line, result["rows"])))
        show(options, result)
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        return 1
    warnings.filterwarnings("ignore", message="LSTM with projections is not supported with oneDNN")
    backend: Backend = Cuda() if options.device == "cuda" else Cpu()
    command = shlex.join(["python", "-m", "bench.gpu", *(sys.argv[1:] if argv is None else argv)])
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    result: dict[str, object] = {"created": created, "command": command, "commit": machine.commit()}
    result |= {"complete": False, "left_out": 0, "machine": backend.describe(), "rows": []}
    print(", ".join(f"{name} {value}" for name, value in result["machine"].items() if value not in (None, "")))
    try:
        run(options, backend, result)
    finally:  # whatever stops the run, what was measured is kept
        write_json(result, options.output)
    show(options, result)
    return 1 if any(row.get("wrong") for row in result["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main())
