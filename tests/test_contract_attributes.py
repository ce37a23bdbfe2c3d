# SPDX-License-Identifier: BSD-3-Clause
"""Attributes, and torch.nn's list of weights, changed after construction: as torch.nn does it, or refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from twins import LAYERS, NAMES, STEPS, an_input, both, tensors_of

import fastrnn

Change = Callable[[nn.Module], None]


def setting(**attributes: object) -> Change:
    def change(module: nn.Module) -> None:
        for name, value in attributes.items():
            setattr(module, name, value)

    return change


def outcome(module: nn.Module, change: Change, x: Tensor) -> list[Tensor] | type[Exception]:
    change(module)
    try:
        return tensors_of(module(x))
    except Exception as error:
        return type(error)


def assert_same_outcome(name: str, options: dict, change: Change, dtype: torch.dtype, x: Tensor) -> None:
    torch.manual_seed(0)
    ours, theirs = both(name, 3, 5, dtype=dtype, **options)
    found, expected = outcome(ours, change, x.to(dtype)), outcome(theirs, change, x.to(dtype))
    if isinstance(expected, list):
        torch.testing.assert_close(found, expected)
    else:
        assert found is expected


CHANGES = {
    "batch_first": ({}, setting(batch_first=True)),
    "no-bias": ({}, setting(bias=False)),
    "bias": ({"bias": False}, setting(bias=True)),
    "fewer-layers": ({"num_layers": 2}, setting(num_layers=1)),
    "more-layers": ({"num_layers": 2}, setting(num_layers=3)),
    "one-direction": ({"bidirectional": True}, setting(bidirectional=False)),
    "two-directions": ({}, setting(bidirectional=True)),
    "input_size": ({}, setting(input_size=2)),
    "dropout-out-of-range": ({"num_layers": 2}, setting(dropout=2.0)),
    "dropout-none": ({"num_layers": 2}, setting(dropout=None)),
    "mode": ({}, setting(mode="RNN_RELU")),
    "unknown-mode": ({}, setting(mode="nothing")),
    "nonlinearity": ({}, setting(nonlinearity="relu")),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("which", CHANGES)
@pytest.mark.parametrize("name", LAYERS)
def test_changed_attribute_acts_as_in_torch(name: str, which: str, dtype: torch.dtype) -> None:
    assert_same_outcome(name, *CHANGES[which], dtype, an_input(name))


@pytest.mark.parametrize("which", [(0, 2), (2, 0), (2, 3)], ids=str)
def test_changed_projection_acts_as_in_torch(which: tuple[int, int]) -> None:
    before, after = which
    assert_same_outcome("LSTM", {"proj_size": before}, setting(proj_size=after), torch.float32, an_input("LSTM"))


@pytest.mark.parametrize("units", [4, 6])
@pytest.mark.parametrize("name", LAYERS)
def test_changed_hidden_size_is_refused(name: str, units: int) -> None:
    """torch.nn's float32 LSTM reads past the end of its weights and returns numbers."""
    ours, _ = both(name, 3, 5)
    ours.hidden_size = units
    with pytest.raises(RuntimeError):
        ours(an_input(name))


@pytest.mark.parametrize("name", STEPS)
def test_changed_attribute_of_a_cell_acts_as_in_torch(name: str) -> None:
    for change in (setting(bias=False), setting(hidden_size=4), setting(input_size=2), setting(nonlinearity="relu")):
        assert_same_outcome(name, {}, change, torch.float64, an_input(name))
    assert_same_outcome(name, {"bias": False}, setting(bias=True), torch.float64, an_input(name))


def double_the_list(module: nn.Module) -> None:
    module._flat_weights = [2 * weight for weight in module._flat_weights]


def double_an_entry(module: nn.Module) -> None:
    module._flat_weights[1] = 2 * module._flat_weights[1]


def double_and_assign(module: nn.Module) -> None:
    """An assignment makes torch.nn read all weights by name again."""
    double_the_list(module)
    module.bias_hh_l0 = nn.Parameter(module.bias_hh_l0 + 1)


@pytest.mark.parametrize("change", [double_the_list, double_an_entry, double_and_assign], ids=lambda c: c.__name__)
@pytest.mark.parametrize("name", LAYERS)
def test_flat_weights_written_by_hand_count_as_in_torch(name: str, change: Change) -> None:
    for options in ({}, {"num_layers": 2, "bidirectional": True}):
        assert_same_outcome(name, options, change, torch.float32, an_input(name))


@pytest.mark.parametrize("name", LAYERS)
def test_flat_weights_follow_every_assignment(name: str) -> None:
    for module in both(name, 3, 5):
        new = nn.Parameter(torch.ones(module.weight_hh_l0.shape))
        module.weight_hh_l0 = new
        assert module._flat_weights[1] is new
        module.double()
        assert all(a is b for a, b in zip(module._flat_weights, module.parameters(), strict=True))
        assert module._weights_have_changed() is False
        replica = module._replicate_for_data_parallel()
        assert replica._flat_weights is not module._flat_weights


@pytest.mark.parametrize("method", ["get_expected_hidden_size", "check_forward_args", "permute_hidden", "check_input"])
@pytest.mark.parametrize("name", LAYERS)
def test_methods_that_programs_call_are_torchs(name: str, method: str) -> None:
    assert getattr(getattr(fastrnn, name), method) is getattr(getattr(nn, name), method)
    ours, theirs = both(name, 3, 5)
    x = an_input(name)
    assert ours.get_expected_hidden_size(x, None) == theirs.get_expected_hidden_size(x, None)


@pytest.mark.parametrize("name", LAYERS)
def test_a_packed_state_of_the_wrong_batch_is_refused(name: str) -> None:
    """torch.nn broadcasts the c of a batch of one and cuts states of a larger batch, without a word."""
    ours, _ = both(name, 3, 5)
    x = PackedSequence(torch.randn(5, 3), torch.tensor([3, 2]))
    for batch in (1, 2, 4):
        h, c = torch.randn(1, 3, 5), torch.randn(1, batch, 5)
        with pytest.raises(RuntimeError, match="Expected hidden"):
            ours(x, (h, c) if name == "LSTM" else c)


@pytest.mark.parametrize("name", NAMES)
def test_projection_without_part_in_the_result_has_no_gradient(name: str) -> None:
    """None, as in torch.nn, where a zero would let an optimizer's momentum or weight decay move it."""
    variants = (
        [{}] if name != "LSTM" else [{}, {"proj_size": 2}, {"proj_size": 2, "bidirectional": True, "num_layers": 2}]
    )
    for options in variants:
        for steps in (1, 3):
            for used in range(3):
                found = []
                for module in both(name, 3, 5, **options):
                    x = an_input(name)[:steps] if name in LAYERS else an_input(name)
                    outputs = tensors_of(module(x))
                    if used < len(outputs):
                        outputs[used].sum().backward()
                    found.append([parameter.grad is None for parameter in module.parameters()])
                assert found[0] == found[1]
