# SPDX-License-Identifier: BSD-3-Clause
"""The benchmark: its shapes, arithmetic, peers, rules and reports. Nothing here asserts a time."""

import dataclasses
import json
from itertools import pairwise

import pytest
import torch
from fastrnn.bench import __main__ as command
from fastrnn.bench import check, machine, picture, report, runner, timing
from fastrnn.bench.peers import ONNX_RUNTIME, TORCH, OnnxContender, TorchContender, build_module, make_problem
from fastrnn.bench.shapes import GATES, PASSES, SHAPES, Shape
from fastrnn.bench.timing import Timing
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fastrnn
from fastrnn import info

SMALL = Shape("small", 5, 3, 4, 6, "test", passes=("inference", "training", "packed-inference", "packed-training"))
BOTH_WAYS = dataclasses.replace(SMALL, name="both-ways", D=2)
DEEP = dataclasses.replace(SMALL, name="deep", D=2, L=2)
PROJECTED = dataclasses.replace(SMALL, name="projected", P=2, cells=("lstm",))
STEP = Shape("step", 1, 2, 4, 6, "test", passes=("call", "prepacked-call", "call-training", "cell"))


def test_shapes_have_unique_names_and_sources():
    names = [shape.name for shape in SHAPES]
    assert len(set(names)) == len(names)
    assert all(shape.source for shape in SHAPES)


def test_shapes_ask_for_known_cells_and_passes_only():
    for shape in SHAPES:
        assert set(shape.cells) <= set(GATES)
        assert set(shape.quick) <= set(shape.cells)
        assert set(shape.passes) <= set(PASSES)


def test_shapes_hold_the_named_problems():
    found = {(s.T, s.B, s.I, s.H, s.D) for s in SHAPES if s.quick}
    assert {(100, 64, 512, 512, 1), (128, 16, 128, 128, 1), (100, 64, 1, 40, 1), (200, 16, 80, 256, 2)} <= found


def test_vmap_is_measured_over_64_short_and_long_sequences_beside_a_batch_of_64():
    tasks = runner.plan(full=False, cells=GATES, passes=PASSES, threads=(1,), patterns=())
    found = {
        pass_: {(t.cell, t.shape.T) for t in tasks if t.pass_ == pass_ and (t.shape.B, t.shape.H) == (64, 64)}
        for pass_ in ("vmap", "inference")
    }
    assert found["vmap"] == found["inference"] == {(cell, T) for cell in GATES for T in (32, 100)}


def test_forward_flops_by_hand():
    assert Shape("a", 2, 3, 5, 7, "t").forward_flops("lstm") == 2 * 4 * 7 * (5 + 7) * 2 * 3
    assert Shape("a", 2, 3, 5, 7, "t", P=4).forward_flops("lstm") == (2 * 4 * 7 * (5 + 4) + 2 * 4 * 7) * 2 * 3
    assert Shape("a", 2, 3, 5, 7, "t").forward_flops("gru", tokens=4) == 2 * 3 * 7 * (5 + 7) * 4


@pytest.mark.filterwarnings("ignore:LSTM with projections", "ignore:TF32")
@pytest.mark.parametrize("shape", [SMALL, BOTH_WAYS, DEEP, PROJECTED], ids=lambda shape: shape.name)
@pytest.mark.parametrize("cell", GATES)
def test_forward_flops_are_what_torch_counts(cell, shape):
    if cell not in shape.cells:
        pytest.skip("only the LSTM has a projection")
    module = build_module(nn, cell, shape, torch.float32)
    counter = FlopCounterMode(display=False)
    with torch.backends.mkldnn.flags(enabled=False), counter:
        module(torch.randn(shape.T, shape.B, shape.I))
    assert counter.get_total_flops() == shape.forward_flops(cell)


def test_ragged_problem_has_lengths_between_a_quarter_and_all():
    shape = Shape("ragged", 40, 50, 2, 3, "test")
    problem = make_problem("gru", shape, "packed-inference", torch.float32)
    assert problem.lengths.min() >= 10
    assert problem.lengths.max() == 40
    assert problem.tokens == problem.lengths.sum() == len(problem.d_y)


@pytest.mark.parametrize(
    ("shape", "pass_"),
    [
        (SMALL, "inference"),
        (BOTH_WAYS, "inference"),
        (DEEP, "inference"),
        (BOTH_WAYS, "packed-inference"),
        (BOTH_WAYS, "lengths-inference"),
        (STEP, "call"),
        (STEP, "prepacked-call"),
    ],
    ids=["plain", "both-ways", "two-layers-both-ways", "packed", "lengths", "one-step-from-a-state", "prepacked"],
)
@pytest.mark.parametrize("cell", GATES)
def test_onnx_runtime_computes_what_torch_does(cell, shape, pass_):
    pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    pytest.importorskip("onnx", reason="onnx is not installed")
    problem = make_problem(cell, shape, pass_, torch.float32)
    stock = TorchContender(TORCH, nn, problem).outputs()
    found = OnnxContender(problem, threads=1).outputs()
    assert found.keys() == stock.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, stock[name][-len(value) :] if name != "y" else stock[name], atol=2e-6, rtol=0)


@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("cell", GATES)
def test_every_pass_has_the_outputs_it_is_checked_by(cell, pass_):
    problem = make_problem(cell, STEP if pass_ in STEP.passes else SMALL, pass_, torch.float32)
    names = set(TorchContender(runner.OURS, fastrnn, problem).outputs())
    assert {"h_n"} <= names
    assert ("c_n" in names) == (cell == "lstm")
    assert ("y" in names) == (pass_ != "cell")
    assert ({"d_x", "d_weight_ih_l0", "d_weight_hh_l0", "d_bias_ih_l0", "d_bias_hh_l0"} <= names) == problem.training


@pytest.mark.parametrize("pass_", ["inference", "packed-training", "lengths-training", "reset-training"])
def test_measure_gives_a_row_for_each_thread_count(pass_, monkeypatch):
    task = runner.Task(SMALL, "gru", pass_, (1, 2))
    monkeypatch.setattr(machine, "measure_peak", lambda threads, dtype: 100.0 * threads)
    rows = list(runner.measure(task, machine.Roofline(), torch.float32, seconds=0.0))
    assert [(row["threads"], row["fma_peak"]) for row in rows] == [(1, 100.0), (2, 200.0)]
    assert rows[0]["round_ns"] == [None, None]
    assert all(way is None or way > 0 for way in rows[1]["round_ns"])
    for row in rows:
        assert row["accuracy"] <= 1
        assert row["fraction_fma"] == pytest.approx(row["gflops"] / row["fma_peak"])
        assert row["fraction_cache"] is None
        assert row["ratio"][TORCH] == row["peers"][TORCH]["median"] / row["ours"]["median"]


def test_measure_times_nothing_when_the_numbers_are_wrong(monkeypatch):
    class Wrong(nn.GRU):
        def forward(self, *arguments):
            y, h = super().forward(*arguments)
            return y * 1.001, h

    monkeypatch.setattr(fastrnn, "GRU", Wrong)
    monkeypatch.setattr(runner, "interleaved", lambda *arguments: pytest.fail("timed"))
    (row,) = runner.measure(runner.Task(SMALL, "gru", "inference", (1,)), machine.Roofline(), torch.float32, 0.0)
    assert "fastrnn's y is wrong" in row["error"]


def test_check_outputs_refuses_a_peer_that_computes_something_else():
    exact = {"y": torch.ones(3, dtype=torch.float64)}
    right, other = {"y": torch.ones(3)}, {"y": torch.full((3,), 1.1)}
    assert runner.check_outputs({runner.OURS: right, TORCH: right}, exact) == 0
    with pytest.raises(check.WrongNumbersError, match="ONNX Runtime does not compute the same y"):
        runner.check_outputs({runner.OURS: right, TORCH: right, ONNX_RUNTIME: other}, exact)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_worst_excess_is_infinite_for_no_number(value):
    exact, stock = {"y": torch.zeros(2, dtype=torch.float64)}, {"y": torch.zeros(2)}
    assert check.worst_excess({"y": torch.tensor([0.0, value])}, stock, exact)[0] == float("inf")


def test_worst_excess_follows_the_rule():
    exact, stock = {"y": torch.ones(2, dtype=torch.float64)}, {"y": torch.tensor([1.0, 1.0 + 2**-22])}
    allowed = 2 * 2**-22 + 4 * 2**-23
    ours = {"y": torch.tensor([1.0, 1.0 - 2**-22])}
    assert check.worst_excess(ours, stock, exact) == (2**-22 / allowed, "y")
    assert check.worst_excess({}, stock, exact)[0] == float("inf")


def test_lost_means_slower_by_more_than_both_interquartile_ranges():
    peer = Timing(1.0, 0.95, 1.05, 9, 1)
    assert not timing.is_lost(Timing(0.5, 0.5, 0.5, 9, 1), peer)
    assert not timing.is_lost(Timing(1.19, 1.14, 1.24, 9, 1), peer)
    assert timing.is_lost(Timing(1.21, 1.16, 1.26, 9, 1), peer)
    assert timing.is_lost(Timing(1.11, 1.11, 1.11, 9, 1), peer)


def test_summary_has_median_and_quartiles():
    assert timing.summary([5.0, 1.0, 4.0, 2.0, 3.0], calls=7) == Timing(3.0, 2.0, 4.0, 5, 7)
    assert timing.summary([2.0]).spread == 0


def test_interleaved_gives_each_function_its_turn():
    order = []
    found = timing.interleaved({name: lambda name=name: order.append(name) for name in "ab"}, 0.0, threads=1)
    assert all(timings.samples >= timing.FEWEST_ROUNDS for timings in found.values())
    turns = sum(left != right for left, right in pairwise(order))
    assert turns >= 2 * timing.FEWEST_ROUNDS - 1


def test_plan_quick_is_part_of_full():
    every = {"cells": list(GATES), "passes": list(PASSES), "threads": [1, 2]}
    quick, full = (runner.plan(full=full, **every) for full in (False, True))
    assert 0 < runner.row_count(quick) < runner.row_count(full)
    assert {(t.shape, t.cell, t.pass_) for t in quick} < {(t.shape, t.cell, t.pass_) for t in full}
    assert {task.threads for task in quick if task.pass_ == "cell"} == {(1,)}


def test_plan_takes_named_shapes_whole():
    tasks = runner.plan(full=False, cells=["gru"], passes=["inference"], threads=[1], patterns=["grid-h512-*"])
    assert [task.shape.name for task in tasks] == ["grid-h512-b64", "grid-h512-b4", "grid-h512-b8"]


def test_roofline_interpolates_between_cache_sizes():
    roofline = machine.Roofline({1: 100.0}, {1: {1024: 64.0, 4096: 16.0}})
    assert roofline.fma_seconds(1e9, 1) == pytest.approx(0.01)
    assert roofline.cache_seconds(512, 1, 1) == pytest.approx(512 / 64e9)
    assert roofline.cache_seconds(2048, 3, 1) == pytest.approx(3 * 2048 / 32e9)
    assert roofline.cache_seconds(8192, 1, 1) == pytest.approx(8192 / 16e9)
    assert roofline.fma_seconds(1e9, 2) is None
    assert roofline.cache_seconds(512, 1, 2) is None


def test_a_report_says_how_far_apart_the_threads_were():
    row = {"cell": "gru", "shape": "a", "pass": "inference", "dtype": "float32", "B": 1}
    ways = {1: [[None, None]], 2: [[70.0, 80.0], [75.0, 300.0], None], 4: [[None, None]]}
    rows = [{**row, "threads": threads, "round_ns": way} for threads, them in ways.items() for way in them]
    (line,) = report.gains(rows)
    assert line.startswith("2 threads: a cache line took 80 ns from core to core, and in 1 of 2 rows")


def test_roofline_is_measured_by_the_extension(monkeypatch):
    if not hasattr(info.compiled(), "fma_peak"):
        pytest.skip("the extension is not built")
    monkeypatch.setattr(machine, "BANDWIDTH_SIZES", (4096,))
    roofline = machine.measure_roofline([1], torch.float32)
    assert roofline.fma[1] > 1
    assert roofline.bandwidth[1][4096] > 1


def test_roofline_is_not_measured_without_the_extension(monkeypatch):
    monkeypatch.setattr(info, "compiled", lambda: None)
    roofline = machine.measure_roofline([1], torch.float32)
    assert roofline == machine.Roofline()
    assert machine.measure_peak(1, torch.float32) is None
    assert "not measured" in report.roofline_lines(dataclasses.asdict(roofline))[0]


def _row(shape, ours, stock, onnx=None, **others):
    timings = {TORCH: stock, ONNX_RUNTIME: onnx} if onnx else {TORCH: stock}
    row = {
        "order": 0,
        "cell": "lstm",
        "shape": shape,
        "source": "test",
        "pass": "inference",
        "threads": 1,
        "tokens": 10,
    }
    row |= {"dtype": "float32", "isa": "scalar", "T": 5, "B": 16, "I": 2, "H": 3, "P": 0, "D": 1, "L": 1}
    row |= {"ours": dataclasses.asdict(Timing(ours, ours, ours, 5, 1)), "fraction_fma": 0.9, "fraction_cache": 0.1}
    row["ratio"] = {name: seconds / ours for name, seconds in timings.items()}
    row["lost"] = [name for name, seconds in timings.items() if seconds < ours]
    return row | others


@pytest.fixture
def result():
    rows = [
        _row("one", 1e-3, 2e-3, 0.5e-3),
        _row("two", 1e-3, 8e-3, order=1),
        _row("one", 0.5e-3, 2e-3, 0.5e-3, threads=2),
        _row("one", 1e-3, 4e-3, **{"pass": "packed-inference", "tokens": 5}),
        {"cell": "gru", "shape": "three", "pass": "training", "threads": 1, "dtype": "float32", "error": "y is wrong"}
        | {"T": 5, "B": 6, "I": 2, "H": 3, "P": 0, "D": 2, "L": 1, "order": 2},
    ]
    facts = {"cpu": "a CPU", "isa": "scalar", "torch": "1", "onnxruntime": "2", "fastrnn": "3"}
    return {"command": "bench", "commit": "abc", "complete": True, "machine": facts, "roofline": {}, "rows": rows}


def test_report_json_holds_everything(result, tmp_path):
    path = tmp_path / "deep" / "latest.json"
    report.write_json(result, path)
    assert report.read_json(path) == result
    assert path.read_text().count("\n") >= len(result["rows"])


def test_report_means_are_geometric_and_count_lost_rows(result):
    first, second = report.geometric_means(result["rows"])[:2]
    assert (first["peer"], first["mean"], first["worst"], first["worst_shape"]) == (TORCH, pytest.approx(4), 2, "one")
    assert (second["peer"], second["mean"], second["lost"]) == (ONNX_RUNTIME, 0.5, 1)


def test_report_compares_fastrnn_with_itself(result):
    threads, packed = report.gains(result["rows"])
    assert threads.startswith("2 threads over 1, B >= 16, 1 rows: 2.00x")
    assert packed.startswith("packed inference, cost of a valid token over padded, 1 rows: 2.00x")


def test_report_compares_vmap_with_one_batch(result):
    result["rows"].append(_row("two", 1.5e-3, 8e-3, **{"pass": "vmap"}))
    assert "torch.vmap over one batch, 1 rows: 1.50x, most 1.50x" in report.gains(result["rows"])


def test_report_table_marks_lost_and_wrong_rows(result):
    lines = [report.table_line(row) for row in result["rows"]]
    assert "0.50x!" in lines[0]
    assert "WRONG: y is wrong" in lines[-1]
    assert {len(line) for line in lines[:-1]} == {len(report.HEADER)}
    assert "5 rows, 1 lost to a peer, 1 with wrong numbers" in report.summary(result)


def test_report_markdown_has_a_line_for_each_shape_and_pass(result):
    text = report.markdown(result)
    assert "| one (T5 B16 I2 H3) | inference | 1.00 ms | 2.00 | **0.50** | 0.90 fma | 500 us | 4.00 | 1.00 |" in text
    assert "three" in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(4.214e-6, "4.21 us"), (99.96e-6, "100 us"), (1.5e-3, "1.50 ms"), (0.9999, "1.00 s"), (2e-7, "0.20 us")],
)
def test_report_durations_have_three_digits(seconds, text):
    assert report.duration(seconds) == text


def test_picture_is_a_png(result, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    path = tmp_path / "speed.png"
    assert picture.draw(result, path)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert not picture.draw({**result, "rows": []}, path)


COMMAND = ["--shapes", "call-h64-b1", "--cells", "rnn", "--threads", "1", "--seconds-per-row", "0.001"]


@pytest.fixture
def quick_command(monkeypatch):
    """main() with a short check and a short roofline, where fastrnn has its kernels."""
    if "-> kernel" not in command.route():
        pytest.skip("the extension is not built")
    cases = list(check._cases())[:1]
    monkeypatch.setattr(check, "_cases", lambda: cases)
    monkeypatch.setattr(machine, "BANDWIDTH_SIZES", (4096, 16384))
    return command.main


def test_command_measures_and_writes(quick_command, tmp_path, capsys):
    output, table = tmp_path / "latest.json", tmp_path / "table.md"
    options = [*COMMAND, "--skip-training-run", "--output", str(output), "--markdown", str(table)]
    assert quick_command(options) == 0
    result = json.loads(output.read_text())
    assert result["complete"]
    assert [row["pass"] for row in result["rows"]] == ["call", "prepacked-call", "call-training", "cell"]
    assert {"commit", "machine", "isa", "threads", "dtype", "source", "ratio", "accuracy"} <= result["rows"][0].keys()
    assert "call-h64-b1" in table.read_text()
    assert quick_command(["--from", str(output)]) == 0
    assert capsys.readouterr().out.count("call-training") >= 4


def test_command_keeps_what_was_measured_at_control_c(quick_command, tmp_path, monkeypatch):
    measure, calls = runner.measure, []

    def interrupted(*arguments):
        if calls:
            raise KeyboardInterrupt
        calls.append(1)
        return measure(*arguments)

    monkeypatch.setattr(runner, "measure", interrupted)
    assert quick_command([*COMMAND, "--output", str(tmp_path / "some.json")]) == command.INTERRUPTED
    result = json.loads((tmp_path / "some.json").read_text())
    assert len(result["rows"]) == 1
    assert not result["complete"]


def test_command_fails_when_the_numbers_are_wrong(quick_command, tmp_path, monkeypatch):
    monkeypatch.setattr(check, "worst_excess", lambda *outputs: (2.0, "y"))
    options = [*COMMAND, "--passes", "call", "--skip-training-run", "--output", str(tmp_path / "latest.json")]
    assert quick_command(options) == 1


def test_command_refuses_to_measure_torch_against_itself(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "route", lambda: "fastrnn.LSTM -> torch: not built")
    assert command.main([*COMMAND, "--output", str(tmp_path / "latest.json")]) == 1
    assert "nothing to measure" in capsys.readouterr().err


def test_command_lists_every_shape(capsys):
    assert command.main(["--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(SHAPES)


REFUSED = {
    "--cells lstn": "lstn: known are lstm",
    "--passes x": "x: known are inference",
    "--threads 0": "must be numbers from 1 on, or all, like 1,all; got '0'",
    "--threads two": "like 1,all; got 'two'",
    "--seconds-per-row -1": "must be a number of seconds above 0, got '-1'",
    "--seconds-per-row x": "must be a number of seconds above 0, got 'x'",
    "--shapes nosuch": "no row fits these arguments",
    "--cells gru --shapes speech --passes vmap": "no row fits these arguments",
    "--from nosuch.json": "there is no file nosuch.json",
    "--markdown nosuch/table.md": "the directory nosuch does not exist",
    "--pages": "--pages goes with --from",
    "--pages --from /dev/null": "there is no file /dev/null",
    "--pages --from /etc/passwd": "--pages: /etc/passwd is not in the checkout",
}


@pytest.mark.parametrize("options", REFUSED)
def test_command_refuses_before_it_measures(options, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(options.split())
    assert stopped.value.code == 2
    assert REFUSED[options] in capsys.readouterr().err
