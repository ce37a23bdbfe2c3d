# SPDX-License-Identifier: BSD-3-Clause
"""The tables of README.md and docs/benchmarks.md, written from a result: `bench --from FILE --pages`. Used by
__main__.py; tests/test_pages.py holds the pages to the files that they name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from . import report
from .shapes import GATES

# Passes of the table in README.md, under their names there.
PASSES = {
    "inference": "inference",
    "training": "training",
    "packed-inference": "packed inference",
    "packed-training": "packed training",
    "lengths-training": "training with lengths",
    "reset-training": "training with resets",
    "call": "one call, T = 1, B = 1",
    "prepacked-call": "the same, prepacked",
}
# What stands between these lines is written here; the first names the result.
BETWEEN = re.compile(r"(<!-- table of (\S+) -->\n).*?(<!-- end of the table -->)", re.DOTALL)


def means_table(result: report.Result) -> str:
    """The table of README.md: geometric means and, in brackets, the worst row, per cell and pass."""
    counts = sorted({row["threads"] for row in result["rows"]})
    means = {
        (mean["cell"], mean["pass"], mean["threads"], mean["peer"]): f"{mean['mean']:.2f} ({mean['worst']:.2f})"
        for mean in report.geometric_means(result["rows"])
    }
    titles = []
    for peer in report.PEERS:
        titles += [f"{peer}, 1 thread" if n == 0 else f"{count} threads" for n, count in enumerate(counts)]
    lines = [f"| | pass | {' | '.join(titles)} |", "|---|---|" + "--:|" * len(titles)]
    for cell in GATES:
        for pass_, name in PASSES.items():
            cells = [means.get((cell, pass_, count, peer), "") for peer in report.PEERS for count in counts]
            if any(cells):
                lines.append(f"| {cell.upper()} | {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def texts(result: report.Result) -> Mapping[str, str]:
    """What stands between the marks of each page, by the path of the page in the checkout."""
    return {"README.md": means_table(result), "docs/benchmarks.md": report.markdown(result)}


def renew(result: report.Result, source: Path, root: Path) -> list[Path]:
    """Writes the tables of the checkout at root from `result`, which was read from `source`; the pages written.

    Raises:
        ValueError: source is not in the checkout, or a page has no marks.
    """
    name = source.resolve().relative_to(root.resolve()).as_posix()
    pages = []
    for path, text in texts(result).items():
        page = root / path
        before = page.read_text(encoding="utf-8")
        if not BETWEEN.search(before):
            raise ValueError(f"{path} has no lines <!-- table of FILE --> and <!-- end of the table -->")
        after = BETWEEN.sub(lambda match, text=text: f"<!-- table of {name} -->\n{text}{match[3]}", before)
        page.write_text(after, encoding="utf-8")
        pages.append(page)
    return pages
