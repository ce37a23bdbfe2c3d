# SPDX-License-Identifier: BSD-3-Clause
"""The card, measured: compiles and runs the programs of bench/probes/cuda, and prints and keeps what they found.

    python bench/probes/card.py                     # bench/results/card.json
    python bench/probes/card.py --compile-only      # no GPU: all for sm_80 and sm_90a, warnings as errors

Latency of a barrier over 8 to 132 blocks, of a cluster's barrier and messages, of L2 and of launches; whether a
cooperative launch can be captured in a graph. nvcc is all that it needs. A program has a minute; each checks its own
results, and one that is wrong, or hangs, is reported as failed and the others run.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "cuda"
RESULTS = Path(__file__).resolve().parent.parent / "results"
ARCHITECTURES = ("sm_80", "sm_90a")
FLAGS = ("-std=c++20", "-O3", "-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra,-Werror")
SECONDS = 60


def programs() -> list[Path]:
    """The source of every probe."""
    return sorted(FOLDER.glob("*.cu"))


def compiler() -> str:
    """nvcc, on the PATH or where CUDA is usually installed; empty where there is none."""
    usual = Path("/usr/local/cuda/bin/nvcc")
    return shutil.which("nvcc") or (str(usual) if usual.exists() else "")


def architecture() -> str:
    """sm_80 or the like, for the first GPU; sm_90a for a Hopper, whose instructions the probes use."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return ""
    number = said.strip().replace(".", "")
    return f"sm_{number}a" if int(number) >= 90 else f"sm_{number}"


def build(nvcc: str, source: Path, target: str, output: Path) -> str:
    """Compiles a probe; empty, or what the compiler says."""
    command = [nvcc, *FLAGS, f"-gencode=arch={target.replace('sm', 'compute')},code={target}"]
    done = subprocess.run([*command, str(source), "-o", str(output)], capture_output=True, text=True)
    return "" if done.returncode == 0 else (done.stdout + done.stderr).strip()


def run(program: Path) -> dict[str, object]:
    """What a compiled probe printed, or {"failed": why}."""
    try:
        done = subprocess.run([str(program)], capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return {"failed": f"no answer within {SECONDS} s"}
    if done.returncode:
        return {"failed": done.stderr.strip() or f"exit status {done.returncode}"}
    try:
        return json.loads(done.stdout)
    except ValueError:
        return {"failed": f"it printed no JSON: {done.stdout[:200]}"}


def compile_all(nvcc: str) -> int:
    """Every probe for every architecture; the number that does not compile."""
    faults = 0
    with tempfile.TemporaryDirectory() as folder:
        for target in ARCHITECTURES:
            for source in programs():
                said = build(nvcc, source, target, Path(folder) / source.stem)
                faults += bool(said)
                print(f"{source.name} for {target}: {said or 'compiles'}")
    return faults


def main(argv: Sequence[str] | None = None) -> int:
    """0, or 1 where a probe does not compile, fails or cannot be run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile-only", action="store_true", help="run nothing")
    parser.add_argument("--output", type=Path, default=RESULTS / "card.json", metavar="FILE")
    options = parser.parse_args(argv)
    nvcc = compiler()
    if not nvcc:
        print("the probes need nvcc, which is not on the PATH", file=sys.stderr)
        return 1
    if options.compile_only:
        return 1 if compile_all(nvcc) else 0
    target = architecture()
    if not target:
        print("the probes need an NVIDIA GPU, and nvidia-smi finds none", file=sys.stderr)
        return 1
    found: dict[str, dict[str, object]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for source in programs():
            said = build(nvcc, source, target, Path(folder) / source.stem)
            found[source.stem] = {"failed": said} if said else run(Path(folder) / source.stem)
            print(f"{source.stem}: {json.dumps(found[source.stem], indent=1)}", flush=True)
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(json.dumps({"target": target, **found}, indent=1) + "\n", encoding="utf-8")
    return 1 if any("failed" in one for one in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
