# SPDX-License-Identifier: BSD-3-Clause
"""Shows results: terminal table, summary, JSON, Markdown. All is made from what the JSON holds. Used by __main__.py.

`result` is {"commit", "command", "machine", "roofline", "check", "rows", "complete", ...}; a row is what runner.measure
yields. The picture is in picture.py.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from .peers import ONNX_RUNTIME, TORCH
from .shapes import GATES, PASSES

Row = Mapping[str, object]
Result = Mapping[str, object]
PEERS = (TORCH, ONNX_RUNTIME)
HEADER = (
    f"{'cell':<5}{'shape':<32}{'sizes':<27}{'pass':<17}{'thr':>3}{'fastrnn':>10}{'spread':>8}"
    f"{'/' + TORCH:>11}{'/ORT':>9}{'roof':>11}"
)
LEGEND = """\
fastrnn: median of a call; spread: its interquartile range. /torch.nn, /ORT: time of the peer over time of fastrnn, so
above 1 fastrnn is faster; ! slower by more than the noise (both interquartile ranges together), ~ slower within it.
roof: fraction of the nearer bound, multiply-adds (fma) or reading the recurrent weights at each step from the cache
that holds them (mem; a little above 1 is possible), both measured in this run."""


def duration(seconds: float) -> str:
    """Three significant digits with a unit: `4.21 us`, `12.3 ms`."""
    for unit, scale in (("us", 1e-6), ("ms", 1e-3)):
        if seconds < 0.9995 * scale * 1000:
            value = seconds / scale
            return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f} {unit}"
    return f"{seconds:.2f} s"


def sizes(row: Row) -> str:
    """The sizes of a row, like `T100 B16 I80 H256 D2`."""
    more = [f"{letter}{row[letter]}" for letter, usual in (("P", 0), ("D", 1), ("L", 1)) if row[letter] != usual]
    return " ".join([*(f"{letter}{row[letter]}" for letter in "TBIH"), *more])


def ratio_text(row: Row, peer: str, missing: str = "-") -> str:
    """The ratio to a peer with its mark, or `missing`."""
    ratio = row["ratio"].get(peer)
    if ratio is None:
        return missing
    mark = "!" if peer in row["lost"] else "~" if ratio < 1 else ""
    return f"{ratio:.2f}x{mark}" if ratio < 99.5 else f"{ratio:.0f}x{mark}"


def roof_text(row: Row) -> str:
    """The larger fraction and which bound it is of; `-` where it was not measured."""
    bounds = [(row[key], name) for key, name in (("fraction_fma", "fma"), ("fraction_cache", "mem")) if row[key]]
    if not bounds:
        return "-"
    fraction, name = max(bounds)
    return f"{fraction:.2f} {name}"


def table_line(row: Row) -> str:
    """One row under HEADER."""
    label = f"{row['cell']:<5}{row['shape']:<32}{sizes(row):<27}{row['pass']:<17}{row['threads']:>3}"
    if "error" in row:
        return f"{label}  WRONG: {row['error']}"
    ours = row["ours"]
    spread = (ours["q3"] - ours["q1"]) / ours["median"] * 100
    first, second = (ratio_text(row, peer) for peer in PEERS)
    return f"{label}{duration(ours['median']):>10}{spread:>7.1f}%{first:>11}{second:>9}{roof_text(row):>11}"


def timed(rows: Iterable[Row]) -> list[Row]:
    """The rows with right numbers."""
    return [row for row in rows if "error" not in row]


def _mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def geometric_means(rows: Iterable[Row]) -> list[dict[str, object]]:
    """Per cell, pass, thread count and peer: number of rows, geometric mean, worst ratio and its shape, rows lost."""
    groups: dict[tuple[str, str, int, str], list[Row]] = defaultdict(list)
    for row in timed(rows):
        for peer in row["ratio"]:
            groups[row["cell"], row["pass"], row["threads"], peer].append(row)
    order = {name: n for n, name in enumerate([*GATES, *PASSES, *PEERS])}
    found = []
    for key in sorted(groups, key=lambda key: [order[part] if isinstance(part, str) else part for part in key]):
        group, peer = groups[key], key[3]
        worst = min(group, key=lambda row: row["ratio"][peer])
        found.append(
            {
                **dict(zip(("cell", "pass", "threads", "peer"), key, strict=True)),
                "rows": len(group),
                "mean": _mean([row["ratio"][peer] for row in group]),
                "worst": worst["ratio"][peer],
                "worst_shape": worst["shape"],
                "lost": sum(peer in row["lost"] for row in group),
            }
        )
    return found


def _pairs(rows: Iterable[Row], change: Mapping[str, object], partner: Mapping[str, object]) -> list[tuple[Row, Row]]:
    """Rows with the values of `change`, each with the row that differs from it by the values of `partner` alone."""
    names = ("cell", "shape", "pass", "threads", "dtype")
    index = {tuple(row[name] for name in names): row for row in timed(rows)}
    found = []
    for row in index.values():
        if all(row[name] == value for name, value in change.items()):
            other = index.get(tuple({**row, **partner}[name] for name in names))
            if other is not None:
                found.append((row, other))
    return found


def _ways(rows: Sequence[Row]) -> list[str]:
    """How long a cache line took from core to core, before and after each of these rows, where that was measured."""
    ways = [max(row["round_ns"]) for row in rows if row.get("round_ns") and None not in row["round_ns"]]
    if not ways:
        return []
    far = sum(way > 3 * min(ways) for way in ways)
    return [
        f"{rows[0]['threads']} threads: a cache line took {min(ways):.0f} ns from core to core, and in {far} of "
        f"{len(ways)} rows at a time more than three times as long ({max(ways):.0f} ns at most)"
    ]


def gains(rows: Sequence[Row]) -> list[str]:
    """fastrnn against itself: more threads against one (B >= 16), torch.vmap over B sequences against a batch of B, a
    token of a packed batch against a padded one."""
    lines = []
    for threads in sorted({row["threads"] for row in rows} - {1}):
        lines += _ways([row for row in timed(rows) if row["threads"] == threads])
        pairs = [(one, more) for more, one in _pairs(rows, {"threads": threads}, {"threads": 1}) if more["B"] >= 16]
        factors = [(one["ours"]["median"] / more["ours"]["median"], more) for one, more in pairs]
        if factors:
            least, row = min(factors, key=lambda pair: pair[0])
            mean = _mean([factor for factor, _ in factors])
            text = f"{threads} threads over 1, B >= 16, {len(factors)} rows: {mean:.2f}x, least {least:.2f}x"
            lines.append(f"{text} ({row['cell']} {row['shape']} {row['pass']})")
    costs = [
        mapped["ours"]["median"] / whole["ours"]["median"]
        for mapped, whole in _pairs(rows, {"pass": "vmap"}, {"pass": "inference"})
    ]
    if costs:
        lines.append(f"torch.vmap over one batch, {len(costs)} rows: {_mean(costs):.2f}x, most {max(costs):.2f}x")
    for pass_ in ("inference", "training"):
        pairs = _pairs(rows, {"pass": "packed-" + pass_}, {"pass": pass_})
        costs = [
            packed["ours"]["median"] / packed["tokens"] / (padded["ours"]["median"] / padded["tokens"])
            for packed, padded in pairs
        ]
        if costs:
            lines.append(
                f"packed {pass_}, cost of a valid token over padded, {len(costs)} rows: "
                f"{_mean(costs):.2f}x, most {max(costs):.2f}x"
            )
    return lines


def summary(result: Result) -> str:
    """The text under the table: geometric means, fastrnn against itself, the roofline, what is lost or wrong."""
    rows = result["rows"]
    columns = "".join(f"{'over ' + peer + ':':>20} mean   worst  lost/rows" for peer in PEERS)
    lines = [LEGEND, "", f"{'':<5}{'geometric means':<17}{'thr':>3}{columns}"]
    grouped: dict[tuple[str, str, int], dict[str, dict[str, object]]] = defaultdict(dict)
    for mean in geometric_means(rows):
        grouped[mean["cell"], mean["pass"], mean["threads"]][mean["peer"]] = mean
    for (cell, pass_, threads), means in grouped.items():
        cells = [
            f"{mean['mean']:>24.2f}x{mean['worst']:>7.2f}x{mean['lost']:>7}/{mean['rows']:<3}"
            for mean in (means[peer] for peer in PEERS if peer in means)
        ]
        lines.append(f"{cell:<5}{pass_:<17}{threads:>3}{''.join(cells)}")
    lines += ["", *gains(rows), *roofline_lines(result["roofline"], rows)]
    lost = sum(bool(row["lost"]) for row in timed(rows))
    wrong = len(rows) - len(timed(rows))
    stopped = "" if result["complete"] else "; stopped before the end"
    return "\n".join([*lines, f"{len(rows)} rows, {lost} lost to a peer, {wrong} with wrong numbers{stopped}"])


def roofline_lines(roofline: Mapping[str, Mapping[str, object]], rows: Iterable[Row] = ()) -> list[str]:
    """Peak and bandwidth of this run, a line for each thread count. Rows have their own peaks, measured beside them: of
    these the median, since the one before the first row may fall into a burst of the machine's other guests."""
    if not roofline.get("fma"):
        return ["FMA peak and cache bandwidth: not measured (the extension does not offer it)"]
    peaks = defaultdict(list)
    for row in timed(rows):
        peaks[row["threads"]].append(row["fma_peak"])
    lines = []
    for threads, before in roofline["fma"].items():
        peak = statistics.median(peaks[int(threads)] or [before])
        curve = roofline["bandwidth"][threads]
        points = ", ".join(f"{int(size) // 1024} KB {rate:.0f}" for size, rate in curve.items())
        count = f"{threads} thread{'s' if int(threads) > 1 else ''}"
        lines.append(f"{count}: FMA peak {peak:.0f} GFLOP/s; reads in GB/s, by size a thread: {points}")
    return lines


def write_json(result: Result, path: Path) -> None:
    """The whole result, one row a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head = json.dumps({**result, "rows": None}, indent=1)
    rows = ",\n  ".join(json.dumps(row) for row in result["rows"])
    path.write_text(head.replace('"rows": null', f'"rows": [\n  {rows}\n ]') + "\n", encoding="utf-8")


def read_json(path: Path) -> Result:
    """A result as write_json wrote it."""
    return json.loads(path.read_text(encoding="utf-8"))


def markdown(result: Result) -> str:
    """The tables of docs/benchmarks.md: the machine, the command, a line for each shape and pass, geometric means."""
    machine, rows = result["machine"], result["rows"]
    counts = sorted({row["threads"] for row in rows})
    heads = [f"{threads} thread{'s' if threads > 1 else ''}" for threads in counts]
    lines = [
        f"{machine['cpu']}, {machine['isa']}, {'/'.join(map(str, counts))} threads; torch {machine['torch']}, "
        f"ONNX Runtime {machine['onnxruntime'] or 'not installed'}, fastrnn {machine['fastrnn']} at "
        f"`{result['commit'] or 'no commit'}`; {_dtypes(rows)}; `{result['command']}`.",
        "",
        "Times are medians of one call of fastrnn. Ratios are the peer's time over fastrnn's: above 1 fastrnn is "
        "faster; **bold**: fastrnn is slower by more than the noise. Roof: the fraction reached of the nearer bound, "
        "multiply-adds (fma) or reading the recurrent weights from cache (mem), measured in the same run.",
    ]
    for cell in [cell for cell in GATES if any(row["cell"] == cell for row in rows)]:
        columns = [f"{head} | torch.nn | ORT | roof" for head in heads]
        lines += ["", f"**{cell.upper()}**", "", f"| shape | pass | {' | '.join(columns)} |"]
        lines += ["|" + "---|" * 2 + "--:|" * (4 * len(counts))]
        table: dict[tuple[str, str], dict[int, Row]] = defaultdict(dict)
        for row in rows:
            if row["cell"] == cell:
                table[row["shape"], row["pass"]][row["threads"]] = row
        for (shape, pass_), by_threads in table.items():
            cells = [_markdown_cells(by_threads.get(threads)) for threads in counts]
            first = next(iter(by_threads.values()))
            lines.append(f"| {shape} ({sizes(first)}) | {pass_} | {' | '.join(cells)} |")
    lines += ["", "Geometric means over the rows above:", ""]
    lines += ["| cell | pass | threads | over | rows | mean | worst | lost |", "|---|---|--:|---|--:|--:|--:|--:|"]
    for mean in geometric_means(rows):
        lines.append(
            f"| {mean['cell']} | {mean['pass']} | {mean['threads']} | {mean['peer']} | {mean['rows']} "
            f"| {mean['mean']:.2f} | {mean['worst']:.2f} | {mean['lost']} |"
        )
    more = [*gains(rows), *roofline_lines(result["roofline"], rows)]
    return "\n".join([*lines, "", *(f"- {line}" for line in more), ""])


def _dtypes(rows: Iterable[Row]) -> str:
    return ", ".join(sorted({row["dtype"] for row in rows})) or "no rows"


def _markdown_cells(row: Row | None) -> str:
    if row is None:
        return " | ".join([""] * 4)
    if "error" in row:
        return "wrong | | |"
    ratios = [f"{row['ratio'][peer]:.2f}" if peer in row["ratio"] else "" for peer in PEERS]
    ratios = [f"**{text}**" if peer in row["lost"] else text for peer, text in zip(PEERS, ratios, strict=True)]
    return " | ".join([duration(row["ours"]["median"]), *ratios, roof_text(row)])
