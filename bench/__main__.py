# SPDX-License-Identifier: BSD-3-Clause
"""The command `python -m fastrnn bench`: check against torch.nn, measure, show, and train the example for a moment."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import shlex
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

import fastrnn

from . import check, machine, pages, picture, report, runner
from .shapes import GATES, PASSES, SHAPES

DTYPES = {name: getattr(torch, name) for name in ("float32", "float64", "bfloat16", "float16")}
INTERRUPTED = 130  # as a shell reports ctrl-C


def _names(known: Sequence[str]) -> object:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        unknown = [name for name in names if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: known are {', '.join(known)}")
        return [name for name in known if name in names]

    return parse


def _threads(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part == "all" or (part.isdecimal() and int(part) > 0) for part in parts):
        raise argparse.ArgumentTypeError(f"must be numbers from 1 on, or all, like 1,all; got {text!r}")
    return sorted({machine.cores() if part == "all" else int(part) for part in parts})


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number of seconds above 0, got {text!r}")
    return seconds


def _directory_there(text: str) -> Path:
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"the directory {path.parent} does not exist")
    return path


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, with defaults filled in."""
    parser = argparse.ArgumentParser("python -m fastrnn bench", description=__doc__)
    add = parser.add_argument
    add(
        "--full", action="store_true", help="every shape (about 25 minutes on two cores) instead of the quick selection"
    )
    add("--cells", type=_names(list(GATES)), default=list(GATES), metavar="A,B", help="of " + ", ".join(GATES))
    add("--passes", type=_names(list(PASSES)), default=list(PASSES), metavar="A,B", help="of " + ", ".join(PASSES))
    add("--threads", type=_threads, default=_threads("1,all"), metavar="N,M", help="thread counts (default: 1,all)")
    add("--shapes", default="", metavar="A,B", help="names or patterns like 'grid-*'; see --list")
    add("--dtype", choices=DTYPES, default="float32", help="of both sides (default: float32)")
    add("--seconds-per-row", type=_seconds, metavar="S", help="for the samples of a row (default 0.8, --full 2)")
    add(
        "--output",
        type=Path,
        metavar="FILE",
        help="the JSON (default: bench/results/latest.json); the picture beside it",
    )
    add("--markdown", type=_directory_there, metavar="FILE", help="also write the tables of docs/benchmarks.md")
    add(
        "--from",
        type=Path,
        dest="source",
        metavar="FILE",
        help="measure nothing: show an earlier JSON again, and draw its picture beside it",
    )
    add("--pages", action="store_true", help="with --from: write the tables of README.md and docs/benchmarks.md")
    add("--list", action="store_true", help="print the shapes with their sources, and stop")
    add("--skip-training-run", action="store_true", help="leave out examples/char_lm.py")
    options = parser.parse_args(argv)
    options.seconds_per_row = options.seconds_per_row or (2.0 if options.full else 0.8)
    options.output = options.output or machine.checkout() / "bench" / "results" / "latest.json"
    if options.source and not options.source.is_file():
        parser.error(f"--from: there is no file {options.source}")
    if options.pages and not options.source:
        parser.error("--pages goes with --from")
    if options.pages and not options.source.resolve().is_relative_to(machine.checkout().resolve()):
        parser.error(f"--pages: {options.source} is not in the checkout, where the pages could name it")
    if not (options.list or options.source or _tasks(options)):
        parser.error("no row fits these arguments; --list prints the shapes with their cells")
    return options


def _tasks(options: argparse.Namespace) -> list[runner.Task]:
    patterns = [pattern for pattern in options.shapes.split(",") if pattern]
    return runner.plan(
        full=options.full, cells=options.cells, passes=options.passes, threads=options.threads, patterns=patterns
    )


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


@contextlib.contextmanager
def _progress(total: int) -> Iterator[object]:
    """A tqdm bar on stderr, or a stand-in that only prints lines."""
    try:
        from tqdm import tqdm
    except ImportError:

        class Silent:
            def update(self) -> None: ...

            def set_description_str(self, text: str) -> None: ...

            def write(self, text: str) -> None:
                print(text, flush=True)

        yield Silent()
        return
    with tqdm(total=total, unit="row", dynamic_ncols=True, leave=False, disable=None) as bar:
        yield bar


def run_check() -> tuple[list[dict[str, str | float]], bool]:
    """Prints the short check; its rows, and whether all of them are right."""
    print("Check against torch.nn: outputs, final states, every gradient. Worst error as a fraction of what is allowed")
    print("(2 * error of torch.nn in the same dtype + 4 * eps * max|value|, both against float64; at most 1 is right):")
    rows = check.short_check()
    names = dict.fromkeys(row["name"] for row in rows)
    for name in names:
        found = {row["dtype"]: row for row in rows if row["name"] == name}
        wrong = ", ".join(f"{row['output']} in {dtype}" for dtype, row in found.items() if not row["worst"] <= 1)
        figures = "   ".join(f"{dtype} {row['worst']:.2f}" for dtype, row in found.items())
        print(f"  {name:<44}{figures}{'   WRONG: ' + wrong if wrong else ''}")
    return rows, all(row["worst"] <= 1 for row in rows)


def route() -> str:
    """fastrnn's own sentence on which code a plain float32 layer takes."""
    return fastrnn.explain(fastrnn.LSTM(4, 4), torch.zeros(1, 1, 4))


def run_speed(options: argparse.Namespace, result: dict[str, object]) -> None:
    """Measures into result["rows"]; sets result["complete"] unless ctrl-C stops it."""
    tasks = _tasks(options)
    dtype, order = DTYPES[options.dtype], {shape.name: n for n, shape in enumerate(SHAPES)}
    common = {"commit": result["commit"], "machine": result["machine"]["cpu"]}
    roofline = machine.measure_roofline(options.threads, dtype)
    result["roofline"] = dataclasses.asdict(roofline)
    for line in [*report.roofline_lines(result["roofline"]), runner.missing_peers(tasks, dtype)]:
        print(line)
    print(f"\n{report.HEADER}\n{'-' * len(report.HEADER)}", flush=True)
    with _progress(runner.row_count(tasks)) as bar:
        try:
            for task in tasks:
                bar.set_description_str(f"{task.cell} {task.shape.name} {task.pass_}")
                for row in runner.measure(task, roofline, dtype, options.seconds_per_row):
                    result["rows"].append({**common, "order": order[task.shape.name], **row})
                    bar.write(report.table_line(result["rows"][-1]))
                    bar.update()
            result["complete"] = True
        except KeyboardInterrupt:
            print("\nStopped; what was measured is kept.", file=sys.stderr)


def run_training(root: Path) -> int | None:
    """The example in its short form as a process of its own; its exit code, or None where there is no example."""
    example = root / "examples" / "char_lm.py"
    if not example.is_file():
        print("\nTraining run: left out, examples/char_lm.py is not here (it is part of the source tree).")
        return None
    print("\nTraining run: examples/char_lm.py --short", flush=True)
    return subprocess.run([sys.executable, str(example), "--short"], cwd=root).returncode


def show(options: argparse.Namespace, result: report.Result) -> None:
    """Summary, picture, Markdown."""
    print("\n" + report.summary(result))
    name = "speed.png" if options.output.stem == "latest" else options.output.stem + ".png"
    image = options.output.with_name(name)
    missing = picture.available()
    if missing:
        print(f"picture: {missing}")
    elif picture.draw(result, image):
        print(f"picture: {_shown(image)}")
    if options.markdown:
        options.markdown.write_text(report.markdown(result), encoding="utf-8")
        print(f"markdown: {_shown(options.markdown)}")


def _shown(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; 0, or 1 where the numbers are wrong or the example fails, or 130 after ctrl-C."""
    options = parse(argv)
    # torch.nn says so itself, once: its LSTM with a projection is the generic one.
    warnings.filterwarnings("ignore", message="LSTM with projections is not supported with oneDNN")
    if options.list:
        for shape in SHAPES:
            quick = "quick: " + " ".join(shape.quick) if shape.quick else ""
            print(f"{shape.name:<34}{shape.sizes():<28}{' '.join(shape.cells):<14}{quick:<22}{shape.source}")
        return 0
    if options.source:
        result = report.read_json(options.source)
        options.output = options.source
        print(f"{report.HEADER}\n{'-' * len(report.HEADER)}")
        print("\n".join(map(report.table_line, result["rows"])))
        show(options, result)
        for page in pages.renew(result, options.source, machine.checkout()) if options.pages else ():
            print(f"page: {_shown(page)}")
        return 0
    start = time.perf_counter()
    command = shlex.join(["python", "-m", "fastrnn", "bench", *(sys.argv[1:] if argv is None else argv)])
    result: dict[str, object] = {"created": _now(), "command": command, "commit": machine.commit()}
    result |= {"complete": False, "machine": machine.describe(), "route": route(), "roofline": {}, "rows": []}
    print(f"fastrnn {fastrnn.__version__} {result['commit']}: {result['machine']['cpu']}, {result['machine']['isa']}")
    print(result["route"] + "\n")
    if "-> kernel" not in result["route"]:
        print("fastrnn's kernels are not in use: there is nothing to measure.", file=sys.stderr)
        return 1
    result["check"], right = run_check()
    print(flush=True)
    try:
        run_speed(options, result)
    finally:  # whatever stops the run, what was measured is kept
        result["seconds"] = round(time.perf_counter() - start, 1)
        report.write_json(result, options.output)
    show(options, result)
    print(f"results: {_shown(options.output)} ({result['seconds']:.0f} s)")
    right = right and not any("error" in row for row in result["rows"])
    if not right:
        print("The numbers are wrong: see WRONG above.", file=sys.stderr)
    if not result["complete"]:
        return INTERRUPTED
    trained = 0 if options.skip_training_run else run_training(machine.checkout())
    return 0 if right and not trained else 1


if __name__ == "__main__":
    sys.exit(main())
