# SPDX-License-Identifier: BSD-3-Clause
"""The stages of `make gpu`: build, test and benchmark on this machine's GPU, with this Python as it is.

    python3 tools/gpu.py build|test|bench [--results DIR]

Nothing is downloaded or installed, no environment is made: torch with CUDA, setuptools, ninja and nvcc are there, or a
sentence says what is missing. Each stage ends within ten minutes, with what it has by then. Results go to
bench/results, or to DIR.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
STAGE_SECONDS = 570
TEST_REST_SECONDS = 25  # for pytest to write its report once it was interrupted
# name -> (share of the stage's time in seconds, arguments of python); what matters most comes first.
BENCH_PARTS = {
    "card": (80, ("bench/probes/card.py",)),
    "gpu": (390, ("-m", "bench.gpu")),
    "cudnn": (90, ("-m", "bench.probes.cudnn_algorithms")),
}


class NotReadyError(RuntimeError):
    """What is missing on this machine, in one sentence."""


def find_nvcc() -> Path | None:
    """nvcc, on the PATH, under CUDA_HOME or where CUDA is usually installed."""
    found = shutil.which("nvcc")
    places = [Path(found)] if found else []
    places += [Path(home) / "bin" / "nvcc" for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    return next((place for place in places if place.exists()), None)


def gpu() -> dict[str, str]:
    """Name, architecture and versions of the GPU that torch sees.

    Raises:
        NotReadyError: there is none, or no torch for it.
    """
    try:
        import torch
    except ImportError:
        raise NotReadyError(f"{sys.executable} has no torch; give another Python with PYTHON=") from None
    if torch.version.cuda is None:
        raise NotReadyError(f"torch {torch.__version__} of {sys.executable} is built without CUDA")
    if not torch.cuda.is_available():
        raise NotReadyError(f"torch {torch.__version__} sees no CUDA device on this machine")
    major, minor = torch.cuda.get_device_capability()
    return {
        "name": torch.cuda.get_device_name(),
        "architecture": f"{major}.{minor}" + ("a" if major >= 9 else ""),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "cudnn": str(torch.backends.cudnn.version()),
        "driver": driver(),
        "python": platform.python_version(),
    }


def driver() -> str:
    """The version of the driver, empty where nvidia-smi does not say."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return said.stdout.splitlines()[0].strip() if said.returncode == 0 and said.stdout else ""


def run(command: Sequence[str], seconds: float, environment: Mapping[str, str] | None = None) -> int:
    """Runs a program from the root of the source tree. Interrupted, as by ctrl-C, when its time is up, and ended if
    that does not end it. Returns its exit status, 124 for one that had to be ended."""
    print(f"$ {' '.join(command)}", flush=True)
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **(environment or {})}, start_new_session=True)
    try:
        return process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
    try:
        return process.wait(timeout=TEST_REST_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return 124


def build(results: Path, facts: Mapping[str, str]) -> int:
    """fastrnn/_C in place, for the architecture of the visible GPU alone."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise NotReadyError("nvcc is neither on the PATH nor in /usr/local/cuda/bin")
    environment = {"TORCH_CUDA_ARCH_LIST": facts["architecture"], "FASTRNN_CUDA": "1"}
    environment |= {"PATH": f"{nvcc.parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    environment |= {"CUDA_HOME": os.environ.get("CUDA_HOME", str(nvcc.parent.parent))}
    start = time.perf_counter()
    status = run([sys.executable, "setup.py", "build_ext", "--inplace"], STAGE_SECONDS, environment)
    write(results / "gpu-build.json", {**facts, "status": status, "seconds": round(time.perf_counter() - start, 1)})
    return status


def test(results: Path, facts: Mapping[str, str]) -> int:
    """The tests on CUDA; counts, failures and reasons of skips as JSON, also when the time runs out."""
    if importlib.util.find_spec("pytest") is None:
        raise NotReadyError(f"{sys.executable} has no pytest")
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "tests.xml"
        # pytest-benchmark warns beside xdist, and warnings are errors.
        command = [sys.executable, "-m", "pytest", "-q", "--device", "cuda", "-p", "no:cacheprovider"]
        command += ["-p", "no:benchmark", f"--junitxml={report}", *parallel()]
        start = time.perf_counter()
        status = run([*command, *test_files()], STAGE_SECONDS - TEST_REST_SECONDS)
        result = {**facts, "status": status, "seconds": round(time.perf_counter() - start, 1), **counts(report)}
    write(results / "gpu-tests.json", result)
    print(", ".join(f"{result[name]} {name}" for name in ("passed", "failed", "skipped")))
    return status


def test_files() -> list[str]:
    """What is about CUDA alone first, then the files that run on every device. They need pytest and torch alone."""
    sys.path.insert(0, str(ROOT / "tests"))
    placement = importlib.import_module("placement")
    return [f"tests/{name}.py" for name in ("test_cuda", "test_gpu_bench", *placement.ON_EVERY_DEVICE)]


def parallel() -> list[str]:
    """Four processes where pytest-xdist is there: calls of tests are small, and the GPU is idle most of the time."""
    try:
        import xdist  # noqa: F401
    except ImportError:
        return []
    return ["-n", "4", "--dist", "loadfile"]


def counts(report: Path) -> dict[str, object]:
    """What pytest's report says: numbers, the failures with their first lines, the reasons of skips with numbers."""
    failures: dict[str, str] = {}
    skips: Counter[str] = Counter()
    cases = 0
    if report.exists():
        for case in ElementTree.parse(report).getroot().iter("testcase"):
            cases += 1
            faults = [*case.findall("failure"), *case.findall("error")]
            if faults:
                name = f"{case.get('classname')}::{case.get('name')}"
                failures[name] = (
                    (faults[0].get("message") or "").splitlines()[0][:300] if faults[0].get("message") else ""
                )
            for skip in case.findall("skipped"):
                skips[skip.get("message") or ""] += 1
    skipped = sum(skips.values())
    numbers = {"passed": cases - len(failures) - skipped, "failed": len(failures), "skipped": skipped}
    return {**numbers, "failures": failures, "skips": dict(skips.most_common())}


def bench(results: Path, facts: Mapping[str, str]) -> int:
    """The probes of the card, the benchmark, cuDNN's algorithms; each with its share of the time."""
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    worst = 0
    for name, (seconds, arguments) in BENCH_PARTS.items():
        more = (
            ["--minutes", f"{(seconds - 20) / 60:.2f}", "--markdown", str(results / "gpu.md")] if name == "gpu" else []
        )
        status = run([sys.executable, *arguments, "--output", str(results / f"{name}.json"), *more], seconds)
        print(f"{name}: exit status {status}", flush=True)
        worst = worst or status
    return worst


def write(path: Path, result: Mapping[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


STAGES = {"build": build, "test": test, "bench": bench}


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status of the stage; 1, with one sentence, on a machine that is not ready for it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results", metavar="DIR")
    options = parser.parse_args(argv)
    try:
        facts = gpu()
        options.results.mkdir(parents=True, exist_ok=True)
        return STAGES[options.stage](options.results.resolve(), facts)
    except NotReadyError as error:
        print(f"make gpu-{options.stage}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
