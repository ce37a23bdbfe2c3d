# SPDX-License-Identifier: BSD-3-Clause
"""Modules under autograd: some outputs, some gradients, changes in place, second derivatives."""

from __future__ import annotations

import pytest
import torch
from twins import (
    CELLS,
    CLASSES,
    NAMES,
    STEPS,
    an_input,
    both,
    first,
    like,
    random_state,
    tensors_of,
    twins,
)

import fastrnn

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")


def scalar(outputs: list[torch.Tensor]) -> torch.Tensor:
    return sum((k + 1) * tensor.square().sum() for k, tensor in enumerate(outputs))


@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 1), (1, 2)], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_gradients_with_some_outputs_used(cell, used):
    results = []
    for module in twins(cell, 3, 9, bidirectional=True):
        generator = torch.Generator().manual_seed(3)
        x = torch.randn(4, 2, 3, generator=generator).requires_grad_()
        hx = like(random_state(cell, 2, 2, H=9), lambda t: t.requires_grad_())
        outputs = tensors_of(module(x, hx))
        if max(used) >= len(outputs):
            pytest.skip("no cell state")
        scalar([outputs[k] for k in used]).backward()
        results.append([x.grad, *(h.grad for h in tensors_of(hx)), *(p.grad for p in module.parameters())])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("wanted", ["x", "h0", "weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0_reverse"])
@pytest.mark.parametrize("cell", CELLS)
def test_gradient_of_one_tensor_alone(cell, wanted):
    results = []
    for module in twins(cell, 3, 9, bidirectional=True):
        module.requires_grad_(False)
        x = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(3))
        hx = random_state(cell, 2, 2, H=9)
        leaf = {"x": x, "h0": tensors_of(hx)[0]}.get(wanted)
        leaf = module.get_parameter(wanted) if leaf is None else leaf
        leaf.requires_grad_()
        scalar(tensors_of(module(x, hx))).backward()
        results.append(leaf.grad)
        others = [p for p in module.parameters() if p is not leaf]
        assert all(p.grad is None for p in others)
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_requires_grad_where_nothing_was_asked(name):
    ours, _ = both(name, 3, 5)
    x = an_input(name)
    assert first(ours(x)).requires_grad
    with torch.no_grad():
        assert not first(ours(x)).requires_grad
    with torch.inference_mode():
        assert first(ours(x)).is_inference()
    ours.requires_grad_(False)
    assert not first(ours(x)).requires_grad
    assert first(ours(x.requires_grad_())).requires_grad


@pytest.mark.parametrize("cell", CELLS)
def test_change_of_a_saved_tensor_is_noticed(cell):
    ours, _ = twins(cell, 3, 9)
    with torch.no_grad():
        for change in ("x", "weight_hh_l0", "h0"):
            x, hx = torch.randn(4, 2, 3), random_state(cell, 1, 2, H=9)
            with torch.enable_grad():
                y, _ = ours(x, hx)
            {"x": x, "h0": tensors_of(hx)[0], "weight_hh_l0": ours.weight_hh_l0}[change].add_(1)
            with torch.enable_grad(), pytest.raises(RuntimeError, match="modified by an inplace operation"):
                y.sum().backward()


@pytest.mark.parametrize("cell", CELLS)
def test_an_optimizer_may_step_between_the_backwards_of_two_steps_of_a_cell(cell):
    """As with torch.nn: without gradients of the input and the state nothing is read that the optimizer changes."""
    gradients = []
    for module in twins(cell, 3, 9, step=True):
        torch.manual_seed(3)
        first_loss, second_loss = (tensors_of(module(torch.randn(2, 3)))[0].square().sum() for _ in range(2))
        optimizer = torch.optim.SGD(module.parameters(), 0.1)
        first_loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        second_loss.backward()
        gradients.append([parameter.grad for parameter in module.parameters()])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_change_of_a_bias_does_no_harm_before_a_first_derivative_and_is_noticed_before_a_second(cell, recompute):
    options = {"nonlinearity": "relu"} if cell == "rnn_relu" else {}
    ours = getattr(fastrnn, CLASSES[cell])(3, 9, num_layers=2, recompute=recompute, **options)
    x = torch.randn(4, 2, 3, requires_grad=True)
    leaves = [x, *ours.parameters()]
    y, _ = ours(x)
    expected = torch.autograd.grad(y.square().sum(), leaves, retain_graph=True)
    with torch.no_grad():
        ours.bias_hh_l0.add_(1)
    if not recompute:
        found = torch.autograd.grad(y.square().sum(), leaves, retain_graph=True)
        assert all(map(torch.equal, found, expected))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y.square().sum(), leaves, create_graph=not recompute)


@pytest.mark.parametrize("cell", CELLS)
def test_change_of_input_weights_does_no_harm_where_the_input_wants_no_gradient(cell):
    ours, _ = twins(cell, 3, 9)
    for wants in (False, True):
        x = torch.randn(4, 2, 3, requires_grad=wants)
        y, _ = ours(x)
        expected = torch.autograd.grad(y.sum(), list(ours.parameters()), retain_graph=True)
        with torch.no_grad():
            ours.weight_ih_l0.add_(1)
        if wants:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                y.sum().backward()
        else:
            found = torch.autograd.grad(y.sum(), list(ours.parameters()))
            assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("cell", CELLS)
def test_recurrent_weights_of_one_step_are_read_where_the_state_wants_a_gradient(cell):
    ours, _ = twins(cell, 3, 9, step=True)
    x, hx = torch.randn(2, 3), like(random_state(cell, 1, 2, H=9), lambda t: t[0].requires_grad_())
    h = tensors_of(ours(x, hx))[0]
    with torch.no_grad():
        ours.weight_hh.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        h.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("cell", CELLS)
def test_change_of_an_output_in_place_is_as_harmless_as_in_torch(cell, which, dtype):
    """torch saves the output of its float32 LSTM and notices the change; everywhere else the gradient is right."""
    ours, theirs = twins(cell, 3, 9, dtype=dtype)
    x = torch.randn(4, 2, 3, dtype=dtype)
    if which >= len(tensors_of(ours(x))):
        pytest.skip("no cell state")
    if cell == "lstm" and dtype == torch.float32 and which == 0:
        for module in (ours, theirs):
            changed = module(x)[0].mul_(2)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                changed.sum().backward()
        return
    gradients = []
    for change in (lambda t: t * 2, lambda t: t.mul_(2)):
        leaf = x.clone().requires_grad_()
        change(tensors_of(ours(leaf))[which]).sum().backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("name", NAMES)
def test_backward_twice_needs_retain_graph(name):
    ours, _ = both(name, 3, 5)
    loss = first(ours(an_input(name))).sum()
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in ours.parameters()]
    loss.backward()
    for gradient, parameter in zip(once, ours.parameters(), strict=True):
        assert torch.equal(2 * gradient, parameter.grad)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=["plain", "deep"])
@pytest.mark.parametrize("name", NAMES)
def test_second_derivatives_are_right(name, options):
    if name in STEPS and options:
        pytest.skip("a cell has no layers")
    sizes = (2, 3)
    torch.manual_seed(0)
    ours = getattr(fastrnn, name)(*sizes, dtype=torch.float64, **options)
    lead = (2,) if name in STEPS else (3, 2)
    x = torch.randn(*lead, 2, dtype=torch.float64, requires_grad=True)
    rows = 4 if options else 1
    h = torch.randn(*((2,) if name in STEPS else (rows, 2)), 3, dtype=torch.float64, requires_grad=True)
    hx = (lambda h: (h, 0.5 * h)) if "LSTM" in name else (lambda h: h)
    weights = dict(ours.named_parameters())

    def run(x, h, *values):
        return tuple(tensors_of(torch.func.functional_call(ours, dict(zip(weights, values, strict=True)), (x, hx(h)))))

    arguments = (x, h, *weights.values())
    assert torch.autograd.gradcheck(run, arguments, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, arguments, fast_mode=True)


def test_gradient_penalty_equals_torch_nn():
    for cell in CELLS:
        results = []
        for module in twins(cell, 3, 9, 2):
            x = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(3)).requires_grad_()
            y, _ = module(x)
            (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
            gradient.square().sum().backward()
            results.append([p.grad for p in module.parameters()])
        torch.testing.assert_close(*results, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("cell", CELLS)
def test_backward_may_run_on_another_instruction_set(cell, compiled):
    """What forward saves has one layout, whichever code wrote it."""
    ours, _ = twins(cell, 5, 21)
    x = torch.randn(4, 3, 5)
    chosen, gradients = compiled.isa(), []
    try:
        for isa in compiled.available_isas():
            compiled.select_isa(chosen)
            y = ours(x)[0]
            compiled.select_isa(isa)
            gradients.append(torch.autograd.grad(y.square().sum(), ours.weight_hh_l0)[0])
    finally:
        compiled.select_isa(chosen)
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0])


def test_gradient_passes_where_a_relu_gave_nan(isa):
    ours, theirs = twins("rnn_relu", 2, 3)
    gradients = []
    for module in (ours, theirs):
        with torch.no_grad():
            module.weight_ih_l0[0] = torch.tensor([float("inf"), -float("inf")])
        y, _ = module(torch.ones(1, 1, 2))
        assert y[..., 0].isnan().all()
        gradients.append(torch.autograd.grad(y.sum(), module.weight_ih_l0)[0])
    assert torch.equal(*gradients)
