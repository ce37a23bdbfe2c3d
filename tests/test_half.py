# SPDX-License-Identifier: BSD-3-Clause
"""16-bit layers without products of their own are float32 on the widened numbers, rounded at the end: bit for bit in
the forward pass, whatever lies where."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from twins import CELLS, tensors_of, twins

import fastrnn

pytestmark = pytest.mark.usefixtures("isa")

DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])


def pair(cell: str, dtype: torch.dtype, *sizes: int, **options: object) -> tuple[nn.Module, nn.Module]:
    """A layer in `dtype`, and one in float32 with the same numbers."""
    low = twins(cell, *sizes, **options)[0].to(dtype)
    return low, copy.deepcopy(low).float()


@DTYPES
@pytest.mark.parametrize("sizes", [(3, 1, 5, 7), (4, 3, 33, 50), (2, 40, 64, 1030)], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_forward_is_float32_rounded(cell, sizes, dtype):
    T, B, I, H = sizes  # noqa: E741
    low, wide = pair(cell, dtype, I, H, bidirectional=H < 64, batch_first=True)
    x = torch.randn(B, T, I).to(dtype)
    for given in (x, x.transpose(0, 1).contiguous().transpose(0, 1), torch.cat([x, x], 2)[:, :, I:]):
        for found, expected in zip(tensors_of(low(given)), tensors_of(wide(given.float())), strict=True):
            assert torch.equal(found, expected.to(dtype))


CASES = {  # (T, B, I, H, options): sizes that are read in place, and that are packed
    "one-step": (1, 1, 64, 64, {}),
    "one-step-of-eight-rows": (1, 8, 40, 48, {}),
    "two-steps": (2, 2, 16, 32, {}),
    "one-step-not-whole": (1, 3, 24, 20, {}),
    "a-few-steps-of-a-large-layer": (3, 1, 24, 512, {}),
    "projection": (3, 5, 12, 40, {"proj_size": 24}),
    "no-bias": (2, 9, 8, 16, {"bias": False}),
    "many-rows": (3, 70, 33, 24, {}),
}


@DTYPES
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("cell", CELLS)
def test_short_and_odd_calls_are_float32_rounded(cell, case, dtype):
    T, B, I, H, options = CASES[case]  # noqa: E741
    if "proj_size" in options and cell != "lstm":
        pytest.skip("LSTM alone has projections")
    low, wide = pair(cell, dtype, I, H, bidirectional=True, **options)
    x = torch.randn(T, B, I).to(dtype)
    with torch.no_grad():
        expected = [value.to(dtype) for value in tensors_of(wide(x.float()))]
        for found in (low(x), with_packed_weights(low, x)):
            for a, b in zip(tensors_of(found), expected, strict=True):
                assert torch.equal(a, b)


def with_packed_weights(module: nn.Module, x: torch.Tensor) -> object:
    with fastrnn.prepacked(module):
        return module(x)


@DTYPES
@pytest.mark.parametrize("given", ["lengths", "batch_sizes"])
@pytest.mark.parametrize("cell", CELLS)
def test_lengths_resets_and_noise_are_those_of_float32_rounded(cell, given, dtype):
    T, B, I, H = 6, 9, 24, 33  # noqa: E741
    gates, states = {"lstm": (4, 2), "gru": (3, 1)}.get(cell, (1, 1))
    rows = (T, B) if given == "lengths" else (30,)
    numbers = {
        "x": torch.randn(*rows, I),
        "state": [torch.randn(2, B, H) for _ in range(states)],
        "weights": [torch.randn(gates * H, width) / 6 for width in (I, H)],
        "reverse_weights": [torch.randn(gates * H, width) / 6 for width in (I, H)],
        "h_mask": (torch.rand(2, B, H) < 0.5) * 2.0,
        "zoneout_h": torch.rand(*rows, 2 * H),
    }
    fixed = {"nonlinearity": cell.removeprefix("rnn_")} if cell.startswith("rnn") else {}
    if given == "lengths":
        numbers["reset_state"] = [torch.randn(2, B, H) for _ in range(states)]
        fixed |= {"lengths": torch.tensor([6, 1, 0, 3, 6, 2, 5, 4, 6]), "reset": torch.rand(T, B) < 0.3}
    else:
        fixed |= {"batch_sizes": torch.tensor([9, 7, 5, 4, 3, 2])}
    function = getattr(fastrnn.functional, cell.partition("_")[0])
    made = []
    for wanted in (dtype, torch.float32):
        cast = {name: [value.to(dtype).to(wanted) for value in tensors_of(many)] for name, many in numbers.items()}
        arguments = {name: many if "weights" in name else many[0] for name, many in cast.items()}
        if states == 2:
            arguments |= {name: tuple(cast[name]) for name in cast if "state" in name}
        made.append([value.to(dtype) for value in tensors_of(function(**arguments, **fixed))])
    assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))


@DTYPES
@pytest.mark.parametrize(("T", "B", "sizes"), [(7, 5, (20, 40)), (1, 1, (64, 64)), (30, 70, (9, 17))], ids=str)
def test_gradients_that_never_meet_the_rounded_y_are_those_of_float32_rounded(T, B, sizes, dtype):
    low, wide = pair("lstm", dtype, *sizes)
    x = torch.randn(T, B, sizes[0]).to(dtype)
    state = [torch.randn(1, B, sizes[1]).to(dtype) for _ in range(2)]
    d_y = torch.randn(T, B, sizes[1]).to(dtype)
    made = []
    for module, given in ((low, dtype), (wide, torch.float32)):
        leaves = [value.to(given).detach().requires_grad_() for value in (x, *state)]
        y, _ = module(leaves[0], tuple(leaves[1:]))
        parameters = [module.weight_ih_l0, module.bias_ih_l0, module.bias_hh_l0]
        made.append(torch.autograd.grad(y, [*leaves, *parameters], d_y.to(given)))
    for a, b in zip(*made, strict=True):
        assert torch.equal(a, b.to(dtype))


def gradients_of_the_operators(cell: str, dtype: torch.dtype, numbers: dict, fixed: dict) -> list[list[torch.Tensor]]:
    """Every gradient in `dtype`, and in float32 from the same saved arrays and the y that was rounded."""
    made = []
    operator = f"{cell.partition('_')[0]}_layer"
    states = ["h0", "c0"] if cell == "lstm" else ["h0"]
    weights = ["w_ih", "w_hh", "b_ih", "b_hh", *(["w_hr"] if cell == "lstm" else [])]
    resets = ["reset_h", "reset_c"] if cell == "lstm" else ["reset_h"]
    noise = ["h_mask", "zoneout_h", *(["zoneout_c"] if cell == "lstm" else [])]
    cotangents = ["d_y", "d_h_n", *(["d_c_n"] if cell == "lstm" else [])]
    tail = [cell == "rnn_relu"] if cell.startswith("rnn") else []
    saved: list[torch.Tensor] = []
    for wanted in (dtype, torch.float32):
        given = {name: value.to(dtype).to(wanted) for name, value in numbers.items()}
        inputs = [given["x"], *(given[name] for name in states)]
        inputs += [given.get(f"{name}_{d}") for d in range(2) for name in weights]
        inputs += [fixed.get(name) for name in ("lengths", "batch_sizes", "reset")]
        inputs += [given.get(name) for name in (*resets, *noise)]
        if not saved:
            results = getattr(torch.ops.fastrnn, operator)(*inputs, *tail, True)
            saved = [results[0], *results[1 + len(states) :]]
        kept = [saved[0].to(wanted), *saved[1:]]
        if tail:
            kept = [kept[0], *tail]
        needs = 2**20 - 1 if "reset_h" in given else 2 ** (3 + 2 * len(weights) if cell == "lstm" else 10) - 1
        needs &= 2 ** (15 if cell == "lstm" else 11) - 1
        backward = getattr(torch.ops.fastrnn, f"{operator}_backward")
        made.append(
            [value.to(dtype) for value in backward(*(given[name] for name in cotangents), *inputs, *kept, needs)]
        )
    return made


@DTYPES
@pytest.mark.parametrize("case", ["one-step", "rows", "lengths", "batch_sizes", "noise", "projection", "large"])
@pytest.mark.parametrize("cell", CELLS)
def test_gradients_are_those_of_float32_from_the_rounded_y_bit_for_bit(cell, case, dtype, threads):
    threads(2)
    T, B, I, H = {"one-step": (1, 3, 8, 16), "rows": (4, 70, 9, 20), "large": (9, 40, 24, 130)}.get(  # noqa: E741
        case, (5, 7, 24, 33)
    )
    if case == "projection" and cell != "lstm":
        pytest.skip("LSTM alone has projections")
    gates = {"lstm": 4, "gru": 3}.get(cell, 1)
    R = 12 if case == "projection" else H
    rows = (18,) if case == "batch_sizes" else (T, B)
    shapes = {"x": (*rows, I), "h0": (2, B, R), "c0": (2, B, H), "d_h_n": (2, B, R), "d_c_n": (2, B, H)}
    shapes["d_y"] = (*rows, 2 * R)
    for d in range(2):
        shapes |= {f"w_ih_{d}": (gates * H, I), f"w_hh_{d}": (gates * H, R)}
        shapes |= {f"b_ih_{d}": (gates * H,), f"b_hh_{d}": (gates * H,)}
        if case == "projection":
            shapes[f"w_hr_{d}"] = (R, H)
    fixed: dict = {}
    if case == "lengths":
        shapes |= {"reset_h": (2, B, H), "reset_c": (2, B, H)}
        fixed = {"lengths": torch.tensor([5, 0, 2, 5, 1, 4, 3]), "reset": torch.rand(T, B) < 0.3}
    if case == "batch_sizes":
        fixed = {"batch_sizes": torch.tensor([7, 5, 3, 2, 1])}
    numbers = {name: torch.randn(shape) * (0.2 if name[0] in "wb" else 1.0) for name, shape in shapes.items()}
    if case == "noise":
        numbers |= {"h_mask": (torch.rand(2, B, H) < 0.5) * 2.0, "zoneout_h": torch.rand(T, B, 2 * H)}
        numbers["zoneout_c"] = torch.rand(T, B, 2 * H)
    found, expected = gradients_of_the_operators(cell, dtype, numbers, fixed)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@DTYPES
def test_whole_vectors_are_widened_and_rounded_to_even(dtype):
    low = fastrnn.RNN(16, 16, nonlinearity="relu").to(dtype)
    with torch.no_grad():
        for name, value in low.named_parameters():
            value.copy_(torch.eye(16) if name == "weight_ih_l0" else torch.zeros_like(value))
        bits = torch.arange(2**15, dtype=torch.int16).view(dtype)
        x = bits[bits.isfinite()].reshape(1, -1, 16)
        assert torch.equal(low(x)[0], x)
        half = torch.finfo(dtype).eps / 2  # of the last place of what lies between 1 and 2: all sums are ties
        low.bias_ih_l0.fill_(half)
        x = x[(x >= 1) & (x < 2)].reshape(1, -1, 16)
        assert torch.equal(low(x)[0], (x.float() + half).to(dtype))


@DTYPES
def test_every_value_is_widened_and_rounded_as_torch_does(dtype):
    low, wide = pair("rnn_relu", dtype, 1, 1)
    with torch.no_grad():
        for module in (low, wide):
            for name, value in module.named_parameters():
                value.fill_(1.0 if name == "weight_ih_l0" else 0.0)
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).reshape(1, -1, 1)
    found, expected = low(bits)[0], wide(bits.float())[0].to(dtype)
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0))


@DTYPES
@pytest.mark.parametrize("cell", CELLS)
def test_gradients_and_final_states_are_those_of_float32_nearly(cell, dtype):
    low, wide = pair(cell, dtype, 20, 24, num_layers=2, bidirectional=True)
    x = torch.randn(6, 5, 20).to(dtype)
    inputs = [x.clone().requires_grad_(), x.float().requires_grad_()]
    for module, leaf in zip((low, wide), inputs, strict=True):
        y, *states = tensors_of(module(leaf))
        (y.float().square().sum() + sum(state.float().sum() for state in states)).backward()
    names = [name for name, _ in low.named_parameters()]
    found = [inputs[0].grad, *(value.grad for value in low.parameters())]
    expected = [inputs[1].grad, *(value.grad for value in wide.parameters())]
    for name, a, b in zip(["x", *names], found, expected, strict=True):
        assert a.dtype == dtype
        assert (a.float() - b).abs().max() <= 16 * torch.finfo(dtype).eps * (1 + b.abs().max()), name


@DTYPES
@pytest.mark.parametrize("count", [1, 2])
def test_a_projection_may_be_wider_than_the_layer(dtype, count, threads):
    """Which torch.nn refuses, and torch.ops and fastrnn.functional do not."""
    threads(count)
    T, B, I, H, P = 2, 3, 4, 8, 2000  # noqa: E741
    shapes = [(T, B, I), (4 * H, I), (4 * H, P), (4 * H,), (4 * H,), (P, H)]
    given = [(torch.randn(shape) / shape[-1] ** 0.5).to(dtype) for shape in shapes]
    found, expected = (
        torch.autograd.grad(fastrnn.functional.lstm(x, weights=weights)[0].float().sum(), (x, *weights))
        for x, *weights in ([t.to(kind).requires_grad_() for t in given] for kind in (dtype, torch.float64))
    )
    for a, b in zip(found, expected, strict=True):
        assert (a.double() - b).abs().max() <= 16 * torch.finfo(dtype).eps * (1 + b.abs().max())


@DTYPES
def test_two_calls_at_once_and_a_failed_one_leave_the_kept_memory_in_order(dtype, threads):
    threads(2)
    low, wide = pair("lstm", dtype, 256, 40)
    x = torch.randn(20, 30, 256).to(dtype)  # large enough for both threads to widen it
    with pytest.raises(RuntimeError):
        low(x[..., :7])
    first, second = low(x)[0], low(x.flip(1))[0]
    assert torch.equal(first, wide(x.float())[0].to(dtype))
    assert torch.equal(second, first.flip(1))
