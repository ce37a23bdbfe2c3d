# SPDX-License-Identifier: BSD-3-Clause
"""LSTM, GRU and RNN against torch.nn's: y, every final state and every gradient under random cotangents."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn
from twins import CELLS, assert_as_accurate, random_state, tensors_of, training_step, twins

import fastrnn

pytestmark = [
    pytest.mark.usefixtures("isa"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning"),
]

T, B, H = (1, 2, 5), (1, 2, 3, 6, 7), (1, 7, 8, 9, 16, 17, 64, 100)


def grid(cell: str, count: int) -> list[dict]:
    """Modules and sizes: every hidden size, and every value of every option with every other one, sampled."""
    draw = random.Random(cell)
    cases = []
    for index in range(count):
        units = H[index % len(H)]
        case = {
            "T": T[index % 3] if index < 9 else draw.choice(T),
            "B": draw.choice(B),
            "I": draw.choice((1, 3, 8, 17, 33) if units < 64 else (3, 8, 17, 33)),
            "H": units,
            "num_layers": 1 + index // 8 % 2,
            "bidirectional": draw.random() < 0.5,
            "bias": draw.random() < 0.7,
            "batch_first": draw.random() < 0.5,
            "hx": draw.random() < 0.6,
        }
        if cell == "lstm" and units > 1 and draw.random() < 0.4:
            case["proj_size"] = max(1, units // draw.choice((2, 3)))
        cases.append(case)
    return cases


def label(cell: str, case: dict) -> str:
    options = "-".join(name for name in ("bidirectional", "batch_first", "hx") if case[name])
    sizes = "".join(f"{letter}{case[letter]}-" for letter in "TBIH")
    projection = f"P{case['proj_size']}-" if "proj_size" in case else ""
    return f"{cell}-{sizes}{projection}L{case['num_layers']}-{options}" + ("" if case["bias"] else "-no_bias")


CASES = [pytest.param(cell, case, id=label(cell, case)) for cell in CELLS for case in grid(cell, 16)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize(("cell", "case"), CASES)
def test_module_equals_torch_nn(cell, case, dtype):
    options = {
        name: case[name] for name in ("num_layers", "bidirectional", "bias", "batch_first", "proj_size") if name in case
    }
    ours, theirs = twins(cell, case["I"], case["H"], dtype=dtype, **options)
    shape = (case["B"], case["T"]) if case["batch_first"] else (case["T"], case["B"])
    x = torch.randn(*shape, case["I"], dtype=dtype)
    rows = case["num_layers"] * (2 if case["bidirectional"] else 1)
    hx = None
    if case["hx"]:
        hx = random_state(cell, rows, case["B"], H=case["H"], P=case.get("proj_size", 0), dtype=dtype)
    assert_as_accurate(ours, theirs, x, hx)


@pytest.mark.parametrize("cell", CELLS)
def test_batch_first_output_is_torchs_transposed_view(cell):
    for ours, theirs in (twins(cell, 3, 8, batch_first=True), twins(cell, 3, 8, 2, batch_first=True)):
        x = torch.randn(2, 5, 3)
        assert ours(x)[0].stride() == theirs(x)[0].stride() == (8, 16, 1)


@pytest.mark.parametrize("given", [False, True], ids=["zeros", "hx"])
@pytest.mark.parametrize("batch_first", [False, True], ids=["time_first", "batch_first"])
@pytest.mark.parametrize("cell", CELLS)
def test_unbatched_input_equals_torch_nn(cell, batch_first, given):
    ours, theirs = twins(cell, 3, 9, 2, bidirectional=True, batch_first=batch_first)
    assert_as_accurate(ours, theirs, torch.randn(5, 3), random_state(cell, 4, H=9) if given else None)


@pytest.mark.parametrize("cell", CELLS)
def test_input_with_any_strides_equals_torch_nn(cell):
    ours, theirs = twins(cell, 6, 9)
    wide = torch.randn(7, 5, 12)
    for x in (wide[1:6:2, ::2, ::2], wide.transpose(0, 1)[..., :6], torch.randn(1, 1, 6).expand(5, 3, 6)):
        batch = x.shape[1]
        assert_as_accurate(ours, theirs, x, random_state(cell, 1, 1, H=9) if batch == 1 else None)
        states = random_state(cell, batch, 1, H=9)
        hx = tuple(h.transpose(0, 1) for h in states) if cell == "lstm" else states.expand(batch, 1, 9).transpose(0, 1)
        assert_as_accurate(ours, theirs, x, hx)


@pytest.mark.parametrize("cell", CELLS)
def test_expanded_state_equals_torch_nn(cell):
    ours, theirs = twins(cell, 3, 8, bidirectional=True)
    x, hx = torch.randn(4, 3, 3), random_state(cell, 1, 1, H=8)
    results = []
    for module in (ours, theirs):
        leaves = [h.clone().requires_grad_() for h in tensors_of(hx)]
        wide = tuple(h.expand(2, 3, 8) for h in leaves)
        y, _ = module(x, wide if cell == "lstm" else wide[0])
        y.square().sum().backward()
        results.append([y, *(h.grad for h in leaves)])
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("cell", CELLS)
def test_batch_of_zero_gives_empty_outputs_and_zero_gradients(cell, dtype):
    ours, theirs = twins(cell, 3, 5, 2, bidirectional=True, dtype=dtype)
    x, hx = torch.randn(4, 0, 3, dtype=dtype), random_state(cell, 4, 0, H=5, dtype=dtype)
    found, expected = training_step(ours, x, hx), training_step(theirs, x, hx)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_relu_on_small_integers_is_exact(dtype):
    ours, theirs = twins("rnn_relu", 5, 17, 2, bidirectional=True, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in ours.named_parameters():
        integers = torch.randint(-1, 2, parameter.shape, generator=generator)
        sparse = torch.randint(0, 4, parameter.shape, generator=generator) == 0
        for module in (ours, theirs):
            module.get_parameter(name).data.copy_(integers * sparse)
    x = torch.randint(-2, 3, (5, 3, 5), generator=generator).to(dtype)
    results = []
    for module in (ours, theirs):
        leaf = x.clone().requires_grad_()
        y, h_n = module(leaf)
        (y.sum() - 2 * h_n.sum()).backward()
        results.append([y, h_n, leaf.grad, *(parameter.grad for parameter in module.parameters())])
        module.zero_grad()
    assert results[0][0].abs().max() > 3
    for ours_result, theirs_result in zip(*results, strict=True):
        assert torch.equal(ours_result, theirs_result)


@pytest.mark.cpu_alone
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("cell", CELLS)
def test_half_precision_is_float32_rounded_once_per_layer(cell, dtype):
    ours, _ = twins(cell, 6, 17, bidirectional=True, dtype=dtype)
    wide, _ = twins(cell, 6, 17, bidirectional=True)
    wide.load_state_dict(ours.state_dict())
    x, hx = torch.randn(5, 3, 6, dtype=dtype), random_state(cell, 2, 3, H=17, dtype=dtype)
    widened = tuple(h.float() for h in hx) if cell == "lstm" else hx.float()
    found, expected = training_step(ours, x, hx), training_step(wide, x.float(), widened)
    for name, tensor in found.items():
        assert tensor.dtype is dtype, name
        if name in ("y", "h_n", "c_n"):
            assert torch.equal(tensor, expected[name].to(dtype)), name
        else:  # the cotangents were rounded as well
            torch.testing.assert_close(tensor, expected[name].to(dtype), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("cell", CELLS)
def test_state_of_zeros_is_the_default(cell):
    ours, _ = twins(cell, 3, 7, 2, bidirectional=True)
    x, zero = torch.randn(4, 2, 3), torch.zeros(4, 2, 7)
    for default, given in zip(
        tensors_of(ours(x)), tensors_of(ours(x, (zero, zero) if cell == "lstm" else zero)), strict=True
    ):
        assert torch.equal(default, given)


@pytest.mark.parametrize("cell", CELLS)
def test_saturated_inputs_stay_finite(cell):
    if cell == "rnn_relu":
        pytest.skip("relu does not saturate")
    ours, _ = twins(cell, 3, 9, bidirectional=True)
    results = training_step(ours, torch.randn(5, 2, 3) * 1e15, random_state(cell, 2, 2, H=9))
    for name, tensor in results.items():
        assert tensor.isfinite().all(), name


@pytest.mark.parametrize("cell", CELLS)
def test_outputs_and_gradients_are_contiguous_and_own_their_memory(cell):
    ours, _ = twins(cell, 3, 9, 2, bidirectional=True)
    for name, tensor in training_step(ours, torch.randn(5, 2, 3), random_state(cell, 4, 2, H=9)).items():
        assert tensor.is_contiguous(), name
    x = torch.randn(1, 2, 3)
    single, _ = twins(cell, 3, 9)
    with torch.no_grad():
        y, state = single(x)
        before = [tensor.clone() for tensor in tensors_of(state)]
        y.zero_()
    for tensor, old in zip(tensors_of(state), before, strict=True):
        assert torch.equal(tensor, old)


@pytest.mark.cpu_alone
@pytest.mark.parametrize("cell", CELLS)
def test_ordinary_calls_take_the_kernel(cell, monkeypatch):
    def refuse(*_):
        raise AssertionError("torch.nn's forward was called")

    for name in ("LSTM", "GRU", "RNN"):
        monkeypatch.setattr(getattr(nn, name), "forward", refuse)
    x = torch.randn(4, 2, 3)
    ours, _ = twins(cell, 3, 7, 2, bidirectional=True, dropout=0.5)
    packed = nn.utils.rnn.pack_sequence([x[:, 0], x[:2, 1]])
    for module in (ours, ours.double(), ours.half(), ours.float()):
        dtype = next(module.parameters()).dtype
        for argument in (x.to(dtype), x[:, 0].to(dtype), packed.to(dtype)):
            assert fastrnn.autograd.route([*tensors_of(argument), *module.parameters()]) == "kernel"
            module(argument)
            with torch.no_grad():
                module(argument)
            with torch.inference_mode():
                module(argument)
