# SPDX-License-Identifier: BSD-3-Clause
"""Twins for the tests of modules and cells: one of fastrnn and one of torch.nn with the same weights, and what a
training step makes of them: every output, every final state, and every gradient under random cotangents."""

from __future__ import annotations

import copy

import torch
from accuracy import assert_accurate, error
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import fastrnn

CELLS = ("lstm", "gru", "rnn_tanh", "rnn_relu")
LAYERS = ("LSTM", "GRU", "RNN")
STEPS = ("LSTMCell", "GRUCell", "RNNCell")
NAMES = LAYERS + STEPS
CLASSES = {"lstm": "LSTM", "gru": "GRU", "rnn_tanh": "RNN", "rnn_relu": "RNN"}


def twins(cell: str, *sizes: int, step: bool = False, seed: int = 0, **options: object) -> tuple[nn.Module, nn.Module]:
    """(ours, torch's), with the same initial weights; step: the class of one step, LSTMCell for LSTM."""
    if cell == "rnn_relu":
        options["nonlinearity"] = "relu"
    name = CLASSES[cell] + ("Cell" if step else "")
    made = []
    for library in (fastrnn, nn):
        torch.manual_seed(seed)
        made.append(getattr(library, name)(*sizes, **options))
    return made[0], made[1]


def both(name: str, *sizes: int, **options: object) -> tuple[nn.Module, nn.Module]:
    """(ours, torch's) from the same seed."""
    made = []
    for library in (fastrnn, nn):
        torch.manual_seed(7)
        made.append(getattr(library, name)(*sizes, **options))
    return made[0], made[1]


def an_input(name: str, features: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(*((2,) if name in STEPS else (4, 2)), features, generator=generator)


def tensors_of(structure: object) -> list[Tensor]:
    """The tensors of an output or argument, in order; of a PackedSequence its data."""
    if isinstance(structure, PackedSequence):
        return [structure.data]
    if isinstance(structure, Tensor):
        return [structure]
    return [tensor for entry in structure or () for tensor in tensors_of(entry)]


def first(output: object) -> Tensor:
    return tensors_of(output)[0]


def like(structure: object, change: object) -> object:
    """The same structure with change(tensor) in place of every tensor."""
    if isinstance(structure, PackedSequence):
        return PackedSequence(change(structure.data), *structure[1:])
    if isinstance(structure, Tensor):
        return change(structure)
    return structure if structure is None else tuple(like(entry, change) for entry in structure)


def random_state(
    cell: str, *lead: int, H: int, P: int = 0, dtype: torch.dtype = torch.float32, seed: int = 3
) -> object:
    """hx for a layer or a cell: h, or (h, c) for an LSTM."""
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(*lead, P or H, generator=generator, dtype=dtype)
    return (h, torch.randn(*lead, H, generator=generator, dtype=dtype)) if cell == "lstm" else h


def training_step(module: nn.Module, x: object, hx: object = None, seed: int = 1) -> dict[str, Tensor]:
    """Outputs and gradients of one call. The arguments are taken as detached leaves; cotangents come from the seed."""
    x, hx = (like(argument, lambda t: t.detach().requires_grad_()) for argument in (x, hx))
    outputs = module(x, hx)
    leaves = {f"d_{name}": tensor for name, tensor in zip(("x", "h0", "c0"), tensors_of((x, hx)), strict=False)}
    leaves |= {f"d_{name}": parameter for name, parameter in module.named_parameters()}
    flat = tensors_of(outputs)
    generator = torch.Generator().manual_seed(seed)
    cotangents = [torch.randn(out.shape, generator=generator).to(out.dtype) for out in flat]
    gradients = torch.autograd.grad(flat, list(leaves.values()), cotangents)
    names = ("y", "h_n", "c_n") if isinstance(module, nn.RNNBase) else ("h", "c")
    results = dict(zip(names, flat, strict=False)) | dict(zip(leaves, gradients, strict=True))
    return {name: tensor.detach() for name, tensor in results.items()}


def assert_as_accurate(ours: nn.Module, theirs: nn.Module, x: object, hx: object = None) -> None:
    """ours has torch's results, and in no output and no gradient more than the rule's share of torch's error.

    Several draws of the cotangents are judged as one: a gradient may be a single number (the bias of one unit, the
    input of one feature), where the sum behind it or torch's rounding errors in it may cancel, and the rule would
    measure luck. Small inputs are quick, and get more draws.
    """
    seeds = range(1, 4 if tensors_of(x)[0].numel() >= 64 else 10)
    exact_module = copy.deepcopy(theirs).double()
    exact_x, exact_hx = (like(argument, lambda t: t.double()) for argument in (x, hx))
    found, peer, exact = (
        _stacked([training_step(module, *arguments, seed=seed) for seed in seeds])
        for module, *arguments in ((ours, x, hx), (theirs, x, hx), (exact_module, exact_x, exact_hx))
    )
    assert found.keys() == peer.keys()
    for name, tensor in found.items():
        if tensor.dtype is torch.float64:
            assert_equal_float64(tensor, exact[name], name)
        else:
            assert_accurate(tensor, peer[name], exact[name], name)


def _stacked(results: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([result[name] for result in results]) for name in results[0]}


def assert_equal_float64(ours: Tensor, theirs: Tensor, name: str) -> None:
    """Two float64 results, neither of which is the truth: 32 * eps * max|result| apart at most."""
    assert ours.shape == theirs.shape, f"{name}: shape {tuple(ours.shape)}, expected {tuple(theirs.shape)}"
    assert ours.dtype == theirs.dtype == torch.float64
    allowed = 32 * torch.finfo(torch.float64).eps * (theirs.abs().max().item() if theirs.numel() else 0.0)
    assert error(ours, theirs) <= allowed, f"{name}: {error(ours, theirs):.3g} apart, allowed {allowed:.3g}"
