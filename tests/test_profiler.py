# SPDX-License-Identifier: BSD-3-Clause
"""torch.profiler sees every call of a layer as one event under its operator's name, whichever door the call takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from own_cells import CELLS, layer
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.profiler import ProfilerActivity, profile
from twins import LAYERS, NAMES, STEPS, an_input, first

import fastrnn

pytestmark = pytest.mark.usefixtures("compiled")


def events(run: Callable[[], object], **options: bool) -> list[Any]:
    """fastrnn's own events of a run, in the order of their beginnings."""
    with profile(activities=[ProfilerActivity.CPU], **options) as profiled:
        run()
    return [event for event in profiled.events() if event.name.startswith("fastrnn::")]


def names(run: Callable[[], object]) -> list[str]:
    return [event.name for event in events(run)]


def of(name: str) -> str:
    """The event of a layer or cell."""
    return f"fastrnn::{name.removesuffix('Cell').lower()}_layer"


@pytest.mark.parametrize("name", NAMES)
def test_a_call_is_one_event_and_its_backward_another(name: str) -> None:
    module, x = getattr(fastrnn, name)(3, 5), an_input(name)
    assert names(lambda: module(x)) == [of(name)]
    with torch.no_grad():
        assert names(lambda: module(x)) == [of(name)]
    with torch.inference_mode():
        assert names(lambda: module(x)) == [of(name)]
    assert names(lambda: first(module(x)).sum().backward()) == [of(name), f"{of(name)}_backward"]


@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_events_each(name: str) -> None:
    module, x = getattr(fastrnn, name)(3, 5, num_layers=2, bidirectional=True), an_input(name)
    both = [of(name)] * 2
    with torch.no_grad():
        assert names(lambda: module(x)) == both
    assert names(lambda: first(module(x)).sum().backward()) == [*both, f"{of(name)}_backward", f"{of(name)}_backward"]


@pytest.mark.parametrize("name", LAYERS)
def test_other_ways_are_one_event_too(name: str) -> None:
    module, x, lengths = getattr(fastrnn, name)(3, 5), an_input(name), torch.tensor([4, 2])
    packed = pack_padded_sequence(x, lengths)
    for run in (
        lambda: module(packed),
        lambda: module(x, lengths=lengths),
        lambda: module(x, return_all_states=True),
        lambda: torch.vmap(module, in_dims=1)(x),
    ):
        assert names(run) == [of(name)]
        with torch.no_grad():
            assert names(run) == [of(name)]
    with fastrnn.prepacked(module), torch.no_grad():
        assert names(lambda: module(x)) == [of(name)]
    module.recompute = True
    assert names(lambda: first(module(x)).sum().backward()) == [of(name), of(name), f"{of(name)}_backward"]


@pytest.mark.parametrize("cell", CELLS)
def test_a_cell_of_ones_own_is_an_event(cell: str) -> None:
    own, x, states, weights = layer(cell)
    x.requires_grad_()
    run = lambda: own.layer(x, states, weights)[0].sum().backward()  # noqa: E731
    assert names(run) == ["fastrnn::own_layer", "fastrnn::own_layer_backward"]


def test_the_operator_is_one_event() -> None:
    arguments = (torch.randn(4, 2, 3), torch.zeros(1, 2, 5), torch.randn(15, 3), torch.randn(15, 5))
    assert names(lambda: torch.ops.fastrnn.gru_layer(*arguments, *(None,) * 12, False)) == ["fastrnn::gru_layer"]


@pytest.mark.parametrize("name", NAMES)
def test_a_profile_joins_forward_and_backward(name: str) -> None:
    """By the number of autograd's node, inside of which the backward stands, as for torch's own operators."""
    module, x = getattr(fastrnn, name)(3, 5), an_input(name)
    forward, backward = events(lambda: first(module(x)).sum().backward())
    assert forward.sequence_nr >= 0
    assert forward.sequence_nr == backward.cpu_parent.sequence_nr
    linear = nn.Linear(3, 5)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        linear(x).sum().backward()
    theirs = [event for event in profiled.events() if event.name in ("aten::addmm", "AddmmBackward0")]
    assert len({event.sequence_nr for event in theirs}) == 1  # the same of torch's


@pytest.mark.parametrize("name", LAYERS)
def test_shapes_are_recorded(name: str) -> None:
    module = getattr(fastrnn, name)(3, 5, bias=False)
    (event,) = events(lambda: module(torch.zeros(4, 2, 3)), record_shapes=True)
    rows = module.weight_hh_l0.shape[0]
    c = [1, 2, 5] if name == "LSTM" else []
    assert event.input_shapes == [[4, 2, 3], [1, 2, 5], c, [rows, 3], [rows, 5], [], []]


@pytest.mark.parametrize("name", STEPS)
def test_shapes_of_a_cell_are_recorded(name: str) -> None:
    module = getattr(fastrnn, name)(3, 5)
    (event,) = events(lambda: module(torch.zeros(2, 3)), record_shapes=True)
    rows = module.weight_hh.shape[0]
    assert event.input_shapes[0][-2:] == [2, 3]
    assert event.input_shapes[3:] == [[rows, 3], [rows, 5], [rows], [rows]]
