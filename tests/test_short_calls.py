# SPDX-License-Identifier: BSD-3-Clause
"""Calls of a few steps with a few rows read the weights where they lie, as the first step of longer ones does while it
packs them; calls with more rows pack them first. Rows must have the same bits in all, whatever else is given."""

from __future__ import annotations

import pytest
import torch
from samples import CELLS, GATES
from torch import Tensor
from twins import tensors_of

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


# H = 224 and 220 (whose last block of units is not full): W_hh of an LSTM is so large that three steps of one or two
# rows read it in place; 740: also so large that it is packed past the caches.
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(("H", "T"), [(224, 3), (220, 3), (740, 3), (740, 13)])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_large_weights_give_the_bits_of_a_larger_batch(cell, H, T, count, threads):
    threads(count)
    expected = outputs(cell, T, H, B, (), torch.float32)
    for rows in (1, 2, 3):
        for found, whole in zip(outputs(cell, T, H, rows, (), torch.float32), expected, strict=True):
            assert torch.equal(found, whole[:, :rows]), rows
