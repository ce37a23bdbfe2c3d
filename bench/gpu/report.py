# SPDX-License-Identifier: BSD-3-Clause
"""Shows the GPU benchmark: terminal line, summary, Markdown; all from what the JSON holds. Used by __main__.py."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping

from ..report import duration, sizes
from .contenders import OURS, OURS_GRAPH, STOCK, STOCK_GRAPH, STOCK_WITHOUT_CUDNN

Row = Mapping[str, object]
# Column heads of the contenders that every row may have; forced tiers follow.
COLUMNS = {STOCK_GRAPH: "graph", STOCK_WITHOUT_CUDNN: "no cuDNN", OURS: OURS, OURS_GRAPH: "f. graph"}
SHORT = {"PERSIST_STATIC_SMALL_H": "SMALL_H", "PERSIST_STATIC": "PERSIST", "STANDARD": "STANDARD"}
HEADER = (
    f"{'cell':<5}{'shape':<22}{'sizes':<28}{'mode':<9}{'pass':<17}{'cuDNN':<18}{STOCK:>10}{'us/step':>9}"
    + "".join(f"{'x ' + head:>11}" for head in COLUMNS.values())
    + f"{'floor':>9}{'best/floor':>11}"
)
LEGEND = """\
torch.nn: median of a call. x: how many times faster than torch.nn (above 1 is faster; ! slower by more than the noise,
both interquartile ranges together): torch.nn replayed from a CUDA graph, torch.nn with cuDNN disabled, fastrnn, fastrnn
replayed from a graph. floor: the least time by arithmetic and latency (bench/gpu/floor.py), over it the fastest of all.
cuDNN: the algorithm that PyTorch takes, forward/backward."""


def algorithm(row: Row) -> str:
    """The names of the algorithms, short enough for a column."""
    return "/".join(SHORT.get(part, part.split(":")[0]) for part in row["algorithm"].split("/"))


def _ratio(row: Row, name: str) -> str:
    if name in row["ratio"]:
        return f"{row['ratio'][name]:.2f}x" + ("!" if name in row["lost"] else "")
    if name in row["wrong"]:
        return "WRONG"
    return "failed" if name in row["failed"] else "-"


def table_line(row: Row) -> str:
    """One row under HEADER, and a line for each contender that has forced itself, failed or is wrong."""
    label = f"{row['cell']:<5}{row['shape']:<22}{sizes(row):<28}{row['mode']:<9}{row['pass']:<17}{algorithm(row):<18}"
    if "error" in row:
        return f"{label}  FAILED: {row['error']}"
    stock = row["times"].get(STOCK)
    text = label + (f"{duration(stock['median']):>10}{row['us_per_step'][STOCK]:>9.2f}" if stock else f"{'-':>19}")
    text += "".join(f"{_ratio(row, name):>11}" for name in COLUMNS)
    least = duration(row["floor"]) if row["floor"] else "-"
    text += f"{least:>9}" + (f"{min(row['over_floor'].values()):>10.1f}x" if row["over_floor"] else f"{'-':>11}")
    more = [name for name in row["times"] if name not in COLUMNS and name != STOCK]
    if more:
        text += "\n" + " " * 16 + ", ".join(f"{name}: {_ratio(row, name)}" for name in more)
    for kind in ("wrong", "failed"):
        text += "".join(f"\n{' ' * 16}{name} {kind}: {reason}" for name, reason in row[kind].items())
    return text


def timed(rows: Iterable[Row]) -> list[Row]:
    """The rows in which torch.nn was timed, to which everything is a ratio."""
    return [row for row in rows if "error" not in row and row["ratio"]]


def means(rows: Iterable[Row]) -> list[dict[str, object]]:
    """Per contender, cell, mode and pass: number of rows, geometric mean of the ratio to torch.nn, worst, rows lost."""
    groups: dict[tuple[str, str, str, str], list[Row]] = defaultdict(list)
    for row in timed(rows):
        for name in row["ratio"]:
            if name != STOCK:
                groups[name, row["cell"], row["mode"], row["pass"]].append(row)
    found = []
    for (name, cell, mode, pass_), group in groups.items():
        worst = min(group, key=lambda row: row["ratio"][name])
        logarithms = [math.log(row["ratio"][name]) for row in group]
        found.append(
            {
                "contender": name,
                "cell": cell,
                "mode": mode,
                "pass": pass_,
                "rows": len(group),
                "mean": math.exp(sum(logarithms) / len(group)),
                "worst": worst["ratio"][name],
                "worst_shape": worst["shape"],
                "lost": sum(name in row["lost"] for row in group),
            }
        )
    return found


def summary(result: Mapping[str, object]) -> str:
    """The text under the table."""
    rows = result["rows"]
    lines = [LEGEND, "", f"{'geometric means over torch.nn':<32}{'rows':>5}{'mean':>8}{'worst':>8}{'lost':>6}"]
    for mean in means(rows):
        label = f"{mean['contender']:<18}{mean['cell']:<5}{mean['mode']:<9}{mean['pass']:<17}"
        numbers = f"{mean['rows']:>5}{mean['mean']:>7.2f}x{mean['worst']:>7.2f}x{mean['lost']:>6}"
        lines.append(f"{label}{numbers}  {mean['worst_shape']}")
    said = sorted({text for row in rows for text in row.get("warnings", [])})
    lines += [f"warned: {text}" for text in said]
    failed = sum("error" in row for row in rows)
    wrong = sum(bool(row.get("wrong")) for row in rows)
    stopped = "" if result["complete"] else f"; stopped before the end: {result['left_out']} rows left out"
    return "\n".join([*lines, f"{len(rows)} rows, {wrong} with wrong numbers, {failed} failed{stopped}"])


def markdown(result: Mapping[str, object]) -> str:
    """The table for docs: card and software, a line for each row."""
    card, rows = result["machine"], result["rows"]
    extra = list(dict.fromkeys(name for row in timed(rows) for name in row["ratio"] if name not in (*COLUMNS, STOCK)))
    columns = [name for name in (*COLUMNS, *extra) if any(name in row["ratio"] for row in timed(rows))]
    lines = [
        f"{card['card']}, driver {card.get('driver', '-')}, torch {card['torch']}, CUDA {card.get('cuda', '-')}, cuDNN "
        f"{card.get('cudnn', '-')}, fastrnn {card['fastrnn']} at `{result['commit'] or 'no commit'}`; "
        f"`{result['command']}`.",
        "",
        "Times are medians of a call of torch.nn, other columns how many times faster than it; **bold**: fastrnn "
        "slower by more than the noise. Floor: the least time by arithmetic and latency.",
        "",
        f"| cell | shape | mode | pass | cuDNN | torch.nn | {' | '.join(columns)} | floor |",
        "|" + "---|" * 5 + "--:|" * (len(columns) + 2),
    ]
    for row in rows:
        label = f"| {row['cell']} | {row['shape']} ({sizes(row)}) | {row['mode']} | {row['pass']} | {algorithm(row)} |"
        if "error" in row or STOCK not in row["times"]:
            lines.append(f"{label} failed |" + " |" * (len(columns) + 1))
            continue
        cells = [_ratio(row, name).rstrip("!") for name in columns]
        cells = [f"**{text}**" if name in row["lost"] else text for name, text in zip(columns, cells, strict=True)]
        least = duration(row["floor"]) if row["floor"] else ""
        lines.append(f"{label} {duration(row['times'][STOCK]['median'])} | {' | '.join(cells)} | {least} |")
    return "\n".join([*lines, ""])
