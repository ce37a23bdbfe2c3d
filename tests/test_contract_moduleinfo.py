# SPDX-License-Identifier: BSD-3-Clause
"""PyTorch's own inputs for its recurrent modules (ModuleInfo), ours and theirs live: its reference is the module
itself, so that its own comparison would prove nothing."""

from __future__ import annotations

import copy
import pickle
import sys
import types
from typing import Any

import pytest
import torch
from torch import nn
from twins import NAMES, tensors_of

import fastrnn

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture(scope="module")
def infos() -> dict[str, Any]:
    """The ModuleInfo of each of our modules. Its file wants expecttest, of which it uses nothing here."""
    stub = types.ModuleType("expecttest")
    stub.TestCase, stub.ACCEPT = object, False
    before = sys.modules.get("expecttest")
    state = torch.get_default_dtype(), torch.backends.disable_global_flags
    try:
        import unittest

        stub.TestCase = unittest.TestCase
        sys.modules.setdefault("expecttest", stub)
        common_modules = pytest.importorskip("torch.testing._internal.common_modules", exc_type=ImportError)
    finally:
        if before is None:
            sys.modules.pop("expecttest", None)
    assert state == (torch.get_default_dtype(), torch.backends.disable_global_flags)
    return {info.module_cls.__name__: info for info in common_modules.module_db if info.module_cls.__name__ in NAMES}


def inputs(info: Any, dtype: torch.dtype, training: bool) -> list[Any]:
    return info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=True, training=training)


def build(library: Any, name: str, given: Any, dtype: torch.dtype, training: bool) -> nn.Module:
    torch.manual_seed(7)
    arguments = given.constructor_input
    options = arguments.kwargs | {"device": "cpu", "dtype": dtype}
    return getattr(library, name)(*arguments.args, **options).train(training)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_outputs_and_gradients_are_torchs(infos: dict, name: str, dtype: torch.dtype, training: bool) -> None:
    given_inputs = inputs(infos[name], dtype, training)
    assert len(given_inputs) >= 2
    for given in given_inputs:
        results = []
        for library in (fastrnn, nn):
            module = build(library, name, given, dtype, training)
            call = copy.deepcopy(given.forward_input)
            torch.manual_seed(3)
            outputs = tensors_of(module(*call.args, **call.kwargs))
            leaves = [t for t in tensors_of((call.args, tuple(call.kwargs.values()))) if t.requires_grad]
            sought = [*leaves, *module.parameters()]
            found = torch.autograd.grad(sum(out.square().sum() for out in outputs), sought, allow_unused=True)
            results.append([*outputs, *found])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_errors_have_torchs_type(infos: dict, name: str) -> None:
    info = infos[name]
    errors = info.module_error_inputs_func(info, device="cpu", dtype=torch.float32, requires_grad=False, training=False)
    assert len(errors) >= 4
    for error in errors:
        given = error.module_error_input
        call = given.forward_input
        with pytest.raises(error.error_type, match=error.error_regex):
            build(fastrnn, name, given, torch.float32, False)(*call.args, **call.kwargs)


@pytest.mark.parametrize("name", NAMES)
def test_modules_are_printed_pickled_and_say_whether_they_train(infos: dict, name: str) -> None:
    for given in inputs(infos[name], torch.float32, True):
        ours, theirs = (build(library, name, given, torch.float32, True) for library in (fastrnn, nn))
        assert repr(ours) == repr(theirs)
        call = given.forward_input
        expected = tensors_of(ours(*call.args, **call.kwargs))
        again = pickle.loads(pickle.dumps(ours))
        for a, b in zip(tensors_of(again(*call.args, **call.kwargs)), expected, strict=True):
            assert torch.equal(a, b)
        if getattr(ours, "num_layers", 1) > 1:
            del ours.training
            with pytest.raises(AttributeError):
                ours(*call.args, **call.kwargs)
