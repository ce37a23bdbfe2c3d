# SPDX-License-Identifier: BSD-3-Clause
"""One layer with lengths, resets or masks: which rung it takes and through which door; autograd.py's counterpart for
the calls that have such extras. Called by functional.py and sequences.py.

The rungs: the kernels where they take the tensors; else extras.reference_layer(), since torch.nn has none of this.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling, is_exporting

from . import autograd, extension, flops, onnx_export
from .derivatives import extended_backward
from .extras import Extras
from .operators import Operator, extended_needs_reference, transforms_active

_C: Any = extension.module
_dispatch_modes = torch._C._len_torch_dispatch_stack


class _ExtendedLayer(torch.autograd.Function):
    """The eager door with gradient for masks and for c at every step; lengths and resets have csrc/derivative.cpp.

    apply(operator, keep, all_cells, *tensors, *extras, *options) gives y, the final states and, for an LSTM, c at every
    step. keep: what the backward needs, which otherwise runs the forward once more; c at every step is then empty
    unless all_cells asks for it.
    """

    @staticmethod
    def forward(ctx: Any, operator: Operator, keep: bool, all_cells: bool, *arguments: Any) -> tuple[Tensor, ...]:
        given = len(arguments) - operator.options
        outputs = getattr(_C, operator.name)(*arguments, keep or all_cells)
        found = (outputs[0], *outputs[operator.results :])
        ctx.save_for_backward(*arguments[:given], *(found if keep else (None,) * len(found)))
        ctx.set_materialize_grads(False)
        ctx.operator, ctx.options = operator, arguments[given:]
        return *outputs[: operator.results], *outputs[operator.results + 1 :]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        operator, saved, needed = ctx.operator, ctx.saved_tensors, ctx.needs_input_grad[3:]
        found = extended_backward(operator, saved, ctx.options, gradients, needed, direct=True)
        return None, None, None, *found, *(None,) * operator.options


def layer(
    operator: Operator,
    tensors: Sequence[Tensor | None],
    batch_sizes: Tensor | None,
    extras: Extras,
    options: Sequence[bool] = (),
    all_cells: bool = False,
    recompute: bool = False,
) -> tuple[Tensor, ...]:
    """One layer with its directions, on whatever rung fits the tensors.

    Args:
        operator: of the cell.
        tensors: x, the initial states, the weights of two directions, in the order of the operator.
        batch_sizes: CPU int64 [T], or None.
        extras: see Extras; checked by the caller as far as shapes go.
        options: of the operator.
        all_cells: whether c at every step is wanted, of an LSTM.
        recompute: keep nothing for the backward, which runs the forward once more.
    Returns:
        y, the final states and, if all_cells, c at every step: [D, T*B, H] or [D, N, H] in x's dtype.
    """
    if (
        is_exporting()
        and torch.onnx.is_in_onnx_export()
        and not all_cells
        and not any(extra is not None for extra in extras[1:])
    ):  # the first test saves the import of torch.onnx; what else there is the operator refuses
        return onnx_export.layer(operator, tensors, batch_sizes, options, extras.lengths)
    x = tensors[0]
    if x is not None and x.is_cpu and torch.is_autocast_enabled("cpu"):
        with torch.autocast("cpu", enabled=False):
            lower = [lowered(tensor) for tensor in tensors]
            extras = Extras(*extras[:2], *(lowered(tensor) for tensor in extras[2:]))
            return layer(operator, lower, batch_sizes, extras, options, all_cells, recompute)
    arguments = extras.arguments(operator.gates == 4, batch_sizes)
    results = operator.results
    everything = (*tensors, *extras[2:])
    rung = autograd.route(everything)
    if rung == "torch" and x is not None and x.is_cuda:
        w_hh = tensors[results + 1]
        assert w_hh is not None
        sizes = (operator.gates, w_hh.shape[0] // operator.gates, x.shape[-2])
        rung, _ = autograd.cuda_route(everything, *sizes, extended=True)
    if rung != "kernel" or _C is None or x is None or extended_needs_reference():
        check_range(operator, tensors[0], extras.lengths)
        found = operator.extended_reference(tensors, arguments, options)
        return found if all_cells else found[:results]
    recorded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*tensors, *extras[2:4]))
    if is_compiling() or _dispatch_modes() or transforms_active() or not x.is_cpu:
        if not is_compiling():
            flops.tell_counters()
        outputs = operator.overload(*tensors, *arguments, *options, (recorded and not recompute) or all_cells)
        found = (*outputs[:results], *outputs[results + 1 :])
    elif recorded and not all_cells and extras[4:] == (None, None, None):
        return getattr(_C, f"{operator.name}_with_gradient")(*tensors, *arguments, *options, not recompute)
    elif recorded:
        found = _ExtendedLayer.apply(  # type: ignore[no-untyped-call]
            operator, not recompute, all_cells, *tensors, *arguments, *options
        )
    else:
        outputs = getattr(_C, operator.name)(*tensors, *arguments, *options, all_cells)
        found = (*outputs[:results], *outputs[results + 1 :])
    if not all_cells:
        return tuple(found[:results])
    return *found[:results], found[results].to(found[0].dtype)


def autocast_on(device: torch.device) -> bool:
    """Whether autocast is on for the device, so that dtypes may be mixed."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def lowered(tensor: Tensor | None) -> Tensor | None:
    """A tensor as autocast hands it to torch.nn's layers: in its dtype, but float64 stays."""
    if tensor is None or tensor.dtype is torch.float64 or not tensor.is_floating_point():
        return tensor
    return tensor.to(torch.get_autocast_dtype("cpu"))


def side_by_side(cells: Tensor, y: Tensor) -> Tensor:
    """c at every step in the form of y: [D, T*B, H] -> [T, B, D*H], or [D, N, H] -> [N, D*H]. A copy: the derivative
    reads the original, which a program shall not change."""
    return torch.cat(tuple(cells), dim=-1).view(*y.shape[:-1], cells.shape[0] * cells.shape[2])


def given(
    function: str,
    x: Tensor,
    states: Sequence[Tensor],
    batch_sizes: Tensor | None,
    lengths: Any,
    reset: Any,
    reset_state: Any,
    h_mask: Any,
    zoneouts: Sequence[Any],
) -> Extras:
    """The extras of one layer, checked.

    Args:
        function: as messages name it.
        x: [T, B, I], or [N, I] if batch_sizes is given.
        states: the initial ones, [D, B, R] and for an LSTM [D, B, H].
        batch_sizes: or None.
        lengths, reset, reset_state, h_mask: as functional.lstm has them.
        zoneouts: zoneout_h and for an LSTM zoneout_c.
    """
    packed = batch_sizes is not None
    D, B, R = states[0].shape
    if lengths is not None:
        check_lengths(function, lengths, B, x.device, packed)
    replacements: tuple[Any, ...] = (None, None)
    if reset is not None:
        check_reset(function, reset, "[T, B]", tuple(x.shape[:2]), x.device, packed)
        if reset_state is not None:
            replacements = reset_state if len(states) == 2 else (reset_state, None)
            if not isinstance(replacements, (tuple, list)) or len(replacements) != 2:
                got = type(reset_state).__name__
                raise TypeError(f"fastrnn.{function}: reset_state must be a pair (h, c), got {got}")
            for k, (tensor, state) in enumerate(zip(replacements, states, strict=False)):
                name = f"reset_state[{k}]" if len(states) == 2 else "reset_state"
                letters = f"[D, B, {'RH'[k]}]"
                check_operand(function, name, tensor, letters, tuple(state.shape), x, mask=False)
    elif reset_state is not None:
        raise ValueError(f"fastrnn.{function}: reset_state is given without reset")
    if h_mask is not None:
        check_operand(function, "h_mask", h_mask, "[D, B, R]", (D, B, R), x, mask=True)
    for name, tensor, state, letter in zip(("zoneout_h", "zoneout_c"), zoneouts, states, "RH", strict=False):
        if tensor is not None:
            letters = f"[N, D*{letter}]" if packed else f"[T, B, D*{letter}]"
            shape = (*x.shape[:-1], D * state.shape[2])
            check_operand(function, name, tensor, letters, shape, x, mask=True)
    zoneout_h, zoneout_c = (*zoneouts, None)[:2]
    return Extras(lengths, reset, replacements[0], replacements[1], h_mask, zoneout_h, zoneout_c)


def check_range(operator: Operator, x: Tensor | None, lengths: Tensor | None) -> None:
    """What the kernel looks at by itself: lengths are from 0 to T. On another device nobody waits to see it."""
    if lengths is None or x is None or not lengths.is_cpu or is_compiling() or transforms_active():
        return
    if lengths.numel() and (int(lengths.min()) < 0 or int(lengths.max()) > x.shape[0]):
        got = lengths.tolist()
        raise RuntimeError(f"fastrnn.{operator.name}: lengths must be from 0 to T = {x.shape[0]}, got {got}")


def check_lengths(function: str, lengths: Any, batch: int, device: torch.device, packed: bool) -> None:
    """Raises TypeError or ValueError where lengths is not what a batch of so many sequences takes."""
    if not isinstance(lengths, Tensor):
        raise TypeError(f"fastrnn.{function}: lengths must be a Tensor, got {type(lengths).__name__}")
    if packed:
        raise ValueError(f"fastrnn.{function}: lengths go with a padded input, got a PackedSequence, which has its own")
    if lengths.dtype is not torch.int64 or lengths.shape != (batch,):
        got = f"{lengths.dtype} {list(lengths.shape)}"
        raise ValueError(f"fastrnn.{function}: lengths must be int64 [B] = [{batch}], got {got}")
    _check_device(function, "lengths", lengths, device)


def check_reset(
    function: str, reset: Any, letters: str, shape: tuple[int, ...], device: torch.device, packed: bool
) -> None:
    """Raises TypeError or ValueError where reset is not a bool of the shape."""
    if not isinstance(reset, Tensor):
        raise TypeError(f"fastrnn.{function}: reset must be a Tensor, got {type(reset).__name__}")
    if packed:
        raise ValueError(f"fastrnn.{function}: reset goes with a padded input; give that and lengths")
    if reset.dtype is not torch.bool or reset.shape != shape:
        got = f"{reset.dtype} {list(reset.shape)}"
        raise ValueError(f"fastrnn.{function}: reset must be bool {letters} = {list(shape)}, got {got}")
    if reset.device != device:
        raise ValueError(f"fastrnn.{function}: reset must be on {device} like the input, got {reset.device}")


def check_operand(
    function: str, name: str, tensor: Any, letters: str, shape: tuple[int, ...], x: Tensor, mask: bool
) -> None:
    """Raises TypeError or ValueError where a tensor has not the shape, or x's dtype and device; a mask no gradient."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"fastrnn.{function}: {name} must be a Tensor, got {type(tensor).__name__}")
    if tensor.shape != shape:
        got = list(tensor.shape)
        raise ValueError(f"fastrnn.{function}: {name} must be {letters} = {list(shape)}, got {got}")
    if tensor.device != x.device or (tensor.dtype is not x.dtype and not autocast_on(x.device)):
        expected, found = (f"{t.dtype} on {t.device}" for t in (x, tensor))
        raise ValueError(f"fastrnn.{function}: {name} must be {expected} like x, got {found}")
    if mask and tensor.requires_grad:
        raise ValueError(f"fastrnn.{function}: {name} must not require a gradient: there is none for masks")


def _check_device(function: str, name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device and not tensor.is_cpu:
        places = "the CPU" if device.type == "cpu" else f"{device} or the CPU"
        raise ValueError(f"fastrnn.{function}: {name} must be on {places}, got {tensor.device}")
