# SPDX-License-Identifier: BSD-3-Clause
"""explain(): the rung, the plan and the reason; and what it says of a call is what the call does."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.rnn import pack_sequence
from twins import NAMES, STEPS, an_input

import fastrnn
from fastrnn import extension

X = torch.zeros(4, 2, 3)


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def two_threads(near):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def near():
    """Plans as they are where the threads' cores share a cache, wherever they are now."""
    if extension.module is None:
        yield
        return
    extension.module.hold_round_time(60.0)
    yield
    extension.module.hold_round_time(0.0)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", NAMES)
def test_kernel_with_its_instruction_set_and_gradient(name, compiled):
    module = getattr(fastrnn, name)(3, 5)
    kernel = f"fastrnn.{name} -> kernel: fastrnn's own, {compiled.isa()}"
    assert fastrnn.explain(module, an_input(name)) == f"{kernel}, with gradient; 1 thread"
    with torch.no_grad():
        assert fastrnn.explain(module, an_input(name)) == f"{kernel}, without gradient; 1 thread"
    unbatched = an_input(name)[0] if name in STEPS else an_input(name)[:, 0]
    assert fastrnn.explain(module, unbatched) == f"{kernel}, with gradient; 1 thread"


def test_noise_has_no_code_in_torch(compiled):
    """Where other calls take torch.nn's own forward, those with noise take the reference; under autocast the kernel."""
    module = fastrnn.LSTM(3, 5, recurrent_dropout=0.5)
    assert fastrnn.explain(module, an_input("LSTM")).startswith("fastrnn.LSTM -> kernel")
    with torch.autocast("cpu"):
        assert fastrnn.explain(module, an_input("LSTM")).startswith("fastrnn.LSTM -> kernel")
    sentence = fastrnn.explain(module, X.as_subclass(Marked))
    reason = "because a tensor is a Marked, a subclass of Tensor"
    assert sentence == f"fastrnn.LSTM -> reference: plain PyTorch (fastrnn.reference), {reason}"


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(
    ("split", "options", "batch", "plan"),
    [
        ("chosen", {}, 1, "1 thread"),
        ("rows", {}, 8, "2 threads that share the rows"),
        ("units", {}, 8, "2 threads that share the units"),
        ("rows", {"bidirectional": True}, 8, "2 threads, one for each direction"),
        ("rows", {"num_layers": 3}, 8, "3 layers, each on 2 threads that share the rows"),
        ("rows", {}, 0, "an empty batch, nothing to run"),
    ],
)
def test_plan_of_the_threads(split, options, batch, plan, compiled):
    compiled.force_split(split)
    try:
        for input_size, batch_first in ((3, False), (3, True)):
            module = fastrnn.GRU(input_size, 40, batch_first=batch_first, **options)
            x = torch.zeros((batch, 2, 3) if batch_first else (2, batch, 3))
            assert fastrnn.explain(module, x).endswith(f", with gradient; {plan}")
    finally:
        compiled.force_split("chosen")


@pytest.mark.usefixtures("two_threads")
def test_plan_of_layers_that_differ(compiled):
    """A layer that is small but for its input: one thread suffices for the layers above."""
    module = fastrnn.RNN(2000, 16, num_layers=3)
    explained = fastrnn.explain(module, torch.zeros(4, 30, 2000))
    assert explained.endswith("; the first layer on 2 threads that share the rows, the others on 1 thread")


@pytest.mark.usefixtures("two_threads")
def test_plan_of_four_threads_with_two_directions(compiled):
    torch.set_num_threads(4)
    compiled.force_split("units")
    try:
        explained = fastrnn.explain(fastrnn.LSTM(3, 64, bidirectional=True), X)
    finally:
        compiled.force_split("chosen")
    assert explained.endswith("; 4 threads that share the units of each direction")


@pytest.mark.usefixtures("two_threads")
def test_plan_goes_by_how_far_apart_the_threads_are(compiled):
    module, x = fastrnn.LSTM(64, 64), torch.zeros(100, 1, 64)
    for held, plan in ((60.0, "2 threads that share the units"), (400.0, "1 thread"), (1e6, "1 thread")):
        compiled.hold_round_time(held)
        assert fastrnn.explain(module, x).endswith("; " + plan)
    compiled.hold_round_time(0.0)
    assert 0 < compiled.round_time() < 1e9


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("steps", [1, 10])
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_two_directions_of_a_short_sequence_run_at_once(name, steps, compiled):
    """Each thread packs what it alone reads: two directions are no dearer to pack on two threads than on one."""
    module = getattr(fastrnn, name)(256, 256, bidirectional=True)
    with torch.no_grad():
        explained = fastrnn.explain(module, torch.zeros(steps, 2, 256))
    assert explained.endswith("; 2 threads, one for each direction")


@pytest.mark.usefixtures("one_thread", "compiled")
def test_plan_of_packed_sequences():
    packed = pack_sequence([torch.zeros(3, 3), torch.zeros(1, 3)])
    for hx in (None, torch.zeros(1, 2, 5)):
        assert fastrnn.explain(fastrnn.GRU(3, 5), packed, hx).endswith("with gradient; 1 thread")


def test_plan_refuses_what_is_not_a_layer(compiled):
    for arguments in (("gru", False, 0, 1, 1, 1, 0, 1), ("gru", False, 1, 1, 1, 1, 0, 3), ("x", False, *(1,) * 6)):
        with pytest.raises(ValueError, match=r"fastrnn.plan: "):
            compiled.plan(*arguments)


# ---- other rungs ---------------------------------------------------------------------------------------------------


class Marked(torch.Tensor):
    pass


def test_reasons_for_torchs_code(compiled):
    layer = fastrnn.LSTM(3, 5)
    for module, x, reason in (
        (fastrnn.LSTM(3, 5, dtype=torch.complex64), X.to(torch.complex64), "a tensor is torch.complex64"),
        (layer, X.as_subclass(Marked), "a tensor is a Marked, a subclass of Tensor"),
        (fastrnn.GRU(3, 5, device="meta"), X.to("meta"), "a tensor is on meta and the kernels are for the CPU"),
    ):
        module(x)
        assert fastrnn.explain(module, x).endswith(f" -> torch: torch.nn's own forward, because {reason}")
    with torch.autocast("cpu"):
        assert fastrnn.explain(layer, X.bfloat16()).endswith("because autocast is on for the CPU")
    with torch.autograd.forward_ad.dual_level():
        assert "fastrnn.LSTM -> reference: plain PyTorch (fastrnn.reference), because" in fastrnn.explain(layer, X)


@pytest.mark.parametrize("name", NAMES)
def test_stock_modules_are_explained_and_others_refused(name):
    explained = fastrnn.explain(getattr(nn, name)(3, 5), an_input(name))
    assert explained.startswith(f"torch.nn.{name} -> torch: it is torch.nn's own class; fastrnn.convert turns it")
    message = r"module must be an LSTM, GRU or RNN, or a cell, got torch.nn.modules.linear.Linear"
    with pytest.raises(TypeError, match=message):
        fastrnn.explain(nn.Linear(4, 5), X)
    with pytest.raises(TypeError, match="Sequential; it holds some: 0"):
        fastrnn.explain(nn.Sequential(fastrnn.LSTM(3, 5)), X)
    with pytest.raises(TypeError, match="got builtins"):
        fastrnn.explain(3, X)


class Own(fastrnn.GRU):
    pass


def test_subclasses_and_reparametrized_modules_are_explained(compiled):
    assert f"{__name__}.Own -> kernel: " in fastrnn.explain(Own(3, 5), X)
    for change in (parametrizations.weight_norm, lambda *a: prune.l1_unstructured(*a, amount=0.5)):
        module = fastrnn.GRU(3, 5)
        change(module, "weight_hh_l0")
        assert "fastrnn.GRU -> kernel: " in fastrnn.explain(module, X)


# ---- what is refused -----------------------------------------------------------------------------------------------


def wrong_weight(name):
    module = getattr(fastrnn, name)(3, 5)
    module.weight_hh_l0 = nn.Parameter(torch.zeros(5, 4))
    return module


H = torch.zeros(1, 2, 5)
REFUSED = {
    "features": lambda name: (getattr(fastrnn, name)(3, 5), X[..., :2]),
    "dimensions": lambda name: (getattr(fastrnn, name)(3, 5), torch.zeros(3)),
    "no steps": lambda name: (getattr(fastrnn, name)(3, 5), X[:0]),
    "dtype": lambda name: (getattr(fastrnn, name)(3, 5), X.double()),
    "batch of the state": lambda name: (
        getattr(fastrnn, name)(3, 5),
        X,
        (H, H[:, :1]) if name == "LSTM" else H[:, :1],
    ),
    "state of a packed batch": lambda name: (
        getattr(fastrnn, name)(3, 5),
        pack_sequence([X[:3, 0], X[:1, 0]]),
        (H, H[:, :1]) if name == "LSTM" else H[:, :1],
    ),
    "shape of a weight": lambda name: (wrong_weight(name), X),
    "device": lambda name: (getattr(fastrnn, name)(3, 5, device="meta"), X),
}


@pytest.mark.parametrize("mistake", REFUSED)
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_refusal_is_the_error_of_the_call(name, mistake):
    arguments = REFUSED[mistake](name)
    explained = fastrnn.explain(*arguments)
    assert explained.startswith(f"fastrnn.{name} -> refused: ")
    with pytest.raises(Exception) as raised:  # noqa: PT011  the type is compared below
        arguments[0](*arguments[1:])
    assert f" -> refused: {type(raised.value).__name__}: " in explained
    if mistake not in ("device", "shape of a weight"):  # found by other checks than those of the call, in other words
        assert explained.endswith(str(raised.value))


@pytest.mark.parametrize("name", STEPS)
def test_refusal_of_a_cell_is_the_error_of_the_call(name):
    cell = getattr(fastrnn, name)(3, 5)
    state = torch.zeros(3, 5)
    for arguments in ((X,), (X[0, :, :2],), (X[0], (state, state) if name == "LSTMCell" else state)):
        with pytest.raises(Exception) as raised:  # noqa: PT011
            cell(*arguments)
        explained = fastrnn.explain(cell, *arguments)
        assert explained == f"fastrnn.{name} -> refused: {type(raised.value).__name__}: {raised.value}"


# ---- lengths, resets, every state ----------------------------------------------------------------------------------

LENGTHS, RESET = torch.tensor([4, 2]), torch.tensor([[False, True]] * 4)


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_calls_with_extras_are_explained(name, compiled):
    module = getattr(fastrnn, name)(3, 5)
    state = (H, H) if name == "LSTM" else H
    for extras in (
        {"lengths": LENGTHS},
        {"reset": RESET},
        {"reset": RESET, "reset_state": state},
        {"return_all_states": True},
        {"lengths": LENGTHS, "reset": RESET, "return_all_states": True},
    ):
        module(X, state, **extras)
        assert fastrnn.explain(module, X, state, **extras).startswith(f"fastrnn.{name} -> kernel: fastrnn's own, ")
        with torch.autocast("cpu"):
            module(X, state, **extras)
            assert fastrnn.explain(module, X, state, **extras).startswith(f"fastrnn.{name} -> kernel: ")
        plain = f"fastrnn.{name} -> reference: plain PyTorch (fastrnn.reference), because "
        sentences: list[str] = []

        def explained(x, extras=extras, sentences=sentences):
            sentences.append(fastrnn.explain(module, X, **extras))
            return x.sum()

        torch.func.grad(explained)(X)
        assert sentences == [f"{plain}torch.func differentiates"]


EXTRA_MISTAKES = {
    "shape of lengths": {"lengths": torch.tensor([4])},
    "dtype of lengths": {"lengths": torch.tensor([4, 2], dtype=torch.int32)},
    "lengths beyond T": {"lengths": torch.tensor([5, 2])},
    "kind of lengths": {"lengths": [4, 2]},
    "shape of reset": {"reset": RESET.T},
    "reset_state alone": {"reset_state": torch.zeros(1, 2, 5)},
    "shape of reset_state": {"reset": RESET, "reset_state": (torch.zeros(1, 2, 4),) * 2},
}


@pytest.mark.parametrize("mistake", EXTRA_MISTAKES)
def test_refusal_of_extras_is_the_error_of_the_call(mistake, compiled):
    module, extras = fastrnn.LSTM(3, 5), EXTRA_MISTAKES[mistake]
    with pytest.raises(Exception) as raised:  # noqa: PT011
        module(X, **extras)
    explained = fastrnn.explain(module, X, **extras)
    start = f"fastrnn.LSTM -> refused: {type(raised.value).__name__}: "
    assert explained.startswith(start)
    if mistake != "lengths beyond T":  # which the kernel finds, and names the first of them
        assert explained == f"{start}{raised.value}"


def test_extras_are_no_matter_of_cells_and_of_torch_nn():
    for module in (fastrnn.GRUCell(3, 5), nn.GRU(3, 5)):
        assert "refused: TypeError: it takes no lengths" in fastrnn.explain(module, X, lengths=LENGTHS)
        with pytest.raises(TypeError, match="unexpected keyword argument 'lengths'"):
            module(X, lengths=LENGTHS)


def test_explaining_computes_and_changes_nothing():
    module = fastrnn.LSTM(3, 5, num_layers=2, dropout=0.5)
    before, state = torch.get_rng_state(), dict(vars(module))
    fastrnn.explain(module, X)
    assert torch.equal(torch.get_rng_state(), before)
    assert vars(module) == state
