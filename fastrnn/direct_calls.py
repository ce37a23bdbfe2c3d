# SPDX-License-Identifier: BSD-3-Clause
"""DirectCalls: the __call__ of fastrnn's modules and cells, which spares an ordinary call that of torch.nn.Module.

torch.nn.Module.__call__ asks for hooks in Python, in two calls that pack the arguments once more each: .7 us, and .9 us
with an argument given by name, of a call that takes 3 to 7 (T = 1, B = 1, H = 64). csrc/direct_call.cpp asks in .1 us.
Whenever torch would do more than to call forward, torch does it.
"""

from __future__ import annotations

from types import CodeType
from typing import Any

from torch import nn
from torch.compiler import is_dynamo_compiling
from torch.nn.modules import module as torch_module

from . import extension

_CALL: Any = nn.Module.__call__
_CALL_IMPL: Any = nn.Module._call_impl
_OWN_HOOKS = ("_backward_hooks", "_backward_pre_hooks", "_forward_hooks", "_forward_pre_hooks")
_GLOBAL_HOOKS = tuple(f"_global{name}" for name in _OWN_HOOKS)


def _attributes(function: Any) -> tuple[str, ...]:
    """The names of globals and attributes in a function's code; none if it is not written in Python."""
    code = getattr(function, "__code__", None)
    return code.co_names if isinstance(code, CodeType) else ()


def torch_is_known() -> bool:
    """Whether torch.nn.Module.__call__ asks for what csrc/direct_call.cpp asks for, and for nothing else.

    That of torch 2.11 to 2.13 does. Another release may ask for more, and a program may have replaced it before.
    """
    hooks = {name for name in _attributes(_CALL_IMPL) if name.endswith("_hooks")}
    return _attributes(_CALL) == ("_compiled_call_impl", "_call_impl") and hooks == {*_OWN_HOOKS, *_GLOBAL_HOOKS}


class DirectCalls(nn.Module):
    """Base of LSTM, GRU, RNN and the cells, ahead of torch.nn's class."""

    @classmethod
    def _direct_call_kind(cls) -> int:
        """The gates of a class whose forward is fastrnn's own, without options: negative for a cell, else 0."""
        return 0

    def _call_by_torch(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not is_dynamo_compiling():
            output = _direct_call(self, args, kwargs)
            if output is not None:
                return output
        return self._call_by_torch(*args, **kwargs)


def _kind_of(cls: Any) -> int:
    """What direct_call must know of a class: its kind if the call after DirectCalls' is torch's known one, else 0.

    Asked anew when the class or a base has changed: torch.fx, for one, replaces torch.nn.Module.__call__ for a while.
    """
    if not issubclass(cls, DirectCalls):
        return 0
    after = cls.__mro__[cls.__mro__.index(DirectCalls) + 1 :]
    following = next(base for base in after if "__call__" in vars(base))
    if following is not nn.Module or nn.Module.__call__ is not _CALL or cls._call_impl is not _CALL_IMPL:
        return 0
    if cls.__getattribute__ is not object.__getattribute__:
        return 0
    kind: int = cls._direct_call_kind()
    return kind


def _no_call(module: nn.Module, args: Any, kwargs: Any) -> None:
    return None


_direct_call: Any = _no_call
if extension.module is not None and torch_is_known():
    extension.module.watch_calls(
        DirectCalls.__call__, _kind_of, *[getattr(torch_module, name) for name in _GLOBAL_HOOKS]
    )
    _direct_call = extension.module.direct_call
