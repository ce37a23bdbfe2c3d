# SPDX-License-Identifier: BSD-3-Clause
"""PackedSequence: ragged batches against torch.nn, against each sequence alone, and the form of what comes back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence
from twins import CELLS, assert_as_accurate, random_state, tensors_of, training_step, twins

pytestmark = [
    pytest.mark.usefixtures("isa"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning"),
]

LENGTHS = {
    "sorted": (5, 3, 3, 2, 1),
    "unsorted": (2, 5, 1, 3, 3),
    "equal": (3, 3, 3),
    "ones": (1, 1, 1, 1),
    "single": (4,),
    "one_long": (1, 9, 1, 1, 1, 1, 1),
    "wide": (7, 6, 6, 6, 5, 5, 5, 5, 4, 3, 3, 3, 2, 2, 2, 2, 2, 1, 1),
}


def packed(
    lengths: tuple[int, ...], features: int, dtype: torch.dtype = torch.float32, seed: int = 5
) -> PackedSequence:
    generator = torch.Generator().manual_seed(seed)
    sequences = [torch.randn(length, features, generator=generator, dtype=dtype) for length in lengths]
    return pack_sequence(sequences, enforce_sorted=list(lengths) == sorted(lengths, reverse=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("cell", CELLS)
def test_packed_sequence_equals_torch_nn(cell, lengths, bidirectional, dtype):
    ours, theirs = twins(cell, 3, 9, bidirectional=bidirectional, dtype=dtype)
    x = packed(lengths, 3, dtype)
    assert_as_accurate(ours, theirs, x, random_state(cell, 1 + bidirectional, len(lengths), H=9, dtype=dtype))
    assert_as_accurate(ours, theirs, x)


@pytest.mark.parametrize(
    "options",
    [{"num_layers": 2}, {"batch_first": True}, {"bias": False}, {"proj_size": 3}, {"num_layers": 3, "proj_size": 5}],
    ids=lambda options: "-".join(f"{name}_{value}" for name, value in options.items()),
)
@pytest.mark.parametrize("cell", CELLS)
def test_options_with_a_packed_sequence_equal_torch_nn(cell, options):
    if "proj_size" in options and cell != "lstm":
        pytest.skip("only the LSTM has a projection")
    ours, theirs = twins(cell, 4, 17, bidirectional=True, **options)
    rows = 2 * options.get("num_layers", 1)
    hx = random_state(cell, rows, 5, H=17, P=options.get("proj_size", 0))
    assert_as_accurate(ours, theirs, packed(LENGTHS["unsorted"], 4), hx)


@pytest.mark.parametrize("lengths", ["sorted", "unsorted"])
@pytest.mark.parametrize("cell", CELLS)
def test_output_keeps_the_three_index_fields(cell, lengths):
    x = packed(LENGTHS[lengths], 3)
    for module in twins(cell, 3, 4):
        y, _ = module(x)
        assert type(y) is PackedSequence
        assert torch.equal(y.batch_sizes, x.batch_sizes)
        for kept, given in ((y.sorted_indices, x.sorted_indices), (y.unsorted_indices, x.unsorted_indices)):
            assert (kept is None) == (given is None) == (lengths == "sorted")
            assert kept is None or torch.equal(kept, given)
        assert pad_packed_sequence(y)[1].tolist() == list(LENGTHS[lengths])


@pytest.mark.parametrize("bidirectional", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize("cell", CELLS)
def test_every_sequence_has_the_bits_that_it_has_alone(cell, bidirectional):
    lengths = LENGTHS["unsorted"]
    ours, _ = twins(cell, 3, 17, bidirectional=bidirectional)
    x, hx = packed(lengths, 3), random_state(cell, 1 + bidirectional, len(lengths), H=17)
    together = training_step(ours, x, hx, seed=2)
    y, _ = pad_packed_sequence(PackedSequence(together["y"], *x[1:]))
    rows, _ = pad_packed_sequence(x)
    cotangents, _ = pad_packed_sequence(PackedSequence(cotangent_of(together["y"], seed=2), *x[1:]))
    state_cotangents = cotangents_after(together, seed=2)
    d_x, _ = pad_packed_sequence(PackedSequence(together["d_x"], *x[1:]))
    for row, length in enumerate(lengths):
        alone = rows[:length, row : row + 1].clone().requires_grad_()
        own = tuple(h[:, row : row + 1].clone().requires_grad_() for h in tensors_of(hx))
        out, state = ours(alone, own if cell == "lstm" else own[0])
        outputs = [out, *tensors_of(state)]
        gradients = torch.autograd.grad(
            outputs,
            [alone, *own],
            [cotangents[:length, row : row + 1], *(g[:, row : row + 1] for g in state_cotangents)],
        )
        assert torch.equal(out[:, 0], y[:length, row])
        for name, tensor in zip(("h_n", "c_n"), outputs[1:], strict=False):
            assert torch.equal(tensor[:, 0], together[name][:, row]), name
        assert torch.equal(gradients[0][:, 0], d_x[:length, row])
        for name, gradient in zip(("d_h0", "d_c0"), gradients[1:], strict=False):
            assert torch.equal(gradient[:, 0], together[name][:, row]), name


def cotangent_of(y: Tensor, seed: int) -> Tensor:
    """The cotangent that training_step draws for its first output."""
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(seed))


def cotangents_after(results: dict[str, Tensor], seed: int) -> list[Tensor]:
    """The cotangents that training_step draws for the states."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(results[name].shape, generator=generator) for name in ("y", "h_n", "c_n") if name in results]
    return drawn[1:]


@pytest.mark.parametrize("cell", CELLS)
def test_dropout_between_layers_has_torchs_bits(cell):
    x, results = packed(LENGTHS["unsorted"], 3), []
    for module in twins(cell, 3, 8, 2, dropout=0.5):
        torch.manual_seed(11)
        y, state = module(x)
        results.append([y.data, *tensors_of(state), torch.rand(1)])
    torch.testing.assert_close(*results)
    assert torch.equal(results[0][-1], results[1][-1])


@pytest.mark.parametrize("cell", CELLS)
def test_padding_is_not_read(cell):
    lengths = torch.tensor([4, 2, 1])
    ours, _ = twins(cell, 3, 8, batch_first=True)
    clean = torch.randn(3, 4, 3)
    dirty = clean.clone()
    for row, length in enumerate(lengths):
        dirty[row, length:] = float("nan")
    results = [ours(pack_padded_sequence(x, lengths, batch_first=True)) for x in (clean, dirty)]
    assert torch.equal(results[0][0].data, results[1][0].data)
    for found, expected in zip(tensors_of(results[1][1]), tensors_of(results[0][1]), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("cell", CELLS)
def test_only_the_final_state_may_be_used(cell):
    x, gradients = packed(LENGTHS["unsorted"], 3), []
    for module in twins(cell, 3, 8, bidirectional=True):
        data = x.data.clone().requires_grad_()
        _, state = module(PackedSequence(data, *x[1:]))
        tensors_of(state)[-1].square().sum().backward()
        gradients.append([data.grad, *(parameter.grad for parameter in module.parameters())])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("cell", CELLS)
def test_packed_sequences_take_the_kernel(cell, monkeypatch):
    def refuse(*_):
        raise AssertionError("torch.nn's forward was called")

    for name in ("LSTM", "GRU", "RNN"):
        monkeypatch.setattr(getattr(nn, name), "forward", refuse)
    ours, _ = twins(cell, 3, 8, 2)
    for lengths in LENGTHS.values():
        ours(packed(lengths, 3), random_state(cell, 2, len(lengths), H=8))
