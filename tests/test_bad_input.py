# SPDX-License-Identifier: BSD-3-Clause
"""Arguments that do not fit: refused with the exception type of torch.nn, and also where torch.nn computes garbage.
And arguments that are bad in value only: a NaN stays in its own row."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from twins import CELLS, random_state, tensors_of, training_step, twins


def pair(cell: str, h: object, c: object = None) -> object:
    """hx in the form that the cell takes."""
    return (h, h if c is None else c) if cell == "lstm" else h


X = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0))
H0 = torch.randn(1, 3, 6, generator=torch.Generator().manual_seed(1))

# name: what to call a module of (4, 6) with
CALLS = {
    "input None": lambda m, cell: m(None),
    "input a list": lambda m, cell: m([1.0, 2.0]),
    "input of numpy": lambda m, cell: m(X.numpy()),
    "input 0-D": lambda m, cell: m(torch.tensor(1.0)),
    "input 1-D": lambda m, cell: m(X[0, 0]),
    "input 4-D": lambda m, cell: m(X[None]),
    "input of too few features": lambda m, cell: m(X[..., :3]),
    "input of no features": lambda m, cell: m(X[..., :0]),
    "input of too many features": lambda m, cell: m(torch.randn(5, 3, 5)),
    "unbatched input of too few features": lambda m, cell: m(X[0, :, :3]),
    "no steps": lambda m, cell: m(X[:0]),
    "no steps and no batch": lambda m, cell: m(X[:0, :0]),
    "no steps, unbatched": lambda m, cell: m(X[:0, 0]),
    "input of float64": lambda m, cell: m(X.double()),
    "input of float16": lambda m, cell: m(X.half()),
    "input of int64": lambda m, cell: m(X.long()),
    "input of bool": lambda m, cell: m(X > 0),
    "input complex": lambda m, cell: m(X.to(torch.complex64)),
    "input on meta": lambda m, cell: m(X.to("meta")),
    "input sparse": lambda m, cell: m(X.to_sparse()),
    "state 2-D": lambda m, cell: m(X, pair(cell, H0[0])),
    "state 4-D": lambda m, cell: m(X, pair(cell, H0[None])),
    "state 0-D": lambda m, cell: m(X, pair(cell, torch.tensor(1.0))),
    "state of another batch": lambda m, cell: m(X, pair(cell, H0[:, :2])),
    "state of batch 1": lambda m, cell: m(X, pair(cell, H0[:, :1])),
    "state of two layers": lambda m, cell: m(X, pair(cell, H0.repeat(2, 1, 1))),
    "state of no layers": lambda m, cell: m(X, pair(cell, H0[:0])),
    "state of other units": lambda m, cell: m(X, pair(cell, H0[..., :5])),
    "state of float64": lambda m, cell: m(X, pair(cell, H0.double())),
    "state on meta": lambda m, cell: m(X, pair(cell, H0.to("meta"))),
    "state of numpy": lambda m, cell: m(X, pair(cell, H0.numpy())),
    "unbatched state 3-D": lambda m, cell: m(X[:, 0], pair(cell, H0)),
    "unbatched state 1-D": lambda m, cell: m(X[:, 0], pair(cell, H0[0, 0])),
    "unbatched state 0-D": lambda m, cell: m(X[:, 0], pair(cell, torch.tensor(1.0))),
    "unbatched state of other units": lambda m, cell: m(X[:, 0], pair(cell, H0[0, :1, :5])),
    "state of three": lambda m, cell: m(X, (H0, H0, H0)),
    "state of one": lambda m, cell: m(X, (H0,)),
    "state a dict": lambda m, cell: m(X, {"h": H0}),
    "packed of other features": lambda m, cell: m(pack_sequence([X[:, 0, :3], X[:2, 1, :3]])),
    "packed of float64": lambda m, cell: m(pack_sequence([X[:, 0], X[:2, 1]]).double()),
    "packed with data 1-D": lambda m, cell: m(PackedSequence(X[:, 0, 0], torch.tensor([3, 2]))),
    "packed with data 3-D": lambda m, cell: m(PackedSequence(X, torch.tensor([3, 2]))),
    "packed with no steps": lambda m, cell: m(PackedSequence(X[:, 0], torch.tensor([], dtype=torch.int64))),
    "packed with growing steps": lambda m, cell: m(PackedSequence(X[:, 0], torch.tensor([2, 3]))),
    "packed state of other units": lambda m, cell: m(pack_sequence([X[:, 0], X[:2, 1]]), pair(cell, H0[:, :2, :5])),
}
# torch.nn does not refuse these by a check of its own, but trips over them somewhere; any exception will do.
ACCIDENTS = {"packed with data 3-D", "packed with growing steps", "packed with no steps"}
OWN_WORDS = {"input None", "packed state of other units"}  # torch's speak of what it tripped over


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("cell", CELLS)
def test_what_torch_refuses_is_refused_with_the_same_type(cell, name):
    ours, theirs = twins(cell, 4, 6)
    with pytest.raises(Exception) as expected:  # noqa: PT011  whatever torch raises
        CALLS[name](theirs, cell)
    with pytest.raises(Exception if name in ACCIDENTS else expected.type) as found:
        CALLS[name](ours, cell)
    assert name in ACCIDENTS or found.type is expected.type
    assert name in ACCIDENTS | OWN_WORDS or str(found.value) == str(expected.value)


@pytest.mark.parametrize("cell", ["lstm"])
def test_tensor_as_the_state_of_an_lstm_is_refused(cell):
    ours, theirs = twins(cell, 4, 6)
    for hx in (H0, torch.stack([H0, H0])):
        with pytest.raises((IndexError, TypeError)) as expected:
            theirs(X, hx)
        with pytest.raises(expected.type):
            ours(X, hx)


# What torch.nn computes something from, and must not: name -> (call, exception type)
RAGGED = pack_sequence([X[:2, 0], X[:3, 1]], enforce_sorted=False)
SORTED = pack_sequence([X[:3, 0], X[:2, 1]])
UNREFUSED = {
    "packed state of a larger batch": lambda m, cell: m(SORTED, pair(cell, torch.randn(1, 5, 6))),
    "unsorted state of a larger batch": lambda m, cell: m(RAGGED, pair(cell, torch.randn(1, 5, 6))),
    "packed state of batch 1": lambda m, cell: m(SORTED, pair(cell, H0[:, :1])),
    "packed state of two layers": lambda m, cell: m(SORTED, pair(cell, torch.randn(2, 2, 6))),
    "packed state without batch": lambda m, cell: m(SORTED, pair(cell, torch.randn(1, 6))),
    "packed c of batch 1": lambda m, cell: m(SORTED, pair(cell, H0[:, :2], H0[:, :1])),
    "packed c of other units": lambda m, cell: m(SORTED, pair(cell, H0[:, :2], H0[:, :2, :5])),
    "packed state of three": lambda m, cell: m(RAGGED, (H0[:, :2],) * 3),
    "packed rows left over": lambda m, cell: m(PackedSequence(X[:, 0], torch.tensor([2, 2]))),
    "packed rows missing": lambda m, cell: m(PackedSequence(X[:, 0], torch.tensor([3, 3]))),
    "packed with a step of none": lambda m, cell: m(PackedSequence(X[:, 0], torch.tensor([5, 0]))),
    "packed with a negative step": lambda m, cell: m(PackedSequence(X[:4, 0], torch.tensor([5, -1]))),
    "packed with float steps": lambda m, cell: m(PackedSequence(X[:, 0], torch.tensor([3.0, 2.0]))),
    "packed with int32 steps": lambda m, cell: m(PackedSequence(X[:, 0], torch.tensor([3, 2], dtype=torch.int32))),
}


@pytest.mark.parametrize("extension", [True, False], ids=["kernel", "torch"])
@pytest.mark.parametrize("name", UNREFUSED)
@pytest.mark.parametrize("cell", CELLS)
def test_bad_packed_arguments_are_refused(cell, name, extension, monkeypatch):
    if name.startswith("packed c") and cell != "lstm":
        pytest.skip("only the LSTM has a c")
    if not extension:
        if "state" not in name and "packed c" not in name:
            pytest.skip("a hand-made PackedSequence is torch's own business without the kernels")
        monkeypatch.setattr("fastrnn.autograd._C", None)
    ours, _ = twins(cell, 4, 6)
    with pytest.raises((RuntimeError, ValueError, TypeError, IndexError, AttributeError)) as caught:
        UNREFUSED[name](ours, cell)
    assert str(caught.value)


RESHAPED = {
    "weight_ih_l0": [(24, 3), (24, 5), (23, 4), (7, 4), (24,), (24, 4, 1), (0, 4), (4, 24)],
    "weight_hh_l0": [(24, 5), (24, 7), (18, 6), (48, 12), (24,), (24, 6, 1), (0, 0), (6, 24)],
    "bias_ih_l0": [(1,), (23,), (25,), (24, 1), (0,), ()],
    "bias_hh_l0": [(1,), (23,), (25,), (24, 1), (0,), ()],
    "weight_ih_l1": [(24, 4), (24, 13), (20, 12)],
    "weight_hh_l0_reverse": [(24, 5), (20, 5), (24, 7)],
    "bias_hh_l1_reverse": [(1,), (6,)],
}
WRONG_WEIGHTS = [(name, shape) for name, shapes in RESHAPED.items() for shape in shapes]


@pytest.mark.parametrize("route", ["kernel", "kernel with gradient", "torch"])
@pytest.mark.parametrize(("name", "shape"), WRONG_WEIGHTS, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_weight_of_the_wrong_shape_is_refused(cell, name, shape, route, monkeypatch):
    ours, _ = twins(cell, 4, 6, 2, bidirectional=True)
    gates = {"lstm": 4, "gru": 3}.get(cell, 1)
    if shape and shape[0] == 24:
        shape = (6 * gates, *shape[1:])
    if shape == tuple(ours.get_parameter(name).shape):
        pytest.skip("the right shape for this cell")
    setattr(ours, name, nn.Parameter(torch.zeros(shape)))
    if route == "torch":
        monkeypatch.setattr("fastrnn.autograd._C", None)
    for x in (X, X[:, 0], SORTED):
        with (
            torch.set_grad_enabled(route == "kernel with gradient"),
            pytest.raises((RuntimeError, ValueError), match="must be"),
        ):
            ours(x)


@pytest.mark.parametrize("name", ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"])
@pytest.mark.parametrize("cell", CELLS)
def test_weight_of_another_kind_is_refused(cell, name):
    for kind in ("float64", "meta", "None", "text", "missing"):
        pair = twins(cell, 4, 6)
        errors = []
        for module in pair:
            weight = module.get_parameter(name)
            if kind == "text":
                module.__dict__[name] = "weight"
            elif kind == "missing":
                delattr(module, name)
            else:
                new = {"float64": weight.double(), "meta": weight.to("meta")}.get(kind)
                setattr(module, name, None if new is None else nn.Parameter(new.detach()))
            try:
                module(X)
            except Exception as error:
                errors.append(type(error))
            else:
                errors.append(None)
        if kind == "missing":  # torch.nn goes on with the weight that was deleted
            assert errors[0] is AttributeError
        elif kind == "None":  # torch.nn: by the first weight an AttributeError
            assert errors[0] is TypeError
        else:
            assert errors[0] is errors[1], kind


@pytest.mark.parametrize("cell", CELLS)
def test_projected_shapes_are_checked(cell):
    if cell != "lstm":
        pytest.skip("only the LSTM has a projection")
    for name, shape in (
        ("weight_hr_l0", (3, 6)),
        ("weight_hr_l0", (2, 5)),
        ("weight_hr_l1", (2,)),
        ("weight_hh_l0", (24, 6)),
    ):
        ours, _ = twins(cell, 4, 6, 2, proj_size=2)
        setattr(ours, name, nn.Parameter(torch.zeros(shape)))
        with pytest.raises((RuntimeError, ValueError), match="must be"):
            ours(X)
    ours, theirs = twins(cell, 4, 6, proj_size=2)
    for hx in ((H0, H0), (H0[..., :2], H0[..., :2]), (H0[..., :5], H0)):
        with pytest.raises(RuntimeError) as expected:
            theirs(X, hx)
        with pytest.raises(RuntimeError) as found:
            ours(X, hx)
        assert str(found.value) == str(expected.value)


@pytest.mark.parametrize("cell", CELLS)
def test_dropout_out_of_range_is_refused_when_it_acts(cell):
    for module in twins(cell, 4, 6, 2):
        module.dropout = 2.0
        with pytest.raises(RuntimeError, match="dropout probability has to be between 0 and 1"):
            module(X)
        module.eval()
        module(X)


@pytest.mark.parametrize("cell", CELLS)
def test_messages_for_shapes_are_torchs(cell):
    ours, theirs = twins(cell, 4, 6)
    for arguments in (
        (X[..., :3],),
        (X[0, 0],),
        (X, pair(cell, H0[:, :2])),
        (X, pair(cell, H0[0])),
        (X[0], pair(cell, H0)),
    ):
        with pytest.raises((RuntimeError, ValueError)) as expected:
            theirs(*arguments)
        with pytest.raises((RuntimeError, ValueError)) as found:
            ours(*arguments)
        assert str(found.value) == str(expected.value)


# --- cells ----------------------------------------------------------------------------------------------------------

Y = X[0]
S = H0[0]
STEPS = {
    "input None": lambda m, cell: m(None),
    "input 3-D": lambda m, cell: m(X),
    "input 0-D": lambda m, cell: m(torch.tensor(1.0)),
    "input of too few features": lambda m, cell: m(Y[:, :3]),
    "input of float64": lambda m, cell: m(Y.double()),
    "input of int64": lambda m, cell: m(Y.long()),
    "input on meta": lambda m, cell: m(Y.to("meta")),
    "state 1-D": lambda m, cell: m(Y, pair(cell, S[0])),
    "state 3-D": lambda m, cell: m(Y, pair(cell, H0)),
    "state 0-D": lambda m, cell: m(Y, pair(cell, torch.tensor(1.0))),
    "unbatched state 2-D": lambda m, cell: m(Y[0], pair(cell, S)),
    "unbatched state of batch 1": lambda m, cell: m(Y[0], pair(cell, S[:1])),
    "state of another batch": lambda m, cell: m(Y, pair(cell, S[:2])),
    "state of batch 1": lambda m, cell: m(Y, pair(cell, S[:1])),
    "state of other units": lambda m, cell: m(Y, pair(cell, S[:, :5])),
    "state of float64": lambda m, cell: m(Y, pair(cell, S.double())),
    "state on meta": lambda m, cell: m(Y, pair(cell, S.to("meta"))),
    "state of three": lambda m, cell: m(Y, (S, S, S)),
    "state of one": lambda m, cell: m(Y, (S,)),
}


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("cell", CELLS)
def test_what_torchs_cell_refuses_is_refused_with_the_same_type(cell, name):
    ours, theirs = twins(cell, 4, 6, step=True)
    with pytest.raises(Exception) as expected:  # noqa: PT011  whatever torch raises
        STEPS[name](theirs, cell)
    with pytest.raises(expected.type) as found:
        STEPS[name](ours, cell)
    assert found.type is expected.type
    assert name in OWN_WORDS or str(found.value) == str(expected.value)


def test_cells_of_unknown_nonlinearity_raise_when_called():
    for module in twins("rnn_tanh", 4, 6, step=True, nonlinearity="sigmoid"):
        with pytest.raises(RuntimeError, match="Unknown nonlinearity: sigmoid"):
            module(Y)


@pytest.mark.parametrize("name", ["weight_ih", "weight_hh", "bias_ih", "bias_hh"])
@pytest.mark.parametrize("cell", CELLS)
def test_cells_weight_of_the_wrong_shape_is_refused(cell, name):
    for change in (lambda w: w[:-1], lambda w: w[..., :-1], lambda w: w[None], lambda w: w[:0]):
        ours, _ = twins(cell, 4, 6, step=True)
        setattr(ours, name, nn.Parameter(change(ours.get_parameter(name).detach()).clone()))
        with pytest.raises((RuntimeError, ValueError, IndexError)):
            ours(Y)
    for module in twins(cell, 4, 6, step=True):
        delattr(module, name)
        with pytest.raises(AttributeError):
            module(Y)


# --- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["nan", "inf"])
@pytest.mark.parametrize("where", ["x", "state"])
@pytest.mark.parametrize("cell", CELLS)
def test_bad_value_stays_in_its_row(cell, where, value, isa):
    ours, _ = twins(cell, 4, 17, 2, bidirectional=True)
    for batch in (2, 7):
        x, hx = torch.randn(5, batch, 4), random_state(cell, 4, batch, H=17)
        clean = training_step(ours, x, hx)
        if where == "x":
            x = x.clone()
            x[2, 1] = value
        else:
            tensors_of(hx)[0][0, 1] = value
        dirty = training_step(ours, x, hx)
        others = [row for row in range(batch) if row != 1]
        for name in ("y", "h_n", "c_n", "d_x", "d_h0", "d_c0"):
            if name in clean:
                assert torch.equal(dirty[name][:, others], clean[name][:, others]), name
        if value != value:
            assert dirty["y"][:, 1].isnan().any()


@pytest.mark.parametrize("cell", CELLS)
def test_nan_in_a_packed_sequence_stays_in_its_row(cell, isa):
    ours, _ = twins(cell, 4, 17, bidirectional=True)
    sequences = [torch.randn(length, 4) for length in (2, 5, 3)]
    clean = training_step(ours, pack_sequence(sequences, enforce_sorted=False))
    sequences[1] = torch.full((5, 4), float("nan"))
    x = pack_sequence(sequences, enforce_sorted=False)
    dirty = training_step(ours, x)
    kept = ~x.data.isnan().any(1)
    assert int(kept.sum()) == 5
    for name in ("y", "d_x"):
        assert torch.equal(dirty[name][kept], clean[name][kept]), name
    assert dirty["y"][~kept].isnan().all()
    assert torch.equal(dirty["h_n"][:, [0, 2]], clean["h_n"][:, [0, 2]])


@pytest.mark.parametrize("cell", CELLS)
def test_nan_reaches_every_output_that_torch_gives_it_to(cell, isa):
    ours, theirs = twins(cell, 4, 9)
    x = torch.randn(5, 3, 4)
    x[2, 1, 0] = float("nan")
    for found, expected in zip(tensors_of(ours(x)), tensors_of(theirs(x)), strict=True):
        assert torch.equal(found.isnan(), expected.isnan())
