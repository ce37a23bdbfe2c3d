# SPDX-License-Identifier: BSD-3-Clause
"""What counts as the right numbers, and a short check of every cell. Used by runner.py and __main__.py."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import fastrnn

Outputs = Mapping[str, Tensor]  # "y", "h_n", "c_n", and "d_x", "d_weight_ih_l0", ... where a gradient was taken


class WrongNumbersError(RuntimeError):
    """An output lies further from float64 than the rule allows."""


def distance(value: Tensor, reference: Tensor) -> float:
    """The largest absolute difference; infinite where shapes differ, or where a value is not a number."""
    if value.shape != reference.shape:
        return float("inf")
    if value.numel() == 0:
        return 0.0
    largest = (value.double() - reference).abs().max().item()
    return largest if largest == largest else float("inf")


def worst_excess(ours: Outputs, stock: Outputs, reference: Outputs) -> tuple[float, str]:
    """The largest error as a fraction of what is allowed, and the name of the output that has it.

    The rule: error(ours) <= 2 * error(torch, same dtype) + 4 * eps * max|reference|, both against float64. In float64
    the reference is torch's own result, whose error is then hidden: there 1000 * eps * max|reference| is allowed.
    """
    if ours.keys() != reference.keys():
        return float("inf"), "the names " + ", ".join(sorted(ours.keys() ^ reference.keys()))
    worst, where = 0.0, next(iter(reference))
    for name, exact in reference.items():
        ulps = 1000 if ours[name].dtype == torch.float64 else 4
        floor = ulps * torch.finfo(ours[name].dtype).eps * (exact.abs().max().item() if exact.numel() else 0.0)
        allowed = 2 * distance(stock[name], exact) + floor
        error = distance(ours[name], exact)
        excess = error / allowed if allowed else (0.0 if error == 0 else float("inf"))
        if not excess <= worst:
            worst, where = excess, name
    return worst, where


@dataclass(frozen=True)
class Case:
    """One row of the short check: a module by its torch.nn name and arguments, on a padded or ragged batch."""

    name: str
    kind: str
    arguments: dict[str, int | bool | str]
    ragged: bool = False


def _cases() -> Iterator[Case]:
    kinds: list[tuple[str, str, dict[str, int | bool | str]]] = [
        ("lstm", "LSTM", {}),
        ("lstm with projection", "LSTM", {"proj_size": 11}),
        ("gru", "GRU", {}),
        ("rnn tanh", "RNN", {}),
        ("rnn relu", "RNN", {"nonlinearity": "relu"}),
    ]
    for name, kind, arguments in kinds:
        yield Case(name, kind, arguments)
        yield Case(name + ", 2 layers, both ways", kind, {**arguments, "num_layers": 2, "bidirectional": True})
        yield Case(name + ", packed", kind, arguments, ragged=True)
    for name, kind, arguments in kinds:
        if "proj_size" not in arguments:
            yield Case(name + ", one step", kind + "Cell", arguments)


def _everything(module: nn.Module, x: Tensor, lengths: Tensor | None) -> Outputs:
    """Outputs, final states and every gradient of the sum of all of them under random cotangents."""
    x = x.clone().requires_grad_()
    if isinstance(module, nn.RNNCellBase):
        state = module(x[0])
        names, values = ("h", "c"), ()
    else:
        y, state = module(x if lengths is None else pack_padded_sequence(x, lengths, enforce_sorted=False))
        names, values = ("y", "h_n", "c_n"), (y if lengths is None else y.data,)
    states = state if isinstance(state, tuple) else (state,)
    outputs = dict(zip(names, (*values, *states), strict=False))
    generator = torch.Generator().manual_seed(1)
    weighted = [torch.randn(value.shape, generator=generator, dtype=torch.float64) for value in outputs.values()]
    torch.autograd.backward(list(outputs.values()), [w.to(x.dtype) for w in weighted])
    outputs |= {"d_x": x.grad, **{"d_" + name: parameter.grad for name, parameter in module.named_parameters()}}
    return {name: value.detach() for name, value in outputs.items() if value is not None}


def check_case(case: Case, dtype: torch.dtype) -> tuple[float, str]:
    """worst_excess of one case at T=9, B=5, I=19, H=33."""
    torch.manual_seed(0)
    stock = getattr(nn, case.kind)(19, 33, dtype=dtype, **case.arguments)
    exact = getattr(nn, case.kind)(19, 33, dtype=torch.float64, **case.arguments)
    ours = getattr(fastrnn, case.kind)(19, 33, dtype=dtype, **case.arguments)
    exact.load_state_dict(stock.state_dict())
    ours.load_state_dict(stock.state_dict())
    x = torch.randn(9, 5, 19, dtype=dtype)
    lengths = torch.tensor([4, 9, 1, 6, 6]) if case.ragged else None
    runs = [_everything(module, value, lengths) for module, value in ((ours, x), (stock, x), (exact, x.double()))]
    return worst_excess(*runs)


def short_check() -> list[dict[str, str | float]]:
    """Every case in float32 and float64, as rows for the report: name, dtype, worst (<= 1 is right), output."""
    rows: list[dict[str, str | float]] = []
    for case in _cases():
        for dtype in (torch.float32, torch.float64):
            worst, output = check_case(case, dtype)
            dtype_name = str(dtype).removeprefix("torch.")
            rows.append({"name": case.name, "dtype": dtype_name, "worst": worst, "output": output})
    return rows
