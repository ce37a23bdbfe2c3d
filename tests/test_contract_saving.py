# SPDX-License-Identifier: BSD-3-Clause
"""What is saved and copied: modules of the two libraries in each other's files, old pickles, TorchScript."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from twins import LAYERS, NAMES, STEPS, an_input, both, first, tensors_of

import fastrnn


def saved_and_loaded(thing: object, weights_only: bool) -> object:
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=weights_only)


@pytest.mark.parametrize("name", NAMES)
def test_files_of_state_dicts_go_both_ways_with_weights_only(name: str) -> None:
    ours, theirs = both(name, 3, 5)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1)
    ours.load_state_dict(saved_and_loaded(theirs.state_dict(), weights_only=True))
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    theirs.load_state_dict(saved_and_loaded(ours.state_dict(), weights_only=True), assign=True)
    torch.testing.assert_close(ours(an_input(name)), theirs(an_input(name)))


@pytest.mark.parametrize("name", NAMES)
def test_state_dict_may_be_assigned_and_mistakes_are_named(name: str) -> None:
    ours, theirs = both(name, 3, 5)
    state = {key: tensor.clone() + 1 for key, tensor in theirs.state_dict().items()}
    ours.load_state_dict(state, assign=True)
    theirs.load_state_dict(state, assign=True)
    torch.testing.assert_close(ours(an_input(name)), theirs(an_input(name)))
    first_key = next(iter(state))
    for broken in ({}, state | {"more": torch.ones(1)}, state | {first_key: torch.ones(1)}):
        with pytest.raises(RuntimeError, match="Error\\(s\\) in loading state_dict"):
            ours.load_state_dict(broken)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_copies_keep_what_was_changed_after_construction(name: str, dtype: torch.dtype) -> None:
    ours, _ = both(name, 3, 5)
    ours = ours.to(dtype).eval()
    ours.requires_grad_(False)
    ours.note = "mine"
    for other in (copy.deepcopy(ours), copy.copy(ours), pickle.loads(pickle.dumps(ours))):
        assert other.note == "mine"
        assert not other.training
        assert not any(p.requires_grad for p in other.parameters())
        assert torch.equal(first(other(an_input(name).to(dtype))), first(ours(an_input(name).to(dtype))))
        if name in LAYERS:
            assert all(a is b for a, b in zip(other._flat_weights, other.parameters(), strict=True))


def pruned(module: nn.Module, weight: str) -> None:
    prune.random_unstructured(module, weight, amount=0.5)
    prune.remove(module, weight)  # until then torch cannot copy the module, whosever it is


@pytest.mark.parametrize("name", NAMES)
def test_deepcopy_of_a_reparametrized_module_works(name: str) -> None:
    weight = "weight_hh" if name in STEPS else "weight_hh_l0"
    x = an_input(name)
    for change in (parametrizations.weight_norm, pruned):
        torch.manual_seed(0)
        ours, _ = both(name, 3, 5)
        change(ours, weight)
        other = copy.deepcopy(ours)
        assert torch.equal(first(other(x)), first(ours(x)))
        with torch.no_grad():
            for parameter in ours.parameters():
                parameter.zero_()
        assert first(other(x)).any()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_state_of_the_oldest_pickles_is_read(name: str, bias: bool) -> None:
    """Before names were kept, `all_weights` held the parameters themselves; proj_size came with PyTorch 1.8."""
    results = []
    for library in (fastrnn, nn):
        torch.manual_seed(7)
        module = getattr(library, name)(3, 5, num_layers=2, bidirectional=True, bias=bias)
        state = module.__getstate__()
        for recent in ("_all_weights", "_flat_weights", "_flat_weights_names", "proj_size"):
            del state[recent]
        state["all_weights"] = [list(row) for row in module.all_weights]
        old = getattr(library, name).__new__(getattr(library, name))
        old.__setstate__(state)
        assert old._all_weights == module._all_weights
        assert old.proj_size == 0
        results.append(tensors_of(old(an_input(name))))
    torch.testing.assert_close(*results)


# ---- TorchScript ---------------------------------------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.head = nn.Linear(5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output = self.layer(x)
        return self.head(output[0])


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("name", LAYERS)
def test_a_model_that_holds_a_module_can_be_scripted_and_saved(name: str) -> None:
    """TorchScript compiles torch.nn's own classes alone, so it is they that it is given, with our parameters."""
    model = Model(both(name, 3, 5)[0])
    x = an_input(name)
    expected = model(x)
    scripted = torch.jit.script(model)
    torch.testing.assert_close(scripted(x), expected)
    buffer = io.BytesIO()
    torch.jit.save(scripted, buffer)
    buffer.seek(0)
    torch.testing.assert_close(torch.jit.load(buffer)(x), expected)
    with torch.no_grad():
        model.layer.weight_hh_l0.zero_()
    torch.testing.assert_close(scripted(x), model(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("name", STEPS)
def test_cells_can_be_scripted(name: str) -> None:
    ours, _ = both(name, 3, 5)
    torch.testing.assert_close(first(torch.jit.script(ours)(an_input(name))), first(ours(an_input(name))))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_users_subclass_is_not_replaced_for_scripting() -> None:
    """torch.nn's LSTM cannot be derived from for TorchScript either."""
    for library in (fastrnn, nn):

        class Mine(library.LSTM):
            def forward(self, input, hx=None):
                return super().forward(2 * input, hx)

        with pytest.raises(Exception, match=r"(?s).+"):
            torch.jit.script(Model(Mine(3, 5)))(an_input("LSTM"))
