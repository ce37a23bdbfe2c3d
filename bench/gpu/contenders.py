# SPDX-License-Identifier: BSD-3-Clause
"""Who takes part in a row: torch.nn as it is, in a CUDA graph and without cuDNN; fastrnn by its own choice, in a graph,
and with each of its tiers forced. Used by runner.py.

A contender is made when its turn comes to be checked, so that one that cannot run costs the row nothing but itself.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType

import torch
from torch import Tensor, nn

import fastrnn

from ..check import Outputs
from ..peers import Problem, TorchContender
from .backend import Backend

STOCK = "torch.nn"
STOCK_GRAPH = "torch.nn graph"
STOCK_WITHOUT_CUDNN = "torch.nn no cuDNN"
OURS = "fastrnn"
OURS_GRAPH = "fastrnn graph"
TIERS = ("tier0", "tier1", "tier2")  # what fastrnn.cuda_tier may know
KERNEL = "-> kernel"  # in fastrnn.explain's sentence, where a call takes fastrnn's own code


@dataclass(frozen=True)
class Contender:
    """One that was prepared: its work, once a call, and the outputs of a call."""

    function: Callable[[], object]
    outputs: Callable[[], Outputs]


def to_device(problem: Problem, device: torch.device) -> Problem:
    """The same numbers on a device; lengths stay on the CPU, where pack_padded_sequence wants them."""

    def moved(value: object) -> object:
        if isinstance(value, Tensor):
            return value.to(device)
        if isinstance(value, tuple):
            return tuple(entry.to(device) for entry in value)
        return value

    weights = {name: weight.to(device) for name, weight in problem.weights.items()}
    names = ("x", "state", "d_y", "reset")
    return replace(problem, weights=weights, **{name: moved(getattr(problem, name)) for name in names})


def reference(problem: Problem) -> Outputs:
    """torch.nn's outputs in float64 on the same numbers and the same device."""
    with torch.device(problem.x.device):
        exact = TorchContender("float64", nn, problem.double())
    return exact.outputs()


def makers(backend: Backend, tiers: dict[str, Callable[[], object]]) -> dict[str, Callable[[Problem], Contender]]:
    """A function that prepares each contender, by its name.

    Args:
        backend: the device.
        tiers: fastrnn's ways to compute on this device by name, each a context manager that forces one (`own_tiers`).
    """
    found: dict[str, Callable[[Problem], Contender]] = {
        STOCK: lambda problem: _plain(nn, problem),
        STOCK_GRAPH: lambda problem: _graph(nn, problem, backend),
        STOCK_WITHOUT_CUDNN: lambda problem: _plain(nn, problem, _without_cudnn),
    }
    if tiers:
        found[OURS] = lambda problem: _plain(fastrnn, problem)
        found[OURS_GRAPH] = lambda problem: _graph(fastrnn, problem, backend)
    for name, forced in tiers.items():
        if name:
            found[f"{OURS} {name}"] = lambda problem, forced=forced: _plain(fastrnn, problem, forced)
    return found


def own_tiers(backend: Backend) -> tuple[dict[str, Callable[[], object]], str]:
    """fastrnn's ways to compute on the device, "" being its own choice; none, and the reason, without kernels there."""
    layer = fastrnn.LSTM(8, 8).to(backend.device)
    x = torch.zeros(1, 1, 8, device=backend.device)
    found: dict[str, Callable[[], object]] = {}
    said = _explained(layer, x)
    force = getattr(fastrnn, "cuda_tier", None)
    for name in TIERS if force else ():
        try:
            with force(name):
                forced = _explained(layer, x)
        except ValueError:  # a tier that this version does not have
            continue
        if KERNEL in forced:
            found[name] = functools.partial(force, name)
    if found or KERNEL in said:
        found = {"": contextlib.nullcontext, **found}
    return found, said


def _explained(layer: nn.Module, x: Tensor) -> str:
    with torch.no_grad():
        return fastrnn.explain(layer, x)


def _plain(library: ModuleType, problem: Problem, around: Callable[[], object] = contextlib.nullcontext) -> Contender:
    with torch.device(problem.x.device):
        peer = TorchContender(STOCK, library, problem)
    work = peer.function()
    if around is contextlib.nullcontext:
        return Contender(work, lambda: peer.named(work()))

    def function() -> object:
        with around():
            return work()

    return Contender(function, lambda: peer.named(function()))


def _graph(library: ModuleType, problem: Problem, backend: Backend) -> Contender:
    with torch.device(problem.x.device):
        peer = TorchContender(STOCK_GRAPH, library, problem)
    replay, result = backend.captured(peer.function())

    def outputs() -> Outputs:
        replay()
        return peer.named(result)

    return Contender(replay, outputs)


@contextlib.contextmanager
def _without_cudnn() -> object:
    # torch.backends.cudnn.enabled may be frozen (torch.testing does so), and flags() would set the precision, too.
    torch._C._set_cudnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_cudnn_enabled(True)
