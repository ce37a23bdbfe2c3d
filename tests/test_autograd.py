# SPDX-License-Identifier: BSD-3-Clause
"""The derivatives of the operators, through both doors: the eager one of autograd.py and torch.ops.fastrnn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accuracy import assert_accurate
from doors import Door, as_function, assert_close, eager, operator_arguments, registered
from samples import CELLS, Sample, cotangents, gradients, sample, stock
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = [
    pytest.mark.usefixtures("compiled"),
    # torch's own forward-mode decompositions are scripted at their first use, and torch warns of that
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),
]

SHAPES = {
    "plain": dict(T=5, B=3, I=4, H=7),
    "bidirectional": dict(T=3, B=2, I=3, H=17, D=2),
    "no-bias": dict(T=3, B=2, I=3, H=5, D=2, bias=False),
    "packed": dict(lengths=(5, 3, 3, 1), I=3, H=5, D=2),
}
CASES = [pytest.param(cell, options, id=f"{cell}-{name}") for cell in CELLS for name, options in SHAPES.items()] + [
    pytest.param("lstm", dict(lengths=(4, 2, 1), I=4, H=6, P=2, D=2), id="lstm-projection-packed-bidirectional"),
]


@pytest.fixture(params=[eager, registered])
def door(request: pytest.FixtureRequest) -> Door:
    return request.param


# ---- numbers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("cell", "options"), CASES)
def test_layer_and_gradients_are_as_accurate_as_torch(
    cell: str, options: dict, dtype: torch.dtype, door: Door, isa: str
) -> None:
    layer = sample(cell, **options, dtype=dtype, requires_grad=True)
    exact = layer.to(torch.float64, requires_grad=True)
    ours, theirs, truth = door(layer), stock(layer), stock(exact)
    for name, a, b, c in zip(("y", "h_n", "c_n"), ours, theirs, truth, strict=False):
        assert_accurate(a, b, c, name)
    peers, truths = gradients(theirs, layer), gradients(truth, exact)
    for name, gradient in gradients(ours, layer).items():
        assert_accurate(gradient, peers[name], truths[name], f"d_{name}")


@pytest.mark.parametrize(("cell", "options"), CASES)
def test_every_door_gives_the_same_bits(cell: str, options: dict) -> None:
    layer = sample(cell, **options, dtype=torch.float32, requires_grad=True)
    with torch.no_grad():
        direct = eager(layer)
    frozen = eager(layer.to(torch.float32))
    outputs = [eager(layer), registered(layer), registered(layer, save=False)]
    for others in (frozen, *outputs):
        assert all(torch.equal(a, b) for a, b in zip(direct, others, strict=True))
    first, *rest = [gradients(each, layer) for each in outputs]
    for other in rest:
        assert all(torch.equal(gradient, other[name]) for name, gradient in first.items())


def test_no_output_shares_memory(door: Door) -> None:
    for cell in CELLS:
        layer = sample(cell, T=1, B=1, requires_grad=True)
        tensors = [t for t in (*layer.tensors(), *door(layer)) if t is not None]
        assert len({t.untyped_storage().data_ptr() for t in tensors}) == len(tensors)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("lengths", [None, (3, 2, 1)], ids=["padded", "packed"])
def test_gradcheck_of_first_and_second_order(cell: str, lengths: tuple[int, ...] | None, door: Door, isa: str) -> None:
    layer = sample(
        cell, T=3, B=2, lengths=lengths, I=2, H=3, D=2, P=2 if cell == "lstm" else 0, requires_grad=True, seed=2
    )
    function, inputs = as_function(layer, door)
    assert torch.autograd.gradcheck(function, inputs, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


# ---- the operators as PyTorch sees them ----------------------------------------------------------------------------


OPERATORS = [
    pytest.param(cell, options, id=f"{cell}-{name}")
    for cell, projection in (("lstm", dict(P=3)), ("lstm", {}), ("gru", {}), ("rnn_relu", {}))
    for name, options in (
        (f"projection-{'P' in projection}-padded", dict(T=3, B=2, H=5, D=2, **projection)),
        (f"projection-{'P' in projection}-packed", dict(lengths=(3, 1), H=5, bias=False, **projection)),
    )
]


@pytest.mark.parametrize(
    ("dtype", "requires_grad", "save"),
    [
        (torch.float32, True, True),
        (torch.float32, True, False),
        (torch.float32, False, False),
        (torch.bfloat16, True, True),
    ],
    ids=["gradient", "gradient-not-saved", "no-gradient", "bfloat16"],
)
@pytest.mark.parametrize(("cell", "options"), OPERATORS)
def test_opcheck_of_the_forward_operator(
    cell: str, options: dict, dtype: torch.dtype, requires_grad: bool, save: bool
) -> None:
    layer = sample(cell, **options, dtype=dtype, requires_grad=requires_grad)
    torch.library.opcheck(getattr(torch.ops.fastrnn, layer.operator), operator_arguments(layer, save))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("cell", "options"), OPERATORS)
def test_opcheck_of_the_backward_operator(cell: str, options: dict, dtype: torch.dtype) -> None:
    layer = sample(cell, **options, dtype=dtype)
    needs = sum(1 << k for k, tensor in enumerate(layer.tensors()) if tensor is not None and k != 1)
    operator = getattr(torch.ops.fastrnn, f"{layer.operator}_backward")
    torch.library.opcheck(operator, backward_arguments(layer, needs))


def backward_arguments(layer: Sample, needs: int) -> list[Any]:
    arguments = operator_arguments(layer, save=True)
    outputs = getattr(torch.ops.fastrnn, layer.operator)(*arguments)
    results = 3 if layer.cell == "lstm" else 2
    options = layer.tail()[1:]
    inputs = arguments[: len(arguments) - 1 - len(options)]
    return [*cotangents(outputs[:results]), *inputs, outputs[0], *outputs[results:], *options, needs]


@pytest.mark.parametrize("cell", CELLS)
def test_backward_operator_computes_only_what_is_wanted(cell: str) -> None:
    layer = sample(cell, D=2, P=3 if cell == "lstm" else 0)
    operator = getattr(torch.ops.fastrnn, f"{layer.operator}_backward")
    names = layer.names()
    complete = operator(*backward_arguments(layer, (1 << len(names)) - 1))
    for position, name in enumerate(names):
        alone = operator(*backward_arguments(layer, 1 << position))
        assert torch.equal(alone[position], complete[position]), name
        assert all(gradient.shape == (0,) for k, gradient in enumerate(alone) if k != position), name


# ---- which gradients -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", CELLS)
def test_gradient_of_each_output_alone(cell: str, door: Door) -> None:
    layer = sample(cell, D=2, requires_grad=True)
    inputs = [t for t in layer.tensors() if t is not None]
    for which, name in enumerate(("y", "h_n", "c_n")[: 3 if cell == "lstm" else 2]):
        ours, theirs = door(layer)[which], stock(layer)[which]
        cotangent = torch.randn_like(ours)
        found = torch.autograd.grad(ours, inputs, cotangent)
        expected = torch.autograd.grad(theirs, inputs, cotangent)
        for a, b, given in zip(found, expected, layer.names(), strict=False):
            assert_close(a, b, f"d_{given} of {name}")


@pytest.mark.parametrize("cell", CELLS)
def test_gradient_for_each_tensor_alone(cell: str, door: Door) -> None:
    """All but one frozen: state only, one bias only, ..."""
    complete = sample(cell, D=2, P=3 if cell == "lstm" else 0, requires_grad=True)
    expected = gradients(stock(complete), complete)
    for position, name in enumerate(complete.names()):
        frozen = complete.to(torch.float64)
        tensors = frozen.tensors()
        tensors[position].requires_grad_()
        outputs = door(frozen)
        found = torch.autograd.grad(outputs, tensors[position], cotangents(outputs))[0]
        assert_close(found, expected[name], name)


def test_undefined_gradients_reach_the_operator_as_none() -> None:
    seen = []

    class Spy(TorchDispatchMode):  # under a mode the eager door, too, calls the operator
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.fastrnn.lstm_layer_backward.default:
                seen.append((*(gradient is None for gradient in args[:3]), args[-1]))
            return func(*args, **(kwargs or {}))

    layer = sample("lstm")
    layer.x.requires_grad_()
    layer.weights[0][1].requires_grad_()
    y, h_n, c_n = eager(layer)
    with Spy():
        c_n.sum().backward(retain_graph=True)
        (y.sum() + h_n.sum()).backward()
    assert seen == [(True, True, False, 1 << 0 | 1 << 4), (False, False, True, 1 << 0 | 1 << 4)]


@pytest.mark.parametrize("cell", CELLS)
def test_batch_of_none_has_zero_gradients(cell: str, door: Door) -> None:
    layer = sample(cell, T=2, B=0, D=2, requires_grad=True)
    outputs = door(layer)
    assert [tuple(out.shape) for out in outputs] == [(2, 0, 14)] + [(2, 0, 7)] * (len(outputs) - 1)
    for name, gradient in gradients(outputs, layer).items():
        assert gradient.shape == dict(zip(layer.names(), layer.tensors(), strict=False))[name].shape
        assert not gradient.any()


@pytest.mark.parametrize("cell", CELLS)
def test_gradients_are_contiguous(cell: str, door: Door) -> None:
    layer = sample(cell, D=2, requires_grad=True)
    strided = layer.with_tensors([t if t is None or t.dim() < 2 else t.mT.contiguous().mT for t in layer.tensors()])
    assert not strided.x.is_contiguous()
    for name, gradient in gradients(door(strided), strided).items():
        assert gradient.is_contiguous(), name


# ---- the graph -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", CELLS)
def test_graph_can_be_kept_and_is_freed(cell: str, door: Door) -> None:
    layer = sample(cell, requires_grad=True)
    loss = sum(out.square().sum() for out in door(layer))
    loss.backward(retain_graph=True)
    once = layer.x.grad.clone()
    loss.backward()
    assert torch.equal(layer.x.grad, 2 * once)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("cell", CELLS)
def test_changes_in_place_are_noticed_or_harmless(cell: str, door: Door) -> None:
    """Harmless is that of a bias, which the derivative does not read, though a door may notice it."""
    count = len([t for t in sample(cell, D=2).tensors() if t is not None])
    for position in range(count + 1):
        layer = sample(cell, D=2, requires_grad=True)
        leaves = [t for t in layer.tensors() if t is not None]
        biases = [b for weights in layer.weights for b in weights[2:4]]
        outputs = door(layer)
        expected = torch.autograd.grad(outputs[1].sum(), leaves, retain_graph=True)
        changed = [*leaves, outputs[0]][position]
        with torch.no_grad():
            changed.add_(1)
        try:
            found = torch.autograd.grad(outputs[1].sum(), leaves)
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
        else:
            assert any(changed is bias for bias in biases)
            assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("cell", CELLS)
def test_second_order_with_dependent_arguments(cell: str, door: Door) -> None:
    """The state computed from x and one set of weights for both directions: nothing may be counted twice."""
    base = sample(cell, T=3, B=2, I=4, H=4, D=2, requires_grad=True)
    leaves = [base.x, *(w for w in base.weights[0] if w is not None)]

    def hessian_product(run: Door) -> list[Tensor]:
        state = tuple(base.x.mean(0).mul(scale).tanh().expand(2, 2, 4) for scale in range(1, 1 + len(base.state)))
        tied = Sample(cell, base.x, state, (base.weights[0],) * 2)
        outputs = run(tied)
        loss = sum((out * weight).sum() for out, weight in zip(outputs, cotangents(outputs), strict=True))
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        return [*first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves)]

    for position, (a, b) in enumerate(zip(hessian_product(door), hessian_product(stock), strict=True)):
        assert_close(a, b, f"derivative {position}")


def test_third_order(door: Door) -> None:
    for cell in CELLS[:3]:
        layer = sample(cell, T=2, B=1, I=2, H=2, requires_grad=True)

        def third(run: Door, layer: Sample = layer) -> Tensor:
            derivative = sum(out.square().sum() for out in run(layer))
            for _ in range(3):
                derivative = torch.autograd.grad(derivative, layer.x, create_graph=True)[0].square().sum()
            return derivative

        assert_close(third(door), third(stock), cell)


def test_checkpoint_gives_the_same_gradients() -> None:
    from torch.utils.checkpoint import checkpoint

    layer = sample("lstm", requires_grad=True)
    function, inputs = as_function(layer, eager)
    expected = gradients(eager(layer), layer)
    for reentrant in (False, True):
        y, h_n, c_n = checkpoint(function, *inputs, use_reentrant=reentrant)
        loss = sum((out * c).sum() for out, c in zip((y, h_n, c_n), cotangents((y, h_n, c_n)), strict=True))
        loss.backward()
        for name, tensor in zip(layer.names(), layer.tensors(), strict=False):
            if tensor is not None:
                assert torch.equal(tensor.grad, expected[name]), name
                tensor.grad = None


def test_inference_mode_and_no_grad_record_nothing() -> None:
    layer = sample("gru", requires_grad=True)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert not any(out.requires_grad for out in eager(layer))
