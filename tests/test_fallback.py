# SPDX-License-Identifier: BSD-3-Clause
"""Modules where the kernels do not go: autocast, meta, fake and complex tensors, subclasses, tracing, torch.func."""

from __future__ import annotations

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence
from twins import (
    LAYERS,
    NAMES,
    STEPS,
    an_input,
    both,
    first,
    tensors_of,
)

import fastrnn

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")


@pytest.mark.parametrize("name", NAMES)
def test_autocast_is_torchs(name):
    ours, theirs = both(name, 3, 5)
    x = an_input(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for argument in (x, x.bfloat16()):
            found, expected = ours(argument), theirs(argument)
            for a, b in zip(tensors_of(found), tensors_of(expected), strict=True):
                assert a.dtype is b.dtype
                assert torch.equal(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_meta_device_and_fake_tensors_work(name):
    from torch._subclasses import FakeTensorMode

    ours = getattr(fastrnn, name)(3, 5, device="meta")
    assert first(ours(an_input(name).to("meta"))).device.type == "meta"
    with FakeTensorMode():
        fake = getattr(fastrnn, name)(3, 5)
        first(fake(torch.empty(an_input(name).shape))).sum().backward()
    ours.to_empty(device="cpu")
    torch.manual_seed(7)
    ours.reset_parameters()
    assert torch.equal(first(ours(an_input(name))), first(both(name, 3, 5)[0](an_input(name))))


@pytest.mark.parametrize("name", NAMES)
def test_complex_numbers_work_as_in_torch(name):
    ours, theirs = both(name, 3, 5, dtype=torch.complex64)
    x = an_input(name).to(torch.complex64)
    assert torch.equal(first(ours(x)), first(theirs(x)))


@pytest.mark.parametrize("name", NAMES)
def test_subclass_of_tensor_keeps_its_class(name):
    class Marked(torch.Tensor):
        pass

    ours, theirs = both(name, 3, 5)
    x = an_input(name).as_subclass(Marked)
    assert type(first(ours(x))) is type(first(theirs(x)))
    torch.testing.assert_close(first(ours(x)), first(theirs(x)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_jit_trace_works(name):
    ours, _ = both(name, 3, 5)
    x = an_input(name)
    traced = torch.jit.trace(ours, (x,))
    torch.testing.assert_close(first(traced(2 * x)), first(ours(2 * x)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_torch_func_works(name):
    ours, _ = both(name, 3, 5)
    ours.double()
    x = an_input(name).double()
    weights = dict(ours.named_parameters())

    def loss(values, x):
        return first(torch.func.functional_call(ours, values, (x,))).square().sum()

    tangent = torch.ones_like(x)
    _, forward_mode = torch.func.jvp(lambda x: loss(weights, x), (x,), (tangent,))
    reverse_mode = (torch.func.grad(loss, argnums=1)(weights, x) * tangent).sum()
    torch.testing.assert_close(forward_mode, reverse_mode)
    batch_dim = 0 if name in STEPS else 1
    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, batch_dim))(weights, x)
    whole = torch.func.grad(loss)(weights, x)
    for parameter, gradient in whole.items():
        torch.testing.assert_close(per_sample[parameter].sum(0), gradient)


@pytest.mark.parametrize("name", NAMES)
def test_checkpoint_gives_the_same_gradients(name):
    from torch.utils.checkpoint import checkpoint

    ours, _ = both(name, 3, 5)
    gradients = []
    for run in (ours, lambda x: checkpoint(ours, x, use_reentrant=False)):
        x = an_input(name).requires_grad_()
        first(run(x)).sum().backward()
        gradients.append([x.grad, *(p.grad for p in ours.parameters())])
        ours.zero_grad()
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", LAYERS)
def test_missing_extension_leaves_torchs_numbers(name, monkeypatch):
    monkeypatch.setattr(fastrnn.autograd, "_C", None)
    ours, theirs = both(name, 3, 5, num_layers=2, bidirectional=True)
    for x in (an_input(name), pack_sequence([torch.ones(3, 3), torch.ones(1, 3)])):
        for a, b in zip(tensors_of(ours(x)), tensors_of(theirs(x)), strict=True):
            torch.testing.assert_close(a, b)  # oneDNN has not the same bits at every call
