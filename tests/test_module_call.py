# SPDX-License-Identifier: BSD-3-Clause
"""The short way of a module's call (csrc/module_call.cpp): ordinary calls take it, all others do not, and neither the
bits nor the strides tell which way a call went."""

from __future__ import annotations

import pytest
import torch
from plain_calls import replaced_call
from samples import cotangents
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from twins import CELLS, LAYERS, NAMES, STEPS, an_input, like, random_state, tensors_of, training_step, twins

import fastrnn
from fastrnn import autograd, extension
from fastrnn.stack import Stack

pytestmark = pytest.mark.usefixtures("compiled")

FORMS = {
    "plain": {},
    "both ways": {"bidirectional": True},
    "no bias": {"bias": False},
    "batch first": {"batch_first": True},
    "two layers": {"num_layers": 2, "bidirectional": True},
    "dropout off": {"num_layers": 2, "dropout": 0.0},
    "projection": {"proj_size": 3, "num_layers": 2},
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


class LongWay(TorchFunctionMode):
    """Changes nothing, but a call that runs under a mode is not an ordinary one."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def assert_same(found: object, expected: object) -> None:
    assert type(found) is type(expected)
    for a, b in zip(tensors_of(found), tensors_of(expected), strict=True):
        assert a.stride() == b.stride()
        assert a.dtype is b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cell", CELLS)
def test_both_ways_of_a_layer_agree(cell, form, dtype, isa):
    options = FORMS[form]
    if form == "projection" and cell != "lstm":
        pytest.skip("only the LSTM has a projection")
    module, _ = twins(cell, 6, 21, dtype=dtype, **options)
    rows, P = module.num_layers * (1 + module.bidirectional), module.proj_size
    for x, hx in (
        (torch.randn(4, 5, 6, dtype=dtype), None),
        (torch.randn(5, 4, 6, dtype=dtype).transpose(0, 1), None),
        (torch.randn(4, 6, dtype=dtype), None),
        (torch.randn(4, 6, dtype=dtype), random_state(cell, rows, H=21, P=P, dtype=dtype)),
        (torch.randn(5, 5, 6, dtype=dtype), random_state(cell, rows, 5, H=21, P=P, dtype=dtype)),
        (torch.randn(4, 0, 6, dtype=dtype).reshape((0, 4, 6) if module.batch_first else (4, 0, 6)), None),
    ):
        with torch.no_grad():
            short = module(x, hx)
            with LongWay():
                assert_same(module(x, hx), short)
        if x.numel():
            short = training_step(module, x, hx)
            with LongWay():
                long = training_step(module, x, hx)
            for name, tensor in short.items():
                assert torch.equal(long[name], tensor), name


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("cell", CELLS)
def test_both_ways_of_a_cell_agree(cell, bias, dtype, isa):
    module, _ = twins(cell, 6, 21, step=True, bias=bias, dtype=dtype)
    for x, hx in (
        (torch.randn(4, 6, dtype=dtype), None),
        (torch.randn(6, 4, dtype=dtype).t(), random_state(cell, 4, H=21, dtype=dtype)),
        (torch.randn(6, dtype=dtype), None),
        (torch.randn(12, dtype=dtype)[::2], random_state(cell, H=21, dtype=dtype)),
    ):
        with torch.no_grad():
            short = module(x, hx)
            with LongWay():
                assert_same(module(x, hx), short)
        short = training_step(module, x, hx)
        with LongWay():
            long = training_step(module, x, hx)
        for name, tensor in short.items():
            assert torch.equal(long[name], tensor), name


@pytest.mark.parametrize("name", NAMES)
def test_second_derivatives_agree_with_torch_nn(name):
    results = []
    for library in (fastrnn, nn):
        torch.manual_seed(7)
        module = getattr(library, name)(3, 5, dtype=torch.float64)
        x = an_input(name).double().requires_grad_()
        loss = sum(tensor.square().sum() for tensor in tensors_of(module(x)))
        (slope,) = torch.autograd.grad(loss, x, create_graph=True)
        results.append(torch.autograd.grad(slope.square().sum(), [x, *module.parameters()]))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("gradient", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("name", NAMES)
def test_ordinary_calls_take_the_short_way(name, gradient, monkeypatch):
    def refuse(*_):
        raise AssertionError("the call took the long way")

    monkeypatch.setattr(Stack, "_fastrnn_layer_weights", refuse)
    monkeypatch.setattr(fastrnn.cells, "_layer_arguments", refuse)
    module, x = getattr(fastrnn, name)(3, 5), an_input(name)
    cell = {"L": "lstm", "G": "gru", "R": "rnn_tanh"}[name[0]]
    lead = (2,) if name in STEPS else (1, 2)
    with torch.set_grad_enabled(gradient):
        module(x)
        module(x, random_state(cell, *lead, H=5))
        module(x[:, 0] if name in LAYERS else x[0])


def short(
    module: nn.Module,
    x: object,
    hx: object = None,
    *,
    lengths: object = None,
    reset: object = None,
    reset_state: object = None,
) -> object:
    """What the short way answers; None: it leaves the call to the long way."""
    gates = 4 if isinstance(module, nn.LSTM | nn.LSTMCell) else 3 if isinstance(module, nn.GRU | nn.GRUCell) else 1
    if isinstance(module, nn.RNNCellBase):
        return extension.module.cell_call(module.__dict__, gates, x, hx)
    return extension.module.layer_call(module.__dict__, gates, False, x, hx, lengths, reset, reset_state)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_unusual_takes_the_long_way(name):
    module, x = getattr(fastrnn, name)(3, 5), an_input(name)
    assert short(module, x) is not None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert short(module, x) is None
    with LongWay():
        assert short(module, x) is None
    with forward_ad.dual_level():
        assert short(module, x) is None
    torch.func.vmap(lambda x: [short(module, x) is None or 1 / 0, x][1])(torch.stack((x, x)))
    torch.func.grad(lambda s: [short(module, x) is None or 1 / 0, s][1])(torch.tensor(1.0))
    for strange in (
        None,
        3,
        [x],
        x.double(),
        x.to("meta"),
        x.to_sparse(),
        x.long(),
        x.bool(),
        x[..., :2],
        x[None, None],
    ):
        assert short(module, strange) is None
    assert short(module, x, 3) is None
    assert short(module, x, (x, x, x)) is None
    assert short(module, x, (torch.zeros(1, 5), torch.zeros(1, 5))) is None

    class Marked(torch.Tensor):
        pass

    assert short(module, x.as_subclass(Marked)) is None
    module.hidden_size = "5"
    assert short(module, x) is None
    del module.hidden_size
    assert short(module, x) is None


@pytest.mark.parametrize("name", NAMES)
def test_weights_that_are_no_parameters_are_read_all_the_same(name):
    class Double(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return 2 * weight

    module, x = getattr(fastrnn, name)(3, 5), an_input(name)
    weight = "weight_hh" if name in STEPS else "weight_hh_l0"
    value = getattr(module, weight).detach().clone()
    parametrize.register_parametrization(module, weight, Double())
    assert short(module, x) is None
    doubled = module(x)
    parametrize.remove_parametrizations(module, weight, leave_parametrized=False)
    del module._parameters[weight]
    setattr(module, weight, 2 * value)  # a plain attribute, as pruning and weight drop leave it
    assert short(module, x) is not None
    for a, b in zip(tensors_of(module(x)), tensors_of(doubled), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_dropout_of_a_stack_takes_the_long_way_in_training_alone(name):
    if name in STEPS:
        pytest.skip("a cell has no dropout")
    module, x = getattr(fastrnn, name)(3, 5, num_layers=2, dropout=0.5), an_input(name)
    with torch.no_grad():
        assert short(module, x) is None
        assert short(module.eval(), x) is not None


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype:UserWarning")
@pytest.mark.parametrize("name", NAMES)
def test_nested_tensors_take_the_long_way(name):
    nested = torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(1, 3)])
    assert short(getattr(fastrnn, name)(3, 5), nested) is None
    assert not extension.module.is_ordinary([nested])


@pytest.mark.parametrize("option", [{"zoneout": 0.5}, {"recurrent_dropout": 0.5}, {"weight_dropout": 0.5}], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_noise_is_not_lost_on_the_short_way(name, option):
    if name == "LSTM" and "zoneout" in option:
        option = {"zoneout": (0.5, 0.5)}
    x = torch.randn(6, 2, 3)
    with torch.no_grad():
        module = getattr(fastrnn, name)(3, 5, **option)
        assert not torch.equal(module(x)[0], module(x)[0])


@pytest.mark.parametrize("name", LAYERS)
def test_lengths_resets_and_every_state_are_not_lost_on_the_short_way(name):
    module, x = getattr(fastrnn, name)(3, 5), torch.randn(6, 2, 3)
    with torch.no_grad():
        y = module(x)[0]
        assert torch.equal(module(x, lengths=torch.tensor([6, 2]))[0][2:, 1], torch.zeros(4, 5))
        assert not torch.equal(module(x, reset=torch.arange(6).eq(3)[:, None].expand(6, 2))[0][3], y[3])
        assert len(module(x, return_all_states=True)) == 3


def extras_of(module: nn.Module, T: int, B: int, one_row: bool) -> dict[str, object]:
    """lengths, reset and reset_state for an input of these sizes."""
    directions, rows = 2 if module.bidirectional else 1, 1 if one_row else B
    state = torch.randn(module.num_layers * directions, rows, module.hidden_size, dtype=module.weight_hh_l0.dtype)
    reset = torch.rand(T, B) < 0.4
    return {
        "lengths": torch.arange(B) % (T + 1),
        "reset": reset.T if module.batch_first else reset,
        "reset_state": (state, 2 * state) if isinstance(module, nn.LSTM) else state,
    }


@pytest.mark.parametrize("recorded", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("batch_first", [False, True], ids=["time_first", "batch_first"])
@pytest.mark.parametrize("one_row", [False, True], ids=["state_of_rows", "state_of_all"])
@pytest.mark.parametrize("name", LAYERS)
def test_lengths_and_resets_take_the_short_way(name, one_row, batch_first, recorded, monkeypatch):
    module = getattr(fastrnn, name)(3, 5, 1 if recorded else 2, bidirectional=True, batch_first=batch_first)
    x = torch.randn(*((4, 6) if batch_first else (6, 4)), 3)
    given = extras_of(module, 6, 4, one_row)
    results = []
    for way in ("short", "long"):
        if way == "long":
            monkeypatch.setattr(autograd._C, "layer_call", lambda *_: None)
            monkeypatch.setattr(nn.Module, "_call_impl", replaced_call())
        leaves = [x.clone().requires_grad_(recorded), *tensors_of(given["reset_state"])]
        states = [t.clone().requires_grad_(recorded) for t in leaves[1:]]
        own = given | {"reset_state": tuple(states) if name == "LSTM" else states[0]}
        with torch.set_grad_enabled(recorded):
            found = module(leaves[0], **own) if way == "long" else short(module, leaves[0], **own)
        outputs = tensors_of(found)
        if recorded:
            outputs += torch.autograd.grad(outputs, [leaves[0], *states, *module.parameters()], cotangents(outputs))
        results.append(outputs)
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("name", LAYERS)
def test_a_sequence_alone_is_reset_on_the_short_way(name):
    module, x = getattr(fastrnn, name)(3, 5), torch.randn(6, 3)
    reset = torch.tensor([False, False, True, False, True, False])
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            y, _ = short(module, x, reset=reset)
            assert torch.equal(y, module(x[:, None], reset=reset[:, None])[0][:, 0])


@pytest.mark.parametrize("name", LAYERS)
def test_what_is_unusual_of_lengths_and_resets_goes_the_long_way(name):
    module, x = getattr(fastrnn, name)(3, 5), torch.randn(6, 2, 3)
    reset, state = torch.zeros(6, 2, dtype=torch.bool), torch.zeros(1, 2, 5)
    pair = (state, state) if name == "LSTM" else state
    for unusual in (
        {"lengths": [1, 2]},
        {"lengths": torch.tensor([1, 2], dtype=torch.int32)},
        {"lengths": torch.tensor([1, 2, 3])},
        {"lengths": torch.tensor([1, 2], device="meta")},
        {"lengths": torch._neg_view(torch.tensor([-1, -2]))},
        {"reset": reset.T},
        {"reset": reset.byte()},
        {"reset": reset[:, 0]},
        {"reset": reset.to_sparse()},
        {"reset_state": pair},
        {"reset": reset, "reset_state": like(pair, lambda t: t.double())},
        {"reset": reset, "reset_state": like(pair, lambda t: t[..., :4])},
        {"reset": reset, "reset_state": like(pair, lambda t: t[0])},
        {"reset": reset, "reset_state": like(pair, lambda t: t.expand(2, -1, -1))},
        {"reset": reset, "reset_state": [state]},
    ):
        assert short(module, x, **unusual) is None, unusual
    assert short(module, x[:, 0], lengths=torch.tensor([3])) is None
    assert short(module, x, lengths=torch.tensor([1, 2]), reset=reset, reset_state=pair) is not None


@pytest.mark.parametrize("extra", ["h_mask", "zoneout_h", "zoneout_c"])
def test_functions_with_gradient_refuse_what_they_would_lose(extra):
    module, x = fastrnn.LSTM(3, 5), torch.randn(6, 2, 3)
    state = torch.zeros(1, 2, 5)
    extras = dict.fromkeys(("lengths", "batch_sizes", "reset", "reset_h", "reset_c"))
    extras |= {"h_mask": state, "zoneout_h": torch.zeros(6, 2, 5), "zoneout_c": torch.zeros(6, 2, 5)}
    given = [value if name == extra else None for name, value in extras.items()]
    with pytest.raises(RuntimeError, match="lstm_layer_with_gradient: takes no masks"):
        extension.module.lstm_layer_with_gradient(x, state, state, *module.parameters(), *(None,) * 6, *given, True)


def test_wrong_arguments_are_refused():
    none = (None,) * 5
    for arguments in ((), (3, 4, False, *none), ({}, "4", False, *none), ({}, 4, False, None, None)):
        with pytest.raises(TypeError, match="layer_call: expected"):
            extension.module.layer_call(*arguments)
        with pytest.raises(TypeError, match="cell_call: expected"):
            extension.module.cell_call(*arguments)
    assert extension.module.layer_call({}, 4, False, *none) is None
    assert extension.module.layer_call({"_parameters": {}}, 4, False, *none) is None
    assert extension.module.cell_call({"_parameters": 3}, 4, None, None) is None
