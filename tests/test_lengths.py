# SPDX-License-Identifier: BSD-3-Clause
"""lengths: a padded batch whose sequences end early, against PackedSequence, torch.nn with packing, and each alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from twins import CELLS, assert_as_accurate, like, random_state, tensors_of, twins

import fastrnn

pytestmark = [
    pytest.mark.usefixtures("isa"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning"),
]

LENGTHS = {
    "unsorted": (2, 5, 1, 3, 3),
    "equal": (5, 5, 5),
    "short": (2, 3, 1),
    "together_at_first": (3, 5, 2, 4),
    "one_long": (1, 5, 1, 1, 1, 1, 1),
    "wide": (1, 5, 2, 5, 3, 5, 5, 1, 4, 3, 3, 3, 2, 2, 2, 5, 2, 1, 1),
}
OPTIONS = (
    {},
    {"num_layers": 2, "bidirectional": True},
    {"batch_first": True, "bidirectional": True},
    {"bias": False},
    {"proj_size": 3, "num_layers": 2, "bidirectional": True},
)
T = 5
every_cell = pytest.mark.parametrize("cell", CELLS)


def option_ids(options: dict) -> str:
    return "-".join(f"{name}_{value}" for name, value in options.items()) or "plain"


def with_options(function):
    return pytest.mark.parametrize("options", OPTIONS, ids=option_ids)(every_cell(function))


def skip_projection(cell: str, options: dict) -> None:
    if "proj_size" in options and cell != "lstm":
        pytest.skip("only the LSTM has a projection")


def a_state(cell: str, options: dict, batch: int, dtype: torch.dtype = torch.float32) -> object:
    rows = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
    return random_state(cell, rows, batch, H=17, P=options.get("proj_size", 0), dtype=dtype)


def an_input(batch: int, batch_first: bool = False, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(T, batch, 4, generator=torch.Generator().manual_seed(4), dtype=dtype)
    return x.transpose(0, 1).contiguous() if batch_first else x


def packed_call(module: nn.Module, x: Tensor, hx: object, lengths: Tensor) -> tuple[Tensor, object]:
    y, state = module(pack_padded_sequence(x, lengths, module.batch_first, enforce_sorted=False), hx)
    return pad_packed_sequence(y, module.batch_first, total_length=T)[0], state


class Ragged(nn.Module):
    """A module with lengths, as a module of x and hx alone: of torch.nn by packing."""

    def __init__(self, module: nn.Module, lengths: Tensor) -> None:
        super().__init__()
        self.module, self.lengths = module, lengths

    def forward(self, x: Tensor, hx: object = None) -> tuple[Tensor, object]:
        if isinstance(self.module, (fastrnn.LSTM, fastrnn.GRU, fastrnn.RNN)):
            return self.module(x, hx, lengths=self.lengths)
        return packed_call(self.module, x, hx, self.lengths)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@with_options
def test_outputs_are_those_of_a_packed_sequence(cell, options, lengths, dtype):
    skip_projection(cell, options)
    module, _ = twins(cell, 4, 17, dtype=dtype, **options)
    x, hx = an_input(len(lengths), module.batch_first, dtype), a_state(cell, options, len(lengths), dtype)
    lengths = torch.tensor(lengths)
    for state in (hx, None):
        found, expected = module(x, state, lengths=lengths), packed_call(module, x, state, lengths)
        for ours, theirs in zip(tensors_of(found), tensors_of(expected), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("lengths", ["unsorted", "short", "together_at_first", "wide"])
@with_options
def test_gradients_are_as_accurate_as_torch_nn_with_packing(cell, options, lengths):
    skip_projection(cell, options)
    ours, theirs = twins(cell, 4, 17, **options)
    lengths = torch.tensor(LENGTHS[lengths])
    x, hx = an_input(len(lengths), ours.batch_first), a_state(cell, options, len(lengths))
    assert_as_accurate(Ragged(ours, lengths), Ragged(theirs, lengths), x, hx)


def step(module: nn.Module, x: Tensor, hx: object, lengths: Tensor, **options: bool) -> dict[str, Tensor]:
    """Outputs and gradients under random cotangents."""
    x, hx = (like(argument, lambda t: t.detach().clone().requires_grad_()) for argument in (x, hx))
    outputs = tensors_of(module(x, hx, lengths=lengths))
    generator = torch.Generator().manual_seed(8)
    cotangents = [torch.randn(out.shape, generator=generator).to(out.dtype) for out in outputs]
    leaves = [x, *tensors_of(hx), *module.parameters()]
    found = torch.autograd.grad(outputs, leaves, cotangents, **options)
    names = ["d_x", "d_h0", "d_c0"][: 1 + len(tensors_of(hx))] + [f"d_{name}" for name, _ in module.named_parameters()]
    names = [*("y", "h_n", "c_n")[: len(outputs)], *names]
    return {name: t.detach() for name, t in zip(names, [*outputs, *found], strict=True)}


@pytest.mark.parametrize("create_graph", [False, True], ids=["kernel", "reference"])
@with_options
def test_padding_is_not_read_and_gets_no_gradient(cell, options, create_graph):
    skip_projection(cell, options)
    module, _ = twins(cell, 4, 17, **options)
    lengths = torch.tensor([2, 0, 5, 1, 3])
    x, hx = an_input(5), a_state(cell, options, 5)
    padding = torch.arange(T)[:, None] >= lengths
    clean, dirty = x.masked_fill(padding[:, :, None], 0.0), x.masked_fill(padding[:, :, None], torch.nan)
    if module.batch_first:
        clean, dirty = clean.transpose(0, 1), dirty.transpose(0, 1)
    first = step(module, clean, hx, lengths, create_graph=create_graph)
    second = step(module, dirty, hx, lengths, create_graph=create_graph)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
    for name in ("y", "d_x"):
        tensor = second[name].transpose(0, 1) if module.batch_first else second[name]
        assert not tensor[padding].any()
        assert tensor[~padding].any(dim=-1).all()


@with_options
def test_sequence_of_no_step_hands_its_state_through(cell, options):
    skip_projection(cell, options)
    module, _ = twins(cell, 4, 17, **options)
    for lengths in ([0, 3, 0, 5], [0, 0, 0, 0]):
        x, hx = an_input(4, module.batch_first), a_state(cell, options, 4)
        found = step(module, x, hx, torch.tensor(lengths))
        generator = torch.Generator().manual_seed(8)
        cotangents = [
            torch.randn(found[name].shape, generator=generator) for name in ("y", "h_n", "c_n") if name in found
        ]
        for name, state, cotangent in zip(("h", "c"), tensors_of(hx), cotangents[1:], strict=False):
            assert torch.equal(found[f"{name}_n"][:, lengths.index(0)], state[:, lengths.index(0)])
            assert torch.equal(found[f"d_{name}0"][:, lengths.index(0)], cotangent[:, lengths.index(0)])
        if not any(lengths):
            assert not any(t.any() for name, t in found.items() if name == "y" or name[:4] in ("d_x", "d_we", "d_bi"))


@every_cell
def test_bits_do_not_depend_on_threads_or_on_the_rest_of_the_batch(cell, compiled, threads):
    module, _ = twins(cell, 24, 70, num_layers=2, bidirectional=True)
    lengths = torch.tensor([9, 1, 4, 0, 9, 2, 6, 1, 3, 5, 7, 2, 8])
    x, hx = torch.randn(9, len(lengths), 24), random_state(cell, 4, len(lengths), H=70)
    results = []
    for count, split in ((1, "chosen"), (2, "rows"), (2, "units"), (5, "rows"), (6, "units")):
        threads(count, split)
        results.append(step(module, x, hx, lengths))
    for other in results[1:]:
        for name, tensor in results[0].items():
            assert torch.equal(tensor, other[name]), name
    for row, length in enumerate(lengths.tolist()):
        if length:
            y, state = module(x[:length, row : row + 1], like(hx, lambda t, row=row: t[:, row : row + 1].contiguous()))
            assert torch.equal(results[0]["y"][:length, row], y[:, 0])
            for name, alone in zip(("h_n", "c_n"), tensors_of(state), strict=False):
                assert torch.equal(results[0][name][:, row], alone[:, 0])


@every_cell
def test_lengths_of_half_layers(cell):
    module, _ = twins(cell, 4, 17, dtype=torch.bfloat16)
    lengths = torch.tensor([2, 5, 1])
    x = an_input(3, dtype=torch.bfloat16)
    y, _ = module(x, lengths=lengths)
    expected, _ = packed_call(module, x, None, lengths)
    assert y.dtype is torch.bfloat16
    assert torch.equal(y, expected)


@pytest.mark.parametrize("cell", CELLS)
def test_batch_first_equals_time_first_where_the_longest_comes_last(cell):
    """The rows of a batch-first x lie at no one stride over time, and not in the order of their lengths."""
    module, _ = twins(cell, 8, 16)
    other, _ = twins(cell, 8, 16, batch_first=True)
    x, lengths = torch.randn(6, 4, 8), torch.tensor([3, 4, 5, 6])
    with torch.no_grad():
        y, state = module(x, lengths=lengths)
        found, found_state = other(x.transpose(0, 1).contiguous(), lengths=lengths)
    assert torch.equal(found.transpose(0, 1), y)
    for a, b in zip(tensors_of(found_state), tensors_of(state), strict=True):
        assert torch.equal(a, b)
