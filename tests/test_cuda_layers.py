# SPDX-License-Identifier: BSD-3-Clause
"""Tier 0 of CUDA on the host: every layer forward and backward, against torch.nn and the reference.

What runs here is csrc/cuda but for the launches and the products, see on_host.py.
"""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_accurate
from calls import backward_values as cpu_values
from calls import call as on_the_cpu
from on_host import backward, backward_values, call, forward, operators
from samples import CELLS, cotangents, sample, stock
from test_extras import GIVEN, OPERATORS, extras_for, leaves_of
from torch import Tensor

from fastrnn.extras import Extras

every_cell = pytest.mark.parametrize("cell", CELLS)
SHAPES = {
    "one step": {"T": 1, "B": 3, "I": 3, "H": 5},
    "odd": {"T": 5, "B": 3, "I": 4, "H": 7},
    "wide": {"T": 5, "B": 3, "I": 4, "H": 8},
    "both": {"T": 6, "B": 2, "I": 3, "H": 12, "D": 2},
    "no bias": {"T": 3, "B": 2, "I": 3, "H": 17, "D": 2, "bias": False},
    "packed": {"lengths": (5, 3, 3, 1), "I": 3, "H": 9},
    "packed, both": {"lengths": (6, 3, 3, 1), "I": 3, "H": 8, "D": 2},
    "packed, alike": {"lengths": (3, 3), "I": 3, "H": 8, "D": 2},
    "projection": {"T": 5, "B": 3, "I": 4, "H": 12, "P": 5},
    "projection, both": {"T": 4, "B": 3, "I": 4, "H": 12, "P": 4, "D": 2},
    "projection, packed": {"lengths": (4, 2, 1), "I": 3, "H": 8, "P": 3, "D": 2},
    "many units": {"T": 2, "B": 2, "I": 3, "H": 520},
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def a_layer(cell: str, shape: dict[str, object], **options: object):
    if "P" in shape and cell != "lstm":
        pytest.skip("only the LSTM has a projection")
    return sample(cell, **shape, **options)


def states_of(results: dict[str, Tensor]) -> list[Tensor]:
    return [results[name] for name in ("y", "h_n", "c_n") if name in results]


def torchs(layer) -> tuple[list[Tensor], dict[str, Tensor]]:
    """torch.nn's results, and its gradients under the cotangents of on_host.backward."""
    leaves = layer.to(layer.x.dtype, requires_grad=True)
    outputs = stock(leaves)
    wanted = {n: t for n, t in zip(leaves.names(), leaves.tensors(), strict=False) if t is not None}
    found = torch.autograd.grad(outputs, list(wanted.values()), cotangents(outputs))
    return list(outputs), dict(zip(wanted, found, strict=True))


@every_shape
@every_cell
def test_layer_equals_torch(cell, shape):
    layer = a_layer(cell, shape)
    outputs, gradients = torchs(layer)
    for save in (True, False):
        for ours, theirs in zip(states_of(forward(layer, save)), outputs, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    found = backward(layer, d_cells=None)
    assert found.keys() == gradients.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, gradients[name], rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@every_shape
@every_cell
def test_layer_is_as_accurate_as_torch(cell, shape, dtype):
    layer = a_layer(cell, shape, dtype=dtype)
    exact, exact_gradients = torchs(layer.to(torch.float64))
    outputs, gradients = torchs(layer)
    for k, (ours, theirs) in enumerate(zip(states_of(forward(layer)), outputs, strict=True)):
        assert_accurate(ours, theirs, exact[k], f"result {k}")
    for name, gradient in backward(layer, d_cells=None).items():
        assert_accurate(gradient, gradients[name], exact_gradients[name], name)


def named(extras: Extras) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in extras._asdict().items() if tensor is not None}


@pytest.mark.parametrize("names", GIVEN.values(), ids=GIVEN)
@every_shape
@every_cell
def test_extras_equal_the_reference(cell, shape, names):
    layer = a_layer(cell, shape, requires_grad=True)
    extras = extras_for(layer, names, requires_grad=True)
    arguments = extras.arguments(cell == "lstm", layer.batch_sizes)
    expected = OPERATORS[cell].extended_reference(layer.tensors(), arguments, layer.tail()[1:])
    truth = torch.autograd.grad(
        expected, leaves_of(layer, extras), cotangents(expected), allow_unused=True, materialize_grads=True
    )
    with torch.no_grad():
        results = forward(layer, **named(extras))
        ours = [*states_of(results), *([results["cells"]] if cell == "lstm" else [])]
        for k, (one, other) in enumerate(zip(ours, expected, strict=True)):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12, msg=lambda m, k=k: f"result {k}: {m}")
        found = backward(layer, **named(extras))
        for (name, one), other in zip(found.items(), truth, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@every_cell
def test_a_blend_is_undone(cell):
    layer = sample(cell, T=4, B=3, I=3, H=8, D=2, requires_grad=True)
    extras = extras_for(layer, GIVEN["everything"], requires_grad=True)
    extras = extras._replace(
        zoneout_h=torch.full_like(extras.zoneout_h, 0.3),
        zoneout_c=None if cell != "lstm" else torch.full((16,), 0.6, dtype=torch.float64).expand(4, 3, 16),
    )
    arguments = extras.arguments(cell == "lstm", None)
    expected = OPERATORS[cell].extended_reference(layer.tensors(), arguments, layer.tail()[1:])
    truth = torch.autograd.grad(expected, leaves_of(layer, extras), cotangents(expected), materialize_grads=True,
                                allow_unused=True)  # fmt: skip
    with torch.no_grad():
        for (name, one), other in zip(backward(layer, **named(extras)).items(), truth, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@every_cell
def test_padding_is_not_read(cell):
    layer = sample(cell, T=4, B=3, I=3, H=8, D=2, dtype=torch.float32)
    lengths = torch.tensor([4, 0, 2])
    spoiled = layer.with_tensors([layer.x.clone(), *layer.tensors()[1:]])
    for b, length in enumerate(lengths.tolist()):
        spoiled.x[length:, b] = float("nan")
    values = backward_values(layer, lengths=lengths)
    values["d_y"][2:, 2] = float("nan")
    for one, other in zip(
        (*forward(spoiled, lengths=lengths).values(), *call(f"{layer.operator}_backward", values | {"x": spoiled.x})),
        (*forward(layer, lengths=lengths).values(), *call(f"{layer.operator}_backward", values)),
        strict=True,
    ):
        if one.dim() != 3 or one.shape[-1] != 64:  # saved gates of the padding are nobody's
            assert torch.equal(one, other)
            assert one.isfinite().all()


@every_shape
@every_cell
def test_row_gradients_are_those_of_the_cpu(cell, shape):
    layer = a_layer(cell, shape)
    values = backward_values(layer, d_cells=None) | {"needs": 7 if cell == "lstm" else 3}
    rows = call(f"{layer.operator}_row_gradients", values)
    given = cpu_values(layer) | {"needs": values["needs"]}
    theirs = on_the_cpu("dispatcher", f"{layer.operator}_row_gradients", given)
    for one, other in zip(rows, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@every_cell
def test_backward_changes_nothing_and_repeats_its_bits(cell, dtype):
    layer = sample(cell, T=5, B=3, I=4, H=8, D=2, dtype=dtype)
    values = backward_values(layer)
    before = {k: v.clone() for k, v in values.items() if isinstance(v, Tensor)}
    first = call(f"{layer.operator}_backward", values)
    again = call(f"{layer.operator}_backward", values)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    assert all(torch.equal(values[name].view(torch.uint8), kept.view(torch.uint8)) for name, kept in before.items())


@every_cell
def test_only_what_is_needed_comes_out(cell):
    layer = sample(cell, T=3, B=2, I=3, H=4, D=2)
    values = backward_values(layer)
    everything = call(f"{layer.operator}_backward", values)
    for bit in range(len(everything)):
        found = call(f"{layer.operator}_backward", values | {"needs": 1 << bit})
        for position, (one, other) in enumerate(zip(found, everything, strict=True)):
            assert torch.equal(one, other) if position == bit else one.shape == (0,), (bit, position)


@every_cell
def test_strides_and_odd_addresses_are_read(cell):
    plain = sample(cell, T=4, B=3, I=4, H=8, D=2, dtype=torch.float32)

    def elsewhere(tensor: Tensor | None) -> Tensor | None:  # an address that is no multiple of 16, rows far apart
        if tensor is None:
            return None
        memory = torch.full((tensor.numel() * 2 + 1,), float("nan"))
        view = memory[1:].view(*tensor.shape[:-1], 2 * tensor.shape[-1])[..., : tensor.shape[-1]]
        return view.copy_(tensor)

    strided = plain.with_tensors([elsewhere(t) for t in plain.tensors()])
    for one, other in zip(states_of(forward(strided)), states_of(forward(plain)), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(backward(strided).values(), backward(plain).values(), strict=True):
        assert torch.equal(one, other)


@every_cell
def test_an_empty_batch(cell):
    layer = sample(cell, T=3, B=0, I=3, H=4, D=2)
    results = forward(layer)
    assert results["y"].shape == (3, 0, 8)
    assert all(not gradient.any() for gradient in backward(layer).values())
    assert backward(layer)["w_hh"].shape == layer.weights[0][1].shape


def test_more_rows_than_blocks():
    layer = sample("rnn_relu", T=1, B=65540, I=1, H=65)  # a block has one row, and there are 65535 at most
    torch.testing.assert_close(forward(layer)["y"], stock(layer)[0])


def test_schemas_are_those_of_the_package():
    for name in ("lstm_layer", "gru_layer_backward", "rnn_layer_row_gradients"):
        ours = str(getattr(operators(), name).default._schema).replace("fastrnn_on_host", "fastrnn")
        assert ours == str(getattr(torch.ops.fastrnn, name).default._schema)
