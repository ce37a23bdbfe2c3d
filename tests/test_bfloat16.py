# SPDX-License-Identifier: BSD-3-Clause
"""bfloat16 on every instruction set, with products in bfloat16 and converted: the accuracy rule beside torch.nn, and
the bits of a row, which depend on nothing but its own numbers."""

from __future__ import annotations

import copy

import pytest
import torch
from accuracy import assert_accurate
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence
from twins import CELLS, assert_as_accurate, like, random_state, tensors_of, training_step, twins

import fastrnn

pytestmark = [
    pytest.mark.usefixtures("bfloat16_isa"),
]

BF16 = torch.bfloat16
ROUNDING = ("avx512_bf16", "amx")  # the instruction sets with products in bfloat16
# T, B, I, H: below and above a block of 16 rows, 16 units and 32 terms
SHAPES = [
    (1, 1, 1, 1),
    (5, 3, 4, 7),
    (2, 16, 32, 16),
    (4, 17, 33, 31),
    (3, 15, 31, 33),
    (7, 50, 64, 64),
    (5, 65, 40, 100),
]


def shape_id(shape: tuple[int, ...]) -> str:
    return "T{}-B{}-I{}-H{}".format(*shape)


def run(module: nn.Module, *arguments: object) -> list[Tensor]:
    with torch.inference_mode():
        return tensors_of(module(*arguments))


KINDS = [*CELLS, "lstm_projected"]


def case(kind: str, shape: tuple[int, ...], **options: object) -> tuple[nn.Module, nn.Module, Tensor, object]:
    """(ours, torch's, x, hx), all bfloat16."""
    steps, batch, features, units = shape
    cell = kind.removesuffix("_projected")
    if cell != kind:
        options["proj_size"] = (units + 1) // 2  # blocks of 16 and 32 end elsewhere than those of the units
    ours, theirs = twins(cell, features, units, dtype=BF16, **options)
    rows = ours.num_layers * (2 if ours.bidirectional else 1)
    x = torch.randn(steps, batch, features, generator=torch.Generator().manual_seed(5)).to(BF16)
    return ours, theirs, x, random_state(cell, rows, batch, H=units, P=ours.proj_size, dtype=BF16)


OPTIONS = [{}, {"bidirectional": True, "num_layers": 2}, {"bias": False}]


# Not of relu: a sum next to 0 is on one side of it in float64 and on the other in bfloat16.
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "rnn_relu"])
def test_results_and_gradients_are_as_accurate_as_torch_nn(kind, shape):
    if kind == "lstm_projected" and shape == SHAPES[0]:
        pytest.skip("a projection is narrower than the layer")
    assert_as_accurate(*case(kind, shape))


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "deep", "no_bias"])
@pytest.mark.parametrize("shape", [(4, 18, 33, 50), (12, 20, 600, 300)], ids=shape_id)
@pytest.mark.parametrize("kind", KINDS)
def test_results_are_as_accurate_as_torch_nn(kind, shape, options):
    ours, theirs, x, hx = case(kind, shape, **options)
    exact = copy.deepcopy(theirs).double()
    wide = like(hx, lambda t: t.double())
    for name, a, b, c in zip("yhc", run(ours, x, hx), run(theirs, x, hx), run(exact, x.double(), wide), strict=False):
        assert_accurate(a, b, c, name)


def test_relu_on_small_integers_is_exact():
    layer = fastrnn.RNN(40, 40, nonlinearity="relu", dtype=BF16)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randint(-1, 2, parameter.shape, generator=generator))
        layer.weight_hh_l0.copy_(torch.eye(40))  # every state is an integer below 256, which bfloat16 holds
    x = torch.randint(-1, 2, (3, 17, 40), generator=generator).to(BF16)
    assert torch.equal(run(layer, x)[0].float(), run(copy.deepcopy(layer).float(), x.float())[0])


@pytest.mark.parametrize("kind", KINDS)
def test_bits_do_not_depend_on_threads_or_how_they_share_a_layer(kind, threads):
    ours, _, x, hx = case(kind, (6, 37, 24, 100), bidirectional=True)
    results = []
    for count, split in ((1, "chosen"), (2, "chosen"), (2, "rows"), (4, "rows"), (4, "units"), (7, "units")):
        threads(count, split)
        results.append(training_step(ours, x, hx))
    for other in results[1:]:
        for name, tensor in results[0].items():
            assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("shape", [(5, 40, 32, 64), (4, 20, 7, 50)], ids=shape_id)
@pytest.mark.parametrize("kind", KINDS)
def test_bits_do_not_depend_on_the_rest_of_the_batch(kind, shape):
    ours, _, x, hx = case(kind, shape, bidirectional=True)
    whole = run(ours, x, hx)
    for rows in ([0], [3, 7], list(range(16)), list(range(1, 19)), list(range(shape[1]))[::-1]):
        part = run(ours, x[:, rows], like(hx, lambda t, rows=rows: t[:, rows]))
        for a, b in zip(part, whole, strict=True):
            assert torch.equal(a, b[:, rows])


@pytest.mark.parametrize("kind", KINDS)
def test_bits_of_ragged_rows_are_those_of_rows_alone(kind):
    ours, *_ = case(kind, (1, 1, 40, 70), bidirectional=True)
    lengths = [9, 1, 4, 9, 2, 6, 1, 3, 5, 7, 2, 8, 9, 9, 3, 4, 5, 6, 7]
    generator = torch.Generator().manual_seed(4)
    sequences = [torch.randn(length, 40, generator=generator).to(BF16) for length in lengths]
    with torch.no_grad():
        packed, state = ours(pack_sequence(sequences, enforce_sorted=False))
        y, _ = nn.utils.rnn.pad_packed_sequence(packed)
        padded = nn.utils.rnn.pad_sequence(sequences)
        by_lengths, by_lengths_state = ours(padded, lengths=torch.tensor(lengths))
    assert torch.equal(by_lengths, y)
    for row, sequence in enumerate(sequences):
        alone, *own = run(ours, sequence)
        assert torch.equal(y[: len(sequence), row], alone)
        for states in (state, by_lengths_state):
            for tensor, expected in zip(tensors_of(states), own, strict=True):
                assert torch.equal(tensor[:, row], expected)


@pytest.mark.parametrize("kind", KINDS)
def test_bits_are_those_of_training_of_prepacked_weights_and_of_other_strides(kind):
    ours, _, x, hx = case(kind, (5, 20, 33, 48), num_layers=2)
    found = run(ours, x, hx)
    trained = training_step(ours, x, hx)
    for name, tensor in zip(("y", "h_n", "c_n"), found, strict=False):
        assert torch.equal(trained[name], tensor)
    with fastrnn.prepacked(ours):
        assert all(torch.equal(a, b) for a, b in zip(run(ours, x, hx), found, strict=True))
    wide = torch.stack([x, x], dim=-1)[..., 0]
    assert all(torch.equal(a, b) for a, b in zip(run(ours, wide, hx), found, strict=True))
    other = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert all(torch.equal(a, b) for a, b in zip(run(ours, other, hx), found, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_of_nan_stays_a_row(kind):
    ours, _, x, hx = case(kind, (4, 20, 30, 40))
    whole = run(ours, x, hx)
    x[1, 5, 0] = float("nan")
    found = run(ours, x, hx)
    others = [row for row in range(20) if row != 5]
    assert found[0][1:, 5].isnan().all()
    assert all(torch.equal(a[:, others], b[:, others]) for a, b in zip(found, whole, strict=True))


@pytest.mark.parametrize("units", [40, 48, 100])  # lanes that pad a cell, terms that pad a block, neither
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "rnn_relu"])  # whose state may become infinite
def test_an_infinite_feature_is_what_it_is_in_float64(kind, units):
    ours, theirs, x, _ = case(kind, (4, 20, 30, units))
    x[1, 3, 2], x[2, 5, 7] = float("inf"), -float("inf")
    found, exact = training_step(ours, x), training_step(theirs.double(), x.double())
    for name, tensor in found.items():
        assert torch.equal(tensor.isfinite(), exact[name].isfinite()), name


@pytest.mark.parametrize("kind", KINDS)
def test_noise_and_resets_are_those_of_float32(kind):
    """Results and, but for relu (see above), every gradient."""
    steps, batch, features, units = 6, 18, 20, 40
    options = {"zoneout": (0.5, 0.5) if "lstm" in kind else 0.5, "recurrent_dropout": 0.5, "bidirectional": True}
    options |= {"nonlinearity": "relu"} if kind == "rnn_relu" else {"proj_size": 21} if "projected" in kind else {}
    x = torch.randn(steps, batch, features, generator=torch.Generator().manual_seed(3)).to(BF16)
    reset = torch.rand(steps, batch, generator=torch.Generator().manual_seed(2)) < 0.3
    results = []
    for dtype in (BF16, torch.float32):
        torch.manual_seed(0)
        layer = getattr(fastrnn, kind.split("_")[0].upper())(features, units, **options).to(BF16).to(dtype)
        leaf = x.to(dtype).requires_grad_()
        torch.manual_seed(1)
        outputs = tensors_of(layer(leaf, reset=reset))
        cotangent = torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(4)).to(BF16).to(dtype)
        gradients = torch.autograd.grad(outputs[0], [leaf, *layer.parameters()], cotangent)
        results.append(([*outputs], [*gradients] if kind != "rnn_relu" else []))
    for part, bound in ((0, 1), (1, 2)):  # in units of eps, of which half is what rounding a result may cost
        for a, b in zip(results[0][part], results[1][part], strict=True):
            allowed = bound * torch.finfo(BF16).eps * b.abs().max().item()
            torch.testing.assert_close(a.float(), b, rtol=0, atol=allowed)


def test_products_are_in_bfloat16_where_the_instruction_set_has_them(bfloat16_isa):
    """A product of h rounded to bfloat16 and one of h in float32 differ; the test would not see the kernels else."""
    ours, _, x, hx = case("lstm", (6, 16, 32, 64))
    rounded = run(ours, x, hx)[0]
    wide = run(copy.deepcopy(ours).float(), x.float(), like(hx, lambda t: t.float()))[0].to(BF16)
    assert torch.equal(rounded, wide) == (bfloat16_isa not in ROUNDING)
