# SPDX-License-Identifier: BSD-3-Clause
"""explain(): which way a module's call takes, kernel or not, and why; for users."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from . import autograd, extended, extension, operators, sequences
from .modules import GRU, LSTM, RNN
from .stock import CLASSES, noise_options, spoken_name, written_class


def explain(
    module: nn.Module,
    input: Tensor | PackedSequence,
    hx: Any = None,
    *,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    reset_state: Any = None,
    return_all_states: bool = False,
) -> str:
    """Says in one sentence what computes module(input, hx, ...) here and now; nothing is computed.

    Args:
        module: a fastrnn.LSTM, GRU, RNN or one of their cells. A stock torch.nn module is explained too.
        input: as the module would be called with.
        hx: the initial state, or None.
        lengths: as the module, a layer, would be called with, like the arguments that follow.
        reset: likewise.
        reset_state: likewise.
        return_all_states: likewise.

    Returns:
        "<class> -> kernel: ...", with the instruction set, whether the call records a gradient, and how the threads
        share each layer; "<class> -> reference: ..." or "<class> -> torch: ...", with the reason; or
        "<class> -> refused: ...", with the exception that the call raises.

    Raises:
        TypeError: module is none of these.
    """
    fsdp = _fsdp_module()  # fully_shard puts classes of its own in front of the module's
    sharded = isinstance(module, fsdp)
    written: type[Any] = next(base for base in written_class(module).__mro__ if not issubclass(base, fsdp))
    name = spoken_name(written)
    if not isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        parts = module.named_modules() if isinstance(module, nn.Module) else ()
        inside = [path for path, part in parts if isinstance(part, (nn.RNNBase, nn.RNNCellBase))]
        hint = f"; it holds some: {', '.join(inside[:4])}" if inside else ""
        raise TypeError(f"fastrnn.explain: module must be an LSTM, GRU or RNN, or a cell, got {name}{hint}")
    extras = {"lengths": lengths, "reset": reset, "reset_state": reset_state, "return_all_states": return_all_states}
    extras = {key: value for key, value in extras.items() if value is not None and value is not False}
    ours = any(base.__module__.split(".")[0] == __package__ for base in written.__mro__)
    if extras and not (ours and isinstance(module, nn.RNNBase)):
        return f"{name} -> refused: TypeError: it takes no {' and no '.join(extras)}"
    changes = getattr(module, "_fastrnn_changes", "")
    if changes and not extras and not noise_options(module):
        return f"{name} -> torch: torch.nn's own forward, because the class has its own {changes}"
    if not ours:
        return f"{name} -> torch: it is torch.nn's own class; fastrnn.convert turns it into fastrnn's of the same name"
    tensors = [input.data if isinstance(input, PackedSequence) else input, *_states(hx), *_weights(module)]
    tensors += [] if reset_state is None else _states(reset_state)
    refusal = _refusal(module, input, hx, tensors, extras)
    if refusal is not None:
        return f"{name} -> refused: {refusal}"
    further = bool(extras) or bool(noise_options(module))  # for which torch.nn has no code
    if further and torch.is_autocast_enabled("cpu"):  # extended.py does what autocast would, and goes on without it
        with torch.autocast("cpu", enabled=False):
            sentence = autograd.explain_route([extended.lowered(tensor) for tensor in tensors])
    else:
        sentence = autograd.explain_route(tensors)
    if sentence.startswith("kernel") and further and operators.extended_needs_reference():
        sentence = f"reference: plain PyTorch ({__package__}.reference), because torch.func differentiates"
    on_cuda = isinstance(tensors[0], Tensor) and tensors[0].is_cuda
    if on_cuda and sentence.startswith("torch") and isinstance(module, (LSTM, GRU, RNN)):
        sizes = input.batch_sizes if isinstance(input, PackedSequence) else None
        rung, why = module._cuda_route(tensors, sizes, further)
        if rung == "kernel":
            recorded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
            ending = "with gradient" if recorded else "without gradient"
            return f"{name} -> kernel: fastrnn's own for CUDA, {why}, {ending}"
        sentence = f"torch: torch.nn's own forward, because {why}"
    if sentence.startswith("torch") and further:
        sentence = f"reference: plain PyTorch (fastrnn.reference), because {sentence.partition('because ')[2]}"
    if sharded and "DTensor" in sentence:
        sentence += "; during a call fully_shard gathers them into plain ones: explain between unshard() and reshard()"
    elif sentence.startswith("kernel"):
        recorded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
        sentence += ", with gradient" if recorded else ", without gradient"
        sentence += f"; {_plan(module, input)}"
    return f"{name} -> {sentence}"


def _fsdp_module() -> type | tuple[()]:
    """The class of modules that fully_shard was applied to; no class where torch.distributed was never asked for it."""
    return getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())


def _states(hx: Any) -> list[Any]:
    return list(hx) if isinstance(hx, (tuple, list)) else [hx]


def _weights(module: nn.RNNBase | nn.RNNCellBase) -> list[Tensor | None]:
    """The weights as a call would read them now, by name: they may be parametrized or replaced."""
    if isinstance(module, nn.RNNBase):
        names = module._flat_weights_names
    else:
        names = ["weight_ih", "weight_hh", "bias_ih", "bias_hh"]
    return [getattr(module, name) for name in names]


# ---- what is wrong -------------------------------------------------------------------------------------------------


def _refusal(
    module: nn.RNNBase | nn.RNNCellBase, input: Any, hx: Any, tensors: list[Any], extras: dict[str, Any]
) -> str | None:
    """The error that the call raises, None if none is to be expected.

    Found by the checks of the call itself: fastrnn's, and torch.nn's on a stock module of the same sizes without
    memory. Not asked where that module would not answer alike: other classes of tensors, other layouts, autocast.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    plain = (Tensor, nn.Parameter)
    ordinary = all(type(t) in plain and t.layout is torch.strided and not t.is_nested for t in given)
    if not ordinary or torch.is_autocast_enabled("cpu") or operators.needs_reference():
        return None
    devices = {str(tensor.device) for tensor in given}
    if len(devices) > 1:
        return f"RuntimeError: the tensors are on {' and '.join(sorted(devices))}"
    try:
        if isinstance(module, (LSTM, GRU, RNN)):
            module._check_weights()
            if extras or noise_options(module):
                arguments: Any = (extras.get(name) for name in ("lengths", "reset", "reset_state"))
                checked = sequences.check(module, input, hx, *arguments)
                extended.check_range(sequences.OPERATORS[module._fastrnn_gates], checked.x, extras.get("lengths"))
                return None
            if isinstance(input, PackedSequence) and hx is not None:
                module._check_packed_states(input, hx)
        with torch.no_grad():
            _without_memory(module)(*_to_meta((input, hx)))
    except Exception as error:  # whatever the call would raise
        return f"{type(error).__name__}: {error}"
    return None


def _without_memory(module: nn.RNNBase | nn.RNNCellBase) -> nn.Module:
    """A stock module of the same sizes on the meta device; without dropout, which changes no shape."""
    stock = _stock_class(module)
    options = [name for name in _OPTIONS if name in vars(module) and (name != "proj_size" or stock is CLASSES[0])]
    dtype = next((weight.dtype for weight in _weights(module) if weight is not None), None)
    return stock(**{name: getattr(module, name) for name in options}, device="meta", dtype=dtype)


_OPTIONS = (
    *("input_size", "hidden_size", "num_layers", "nonlinearity"),
    *("bias", "batch_first", "bidirectional", "proj_size"),
)


def _stock_class(module: nn.Module) -> type[nn.Module]:
    return next(base for base in type(module).__mro__ if base in CLASSES)


def _to_meta(structure: Any) -> Any:
    if isinstance(structure, PackedSequence):
        indices = (t if t is None else t.to("meta") for t in structure[2:])
        return PackedSequence(structure.data.to("meta"), structure.batch_sizes, *indices)
    if isinstance(structure, (tuple, list)):
        return type(structure)(_to_meta(entry) for entry in structure)
    return structure.to("meta") if isinstance(structure, Tensor) else structure


# ---- the plan ------------------------------------------------------------------------------------------------------


def _plan(module: nn.RNNBase | nn.RNNCellBase, input: Tensor | PackedSequence) -> str:
    """How the threads share the module's layers; layers with the same plan are named once."""
    sizes = _sizes(module, input)
    if 0 in sizes:
        return "an empty batch, nothing to run"
    compiled: Any = extension.module
    first, *others = [_threads(*compiled.plan(*layer)) for layer in _layers(module, *sizes)]
    if set(others) <= {first}:
        return f"{len(others) + 1} layers, each on {first}" if others else first
    return f"the first layer on {first}, the others on {others[0]}"


def _sizes(module: nn.RNNBase | nn.RNNCellBase, input: Tensor | PackedSequence) -> tuple[int, int]:
    """T and B."""
    if isinstance(input, PackedSequence):
        return len(input.batch_sizes), int(input.batch_sizes[0])
    if isinstance(module, nn.RNNCellBase):
        return 1, input.shape[0] if input.dim() == 2 else 1
    if input.dim() == 2:
        return input.shape[0], 1
    first, second = input.shape[:2]
    return (second, first) if module.batch_first else (first, second)


def _layers(module: nn.RNNBase | nn.RNNCellBase, T: int, B: int) -> Iterator[tuple[Any, ...]]:
    """The arguments of _C.plan for each layer."""
    cell = _stock_class(module).__name__.removesuffix("Cell").lower()
    I, H = module.input_size, module.hidden_size  # noqa: E741
    layers, P, D = 1, 0, 1
    if isinstance(module, nn.RNNBase):
        layers, P, D = module.num_layers, module.proj_size, 2 if module.bidirectional else 1
    double = any(weight is not None and weight.dtype == torch.float64 for weight in _weights(module))
    for layer in range(layers):
        yield cell, double, T, B, D * (P or H) if layer else I, H, P, D


def _threads(threads: int, members: int, together: bool, split_units: bool, scratch_bytes: int) -> str:
    if threads == 1:
        return "1 thread"
    if members == 1:
        return f"{threads} threads, one for each direction"
    shared = "units" if split_units else "rows"
    return f"{threads} threads that share the {shared}{' of each direction' if together else ''}"
