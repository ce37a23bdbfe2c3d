# SPDX-License-Identifier: BSD-3-Clause
"""The promise of the bits: outputs, states and gradients of inputs are the same to the last bit for any number of
threads, any part of a batch and any split of a sequence, within one instruction set; weights' gradients for threads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence
from twins import CELLS, like, random_state, tensors_of, training_step, twins

import fastrnn

pytestmark = pytest.mark.usefixtures("isa")

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
# I, H, B, T: below and above a vector, a tile, a thread's share; the last four are worth a second thread. "passes":
# sums of more than a pass and a half over a panel (matmul.h), more rows than the sweep's buffer of sums holds, and more
# than two steps, the first two of which may read the weights without packing them
SHAPES = {
    "tiny": (1, 1, 3, 2),
    "vector": (5, 17, 7, 5),
    "single": (9, 64, 1, 6),
    "tiles": (33, 100, 13, 3),
    "batch": (24, 64, 65, 6),
    "units": (40, 200, 2, 12),
    "both": (64, 130, 20, 8),
    "passes": (400, 390, 67, 3),
}
FORWARD = ("y", "h_n", "c_n")
INPUTS = ("d_x", "d_h0", "d_c0")


def case(cell: str, shape: str, dtype: torch.dtype, **options: object) -> tuple[nn.Module, Tensor, object]:
    features, units, batch, steps = SHAPES[shape]
    module, _ = twins(cell, features, units, dtype=dtype, **options)
    rows = module.num_layers * (2 if module.bidirectional else 1)
    x = torch.randn(steps, batch, features, dtype=dtype)
    return module, x, random_state(cell, rows, batch, H=units, P=module.proj_size, dtype=dtype)


def step_with(module: nn.Module, x: Tensor, hx: object, cotangents: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """(outputs, gradients of x and the states) for given cotangents of the outputs."""
    x, hx = (like(argument, lambda t: t.detach().clone().requires_grad_()) for argument in (x, hx))
    outputs = tensors_of(module(x, hx))
    return outputs, list(torch.autograd.grad(outputs, tensors_of((x, hx)), cotangents))


def assert_bits(found: list[Tensor], expected: list[Tensor], names: tuple[str, ...]) -> None:
    for name, a, b in zip(names, found, expected, strict=False):
        assert torch.equal(a, b), f"{name}: {int((a != b).sum())} of {a.numel()} numbers differ"


@DTYPES
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=["plain", "deep"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("cell", CELLS)
def test_bits_do_not_depend_on_threads(cell, shape, options, dtype, threads):
    module, x, hx = case(cell, shape, dtype, **options)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(training_step(module, x, hx))
    for other in results[1:]:
        for name, tensor in results[0].items():
            assert torch.equal(tensor, other[name]), name


@DTYPES
@pytest.mark.parametrize("split", ["rows", "units"])
@pytest.mark.parametrize("lengths", [None, (5, 5, 4, 2, 2, 1, 1)], ids=["padded", "ragged"])
@pytest.mark.parametrize("units", [8, 17, 40, 100])
@pytest.mark.parametrize("cell", CELLS)
def test_bits_do_not_depend_on_how_threads_share_a_layer(cell, units, lengths, split, dtype, threads):
    module, _ = twins(cell, 6, units, dtype=dtype, bidirectional=True)
    x = torch.randn(5, 7, 6, dtype=dtype)
    hx = random_state(cell, 2, 7, H=units, dtype=dtype)
    if lengths:
        x = pack_sequence([x[:n, b] for b, n in enumerate(lengths)])
    results = []
    for count, way in ((1, "chosen"), (2, split), (4, split), (7, split), (10, split)):
        threads(count, way)
        results.append(training_step(module, x, hx))
    for other in results[1:]:
        for name, tensor in results[0].items():
            assert torch.equal(tensor, other[name]), name


@DTYPES
@pytest.mark.parametrize("bidirectional", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize("shape", ["tiny", "vector", "tiles", "batch", "both", "passes"])
@pytest.mark.parametrize("cell", CELLS)
def test_bits_do_not_depend_on_the_rest_of_the_batch(cell, shape, bidirectional, dtype):
    module, x, hx = case(cell, shape, dtype, bidirectional=bidirectional)
    batch = x.shape[1]
    cotangents = [torch.randn_like(tensor) for tensor in tensors_of(module(x, hx))]
    outputs, gradients = step_with(module, x, hx, cotangents)
    for rows in ([0], [batch - 1], list(range(1, batch)), list(range(0, batch, 2)), list(range(batch))[::-1]):
        part_outputs, part_gradients = step_with(
            module, x[:, rows], like(hx, lambda t, rows=rows: t[:, rows]), [g[:, rows] for g in cotangents]
        )
        assert_bits(part_outputs, [t[:, rows] for t in outputs], FORWARD)
        assert_bits(part_gradients, [t[:, rows] for t in gradients], INPUTS)


# I, H, batches: every number of rows that tiles read weights in place for (direct.h), those with rows left over, and so
# many with so long a row that they pass in two parts, of which the second has few rows
FEW = {"every": (24, 48, range(1, 33)), "parts": (1040, 16, (49, 56, 60, 63, 64, 68, 71, 74, 75))}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("shape", FEW)
@pytest.mark.parametrize("cell", CELLS)
def test_bits_of_short_calls_do_not_depend_on_the_number_of_rows(cell, shape, steps, dtype, threads):
    threads(1)  # members that share rows read no weights in place
    features, units, batches = FEW[shape]
    module, _ = twins(cell, features, units, dtype=dtype)
    most = max(batches) + 1  # more rows than that read the weights packed
    x, hx = torch.randn(steps, most, features, dtype=dtype), random_state(cell, 1, most, H=units, dtype=dtype)
    with torch.no_grad():
        with fastrnn.prepacked(module):
            expected = tensors_of(module(x, hx))
        for batch in batches:
            found = tensors_of(module(x[:, :batch], like(hx, lambda t, batch=batch: t[:, :batch].contiguous())))
            assert_bits(found, [tensor[:, :batch] for tensor in expected], FORWARD)


@DTYPES
@pytest.mark.parametrize("shape", ["vector", "single", "tiles", "batch", "units", "passes"])
@pytest.mark.parametrize("cell", CELLS)
def test_bits_do_not_depend_on_the_split_of_a_sequence(cell, shape, dtype):
    module, x, hx = case(cell, shape, dtype, num_layers=2)
    cotangents = [torch.randn_like(tensor) for tensor in tensors_of(module(x, hx))]
    outputs, gradients = step_with(module, x, hx, cotangents)
    steps = x.shape[0]
    for sizes in ([1] * steps, [1, steps - 1], [steps - 1, 1], [2] * (steps // 2) + [1] * (steps % 2)):
        leaves = [tensor.detach().clone().requires_grad_() for tensor in (x, *tensors_of(hx))]
        state = tuple(leaves[1:]) if cell == "lstm" else leaves[1]
        pieces = []
        for piece in leaves[0].split(sizes):
            y, state = module(piece, state)
            pieces.append(y)
        found = [torch.cat(pieces), *tensors_of(state)]
        assert_bits(found, outputs, FORWARD)
        assert_bits(list(torch.autograd.grad(found, leaves, cotangents)), gradients, INPUTS)


@DTYPES
@pytest.mark.parametrize("cell", ["lstm"])
def test_bits_of_a_projection_do_not_depend_on_threads_batch_or_split(cell, dtype, threads):
    module, x, hx = case(cell, "both", dtype, proj_size=48)
    cotangents = [torch.randn_like(tensor) for tensor in tensors_of(module(x, hx))]
    threads(1)
    outputs, gradients = step_with(module, x, hx, cotangents)
    threads(2)
    again = step_with(module, x, hx, cotangents)
    assert_bits(again[0], outputs, FORWARD)
    assert_bits(again[1], gradients, INPUTS)
    rows = [3, 0, 11]
    part = step_with(module, x[:, rows], like(hx, lambda t: t[:, rows]), [g[:, rows] for g in cotangents])
    assert_bits(part[0], [t[:, rows] for t in outputs], FORWARD)
    assert_bits(part[1], [t[:, rows] for t in gradients], INPUTS)
    state, pieces = hx, []
    for piece in x.split([1, 3, 4]):
        y, state = module(piece, state)
        pieces.append(y)
    assert_bits([torch.cat(pieces), *tensors_of(state)], outputs, FORWARD)


@DTYPES
@pytest.mark.parametrize("bidirectional", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize("cell", CELLS)
def test_ragged_rows_have_the_bits_that_they_have_padded(cell, bidirectional, dtype, threads):
    module, _ = twins(cell, 24, 70, bidirectional=bidirectional, dtype=dtype)
    lengths = [9, 1, 4, 9, 2, 6, 1, 3, 5, 7, 2, 8]
    sequences = [torch.randn(length, 24, dtype=dtype) for length in lengths]
    for count in (1, 2):
        threads(count)
        with torch.no_grad():
            packed, state = module(pack_sequence(sequences, enforce_sorted=False))
            y, _ = pad_packed_sequence(packed)
            for row, sequence in enumerate(sequences):
                alone, own = module(sequence)
                assert torch.equal(y[: len(sequence), row], alone)
                assert_bits([t[:, row] for t in tensors_of(state)], tensors_of(own), FORWARD[1:])


@DTYPES
@pytest.mark.parametrize("cell", CELLS)
def test_bits_are_those_of_training_in_inference_and_of_a_second_run(cell, dtype):
    module, x, hx = case(cell, "tiles", dtype, num_layers=2, bidirectional=True)
    first, second = training_step(module, x, hx), training_step(module, x, hx)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
    with torch.inference_mode():
        assert_bits(tensors_of(module(x, hx)), [first[name] for name in FORWARD if name in first], FORWARD)


# The kernels walk the units of a layer the other way after each call with an odd number of steps. Units that fill
# panels and those that do not, weights read where they lie, packed at each call, and packed beforehand; every call is
# made twice in a row, once for each way.
@DTYPES
@pytest.mark.parametrize("batch", [1, 2, 5, 9], ids="B{}".format)
@pytest.mark.parametrize("sizes", [(24, 40), (30, 37), (16, 144)], ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize("cell", CELLS)
def test_bits_are_those_of_the_call_before(cell, sizes, batch, dtype):
    features, units = sizes
    module, stock = twins(cell, features, units, dtype=dtype, bidirectional=batch == 2)
    hx = random_state(cell, 1 + module.bidirectional, batch, H=units, dtype=dtype)
    x = torch.randn(3, batch, features, dtype=dtype)
    with torch.no_grad():
        for sequence in (x[:1], x):
            first = module(sequence, hx)[0]
            torch.testing.assert_close(first, stock(sequence, hx)[0])
            assert torch.equal(module(sequence, hx)[0], first)
            with fastrnn.prepacked(module):
                assert torch.equal(module(sequence, hx)[0], first)
                assert torch.equal(module(sequence, hx)[0], first)


@DTYPES
@pytest.mark.parametrize("cell", CELLS)
def test_bits_do_not_depend_on_strides(cell, dtype):
    module, x, hx = case(cell, "vector", dtype)
    other, _ = twins(cell, 5, 17, dtype=dtype, batch_first=True)
    y, state = module(x, hx)
    wide = torch.stack([x, x], dim=-1).transpose(0, 1)
    y_other, state_other = other(wide[..., 0], like(hx, lambda t: t.transpose(0, 1).contiguous().transpose(0, 1)))
    assert torch.equal(y_other, y.transpose(0, 1))
    assert_bits(tensors_of(state_other), tensors_of(state), FORWARD[1:])
