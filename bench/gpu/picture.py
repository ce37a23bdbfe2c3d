# SPDX-License-Identifier: BSD-3-Clause
"""The picture of the GPU benchmark: how many times faster than torch.nn, a line for each row. Called by __main__.py."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..report import sizes
from .contenders import OURS, OURS_GRAPH, STOCK, STOCK_GRAPH, STOCK_WITHOUT_CUDNN
from .report import algorithm, timed

LOOKS = {  # contender -> marker, colour
    STOCK_GRAPH: ("D", "#777777"),
    STOCK_WITHOUT_CUDNN: ("x", "#777777"),
    OURS: ("o", "#1f6fb4"),
    OURS_GRAPH: ("o", "#7fb3dd"),
}
MORE = ("^", "#2b8a3e")  # forced tiers
LINE_INCHES = 0.2


def draw(result: Mapping[str, object], path: Path) -> bool:
    """Writes the PNG; False where there is nothing to draw."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = timed(result["rows"])
    if not rows:
        return False
    height = 1.3 + LINE_INCHES * len(rows)
    figure = Figure((12, height), dpi=110)
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    figure.subplots_adjust(left=0.5, right=0.98, top=1 - 0.8 / height, bottom=0.45 / height)
    names = list(dict.fromkeys(name for row in rows for name in row["ratio"] if name != STOCK))
    for name in names:
        points = [(row["ratio"][name], place) for place, row in enumerate(rows) if name in row["ratio"]]
        marker, color = LOOKS.get(name, MORE)
        axis.plot(*zip(*points, strict=True), linestyle="", marker=marker, color=color, ms=5, label=name)
    axis.axvline(1.0, color="black", linewidth=1)
    axis.set_xscale("log")
    axis.set_ylim(len(rows) - 0.4, -0.6)
    labels = [f"{r['cell']} {r['shape']} {sizes(r)}  {r['mode']}  {r['pass']}  [{algorithm(r)}]" for r in rows]
    axis.set_yticks(range(len(rows)), labels, fontsize=7)
    axis.grid(axis="both", color="#e8e8e8", linewidth=0.7)
    axis.set_axisbelow(True)
    axis.set_xlabel("times faster than torch.nn (log)")
    card = result["machine"]
    title = f"{card['card']}, torch {card['torch']}, cuDNN {card.get('cudnn', '-')}, commit {result['commit'] or '-'}"
    figure.text(0.01, 1 - 0.25 / height, title, fontsize=10, fontweight="bold", va="top")
    if names:
        axis.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=len(names), frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return True
