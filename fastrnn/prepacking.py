# SPDX-License-Identifier: BSD-3-Clause
"""prepacked(): weights packed once for all calls of a block; for users who run single steps.

The packed copy lies in the module's `__dict__`, where csrc/module_call.cpp finds it at a call; csrc/prepacked.cpp makes
it and watches over it.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]

from . import autograd, extension
from .cells import GRUCell, LSTMCell, RNNCell
from .modules import GRU, LSTM, RNN

_LAYERS, _CELLS = (LSTM, GRU, RNN), (LSTMCell, GRUCell, RNNCell)
_KINDS = {"lstm": (LSTM, LSTMCell), "gru": (GRU, GRUCell), "rnn": (RNN, RNNCell)}
_CELL_NAMES = ["weight_ih", "weight_hh", "bias_ih", "bias_hh", ""]

_lock = threading.Lock()
_blocks: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()  # how many blocks each module is in


@contextlib.contextmanager
def prepacked(module: nn.Module) -> Iterator[nn.Module]:
    """Inside the block the LSTM, GRU and RNN layers and cells of a module use weights packed once, at its beginning.

    An ordinary call packs its weights anew, so that it sees every change of them. With few time steps that is most of
    its time; the block does it once. Results have the same bits. For inference:

        model.eval()
        with torch.inference_mode(), fastrnn.prepacked(model):
            for x in stream:
                y, state = model(x, state)

    Blocks may be nested and entered by several threads; threads share the packed weights. They take as much memory
    again as the weights, twice as much for float16, and for bfloat16 without AMX or AVX512_BF16, which are kept as
    float32. Calls that the kernels do
    not take (autocast, torch.func, torch.compile) compute from the weights themselves.

    Args:
        module: a fastrnn.LSTM, GRU, RNN, one of their cells, or a module that holds some of them at any depth. Its
            other parts are left alone.

    Yields:
        module.

    Raises:
        TypeError, ValueError: module is not a module, or holds no layer of fastrnn.
        RuntimeError: at the beginning: a weight cannot be packed (it is parametrized, pruned or not materialised yet,
            or the kernels do not take it), or the extension is missing. At a call: the call needs a gradient, or a
            weight is another tensor, lies elsewhere, was written to, or has another shape, dtype or requires_grad than
            at the beginning, or the instruction set was changed. At the end: a weight holds other numbers, which only
            a write through `.data` or past torch can have done unseen; the message names it. If the block is left by
            an exception of its own, that is added to it as a note.
    """
    entered = _enter(module)
    try:
        yield module
    except BaseException as error:
        changed = _leave(entered)
        if changed:
            error.add_note(_complaint(changed))
        raise
    changed = _leave(entered)
    if changed:
        raise RuntimeError(_complaint(changed))


def _complaint(names: list[str]) -> str:
    was = "was" if len(names) == 1 else "were"
    return (
        f"fastrnn.prepacked: {', '.join(names)} {was} changed inside the block; "
        "its calls may have used the numbers from before the change"
    )


def _is_recurrent(module: nn.Module) -> bool:
    return isinstance(module, (nn.RNNBase, nn.RNNCellBase))


def _enter(module: nn.Module) -> list[nn.Module]:
    """Packs the layers of a module that no block has packed yet; returns all of them."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"fastrnn.prepacked: module must be a torch.nn.Module, got {type(module).__name__}")
    if autograd._C is None:
        raise RuntimeError(f"fastrnn.prepacked: the extension is not loaded: {extension.reason}")
    layers = {part: path for path, part in module.named_modules() if isinstance(part, _LAYERS + _CELLS)}
    if not layers:
        name = type(module).__name__
        hint = "; fastrnn.convert makes torch.nn's fastrnn's" if any(map(_is_recurrent, module.modules())) else ""
        raise ValueError(f"fastrnn.prepacked: {name} holds no LSTM, GRU or RNN of fastrnn{hint}")
    entered: list[nn.Module] = []
    with _lock:
        try:
            for layer, path in layers.items():
                inside = _blocks.get(layer, 0)
                if inside:
                    changed = _changed(layer)
                    if changed:
                        raise RuntimeError(_complaint(changed))
                else:
                    layer.__dict__["_prepacked"] = _pack(layer, path)
                _blocks[layer] = inside + 1
                entered.append(layer)
        except BaseException:
            for each in entered:
                _step_out(each)
            raise
    return entered


def _leave(entered: list[nn.Module]) -> list[str]:
    """Ends a block; the names of the weights that do not hold what was packed."""
    changed: list[str] = []
    with _lock:
        for layer in entered:
            changed += _changed(layer)
            _step_out(layer)
    return changed


def _step_out(layer: nn.Module) -> None:
    """One block less; the last one takes the packed weights along."""
    inside = _blocks[layer] - 1
    if inside:
        _blocks[layer] = inside
        return
    del _blocks[layer]
    layer.__dict__.pop("_prepacked").close()  # a shallow copy of the module may hold it, too


def _rows(layer: Any) -> list[list[str]]:
    """For each layer and direction the names of w_ih, w_hh, b_ih, b_hh and w_hr, "" for one that does not exist."""
    if isinstance(layer, nn.RNNCellBase):  # not _CELLS: revert() may be called inside the block
        return [_CELL_NAMES]
    rows = []
    for given in layer._all_weights:
        rest = iter(given)
        biases = (True, True) if layer.bias else (False, False)
        rows.append([next(rest) if here else "" for here in (True, True, *biases, bool(layer.proj_size))])
    return rows


def _pack(layer: nn.Module, path: str) -> object:
    rows = _rows(layer)
    prefix = f"{path}." if path else ""
    weights = [[_weight(layer, name, prefix) for name in row] for row in rows]
    if not autograd._C.is_ordinary([weight for row in weights for weight in row]):
        kinds = sorted({f"{type(w).__name__} {w.dtype} on {w.device}" for row in weights for w in row if w is not None})
        raise RuntimeError(
            f"fastrnn.prepacked: the weights of {path or type(layer).__name__} must be dense CPU tensors of one dtype, "
            f"float32, float64, bfloat16 or float16, got {', '.join(kinds)}"
        )
    kind = next(kind for kind, classes in _KINDS.items() if isinstance(layer, classes))
    directions = 2 if getattr(layer, "bidirectional", False) else 1
    return autograd._C.Prepacked(kind, directions, weights, [[prefix + name for name in row] for row in rows])


def _weight(layer: nn.Module, name: str, prefix: str) -> Tensor | None:
    """A weight that stays the same tensor from call to call: an ordinary parameter."""
    if not name:
        return None
    if name in layer.__dict__ or name not in layer._parameters:
        why = "is parametrized, pruned or made anew at each call, so that it cannot be packed once for all calls"
        raise RuntimeError(f"fastrnn.prepacked: {prefix}{name} {why}")
    weight = layer._parameters[name]
    if isinstance(weight, UninitializedTensorMixin):
        raise RuntimeError(f"fastrnn.prepacked: {prefix}{name} is not materialised yet; call the module once before")
    if weight is None and not (isinstance(layer, _CELLS) and name.startswith("bias")):
        raise RuntimeError(f"fastrnn.prepacked: {prefix}{name} must be a Tensor, got None")
    return weight


def _changed(layer: nn.Module) -> list[str]:
    """The names of a layer's weights that are not, or do not hold, what was packed."""
    own, parameters = layer.__dict__, layer._parameters
    now = [[own.get(name, parameters.get(name)) for name in row] for row in _rows(layer)]
    with torch.no_grad():
        names: list[str] = own["_prepacked"].changed(
            [[w if isinstance(w, Tensor) else None for w in row] for row in now]
        )
    return names
