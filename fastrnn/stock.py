# SPDX-License-Identifier: BSD-3-Clause
"""The way between a module of fastrnn and the stock one of torch.nn: both hold the same attributes, so that only the
class differs. modules.py and cells.py take to_torch() from here, conversion.py changes classes in place.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.utils import parametrize

CLASSES: tuple[type[nn.Module], ...] = (nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell)


def written_class(module: nn.Module) -> type[nn.Module]:
    """The class that a program wrote down for a module: that of the module, but for a parametrized one.

    register_parametrization gives each module a class of its own, ParametrizedLSTM, whose only base is the class
    before; remove_parametrizations relies on that as well.
    """
    cls = type(module)
    if parametrize.is_parametrized(module) and len(cls.__bases__) == 1:
        return cls.__bases__[0]
    return cls


def spoken_name(cls: type[nn.Module]) -> str:
    """The name that programs use: torch.nn.LSTM, fastrnn.LSTM; of another class its module and name."""
    if cls in CLASSES:
        return f"torch.nn.{cls.__name__}"
    if cls.__module__.split(".")[0] == __package__:
        return f"{__package__}.{cls.__name__}"
    return f"{cls.__module__}.{cls.__qualname__}"


def class_on(module: nn.Module, written: type[nn.Module]) -> type[nn.Module]:
    """The class that the module has with `written` as its written class.

    Of a parametrized module a new one, with the same properties: deep copies share the old one, and stay as they are.
    """
    cls = type(module)
    if written_class(module) is cls:
        return written
    namespace = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    return type(f"Parametrized{written.__name__}", (written,), namespace)


NOISE = ("zoneout", "recurrent_dropout", "weight_dropout")


class NoNoise:
    """One of the options for noise on the class: zero, unless a program has a module or a tensor of this name."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, module: nn.Module | None, owner: type | None = None) -> Any:
        if module is not None:
            for kept in (module._modules, module._parameters, module._buffers):
                if self._name in kept:
                    return kept[self._name]
        return 0.0


def noise_of(module: Any) -> tuple[Any, Any, Any]:
    """zoneout, recurrent_dropout and weight_dropout of a module of fastrnn.

    Zeros for a class that a program written for torch.nn made inside patch(): there the names are the program's own.
    """
    if module._fastrnn_names_are_foreign:
        return 0.0, 0.0, 0.0
    return module.zoneout, module.recurrent_dropout, module.weight_dropout


def noise_options(module: nn.Module) -> dict[str, Any]:
    """The module's options for noise that are not zero, by name. torch.nn's modules have no such options."""
    if not hasattr(type(module), "_fastrnn_names_are_foreign"):
        return {}
    given = dict(zip(NOISE, noise_of(module), strict=True))
    return {name: value for name, value in given.items() if (any(value) if isinstance(value, (tuple, list)) else value)}


class HasStock:
    """to_torch() for the modules and cells."""

    def to_torch(self) -> nn.Module:
        """A module of torch.nn's own class that shares the Parameters, for tools that go by the exact class.

        Returns:
            A module with the same Parameters, buffers, parametrizations, hooks and training flag. Training one trains
            the other; what is later replaced, registered or moved in one is not in the other.

        Raises:
            TypeError: the class is a subclass of fastrnn's, and torch.nn has none with its changes; or zoneout,
                recurrent_dropout or weight_dropout is set, which torch.nn does not have either.
        """
        assert isinstance(self, nn.Module)
        written = written_class(self)
        stock = next((base for base in written.__bases__ if base in CLASSES), None)
        if stock is None:
            got = spoken_name(written)
            raise TypeError(f"fastrnn.to_torch: the class must be fastrnn's own, got the subclass {got}")
        noise = noise_options(self)
        if noise:
            raise TypeError(f"fastrnn.to_torch: torch.nn.{stock.__name__} has no {' and no '.join(noise)}")
        cls = class_on(self, stock)
        made = cls.__new__(cls)
        # As torch's replicas for DataParallel: the same tensors in containers of its own.
        for name, value in vars(self).items():
            made.__dict__[name] = value.copy() if isinstance(value, (dict, list, set)) else value
        made.__dict__["_compiled_call_impl"] = None  # module.compile() bound it to this module
        return made
