# SPDX-License-Identifier: BSD-3-Clause
"""Corners of torch.nn's contract that its own tests hold: weights that are missing for a while, types of results,
modules in shared memory."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from twins import LAYERS, NAMES, STEPS, an_input, both, first, tensors_of

import fastrnn


@pytest.mark.parametrize("name", LAYERS)
def test_a_module_may_be_converted_while_a_weight_is_missing(name: str) -> None:
    """As weight dropping does on the way to another device; torch's test_partial_flat_weights."""
    for module in both(name, 3, 5, num_layers=2):
        x = an_input(name)
        expected = first(module(x))
        weight = module.weight_hh_l0
        del module.weight_hh_l0
        assert not hasattr(module, "weight_hh_l0")
        module.double()
        module.weight_hh_l0 = nn.Parameter(weight.detach().double())
        torch.testing.assert_close(first(module(x.double())).float(), expected)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad], ids=["gradient", "none"])
@pytest.mark.parametrize("name", NAMES)
def test_results_are_exactly_tuples(name: str, mode: type) -> None:
    """Programs test for them, and unpack them."""
    x = an_input(name)
    inputs = [x, x[0]] if name in STEPS else [x, x[:, 0], pack_padded_sequence(x, [4, 2])]
    for argument in inputs:
        with mode():
            ours, theirs = (module(argument) for module in both(name, 3, 5))
        assert kinds(ours) == kinds(theirs)


def kinds(structure: object) -> object:
    """The types in a nested result."""
    if type(structure) is tuple:
        return tuple(map(kinds, structure))
    return type(structure)


@pytest.mark.parametrize("name", NAMES)
def test_a_module_in_shared_memory_computes_the_same(name: str) -> None:
    ours, _ = both(name, 3, 5)
    expected = tensors_of(ours(an_input(name)))
    assert ours.share_memory() is ours
    assert all(parameter.is_shared() for parameter in ours.parameters())
    for found, before in zip(tensors_of(ours(an_input(name))), expected, strict=True):
        assert torch.equal(found, before)


@pytest.mark.parametrize("method", ["check_forward_args", "check_input", "get_expected_hidden_size", "permute_hidden"])
@pytest.mark.parametrize("name", LAYERS)
def test_methods_of_torchs_that_a_subclass_replaces_are_called(name: str, method: str) -> None:
    results = []
    for library in (fastrnn, nn):
        calls = []
        base = getattr(library, name)

        def replaced(self, *arguments, base=base, calls=calls, **options):
            calls.append(method)
            return getattr(base, method)(self, *arguments, **options)

        torch.manual_seed(7)
        module = type("Replaced", (base,), {method: replaced})(3, 5)
        results.append(first(module(an_input(name))))
        assert calls.count(method) >= 1
        results.append(first(type("Below", (type(module),), {})(3, 5)(an_input(name))))
    assert torch.equal(results[0], results[2])
    ours = type("Replaced", (getattr(fastrnn, name),), {method: replaced})(3, 5)
    assert fastrnn.explain(ours, an_input(name)).endswith(f"because the class has its own {method}")
    assert "kernel" in fastrnn.explain(type("Plain", (getattr(fastrnn, name),), {})(3, 5), an_input(name))
