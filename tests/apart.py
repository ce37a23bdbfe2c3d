# SPDX-License-Identifier: BSD-3-Clause
"""Processes of their own for tests, that start in a moment: torch is imported already, fastrnn is not."""

from __future__ import annotations

import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

HANGING = 300  # seconds that no slow machine needs; a process that takes longer is ended, and its test fails


def run_apart(target: Callable[..., None], *arguments: Any, count: int = 1) -> None:
    """Runs target(rank, *arguments) in `count` processes side by side, which must all come to an end and not raise.

    They are forked from a server that has imported torch and run nothing, so that for fastrnn they are not forked: its
    library is loaded in them anew. `target` is a function of a module of tests, which is imported there by name.
    """
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["torch"])
    with tempfile.TemporaryDirectory() as folder:
        reports = [Path(folder) / str(rank) for rank in range(count)]
        processes = [
            server.Process(target=_reported, args=(report, target, rank, *arguments))
            for rank, report in enumerate(reports)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(HANGING)
        hanging = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for process in processes:
            process.kill()
            process.join()
        said = "\n".join(report.read_text() for report in reports if report.exists())
        assert not hanging, f"the processes {hanging} did not come to an end\n{said}"
        codes = [process.exitcode for process in processes]
        assert codes == [0] * count, f"exit codes {codes}\n{said}"


def _reported(report: Path, target: Callable[..., None], *arguments: Any) -> None:
    try:
        target(*arguments)
    except BaseException:
        report.write_text(traceback.format_exc())
        raise
