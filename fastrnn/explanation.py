# SPDX-License-Identifier: BSD-3-Clause
"""explain(): which way a module's call takes, kernel or not, and why; for users."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from . import autograd


def explain(module: nn.Module, input: Tensor | PackedSequence, hx: Any = None) -> str:
    """Says in one sentence what computes module(input, hx) here and now; nothing is computed.

    Args:
        module: a fastrnn.LSTM, GRU, RNN or one of their cells. A stock torch.nn module is explained too.
        input: as the module would be called with.
        hx: the initial state, or None.

    Returns:
        "<class> -> kernel: ...", "<class> -> reference: ..." or "<class> -> torch: ...", and the reason. On the kernel
        rung also whether the call records a gradient.

    Raises:
        TypeError: module is none of these.
    """
    fsdp = _fsdp_module()  # fully_shard puts classes of its own in front of the module's
    sharded = isinstance(module, fsdp)
    kind = next(base for base in type(module).__mro__ if not issubclass(base, fsdp))
    name = f"{kind.__module__.split('.')[0]}.{kind.__name__}"
    if not isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        raise TypeError(f"fastrnn.explain: module must be an LSTM, GRU or RNN, or a cell, got {name}")
    if not any(base.__module__.split(".")[0] == __package__ for base in type(module).__mro__):
        return f"{name} -> torch: it is torch.nn's own class; fastrnn has one of the same name"
    tensors = [input.data if isinstance(input, PackedSequence) else input, *_states(hx), *_weights(module)]
    sentence = autograd.explain_route(tensors)
    if sharded and "DTensor" in sentence:
        sentence += "; during a call fully_shard gathers them into plain ones: explain between unshard() and reshard()"
    elif sentence.startswith("kernel"):
        recorded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
        sentence += ", with gradient" if recorded else ", without gradient"
    return f"{name} -> {sentence}"


def _fsdp_module() -> type | tuple[()]:
    """The class of modules that fully_shard was applied to; no class where torch.distributed was never asked for it."""
    return getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())


def _states(hx: Any) -> list[Any]:
    return list(hx) if isinstance(hx, (tuple, list)) else [hx]


def _weights(module: nn.Module) -> list[Tensor | None]:
    """The weights as a call would read them now, by name: they may be parametrized or replaced."""
    if isinstance(module, nn.RNNBase):
        names = module._flat_weights_names
    else:
        names = ["weight_ih", "weight_hh", "bias_ih", "bias_hh"]
    return [getattr(module, name) for name in names]
