# SPDX-License-Identifier: BSD-3-Clause
"""Weights are read by name at each call, so whatever replaces one (pruning, parametrizations, weight drop, another
module's parameter, functional_call, a write to .data) is seen at the next call, as in torch.nn."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from twins import (
    CELLS,
    NAMES,
    STEPS,
    an_input,
    both,
    first,
    tensors_of,
    training_step,
    twins,
)

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")


def weight_norm_hook(module, name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(module, name)


def random_mask(module, name):
    mask = torch.randint(0, 2, getattr(module, name).shape, generator=torch.Generator().manual_seed(1))
    prune.custom_from_mask(module, name, mask)


def double_it(module, name):
    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight

    parametrize.register_parametrization(module, name, Double())


def weight_drop(module, name):
    raw = nn.Parameter(getattr(module, name).detach().clone())
    delattr(module, name)
    module.register_parameter(name + "_raw", raw)
    setattr(module, name, raw * 0.5)


def shadow(module, name):
    module.__dict__[name] = getattr(module, name) * 3


def swap_entry(module, name):
    module._parameters[name] = nn.Parameter(getattr(module, name).detach() * 3)


def assign(module, name):
    setattr(module, name, nn.Parameter(getattr(module, name).detach() * 3))


def change_data(module, name):
    getattr(module, name).data.copy_(getattr(module, name).detach() * 3)


REPLACEMENTS = [
    weight_norm_hook,
    parametrizations.weight_norm,
    parametrizations.orthogonal,
    random_mask,
    double_it,
    weight_drop,
    shadow,
    swap_entry,
    assign,
    change_data,
]


@pytest.mark.parametrize("replace", REPLACEMENTS, ids=lambda replace: replace.__name__)
@pytest.mark.parametrize("name", NAMES)
def test_replaced_weight_is_seen_at_the_next_call(name, replace):
    pair = both(name, 3, 5)
    x = an_input(name)
    before = first(pair[0](x)).detach()
    results = []
    for module in pair:
        torch.manual_seed(3)  # orthogonal draws
        replace(module, "weight_hh" if name in STEPS else "weight_hh_l0")
        replace(module, "weight_ih" if name in STEPS else "weight_ih_l0")
        output = module(x)
        sum(tensor.square().sum() for tensor in tensors_of(output)).backward()
        results.append([*tensors_of(output), *(p.grad for p in module.parameters() if p.grad is not None)])
    assert len(results[0]) > 3 or replace is weight_drop
    torch.testing.assert_close(*results)
    if replace not in (weight_norm_hook, parametrizations.weight_norm):
        assert not torch.allclose(before, first(results[0]), atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_spectral_norm_works(name):
    ours, plain = both(name, 3, 5)[0], both(name, 3, 5)[0]
    weight = "weight_hh" if name in STEPS else "weight_hh_l0"
    parametrizations.spectral_norm(ours, weight, n_power_iterations=30)
    ours.eval()  # in training every look at the weight changes it
    normed = getattr(ours, weight)
    assert torch.linalg.matrix_norm(normed, 2) < 1.01
    getattr(plain, weight).data.copy_(normed)
    assert torch.equal(first(ours(an_input(name))), first(plain(an_input(name))))


@pytest.mark.parametrize("name", NAMES)
def test_functional_call_uses_the_given_weights(name):
    pair = both(name, 3, 5)
    generator = torch.Generator().manual_seed(4)
    other = {n: torch.randn(p.shape, generator=generator) for n, p in pair[0].named_parameters()}
    x, results = an_input(name), []
    for module in pair:
        own = first(module(x)).detach()
        leaves = {n: tensor.clone().requires_grad_() for n, tensor in other.items()}
        output = torch.func.functional_call(module, leaves, (x,))
        sum(tensor.sum() for tensor in tensors_of(output)).backward()
        results.append([*tensors_of(output), *(leaf.grad for leaf in leaves.values())])
        assert torch.equal(first(module(x)), own)
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("cell", CELLS)
def test_tied_weights_collect_their_gradients(cell):
    results = []
    for module in twins(cell, 9, 9, 2):
        for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            setattr(module, f"{kind}_l1", getattr(module, f"{kind}_l0"))
        results.append(training_step(module, torch.randn(4, 2, 9, generator=torch.Generator().manual_seed(3))))
        assert len(list(module.parameters())) == 4
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("cell", CELLS)
def test_tied_directions_collect_their_gradients(cell):
    results = []
    for module in twins(cell, 3, 9, bidirectional=True):
        module.weight_hh_l0_reverse = module.weight_hh_l0
        module.weight_ih_l0_reverse = module.weight_ih_l0
        results.append(training_step(module, torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(3))))
    torch.testing.assert_close(*results)
