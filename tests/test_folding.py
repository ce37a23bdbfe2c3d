# SPDX-License-Identifier: BSD-3-Clause
"""Modules under torch.vmap: one ordinary call on the batch of all members, with the bits of a loop over them."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.utils import parametrizations
from twins import CELLS, LAYERS, STEPS, tensors_of, twins

import fastrnn
from fastrnn import folding

V, T, B, I, H = 4, 5, 3, 3, 6  # noqa: E741


@pytest.fixture
def folds(compiled: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the batches that members became."""
    sizes: list[int] = []

    def recorded(run: Callable, *arguments: Any) -> Any:
        def seen(folded: list[Tensor]) -> Any:
            sizes.append(folded[0].numel() // folded[0].shape[-1])
            return run(folded)

        return below(seen, *arguments)

    below = folding._below_vmap
    monkeypatch.setattr(folding, "_below_vmap", recorded)
    return sizes


def assert_like_a_loop(run: Callable[..., Any], in_dims: tuple, inputs: tuple) -> None:
    """vmap(run) has the bits of run on each member alone."""
    together = tensors_of(vmap(run, in_dims)(*inputs))
    alone = [
        tensors_of(run(*(t if dim is None else t.select(dim, v) for t, dim in zip(inputs, in_dims, strict=True))))
        for v in range(V)
    ]
    for ours, each in zip(together, zip(*alone, strict=True), strict=True):
        assert torch.equal(ours, torch.stack(each))


def states_of(module: nn.Module, *lead: int) -> tuple[Tensor, ...]:
    rows = module.num_layers * (2 if module.bidirectional else 1)
    widths = (module.proj_size or H, H)[: 2 if module.mode == "LSTM" else 1]
    return tuple(torch.randn(*lead, rows, B, width) for width in widths)


def with_states(module: nn.Module) -> Callable[..., Any]:
    return lambda x, *states: module(x, (states if len(states) == 2 else states[0]) if states else None)


VARIANTS = [{}, {"num_layers": 2, "bidirectional": True}, {"batch_first": True}]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_members_are_rows_of_one_call(cell: str, options: dict, folds: list[int]) -> None:
    module, _ = twins(cell, I, H, **options)
    size = (B, T) if options.get("batch_first") else (T, B)
    for dim in range(3):  # where the members stand
        x = torch.randn(*size[:dim], V, *size[dim:], I)
        folds.clear()
        vmap(module, dim)(x)
        assert folds == [V * T * B]
        assert_like_a_loop(module, (dim,), (x,))
    run = with_states(module)
    for x_dim, state_dim in ((0, None), (None, 0), (0, 0)):
        x = torch.randn(*(() if x_dim is None else (V,)), *size, I)
        states = states_of(module, *(() if state_dim is None else (V,)))
        folds.clear()
        assert_like_a_loop(run, (x_dim, *(state_dim for _ in states)), (x, *states))
        assert folds == [V * T * B]


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_members_without_a_batch_become_one(cell: str, batch_first: bool, folds: list[int]) -> None:
    module, _ = twins(cell, I, H, num_layers=2, batch_first=batch_first)
    run, x = with_states(module), torch.randn(V, T, I)
    states = tuple(state[:, :, 0] for state in states_of(module, V))
    assert_like_a_loop(run, (0,), (x,))
    assert_like_a_loop(run, (0, *(0 for _ in states)), (x, *states))
    assert_like_a_loop(run, (None, *(0 for _ in states)), (x[0], *states))
    assert_like_a_loop(run, (0, *(None for _ in states)), (x, *(state[0] for state in states)))
    assert folds == [V * T] * 4


@pytest.mark.parametrize("name", STEPS)
def test_members_of_a_cell_become_one_batch(name: str, folds: list[int]) -> None:
    cell = getattr(fastrnn, name)(I, H)
    count = 2 if name == "LSTMCell" else 1
    run = lambda x, *states: cell(x, (states if count == 2 else states[0]) if states else None)  # noqa: E731
    for lead in ((), (B,)):
        x, states = torch.randn(V, *lead, I), [torch.randn(V, *lead, H) for _ in range(count)]
        assert_like_a_loop(run, (0,), (x,))
        assert_like_a_loop(run, (0,) * (1 + count), (x, *states))
        assert_like_a_loop(run, (0, *(None,) * count), (x, *(state[0] for state in states)))
        assert folds == [V * math.prod(lead)] * 3
        folds.clear()


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_lengths_and_resets_fold_too(cell: str, batch_first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module, _ = twins(cell, I, H, num_layers=2, bidirectional=True, batch_first=batch_first)
    layers: list[int] = []
    monkeypatch.setattr(fastrnn.sequences.extended, "layer", counting(fastrnn.sequences.extended.layer, layers))
    size = (B, T) if batch_first else (T, B)
    x, lengths = torch.randn(V, *size, I), torch.randint(0, T + 1, (V, B))
    reset, (first, *others) = torch.rand(V, *size) < 0.3, states_of(module)
    replacement = (first, *others) if others else first

    def run(x: Tensor, lengths: Tensor, reset: Tensor) -> Any:
        return module(x, lengths=lengths, reset=reset, reset_state=replacement, return_all_states=True)

    for dims in ((0, 0, 0), (0, None, None), (None, 0, None), (None, None, 0)):
        given = tuple(t if dim == 0 else t[0] for t, dim in zip((x, lengths, reset), dims, strict=True))
        layers.clear()
        vmap(run, dims)(*given)
        assert layers == [1, 1]
        assert_like_a_loop(run, dims, given)


def counting(function: Callable, calls: list[int]) -> Callable:
    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        return function(*arguments, **options)

    return counted


@pytest.mark.parametrize("name", LAYERS)
def test_two_vmaps_are_one_batch(name: str, folds: list[int]) -> None:
    module, x = getattr(fastrnn, name)(I, H), torch.randn(2, V, T, B, I)
    together = vmap(vmap(module, 1, 1), 0)(x.transpose(1, 2))[0]
    assert folds == [V * T * B, 2 * V * T * B]
    for u in range(2):
        for v in range(V):
            assert torch.equal(together[u, :, v], module(x[u, v])[0])
    folds.clear()
    inner = vmap(lambda a: vmap(lambda b: module(a + b)[0])(x[0]))(x[0])  # either level has members of its own
    assert folds == [V * T * B, V * V * T * B]
    assert torch.equal(inner[1, 2], module(x[0, 1] + x[0, 2])[0])


@pytest.mark.parametrize("cell", CELLS)
def test_gradients_outside_of_vmap_are_those_of_the_loop(cell: str) -> None:
    module, _ = twins(cell, I, H, num_layers=2, dtype=torch.float64)
    x, weights = torch.randn(V, T, B, I, dtype=torch.float64, requires_grad=True), list(module.parameters())
    found = torch.autograd.grad(vmap(module)(x)[0].square().sum(), [x, *weights])
    expected = torch.autograd.grad(sum(module(member)[0].square().sum() for member in x), [x, *weights])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", LAYERS)
def test_what_is_not_one_batch_goes_another_way_and_is_right(name: str, folds: list[int]) -> None:
    kind = getattr(fastrnn, name)
    x = torch.randn(V, T, B, I)
    modules = [kind(I, H) for _ in range(V)]
    weights, _ = stack_module_state(modules)
    ensemble = vmap(lambda w, x: functional_call(modules[0], w, (x,))[0])(weights, x)
    parametrized = parametrizations.weight_norm(kind(I, H), "weight_hh_l0")
    listed = kind(I, H)
    by_hand = vmap(lambda w, x: written(listed, w)(x)[0])(torch.stack([m.weight_hh_l0.detach() for m in modules]), x)
    normed = vmap(parametrized)(x)[0]
    assert not folds
    for v in range(V):
        assert torch.equal(ensemble[v], modules[v](x[v])[0])
        torch.testing.assert_close(normed[v], parametrized(x[v])[0])
        torch.testing.assert_close(by_hand[v], written(listed, modules[v].weight_hh_l0)(x[v])[0])
    dropping = kind(I, H, 2, dropout=0.5)
    with pytest.raises(RuntimeError, match="random"):
        vmap(dropping)(x)
    y = vmap(dropping, randomness="same")(x[:1].expand(2, -1, -1, -1))[0]
    assert torch.equal(y[0], y[1])
    y = vmap(dropping, randomness="different")(x[:1].expand(2, -1, -1, -1))[0]
    assert not torch.equal(y[0], y[1])
    folds.clear()
    vmap(dropping.eval())(x)
    assert folds == [V * T * B]


def written(module: nn.Module, w_hh: Tensor) -> nn.Module:
    """The weight as functional code puts it there, a tensor in __dict__."""
    module._parameters.pop("weight_hh_l0", None)
    module.__dict__["weight_hh_l0"] = w_hh
    return module


@pytest.mark.parametrize("name", LAYERS)
def test_mistakes_have_the_words_of_an_ordinary_call(name: str) -> None:
    module, x, h = getattr(fastrnn, name)(I, H), torch.randn(V, T, B, I), torch.randn(V, 1, B + 1, H)
    run = with_states(module)
    states = (h, h) if name == "LSTM" else (h,)
    for members in ((x[..., :2],), (x, *states), (x[:, 0, 0],)):
        with pytest.raises((RuntimeError, ValueError)) as alone:
            run(*(member[0] for member in members))
        with pytest.raises(alone.type) as together:
            vmap(run)(*members)
        assert str(together.value) == str(alone.value)
