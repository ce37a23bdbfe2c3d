# SPDX-License-Identifier: BSD-3-Clause
"""What a layer keeps for its backward, to the byte (the formula of docs/memory.md); recompute, which keeps nothing."""

from __future__ import annotations

import contextlib
import copy
import pickle

import pytest
import torch
from doors import monitored
from samples import GATES, gradients, sample
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence
from twins import CELLS, LAYERS, random_state, tensors_of, training_step, twins

import fastrnn

pytestmark = pytest.mark.usefixtures("compiled")

SIZE = {torch.float32: 4, torch.float64: 8, torch.bfloat16: 2}
FORMS = [{}, {"bidirectional": True}, {"num_layers": 3}, {"bias": False}, {"batch_first": True}]


def padded(units: int) -> int:
    return (units + 15) // 16 * 16


def formula(cell: str, N: int, H: int, P: int, D: int, dtype: torch.dtype) -> int:
    """Bytes kept by one layer beside its arguments."""
    s = 8 if dtype is torch.float64 else 4
    inner = {"lstm": 4 * padded(H) + H, "gru": 4 * padded(H), "rnn_tanh": 0, "rnn_relu": 0}[cell]
    return D * N * inner * s + N * D * (P or H) * SIZE[dtype]


def kept_bytes(call: object, arguments: list[Tensor]) -> int:
    """The bytes of every storage that autograd keeps, but for those of the arguments."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = call()  # kept alive: a storage that is freed could come back under the same address
    assert outputs is not None
    given = {tensor.untyped_storage().data_ptr() for tensor in arguments}
    return sum(size for address, size in storages.items() if address not in given)


@pytest.mark.parametrize("dtype", list(SIZE), ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("cell", [*CELLS, "lstm with projection"])
def test_kept_bytes_follow_the_formula(cell, form, dtype):
    T, B, I, H = 7, 5, 6, 21  # noqa: E741
    P = 9 if " " in cell else 0
    cell = cell.split()[0]
    module, _ = twins(cell, I, H, dtype=dtype, **form, **({"proj_size": P} if P else {}))
    D, L = 1 + module.bidirectional, module.num_layers
    x = torch.randn(*((B, T) if module.batch_first else (T, B)), I, dtype=dtype)
    hx = random_state(cell, L * D, B, H=H, P=P, dtype=dtype)
    arguments = [x, *tensors_of(hx), *module.parameters()]
    assert kept_bytes(lambda: module(x, hx), arguments) == L * formula(cell, T * B, H, P, D, dtype)
    module.recompute = True
    between = (L - 1) * T * B * D * (P or H) * SIZE[dtype]  # the outputs of the lower layers, which the upper ones read
    assert kept_bytes(lambda: module(x, hx), arguments) == between


@pytest.mark.parametrize("cell", CELLS)
def test_nothing_is_kept_without_gradient(cell):
    module, _ = twins(cell, 6, 21)
    with torch.no_grad():
        assert kept_bytes(lambda: module(torch.randn(7, 5, 6)), []) == 0


@pytest.mark.parametrize("form", [*FORMS, {"num_layers": 2, "dropout": 0.5}], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_recompute_has_the_same_gradients(cell, form, isa):
    plain, _ = twins(cell, 6, 21, **form)
    again = copy.deepcopy(plain)
    again.recompute = True
    for x in (torch.randn(7, 5, 6), torch.randn(4, 6), pack_sequence([torch.randn(4, 6), torch.randn(2, 6)])):
        found = []
        for module in (plain, again):
            torch.manual_seed(3)  # of the dropout
            found.append(training_step(module, x))
        for name, expected in found[0].items():
            assert torch.equal(found[1][name], expected), name


@pytest.mark.parametrize("options", [{"D": 2}, {"lengths": (5, 3, 1)}, {"P": 3}], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_functions_recompute_through_every_door(cell, options):
    if "P" in options and cell != "lstm":
        pytest.skip("only the LSTM has a projection")
    layer = sample(cell, **options, dtype=torch.float32, requires_grad=True)
    name, _, nonlinearity = cell.partition("_")

    def outputs(recompute: bool) -> list[Tensor]:
        reverse = layer.weights[1] if len(layer.weights) == 2 else None
        state = layer.state if cell == "lstm" else layer.state[0]
        y, final = getattr(fastrnn.functional, name)(
            layer.x, state, weights=layer.weights[0], reverse_weights=reverse, batch_sizes=layer.batch_sizes,
            recompute=recompute, **({"nonlinearity": nonlinearity} if nonlinearity else {}),
        )  # fmt: skip
        return [y, *tensors_of(final)]

    expected = gradients(outputs(False), layer)
    forwards: list[str] = []
    with monitored(forwards):  # a dispatch mode sees the operator, and that it runs once more
        through_operator = gradients(outputs(True), layer)
    assert forwards.count(layer.operator) == (2 if GATES[cell] > 1 else 1)  # an RNN's operator keeps nothing but y
    for found in (gradients(outputs(True), layer), through_operator):
        for which, gradient in found.items():
            assert torch.equal(gradient, expected[which]), which


@pytest.mark.parametrize("cell", CELLS)
def test_recompute_works_twice_and_with_create_graph(cell):
    plain, _ = twins(cell, 3, 5, dtype=torch.float64)
    again = copy.deepcopy(plain)
    again.recompute = True
    x = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    seconds = []
    for module in (plain, again):
        loss = tensors_of(module(x))[0].square().sum()
        first = torch.autograd.grad(loss, x, retain_graph=True)[0]
        assert torch.equal(torch.autograd.grad(loss, x, retain_graph=True)[0], first)
        (slope,) = torch.autograd.grad(loss, x, create_graph=True)
        seconds.append(torch.autograd.grad(slope.square().sum(), [x, *module.parameters()]))
    for a, b in zip(*seconds, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("cell", CELLS)
def test_recompute_sees_a_changed_input_and_refuses_it(cell):
    module, _ = twins(cell, 3, 5)
    module.recompute = True
    y = tensors_of(module(torch.randn(4, 2, 3)))[0]
    y.mul_(2)  # not kept: it may be changed
    y.sum().backward()
    loss = tensors_of(module(torch.randn(4, 2, 3)))[0].sum()
    with torch.no_grad():
        module.weight_hh_l0.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("name", LAYERS)
def test_recompute_is_an_option_like_the_others(name):
    layer = getattr(fastrnn, name)
    module = layer(3, 5, 2, recompute=True)
    assert repr(module) == repr(layer(3, 5, 2))[:-1] + ", recompute=True)"
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert other.recompute is True
    assert layer(3, 5).recompute is False
    state = layer(3, 5).__getstate__()
    old = layer.__new__(layer)
    old.__setstate__(state)
    assert old.recompute is False
    with pytest.raises(TypeError, match="recompute must be a bool, got int"):
        layer(3, 5, recompute=1)
    with pytest.raises(TypeError):
        getattr(nn, name)(3, 5, recompute=True)


def extended_call(module: nn.Module, x: Tensor, all_states: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Every result of a call with lengths and resets, and the states that it was given."""
    cell = {"LSTM": "lstm", "GRU": "gru"}.get(type(module).__name__, "rnn_tanh")
    T, B, L = x.shape[0], x.shape[1], module.num_layers * (1 + module.bidirectional)
    torch.manual_seed(5)  # of the states and of the noise
    states = [random_state(cell, L, B, H=module.hidden_size, dtype=x.dtype) for _ in range(2)]
    for tensor in tensors_of(states):
        tensor.requires_grad_()
    found = module(
        x,
        states[0],
        lengths=torch.tensor([T, 0, 3, T - 1, 1]),
        reset=torch.rand(T, B) < 0.3,
        reset_state=states[1],
        return_all_states=all_states,
    )
    return list(tensors_of(found)), list(tensors_of(states))


@pytest.mark.parametrize("all_states", [False, True], ids=["plain", "all-states"])
@pytest.mark.parametrize("noisy", [False, True], ids=["quiet", "noisy"])
@pytest.mark.parametrize("cell", CELLS)
def test_recompute_has_the_same_gradients_with_lengths_resets_and_noise(cell, noisy, all_states):
    plain, _ = twins(cell, 6, 21, num_layers=2, bidirectional=True)
    if noisy:
        plain.zoneout = (0.3, 0.2) if cell == "lstm" else 0.3
        plain.recurrent_dropout, plain.weight_dropout = 0.4, 0.2
    again = copy.deepcopy(plain)
    again.recompute = True
    given = torch.randn(7, 5, 6)
    found = []
    for module, monitor in ((plain, False), (again, False), (again, True)):
        x = given.clone().requires_grad_()
        with monitored([]) if monitor else contextlib.nullcontext():  # under a mode it is the operator that is called
            outputs, states = extended_call(module, x, all_states)
            torch.manual_seed(9)
            loss = sum((y * torch.randn_like(y)).sum() for y in outputs)
            found.append([loss, *torch.autograd.grad(loss, [x, *states, *module.parameters()])])
    for other in found[1:]:
        for a, b in zip(other, found[0], strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("cell", CELLS)
def test_recompute_keeps_nothing_with_lengths_and_resets(cell):
    module, _ = twins(cell, 6, 21)
    x, hx = torch.randn(7, 5, 6), random_state(cell, 1, 5, H=21)
    extras = {"lengths": torch.tensor([7, 0, 3, 6, 1]), "reset": torch.rand(7, 5) < 0.3}
    arguments = [x, *tensors_of(hx), *module.parameters(), *extras.values()]
    assert kept_bytes(lambda: module(x, hx, **extras), arguments) > 0
    module.recompute = True
    assert kept_bytes(lambda: module(x, hx, **extras), arguments) == 0
