# SPDX-License-Identifier: BSD-3-Clause
"""Loads the compiled module fastrnn._C once, or says why it cannot be loaded; used by autograd.py and info.py.

A compiled extension works only with the torch that it was built for (torch's C++ interface changes between releases),
so what setup.py wrote into fastrnn/_build.py is compared with the running torch before the library is touched. Where
it cannot be loaded, importing fastrnn warns once, and torch.nn's code runs in its place.
"""

from __future__ import annotations

import importlib
import os
import warnings
from types import ModuleType

import torch

ADVICE = (
    "Build it for this Python and this torch, in fastrnn's source tree: "
    "pip install --no-build-isolation --no-deps --force-reinstall ."
)


def public_version(version: str) -> str:
    """The release part of a version: "2.13.0" of "2.13.0+cpu"; the C++ interface is the same within a release."""
    return version.split("+", 1)[0]


def mismatch(built_for: str, built_cxx11_abi: bool) -> str | None:
    """Why an extension built for that torch cannot be loaded into the running one; None if it can."""
    if public_version(built_for) != public_version(torch.__version__):
        return f"it was built for torch {built_for} but torch {torch.__version__} is running"
    if bool(built_cxx11_abi) != torch.compiled_with_cxx11_abi():
        return "it was built with another C++ string ABI than the running torch"
    return None


def load() -> tuple[ModuleType | None, str]:
    """(fastrnn._C, "") or (None, one sentence that says why not)."""
    try:
        build = importlib.import_module("fastrnn._build")
    except ImportError:
        return None, "it is not built (fastrnn/_build.py is missing)"
    why_not = mismatch(build.TORCH_VERSION, build.CXX11_ABI)
    if why_not is not None:
        return None, why_not
    try:
        extension = importlib.import_module("fastrnn._C")
    except ImportError as error:
        return None, f"fastrnn._C does not load: {error}"
    wish = os.environ.get("FASTRNN_ISA")
    if wish and wish not in extension.available_isas():
        here = ", ".join(extension.available_isas())
        message = f"FASTRNN_ISA={wish} is none of those that this machine has ({here}); {extension.isa()} is used"
        warnings.warn(message, stacklevel=2)
    return extension, ""


module, reason = load()
if module is None:
    warnings.warn(
        f"fastrnn runs without its kernels, on torch.nn's code: the extension is not loaded, since {reason}. {ADVICE}",
        RuntimeWarning,
        stacklevel=2,
    )
