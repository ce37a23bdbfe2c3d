# SPDX-License-Identifier: BSD-3-Clause
"""convert(), revert() and patch(): fastrnn in a model, or in a program, that says torch.nn; for users."""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
import types
from abc import ABCMeta
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .cells import GRUCell, LSTMCell, RNNCell
from .modules import GRU, LSTM, RNN
from .stack import Stack
from .stock import CLASSES, NOISE, class_on, noise_options, spoken_name, written_class

_OURS: dict[type[nn.Module], type[nn.Module]] = dict(
    zip(CLASSES, (LSTM, GRU, RNN, LSTMCell, GRUCell, RNNCell), strict=True)
)
_STOCK = {ours: stock for stock, ours in _OURS.items()}
_NAMES = frozenset(stock.__name__ for stock in CLASSES)


@dataclass(frozen=True)
class Conversion:
    """What convert() or revert() did, by the name of the module in the model; the model itself has the name "".

    Attributes:
        converted: the change of class, "torch.nn.LSTM -> fastrnn.LSTM".
        left: of every other recurrent module, why it stays what it is. One that is already what it should be is in
            neither.
    """

    converted: dict[str, str]
    left: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{name or '(the model)'}: {change}" for name, change in self.converted.items()]
        lines += [f"{name or '(the model)'}: left, {reason}" for name, reason in self.left.items()]
        return "\n".join(lines) or "nothing to convert"


def convert(model: nn.Module) -> Conversion:
    """Turns every recurrent module and cell of torch.nn in the model into fastrnn's, in place.

    Only the class of a module changes. It stays the same object with the same Parameters, so that optimizers, tied
    weights, hooks, parametrizations, state_dict and every reference to it stay valid.

    Args:
        model: any module, also a single nn.LSTM, or one that is wrapped or compiled. Found are the registered
            submodules of the exact classes nn.LSTM, GRU, RNN, LSTMCell, GRUCell and RNNCell, parametrized or not.

    Returns:
        What was converted, and what was left and why: subclasses, quantized and scripted modules, modules whose
        forward was replaced, layers with an attribute zoneout, recurrent_dropout or weight_dropout of their own.

    Raises:
        TypeError: model is not a torch.nn.Module.
    """
    return _change(model, _OURS, "convert")


def revert(model: nn.Module) -> Conversion:
    """Undoes convert(): turns every recurrent module and cell of fastrnn in the model into torch.nn's, in place.

    Args:
        model: any module. Modules that were made as fastrnn's are reverted like those that were converted.

    Returns:
        What was reverted, and what was left and why: subclasses of fastrnn's classes, and modules with zoneout,
        recurrent or weight dropout, which torch.nn does not have.

    Raises:
        TypeError: model is not a torch.nn.Module.
    """
    return _change(model, _STOCK, "revert")


def _change(model: nn.Module, targets: Mapping[type[nn.Module], type[nn.Module]], function: str) -> Conversion:
    if not isinstance(model, nn.Module):
        raise TypeError(f"fastrnn.{function}: model must be a torch.nn.Module, got a {type(model).__name__}")
    done = Conversion({}, {})
    settled = frozenset(targets.values())
    for name, module in model.named_modules():
        written = written_class(module)
        target = targets.get(written)
        if target is None:
            reason = None if written in settled else _why_left(module, written, tuple(targets))
        elif function == "convert" and "forward" in vars(module):
            reason = "its forward is replaced on the module itself, so that the forward of its class is not called"
        elif function == "convert" and (names := _taken(module)):
            reason = f"its {' and '.join(names)} would be an option of {spoken_name(target)}"
        elif function == "revert" and (noise := noise_options(module)):
            reason = f"torch.nn.{target.__name__} has no {' and no '.join(noise)}"
        else:
            module.__class__ = class_on(module, target)
            done.converted[name] = f"{spoken_name(written)} -> {spoken_name(target)}"
            continue
        if reason is not None:
            done.left[name] = reason
    return done


def _taken(module: nn.Module) -> list[str]:
    """The names among a stock module's attributes that mean something else to fastrnn's layers."""
    kept = (vars(module), module._modules, module._parameters, module._buffers)
    return [name for name in NOISE if isinstance(module, nn.RNNBase) and any(name in each for each in kept)]


def _why_left(module: nn.Module, written: type[nn.Module], sources: tuple[type[nn.Module], ...]) -> str | None:
    """Why a module of a class that is not in the table stays; None if it is nothing that one would convert."""
    if isinstance(module, torch.jit.ScriptModule):
        scripted = getattr(module, "original_name", "") in _NAMES
        return "it is scripted or traced: its code is fixed" if scripted else None
    for base in written.__mro__:
        if base.__module__.startswith(("torch.ao.nn.", "torchao.")) and base.__name__ in _NAMES:
            return f"it is quantized or prepared for it: {base.__module__}.{base.__name__} computes something else"
    if isinstance(module, sources):
        base = next(base for base in written.__mro__ if base in sources)
        return (
            f"it is a {spoken_name(written)}, a subclass of {spoken_name(base)}, and what it changes is unknown; "
            "the class itself can inherit from the other library's"
        )
    return None


# ---- patch ---------------------------------------------------------------------------------------------------------

_lock = threading.RLock()
_depth = 0  # blocks that are open
_undo = contextlib.ExitStack()


class _Named(ABCMeta):
    """The class of what stands in torch.nn under the name of a recurrent class while a block of patch() is open.

    The name itself cannot be bound to fastrnn's class: isinstance(x, nn.LSTM) would be False for a stock module, and
    for a subclass that was defined before the block. ABCMeta, so that a class may also inherit from abstract ones.
    Once no block is open, a name that somebody kept means torch.nn's class again.
    """

    _stock: type[nn.Module]
    _ours: type[nn.Module]

    def __new__(mcls, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **options: Any) -> Any:
        if not any(isinstance(base, mcls) for base in bases):
            return super().__new__(mcls, name, bases, namespace)
        # class Mine(nn.LSTM): inherits from fastrnn's class
        meant = tuple(base._meant() if isinstance(base, mcls) else base for base in bases)
        made = types.new_class(name, meant, options, lambda made: made.update(namespace))
        if issubclass(made, Stack):  # written for torch.nn, whose layers have no names beside its own
            made._fastrnn_names_are_foreign = True
        return made

    def _meant(cls) -> type[nn.Module]:
        return cls._ours if _depth else cls._stock

    def __call__(cls, *arguments: Any, **options: Any) -> Any:
        return cls._meant()(*arguments, **options)

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, cls._stock)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, cls._stock)

    def __eq__(cls, other: object) -> bool:
        """type(module) == nn.LSTM holds for fastrnn's modules and for stock ones."""
        return other is cls or other is cls._ours or other is cls._stock

    def __hash__(cls) -> int:
        return hash(cls._ours)


def _stand_in(stock: type[nn.Module], ours: type[nn.Module]) -> _Named:
    # pickle finds a class by module and name: in the block this one, afterwards torch.nn's
    names = {"__module__": "torch.nn", "__qualname__": stock.__name__, "__doc__": ours.__doc__}
    namespace = {**names, "__signature__": inspect.signature(ours), "_stock": stock, "_ours": ours}
    made: _Named = _Named(stock.__name__, (ours,), namespace)
    return made


_STAND_INS = [_stand_in(stock, ours) for stock, ours in _OURS.items()]


def _building_ours(stock: type[nn.Module], ours: type[nn.Module]) -> Callable[..., None]:
    """__init__ of a stock class in the block: reached where a program took the class from torch.nn before."""
    original: Callable[..., None] = stock.__init__

    @functools.wraps(original)
    def initialize(self: nn.Module, *arguments: Any, **options: Any) -> None:
        if type(self) is stock:
            self.__class__ = ours
            ours.__init__(self, *arguments, **options)
        else:
            original(self, *arguments, **options)

    return initialize


def _replace(holder: Any, name: str, value: Any) -> None:
    _undo.callback(setattr, holder, name, vars(holder)[name])
    setattr(holder, name, value)


@contextlib.contextmanager
def patch() -> Iterator[None]:
    """Inside the block torch.nn.LSTM, GRU, RNN and their cells build fastrnn's modules, for code that cannot be edited.

    What is built in the block stays fastrnn's after it; pickles of it load anywhere where fastrnn is installed. It does
    not matter how the program got hold of the class: torch.nn.LSTM, torch.nn.modules.rnn.LSTM, or a name that was
    imported before the block. In the block isinstance(x, nn.LSTM) and type(x) == nn.LSTM hold for modules of either
    library, and a class that inherits from nn.LSTM inherits from fastrnn's. Modules made before the block, copies of
    them, and modules from stock pickles stay stock; convert() takes those.

    The change is made for the whole process, all threads included. Blocks may be nested; the last to end restores
    torch.nn, also after an exception. Works as a decorator too:

        @fastrnn.patch()
        def main(): ...

    What differs from stock: `type(x) is nn.LSTM` is False, and so is type(x) == LSTM if LSTM was imported before.
    """
    global _depth
    with _lock:
        if _depth == 0:
            for stand_in in _STAND_INS:
                stock, ours = stand_in._stock, stand_in._ours
                _replace(nn, stock.__name__, stand_in)
                _replace(nn.modules, stock.__name__, stand_in)
                _replace(stock, "__init__", _building_ours(stock, ours))
        _depth += 1
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0:
                _undo.close()
