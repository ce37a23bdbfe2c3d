# SPDX-License-Identifier: BSD-3-Clause
"""Which code computes a layer on CUDA: cuDNN, through torch.nn's own forward, or a tier of fastrnn's kernels.

choose() is the one place of that decision: a pure function of a description of the call, with the measured ranges
beside it. autograd.py describes a call and asks; users see the answer through explain(), and force one with
cuda_tier() or FASTRNN_CUDA_TIER. Tiers: "tier0", a product and a kernel for each step (docs/cuda.md).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

TIERS = ("auto", "tier0", "cudnn")


class Call(NamedTuple):
    """What choose() looks at."""

    gates: int  # 4 for an LSTM, 3 for a GRU, 1 for an RNN
    dtype: torch.dtype
    units: int  # H
    batch: int  # B; of a packed input its rows, N
    recorded: bool  # a gradient is needed
    training: bool  # what torch.nn's forward would tell cuDNN: without it cuDNN keeps nothing for a backward
    extended: bool = False  # lengths, resets or masks
    compiling: bool = False
    autocast: bool = False
    cudnn: bool = True  # torch.nn would take cuDNN for this dtype
    forced: str = "auto"


@dataclass(frozen=True)
class Range:
    """Calls for which a tier was measured to be faster than cuDNN, on which card the comment beside it says."""

    tier: str
    gates: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    units: tuple[int, int]  # both ends belong to it
    batch: tuple[int, int]
    recorded: tuple[bool, ...] = (False, True)

    def holds(self, call: Call) -> bool:
        return (
            call.gates in self.gates
            and call.dtype in self.dtypes
            and self.units[0] <= call.units <= self.units[1]
            and self.batch[0] <= call.batch <= self.batch[1]
            and call.recorded in self.recorded
        )


# No kernel of fastrnn has run on a card yet: none is taken unasked, and none is known to be faster.
HAS_RUN = False
MEASURED: tuple[Range, ...] = ()


def choose(call: Call, measured: Sequence[Range] = MEASURED, has_run: bool = HAS_RUN) -> tuple[str, str]:
    """The code that computes a layer of ordinary CUDA tensors, and why, as the end of a sentence with "because".

    Args:
        call: what it is.
        measured: where which tier is faster than cuDNN; the first range that holds decides.
        has_run: whether the kernels were ever tested on a card; if not, only those who ask for them get them.
    Returns:
        ("tier0" or "cudnn", reason). "cudnn" stands for torch.nn's own forward, with or without cuDNN.
    """
    if call.forced != "auto":
        return call.forced, f"{call.forced} is forced by fastrnn.cuda_tier or FASTRNN_CUDA_TIER"
    if not has_run:
        return "cudnn", 'fastrnn\'s kernels for CUDA have not run on a card yet; fastrnn.cuda_tier("tier0") takes them'
    if call.autocast:
        return "cudnn", "autocast is on for CUDA"
    if call.extended:
        return "tier0", "torch.nn has no lengths, resets or masks"
    if call.compiling:
        return "tier0", "a compiler takes the operator into its graph, and cuDNN's not"
    if not call.cudnn:
        return "tier0", f"cuDNN is off or does not take {call.dtype}"
    if call.recorded and not call.training:
        return "tier0", "a gradient is needed in eval mode, and cuDNN has no backward there"
    for entry in measured:
        if entry.holds(call):
            return entry.tier, "it was measured to be faster than cuDNN for such calls"
    return "cudnn", "no kernel of fastrnn was measured to be faster than cuDNN for such calls"


def checked(name: str, argument: str = "fastrnn.cuda_tier: tier") -> str:
    """The name, if it is a tier; else ValueError."""
    if name not in TIERS:
        raise ValueError(f"{argument} must be one of {', '.join(TIERS)}, got {name!r}")
    return name


_forced = [checked(os.environ.get("FASTRNN_CUDA_TIER", "auto"), "FASTRNN_CUDA_TIER")]  # the innermost block's last


def forced() -> str:
    """The tier that is forced now, or "auto"."""
    return _forced[-1]


@contextlib.contextmanager
def cuda_tier(tier: str) -> Iterator[None]:
    """Inside the block, layers of CUDA tensors are computed by the code named, in every thread of the process.

    Args:
        tier: "tier0", fastrnn's kernels, which are experimental: needed for a double backward, which cuDNN does not
            have; "cudnn", torch.nn's own forward; "auto", what fastrnn chooses, at present "cudnn".

    Raises:
        ValueError: tier is none of these.

    Calls that the code cannot take go where they go otherwise. CPU tensors are not concerned. The environment variable
    FASTRNN_CUDA_TIER has the same effect on a whole process. `fastrnn.explain` tells what a call takes, and why.
    """
    _forced.append(checked(tier))
    try:
        yield
    finally:
        _forced.pop()


def has_kernels() -> bool:
    """Whether this build of fastrnn has kernels for CUDA."""
    name = "fastrnn::lstm_layer"
    return hasattr(torch.ops.fastrnn, "lstm_layer") and torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")


def cudnn_takes(dtype: torch.dtype) -> bool:
    """Whether torch.nn's recurrent layers use cuDNN for this dtype, here and now; bfloat16 needs cuDNN 9.13."""
    cudnn = torch.backends.cudnn
    if not cudnn.enabled or not cudnn.is_available():
        return False
    return dtype is not torch.bfloat16 or (cudnn.version() or 0) >= 91300
