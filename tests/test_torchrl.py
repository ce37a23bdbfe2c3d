# SPDX-License-Identifier: BSD-3-Clause
"""TorchRL's `is_init` and fastrnn's `reset` are the same flags with the same numbers: outputs, final states, gradients.

TorchRL cuts a rollout into its episodes, pads and packs those, and joins what comes out; while it collects, it calls
the layer once a step. Both are compared with one call of fastrnn. Skipped where torchrl is missing.
"""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from samples import cotangents
from torch import Tensor, nn
from twins import like, tensors_of

import fastrnn

T, B, I, H = 9, 4, 3, 6  # noqa: E741
KINDS = ("LSTM", "GRU")
KEYS = {"LSTM": ("h", "c"), "GRU": ("h",)}


@pytest.fixture(scope="module")
def torchrl() -> ModuleType:
    pytest.importorskip("torchrl", reason="torchrl is not installed")
    pytest.importorskip("tensordict", reason="tensordict is not installed")
    import torchrl.modules

    return torchrl.modules


def flags(first: bool) -> Tensor:
    """[T, B]; the first row has no beginning within the rollout, the last has one at every step."""
    begins = torch.rand(T, B, generator=torch.Generator().manual_seed(1)) < 0.4
    begins[1:, 0] = False
    begins[1:, -1] = True
    begins[0] = torch.tensor([first, True, False, first])
    return begins


def layers(kind: str, **options: object) -> tuple[nn.Module, nn.Module]:
    """(ours, torch's), batch first as TorchRL has it, from the same seed."""
    made = []
    for library in (fastrnn, nn):
        torch.manual_seed(0)
        made.append(getattr(library, kind)(I, H, batch_first=True, dtype=torch.float64, **options))
    return made[0], made[1]


def wrapped(torchrl: ModuleType, kind: str, module: nn.Module) -> nn.Module:
    keys = {"in_keys": ["x", *KEYS[kind]], "out_keys": ["y", *(("next", key) for key in KEYS[kind])]}
    return getattr(torchrl, f"{kind}Module")(**{kind.lower(): module}, **keys)


def rollout(kind: str, x: Tensor, begins: Tensor, hx: object, fresh: object) -> object:
    """A rollout as TorchRL stores it, [B, T]: each step with the state that it is to begin with where it is a first
    one; hx, [L, B, H], at step 0, elsewhere `fresh`, which is what a reset of an environment leaves."""
    from tensordict import TensorDict

    entries = {"x": x, "is_init": begins.T.unsqueeze(-1)}
    for key, first, other in zip(KEYS[kind], tensors_of(hx), tensors_of(fresh), strict=True):
        start = torch.where(begins[0][:, None], other, first)
        steps = torch.stack([start, *(other,) * (T - 1)])  # [T, L, B, H]
        entries[key] = steps.permute(2, 0, 1, 3)
    return TensorDict(entries, batch_size=[B, T])


def results(outputs: object, wanted: list[Tensor]) -> list[Tensor]:
    found = tensors_of(outputs)
    gradients = torch.autograd.grad(found, wanted, cotangents(found))
    return [out.detach() for out in found] + list(gradients)


def states(kind: str, num_layers: int, seed: int) -> object:
    torch.manual_seed(seed)
    made = tuple(torch.randn(num_layers, B, H, dtype=torch.float64) for _ in KEYS[kind])
    return made if kind == "LSTM" else made[0]


@pytest.mark.parametrize("fresh", ["zeros", "state"])
@pytest.mark.parametrize("first", [False, True], ids=["goes_on", "begins"])
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_is_init_of_a_rollout_is_reset(torchrl, compiled, kind, num_layers, first, fresh):
    ours, theirs = layers(kind, num_layers=num_layers)
    begins = flags(first)
    x = torch.randn(B, T, I, dtype=torch.float64, requires_grad=True)
    hx, other = (like(states(kind, num_layers, seed), lambda t: t.requires_grad_()) for seed in (3, 4))
    if fresh == "zeros":
        other = like(other, lambda t: torch.zeros_like(t))
    leaves = [x, *tensors_of(hx), *(tensors_of(other) if fresh == "state" else ())]

    state = other if fresh == "state" else None
    expected = results(ours(x, hx, reset=begins.T, reset_state=state), [*leaves, *ours.parameters()])
    module = wrapped(torchrl, kind, theirs)
    with torchrl.set_recurrent_mode(True):
        done = module(rollout(kind, x, begins, hx, other))
    ends = [done["next", key][:, -1].transpose(0, 1) for key in KEYS[kind]]
    found = results([done["y"], *ends], [*leaves, *theirs.parameters()])
    for one, two in zip(expected, found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_is_init_of_a_collector_is_reset(torchrl, compiled, kind):
    """Step by step, as environments are run: fastrnn's module inside TorchRL's gives the bits of one call."""
    from tensordict import TensorDict

    ours, theirs = layers(kind, num_layers=2)
    begins, x = flags(False), torch.randn(B, T, I, dtype=torch.float64)
    hx = states(kind, 2, 3)
    with torch.no_grad():
        whole, last = ours(x, hx, reset=begins.T)
        for layer, exact in ((ours, True), (theirs, False)):
            module = wrapped(torchrl, kind, layer)
            now = dict(zip(KEYS[kind], [state.transpose(0, 1) for state in tensors_of(hx)], strict=True))
            steps = []
            for t in range(T):
                entries = {"x": x[:, t], "is_init": begins[t][:, None], **now}
                done = module(TensorDict(entries, batch_size=[B]))
                steps.append(done["y"])
                now = {key: done["next", key] for key in KEYS[kind]}
            found = [torch.stack(steps, dim=1), *(now[key].transpose(0, 1) for key in KEYS[kind])]
            for one, two in zip([whole, *tensors_of(last)], found, strict=True):
                if exact:
                    assert torch.equal(one, two)
                else:
                    torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_module_of_torchrl_takes_ours_and_learns_the_same(torchrl, compiled, kind):
    """Inside TorchRL's module ours is called with the packed episodes, on the kernels."""
    ours, theirs = layers(kind)
    begins, hx = flags(False), states(kind, 1, 3)
    found = []
    for layer in (ours, theirs):
        x = torch.randn(B, T, I, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).requires_grad_()
        with torchrl.set_recurrent_mode(True):
            done = wrapped(torchrl, kind, layer)(rollout(kind, x, begins, hx, like(hx, torch.zeros_like)))
        found.append(results([done["y"]], [x, *layer.parameters()]))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)
