# SPDX-License-Identifier: BSD-3-Clause
"""return_all_states: h and c at every step of every layer, and their gradients, against torch.nn's cells in a loop."""

from __future__ import annotations

import pytest
import torch
from samples import cotangents
from test_lengths import every_cell
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from twins import like, random_state, tensors_of, twins

import fastrnn

T, B, H = 5, 3, 17


def every_state(module: nn.Module, x: Tensor, hx: object) -> list[list[Tensor]]:
    """h of each layer at every step, and for an LSTM c, by torch.nn called once a step; one direction."""
    layers = [[] for _ in tensors_of(hx)]
    for now in x:
        _, hx = module(now[None], hx)
        for of_state, state in zip(layers, tensors_of(hx), strict=True):
            of_state.append(state)
    return [list(torch.stack(of_state, dim=1)) for of_state in layers]


@pytest.mark.usefixtures("isa")
@every_cell
def test_every_state_equals_a_loop(cell):
    ours, theirs = twins(cell, 4, H, num_layers=2, dtype=torch.float64)
    x = torch.randn(T, B, 4, dtype=torch.float64, requires_grad=True)
    hx = like(random_state(cell, 2, B, H=H, dtype=torch.float64), lambda t: t.requires_grad_())
    y, _, states = ours(x, hx, return_all_states=True)
    found = [list(state) for state in states] if cell == "lstm" else [list(states)]
    expected = every_state(theirs, x, hx)
    assert found[0][-1] is y
    flat = [[tensor for of_layer in of_state for tensor in of_layer] for of_state in (found, expected)]
    for one, other in zip(*flat, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)
    leaves = [x, *tensors_of(hx)]
    weights = list(ours.parameters()), list(theirs.parameters())
    given = cotangents(flat[0])
    ours_gradients, theirs_gradients = (
        torch.autograd.grad(outputs, [*leaves, *own], given, create_graph=True)
        for outputs, own in zip(flat, weights, strict=True)
    )
    kernel = torch.autograd.grad(flat[0], [*leaves, *weights[0]], given, retain_graph=True)
    for one, same, other in zip(ours_gradients, kernel, theirs_gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(same, other, rtol=1e-11, atol=1e-12)
    twice = [
        torch.autograd.grad([g.square().sum() for g in all_of], [*leaves, *own], allow_unused=True)
        for all_of, own in ((ours_gradients, weights[0]), (theirs_gradients, weights[1]))
    ]
    for one, other in zip(*twice, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("form", ["batch_first", "single", "packed", "lengths"])
@every_cell
def test_every_state_has_the_form_of_the_output(cell, form):
    module, _ = twins(cell, 4, H, num_layers=2, bidirectional=True, batch_first=form == "batch_first")
    x, lengths = torch.randn(T, B, 4), torch.tensor([2, 5, 3])
    y, state, states = module(x, return_all_states=True, lengths=lengths if form == "lengths" else None)
    if form == "packed":
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        padded = module(x, return_all_states=True, lengths=lengths)[2]
        y, state, states = module(packed, return_all_states=True)
        for one, other in zip(every(states, cell), every(padded, cell), strict=True):
            assert isinstance(one, PackedSequence)
            assert torch.equal(pad_packed_sequence(one)[0], other)
        return
    if form == "single":
        whole = module(x[:, :1], return_all_states=True)[2]
        y, state, states = module(x[:, 0], return_all_states=True)
        for one, other in zip(every(states, cell), every(whole, cell), strict=True):
            assert torch.equal(one, other[:, 0])
    assert all(tensor.shape == y.shape for tensor in every(states, cell))
    if form != "lengths":
        return
    finals = tensors_of(state)
    for k, of_state in enumerate(states if cell == "lstm" else (states,)):
        for layer, tensor in enumerate(of_state):
            for row, length in enumerate(lengths.tolist()):
                assert not tensor[length:, row].any()
                assert torch.equal(tensor[length - 1, row, :H], finals[k][2 * layer, row])
                assert torch.equal(tensor[0, row, H:], finals[k][2 * layer + 1, row])


def every(states: object, cell: str) -> list:
    return [tensor for of_state in (states if cell == "lstm" else (states,)) for tensor in of_state]


def test_projected_lstm_has_c_of_its_units():
    module = fastrnn.LSTM(4, H, 2, bidirectional=True, proj_size=3)
    y, (_, c_n), (h, c) = module(torch.randn(T, B, 4), return_all_states=True)
    assert [t.shape[-1] for t in (*h, *c)] == [6, 6, 2 * H, 2 * H]
    assert h[-1] is y
    assert torch.equal(c[1][-1, :, :H], c_n[2])
    assert torch.equal(c[1][0, :, H:], c_n[3])


@every_cell
def test_states_may_be_changed_in_place(cell):
    module, _ = twins(cell, 4, H)
    x = torch.randn(T, B, 4)
    gradients = []
    for change in (False, True):
        module.zero_grad()
        y, _, states = module(x, return_all_states=True)
        loss = sum(t.square().sum() for t in every(states, cell))
        if change:
            with torch.no_grad():
                for tensor in every(states, cell):
                    tensor.data.zero_()
        y.sum().backward(retain_graph=True)
        gradients.append([p.grad.clone() for p in module.parameters()])
        del loss
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


@every_cell
def test_functional_form_returns_them(cell):
    module, _ = twins(cell, 4, H)
    x = torch.randn(T, B, 4)
    weights = tuple(module.parameters())
    options = {"nonlinearity": cell.removeprefix("rnn_")} if cell.startswith("rnn") else {}
    function = getattr(fastrnn.functional, cell[:3] if cell != "lstm" else cell)
    y, _, states = function(x, weights=weights, **options, return_all_states=True)
    expected = module(x, return_all_states=True)[2]
    assert torch.equal(y, (states[0] if cell == "lstm" else states))
    for one, other in zip(tensors_of(states), every(expected, cell), strict=True):
        assert torch.equal(one, other)
