# SPDX-License-Identifier: BSD-3-Clause
"""The operators *_row_gradients: the backward without the sums over rows, from which any sum can be made."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from calls import DOORS, backward, backward_values, call, schema
from samples import CELLS, GATES, Sample, sample
from torch import Tensor

pytestmark = pytest.mark.usefixtures("compiled")

SHAPES = {
    "padded": dict(T=5, B=3, I=4, H=7),
    "bidirectional": dict(T=3, B=2, I=3, H=17, D=2),
    "packed": dict(lengths=(5, 3, 3, 1), I=3, H=5, D=2, bias=False),
    "long": dict(T=70, B=9, I=3, H=20, D=2),
}
CASES = [pytest.param(cell, shape, id=f"{cell}-{name}") for cell in CELLS for name, shape in SHAPES.items()] + [
    pytest.param("lstm", shape | {"P": 2}, id=f"lstm-projection-{name}") for name, shape in SHAPES.items()
]


def row_gradients(layer: Sample, needs: int = 7, door: str = "direct") -> dict[str, Tensor]:
    operator = f"{layer.operator}_row_gradients"
    needs &= 7 if layer.cell == "lstm" else 3
    found = call(door, operator, backward_values(layer, needs))
    return dict(zip((result.name for result in schema(operator).returns), found, strict=True))


def of_input_gates(d_gates: Tensor, cell: str) -> Tensor:
    """Gradients in the order of w_ih's rows: the stored ones of a GRU are n of the input, r, z, n of the recurrence."""
    split = d_gates.unflatten(-1, (4 if cell == "gru" else GATES[cell], -1))
    return (split[..., [1, 2, 0], :] if cell == "gru" else split).flatten(-2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("cell", "shape"), CASES)
def test_rows_sum_to_the_gradients_of_the_backward_operator(
    cell: str, shape: dict, dtype: torch.dtype, isa: str
) -> None:
    layer = sample(cell, **shape, dtype=dtype)
    rows, summed = row_gradients(layer), backward("direct", layer)
    assert torch.equal(rows["d_x"], summed["x"])
    assert torch.equal(rows["d_h0"], summed["h0"])
    tolerance = dict(rtol=1e-10, atol=1e-11) if dtype is torch.float64 else dict(rtol=2e-2, atol=2e-2)
    if dtype is torch.float32:
        tolerance = dict(rtol=1e-4, atol=1e-4)
    x = layer.x.flatten(0, -2).to(rows["d_gates"].dtype)
    for d, suffix in enumerate(("", "_reverse")[: len(layer.weights)]):
        d_input = of_input_gates(rows["d_gates"][d], cell)
        torch.testing.assert_close((d_input.T @ x).to(dtype), summed[f"w_ih{suffix}"], **tolerance)
        if layer.weights[0][2] is not None:
            torch.testing.assert_close(d_input.sum(0).to(dtype), summed[f"b_ih{suffix}"], **tolerance)
    if cell == "lstm":
        assert torch.equal(rows["d_c0"], summed["c0"])
        projected = "P" in shape
        assert rows["d_h"].shape == ((len(layer.weights), x.shape[0], shape["P"]) if projected else (0,))


@pytest.mark.parametrize("cell", CELLS)
def test_needs_selects_and_gates_always_come(cell: str) -> None:
    layer = sample(cell, D=2)
    whole, gates = row_gradients(layer), row_gradients(layer, needs=0)
    for name, tensor in gates.items():
        if name == "d_gates":
            assert torch.equal(tensor, whole["d_gates"])
        else:
            assert tensor.shape == (0,), name
    with pytest.raises(RuntimeError, match=r"needs must be in \[0, 2\^[23]\), got 8"):
        call("direct", f"{layer.operator}_row_gradients", backward_values(layer, 8))


@pytest.mark.parametrize("cell", CELLS)
def test_doors_agree_and_a_batch_of_none_is_empty(cell: str) -> None:
    layer = sample(cell, D=2)
    for name, tensor in row_gradients(layer).items():
        assert torch.equal(tensor, row_gradients(layer, door="dispatcher")[name]), name
    empty = row_gradients(sample(cell, T=2, B=0, D=2))
    assert empty["d_gates"].shape[:2] == (2, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("cell", "shape"), CASES)
def test_opcheck(cell: str, shape: dict, dtype: torch.dtype) -> None:
    layer = sample(cell, **shape, dtype=dtype)
    operator = f"{layer.operator}_row_gradients"
    values = backward_values(layer, 1)
    arguments = [values.get(argument.name) for argument in schema(operator).arguments]
    torch.library.opcheck(DOORS["dispatcher"](operator), arguments)


@pytest.mark.parametrize("split", ["rows", "units"])
@pytest.mark.parametrize("cell", CELLS)
def test_bits_do_not_depend_on_threads(cell: str, split: str, threads: Callable[..., None]) -> None:
    layer = sample(cell, T=6, B=5, H=40, D=2, dtype=torch.float32)
    results = []
    for count in (1, 2, 3):
        threads(count, "chosen" if count == 1 else split)
        results.append(row_gradients(layer))
    for other in results[1:]:
        for name, tensor in results[0].items():
            assert torch.equal(tensor, other[name]), name
