# SPDX-License-Identifier: BSD-3-Clause
"""What fastrnn says about itself: info, check, the ladder of route(), and that importing it has no side effects."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from plain_calls import replaced_call
from samples import sample

import fastrnn
from fastrnn import __main__ as command
from fastrnn import autograd, info


def run(code: str) -> str:
    """The output of a fresh interpreter."""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_info_reports_and_passes_its_self_test(capsys: pytest.CaptureFixture[str], compiled: object) -> None:
    assert command.main(["info"]) == 0
    out = capsys.readouterr().out
    words = ("loaded", "they match", "FASTRNN_ISA", "OpenMP", "CUDA", "passed")
    for wanted in (torch.__version__, compiled.isa(), *words):
        assert wanted in out
    assert "what to do" not in out


@pytest.mark.parametrize("name", ["lstm_layer", "gru_layer", "rnn_layer"])
def test_check_passes_and_finds_a_wrong_kernel(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, compiled: object
) -> None:
    assert command.main(["check"]) == 0
    assert f"fastrnn check: passed ({compiled.isa()})" in capsys.readouterr().out
    right = getattr(autograd, name)
    monkeypatch.setattr(torch.nn.Module, "_call_impl", replaced_call())
    for short_way in ("layer_call", "cell_call"):  # every call goes through autograd.py
        monkeypatch.setattr(autograd._C, short_way, lambda *_: None)
    monkeypatch.setattr(
        autograd, name, lambda *arguments, **options: [result * 1.001 for result in right(*arguments, **options)]
    )
    assert command.main(["check"]) == 1
    out = capsys.readouterr().out
    cell = name.partition("_")[0]
    assert {line.split()[0].rstrip(",") for line in out.splitlines() if "WRONG:" in line} == {cell}
    assert "FAILED" in out


def test_check_of_nothing_fails(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastrnn.extension, "module", None)
    monkeypatch.setattr(fastrnn.extension, "reason", "it was lost")
    assert command.main(["check"]) == 1
    assert "no kernels to check: it was lost. Build it for this Python" in capsys.readouterr().err


def test_info_warns_of_two_openmp_runtimes() -> None:
    two = SimpleNamespace(openmp_runtimes=lambda: ["/a/libgomp.so.1", "/b/libiomp5.so"])
    warning = "WARNING: 2 runtimes in one process, their threads compete: /a/libgomp.so.1, /b/libiomp5.so"
    assert info._openmp(two) == warning


def test_self_test_finds_a_wrong_result(monkeypatch: pytest.MonkeyPatch) -> None:
    right = fastrnn.functional.gru
    monkeypatch.setattr(fastrnn.functional, "gru", lambda *a, **k: (right(*a, **k)[0] * 1.001, None))
    assert [line.split()[1] for line in info.self_test()] == ["GRU", "GRU"]


def test_unknown_command_shows_the_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["nonsense"]) == 2
    assert command.main([]) == 2
    shown = capsys.readouterr().err
    assert "usage" in shown
    assert "unknown command 'nonsense'" in shown
    assert "a command is missing" in shown
    assert command.main(["--help"]) == 0


def test_version_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--version"]) == 0
    assert capsys.readouterr().out == f"fastrnn {fastrnn.__version__}\n"


@pytest.mark.parametrize("flag", ["--help", "-h"])
@pytest.mark.parametrize("name", ["info", "check", "bench"])
def test_help_of_a_command_runs_nothing(
    name: str, flag: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(info, "main", lambda: pytest.fail("ran"))
    monkeypatch.setattr(command, "_check", lambda: pytest.fail("ran"))
    with pytest.raises(SystemExit) as left:
        command.main([name, flag])
    assert left.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: python -m fastrnn {name} [-h]")


@pytest.mark.parametrize("name", ["info", "check", "bench"])
def test_arguments_that_a_command_does_not_have_are_refused(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        command.main([name, "--nonsense"])
    assert left.value.code == 2
    assert "unrecognized arguments: --nonsense" in capsys.readouterr().err


# ---- importing -----------------------------------------------------------------------------------------------------


def test_import_changes_no_global_state_and_loads_nothing_slow() -> None:
    run(
        """
import random, sys, torch, warnings
def state():
    return (torch.get_rng_state().tolist(), random.getstate(), torch.get_num_threads(), torch.get_default_dtype(),
            torch.backends.mkldnn.enabled, torch.are_deterministic_algorithms_enabled(), torch.is_grad_enabled(),
            torch.nn.LSTM.forward, torch.nn.GRU.forward, list(warnings.filters))
before, modules = state(), set(sys.modules)
import fastrnn
assert state() == before
new = set(sys.modules) - modules
slow = {name for name in new if name.split(".")[0] in ("torch", "numpy", "onnx", "matplotlib", "tqdm")}
assert "torch._dynamo" not in new and not slow, slow
"""
    )


# ---- the ladder ----------------------------------------------------------------------------------------------------


class Subclass(torch.Tensor):
    pass


def test_ordinary_calls_take_the_kernel(compiled: object) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        for requires_grad in (False, True):
            tensors = sample("lstm", D=2, P=2, dtype=dtype, requires_grad=requires_grad).tensors()
            assert autograd.route(tensors) == "kernel"
            assert autograd.explain_route(tensors) == f"kernel: fastrnn's own, {compiled.isa()}"
    assert autograd.route((torch.randn(1, 1, 1), torch.nn.Parameter(torch.randn(1)), None)) == "kernel"


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # of torch's own forward mode
def test_each_reason_for_another_rung_is_named(compiled: object) -> None:
    plain = torch.randn(2, 2, 2)
    for tensors, reason in (
        ((plain, plain.double()), "the tensors mix torch.float32 and torch.float64"),
        ((plain.int(),), "a tensor is torch.int32"),
        ((plain.to("meta"), plain), "a tensor is on meta and the kernels are for the CPU"),
        ((plain, plain.as_subclass(Subclass)), "a tensor is a Subclass, a subclass of Tensor"),
        ((plain, plain.to_sparse()), "a tensor has the layout torch.sparse_coo"),
        ((plain, [1.0]), "an argument is a list, not a Tensor"),
    ):
        assert autograd.route(tensors) == "torch", reason
        assert autograd.explain_route(tensors) == f"torch: torch.nn's own forward, because {reason}"
    with torch.autocast("cpu"):
        assert autograd.explain_route((plain,)).endswith("because autocast is on for the CPU")
    with torch.autograd.forward_ad.dual_level():
        assert autograd.explain_route((plain,)).startswith("reference: plain PyTorch (fastrnn.reference), because")
    rungs = []
    torch.func.vmap(lambda t: rungs.append(autograd.route((t,))) or t)(plain)
    torch.func.grad(lambda t: rungs.append(autograd.route((t,))) or t.sum())(plain)
    torch.func.jvp(lambda t: rungs.append(autograd.route((t,))) or t, (plain,), (plain,))
    assert rungs == ["kernel", "kernel", "reference"]
    assert autograd.route((plain,)) == "kernel"


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*TracerWarning")
def test_tracing_goes_to_torch(compiled: object) -> None:
    seen = []
    torch.jit.trace(lambda t: seen.append(autograd.explain_route((t,))) or t * 2, torch.randn(2), check_trace=False)
    assert seen == ["torch: torch.nn's own forward, because torch.jit.trace is running"]


def test_unknown_instruction_set_in_the_environment_is_named(compiled: object) -> None:
    environment = {**os.environ, "FASTRNN_ISA": "avx9000"}
    command = [sys.executable, "-c", "import fastrnn"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "FASTRNN_ISA=avx9000 is none of those that this machine has" in done.stderr
