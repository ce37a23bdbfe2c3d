# SPDX-License-Identifier: BSD-3-Clause
"""Tests on another device without a word in them: torch's factories put what they make there, for the length of a test.

Used by conftest.py. The numbers are drawn on the CPU and moved, so that a test computes on the same ones everywhere and
a CPU generator serves every device. Integers stay on the CPU: lengths and batch sizes have to. Patched are torch's
attributes and not a mode, since a mode would keep fastrnn off its fast doors.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import fastrnn

FACTORIES = ("empty", "eye", "full", "linspace", "logspace", "ones", "rand", "randn", "tensor", "zeros")

# The test files that ask nothing of the device that they run on. Not in a file: a test with the fixture `compiled`, or
# with the mark cpu_alone, is about the CPU.
ON_EVERY_DEVICE = (
    *("test_all_states", "test_autograd", "test_cells", "test_contract", "test_contract_attributes"),
    *("test_contract_saving", "test_contract_training", "test_functional", "test_gradients", "test_lengths"),
    *("test_modules", "test_noise", "test_packed", "test_per_sample", "test_resets", "test_transforms", "test_weights"),
)


def moving(factory: Callable[..., Tensor], device: torch.device) -> Callable[..., Tensor]:
    """The factory, its floating-point and bool results on the device unless the call names one."""

    def made(*arguments: object, **options: object) -> Tensor:
        result = factory(*arguments, **options)
        stays = options.get("device") is not None or "out" in options or result.device.type != "cpu"
        if stays or not (result.is_floating_point() or result.dtype is torch.bool):
            return result
        return result.detach().to(device).requires_grad_(result.requires_grad)

    return made


@contextlib.contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """A block in which float32 products are exact ("ieee") or may use TF32 ("tf32"), of torch.nn and of fastrnn."""
    settings = (torch.backends.cudnn.rnn, torch.backends.cudnn.conv, torch.backends.cuda.matmul)
    before = [setting.fp32_precision for setting in settings]
    for setting in settings:
        setting.fp32_precision = precision
    try:
        yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.fp32_precision = value


@contextlib.contextmanager
def placed(device: torch.device) -> Iterator[None]:
    """A block in which torch's factories make tensors on the device, float32 products are exact, as on the CPU, and
    layers on CUDA take fastrnn's kernels: left to itself, fastrnn may choose cuDNN, which needs no tests here."""
    force = getattr(fastrnn, "cuda_tier", None)
    own = force("tier0") if force and device.type == "cuda" else contextlib.nullcontext()
    with pytest.MonkeyPatch.context() as patch, float32_products("ieee"), own:
        for name in FACTORIES:
            patch.setattr(torch, name, moving(getattr(torch, name), device))
        yield


def cuda_missing() -> str:
    """Why nothing can be tested on CUDA, or an empty string."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    try:
        build = importlib.import_module("fastrnn._build")
    except ImportError:
        return "fastrnn is not built"
    said = getattr(build, "CUDA", "not built")
    return f"fastrnn's kernels for CUDA are not in this build ({said})" if str(said).startswith("not built") else ""


def chosen(option: str) -> list[str]:
    """The devices that the option --device names; "auto": the CPU, and CUDA where it can be tested.

    Raises:
        pytest.UsageError: it names CUDA, and there is none.
    """
    if option == "auto":
        return ["cpu"] if cuda_missing() else ["cpu", "cuda"]
    names = option.split(",")
    for name in names:
        try:
            kind = torch.device(name).type
        except RuntimeError as error:
            raise pytest.UsageError(f"--device: {str(error).splitlines()[0]}") from None
        if kind == "cuda" and cuda_missing():
            raise pytest.UsageError(f"--device {name}: {cuda_missing()}")
    return names
