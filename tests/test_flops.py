# SPDX-License-Identifier: BSD-3-Clause
"""torch.utils.flop_counter.FlopCounterMode: what it counts of fastrnn's operators is what it counts of a loop over
torch.nn's cells, and what stands on paper."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from own_cells import CELLS, layer
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.func import functional_call, grad, vmap
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.flop_counter import FlopCounterMode
from twins import LAYERS, STEPS, tensors_of

import fastrnn

pytestmark = pytest.mark.usefixtures("compiled")

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
T, B, I, H = 4, 2, 3, 5  # noqa: E741 (the letter of the equations)


def count(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def trained(module: nn.Module, *arguments: object, **extras: object) -> int:
    """Operations of a training step on the sum of all outputs."""
    return count(lambda: sum(out.sum() for out in tensors_of(module(*arguments, **extras))).backward())


def printed(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert not done.stderr
    return done.stdout.strip()


def states(name: str, *lead: int, width: int = H, **options: bool) -> object:
    h = torch.randn(*lead, width, **options)
    return (h, torch.randn(*lead, H, **options)) if name.startswith("LSTM") else h


def loop(cell: nn.Module, x: Tensor, hx: object) -> Tensor:
    """A sequence step by step through torch.nn's cell."""
    total = x.new_zeros(())
    for step in x:
        hx = cell(step, hx)
        total = total + tensors_of(hx)[0].sum()
    return total


@pytest.mark.parametrize("own_x", [True, False], ids=["x-needs-a-gradient", "x-does-not"])
@pytest.mark.parametrize("own_state", [True, False], ids=["state-needs-a-gradient", "state-does-not"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_training_step_counts_as_a_loop_over_torchs_cell(name: str, own_state: bool, own_x: bool) -> None:
    x, hx = torch.randn(T, B, I, requires_grad=own_x), states(name, B, requires_grad=own_state)
    cell = getattr(nn, name + "Cell")(I, H)
    expected = count(lambda: loop(cell, x, hx).backward())
    started = tuple(h.unsqueeze(0) for h in hx) if isinstance(hx, tuple) else hx.unsqueeze(0)
    assert trained(getattr(fastrnn, name)(I, H), x, started) == expected
    a_step = 2 * B * GATES[name] * H
    assert expected == 3 * T * a_step * (I + H) - (not own_x) * T * a_step * I - (not own_state) * a_step * H


@pytest.mark.parametrize("name", STEPS)
def test_a_cell_counts_as_torchs_cell(name: str) -> None:
    x, hx = torch.randn(B, I, requires_grad=True), states(name, B, requires_grad=True)
    ours, theirs = getattr(fastrnn, name)(I, H), getattr(nn, name)(I, H)
    assert trained(ours, x, hx) == trained(theirs, x, hx) == 6 * B * GATES[name[:-4]] * H * (I + H)
    with torch.no_grad():
        assert count(lambda: ours(x, hx)) == count(lambda: theirs(x, hx)) == 2 * B * GATES[name[:-4]] * H * (I + H)


@pytest.mark.parametrize("name", LAYERS)
def test_layers_and_directions_count_as_those_of_torch(name: str) -> None:
    """torch.nn's own layers, in float64, where none of them is one operator of oneDNN."""
    options = {"num_layers": 2, "bidirectional": True, "dtype": torch.float64}
    ours, theirs = (getattr(library, name)(I, H, **options) for library in (fastrnn, nn))
    x, hx = torch.randn(T, B, I, dtype=torch.float64), states(name, 4, B, dtype=torch.float64)
    forward = 2 * T * B * GATES[name] * H * 2 * ((I + H) + (2 * H + H))
    with torch.no_grad():
        assert count(lambda: ours(x, hx)) == count(lambda: theirs(x, hx)) == forward
    assert trained(ours, x, hx) == trained(theirs, x, hx)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_a_projection_counts_as_torchs() -> None:
    P = 2
    ours, theirs = (library.LSTM(I, H, proj_size=P, bidirectional=True) for library in (fastrnn, nn))
    x, hx = torch.randn(T, B, I, requires_grad=True), states("LSTM", 2, B, width=P, requires_grad=True)
    step = 3 * 2 * T * B * 2 * (4 * H * (I + P) + H * P)
    assert trained(ours, x, hx) == trained(theirs, x, hx) == step


@pytest.mark.parametrize("name", LAYERS)
def test_frozen_weights_save_their_products(name: str) -> None:
    x, hx = torch.randn(T, B, I, requires_grad=True), states(name, 1, B, requires_grad=True)
    module = getattr(fastrnn, name)(I, H)
    module.weight_ih_l0.requires_grad_(False)
    a_step = 2 * B * GATES[name] * H
    assert trained(module, x, hx) == T * a_step * (2 * I + 3 * H)
    module.weight_hh_l0.requires_grad_(False)
    assert trained(module, x, hx) == T * a_step * (2 * I + 2 * H)
    module = getattr(fastrnn, name)(I, H, bidirectional=True)
    module.weight_ih_l0_reverse.requires_grad_(False)
    assert trained(module, x, states(name, 2, B, requires_grad=True)) == T * a_step * (5 * I + 6 * H)


@pytest.mark.parametrize("name", LAYERS)
def test_steps_past_the_end_do_not_count(name: str) -> None:
    module, lengths = getattr(fastrnn, name)(I, H), torch.tensor([4, 1, 0])
    x, a_token = torch.randn(T, 3, I, requires_grad=True), 2 * GATES[name] * H
    forward = 5 * a_token * (I + H)
    # Of two sequences the first step multiplies by w_hh for a gradient of the state that nobody asked for.
    step = 3 * forward - 2 * a_token * H
    assert trained(module, x, lengths=lengths) == step
    packed = pack_padded_sequence(x[:, :2], lengths[:2])
    assert trained(module, packed) == step
    with torch.inference_mode():
        assert count(lambda: module(x.detach(), lengths=lengths)) == forward


def test_what_is_computed_twice_counts_twice() -> None:
    module, x = fastrnn.GRU(I, H), torch.randn(T, B, I)
    kept = trained(module, x)
    module.recompute = True
    assert trained(module, x) == kept + 2 * T * B * 3 * H * (I + H)


@pytest.mark.parametrize("name", LAYERS)
def test_per_sample_gradients_count_as_those_of_the_batch(name: str) -> None:
    """A set of gradients for each sample takes as many products as one for all."""
    module, x = getattr(fastrnn, name)(I, H), torch.randn(B, T, 1, I)
    weights = {key: weight.detach() for key, weight in module.named_parameters()}

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return tensors_of(functional_call(module, weights, (x,)))[0].sum()

    whole = count(lambda: grad(loss)(weights, x.movedim(0, 1).squeeze(2)))
    assert count(lambda: vmap(grad(loss), (None, 0))(weights, x)) == whole > 0


@pytest.mark.parametrize("name", LAYERS)
def test_the_meta_device_counts(name: str) -> None:
    """Without data, as programs estimate large models; a float32 LSTM of torch.nn counts there too."""
    expected = trained(getattr(fastrnn, name)(I, H), torch.randn(T, B, I))
    with torch.device("meta"):
        assert trained(getattr(fastrnn, name)(I, H), torch.randn(T, B, I)) == expected


@pytest.mark.parametrize("where", ["fake", "meta"])
def test_lengths_that_nobody_knows_count_as_full(where: str) -> None:
    with FakeTensorMode() if where == "fake" else torch.device("meta"):
        x, h0, w_ih, w_hh = torch.randn(T, B, I), torch.randn(1, B, H), torch.randn(3 * H, I), torch.randn(3 * H, H)
        lengths = torch.full((B,), 2)
        arguments = (x, h0, w_ih, w_hh, *(None,) * 6, lengths, *(None,) * 5, False)
        assert count(lambda: torch.ops.fastrnn.gru_layer(*arguments)) == 2 * T * B * 3 * H * (I + H)


@pytest.mark.parametrize("cell", CELLS)
def test_a_cell_of_ones_own_counts(cell: str) -> None:
    """By its step in plain PyTorch, which computes it where a dispatch mode watches."""
    own, x, states, weights = layer(cell, T, B, I, H)
    assert count(lambda: own.layer(x, states, weights)) == 2 * T * B * own.gates * H * (I + H)


def test_a_formula_of_the_program_counts() -> None:
    with FlopCounterMode(display=False, custom_mapping={torch.ops.fastrnn.gru_layer: lambda *_, **__: 7}) as counter:
        fastrnn.GRU(I, H)(torch.randn(T, B, I))
    assert counter.get_total_flops() == 7


@pytest.mark.parametrize(
    "code",
    [
        "from torch.utils.flop_counter import FlopCounterMode; import fastrnn; mode = FlopCounterMode(display=False)",
        "import fastrnn; from torch.utils.flop_counter import FlopCounterMode; mode = FlopCounterMode(display=False)",
        "from torch.utils.flop_counter import FlopCounterMode; mode = FlopCounterMode(display=False); import fastrnn",
    ],
    ids=["counter-first", "fastrnn-first", "counting-first"],
)
def test_the_first_call_counts_whatever_was_imported_first(code: str) -> None:
    code += "\nimport torch\nwith mode: fastrnn.GRU(3, 5)(torch.zeros(4, 2, 3))\nprint(mode.get_total_flops())"
    assert printed(code) == str(2 * T * B * 3 * H * (I + H))


def test_the_operator_itself_counts_in_inference_mode() -> None:
    code = """
from torch.utils.flop_counter import FlopCounterMode
import fastrnn, torch
with torch.inference_mode(), FlopCounterMode(display=False) as mode:
    weights = torch.zeros(15, 3), torch.zeros(15, 5)
    torch.ops.fastrnn.gru_layer(torch.zeros(4, 2, 3), torch.zeros(1, 2, 5), *weights, *(None,) * 12, False)
print(mode.get_total_flops())
"""
    assert printed(code) == str(2 * T * B * 3 * H * (I + H))
