# SPDX-License-Identifier: BSD-3-Clause
"""torch.func, forward-mode AD, batched cotangents and dispatch modes over the layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from calls import backward_values, call
from doors import Door, as_function, assert_close, eager, monitored, registered
from samples import CELLS, cotangents, sample, stock
from torch import Tensor
from twins import NAMES, an_input, both, first

pytestmark = [
    pytest.mark.usefixtures("compiled"),
    # torch's own forward-mode decompositions are scripted at their first use, and torch warns of that
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),
]


@pytest.fixture(params=[eager, registered])
def door(request: pytest.FixtureRequest) -> Door:
    return request.param


# ---- transforms ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", CELLS)
def test_forward_mode_gives_the_tangent(cell: str) -> None:
    """An operator with a registered derivative would give a tangent of zero, silently."""
    layer = sample(cell, D=2)
    ours, inputs = as_function(layer, eager)
    theirs, _ = as_function(layer, stock)
    tangents = tuple(cotangents(inputs))
    expected = torch.func.jvp(theirs, tuple(inputs), tangents)[1]
    for a, b in zip(torch.func.jvp(ours, tuple(inputs), tangents)[1], expected, strict=True):
        assert_close(a, b, "torch.func.jvp")
    with torch.autograd.forward_ad.dual_level():
        duals = [torch.autograd.forward_ad.make_dual(t, d) for t, d in zip(inputs, tangents, strict=True)]
        found = [torch.autograd.forward_ad.unpack_dual(out).tangent for out in ours(*duals)]
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, "forward_ad")


@pytest.mark.parametrize("cell", CELLS)
def test_func_grad_jacrev_hessian_and_vmap(cell: str) -> None:
    layer = sample(cell, T=2, B=2, I=2, H=3, D=2)
    function, inputs = as_function(layer, eager)
    everything = tuple(range(len(inputs)))

    def loss(*tensors: Tensor) -> Tensor:
        return sum(out.square().sum() for out in function(*tensors))

    leaves = [t.clone().requires_grad_() for t in inputs]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    for a, b in zip(torch.func.grad(loss, everything)(*inputs), expected, strict=True):
        assert_close(a, b, "grad")
    jacobian = torch.func.jacrev(lambda x: function(x, *inputs[1:])[0])(inputs[0])
    forward = torch.func.jacfwd(lambda x: function(x, *inputs[1:])[0])(inputs[0])
    assert_close(jacobian, forward, "jacobian")
    hessian = torch.func.hessian(lambda x: loss(x, *inputs[1:]))(inputs[0])
    assert_close(hessian, torch.autograd.functional.hessian(lambda x: loss(x, *inputs[1:]), inputs[0]), "hessian")

    samples = torch.stack([inputs[0], 2 * inputs[0], inputs[0].flip(0)])
    per_sample = torch.func.vmap(torch.func.grad(loss), (0, *(None,) * (len(inputs) - 1)))(samples, *inputs[1:])
    for which, x in enumerate(samples):
        leaf = x.clone().requires_grad_()
        assert_close(per_sample[which], torch.autograd.grad(loss(leaf, *inputs[1:]), leaf)[0], "per sample")


@pytest.mark.parametrize("lengths", [None, (3, 1)], ids=["padded", "packed"])
@pytest.mark.parametrize("batched", ["x", "state", "x-and-state", "weights", "everything"])
@pytest.mark.parametrize("cell", CELLS)
def test_vmap_keeps_the_kernel_and_its_bits(cell: str, batched: str, lengths: tuple[int, ...] | None) -> None:
    """Shared weights fold into the batch, an ensemble of weights is a call for each; both with gradients."""
    layers = [
        sample(cell, T=3, B=2, H=5, D=2, P=3 if cell == "lstm" else 0, lengths=lengths, seed=s, requires_grad=True)
        for s in range(3)
    ]
    function, _ = as_function(layers[0], eager)
    kinds = ["x", *["state"] * len(layers[0].state), *["weights"] * 10]
    columns = list(zip(*(as_function(layer, eager)[1] for layer in layers), strict=True))
    in_dims = [k % 2 if batched == "everything" or kinds[k] in batched else None for k in range(len(columns))]
    inputs = [c[0] if dim is None else torch.stack(c, dim) for c, dim in zip(columns, in_dims, strict=True)]
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    calls = []
    with monitored(calls):
        together = torch.func.vmap(function, tuple(in_dims))(*inputs)
    folded = batched in ("x", "state", "x-and-state")
    assert calls == [layers[0].operator] * (1 if folded else 3)
    alone = [
        function(*(t if dim is None else t.select(dim, v) for t, dim in zip(inputs, in_dims, strict=True)))
        for v in range(3)
    ]
    for a, b in zip(together, map(torch.stack, zip(*alone, strict=True)), strict=True):
        assert torch.equal(a, b)
    stacked = [torch.stack(same) for same in zip(*alone, strict=True)]
    expected = torch.autograd.grad(stacked, inputs, cotangents(together))
    for a, b in zip(torch.autograd.grad(together, inputs, cotangents(together)), expected, strict=True):
        assert_close(a, b, batched)


@pytest.mark.parametrize("cell", CELLS)
def test_batched_cotangents(cell: str, door: Door) -> None:
    layer = sample(cell, D=2, requires_grad=True)
    inputs = [t for t in layer.tensors() if t is not None]
    y = door(layer)[0]
    many = torch.randn(3, *y.shape, dtype=y.dtype)
    together = torch.autograd.grad(y, inputs, many, is_grads_batched=True, retain_graph=True)
    for which in range(3):
        for a, b in zip(together, torch.autograd.grad(y, inputs, many[which], retain_graph=True), strict=True):
            assert_close(a[which], b, "batched")


# ---- modes that watch operators ------------------------------------------------------------------------------------


def test_dispatch_modes_see_the_operators() -> None:
    for cell in CELLS:
        layer = sample(cell, requires_grad=True)
        outputs = eager(layer)
        calls: list[str] = []
        with monitored(calls):
            eager(layer)[0].sum().backward()
            outputs[0].sum().backward()  # recorded outside, by the eager door
        assert calls == [layer.operator, f"{layer.operator}_backward", f"{layer.operator}_backward"]


def test_make_fx_records_the_operator_and_not_its_result() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    for mode in ("real", "fake"):
        layer = sample("gru")
        function, inputs = as_function(layer, eager)
        graph = make_fx(function, tracing_mode=mode)(*inputs)
        others = [torch.randn_like(t) for t in inputs]
        for a, b in zip(graph(*others), function(*others), strict=True):
            assert_close(a, b, mode)


# ---- operators called directly -------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", [True, False])
@pytest.mark.parametrize("cell", CELLS)
def test_operator_called_directly_works_under_every_transform(cell: str, save: bool) -> None:
    """With a derivative registered through torch.library the tangents would be zero, without a word."""
    layer = sample(cell, T=3, B=2, I=2, H=3, D=2, P=2 if cell == "lstm" else 0)
    ours, inputs = as_function(layer, lambda each: registered(each, save))
    theirs, _ = as_function(layer, stock)
    tangents = tuple(cotangents(inputs))
    truth = torch.func.jvp(theirs, tuple(inputs), tangents)[1]

    def all_close(found: Sequence[Tensor], expected: Sequence[Tensor], name: str) -> None:
        for a, b in zip(found, expected, strict=True):
            assert_close(a, b, name)

    all_close(torch.func.jvp(ours, tuple(inputs), tangents)[1], truth, "jvp")
    all_close(torch.func.vmap(lambda *t: torch.func.jvp(ours, tuple(inputs), t)[1])(*(t[None] for t in tangents)),
              [t[None] for t in truth], "vmap(jvp)")  # fmt: skip
    with torch.autograd.forward_ad.dual_level():
        duals = [torch.autograd.forward_ad.make_dual(t, d) for t, d in zip(inputs, tangents, strict=True)]
        all_close([torch.autograd.forward_ad.unpack_dual(out).tangent for out in ours(*duals)], truth, "forward_ad")

    def loss(run: Door, x: Tensor) -> Tensor:
        return sum(out.square().sum() for out in run(x, *inputs[1:]))

    x = inputs[0].clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(theirs, x), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    gradient = torch.func.grad(lambda x: loss(ours, x))
    assert_close(gradient(inputs[0]), first.detach(), "grad")
    assert_close(torch.func.vmap(gradient)(inputs[0][None]), first.detach()[None], "vmap(grad)")
    assert_close(torch.func.grad(lambda x: gradient(x).square().sum())(inputs[0]), second, "grad(grad)")
    assert_close(torch.func.jacrev(lambda x: loss(ours, x))(inputs[0]), first.detach(), "jacrev")
    assert_close(torch.func.hessian(lambda x: loss(ours, x))(inputs[0]),
                 torch.autograd.functional.hessian(lambda x: loss(theirs, x), inputs[0]), "hessian")  # fmt: skip


@pytest.mark.parametrize("suffix", ["_backward", "_row_gradients"])
@pytest.mark.parametrize("cell", CELLS)
def test_operators_of_the_backward_pass_refuse_to_be_differentiated(cell: str, suffix: str) -> None:
    layer = sample(cell)
    values = backward_values(layer, needs=1)
    operator = f"{layer.operator}{suffix}"
    message = f"fastrnn.{operator}: no derivative here"

    def run(d_y: Tensor) -> Tensor:
        return call("dispatcher", operator, values | {"d_y": d_y})[0].sum()

    assert run(values["d_y"]) != 0
    with pytest.raises(NotImplementedError, match=message):
        run(values["d_y"].requires_grad_())
    d_y = values["d_y"].detach()
    with pytest.raises(NotImplementedError, match=message):
        torch.func.jvp(run, (d_y,), (d_y,))
    with pytest.raises(NotImplementedError, match=message):
        torch.func.grad(run)(d_y)
    with torch.autograd.forward_ad.dual_level():
        assert run(d_y) != 0
        with pytest.raises(NotImplementedError, match=message):
            run(torch.autograd.forward_ad.make_dual(d_y, d_y))


# ---- float32, where torch.nn's LSTM has no forward mode ------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_float32_modules_have_every_derivative(name: str) -> None:
    ours, theirs = both(name, 2, 3)
    theirs.double()
    x = an_input(name, 2)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))

    def close(a: Any, b: Any, what: str) -> None:
        torch.testing.assert_close(a, b.float(), rtol=1e-4, atol=1e-5, msg=lambda message: f"{what}: {message}")

    def run(module: torch.nn.Module, x: Tensor) -> Tensor:
        return first(module(x))

    def loss(module: torch.nn.Module, x: Tensor) -> Tensor:
        return run(module, x).square().sum()

    exact = x.double().requires_grad_()
    jacobian = torch.autograd.functional.jacobian(lambda x: run(theirs, x), exact)
    hessian = torch.autograd.functional.hessian(lambda x: loss(theirs, x), exact)
    close(torch.func.jacrev(lambda x: run(ours, x))(x), jacobian, "jacrev")
    close(torch.func.jacfwd(lambda x: run(ours, x))(x), jacobian, "jacfwd")
    expected = (jacobian * direction.double()).flatten(jacobian.dim() - x.dim()).sum(-1)
    close(torch.func.jvp(lambda x: run(ours, x), (x,), (direction,))[1], expected, "jvp")
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, direction)
        close(torch.autograd.forward_ad.unpack_dual(run(ours, dual)).tangent, expected, "forward_ad")
    close(torch.func.hessian(lambda x: loss(ours, x))(x), hessian, "hessian")
    close(torch.func.jacrev(torch.func.jacrev(lambda x: loss(ours, x)))(x), hessian, "jacrev(jacrev)")
    close(torch.autograd.functional.hessian(lambda x: loss(ours, x), x), hessian, "autograd.functional.hessian")
    _, pull = torch.func.vjp(torch.func.grad(lambda x: loss(ours, x)), x)
    product = (hessian * direction.double()).flatten(x.dim()).sum(-1)
    close(pull(direction)[0], product, "vjp(grad)")
    close(torch.func.jvp(torch.func.grad(lambda x: loss(ours, x)), (x,), (direction,))[1], product, "jvp(grad)")
    _, pull = torch.func.vjp(lambda x: run(ours, x), x)
    cotangent = run(ours, x).detach()
    tangent = torch.func.jvp(lambda c: pull(c)[0], (cotangent,), (cotangent,))[1]
    close(tangent, pull(cotangent)[0].double(), "jvp of a pull-back")


def test_torch_nn_has_no_forward_mode_for_its_float32_lstm() -> None:
    """The reason for the test above; when it fails, docs/compatibility.md is out of date."""
    x = torch.randn(3, 2, 2)
    module = torch.nn.LSTM(2, 3).requires_grad_(False)
    with pytest.raises(NotImplementedError, match="does not support it because it has not been implemented"):
        torch.func.jvp(lambda x: module(x)[0], (x,), (x,))
