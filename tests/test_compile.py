# SPDX-License-Identifier: BSD-3-Clause
"""torch.compile: one graph, with the operators in it, for every shape. torch.export is test_export.py's."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from models import Loop, Tagger
from samples import CELLS, Sample, cotangents, gradients, sample
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from twins import LAYERS, tensors_of

import fastrnn
from fastrnn import autograd

pytestmark = [
    pytest.mark.usefixtures("compiled"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),  # torch scripts its decompositions
]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def layer_function(layer: Sample) -> tuple[Callable[..., Sequence[Tensor]], list[Tensor]]:
    """The layer as a function of its tensors, without the None, that Dynamo can trace."""
    forward, present = getattr(autograd, layer.operator), [t is not None for t in layer.tensors()]
    tail = tuple(layer.tail())

    def function(*tensors: Tensor) -> Sequence[Tensor]:
        arguments, position = [], 0
        for here in present:
            arguments.append(tensors[position] if here else None)
            position += here
        return forward(*arguments, *tail)

    return function, [t for t in layer.tensors() if t is not None]


def operators(graph: torch.fx.GraphModule) -> list[str]:
    return [str(node.target) for node in graph.graph.nodes if "fastrnn" in str(node.target)]


@pytest.mark.parametrize("lengths", [None, (3, 2, 1)], ids=["padded", "packed"])
@pytest.mark.parametrize("cell", CELLS)
def test_compiled_layer_is_one_graph_with_the_same_bits(cell: str, lengths: tuple[int, ...] | None) -> None:
    options = dict(lengths=lengths, D=2, P=3 if cell == "lstm" else 0, dtype=torch.float32)
    layer = sample(cell, **options, requires_grad=True)
    function, inputs = layer_function(layer)
    counter = CompileCounterWithBackend("aot_eager")
    ours = torch.compile(function, backend=counter, fullgraph=True)(*inputs)
    assert counter.frame_count == 1
    assert operators(counter.graphs[0]) == [f"fastrnn.{layer.operator}.default"]
    eager = function(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(ours, eager, strict=True))
    expected = gradients(eager, layer)
    for name, gradient in gradients(ours, layer).items():
        assert torch.equal(gradient, expected[name]), name


@pytest.mark.parametrize("cell", CELLS)
def test_one_graph_serves_every_length_and_batch(cell: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    layer = sample(cell, T=5, B=6, I=4, H=7, requires_grad=True)  # no two equal: equal sizes share a symbol at first
    function, _ = layer_function(layer)
    compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=True)
    for T, B in ((5, 6), (9, 3), (2, 8)):
        other = sample(cell, T=T, B=B, requires_grad=True, seed=T)
        inputs = [t for t in other.tensors() if t is not None]
        ours, eager = compiled(*inputs), function(*inputs)
        assert all(torch.equal(a, b) for a, b in zip(ours, eager, strict=True))
        expected = gradients(eager, other)
        assert all(torch.equal(g, expected[name]) for name, g in gradients(ours, other).items())
    assert counter.frame_count == 1


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # torch's own
@pytest.mark.parametrize("cell", CELLS)
def test_compiled_autograd_takes_the_backward_whole(cell: str) -> None:
    layer = sample(cell, D=2, dtype=torch.float32, requires_grad=True)
    expected = gradients(getattr(autograd, layer.operator)(*layer.arguments()), layer)
    outputs = getattr(autograd, layer.operator)(*layer.arguments())
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        found = gradients(outputs, layer)
    assert all(torch.equal(gradient, expected[name]) for name, gradient in found.items())


def test_compiled_without_gradient_saves_nothing() -> None:
    layer = sample("lstm")
    function, inputs = layer_function(layer)
    counter = CompileCounterWithBackend("eager")
    torch.compile(function, backend=counter, fullgraph=True)(*inputs)
    (node,) = [n for n in counter.graphs[0].graph.nodes if "lstm_layer" in str(n.target)]
    assert node.args[-1] is False


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_functional_form_compiles(cell: str) -> None:
    layer = sample(cell if cell != "rnn" else "rnn_tanh", dtype=torch.float32, requires_grad=True)
    forward = getattr(fastrnn.functional, cell)

    def loss(x: Tensor, *weights: Tensor) -> Tensor:
        y, _ = forward(x, weights=weights)
        return (y.sin() * y).sum()

    weights = [w for w in layer.weights[0] if w is not None]
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    ours = torch.autograd.grad(compiled(layer.x, *weights), [layer.x, *weights])
    for a, b in zip(ours, torch.autograd.grad(loss(layer.x, *weights), [layer.x, *weights]), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", [fastrnn.LSTM, fastrnn.GRU, fastrnn.RNN])
def test_module_compiles_whole_inside_fullgraph(kind: type[torch.nn.Module]) -> None:
    module = kind(4, 5, num_layers=2, bidirectional=True)
    x = torch.randn(6, 3, 4)
    counter = CompileCounterWithBackend("aot_eager")
    before = torch._dynamo.config.allow_rnn
    with fastrnn.fullgraph():
        ours = torch.compile(module, backend=counter, fullgraph=True)(x)[0]
    assert torch._dynamo.config.allow_rnn is before
    assert counter.frame_count == 1
    assert len(operators(counter.graphs[0])) == 2
    eager = module(x)[0]
    assert torch.equal(ours, eager)
    cotangent = cotangents([eager])[0]
    parameters = list(module.parameters())
    expected = torch.autograd.grad(eager, parameters, cotangent)
    found = torch.autograd.grad(ours, parameters, cotangent)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("kind", [fastrnn.LSTMCell, fastrnn.GRUCell, fastrnn.RNNCell])
def test_cell_compiles_without_fullgraph_block(kind: type[torch.nn.Module]) -> None:
    module = kind(4, 5)
    x = torch.randn(3, 4)
    counter = CompileCounterWithBackend("aot_eager")
    ours, eager = torch.compile(module, backend=counter, fullgraph=True)(x), module(x)
    first = lambda out: out[0] if isinstance(out, tuple) else out  # noqa: E731
    assert torch.equal(first(ours), first(eager))
    assert len(operators(counter.graphs[0])) == 1


@pytest.mark.parametrize("transform", ["jvp", "grad", "vmap"])
def test_transforms_inside_a_compiled_function_are_right(transform: str) -> None:
    """Dynamo traces torch.func; an operator would meet jvp there as well, and give a tangent of zero."""
    layer = sample("gru", T=2, B=2)
    function, inputs = layer_function(layer)
    x, *rest = inputs

    def transformed(x: Tensor) -> Any:
        if transform == "jvp":
            return torch.func.jvp(lambda x: function(x, *rest)[0], (x,), (torch.ones_like(x),))[1]
        if transform == "grad":
            return torch.func.grad(lambda x: function(x, *rest)[0].square().sum())(x)
        return torch.func.vmap(lambda x: function(x, *rest)[0])(torch.stack((x, 2 * x)))

    expected = transformed(x)
    assert expected.abs().sum() > 0
    torch.testing.assert_close(torch.compile(transformed, backend="aot_eager")(x), expected)


def assert_same_step(compiled: Callable[..., Any], eager: nn.Module, x: Tensor, *rest: Any) -> None:
    """Outputs and all gradients of a training step, to the bit; from the same seed, for dropout."""
    found = []
    for model in (compiled, eager):
        torch.manual_seed(3)
        outputs = tensors_of(model(x, *rest))
        leaves = [*tensors_of(x), *eager.parameters()]
        found.append([*outputs, *torch.autograd.grad(outputs, leaves, cotangents(outputs))])
    assert all(torch.equal(ours, expected) for ours, expected in zip(*found, strict=True))


def any_size(tensor: Tensor, *dimensions: int) -> Tensor:
    for dimension in dimensions:
        torch._dynamo.mark_dynamic(tensor, dimension)
    return tensor


@pytest.mark.parametrize("options", [{}, {"dropout": 0.5}], ids=["plain", "dropout"])
@pytest.mark.parametrize("name", LAYERS)
def test_model_trains_in_one_graph_of_any_length_and_batch(name: str, options: dict) -> None:
    model, counter = Tagger(name, **options), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        with fastrnn.fullgraph():
            for T, B in ((7, 3), (9, 2), (2, 8)):
                assert_same_step(compiled, model, any_size(torch.randn(T, B, 4, requires_grad=True), 0, 1))
        assert_same_step(compiled, model, torch.randn(5, 6, 4, requires_grad=True))  # compiled before: no block needed
    assert counter.frame_count == 1
    assert len(operators(counter.graphs[0])) == 2


def test_explain_counts_one_graph_inside_the_block() -> None:
    model, x = Tagger("GRU"), torch.randn(7, 3, 4)
    with fastrnn.fullgraph():
        explanation = torch._dynamo.explain(model)(x)
    assert (explanation.graph_count, explanation.graph_break_count) == (1, 0)


def test_graph_breaks_outside_the_block_and_results_stay() -> None:
    model, x = Tagger("LSTM"), torch.randn(7, 3, 4)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="RNN, GRU, or LSTM"):
        torch.compile(model, backend="eager", fullgraph=True)(x)
    torch._dynamo.reset()
    with torch.no_grad():
        assert torch.equal(torch.compile(model, backend="eager")(x), model(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own compiler
def test_inductor_compiles_a_model_whole() -> None:
    model = Tagger("LSTM")
    compiled = torch.compile(model, fullgraph=True)
    with fastrnn.fullgraph():
        for T, B in ((7, 3), (9, 2)):
            x = any_size(torch.randn(T, B, 4, requires_grad=True), 0, 1)
            ours, expected = compiled(x), model(x)
            torch.testing.assert_close(ours, expected)
            leaves = [x, *model.parameters()]
            found = [torch.autograd.grad(y, leaves, cotangents([y])) for y in (ours, expected)]
            for a, b in zip(*found, strict=True):
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize("sort", [False, True], ids=["unsorted", "sorted"])
def test_packed_sequences_of_any_lengths_share_one_graph(sort: bool) -> None:
    """torch.nn cannot: it compares the batch of the state with a number that it does not know."""
    module, counter = fastrnn.GRU(4, 5, 2, bidirectional=True), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    with fastrnn.fullgraph():
        for lengths in ((7, 5, 3), (6, 2), (9, 8, 2, 1)):
            order = lengths if sort else lengths[::-1]
            packed = pack_sequence([torch.randn(length, 4) for length in order], enforce_sorted=sort)
            packed = PackedSequence(packed.data.requires_grad_(), *packed[1:])
            for tensor in packed:
                if tensor is not None:
                    any_size(tensor, 0)
            assert_same_step(compiled, module, packed)
    assert counter.frame_count == 1


def test_cells_in_a_loop_are_one_graph_without_the_block() -> None:
    model, counter = Loop(), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for B in (3, 8):
        assert_same_step(compiled, model, any_size(torch.randn(4, B, 4, requires_grad=True), 1))
    assert counter.frame_count == 1
    assert len(operators(counter.graphs[0])) == 4


@pytest.mark.parametrize("name", LAYERS)
def test_autocast_inside_a_compiled_function_is_that_of_torch_nn(name: str) -> None:
    """torch.nn's own code runs there, in a graph that is one step after the other."""
    x, results = torch.randn(3, 2, 4), []
    for library in (fastrnn, nn):
        torch.manual_seed(0)
        module = getattr(library, name)(4, 5)
        compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
        with fastrnn.fullgraph(), torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            results.append(compiled(x)[0])
    assert results[0].dtype == results[1].dtype
    assert torch.equal(*results)


SETTINGS = """
import torch, torch._dynamo, torch._functorch.config, torch._inductor.config
from torch._decomp import global_decomposition_table
def state():
    configs = (torch._dynamo.config, torch._functorch.config, torch._inductor.config)
    return (
        [config.save_config_portable() for config in configs],
        {kind: dict(table) for kind, table in global_decomposition_table.items()},
        torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_rng_state().tolist(),
        torch.backends.mkldnn.enabled, torch.nn.LSTM, torch.nn.LSTM.forward, torch.nn.RNNBase.__setattr__,
    )
before = state()
import fastrnn
assert state() == before
with fastrnn.fullgraph():
    assert torch._dynamo.config.allow_rnn
assert state() == before
"""


def test_import_and_block_leave_every_setting_as_it_was() -> None:
    subprocess.run([sys.executable, "-c", SETTINGS], check=True)
