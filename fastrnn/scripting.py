# SPDX-License-Identifier: BSD-3-Clause
"""What torch.jit.script compiles in place of a module of fastrnn; modules.py and cells.py hand it over."""

from __future__ import annotations

from torch import nn

from .stock import CLASSES, noise_options


def scriptable(module: nn.Module) -> nn.Module:
    """torch.nn's module of the same name, on the very same parameters, buffers and hooks.

    TorchScript compiles torch.nn's own modules and none that is derived from them, so a subclass by a user, which has a
    forward of its own, is returned as it is. torch puts what this returns into the model that is scripted, too: there
    fastrnn.convert() brings fastrnn's modules back. A module with noise, which torch.nn's has not, is refused.
    """
    cls = type(module)
    if cls.__module__.partition(".")[0] != __package__:
        return module
    noise = noise_options(module)
    if noise:
        missing = " and no ".join(noise)
        raise TypeError(f"fastrnn: torch.jit.script takes torch.nn.{cls.__name__}, which has no {missing}")
    stock = next(base for base in cls.__mro__ if base in CLASSES)  # not by name, which patch() binds to ours
    twin = stock.__new__(stock)
    twin.__dict__.update(module.__dict__)
    return twin
