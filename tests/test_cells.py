# SPDX-License-Identifier: BSD-3-Clause
"""LSTMCell, GRUCell and RNNCell against torch.nn's: the new states and every gradient under random cotangents."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from twins import CELLS, assert_as_accurate, random_state, tensors_of, training_step, twins

pytestmark = pytest.mark.usefixtures("isa")

SIZES = [(1, 1, 1), (2, 3, 7), (7, 1, 8), (6, 8, 9), (7, 5, 16), (2, 33, 17), (3, 20, 64), (6, 17, 100)]  # B, I, H


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: "B{}-I{}-H{}".format(*sizes))
@pytest.mark.parametrize("cell", CELLS)
def test_cell_equals_torch_nn(cell, sizes, bias, dtype):
    batch, features, units = sizes
    ours, theirs = twins(cell, features, units, step=True, bias=bias, dtype=dtype)
    x = torch.randn(batch, features, dtype=dtype)
    assert_as_accurate(ours, theirs, x, random_state(cell, batch, H=units, dtype=dtype))
    assert_as_accurate(ours, theirs, x)


@pytest.mark.parametrize("given", [False, True], ids=["zeros", "hx"])
@pytest.mark.parametrize("cell", CELLS)
def test_unbatched_input_equals_torch_nn(cell, given):
    ours, theirs = twins(cell, 3, 9, step=True)
    hx = random_state(cell, H=9) if given else None
    assert_as_accurate(ours, theirs, torch.randn(3), hx)
    for found, expected in zip(tensors_of(ours(torch.ones(3), hx)), tensors_of(theirs(torch.ones(3), hx)), strict=True):
        assert found.shape == expected.shape == (9,)


@pytest.mark.parametrize("cell", CELLS)
def test_strided_and_expanded_arguments_equal_torch_nn(cell):
    ours, theirs = twins(cell, 3, 8, step=True)
    x, wide = torch.randn(3, 4).t()[:, :3], torch.randn(8, 4).t()
    assert_as_accurate(ours, theirs, x, (wide, wide) if cell == "lstm" else wide)
    single = torch.randn(1, 8).expand(4, 8)
    with torch.no_grad():
        found, expected = (module(x, (single, single) if cell == "lstm" else single) for module in (ours, theirs))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("cell", CELLS)
def test_batch_of_zero_gives_empty_states_and_zero_gradients(cell):
    ours, theirs = twins(cell, 3, 5, step=True)
    x, hx = torch.randn(0, 3), random_state(cell, 0, H=5)
    found, expected = training_step(ours, x, hx), training_step(theirs, x, hx)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("sizes", [(4, 0), (0, 4)], ids=["hidden", "input"])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op:UserWarning")
def test_sizes_of_zero_work_as_in_torch_nn(cell, sizes):
    ours, theirs = twins(cell, *sizes, step=True)
    x = torch.randn(3, sizes[0])
    torch.testing.assert_close(ours(x), theirs(x))
    hx = random_state(cell, 3, H=sizes[1])
    torch.testing.assert_close(ours(x, hx), theirs(x, hx))


@pytest.mark.parametrize("missing", ["bias_ih", "bias_hh"])
@pytest.mark.parametrize("cell", CELLS)
def test_one_bias_alone_works_as_in_torch_nn(cell, missing):
    pair = twins(cell, 3, 7, step=True)
    for module in pair:
        setattr(module, missing, None)
    assert_as_accurate(*pair, torch.randn(2, 3), random_state(cell, 2, H=7))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("cell", CELLS)
def test_half_precision_is_as_accurate_as_torch_nn(cell, dtype):
    pair = twins(cell, 6, 17, step=True, dtype=dtype)
    assert_as_accurate(*pair, torch.randn(3, 6, dtype=dtype), random_state(cell, 3, H=17, dtype=dtype))


@pytest.mark.parametrize("cell", CELLS)
def test_steps_of_a_cell_are_a_layer(cell):
    layer, _ = twins(cell, 3, 17)
    step, _ = twins(cell, 3, 17, step=True)
    step.load_state_dict({name.removesuffix("_l0"): tensor for name, tensor in layer.state_dict().items()})
    x = torch.randn(5, 2, 3)
    with torch.no_grad():
        y, last = layer(x)
        state = None
        for t in range(5):
            state = step(x[t], state)
            assert torch.equal(tensors_of(state)[0], y[t])
    for found, expected in zip(tensors_of(state), tensors_of(last), strict=True):
        assert torch.equal(found, expected[0])


@pytest.mark.parametrize("cell", CELLS)
def test_gradients_flow_through_many_steps(cell):
    results = []
    for module in twins(cell, 3, 9, step=True, dtype=torch.float64):
        x = torch.randn(6, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        state = None
        for row in x:
            state = module(row, state)
        sum(tensor.square().sum() for tensor in tensors_of(state)).backward()
        results.append([x.grad, *(parameter.grad for parameter in module.parameters())])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("cell", ["lstm", "gru"])  # torch's RNNCell saves its output and refuses
def test_new_state_may_be_changed_in_place(cell):
    results = []
    for module in twins(cell, 3, 9, step=True):
        x = torch.ones(2, 3, requires_grad=True)
        state = tensors_of(module(x))
        for tensor in state:
            tensor.mul_(2)
        sum(tensor.sum() for tensor in state).backward()
        results.append(x.grad)
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("cell", CELLS)
def test_ordinary_steps_take_the_kernel(cell, monkeypatch):
    def refuse(*_):
        raise AssertionError("torch.nn's forward was called")

    for name in ("LSTMCell", "GRUCell", "RNNCell"):
        monkeypatch.setattr(getattr(nn, name), "forward", refuse)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        ours, _ = twins(cell, 3, 7, step=True, dtype=dtype)
        for x, lead in ((torch.ones(2, 3, dtype=dtype), (2,)), (torch.ones(3, dtype=dtype), ())):
            ours(x)
            ours(x, random_state(cell, *lead, H=7, dtype=dtype))
