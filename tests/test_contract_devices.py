# SPDX-License-Identifier: BSD-3-Clause
"""Where parameters live: meta, fake tensors, to_empty, skip_init, default devices and dtypes, swapped parameters."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn.utils import skip_init
from twins import LAYERS, NAMES, STEPS, an_input, both, first, tensors_of

import fastrnn


@pytest.fixture
def swapping() -> Iterator[None]:
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.usefixtures("swapping")
@pytest.mark.parametrize("name", NAMES)
def test_load_state_dict_works_with_swapped_parameters(name: str) -> None:
    """torch.nn's modules refuse: the weak references that they keep to their weights are in the way."""
    ours, theirs = both(name, 3, 5)
    other = {key: torch.full_like(tensor, 0.1) for key, tensor in theirs.state_dict().items()}
    parameters = list(ours.parameters())
    ours.load_state_dict(other)
    assert all(a is b for a, b in zip(ours.parameters(), parameters, strict=True))
    assert all(torch.equal(p, torch.full_like(p, 0.1)) for p in ours.parameters())
    reference = getattr(nn, name)(3, 5)
    torch.__future__.set_swap_module_params_on_conversion(False)
    reference.load_state_dict(other)
    torch.testing.assert_close(ours(an_input(name)), reference(an_input(name)))
    if name in LAYERS:
        assert all(a is b for a, b in zip(ours._flat_weights, ours.parameters(), strict=True))
        assert ours._weights_have_changed() is False


@pytest.mark.usefixtures("swapping")
@pytest.mark.parametrize("name", LAYERS)
def test_torch_nn_cannot_load_with_swapped_parameters(name: str) -> None:
    """The reason for the test above; when it fails, docs/compatibility.md is out of date."""
    module = getattr(nn, name)(3, 5)
    with pytest.raises(RuntimeError, match="swap"):
        module.load_state_dict({key: tensor.clone() for key, tensor in module.state_dict().items()})


@pytest.mark.usefixtures("swapping")
@pytest.mark.parametrize("name", NAMES)
def test_conversion_with_swapped_parameters_keeps_their_identity(name: str) -> None:
    ours, _ = both(name, 3, 5)
    parameters = list(ours.parameters())
    ours.double()
    assert all(a is b for a, b in zip(ours.parameters(), parameters, strict=True))
    assert first(ours(an_input(name).double())).dtype is torch.float64


@pytest.mark.parametrize("name", NAMES)
def test_meta_module_is_made_real_and_initialised_as_torchs(name: str) -> None:
    made = []
    for library in (fastrnn, nn):
        with torch.device("meta"):
            module = getattr(library, name)(3, 5)
        assert all(parameter.is_meta for parameter in module.parameters())
        assert [out.shape for out in tensors_of(module(an_input(name).to("meta")))]
        module.to_empty(device="cpu")
        torch.manual_seed(7)
        module.reset_parameters()
        made.append(module)
    assert all(torch.equal(a, b) for a, b in zip(made[0].parameters(), made[1].parameters(), strict=True))
    torch.testing.assert_close(made[0](an_input(name)), made[1](an_input(name)))


@pytest.mark.parametrize("name", NAMES)
def test_meta_module_takes_a_state_dict_by_assignment(name: str) -> None:
    _, theirs = both(name, 3, 5)
    ours = getattr(fastrnn, name)(3, 5, device="meta")
    ours.load_state_dict(theirs.state_dict(), assign=True)
    torch.testing.assert_close(ours(an_input(name)), theirs(an_input(name)))


@pytest.mark.parametrize("name", NAMES)
def test_creation_on_meta_draws_no_random_number(name: str) -> None:
    torch.manual_seed(0)
    getattr(fastrnn, name)(3, 5, device="meta")
    after = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(after, torch.rand(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_fake_tensors_have_the_shapes_strides_and_dtypes_of_real_ones(name: str, dtype: torch.dtype) -> None:
    for options in ({}, {} if name in STEPS else {"num_layers": 2, "bidirectional": True, "batch_first": True}):
        ours, _ = both(name, 3, 5, dtype=dtype, **options)
        real_x = an_input(name).to(dtype).requires_grad_()
        real = tensors_of(ours(real_x))
        real_gradients = torch.autograd.grad(sum(out.sum() for out in real), [real_x, *ours.parameters()])
        with FakeTensorMode() as mode:
            module = getattr(fastrnn, name)(3, 5, dtype=dtype, **options)
            x = mode.from_tensor(an_input(name).to(dtype)).requires_grad_()
            fake = tensors_of(module(x))
            fake_gradients = torch.autograd.grad(sum(out.sum() for out in fake), [x, *module.parameters()])
        for a, b in zip([*real, *real_gradients], [*fake, *fake_gradients], strict=True):
            assert (a.shape, a.stride(), a.dtype, a.device) == (b.shape, b.stride(), b.dtype, b.device)


@pytest.mark.parametrize("name", NAMES)
def test_skip_init_leaves_the_generator_alone(name: str) -> None:
    """torch.nn's layers refuse skip_init, since `device` is not in their signature."""
    torch.manual_seed(0)
    module = skip_init(getattr(fastrnn, name), 3, 5, dtype=torch.float64)
    assert all(p.dtype is torch.float64 and not p.is_meta for p in module.parameters())
    after = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(after, torch.rand(3))
    if name in LAYERS:
        with pytest.raises(RuntimeError, match="must support a 'device' arg"):
            skip_init(getattr(nn, name), 3, 5)


@pytest.mark.parametrize("name", NAMES)
def test_default_dtype_and_factory_arguments_are_obeyed(name: str) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        assert next(getattr(fastrnn, name)(3, 5).parameters()).dtype is torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    module = getattr(fastrnn, name)(3, 5, device=torch.device("cpu"), dtype=torch.bfloat16)
    assert all(parameter.dtype is torch.bfloat16 for parameter in module.parameters())
    assert first(module(an_input(name).bfloat16())).dtype is torch.bfloat16


@pytest.mark.parametrize("name", NAMES)
def test_conversions_there_and_back_keep_the_results(name: str) -> None:
    ours, _ = both(name, 3, 5)
    x = an_input(name)
    expected = first(ours(x))
    assert torch.equal(first(ours.double().float()(x)), expected)
    assert first(ours.half()(x.half())).dtype is torch.float16
    assert first(ours.to(torch.float32)(x)).dtype is torch.float32
    assert torch.equal(first(ours.share_memory().cpu()(x)), first(ours(x)))


SETTINGS = """
import sys, warnings, signal, torch

def settings():
    return (
        torch.get_default_dtype(), torch.get_default_device(), torch.get_num_threads(), torch.is_grad_enabled(),
        torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision(), torch.initial_seed(),
        torch.get_rng_state().tolist(), torch.backends.mkldnn.enabled,
        torch.__future__.get_swap_module_params_on_conversion(),
        torch.nn.LSTM, torch.nn.LSTM.forward, torch.nn.RNNBase.__setstate__, warnings.filters[:],
        signal.getsignal(signal.SIGINT),
    )

torch.empty(1)
before = settings()
import fastrnn
assert settings() == before
assert "torch._dynamo" not in sys.modules
"""


def test_import_changes_no_global_configuration() -> None:
    subprocess.run([sys.executable, "-W", "error", "-c", SETTINGS], check=True)
