# SPDX-License-Identifier: BSD-3-Clause
"""What fastrnn says about itself: info, explain, the ladder of route(), and that importing it has no side effects."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from samples import sample

import fastrnn
from fastrnn import __main__ as command
from fastrnn import autograd, extension, info

WITHOUT_EXTENSION = "import sys; sys.modules['fastrnn._build'] = None; import torch, fastrnn; "


def run(code: str) -> str:
    """The output of a fresh interpreter."""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_info_reports_and_passes_its_self_test(capsys: pytest.CaptureFixture[str], compiled: object) -> None:
    assert command.main(["info"]) == 0
    out = capsys.readouterr().out
    for wanted in (torch.__version__, "loaded", compiled.isa(), "FASTRNN_ISA", "OpenMP", "CUDA", "passed"):
        assert wanted in out


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
    assert "usage" in capsys.readouterr().err
    assert command.main(["--help"]) == 0


# ---- the extension -------------------------------------------------------------------------------------------------


def test_extension_for_another_torch_is_not_loaded() -> None:
    abi = torch.compiled_with_cxx11_abi()
    assert extension.mismatch(torch.__version__, abi) is None
    assert extension.mismatch(torch.__version__.split("+")[0] + "+another", abi) is None
    assert "built for torch 1.2.3+cpu but torch" in extension.mismatch("1.2.3+cpu", abi)
    assert "ABI" in extension.mismatch(torch.__version__, not abi)


def test_everything_works_without_the_extension() -> None:
    """Modules, cells and functional form fall back to torch, first and second derivatives included."""
    out = run(
        WITHOUT_EXTENSION
        + """
x = torch.randn(3, 2, 4, requires_grad=True)
module = fastrnn.LSTM(4, 5)
y, _ = module(x)
z, _ = fastrnn.functional.lstm(x, weights=tuple(module.parameters()))
torch.testing.assert_close(y, z)
(g,) = torch.autograd.grad(z.sum(), x, create_graph=True)
g.square().sum().backward()
fastrnn.GRUCell(4, 5)(x[0])
fastrnn.autograd.gru_layer(x, torch.zeros(1, 2, 5), torch.ones(15, 4), torch.ones(15, 5), *(None,) * 7)
print(fastrnn.explain(module, x))
from fastrnn.__main__ import main
assert main(["info"]) == 0
"""
    )
    assert "fastrnn.LSTM -> torch: torch.nn's own forward, because the extension is not loaded: it is not built" in out
    assert "extension    not loaded: it is not built" in out


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


def test_explain_names_class_rung_and_reason(compiled: object) -> None:
    x = torch.randn(3, 2, 4)
    isa = compiled.isa()
    assert fastrnn.explain(fastrnn.LSTM(4, 5), x) == f"fastrnn.LSTM -> kernel: fastrnn's own, {isa}, with gradient"
    with torch.no_grad():
        explained = fastrnn.explain(fastrnn.GRU(4, 5, 2), x, torch.zeros(2, 2, 5))
        assert explained == f"fastrnn.GRU -> kernel: fastrnn's own, {isa}, without gradient"
        packed = torch.nn.utils.rnn.pack_padded_sequence(x, [3, 2])
        assert "kernel" in fastrnn.explain(fastrnn.RNN(4, 5), packed)
        assert "kernel" in fastrnn.explain(fastrnn.LSTMCell(4, 5), x[0], (torch.zeros(2, 5), torch.zeros(2, 5)))
    assert "mix torch.float32 and torch.float64" in fastrnn.explain(fastrnn.RNN(4, 5), x.double())
    assert "torch.nn's own class" in fastrnn.explain(torch.nn.LSTM(4, 5), x)
    with pytest.raises(TypeError, match=r"module must be an LSTM, GRU or RNN, or a cell, got torch.Linear"):
        fastrnn.explain(torch.nn.Linear(4, 5), x)


def test_unknown_instruction_set_in_the_environment_is_named(compiled: object) -> None:
    environment = {**os.environ, "FASTRNN_ISA": "avx9000"}
    command = [sys.executable, "-c", "import fastrnn"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "FASTRNN_ISA=avx9000 is not available on this machine" in done.stderr
