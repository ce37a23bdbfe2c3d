# SPDX-License-Identifier: BSD-3-Clause
"""torch.fx.symbolic_trace of a model that holds fastrnn's modules; modules.py and cells.py ask here."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.fx import Proxy


def as_leaf(module: nn.Module, input: Any, hx: Any, extras: dict[str, Any]) -> Any:
    """The call as one node of the graph that torch.fx is tracing; None if it is not.

    torch's tracers take modules of torch.nn as leaves, which they know by the name of the class's module, and trace
    through the forward of all others: there a proxy has no shape to ask for. What they do for a leaf is done here, so
    that a model can be traced as with torch.nn, and the graph calls the fastrnn module that it holds.
    """
    if not isinstance(input, Proxy):
        return None
    tracer: Any = input.tracer
    arguments = (input,) if hx is None else (input, hx)
    return tracer.create_proxy("call_module", tracer.path_of_module(module), arguments, extras)
