# SPDX-License-Identifier: BSD-3-Clause
"""The way to the kernels: which rung of the ladder a call takes, and through which door; called by functional.py,
stack.py and cells.py. What the dispatcher knows of the operators is registered in registration.py.

The ladder: "kernel" for ordinary CPU tensors, also under vmap, grad and vjp of torch.func; "reference" (reference.py)
under forward-mode AD, for which the operators have no derivative; "torch" (torch.nn's own forward, which the caller
runs) for whatever the kernels do not take.

The doors of the kernel rung, all to the same C++ function. Times of a call with T = 1, B = 1, H = 64 (see
docs/architecture.md) are why there are three:
- no gradient needed: pybind11, directly;
- gradient needed: pybind11 again, to an autograd function in C++ (csrc/derivative.cpp);
- torch.func: transforms.py, which ends in torch.ops.fastrnn; vmap alone ends in the first two;
- torch.compile, torch.export, or a dispatch mode that wants to see operators: torch.ops.fastrnn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, is_autocast_enabled, is_grad_enabled
from torch.autograd import forward_ad
from torch.compiler import is_compiling, is_exporting

from . import extension, flops, onnx_export, tiers
from . import registration as _registration  # noqa: F401  (importing it tells the dispatcher of the operators)
from .batching import only_vmap_active, through_vmap
from .operators import GRU, LSTM, RNN, Operator, needs_reference, transforms_active
from .transforms import TransformedLayer

_C: Any = extension.module
_CUDA_KERNELS = tiers.has_kernels()  # Dynamo cannot ask the dispatcher

# Bound once: an attribute look-up through torch._C costs as much as the call.
_any_requires_grad = torch._C._any_requires_grad
_dispatch_modes = torch._C._len_torch_dispatch_stack
_functorch_active = torch._C._are_functorch_transforms_active
_tracing_state = torch._C._get_tracing_state

_PLAIN = frozenset((Tensor, torch.nn.Parameter))
_DTYPES = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))
_STRIDED = torch.strided


def route(tensors: Sequence[Tensor | None]) -> str:
    """The rung that a layer with these tensors takes: "kernel", "reference" or "torch". Called once per layer call.

    Args:
        tensors: every tensor of the call, input, states and weights; None stands for one that does not exist.
    """
    if _C is None:
        return "torch"
    compiling = is_compiling()
    if is_autocast_enabled("cpu") or (not compiling and _tracing_state() is not None):
        return "torch"
    if compiling or not _C.is_ordinary(tensors):  # in C++, .2 us instead of 1.5
        dtype = None
        for tensor in tensors:
            if tensor is None:
                continue
            if type(tensor) not in _PLAIN and not compiling:  # a compiler calls with tensors of its own classes
                return "torch"
            if tensor.dtype is not dtype:
                if dtype is not None or tensor.dtype not in _DTYPES:
                    return "torch"
                dtype = tensor.dtype
            if not tensor.is_cpu or tensor.layout is not _STRIDED or tensor.is_nested:
                return "torch"
    return "reference" if needs_reference() else "kernel"


def cuda_route(
    tensors: Sequence[Tensor | None],
    gates: int,
    units: int,
    batch: int,
    training: bool = True,
    extended: bool = False,
) -> tuple[str, str]:
    """The rung of a layer whose input is on CUDA, for which route() says "torch", and why: "kernel", or "torch" still.

    tiers.choose() decides where the kernels take the tensors. Not for the cells, of which torch.nn has a kernel.

    Args:
        tensors: as for route(), x first.
        gates, units, batch: 4, 3 or 1; H; B.
        training: what torch.nn's forward would tell cuDNN.
        extended: the call has lengths, resets or masks.
    """
    if not _takes_cuda(tensors):
        return "torch", _refusal(tensors)
    x = tensors[0]
    assert x is not None
    call = tiers.Call(
        gates=gates,
        dtype=x.dtype,
        units=units,
        batch=batch,
        recorded=is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors),
        training=training,
        extended=extended,
        compiling=is_compiling(),
        autocast=is_autocast_enabled("cuda"),
        cudnn=is_compiling() or tiers.cudnn_takes(x.dtype),
        forced=tiers.forced(),
    )
    tier, why = tiers.choose(call)
    return ("torch", why) if tier == "cudnn" else ("kernel", f"{tier}, because {why}")


def _takes_cuda(tensors: Sequence[Tensor | None]) -> bool:
    """Whether the kernels for CUDA exist and take these tensors: ordinary ones, of one device and one dtype."""
    x = tensors[0]
    if _C is None or not isinstance(x, Tensor) or not x.is_cuda or not _CUDA_KERNELS or x.dtype not in _DTYPES:
        return False
    compiling = is_compiling()
    if needs_reference() or (not compiling and (_tracing_state() is not None or transforms_active())):
        return False
    return all(
        isinstance(tensor, Tensor)
        and (compiling or type(tensor) in _PLAIN)
        and tensor.device == x.device
        and tensor.dtype is x.dtype
        and tensor.layout is _STRIDED
        and not tensor.is_nested
        for tensor in tensors
        if tensor is not None
    )


def explain_route(tensors: Sequence[Tensor | None]) -> str:
    """The decision of route() in a sentence.

    Args:
        tensors: as for route().
    """
    rung = route(tensors)
    if rung == "kernel":
        return f"kernel: fastrnn's own, {_C.isa()}"
    if rung == "reference":
        return "reference: plain PyTorch (fastrnn.reference), because forward-mode AD is active"
    return f"torch: torch.nn's own forward, because {_refusal(tensors)}"


def _refusal(tensors: Sequence[Tensor | None]) -> str:
    """Why route() says "torch"."""
    if _C is None:
        return f"the extension is not loaded: {extension.reason}"
    if is_autocast_enabled("cpu"):
        return "autocast is on for the CPU"
    if not is_compiling() and _tracing_state() is not None:
        return "torch.jit.trace is running"
    given = [tensor for tensor in tensors if tensor is not None]
    for tensor in given:
        if not isinstance(tensor, Tensor):
            return f"an argument is a {type(tensor).__name__}, not a Tensor"
        if not tensor.is_cpu:
            kernels = "these are not built for CUDA" if tensor.is_cuda else "the kernels are for the CPU"
            return f"a tensor is on {tensor.device} and {kernels}"
        if tensor.layout is not _STRIDED:
            return f"a tensor has the layout {tensor.layout}"
        if tensor.is_nested:
            return "a tensor is nested"
        if type(tensor) not in _PLAIN and not is_compiling():
            return f"a tensor is a {type(tensor).__name__}, a subclass of Tensor"
    dtypes = {tensor.dtype for tensor in given}
    odd = dtypes - _DTYPES
    return f"a tensor is {odd.pop()}" if odd else f"the tensors mix {' and '.join(sorted(map(str, dtypes)))}"


def _other_door(
    operator: Operator,
    tensors: tuple[Tensor | None, ...],
    batch_sizes: Tensor | None,
    *options: bool,
    recompute: bool = False,
) -> Any:
    """The reference under forward-mode AD or without the extension; else the operator, for torch.func, a compiler or a
    mode. While torch.onnx exports, ONNX's own operator."""
    if is_exporting() and torch.onnx.is_in_onnx_export():  # the first test saves the import of torch.onnx
        return onnx_export.layer(operator, tensors, batch_sizes, options)
    if _C is None or needs_reference():
        return operator.reference(*tensors, batch_sizes, *options)
    wanted = is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    save = wanted and not recompute
    arguments = (*tensors, *operator.extras(batch_sizes), *options, save)
    if _functorch_active() and not is_compiling():
        if only_vmap_active():
            layer = globals()[operator.name]  # of this module: it takes a door of its own, below the vmap
            return through_vmap(operator, layer, tensors, batch_sizes, options)
        outputs = TransformedLayer.apply(*arguments, operator)  # type: ignore[no-untyped-call]
        return outputs[: operator.results]
    if not is_compiling():
        flops.tell_counters()
    return operator.overload(*arguments)[: operator.results]


# The three functions below are the hot path of a call with T = 1: no helper is called and nothing is packed before the
# last line. The order of the first test matters to Dynamo, which can trace is_compiling() alone.


def lstm_layer(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    w_ih_reverse: Tensor | None,
    w_hh_reverse: Tensor | None,
    b_ih_reverse: Tensor | None,
    b_hh_reverse: Tensor | None,
    w_hr_reverse: Tensor | None,
    batch_sizes: Tensor | None,
    *,
    recompute: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """One LSTM layer with its directions, for tensors that route() did not send to torch.

    Args:
        x: [T, B, I], or [N, I] if batch_sizes is given.
        h0: [D, B, R].
        c0: [D, B, H].
        w_ih: [4*H, I]; w_hh: [4*H, R]; b_ih, b_hh: [4*H] or None; w_hr: [P, H] or None; likewise _reverse, or None.
        batch_sizes: CPU int64 [T], or None.
        recompute: keep nothing for the backward, which runs the forward once more.
    Returns:
        y: [T, B, D*R] or [N, D*R]. h_n: [D, B, R]. c_n: [D, B, H].
    """
    # fmt: off
    if (
        is_compiling() or _C is None or _dispatch_modes() or _functorch_active()
        or forward_ad._current_level >= 0 or not x.is_cpu
    ):
        return _other_door(
            LSTM, (x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr,
                   w_ih_reverse, w_hh_reverse, b_ih_reverse, b_hh_reverse, w_hr_reverse), batch_sizes,
            recompute=recompute,
        )
    if is_grad_enabled() and _any_requires_grad(
        w_ih, w_hh, x, h0, c0, b_ih, b_hh, w_hr,
        w_ih_reverse, w_hh_reverse, b_ih_reverse, b_hh_reverse, w_hr_reverse,
    ):
        return _C.lstm_layer_with_gradient(
            x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr,
            w_ih_reverse, w_hh_reverse, b_ih_reverse, b_hh_reverse, w_hr_reverse,
            None, batch_sizes, None, None, None, None, None, None, not recompute,
        )
    return _C.lstm_layer(
        x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr,
        w_ih_reverse, w_hh_reverse, b_ih_reverse, b_hh_reverse, w_hr_reverse,
        None, batch_sizes, None, None, None, None, None, None, False,
    )[:3]
    # fmt: on


def gru_layer(
    x: Tensor,
    h0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_ih_reverse: Tensor | None,
    w_hh_reverse: Tensor | None,
    b_ih_reverse: Tensor | None,
    b_hh_reverse: Tensor | None,
    batch_sizes: Tensor | None,
    *,
    recompute: bool = False,
) -> tuple[Tensor, Tensor]:
    """One GRU layer with its directions, for tensors that route() did not send to torch.

    Args:
        x: [T, B, I], or [N, I] if batch_sizes is given.
        h0: [D, B, H].
        w_ih: [3*H, I]; w_hh: [3*H, H]; b_ih, b_hh: [3*H] or None; likewise _reverse, or None.
        batch_sizes: CPU int64 [T], or None.
        recompute: keep nothing for the backward, which runs the forward once more.
    Returns:
        y: [T, B, D*H] or [N, D*H]. h_n: [D, B, H].
    """
    # fmt: off
    if (
        is_compiling() or _C is None or _dispatch_modes() or _functorch_active()
        or forward_ad._current_level >= 0 or not x.is_cpu
    ):
        return _other_door(
            GRU, (x, h0, w_ih, w_hh, b_ih, b_hh,
                  w_ih_reverse, w_hh_reverse, b_ih_reverse, b_hh_reverse), batch_sizes,
            recompute=recompute,
        )
    if is_grad_enabled() and _any_requires_grad(
        w_ih, w_hh, x, h0, b_ih, b_hh, w_ih_reverse, w_hh_reverse, b_ih_reverse, b_hh_reverse,
    ):
        return _C.gru_layer_with_gradient(
            x, h0, w_ih, w_hh, b_ih, b_hh, w_ih_reverse, w_hh_reverse, b_ih_reverse, b_hh_reverse,
            None, batch_sizes, None, None, None, None, not recompute,
        )
    return _C.gru_layer(
        x, h0, w_ih, w_hh, b_ih, b_hh, w_ih_reverse, w_hh_reverse, b_ih_reverse, b_hh_reverse,
        None, batch_sizes, None, None, None, None, False,
    )[:2]
    # fmt: on


def rnn_layer(
    x: Tensor,
    h0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_ih_reverse: Tensor | None,
    w_hh_reverse: Tensor | None,
    b_ih_reverse: Tensor | None,
    b_hh_reverse: Tensor | None,
    batch_sizes: Tensor | None,
    relu: bool,
    *,
    recompute: bool = False,
) -> tuple[Tensor, Tensor]:
    """One Elman RNN layer with its directions, for tensors that route() did not send to torch.

    Args:
        x: [T, B, I], or [N, I] if batch_sizes is given.
        h0: [D, B, H].
        w_ih: [H, I]; w_hh: [H, H]; b_ih, b_hh: [H] or None; likewise _reverse, or None.
        batch_sizes: CPU int64 [T], or None.
        relu: max(0, .) instead of tanh.
        recompute: keep nothing for the backward, which runs the forward once more.
    Returns:
        y: [T, B, D*H] or [N, D*H]. h_n: [D, B, H].
    """
    # fmt: off
    if (
        is_compiling() or _C is None or _dispatch_modes() or _functorch_active()
        or forward_ad._current_level >= 0 or not x.is_cpu
    ):
        return _other_door(
            RNN, (x, h0, w_ih, w_hh, b_ih, b_hh,
                  w_ih_reverse, w_hh_reverse, b_ih_reverse, b_hh_reverse), batch_sizes, relu,
            recompute=recompute,
        )
    if is_grad_enabled() and _any_requires_grad(
        w_ih, w_hh, x, h0, b_ih, b_hh, w_ih_reverse, w_hh_reverse, b_ih_reverse, b_hh_reverse,
    ):
        return _C.rnn_layer_with_gradient(
            x, h0, w_ih, w_hh, b_ih, b_hh, w_ih_reverse, w_hh_reverse, b_ih_reverse, b_hh_reverse,
            None, batch_sizes, None, None, None, None, relu, not recompute,
        )
    return _C.rnn_layer(
        x, h0, w_ih, w_hh, b_ih, b_hh, w_ih_reverse, w_hh_reverse, b_ih_reverse, b_hh_reverse,
        None, batch_sizes, None, None, None, None, relu, False,
    )
    # fmt: on
