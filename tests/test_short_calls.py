# SPDX-License-Identifier: BSD-3-Clause
"""Calls of a few steps with a few rows read the weights where they lie, as the first step of longer ones does while it
packs them; calls with more rows pack them first. Rows must have the same bits in all, whatever else is given."""

from __future__ import annotations

import pytest
import torch
from samples import CELLS, GATES
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from twins import tensors_of, twins

from fastrnn import functional

pytestmark = pytest.mark.usefixtures("isa")

B, I = 16, 24  # noqa: E741
GIVEN = {
    "nothing": (),
    "lengths": ("lengths",),
    "reset": ("reset", "reset_state"),
    "noise": ("h_mask", "zoneout_h", "zoneout_c"),
    "all": ("lengths", "reset", "reset_state", "h_mask", "zoneout_h", "zoneout_c"),
}


def outputs(cell: str, T: int, H: int, rows: int, names: tuple[str, ...], dtype: torch.dtype) -> list[Tensor]:
    """y and the final states of the first rows of one batch of B, computed by a call with these rows alone."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    G, lstm = GATES[cell], cell == "lstm"
    weights = [(draw(G * H, I) / 8, draw(G * H, H) / H**0.5, draw(G * H), draw(G * H)) for _ in range(2)]
    x, *states = (part[:, :rows] for part in (draw(T, B, I), draw(2, B, H), draw(2, B, H)))
    others = tuple(draw(2, B, H)[:, :rows] for _ in range(2))
    given = {
        "lengths": torch.arange(B)[:rows] % (T + 1),
        "reset": (draw(T, B) > 0)[:, :rows],
        "reset_state": others if lstm else others[0],
        "h_mask": (draw(2, B, H)[:, :rows] > 0).to(dtype) * 2,
        "zoneout_h": draw(T, B, 2 * H)[:, :rows].sigmoid(),
        "zoneout_c": draw(T, B, 2 * H)[:, :rows].sigmoid(),
    }
    options = {"weights": weights[0], "reverse_weights": weights[1]}
    options |= {name: given[name] for name in names if lstm or name != "zoneout_c"}
    if cell.startswith("rnn"):
        options["nonlinearity"] = cell.removeprefix("rnn_")
    function = getattr(functional, cell.partition("_")[0])
    return tensors_of(function(x, tuple(states) if lstm else states[0], **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("names", GIVEN.values(), ids=GIVEN)
@pytest.mark.parametrize("T", [1, 2, 4])
@pytest.mark.parametrize("cell", CELLS)
def test_rows_have_the_bits_that_they_have_in_a_larger_batch(cell, T, names, dtype):
    expected = outputs(cell, T, 64, B, names, dtype)
    for rows in (1, 2, 3, 8):
        for found, whole in zip(outputs(cell, T, 64, rows, names, dtype), expected, strict=True):
            assert torch.equal(found, whole[:, :rows]), rows


# W_hh of an LSTM of 224 or 220 units (whose last block is not full) is so large that three steps of one or two rows
# read it in place; that of 740 (GRU: 840) units is also so large that thirteen steps pack it past the caches (AVX-512).
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(("H", "T"), [(224, 3), (220, 3), (740, 13), (840, 13)])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_large_weights_give_the_bits_of_a_larger_batch(cell, H, T, count, threads):
    threads(count)
    expected = outputs(cell, T, H, B, (), torch.float32)
    for rows in (1, 2, 3):
        for found, whole in zip(outputs(cell, T, H, rows, (), torch.float32), expected, strict=True):
            assert torch.equal(found, whole[:, :rows]), rows


# Sequences that end after one step, beside longer ones, so that a step has more or fewer rows than the one before: what
# the first step packed, or did not, must suit all. Torch is the truth, since two calls of ours could share a mistake.
@pytest.mark.parametrize(
    ("cell", "H", "lengths"),
    [
        ("lstm", 220, [3, 1]),
        ("lstm", 300, [3, 1]),
        ("gru", 252, [3, 1]),
        ("gru", 508, [6, 4]),
        ("lstm", 64, [2] * 3 + [1] * 13),
        ("gru", 64, [2] * 8 + [1] * 8),
        ("lstm", 256, [2] * 5 + [1] * 57),
        ("lstm", 40, [5] * 2 + [1] * 9),
    ],
    ids=lambda value: "" if isinstance(value, list) else None,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("packs", [True, False], ids=["packed", "lengths"])
def test_steps_with_more_or_fewer_rows_than_the_first(cell, H, lengths, dtype, packs):
    ours, stock = (module.to(dtype) for module in twins(cell, 24, H, bidirectional=True))
    x = torch.randn(max(lengths), len(lengths), 24, dtype=dtype)
    packed = pack_padded_sequence(x, torch.tensor(lengths))
    expected = stock(packed)[0]
    leave_nan_behind(dtype)
    found = ours(packed)[0] if packs else ours(x, lengths=torch.tensor(lengths))[0]
    if not packs:
        expected = pad_packed_sequence(expected)[0]
    torch.testing.assert_close(found.data, expected.data, rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-13)


def leave_nan_behind(dtype: torch.dtype) -> None:
    """Fills the memory that this thread keeps from call to call: what was never packed is not what it was before."""
    poison = twins("lstm", 512, 512)[0].to(dtype)
    with torch.inference_mode():
        for value in poison.parameters():
            value.fill_(float("nan"))
        assert poison(torch.full((20, 16, 512), float("nan"), dtype=dtype))[0].isnan().all()
