# SPDX-License-Identifier: BSD-3-Clause
"""Lengths, resets, every state and noise where programs go wrong or leave the usual path: an empty batch, autocast,
options changed after the construction, dtypes that do not fit, TorchScript, flags written to before the backward."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from doors import monitored
from test_lengths import every_cell
from test_noise import all_noise, noisy
from torch import nn
from twins import CLASSES, like, random_state, tensors_of, twins

import fastrnn

T, B, I, H = 5, 3, 4, 17  # noqa: E741
LENGTHS, RESET = torch.tensor([2, 5, 0]), torch.rand(T, B, generator=torch.Generator().manual_seed(0)) < 0.4


@every_cell
def test_empty_batch_has_every_state(cell):
    module, _ = twins(cell, I, H, num_layers=2, bidirectional=True)
    x = torch.randn(T, 0, I, requires_grad=True)
    lengths, reset = torch.zeros(0, dtype=torch.int64), torch.zeros(T, 0, dtype=torch.bool)
    results = module(x, lengths=lengths, reset=reset, return_all_states=True)
    assert all(t.shape == (T, 0, 2 * H) for t in tensors_of(results[2]))
    sum(t.sum() for t in tensors_of(results)).backward()
    assert x.grad.shape == x.shape
    assert not module.weight_hh_l0.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@every_cell
def test_autocast_takes_the_kernels_in_its_dtype(cell, dtype, compiled):
    module, _ = twins(cell, I, H, num_layers=2, bidirectional=True)
    x, hx = torch.randn(T, B, I, requires_grad=True), random_state(cell, 4, B, H=H)
    given = {"lengths": LENGTHS, "reset": RESET, "reset_state": random_state(cell, 4, 1, H=H, seed=4)}
    calls: list[str] = []
    with torch.autocast("cpu", dtype=dtype):
        y, state = module(x, hx, **given)
        with monitored(calls):
            module(x, hx, **given)
    assert len(calls) == 2
    assert {t.dtype for t in (y, *tensors_of(state))} == {dtype}
    y.float().sum().backward()
    lower = type(module)(I, H, num_layers=2, bidirectional=True, dtype=dtype)
    if cell == "rnn_relu":
        lower.nonlinearity, lower.mode = "relu", "RNN_RELU"
    lower.load_state_dict(module.state_dict())
    expected, _ = lower(
        x.detach().to(dtype),
        like(hx, lambda t: t.to(dtype)),
        **given | {"reset_state": like(given["reset_state"], lambda t: t.to(dtype))},
    )
    assert torch.equal(y, expected)
    assert module.weight_hh_l0.grad.dtype is x.grad.dtype is torch.float32


@every_cell
def test_autocast_leaves_float64_and_is_explained(cell, compiled):
    module, _ = twins(cell, I, H, dtype=torch.float64)
    x = torch.randn(T, B, I, dtype=torch.float64)
    expected, _ = module(x, lengths=LENGTHS)
    single = noisy(cell, **all_noise(cell))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(module(x, lengths=LENGTHS)[0], expected)
        assert single(x.float())[0].dtype is torch.bfloat16
        assert " -> kernel: " in fastrnn.explain(single, x.float())


@pytest.mark.parametrize("value", [1.5, -0.5, "much"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("option", ["zoneout", "recurrent_dropout", "weight_dropout"])
@every_cell
def test_option_that_is_changed_is_checked_at_the_call(cell, option, training, value):
    module = noisy(cell).train(training)
    setattr(module, option, value if option != "zoneout" or cell != "lstm" else (0.1, value))
    with pytest.raises((ValueError, TypeError), match=f"fastrnn.{CLASSES[cell]}: {option}.* must be a "):
        module(torch.randn(T, B, I))


def test_probabilities_may_be_numbers_of_numpy():
    module = fastrnn.LSTM(I, H, zoneout=(np.float32(0.25), np.float64(0.5)), recurrent_dropout=1)
    assert repr(module).endswith("zoneout=(0.25, 0.5), recurrent_dropout=1.0)")


@every_cell
def test_input_of_another_dtype_is_refused_by_name(cell):
    module, _ = twins(cell, I, H)
    expected = f"fastrnn.{CLASSES[cell]}: input must be torch.float32 like the weights, got torch.float64"
    with pytest.raises(ValueError, match=expected):
        module(torch.randn(T, B, I, dtype=torch.float64), lengths=LENGTHS)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
@every_cell
def test_scripting_does_not_lose_the_noise_without_a_word(cell):
    """torch.jit.script puts torch.nn's module into the model, which has no such options."""
    model = nn.Sequential(noisy(cell, **all_noise(cell)))
    with pytest.raises(TypeError, match="has no zoneout and no recurrent_dropout and no weight_dropout"):
        torch.jit.script(model)
    assert model[0].recurrent_dropout == 0.25


@pytest.mark.parametrize("name", ["lengths", "reset"])
@every_cell
def test_flags_must_not_be_written_to_before_the_backward(cell, name, compiled):
    module, _ = twins(cell, I, H)
    given = {"lengths": LENGTHS.clone(), "reset": RESET.clone()}
    y, _ = module(torch.randn(T, B, I), **given)
    given[name].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@every_cell
def test_lengths_are_read_through_their_strides_and_lazy_bits(cell):
    module, _ = twins(cell, I, H)
    x = torch.randn(T, B, I)
    expected, _ = module(x, lengths=LENGTHS)
    for lengths in (torch.stack([LENGTHS, 1 - LENGTHS], 1)[:, 0], LENGTHS[:1].expand(B), torch._neg_view(-LENGTHS)):
        y, _ = module(x, lengths=lengths)
        assert torch.equal(y, module(x, lengths=lengths.clone())[0])
    assert torch.equal(y, expected)
    none = torch._efficientzerotensor(B, dtype=torch.int64)
    assert not module(x, lengths=none)[0].any()
