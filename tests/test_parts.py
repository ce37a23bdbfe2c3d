# SPDX-License-Identifier: BSD-3-Clause
"""float32 products on AMX, in three parts of bfloat16 each: as accurate as multiply-adds, exact where those are, the
same bits whatever else is computed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from accuracy import error
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence, pad_sequence
from twins import CELLS, assert_as_accurate, like, random_state, tensors_of, training_step, twins

import fastrnn
from fastrnn import extension

# T, B, I, H: terms, rows and columns beside the blocks of 32, 16 and 64, one chain of 512 terms and more
SHAPES = [
    (7, 19, 290, 180),
    (3, 33, 64, 32),
    (40, 2, 1030, 65),
    (1, 1, 321, 241),
    (65, 1, 7, 250),
    (4, 5, 3, 2),
    (1, 16, 31, 33),
]
SHAPE = SHAPES[0]


@pytest.fixture(autouse=True)
def amx() -> Iterator[None]:
    """Products in parts whatever the size; skips the test where the machine has no AMX."""
    if extension.module is None or "amx" not in extension.module.available_isas():
        pytest.skip("this machine has no AMX")
    before = extension.module.isa()
    extension.module.select_isa("amx")
    extension.module.force_parts(True)
    yield
    extension.module.force_parts(False)
    extension.module.select_isa(before)


def case(cell: str, shape: tuple[int, ...], **options: object) -> tuple[nn.Module, nn.Module, Tensor, object]:
    """(ours, torch's, x, hx)."""
    steps, batch, features, units = shape
    ours, theirs = twins(cell, features, units, **options)
    rows = ours.num_layers * (2 if ours.bidirectional else 1)
    x = torch.randn(steps, batch, features, generator=torch.Generator().manual_seed(5))
    return ours, theirs, x, random_state(cell, rows, batch, H=units, P=ours.proj_size)


def steps_on(isas: tuple[str, ...], module: nn.Module, x: Tensor, hx: object) -> list[dict[str, Tensor]]:
    """A training step on each instruction set."""
    results = []
    for isa in isas:
        extension.module.select_isa(isa)
        results.append(training_step(module, x, hx))
    extension.module.select_isa("amx")
    return results


@pytest.mark.parametrize("shape", SHAPES, ids="T{0[0]}-B{0[1]}-I{0[2]}-H{0[3]}".format)
@pytest.mark.parametrize("cell", CELLS)
def test_results_and_gradients_are_as_accurate_as_torch_nn(cell, shape):
    assert_as_accurate(*case(cell, shape))


@pytest.mark.parametrize(
    "options",
    [{"bidirectional": True, "num_layers": 2}, {"bias": False, "batch_first": True}, {"bidirectional": True}],
    ids=["deep", "no_bias_batch_first", "directions"],
)
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
def test_options_are_as_accurate_as_torch_nn(cell, options):
    ours, theirs, x, hx = case(cell, (18, 18, 300, 200), **options)
    assert_as_accurate(ours, theirs, x, hx)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")
def test_projection_is_as_accurate_as_torch_nn():
    assert_as_accurate(*case("lstm", (9, 20, 300, 96), proj_size=70))


@pytest.mark.parametrize("cell", CELLS)
def test_gradients_have_no_more_error_than_those_of_multiply_adds(cell):
    """Root mean squares, since the largest error is luck: of sums of 2080 rows, 720 gates and 290 features."""
    ours, theirs, x, hx = case(cell, (65, 32, 290, 180))
    exact = training_step(theirs.double(), x.double(), like(hx, lambda t: t.double()))
    parts, tile = steps_on(("amx", "avx512"), ours, x, hx)
    for name in ("d_x", "d_weight_ih_l0", "d_weight_hh_l0"):
        assert not torch.equal(parts[name], tile[name]), f"{name} was not computed by these products"
        errors = [(result[name] - exact[name]).square().mean().sqrt() for result in (parts, tile)]
        assert errors[0] <= errors[1], name


def powers(*exponents: int) -> float:
    """A number with these bits set: one part for bits near each other, two or three for bits 8 or 16 apart."""
    return float(sum(2**exponent for exponent in exponents))


# (an entry of x, an entry of W_ih): products of parts that must not be missing, each exact in float32 with its sum
PAIRS = [
    (powers(0), powers(0, 9, 18)),  # one part with each of three
    (powers(0, 9, 18), powers(0)),  # and the other way round
    (powers(0, 10), powers(0, 11)),  # two with two
]


@pytest.mark.parametrize("pair", PAIRS)
def test_no_part_is_missing(pair):
    """One entry a row, wherever it stands in a block of terms: outputs and gradients are single products, exactly."""
    steps, batch, features, units = 2, 40, 320, 200
    layer = fastrnn.RNN(features, units, nonlinearity="relu", bias=False)
    column = torch.arange(steps * batch).view(steps, batch) * 4
    x = torch.zeros(steps, batch, features).scatter_(2, column[..., None], pair[0])
    with torch.no_grad():
        layer.weight_ih_l0.fill_(pair[1])
        layer.weight_hh_l0.zero_()
    x.requires_grad_()
    y, _ = layer(x)
    assert torch.equal(y, torch.full_like(y, pair[0] * pair[1]))
    unit = torch.arange(steps * batch).view(steps, batch) * 2
    cotangent = torch.zeros_like(y).scatter_(2, unit[..., None], pair[0])
    y.backward(cotangent)
    assert torch.equal(x.grad, torch.full_like(x, pair[0] * pair[1]))
    # One row has the gradient of its unit, and x in its column: their product, and zero elsewhere.
    exact = cotangent.flatten(0, 1).double().T @ x.detach().flatten(0, 1).double()
    if pair[0] ** 2 < 2**24:
        assert torch.equal(layer.weight_ih_l0.grad.double(), exact)


@pytest.mark.parametrize("scales", [(1e-25, 1), (1e-14, 1e-14), (1e12, 1), (1e25, 1e12)], ids=str)
def test_accuracy_is_relative(scales):
    """Of x and W_ih whose terms are 1e-33 or more; numerics.md says what is lost below."""
    layer = fastrnn.RNN(300, 200, nonlinearity="relu", bias=False)
    with torch.no_grad():
        layer.weight_hh_l0.zero_()
        layer.weight_ih_l0.mul_(scales[1])
    x = torch.randn(2, 20, 300, generator=torch.Generator().manual_seed(3)) * scales[0]
    exact = (x.double() @ layer.weight_ih_l0.double().T).relu()
    assert error(layer(x)[0], exact) <= 8 * torch.finfo(torch.float32).eps * exact.abs().max().item()


def test_the_size_of_w_ih_decides():
    """From 2**20 weights on, 2**15 for d_x, and a block of 32 terms; the bits of all others are those of avx512."""
    extension.module.force_parts(False)
    sizes = (31, 9000, set()), (32, 255, set()), (32, 256, {"d_x"}), (512, 511, {"d_x"}), (512, 512, {"y", "d_x"})
    for features, units, differ in sizes:
        module, _, x, _ = case("lstm", (1, 5, features, units))
        parts, tile = steps_on(("amx", "avx512"), module, x, None)
        found = {name for name in ("y", "d_x") if not torch.equal(parts[name], tile[name])}
        assert found == differ, (features, units)


@pytest.mark.parametrize("cell", CELLS)
def test_bits_depend_on_nothing_but_the_row(cell):
    module, _, x, hx = case(cell, (5, 37, 300, 200))
    whole = tensors_of(module(x, hx))
    for rows in ([0], [36, 3], list(range(16)), list(range(1, 34))):
        part = tensors_of(module(x[:, rows], like(hx, lambda t, rows=rows: t[:, rows])))
        assert all(torch.equal(a, b[:, rows]) for a, b in zip(part, whole, strict=True))
    state, steps = hx, []
    for step in x:
        y, state = module(step[None], state)
        steps.append(y)
    assert torch.equal(torch.cat(steps), whole[0])
    with fastrnn.prepacked(module), torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(tensors_of(module(x, hx)), whole, strict=True))


@pytest.mark.parametrize("batch", [37, 5])  # more rows than threads share as rows, and as columns
@pytest.mark.parametrize("options", [{}, {"bidirectional": True}], ids=["one", "both"])
@pytest.mark.parametrize("cell", CELLS)
def test_bits_do_not_depend_on_threads_or_how_they_share_a_layer(cell, options, batch, threads):
    module, _, x, hx = case(cell, (9, batch, 300, 200), **options)
    results = []
    for count, split in ((1, "chosen"), (2, "chosen"), (2, "rows"), (4, "rows"), (4, "units"), (7, "units")):
        threads(count, split)
        results.append(training_step(module, x, hx))
    for other in results[1:]:
        for name, tensor in results[0].items():
            assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("times", [1, 2])  # d_x of few rows and of many
@pytest.mark.parametrize("cell", CELLS)
def test_ragged_rows_are_those_of_rows_alone(cell, times):
    module, _ = twins(cell, 300, 180, bidirectional=True)
    lengths = [9, 1, 4, 9, 2, 6, 1, 3, 5, 7, 2, 8, 9, 9, 3, 4, 5, 6, 7] * times
    generator = torch.Generator().manual_seed(4)
    sequences = [torch.randn(length, 300, generator=generator) for length in lengths]
    padded = pad_sequence(sequences).requires_grad_()
    y, _ = module(padded, lengths=torch.tensor(lengths))
    y.sum().backward()
    packed, _ = module(pack_sequence(sequences, enforce_sorted=False))
    assert torch.equal(pad_packed_sequence(packed)[0], y)
    for row, sequence in enumerate(sequences):
        alone = sequence.clone().requires_grad_()
        own, _ = module(alone)
        own.sum().backward()
        assert torch.equal(y[: len(sequence), row], own)
        assert torch.equal(padded.grad[: len(sequence), row], alone.grad)
        assert padded.grad[len(sequence) :, row].count_nonzero() == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -3.4028e38])
def test_what_is_not_a_number_stays_in_its_row(value):
    module, _, x, hx = case("lstm", SHAPE)
    whole = tensors_of(module(x, hx))
    x[1, 5, 0] = value
    found = tensors_of(module(x, hx))
    others = [row for row in range(x.shape[1]) if row != 5]
    assert found[0][1, 5].isnan().any()
    assert torch.equal(found[0][0], whole[0][0])
    assert all(torch.equal(a[:, others], b[:, others]) for a, b in zip(found, whole, strict=True))
