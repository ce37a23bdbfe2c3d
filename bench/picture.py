# SPDX-License-Identifier: BSD-3-Clause
"""The picture: how many times faster than each peer, per shape, grouped by cell. Called by __main__.py.

A column for each cell, a band for each pass, a line for each shape. The place of a mark is the ratio (logarithmic);
its form is the peer, full for one thread and open for more; where fastrnn is slower it has another colour.
"""

from __future__ import annotations

from pathlib import Path

from .peers import ONNX_RUNTIME, TORCH
from .report import Result, Row, sizes, timed
from .shapes import GATES, PASSES

FASTER, SLOWER = "#1f6fb4", "#d1392b"
MARKERS = {TORCH: "o", ONNX_RUNTIME: "D"}
LINE_INCHES = 0.21
BAND_INCHES = 0.45


def available() -> str:
    """Why there can be no picture, or an empty string."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return "matplotlib is not installed: pip install 'fastrnn[bench]'"
    return ""


def draw(result: Result, path: Path) -> bool:
    """Writes the PNG; False where there is nothing to draw."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = timed(result["rows"])
    if not rows:
        return False
    cells = [cell for cell in GATES if any(row["cell"] == cell for row in rows)]
    # The lines of a band are the same in every column, so that names stand once, at the left.
    bands = {pass_: _lines([row for row in rows if row["pass"] == pass_]) for pass_ in PASSES}
    bands = {pass_: lines for pass_, lines in bands.items() if lines}
    heights = [BAND_INCHES + LINE_INCHES * len(lines) for lines in bands.values()]
    top, bottom = 1.05, 0.55
    height = sum(heights) + top + bottom
    width = 4.6 + 3.1 * len(cells)
    figure = Figure((width, height), dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.subplots(
        len(bands), len(cells), squeeze=False, sharex=True, gridspec_kw={"height_ratios": heights, "wspace": 0.04}
    )
    figure.subplots_adjust(
        left=4.3 / width,
        right=1 - 0.2 / width,
        top=1 - top / height,
        bottom=bottom / height,
        hspace=BAND_INCHES / (sum(heights) / len(heights)),
    )
    ratios = [ratio for row in rows for ratio in row["ratio"].values()]
    several = len({row["threads"] for row in rows}) > 1
    limits = (min(0.8, 0.9 * min(ratios)), max(1.25, 1.12 * max(ratios)))
    for band, (pass_, lines) in zip(axes, bands.items(), strict=True):
        for axis, cell in zip(band, cells, strict=True):
            shown = [row for row in rows if row["cell"] == cell and row["pass"] == pass_]
            _panel(axis, shown, lines, limits, offset=0.16 if several else 0.0)
            axis.tick_params(labelleft=axis is band[0])
        band[0].set_yticklabels([f"{name}   {size}" for name, size in lines], fontsize=8)
        band[0].annotate(
            pass_, (0, 1), (-4.15 * 72, 4), "axes fraction", textcoords="offset points", fontsize=11, fontweight="bold"
        )
    for axis, cell in zip(axes[0], cells, strict=True):
        axis.set_title(cell.upper(), fontsize=13, fontweight="bold", pad=10)
    for axis in axes[-1]:
        axis.set_xlabel("times faster than the peer (log)")
    machine = result["machine"]
    title = {"fontsize": 14, "fontweight": "bold"}
    figure.text(0.12 / width, 1 - 0.30 / height, "fastrnn: speed over each peer, same run", **title)
    where = f"{machine['cpu']}, {machine['isa']}; torch {machine['torch']}, ONNX Runtime {machine['onnxruntime']}"
    where += f"; commit {result['commit'] or '-'}"
    figure.text(0.12 / width, 1 - 0.55 / height, where, fontsize=8, color="#555555")
    _legend(figure, rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return True


def _lines(rows: list[Row]) -> list[tuple[str, str]]:
    """The shapes of these rows with their sizes, each once, in the order of shapes.py."""
    return list(dict.fromkeys((row["shape"], sizes(row)) for row in sorted(rows, key=lambda row: row["order"])))


def _panel(
    axis: object, rows: list[Row], lines: list[tuple[str, str]], limits: tuple[float, float], offset: float
) -> None:
    places = {name: n for n, (name, _) in enumerate(lines)}
    axis.set_xscale("log")
    axis.set_xlim(limits)
    axis.set_ylim(len(lines) - 0.4, -0.6)
    axis.set_yticks(range(len(lines)))
    ticks = [tick for tick in (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200) if limits[0] <= tick <= limits[1]]
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.grid(axis="x", color="#e4e4e4", linewidth=0.8)
    axis.grid(axis="y", color="#f1f1f1", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.axvline(1.0, color="black", linewidth=1.2)
    axis.tick_params(length=0, labelsize=8)
    for spine in axis.spines.values():
        spine.set_color("#bbbbbb")
    for row in rows:
        for peer, ratio in row["ratio"].items():
            color = FASTER if ratio >= 1 else SLOWER
            # One thread stands a little above the line, more a little below, so that equal ratios stay apart.
            place = places[row["shape"]] + (-offset if row["threads"] == 1 else offset)
            inside = color if row["threads"] == 1 else "white"
            axis.plot(ratio, place, MARKERS[peer], ms=5.5, mew=1.3, mec=color, mfc=inside)


def _legend(figure: object, rows: list[Row]) -> None:
    from matplotlib.lines import Line2D

    def mark(label: str, marker: str, color: str, *, full: bool) -> Line2D:
        return Line2D([], [], linestyle="", marker=marker, color=color, mfc=color if full else "white", label=label)

    peers = [peer for peer in MARKERS if any(peer in row["ratio"] for row in rows)]
    counts = sorted({row["threads"] for row in rows})
    handles = [mark(f"over {peer}", MARKERS[peer], "#555555", full=True) for peer in peers]
    handles += [mark(f"{n} thread{'s' if n > 1 else ''}", "s", "#555555", full=n == 1) for n in counts]
    handles += [mark("faster", "s", FASTER, full=True), mark("slower", "s", SLOWER, full=True)]
    figure.legend(handles=handles, loc="upper right", ncols=len(handles), frameon=False, fontsize=9, borderaxespad=0.4)
