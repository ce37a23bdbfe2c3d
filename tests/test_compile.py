# SPDX-License-Identifier: BSD-3-Clause
"""torch.compile and torch.export: one graph, with the operators in it, for every shape."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from samples import CELLS, Sample, cotangents, gradients, sample
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import fastrnn
from fastrnn import autograd

pytestmark = [
    pytest.mark.usefixtures("compiled"),
    # of torch's own code, which scripts decompositions and copies tree specs
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning", "ignore:.*LeafSpec:FutureWarning"),
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


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "nonstrict"])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_relu"])
def test_export_keeps_length_and_batch_dynamic(cell: str, strict: bool) -> None:
    layer = sample(cell, T=5, B=3, dtype=torch.float32)

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = torch.nn.ParameterList([w for w in layer.weights[0] if w is not None])

        def forward(self, x: Tensor) -> Tensor:
            name, _, nonlinearity = cell.partition("_")
            options = {"nonlinearity": nonlinearity} if nonlinearity else {}
            return getattr(fastrnn.functional, name)(x, weights=tuple(self.weights), **options)[0].relu()

    net = Net()
    T, B = torch.export.Dim("T", min=1, max=512), torch.export.Dim("B", min=1, max=512)
    exported = torch.export.export(net, (layer.x,), dynamic_shapes={"x": {0: T, 1: B}}, strict=strict)
    assert operators(exported.graph_module) == [f"fastrnn.{layer.operator}.default"]
    for shape in ((5, 3, 4), (9, 2, 4)):
        x = torch.randn(shape)
        assert torch.equal(exported.module()(x), net(x))
    decomposed = exported.run_decompositions()
    assert torch.equal(decomposed.module()(layer.x), net(layer.x))
