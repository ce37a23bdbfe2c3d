# SPDX-License-Identifier: BSD-3-Clause
"""Which code computes a layer on CUDA: the chooser, what forces it, and what the doors make of it, without a GPU."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import warnings

import pytest
import torch
from on_host import operators as on_host
from plain_calls import replaced_call
from samples import CELLS, cotangents, gradients, sample, stock
from test_extras import GIVEN, OPERATORS, extras_for, leaves_of
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from twins import LAYERS, both

import fastrnn
from fastrnn import autograd, extended, functional, tiers
from fastrnn.tiers import Call, Range, choose

PLAIN = Call(gates=4, dtype=torch.float32, units=512, batch=32, recorded=True, training=True)


def test_cudnn_is_kept_while_nothing_is_measured():
    assert tiers.MEASURED == ()
    for gates in (4, 3, 1):
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            for recorded in (False, True):
                tier, why = choose(PLAIN._replace(gates=gates, dtype=dtype, recorded=recorded), has_run=True)
                assert (tier, why) == (
                    "cudnn",
                    "no kernel of fastrnn was measured to be faster than cuDNN for such calls",
                )


@pytest.mark.parametrize(
    "changed", [{}, {"cudnn": False}, {"extended": True}, {"compiling": True}, {"training": False}]
)
def test_kernels_that_never_ran_are_for_those_who_ask(changed):
    assert not tiers.HAS_RUN
    tier, why = choose(PLAIN._replace(**changed))
    assert tier == "cudnn"
    assert "have not run on a card yet" in why
    assert choose(PLAIN._replace(**changed, forced="tier0"))[0] == "tier0"


@pytest.mark.parametrize(
    ("changed", "tier", "why"),
    [
        ({"cudnn": False}, "tier0", "cuDNN is off or does not take torch.float32"),
        ({"extended": True}, "tier0", "torch.nn has no lengths"),
        ({"compiling": True}, "tier0", "a compiler"),
        ({"training": False}, "tier0", "eval mode"),
        ({"training": False, "recorded": False}, "cudnn", "no kernel"),
        ({"autocast": True}, "cudnn", "autocast"),
        ({"autocast": True, "compiling": True}, "cudnn", "autocast"),
        ({"forced": "tier0"}, "tier0", "forced"),
        ({"forced": "cudnn", "cudnn": False}, "cudnn", "forced"),
    ],
)
def test_each_reason_has_its_tier(changed, tier, why):
    found, reason = choose(PLAIN._replace(**changed), has_run=True)
    assert found == tier
    assert why in reason


def test_a_measured_range_decides():
    measured = [Range("tier0", (4,), (torch.float32,), (193, 512), (1, 32), (True,))]
    assert choose(PLAIN, measured, has_run=True) == ("tier0", "it was measured to be faster than cuDNN for such calls")
    for changed in (
        {"gates": 3}, {"dtype": torch.float16}, {"units": 192}, {"units": 513}, {"batch": 33}, {"recorded": False},
    ):  # fmt: skip
        assert choose(PLAIN._replace(**changed), measured, has_run=True)[0] == "cudnn", changed


def test_a_block_forces_a_tier_and_ends():
    assert tiers.forced() == "auto"
    with fastrnn.cuda_tier("tier0"):
        assert tiers.forced() == "tier0"
        with contextlib.suppress(RuntimeError), fastrnn.cuda_tier("cudnn"):
            assert tiers.forced() == "cudnn"
            raise RuntimeError
        assert tiers.forced() == "tier0"
    assert tiers.forced() == "auto"
    with (
        pytest.raises(ValueError, match="tier must be one of auto, tier0, cudnn, got 'tier9'"),
        fastrnn.cuda_tier("tier9"),
    ):
        pass


def test_the_environment_forces_a_tier():
    program = "import fastrnn.tiers; print(fastrnn.tiers.forced())"
    for value, output, code in (("tier0", "tier0\n", 0), ("nonsense", "", 1)):
        environment = {**os.environ, "FASTRNN_CUDA_TIER": value}
        done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
        assert (done.stdout, done.returncode) == (output, code)


@pytest.mark.usefixtures("compiled")
def test_this_build_says_whether_it_has_kernels():
    build = __import__("fastrnn._build", fromlist=["CUDA"])
    assert tiers.has_kernels() == build.CUDA.startswith("built")


@pytest.fixture
def as_on_cuda(monkeypatch, compiled):
    """cuda_route() takes tensors of the CPU for tensors on CUDA, and cuDNN is there."""
    monkeypatch.setattr(autograd, "_takes_cuda", lambda tensors: True)
    monkeypatch.setattr(tiers, "cudnn_takes", lambda dtype: True)


@pytest.mark.usefixtures("as_on_cuda")
def test_modules_describe_their_calls(monkeypatch):
    calls = []
    monkeypatch.setattr(tiers, "choose", lambda call: calls.append(call) or choose(call, has_run=True))
    x = torch.randn(6, 2, 3, dtype=torch.float16)
    module = fastrnn.GRU(3, 5, 2, batch_first=True, dtype=torch.float16)
    tensors = [x, *module.parameters()]
    assert module._cuda_route(tensors, None)[0] == "torch"
    assert calls[-1] == Call(3, torch.float16, 5, 6, recorded=True, training=True)
    rung, why = module.eval()._cuda_route(tensors, None)
    assert (rung, why[:5]) == ("kernel", "tier0")
    with torch.no_grad():
        assert module._cuda_route([x[0], *tensors[1:]], None)[0] == "torch"
        assert calls[-1] == Call(3, torch.float16, 5, 1, recorded=False, training=False)
        assert module._cuda_route([x.flatten(0, 1), *tensors[1:]], torch.tensor([4, 4, 4]))[0] == "torch"
        assert calls[-1].batch == 4
        with fastrnn.cuda_tier("tier0"):
            assert module._cuda_route(tensors, None)[0] == "kernel"


@pytest.mark.usefixtures("as_on_cuda")
def test_a_compiler_traces_the_decision():
    def route(x):
        return x + 1 if autograd.cuda_route((x,), 4, 8, 2)[0] == "kernel" else x - 1

    x = torch.zeros(2)
    assert torch.equal(torch.compile(route, backend="eager", fullgraph=True)(x), x - 1)
    with fastrnn.cuda_tier("tier0"):
        assert torch.equal(torch.compile(route, backend="eager", fullgraph=True)(x), x + 1)


# ---- the operators, as a compiler sees them on CUDA ----------------------------------------------------------------


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cell", CELLS)
def test_fake_results_are_on_the_device(cell, dtype):
    layer = sample(cell, T=3, B=2, I=3, H=5, D=2, dtype=dtype)
    operator = OPERATORS[cell]
    on_cpu = operator.overload(*layer.tensors(), *operator.extras(None), *layer.tail()[1:], True)

    def fake(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")

    with FakeTensorMode(), torch.no_grad():  # torch without CUDA has no autograd for its device
        tensors, options = [fake(tensor) for tensor in layer.tensors()], layer.tail()[1:]
        outputs = operator.overload(*tensors, *operator.extras(None), *options, True)
        assert [(o.shape, o.dtype, o.device.type) for o in outputs] == [(o.shape, o.dtype, "cuda") for o in on_cpu]
        y, *buffers = outputs[0], *outputs[operator.results :]
        needs, of_cells = (1 << operator.tensors) - 1, (None,) * (operator.results - 2)
        run = operator.backward_overload
        results = outputs[: operator.results]
        found = run(*results, *tensors, *operator.extras(None), y, *buffers, *options, needs, *of_cells)
    given = [tensor for tensor in tensors if tensor is not None]
    found = [gradient for gradient, tensor in zip(found, tensors, strict=False) if tensor is not None]
    assert [(g.shape, g.dtype, g.device) for g in found] == [(t.shape, t.dtype, t.device) for t in given]


# ---- Python's way to the kernels, which end on the host ------------------------------------------------------------


@pytest.fixture
def by_dispatcher(monkeypatch, compiled):
    """Layers take the way that they take on CUDA, through the dispatcher, and end in tier 0 on the host."""
    library = torch.library.Library("fastrnn", "IMPL")
    ran = []
    for name in ("lstm_layer", "gru_layer", "rnn_layer"):
        for ending in ("", "_backward", "_row_gradients"):
            overload = getattr(on_host(), name + ending).default

            def kernel(*arguments, overload=overload):
                ran.append(overload)
                return overload(*arguments)

            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "(?s).*Overriding a previously registered kernel")
                library.impl(name + ending, kernel, "CPU", allow_override=True)
    for module in (autograd, extended):
        monkeypatch.setattr(module, "_dispatch_modes", lambda: 1)
    monkeypatch.setattr(compiled, "layer_call", lambda *arguments: None)
    monkeypatch.setattr(torch.nn.Module, "_call_impl", replaced_call())
    yield ran
    library._destroy()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_modules_reach_tier_0_with_their_gradients(name, recompute, by_dispatcher):
    ours, theirs = both(name, 3, 8, 2, bidirectional=True, batch_first=True, dtype=torch.float64)
    ours.recompute = recompute
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    found, expected = ours(x)[0], theirs(x)[0]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    given = cotangents([expected])
    pairs = (torch.autograd.grad(y, [x, *m.parameters()], given) for y, m in ((found, ours), (expected, theirs)))
    for one, other in zip(*pairs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    assert len(by_dispatcher) == (6 if recompute and name != "RNN" else 4)  # an RNN saves nothing but y


@pytest.mark.parametrize("cell", CELLS)
def test_extras_reach_tier_0_with_their_gradients(cell, by_dispatcher):
    layer = sample(cell, T=4, B=3, I=3, H=8, D=2, requires_grad=True)
    extras = extras_for(layer, GIVEN["everything"], requires_grad=True)
    operator, leaves = OPERATORS[cell], leaves_of(layer, extras)
    ours = extended.layer(operator, layer.tensors(), None, extras, layer.tail()[1:], cell == "lstm")
    expected = operator.extended_reference(layer.tensors(), extras.arguments(cell == "lstm", None), layer.tail()[1:])
    given = cotangents(expected)
    truth = torch.autograd.grad(expected, leaves, given, allow_unused=True, materialize_grads=True)
    for one, other in zip(torch.autograd.grad(ours, leaves, given), truth, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    assert len(by_dispatcher) == 2


def test_the_derivative_of_tier_0_can_be_differentiated(by_dispatcher):
    layer = sample("lstm", T=3, B=2, I=3, H=4, requires_grad=True)

    def second(outputs):
        (first,) = torch.autograd.grad(outputs[0].square().sum(), [layer.x], create_graph=True)
        return torch.autograd.grad(first.square().sum(), [layer.x, layer.weights[0][1]])

    y, _ = functional.lstm(layer.x, layer.state, weights=layer.weights[0])
    for one, other in zip(second([y]), second(stock(layer)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_packed_layers_reach_tier_0(by_dispatcher):
    layer = sample("gru", lengths=(4, 2, 2), I=3, H=8, D=2, requires_grad=True)
    y, h = functional.gru(
        layer.x, layer.state[0], weights=layer.weights[0], reverse_weights=layer.weights[1],
        batch_sizes=layer.batch_sizes,
    )  # fmt: skip
    expected = gradients(stock(layer), layer)
    for name, one in gradients((y, h), layer).items():
        torch.testing.assert_close(one, expected[name], rtol=1e-10, atol=1e-12)
    assert len(by_dispatcher) == 2
