# SPDX-License-Identifier: BSD-3-Clause
"""Fails when an ISA object holds more than 40 sweeps; prints the instances of each and what the last builds took.

Run by `make lint`. A sweep is a time loop compiled for one cell and lane class: forward<Cell, V>, backward<Cell, V>,
or, with products in bfloat16, forward_blocks<Cell, V, Blocks> and backward_blocks<Cell, V, Blocks>.
"""

import re
import sys

from isa_objects import BUILD, ROOT, isa_objects, symbols

MOST_SWEEPS = 40
MOST_SECONDS = 90.0  # a clean build on two cores
CORES = 2
SWEEP = re.compile(r"\bfastrnn::cpu::(forward|backward)(_blocks)?<")
TILE = re.compile(r"\b(tile|dot_tile|AmxBlocks::product|AmxBlocks::pair|sixteen|thirty_two)<")


def compile_seconds() -> dict[str, float]:
    """Seconds that each object took when it was last built, from ninja's log: start, end (ms), mtime, output, hash."""
    log = (BUILD / ".ninja_log").read_text().splitlines()
    rows = [line.split("\t") for line in log if not line.startswith("#")]
    return {row[3]: (int(row[1]) - int(row[0])) / 1000 for row in rows if (ROOT / row[3]).exists()}


def main() -> None:
    """Prints both budgets; exits with 1 when there are too many sweeps. Time is printed alone: machines differ."""
    too_many = False
    for path in isa_objects():
        names = {symbol.name.split(" [clone")[0] for symbol in symbols(path, demangle=True)}
        sweeps, tiles = (sum(bool(pattern.search(name)) for name in names) for pattern in (SWEEP, TILE))
        too_many |= sweeps > MOST_SWEEPS
        print(f"check_budget: {path.name}: {sweeps} sweeps of at most {MOST_SWEEPS}, {tiles} tiles")
    seconds = compile_seconds()
    slowest = max(seconds, key=lambda name: seconds[name])
    least = max(sum(seconds.values()) / CORES, seconds[slowest])
    total, verdict = sum(seconds.values()), "over the budget" if least > MOST_SECONDS else "within the budget"
    print(f"check_budget: compiling took {total:.0f} s when it was last done, {slowest} {seconds[slowest]:.0f} s")
    print(
        f"check_budget: on {CORES} cores {least:.0f} s or more, {verdict} of {MOST_SECONDS:.0f} s for an idle machine"
    )
    sys.exit(too_many)


if __name__ == "__main__":
    main()
