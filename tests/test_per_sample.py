# SPDX-License-Identifier: BSD-3-Clause
"""Gradients under torch.func.vmap: one sweep over the folded batch, a batched product, and right in every nesting."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from doors import as_function, assert_close, eager
from samples import CELLS, Sample, cotangents, sample, stock
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vjp, vmap
from torch.nn.utils.rnn import PackedSequence
from torch.utils._python_dispatch import TorchDispatchMode
from twins import twins

from fastrnn import gradients

pytestmark = [
    pytest.mark.usefixtures("compiled"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning"),
]


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """The operators that run, by name."""
    names: Counter[str] = Counter()

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names[func._opname] += 1
            return func(*args, **(kwargs or {}))

    with Count():
        yield names


def kernels(names: Counter[str]) -> dict[str, int]:
    return {name: count for name, count in names.items() if "_layer" in name}


OPTIONS = {
    "plain": {},
    "bidirectional": {"num_layers": 2, "bidirectional": True},
    "no-bias": {"bias": False, "num_layers": 2},
    "projection": {"proj_size": 3, "num_layers": 2, "bidirectional": True},
}
MODULES = [
    pytest.param(cell, options, id=f"{cell}-{name}")
    for cell in CELLS
    for name, options in OPTIONS.items()
    if cell == "lstm" or name != "projection"
]


@pytest.mark.parametrize(("cell", "options"), MODULES)
def test_per_sample_gradients_equal_a_loop_over_torch_nn(cell: str, options: dict) -> None:
    ours, theirs = twins(cell, 3, 5, dtype=torch.float64, **options)
    x = torch.randn(4, 6, 3, dtype=torch.float64)

    def loss(weights: dict[str, Tensor], x: Tensor, module: nn.Module) -> Tensor:
        y, h = functional_call(module, weights, (x,))
        return y.square().sum() + torch.stack(h).sum() if cell == "lstm" and not options.get("proj_size") else y.sum()

    weights = {name: w.detach() for name, w in ours.named_parameters()}
    found, inputs = vmap(grad(lambda w, x: loss(w, x, ours), argnums=(0, 1)), (None, 1), 0)(weights, x)
    for v in range(6):
        leaf, module = x[:, v].clone().requires_grad_(), theirs
        expected = torch.autograd.grad(
            loss(dict(module.named_parameters()), leaf, module), [leaf, *module.parameters()]
        )
        assert_close(inputs[v], expected[0], "x")
        for (name, gradient), truth in zip(found.items(), expected[1:], strict=True):
            assert_close(gradient[v], truth, name)


@pytest.mark.parametrize(("cell", "options"), MODULES)
def test_per_sample_gradients_take_one_sweep_whatever_the_length_and_the_batch(cell: str, options: dict) -> None:
    ours, _ = twins(cell, 3, 5, **options)
    weights = {name: w.detach() for name, w in ours.named_parameters()}

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(ours, weights, (x,))[0].square().sum()

    totals = set()
    for T, V in ((4, 2), (9, 6)):
        with counted() as names:
            vmap(grad(loss), (None, 0))(weights, torch.randn(V, T, 3))
        layers = options.get("num_layers", 1)
        operator = "rnn_layer" if cell.startswith("rnn") else f"{cell}_layer"
        assert kernels(names) == {operator: layers, f"{operator}_row_gradients": layers}
        totals.add(names.total())
    assert len(totals) == 1


def test_sixty_four_inputs_are_one_call_of_a_batch_of_sixty_four() -> None:
    """What vmap adds to one call of the kernel is a fixed number of views."""
    ours, _ = twins("lstm", 3, 5)
    x = torch.randn(7, 64, 3)
    with torch.no_grad(), counted() as names:
        together, _ = vmap(ours, 1, 1)(x)
    assert kernels(names) == {"lstm_layer": 1}
    assert names.total() < 60
    assert torch.equal(together, ours(x)[0])


@pytest.mark.parametrize("cell", CELLS)
def test_packed_per_sample_gradients_equal_a_loop(cell: str) -> None:
    layers = [sample(cell, lengths=(4, 2, 2, 1), I=3, H=5, D=2, P=3 if cell == "lstm" else 0, seed=s) for s in (0, 1)]
    function, inputs = as_function(layers[0], eager)
    others = as_function(layers[1], eager)[1]
    shared = len(layers[0].state) + 1
    in_dims = [0] * shared + [None] * (len(inputs) - shared)
    members = [torch.stack(pair) for pair in zip(inputs[:shared], others[:shared], strict=True)]

    def loss(*tensors: Tensor) -> Tensor:
        outputs = function(*tensors)
        return sum((out * weight).sum() for out, weight in zip(outputs, cotangents(outputs), strict=True))

    with counted() as names:
        found = vmap(grad(loss, tuple(range(len(inputs)))), tuple(in_dims), randomness="same")(
            *members, *inputs[shared:]
        )
    assert set(kernels(names).values()) == {1}
    for v in range(2):
        alone = [member[v].clone().requires_grad_() for member in members]
        alone += [tensor.clone().requires_grad_() for tensor in inputs[shared:]]
        outputs = stock_of(layers[0], alone)
        expected = torch.autograd.grad(outputs, alone, cotangents(outputs))
        for position, truth in enumerate(expected):
            assert_close(found[position][v], truth, f"{position}")


def stock_of(layer: Sample, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    given = iter(tensors)
    return stock(layer.with_tensors([None if t is None else next(given) for t in layer.tensors()]))


@pytest.mark.parametrize("cell", CELLS)
def test_every_nesting_of_grad_and_vmap_equals_torchs_autograd(cell: str) -> None:
    layer = sample(cell, T=3, B=2, I=2, H=3, D=2, P=2 if cell == "lstm" else 0)
    function, inputs = as_function(layer, eager)
    states = len(layer.state)
    w_ih = 1 + states

    def loss(x: Tensor, w: Tensor, run: Any = function) -> Tensor:
        outputs = run(x, *inputs[1:w_ih], w, *inputs[w_ih + 1 :])
        return sum((k + 1) * out.square().sum() for k, out in enumerate(outputs))

    def true_loss(x: Tensor, w: Tensor) -> Tensor:
        return loss(x, w, lambda *tensors: stock_of(layer, list(tensors)))

    x, w = inputs[0], inputs[w_ih]
    many = torch.stack([x, 2 * x, x.flip(0)])

    def first(x: Tensor, w: Tensor, create: bool = False) -> tuple[Tensor, Tensor]:
        if not create:
            x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
        return torch.autograd.grad(true_loss(x, w), (x, w), create_graph=create)

    # vmap(vmap(grad)): weights for each of two by three members
    found = vmap(vmap(grad(loss, (0, 1)), (0, None)), (0, None))(torch.stack([many, -many]), w)
    for u, sign in enumerate((1, -1)):
        for v in range(3):
            for a, b in zip((g[u, v] for g in found), first(sign * many[v], w), strict=True):
                assert_close(a, b, "vmap(vmap(grad))")

    # grad(vmap(grad)) and, the same by autograd of the outside, backward through vmap(grad)
    def penalty(w: Tensor, x: Tensor) -> Tensor:
        return sum(g.square().sum() for g in vmap(grad(loss, (0, 1)), (0, None))(x, w))

    leaf, leaf_x = w.clone().requires_grad_(), many.clone().requires_grad_()
    total = sum(g.square().sum() for v in range(3) for g in first(leaf_x[v], leaf, create=True))
    expected = torch.autograd.grad(total, (leaf, leaf_x))
    for a, b in zip(grad(penalty, (0, 1))(w, many), expected, strict=True):
        assert_close(a, b, "grad(vmap(grad))")
    for a, b in zip(torch.autograd.grad(penalty(leaf, leaf_x), (leaf, leaf_x)), expected, strict=True):
        assert_close(a, b, "backward through vmap(grad)")

    # vmap(grad(grad)) and a third derivative
    def norm(x: Tensor, w: Tensor) -> Tensor:
        return grad(loss, 1)(x, w).square().sum()

    second = vmap(grad(norm), (0, None))(many, w)
    for v in range(3):
        leaf_x = many[v].clone().requires_grad_()
        leaf_w = w.clone().requires_grad_()
        truth = torch.autograd.grad(first(leaf_x, leaf_w, create=True)[1].square().sum(), leaf_x, create_graph=True)[0]
        assert_close(second[v], truth.detach(), "vmap(grad(grad))")
    third = grad(lambda x: grad(norm)(x, w).square().sum())(many[2])
    assert_close(third, torch.autograd.grad(truth.square().sum(), leaf_x)[0], "grad(grad(grad))")

    # vmap of the pull-back alone
    _, pull = vjp(lambda x: function(x, *inputs[1:])[0], x)
    directions = torch.randn(4, *function(*inputs)[0].shape, dtype=x.dtype)
    leaf_x = x.clone().requires_grad_()
    y = stock_of(layer, [leaf_x, *inputs[1:]])[0]
    for direction, row in zip(directions, vmap(pull)(directions)[0], strict=True):
        assert_close(row, torch.autograd.grad(y, leaf_x, direction, retain_graph=True)[0], "vmap(vjp)")


@pytest.mark.parametrize("cell", CELLS)
def test_an_ensemble_takes_a_call_for_each_of_its_members(cell: str) -> None:
    modules = [twins(cell, 3, 5, 2, seed=s, dtype=torch.float64) for s in range(3)]
    weights, _ = torch.func.stack_module_state([ours for ours, _ in modules])
    x = torch.randn(4, 2, 3, dtype=torch.float64)

    def loss(weights: dict[str, Tensor]) -> Tensor:
        return functional_call(modules[0][0], weights, (x,))[0].square().sum()

    with counted() as names:
        found = vmap(grad(loss))({name: w.detach() for name, w in weights.items()})
    operator = "rnn_layer" if cell.startswith("rnn") else f"{cell}_layer"
    assert kernels(names) == {operator: 6, f"{operator}_backward": 6}
    for v, (_, theirs) in enumerate(modules):
        expected = torch.autograd.grad(theirs(x)[0].square().sum(), list(theirs.parameters()))
        for (name, gradient), truth in zip(found.items(), expected, strict=True):
            assert_close(gradient[v], truth, name)


def test_a_jacobian_is_cut_into_calls_that_fit_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = sample("lstm", T=2, B=2, I=3, H=3)
    function, inputs = as_function(layer, eager)
    weight = 3

    def run(w: Tensor) -> Tensor:
        return function(*inputs[:weight], w, *inputs[weight + 1 :])[0]

    with counted() as names:
        whole = jacrev(run)(inputs[weight])
    assert kernels(names) == {"lstm_layer": 1, "lstm_layer_row_gradients": 1}
    monkeypatch.setattr(gradients, "_MOST_COPIED", 5 * 8 * (2 * 2 * 64 + 2 * 2 * 3))
    with counted() as names:
        parts = jacrev(run)(inputs[weight])
    assert 2 < kernels(names)["lstm_layer_row_gradients"] < 6
    torch.testing.assert_close(whole, parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_per_sample_gradients_keep_the_dtype(dtype: torch.dtype) -> None:
    ours, _ = twins("gru", 3, 5, dtype=dtype)
    weights = {name: w.detach() for name, w in ours.named_parameters()}
    x = torch.randn(3, 4, 3, dtype=dtype)
    found = vmap(grad(lambda w, x: functional_call(ours, w, (x,))[0].sum()), (None, 0))(weights, x)
    for v in range(3):
        alone = torch.autograd.grad(ours(x[v])[0].sum(), list(ours.parameters()))
        for gradient, truth in zip(found.values(), alone, strict=True):
            assert gradient.dtype is dtype
            torch.testing.assert_close(gradient[v], truth, rtol=2e-2 if dtype is torch.bfloat16 else 1e-5, atol=1e-2)


def test_packed_module_under_vmap_takes_the_kernel_once() -> None:
    ours, _ = twins("lstm", 3, 5, 2, bidirectional=True)
    data, sizes = torch.randn(3, 7, 3), torch.tensor([3, 2, 1, 1])

    def run(rows: Tensor) -> Tensor:
        return ours(PackedSequence(rows, sizes))[0].data

    with counted() as names:
        together = vmap(run)(data)
    assert kernels(names) == {"lstm_layer": 2}
    assert torch.equal(together, torch.stack([run(rows) for rows in data]))
