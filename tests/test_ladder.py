# SPDX-License-Identifier: BSD-3-Clause
"""The ladder of a call, rung by rung: kernel, reference, torch.nn. Which calls leave the first, seen by what they run,
and that whatever the kernels do not take has torch.nn's own outcome, result or error."""

from __future__ import annotations

import copy

import pytest
import torch
from plain_calls import replaced_call
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.testing._internal.two_tensor import TwoTensor
from twins import LAYERS, NAMES, STEPS, an_input, both, first, like, tensors_of

import fastrnn

KERNEL_TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.fixture
def left(monkeypatch):
    """The rungs below the kernel that were stood on, one entry for each call of torch.nn and sweep of the reference."""
    stood: list[str] = []

    def watch(holder: object, attribute: str, rung: str) -> None:
        original = getattr(holder, attribute)

        def watched(*arguments, **options):
            stood.append(rung)
            return original(*arguments, **options)

        monkeypatch.setattr(holder, attribute, watched)

    for name in NAMES:
        watch(getattr(nn, name), "forward", "torch")
    watch(fastrnn.reference, "_sweep", "reference")
    return stood


@pytest.fixture
def no_extension(monkeypatch):
    """As where fastrnn._C cannot be loaded."""
    monkeypatch.setattr(fastrnn.autograd, "_C", None)
    monkeypatch.setattr(fastrnn.extension, "module", None)
    monkeypatch.setattr(nn.Module, "_call_impl", replaced_call())


def inputs(name: str, dtype: torch.dtype = torch.float32) -> list[object]:
    """Every form of input: batched, unbatched, strided, with gradient, an empty batch, packed."""
    x = an_input(name).to(dtype)
    forms = [x, x.clone().requires_grad_(), x[..., [2, 0, 1]], x.transpose(0, -2).contiguous().transpose(0, -2)]
    if name in STEPS:
        return [*forms, x[0], x[:0]]
    packed = [pack_sequence([x[:3, 0], x[:1, 1]]), pack_sequence([x[:1, 0], x[:3, 1]], enforce_sorted=False)]
    return [*forms, x[:, 0], x[:, :0], *packed]


def outcome(call, *arguments) -> object:
    """The tensors of the output, or the type of the error."""
    try:
        return tensors_of(call(*arguments))
    except Exception as error:
        return type(error)


def assert_same_outcome(found: object, expected: object) -> None:
    assert isinstance(found, list) == isinstance(expected, list), f"{found} where torch has {expected}"
    if not isinstance(found, list):
        assert found is expected
        return
    for a, b in zip(found, expected, strict=True):
        assert type(a) is type(b)
        assert a.layout is b.layout
        torch.testing.assert_close(a, b, equal_nan=True)


# ---- the kernel ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", KERNEL_TYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_ordinary_calls_never_leave_the_kernel(name, dtype, left, compiled):
    for options in ({}, {"bias": False}) if name in STEPS else ({}, {"num_layers": 2, "bidirectional": True}):
        module = getattr(fastrnn, name)(3, 5, dtype=dtype, **options)
        for x in inputs(name, dtype):
            state = like(module(x)[1] if name in LAYERS else module(x), lambda t: t.detach().clone())
            module(x, state)
            with torch.no_grad():
                module(x, state)
            assert left == []
            assert "-> kernel: " in fastrnn.explain(module, x, state)
            left.clear()  # explain asks a stock module that has no memory
        with torch.inference_mode():
            module(an_input(name).to(dtype))
        module.eval()(an_input(name).to(dtype))
    assert left == []


@pytest.mark.parametrize("name", NAMES)
def test_converted_modules_stay_on_the_kernel(name, left, compiled):
    module = getattr(nn, name)(3, 5)
    module(an_input(name))
    fastrnn.convert(module)
    module(an_input(name))
    fastrnn.revert(module)
    module(an_input(name))
    assert left == ["torch"] * 2


# ---- the reference -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_transforms_go_to_the_reference(name, left, compiled):
    module, x = getattr(fastrnn, name)(3, 5), an_input(name)
    torch.func.jvp(lambda x: first(module(x)), (x,), (x,))
    assert left
    assert set(left) == {"reference"}
    left.clear()
    torch.func.vmap(module)(torch.stack((x, x)))
    assert left == []  # folded into the batch


@pytest.mark.parametrize("name", NAMES)
def test_second_derivatives_go_to_the_reference(name, left, compiled):
    module, x = getattr(fastrnn, name)(3, 5), an_input(name).requires_grad_()
    (gradient,) = torch.autograd.grad(first(module(x)).sum(), x, create_graph=False)
    assert left == []
    (gradient,) = torch.autograd.grad(first(module(x)).sum(), x, create_graph=True)
    gradient.square().sum().backward()
    assert set(left) == {"reference"}


# ---- torch.nn ------------------------------------------------------------------------------------------------------


class Marked(Tensor):
    """A subclass without code of its own."""


def marked(t: Tensor) -> Tensor:
    return t.as_subclass(Marked)


# Of the input and of the weights: what the kernels do not take. (change of x, change of the module)
ODD = {
    "complex64": (lambda t: t.to(torch.complex64), lambda m: m.to(torch.complex64)),
    "complex128": (lambda t: t.to(torch.complex128), lambda m: m.to(torch.complex128)),
    "float8": (lambda t: t.to(torch.float8_e4m3fn), lambda m: m.to(torch.float8_e4m3fn)),
    "integers": (lambda t: t.to(torch.int64), None),
    "booleans": (lambda t: t > 0, None),
    "another float": (lambda t: t.double(), None),
    "weights of another float": (None, lambda m: m.double()),
    "half for float": (lambda t: t.half(), None),
    "subclass": (marked, None),
    "wrapper subclass": (lambda t: TwoTensor(t, t), None),
    "sparse": (lambda t: t.to_sparse(), None),
    "csr": (lambda t: t[0].to_sparse_csr() if t.dim() == 3 else t.to_sparse_csr(), None),
    "mkldnn": (lambda t: t.to_mkldnn(), None),
    "nested": (lambda t: torch.nested.nested_tensor(list(t)), None),
    "jagged": (lambda t: torch.nested.nested_tensor(list(t), layout=torch.jagged), None),
    "quantized": (lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), None),
    "meta": (lambda t: t.to("meta"), lambda m: m.to("meta")),
    "meta for cpu": (lambda t: t.to("meta"), None),
    "not a tensor": (lambda t: t.tolist(), None),
    "numpy": (lambda t: t.numpy(), None),
    "nothing": (lambda t: None, None),
}


@pytest.mark.filterwarnings("ignore:.*quantize_per_tensor:UserWarning", "ignore:.*[Nn]ested:UserWarning")
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning", "ignore:Complex modules:UserWarning")
@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("name", NAMES)
def test_what_the_kernels_do_not_take_has_torchs_outcome(name, odd, left):
    of_x, of_module = ODD[odd]
    made = both(name, 3, 5)
    x = an_input(name) if of_x is None else of_x(an_input(name))
    for module in made:
        if of_module is not None:
            of_module(module)
    ours, theirs = made
    found = outcome(ours, x)
    assert left in (["torch"], []), "the reference is for transforms"
    assert_same_outcome(found, outcome(theirs, x))
    explained = fastrnn.explain(ours, x)
    assert "-> kernel" not in explained
    assert ("-> refused" in explained) <= (not isinstance(found, list))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_the_torch_rung_are_torchs(name, left):
    ours, theirs = both(name, 3, 5)
    found = []
    for module in (ours, theirs):
        x = an_input(name).requires_grad_()
        first(module(marked(x))).square().sum().backward()
        found.append([x.grad, *(p.grad for p in module.parameters())])
    assert left == ["torch"] * 2
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_weights_of_an_odd_class_have_torchs_outcome(name, left):
    ours, theirs = both(name, 3, 5)
    for module in (ours, theirs):
        for key, parameter in list(module.named_parameters()):
            module.register_parameter(key, nn.Parameter(parameter.detach().as_subclass(Marked)))
    found = outcome(ours, an_input(name))
    assert left == ["torch"]
    assert_same_outcome(found, outcome(theirs, an_input(name)))


# ---- without the extension -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", KERNEL_TYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_without_the_extension_every_call_is_torchs(name, dtype, no_extension, left):
    ours, theirs = both(name, 3, 5, dtype=dtype)
    for x in inputs(name, dtype):
        left.clear()
        output = ours(x)
        assert left == ["torch"]
        state = like(output[1] if name in LAYERS else output, lambda t: t.detach())
        assert_same_outcome(tensors_of(ours(x, state)), tensors_of(theirs(x, state)))
        assert "because the extension is not loaded" in fastrnn.explain(ours, x)


@pytest.mark.parametrize("name", LAYERS)
def test_without_the_extension_the_functions_work_and_derive_twice(name, no_extension):
    module = getattr(nn, name)(3, 5, dtype=torch.float64)
    weights = [parameter.detach().requires_grad_() for parameter in module.parameters()]
    function = getattr(fastrnn.functional, name.lower())
    x = an_input(name).double().requires_grad_()

    def output(x, *weights):
        return function(x, weights=weights)[0]

    torch.testing.assert_close(output(x, *weights), module(x)[0])
    assert torch.autograd.gradcheck(output, (x, *weights))
    small = x[:2, :1].detach().requires_grad_()
    assert torch.autograd.gradgradcheck(output, (small, *weights))


@pytest.mark.parametrize("name", NAMES)
def test_without_the_extension_the_ways_of_programs_work(name, no_extension):
    ours, theirs = both(name, 3, 5)
    fastrnn.convert(theirs)
    for module in (theirs, copy.deepcopy(theirs), theirs.to_torch()):
        for a, b in zip(tensors_of(module(an_input(name))), tensors_of(ours(an_input(name))), strict=True):
            torch.testing.assert_close(a, b)
    packed = [pack_sequence([torch.ones(3, 3), torch.ones(1, 3)])] if name in LAYERS else []
    for x in packed:
        assert isinstance(ours(x)[0], PackedSequence)
