# SPDX-License-Identifier: BSD-3-Clause
"""The benchmark on a GPU and the stages of `make gpu`, on the CPU: rules, arithmetic, and the whole program with the
device replaced. On a machine with a GPU they run there as well, on the CPU."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fastrnn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "tools")) if path not in sys.path]

import gpu  # noqa: E402

from bench.gpu import __main__ as command  # noqa: E402
from bench.gpu import backend, contenders, cudnn, floor, picture, report, runner, shapes  # noqa: E402
from bench.gpu.cudnn import PERSIST_STATIC, SMALL_H, STANDARD, Card  # noqa: E402
from bench.shapes import Shape  # noqa: E402

H200 = Card(9, 0, 132)
CARD = floor.CARDS["H200"]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small sizes: a second thread would only be waited for."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def shape(**sizes: int) -> Shape:
    return Shape("test", **{"T": 512, "B": 32, "I": 512, "H": 512, "source": "", **sizes})


@pytest.mark.parametrize(
    ("expected", "cell", "mode", "sizes", "card"),
    [
        (PERSIST_STATIC, "lstm", "float16", {}, H200),
        (PERSIST_STATIC, "lstm", "float16", {"H": 1024, "B": 128}, H200),
        (STANDARD, "lstm", "bfloat16", {}, H200),
        (STANDARD, "lstm", "tf32", {}, H200),
        (STANDARD, "lstm", "float32", {}, H200),
        (STANDARD, "gru", "float16", {}, H200),
        (STANDARD, "lstm", "float16", {"B": 33}, H200),
        (STANDARD, "lstm", "float16", {"B": 136}, H200),
        (STANDARD, "lstm", "float16", {"H": 1152}, H200),
        (STANDARD, "lstm", "float16", {"H": 576}, H200),
        (STANDARD, "lstm", "float16", {"I": 80}, H200),
        (STANDARD, "lstm", "float16", {"L": 2}, H200),
        (STANDARD, "lstm", "float16", {"D": 2}, H200),
        (STANDARD, "lstm", "float16", {"P": 128}, H200),
        (PERSIST_STATIC, "rnn", "float16", {"B": 88, "H": 896}, H200),
        (STANDARD, "rnn", "float16", {"B": 96, "H": 896}, H200),
        (PERSIST_STATIC, "rnn", "float16", {"B": 96, "H": 768}, H200),
        (STANDARD, "lstm", "float16", {}, Card(8, 6, 100)),
        (STANDARD, "lstm", "float16", {}, Card(8, 0, 56)),
        (PERSIST_STATIC, "gru", "float16", {}, Card(7, 0, 80)),
        (STANDARD, "gru", "float16", {"B": 80}, Card(7, 0, 80)),
        (STANDARD, "lstm", "float16", {"T": 9}, Card(7, 0, 80)),
        (PERSIST_STATIC, "lstm", "float16", {"T": 10}, Card(7, 0, 80)),
        (PERSIST_STATIC, "lstm", "float16", {"B": 8}, Card(7, 0, 80)),
        (STANDARD, "lstm", "float16", {"T": 39, "B": 112}, Card(7, 0, 80)),
        (STANDARD, "lstm", "float16", {}, Card(7, 5, 100)),
        (SMALL_H, "lstm", "tf32", {"H": 192}, H200),
        (STANDARD, "lstm", "tf32", {"H": 193}, H200),
        (SMALL_H, "gru", "bfloat16", {"H": 192, "L": 3, "D": 2}, H200),
        (SMALL_H, "rnn", "float32", {"H": 384}, H200),
        (STANDARD, "rnn", "float32", {"H": 385}, H200),
        (STANDARD, "lstm", "float64", {"H": 64}, H200),
        (STANDARD, "lstm", "tf32", {"H": 64, "P": 32}, H200),
        (STANDARD, "lstm", "tf32", {"H": 64}, Card(5, 2, 16)),
    ],
)
def test_algorithm_follows_the_rule_of_pytorch(expected, cell, mode, sizes, card):
    assert cudnn.algorithm(cell, shape(**sizes), mode, card) == expected


def test_algorithm_of_the_backward_has_a_lower_limit():
    for units, expected in ((128, SMALL_H), (129, STANDARD)):
        assert cudnn.algorithm("lstm", shape(H=units), "tf32", H200, backward=True) == expected
    for units, expected in ((256, SMALL_H), (257, STANDARD)):
        assert cudnn.algorithm("rnn", shape(H=units), "tf32", H200, backward=True) == expected


@pytest.mark.parametrize("sizes", [{}, {"H": 64}])
def test_algorithm_of_a_packed_batch_is_standard(sizes):
    assert cudnn.algorithm("lstm", shape(**sizes), "float16", H200, packed=True) == STANDARD


def test_cudnn_takes_bfloat16_since_torch_2_10():
    assert cudnn.is_used("bfloat16", H200, (2, 10), 91300)
    assert not cudnn.is_used("bfloat16", H200, (2, 9), 91300)
    assert not cudnn.is_used("bfloat16", H200, (2, 11), 91200)
    assert not cudnn.is_used("bfloat16", Card(7, 5, 40), (2, 11), 91300)
    assert cudnn.is_used("float16", Card(7, 5, 40), (2, 9), 90000)


@pytest.mark.parametrize(
    ("sizes", "mode", "estimate"),  # microseconds, of the estimates made before anything was measured
    [
        ({"B": 1, "H": 256, "I": 256}, "bfloat16", 0.35),
        ({}, "bfloat16", 0.6),
        ({}, "tf32", 0.8),
        ({}, "float32", 1.6),
        ({"B": 64, "H": 1024, "I": 1024}, "bfloat16", 1.2),
        ({"B": 64, "H": 1024, "I": 1024}, "tf32", 1.8),
        ({"B": 64, "H": 1024, "I": 1024}, "float32", 8.6),
        ({"B": 128, "H": 2048, "I": 2048}, "bfloat16", 5.0),
        ({"B": 128, "H": 2048, "I": 2048}, "tf32", 14.0),
    ],
)
def test_floor_of_a_step_is_near_the_estimates_and_not_above(sizes, mode, estimate):
    found = floor.step_seconds("lstm", shape(**sizes), mode, CARD) * 1e6
    assert 0.75 * estimate <= found <= 1.05 * estimate


def test_floor_of_a_call_adds_up():
    one = shape()
    step = floor.step_seconds("lstm", one, "bfloat16", CARD)
    product = 2 * 4 * 512 * 512 * 512 * 32 / CARD.flops["bfloat16"]
    assert floor.seconds("lstm", one, "bfloat16", CARD, training=False) == pytest.approx(512 * step + product)
    assert floor.seconds("lstm", one, "bfloat16", CARD, training=True) == pytest.approx(1024 * step + 4 * product)
    half = floor.seconds("lstm", one, "bfloat16", CARD, training=False, tokens=256 * 32)
    assert half == pytest.approx(512 * step + product / 2)


def test_limits_are_known_by_the_name_of_the_card():
    assert floor.limits("NVIDIA H200") is CARD
    assert floor.limits("NVIDIA A100-SXM4-80GB") is floor.CARDS["A100"]
    assert floor.limits("another") is None


def test_rows_come_with_the_most_important_first():
    rows = shapes.rows()
    assert [row.level for row in rows] == sorted(row.level for row in rows)
    first = {(row.cell, row.shape.H, row.mode) for row in rows if row.level == 0}
    assert {(cell, units, mode) for cell in ("lstm", "gru") for units in (512, 1024) for mode in shapes.FAST} <= first
    labels = [(row.cell, row.shape, row.mode, row.pass_) for row in rows]
    assert len(labels) == len(set(labels))
    assert {row.pass_ for row in rows} == set(shapes.PASSES)
    assert {row.mode for row in rows} == set(shapes.MODES)


def test_arithmetic_sets_the_precision_of_the_block():
    before = torch.backends.cudnn.rnn.fp32_precision
    with backend.arithmetic("tf32"):
        assert torch.backends.cudnn.rnn.fp32_precision == "tf32"
    with backend.arithmetic("bfloat16"):
        assert torch.backends.cudnn.rnn.fp32_precision == "tf32"
    with backend.arithmetic("float32"):
        assert torch.backends.cudnn.rnn.fp32_precision == "ieee"
        assert torch.backends.cuda.matmul.fp32_precision == "ieee"
    assert torch.backends.cudnn.rnn.fp32_precision == before


def test_interleaved_warms_up_and_gives_each_its_turn():
    order: list[str] = []
    functions = {name: lambda name=name: order.append(name) for name in "ab"}
    found = backend.interleaved(backend.Cpu(), functions, 1e-9)
    assert order[: backend.WARM_UPS] == ["a"] * backend.WARM_UPS
    assert all(timing.samples == backend.ROUNDS for timing in found.values())
    # after the warm-ups of both: a's turn, b's turn, six times
    turns = "".join(order).split("b" * backend.WARM_UPS, 1)[1].lstrip("b")
    assert turns.count("ab") == backend.ROUNDS


def small_row(cell: str = "lstm", mode: str = "float32", pass_: str = "training") -> shapes.Row:
    return shapes.Row(cell, shape(T=4, B=3, I=5, H=6), mode, pass_, 0)


@pytest.fixture(scope="module")
def makers() -> dict[str, object]:
    tiers, said = contenders.own_tiers(backend.Cpu())
    if contenders.KERNEL not in said:
        pytest.skip("the extension is not built")
    return contenders.makers(backend.Cpu(), tiers)


@pytest.mark.parametrize("pass_", shapes.PASSES)
@pytest.mark.parametrize(("cell", "mode"), [("lstm", "bfloat16"), ("gru", "tf32"), ("rnn", "float64")])
def test_row_has_every_contender_with_right_numbers(cell, mode, pass_, makers):
    row = runner.measure(small_row(cell, mode, pass_), backend.Cpu(), makers, 1e-4)
    assert row["failed"] == row["wrong"] == {}
    assert {contenders.STOCK, contenders.STOCK_GRAPH, contenders.OURS, contenders.OURS_GRAPH} <= row["times"].keys()
    assert row["ratio"][contenders.STOCK] == 1
    assert all(row[name][contenders.OURS] > 0 for name in ("tflops", "weights_gbs", "memory_gbs", "us_per_step"))
    assert row["floor"] is None
    json.dumps(row)
    assert report.table_line(row).startswith(cell)


def test_contender_that_fails_or_is_wrong_costs_the_row_only_itself(makers):
    def fails(problem):
        raise RuntimeError("no capture\nand more")

    def wrong(problem):
        made = makers[contenders.OURS](problem)
        return dataclasses.replace(made, outputs=lambda: {n: 1.5 * value for n, value in made.outputs().items()})

    def another(problem):
        made = makers[contenders.STOCK](problem)
        return dataclasses.replace(made, outputs=lambda: {n: 1.5 * value for n, value in made.outputs().items()})

    some = {**makers, contenders.STOCK_GRAPH: fails, contenders.OURS: wrong, contenders.STOCK_WITHOUT_CUDNN: another}
    row = runner.measure(small_row(), backend.Cpu(), some, 1e-4)
    assert row["failed"] == {contenders.STOCK_GRAPH: "no capture"}
    assert row["wrong"].keys() == {contenders.OURS, contenders.STOCK_WITHOUT_CUDNN}
    assert not row["times"].keys() & {*row["failed"], *row["wrong"]}
    text = report.table_line(row)
    assert "WRONG" in text
    assert "no capture" in text


def test_row_without_memory_is_an_error_and_no_crash(monkeypatch, makers):
    def full(problem):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(runner, "reference", full)
    row = runner.measure(small_row(), backend.Cpu(), makers, 1e-4)
    assert row["error"] == "CUDA out of memory"
    assert "FAILED" in report.table_line(row)


def test_tiers_are_those_that_fastrnn_can_force(monkeypatch):
    if contenders.KERNEL not in contenders.own_tiers(backend.Cpu())[1]:
        pytest.skip("the extension is not built")
    entered: list[str] = []

    @contextlib.contextmanager
    def cuda_tier(name):
        if name == "tier2":
            raise ValueError(name)
        entered.append(name)
        yield

    monkeypatch.setattr(fastrnn, "cuda_tier", cuda_tier, raising=False)
    tiers, _ = contenders.own_tiers(backend.Cpu())
    assert list(tiers) == ["", "tier0", "tier1"]
    made = contenders.makers(backend.Cpu(), tiers)
    assert "fastrnn tier1" in made
    entered.clear()
    row = runner.measure(small_row(), backend.Cpu(), made, 1e-4)
    assert {"tier0", "tier1"} == set(entered)
    assert row["ratio"]["fastrnn tier1"] > 0
    assert "fastrnn tier1: " in report.table_line(row)


def test_least_bytes_of_a_forward():
    row = small_row(mode="bfloat16", pass_="inference")
    assert runner.least_bytes(row, 12) == 2 * (4 * 6 * (5 + 6) + 12 * (5 + 6))


COMMAND = ["--device", "cpu", "--seconds", "0.0001", "--rows", "lstm middle-h512 *"]


def test_command_writes_json_markdown_and_picture(tmp_path, capsys):
    output, table = tmp_path / "deep" / "gpu.json", tmp_path / "gpu.md"
    assert command.main([*COMMAND, "--output", str(output), "--markdown", str(table)]) == 0
    result = json.loads(output.read_text())
    assert result["complete"]
    assert len(result["rows"]) == 10
    assert {"commit", "machine", "fastrnn", "ceilings", "created", "command"} <= result.keys()
    assert table.read_text().count("| middle-h512 (") == 10
    assert command.main(["--from", str(output)]) == 0
    assert capsys.readouterr().out.count("geometric means over torch.nn") == 2
    if importlib.util.find_spec("matplotlib"):
        assert output.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
        assert not picture.draw({**result, "rows": []}, tmp_path / "none.png")


def test_command_without_matplotlib_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    options = ["--device", "cpu", "--seconds", "0.0001", "--rows", "gru step-h512 tf32 inference", "--stock"]
    assert command.main([*options, "--output", str(tmp_path / "gpu.json")]) == 0
    said = capsys.readouterr().out
    assert "matplotlib is not installed" in said
    assert "left out by --stock" in said
    row = json.loads((tmp_path / "gpu.json").read_text())["rows"][0]
    assert contenders.OURS not in row["times"]


def test_command_stops_when_its_time_is_used(tmp_path, capsys):
    options = [*COMMAND, "--minutes", "0.0001", "--output", str(tmp_path / "gpu.json")]
    assert command.main(options) == 0
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert not result["complete"]
    assert result["left_out"] == 10
    assert "10 rows left out" in capsys.readouterr().out


def test_command_keeps_the_rows_before_an_error(tmp_path, monkeypatch):
    measure, calls = runner.measure, []

    def interrupted(*arguments):
        if calls:
            raise KeyboardInterrupt
        calls.append(1)
        return measure(*arguments)

    monkeypatch.setattr(runner, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        command.main([*COMMAND, "--output", str(tmp_path / "gpu.json")])
    assert len(json.loads((tmp_path / "gpu.json").read_text())["rows"]) == 1


def test_command_needs_a_gpu_unless_told(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main([]) == 1
    assert capsys.readouterr().err.strip() == command.NO_GPU


def test_command_lists_every_row(capsys):
    assert command.main(["--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(shapes.rows())


def test_probe_of_algorithms_runs_on_the_cpu(tmp_path):
    from bench.probes import cudnn_algorithms

    row = next(cudnn_algorithms.rows(2))
    found = cudnn_algorithms.measure(row, backend.Cpu())
    assert found["padded_us"] > 0
    assert found["packed_us"] > 0
    assert len(list(cudnn_algorithms.rows(2))) == 8 * 4 * 2 * 2


def test_probes_without_nvcc_or_gpu_say_so_in_one_sentence(monkeypatch, capsys):
    from bench.probes import card

    monkeypatch.setattr(card, "compiler", lambda: "")
    assert card.main([]) == 1
    monkeypatch.setattr(card, "compiler", lambda: "nvcc")
    monkeypatch.setattr(card, "architecture", lambda: "")
    assert card.main([]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 2


@pytest.mark.parametrize(
    ("script", "found"),
    [
        ('echo \'{"probe": "x", "us": 1.5}\'', {"probe": "x", "us": 1.5}),
        ("echo no >&2; exit 3", {"failed": "no"}),
        ("exit 3", {"failed": "exit status 3"}),
        ("echo nonsense", {"failed": "it printed no JSON: nonsense\n"}),
        ("sleep 9", {"failed": "no answer within 0.2 s"}),
    ],
)
def test_probe_that_fails_or_hangs_is_reported(script, found, tmp_path, monkeypatch):
    from bench.probes import card

    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\n{script.replace('sleep', 'exec sleep')}\n")
    program.chmod(0o755)
    monkeypatch.setattr(card, "SECONDS", 0.2 if "sleep" in script else 60)
    assert card.run(program) == found


@pytest.mark.parametrize("stage", gpu.STAGES)
def test_stages_need_a_gpu_and_say_so_in_one_sentence(stage, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([stage, "--results", str(tmp_path)]) == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith(f"make gpu-{stage}: torch {torch.__version__} sees no CUDA device")


def test_make_target_runs_the_stage():
    command = ["make", "--no-print-directory", "-n", "gpu-bench", "PYTHON=some-python", "RESULTS=elsewhere"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["some-python", "tools/gpu.py", "bench", "--results", "elsewhere"]


FACTS = {"name": "a card", "architecture": "9.0a"}


def test_build_is_for_the_visible_card_in_place(tmp_path, monkeypatch):
    found = {}
    monkeypatch.setattr(gpu, "find_nvcc", lambda: Path("/some/bin/nvcc"))
    monkeypatch.setattr(gpu, "run", lambda command, seconds, environment: found.update(c=command, e=environment) or 0)
    assert gpu.build(tmp_path, FACTS) == 0
    assert found["c"][1:] == ["setup.py", "build_ext", "--inplace"]
    assert found["e"]["TORCH_CUDA_ARCH_LIST"] == "9.0a"
    assert found["e"]["PATH"].startswith("/some/bin:")
    assert json.loads((tmp_path / "gpu-build.json").read_text())["status"] == 0
    monkeypatch.setattr(gpu, "find_nvcc", lambda: None)
    with pytest.raises(gpu.NotReadyError, match="nvcc"):
        gpu.build(tmp_path, FACTS)


def test_test_stage_reports_what_pytest_found(tmp_path, monkeypatch):
    tests = tmp_path / "test_it.py"
    tests.write_text(
        "import pytest\ndef test_a(): pass\ndef test_b(): assert 1 == 2\n"
        "def test_c(): pytest.skip('no such thing')\ndef test_d(): pytest.skip('no such thing')\n"
    )
    monkeypatch.setattr(gpu, "test_files", lambda: [str(tests)])
    monkeypatch.setattr(gpu, "parallel", lambda: ["-c", "/dev/null", "--rootdir", str(tmp_path)])
    run = gpu.run
    without_device = lambda command, *rest: run([c for c in command if c not in ("--device", "cuda")], *rest)  # noqa: E731
    monkeypatch.setattr(gpu, "run", without_device)
    assert gpu.test(tmp_path, FACTS) == 1
    result = json.loads((tmp_path / "gpu-tests.json").read_text())
    assert (result["passed"], result["failed"], result["skipped"]) == (1, 1, 2)
    assert list(result["skips"].items()) == [("no such thing", 2)]
    assert "assert 1 == 2" in next(iter(result["failures"].values()))


def test_files_of_the_test_stage_are_there():
    assert all((ROOT / file).exists() for file in gpu.test_files())
    assert gpu.test_files()[0] == "tests/test_cuda.py"


def test_stage_that_runs_too_long_is_interrupted_then_ended(monkeypatch):
    # Long against the start and the end of an interpreter on a busy machine.
    monkeypatch.setattr(gpu, "TEST_REST_SECONDS", 30.0)
    polite = "import time\ntry:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    raise SystemExit(3)"
    assert gpu.run([sys.executable, "-c", polite], 3.0) == 3
    monkeypatch.setattr(gpu, "TEST_REST_SECONDS", 1.0)
    deaf = "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\ntime.sleep(60)"
    assert gpu.run([sys.executable, "-c", deaf], 3.0) == 124


def test_bench_stage_runs_every_part_and_keeps_the_worst_status(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(gpu, "run", lambda command, seconds: seen.append((command, seconds)) or len(seen) % 2)
    assert gpu.bench(tmp_path, FACTS) == 1
    assert len(seen) == len(gpu.BENCH_PARTS)
    assert sum(seconds for _, seconds in seen) <= gpu.STAGE_SECONDS
    assert all(str(tmp_path) in " ".join(arguments) for arguments, _ in seen)
