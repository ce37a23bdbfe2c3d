# SPDX-License-Identifier: BSD-3-Clause
"""The operators with lengths, resets and masks, all at once: kernels against the reference, opcheck, compilers,
transforms; and what the operators and the Python forms say to arguments that do not fit."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from calls import CHECKED_DOORS, backward_values, call, forward, given
from doors import monitored
from samples import CELLS, Sample, cotangents, sample
from test_lengths import every_cell
from test_noise import functional_call
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from twins import CLASSES, tensors_of, twins

import fastrnn
from fastrnn import extended, operators
from fastrnn.extras import Extras

pytestmark = [
    pytest.mark.usefixtures("compiled"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning", "ignore:.*LeafSpec:FutureWarning"),
]
OPERATORS = {"lstm": operators.LSTM, "gru": operators.GRU, "rnn_tanh": operators.RNN, "rnn_relu": operators.RNN}
SHAPES = {
    "one": {"T": 1, "B": 3, "I": 3, "H": 5, "D": 2},
    "both": {"T": 6, "B": 5, "I": 4, "H": 17, "D": 2},
    "wide": {"T": 6, "B": 8, "I": 9, "H": 70, "D": 2, "bias": False},
    "projection": {"T": 6, "B": 5, "I": 4, "H": 20, "P": 3, "D": 2},
    "packed": {"lengths": (5, 3, 3, 1), "I": 3, "H": 9, "D": 2},
}
GIVEN = {
    "lengths": ("lengths",),
    "reset": ("lengths", "reset"),
    "reset_state": ("reset", "reset_h", "reset_c"),
    "everything": ("lengths", "reset", "reset_h", "reset_c", "h_mask", "zoneout_h", "zoneout_c"),
}


def extras_for(layer: Sample, names: Sequence[str], requires_grad: bool = False) -> Extras:
    """Random extras of these names, as far as the layer can have them."""
    generator = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    D, B, R = layer.state[0].shape
    H, rows, T, dtype = layer.state[-1].shape[2], layer.x.shape[:-1], layer.x.shape[0], layer.x.dtype
    made = {
        "lengths": (draw(B) * (T + 1)).long(),
        "reset": draw(T, B) < 0.4,
        "reset_h": draw(D, B, R).to(dtype).requires_grad_(requires_grad),
        "reset_c": draw(D, B, H).to(dtype).requires_grad_(requires_grad),
        "h_mask": (draw(D, B, R) < 0.5).to(dtype) / 0.5,
        "zoneout_h": (draw(*rows, D * R) < 0.4).to(dtype),
        "zoneout_c": (draw(*rows, D * H) < 0.4).to(dtype),
    }
    packed = layer.batch_sizes is not None
    names = [n for n in names if layer.cell == "lstm" or not n.endswith("_c")]
    return Extras(**{n: made[n] for n in names if not (packed and n[:3] in ("len", "res"))})


def by_kernel(layer: Sample, extras: Extras) -> Sequence[Tensor]:
    lstm = layer.cell == "lstm"
    return extended.layer(OPERATORS[layer.cell], layer.tensors(), layer.batch_sizes, extras, layer.tail()[1:], lstm)


def by_reference(layer: Sample, extras: Extras) -> Sequence[Tensor]:
    arguments = extras.arguments(layer.cell == "lstm", layer.batch_sizes)
    return OPERATORS[layer.cell].extended_reference(layer.tensors(), arguments, layer.tail()[1:])


def leaves_of(layer: Sample, extras: Extras) -> list[Tensor]:
    return [t for t in (*layer.tensors(), extras.reset_h, extras.reset_c) if t is not None]


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("names", GIVEN.values(), ids=GIVEN)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@every_cell
def test_kernel_equals_the_reference(cell, shape, names, threads):
    if "P" in shape and cell != "lstm":
        pytest.skip("only the LSTM has a projection")
    layer = sample(cell, **shape, requires_grad=True)
    extras = extras_for(layer, names, requires_grad=True)
    expected, leaves = by_reference(layer, extras), leaves_of(layer, extras)
    given = cotangents(expected)
    truth = torch.autograd.grad(expected, leaves, given, allow_unused=True, materialize_grads=True)
    for count, split in ((1, "chosen"), (2, "rows"), (2, "units"), (4, "units")):
        threads(count, split)
        ours = by_kernel(layer, extras)
        found = torch.autograd.grad(ours, leaves, given)
        for k, (one, other) in enumerate(zip([*ours, *found], [*expected, *truth], strict=True)):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12, msg=lambda m, k=k: f"{k}: {m}")


@every_cell
def test_derivatives_of_derivatives(cell):
    layer = sample(cell, T=3, B=2, I=2, H=2, D=2, requires_grad=True)
    extras = extras_for(layer, GIVEN["everything"], requires_grad=True)
    leaves = leaves_of(layer, extras)

    def function(*tensors: Tensor) -> Sequence[Tensor]:
        own = iter(tensors)
        again = layer.with_tensors([None if t is None else next(own) for t in layer.tensors()])
        return by_kernel(again, extras._replace(**dict(zip(("reset_h", "reset_c"), own, strict=False))))

    if cell != "rnn_relu":
        assert torch.autograd.gradcheck(function, leaves)
        assert torch.autograd.gradgradcheck(function, leaves)


def arguments_of(layer: Sample, extras: Extras, save: bool) -> list[Any]:
    given = extras.arguments(layer.cell == "lstm", layer.batch_sizes)
    return [*layer.tensors(), *given, *layer.tail()[1:], save]


@pytest.mark.parametrize("save", [True, False], ids=["saved", "not-saved"])
@every_cell
def test_opcheck_of_the_operators(cell, save):
    layer = sample(cell, T=3, B=3, I=2, H=3, D=2, requires_grad=True)
    extras = extras_for(layer, GIVEN["everything"], requires_grad=True)
    operator = OPERATORS[cell]
    torch.library.opcheck(operator.overload, arguments_of(layer, extras, save))
    if save:
        plain = layer.to(torch.float64)
        extras = extras_for(plain, GIVEN["everything"])
        arguments = arguments_of(plain, extras, True)
        outputs = operator.overload(*arguments)
        saved = outputs[operator.results :]
        given = cotangents(outputs[: operator.results])
        options = plain.tail()[1:]
        needs = (1 << operator.tensors + operator.results - 1) - 1
        tail = cotangents([saved[1]]) if cell == "lstm" else []
        inputs = arguments[: len(arguments) - 1 - len(options)]
        backward = getattr(torch.ops.fastrnn, operator.backward_name)
        torch.library.opcheck(backward, [*given, *inputs, outputs[0], *saved, *options, needs, *tail])


@pytest.mark.parametrize("save", [True, False], ids=["saved", "not-saved"])
@every_cell
def test_doors_agree(cell, save):
    layer = sample(cell, T=5, B=4, D=2, dtype=torch.float32, requires_grad=True)
    extras = extras_for(layer, GIVEN["everything"], requires_grad=True)
    leaves = leaves_of(layer, extras)
    results = OPERATORS[cell].results
    direct = by_kernel(layer, extras)[:results]
    registered = OPERATORS[cell].overload(*arguments_of(layer, extras, save))[:results]
    with torch.no_grad():
        inference = by_kernel(layer, extras)[:results]
    assert all(map(torch.equal, direct, inference))
    assert all(map(torch.equal, direct, registered))
    given = cotangents(direct)
    pairs = zip(torch.autograd.grad(direct, leaves, given), torch.autograd.grad(registered, leaves, given), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


@every_cell
def test_ordinary_calls_with_extras_run_one_operator_a_layer(cell):
    module, _ = twins(cell, 4, 17, num_layers=2, bidirectional=True)
    calls: list[str] = []
    with monitored(calls):
        module(torch.randn(5, 3, 4), lengths=torch.tensor([2, 5, 1]), reset=torch.zeros(5, 3, dtype=torch.bool))
    assert len(calls) == 2


@every_cell
def test_functional_form_with_extras_compiles_to_one_graph(cell):
    torch._dynamo.reset()
    layer = sample(cell, T=5, B=4, D=2, dtype=torch.float32, requires_grad=True)
    extras = extras_for(layer, ("lengths", "reset", "h_mask", "zoneout_h"))
    counter = CompileCounterWithBackend("aot_eager")

    def loss(x: Tensor, lengths: Tensor, reset: Tensor, h_mask: Tensor, zoneout_h: Tensor) -> Tensor:
        own = Sample(layer.cell, x, layer.state, layer.weights)
        given = {"lengths": lengths, "reset": reset, "h_mask": h_mask, "zoneout_h": zoneout_h}
        return functional_call(own, **given)[0].sin().sum()

    arguments = (extras.lengths, extras.reset, extras.h_mask, extras.zoneout_h)
    ours = torch.autograd.grad(torch.compile(loss, backend=counter, fullgraph=True)(layer.x, *arguments), layer.x)[0]
    assert counter.frame_count == 1
    assert torch.equal(ours, torch.autograd.grad(loss(layer.x, *arguments), layer.x)[0])
    torch._dynamo.reset()


@every_cell
def test_module_with_extras_and_noise_compiles_whole_inside_fullgraph(cell):
    torch._dynamo.reset()
    module, _ = twins(cell, 4, 5, num_layers=2, bidirectional=True)
    zoneout = (0.1, 0.2) if cell == "lstm" else 0.1
    module.zoneout, module.recurrent_dropout, module.weight_dropout = zoneout, 0.2, 0.3
    x, lengths, reset = torch.randn(6, 3, 4), torch.tensor([2, 6, 0]), torch.rand(6, 3) < 0.3

    def run(x: Tensor, lengths: Tensor, reset: Tensor) -> Any:
        return module(x, lengths=lengths, reset=reset, return_all_states=True)

    results = []
    with fastrnn.fullgraph():
        for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
            torch.manual_seed(1)
            results.append(function(x, lengths, reset))
    for one, other in zip(tensors_of(results[0]), tensors_of(results[1]), strict=True):
        assert torch.equal(one, other)
    torch._dynamo.reset()


@every_cell
def test_transforms_with_extras(cell):
    layer = sample(cell, T=3, B=2, I=2, H=3, D=2)
    extras = extras_for(layer, GIVEN["everything"])

    def function(x: Tensor) -> Tensor:
        return by_kernel(layer.with_tensors([x, *layer.tensors()[1:]]), extras)[0]

    x = layer.x.clone().requires_grad_()
    expected = torch.autograd.functional.jacobian(lambda x: function(x), layer.x)
    torch.testing.assert_close(torch.func.jacfwd(function)(layer.x), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(torch.func.jacrev(function)(layer.x), expected, rtol=1e-10, atol=1e-12)
    several = torch.stack([layer.x, layer.x + 1, layer.x * 2])
    found = torch.vmap(function)(several)
    torch.testing.assert_close(found, torch.stack([function(one) for one in several]), rtol=1e-12, atol=1e-13)
    (together,) = torch.autograd.grad(
        function(x), x, torch.stack([torch.ones_like(found[0])] * 2), is_grads_batched=True
    )
    torch.testing.assert_close(together[1], torch.autograd.grad(function(x).sum(), x)[0], rtol=1e-12, atol=1e-13)


@every_cell
def test_without_the_extension_the_reference_computes(cell, monkeypatch):
    module, _ = twins(cell, 4, 17, num_layers=2, bidirectional=True, dtype=torch.float64)
    x, lengths, reset = torch.randn(5, 4, 4).double(), torch.tensor([0, 5, 3, 1]), torch.rand(5, 4) < 0.4
    ours = module(x, lengths=lengths, reset=reset)
    monkeypatch.setattr(extended, "_C", None)
    theirs = module(x, lengths=lengths, reset=reset)
    for one, other in zip(tensors_of(ours), tensors_of(theirs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)
    with pytest.raises(RuntimeError, match=re.escape("lengths must be from 0 to T = 5, got [0, 6, 3, 1]")):
        module(x, lengths=torch.tensor([0, 6, 3, 1]))


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")
@every_cell
def test_autocast_computes_with_extras(cell):
    module, _ = twins(cell, 4, 17, num_layers=2, bidirectional=True)
    x, lengths = torch.randn(5, 3, 4), torch.tensor([2, 5, 0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, _ = module(x, lengths=lengths, reset=torch.ones(5, 3, dtype=torch.bool))
    expected, _ = module(x, lengths=lengths, reset=torch.ones(5, 3, dtype=torch.bool))
    torch.testing.assert_close(y.float(), expected, rtol=0.1, atol=0.05)


# ---- what does not fit ---------------------------------------------------------------------------------------------

T, B, I, H, D = 3, 2, 4, 5, 2  # noqa: E741
# argument, what is given, the message of the operator
WRONG = [
    ("lengths", torch.tensor([1, 4]), "lengths must be from 0 to T = 3, got 4 for sequence 1"),
    ("lengths", torch.tensor([-1, 3]), "lengths must be from 0 to T = 3, got -1 for sequence 0"),
    ("lengths", torch.tensor([1, 2, 3]), "lengths must be [B] = [2], got [3]"),
    ("lengths", torch.tensor([[1, 2]]), "lengths must be [B] = [2], got [1, 2]"),
    ("lengths", torch.tensor([1, 2], dtype=torch.int32), "lengths must be int64, got int32"),
    ("lengths", torch.tensor([1, 2], device="meta"), "lengths must be on the CPU, got meta"),
    ("reset", torch.zeros(B, T, dtype=torch.bool), "reset must be [T, B] = [3, 2], got [2, 3]"),
    ("reset", torch.zeros(T, B), "reset must be bool, got float32"),
    ("reset_h", torch.zeros(D, B, H), "reset_h and reset_c are given without reset"),
    ("h_mask", torch.zeros(B, H), "h_mask must be [D, B, R] = [2, 2, 5], got [2, 5]"),
    ("h_mask", torch.zeros(D, B, H).double(), "h_mask must be float32, got float64"),
    ("zoneout_h", torch.zeros(T, B, H), "zoneout_h must be [T, B, D*R] = [3, 2, 10], got [3, 2, 5]"),
    ("zoneout_h", torch.zeros(T, B, D * H, dtype=torch.bool), "zoneout_h must be float32, got bool"),
    ("zoneout_c", torch.zeros(T, B, H), "zoneout_c must be [T, B, D*H] = [3, 2, 10], got [3, 2, 5]"),
    ("reset_c", torch.zeros(D, B, H), "reset_h and reset_c are given without reset"),
]


def small(cell: str, packed: bool = False) -> Sample:
    return sample(cell, T=T, B=B, I=I, H=H, D=D, dtype=torch.float32, lengths=(3, 1) if packed else None)


@pytest.mark.parametrize("door", CHECKED_DOORS)
@pytest.mark.parametrize(
    ("name", "tensor", "message"), WRONG, ids=[f"{name}-{message[-12:]}" for name, _, message in WRONG]
)
@every_cell
def test_operator_refuses_what_does_not_fit(cell, name, tensor, message, door):
    layer = small(cell)
    if name.endswith("_c") and cell != "lstm":
        pytest.skip("only the LSTM has c")
    if tensor.is_meta and door != "direct":
        pytest.skip("the fake kernel takes it")
    if "for sequence" in message and door == "fake":
        pytest.skip("there are no numbers")
    with pytest.raises(RuntimeError, match=re.escape(f"fastrnn.{layer.operator}: {message}")):
        forward(door, layer, **{name: tensor})
    operator = f"{layer.operator}_backward"
    with pytest.raises(RuntimeError, match=re.escape(f"fastrnn.{operator}: {message}")):
        call(door, operator, backward_values(layer) | {name: tensor})


@pytest.mark.parametrize("door", CHECKED_DOORS)
@every_cell
def test_operator_refuses_what_does_not_go_together(cell, door):
    packed, padded = small(cell, packed=True), small(cell)
    flags = torch.zeros(T, B, dtype=torch.bool)
    with pytest.raises(RuntimeError, match="lengths and batch_sizes must not both be given"):
        forward(door, packed, lengths=torch.tensor([3, 1]))
    with pytest.raises(RuntimeError, match="reset and batch_sizes must not both be given"):
        forward(door, packed, reset=flags)
    with pytest.raises(RuntimeError, match=re.escape("zoneout_h must be [N, D*R] = [4, 10], got [3, 2, 10]")):
        forward(door, packed, zoneout_h=torch.zeros(T, B, D * H))
    if cell == "lstm":
        for name in ("reset_h", "reset_c"):
            with pytest.raises(RuntimeError, match="reset_h and reset_c must be given together"):
                forward(door, padded, reset=flags, **{name: torch.zeros(D, B, H)})
        values = backward_values(padded) | {"d_cells": torch.zeros(D, B, H)}
        with pytest.raises(RuntimeError, match=re.escape("d_cells must be [D, N, H] = [2, 6, 5], got [2, 2, 5]")):
            call(door, "lstm_layer_backward", values)
    assert given(padded).get("reset") is None


FLAGS = torch.zeros(T, B, dtype=torch.bool)
X = torch.zeros(T, B, I)
PACKED = torch.nn.utils.rnn.pack_padded_sequence(X, torch.tensor([3, 1]))
# what a module of (4, 5) is called with, the exception, the message
CALLS = {
    "lengths a list": (X, {"lengths": [1, 2]}, TypeError, "lengths must be a Tensor, got list"),
    "lengths int32": (X, {"lengths": torch.ones(2, dtype=torch.int32)}, ValueError, "lengths must be int64 [B] = [2]"),
    "lengths of another batch": (X, {"lengths": torch.ones(3).long()}, ValueError, "lengths must be int64 [B] = [2]"),
    "lengths on meta": (
        X,
        {"lengths": torch.ones(2, device="meta").long()},
        ValueError,
        "lengths must be on the CPU, got meta",
    ),
    "lengths too long": (X, {"lengths": torch.tensor([1, 4])}, RuntimeError, "lengths must be from 0 to T = 3, got 4"),
    "lengths negative": (
        X,
        {"lengths": torch.tensor([-1, 3])},
        RuntimeError,
        "lengths must be from 0 to T = 3, got -1",
    ),
    "lengths and packed": (PACKED, {"lengths": torch.ones(2).long()}, ValueError, "lengths go with a padded input"),
    "lengths without batch": (X[:, 0], {"lengths": torch.ones(1).long()}, ValueError, "lengths go with a batch"),
    "reset a list": (X, {"reset": [True]}, TypeError, "reset must be a Tensor, got list"),
    "reset of floats": (
        X,
        {"reset": FLAGS.float()},
        ValueError,
        "reset must be bool [T, B] = [3, 2], got torch.float32",
    ),
    "reset transposed": (
        X,
        {"reset": FLAGS.T},
        ValueError,
        "reset must be bool [T, B] = [3, 2], got torch.bool [2, 3]",
    ),
    "reset on meta": (X, {"reset": FLAGS.to("meta")}, ValueError, "reset must be on cpu like the input, got meta"),
    "reset and packed": (PACKED, {"reset": FLAGS}, ValueError, "reset goes with a padded input"),
    "reset 2-D without batch": (X[:, 0], {"reset": FLAGS}, ValueError, "reset must be bool [T] = [3], got"),
    "reset_state alone": (X, {"reset_state": torch.zeros(1, B, H)}, ValueError, "reset_state is given without reset"),
    "input of other features": (X[..., :3], {"reset": FLAGS}, RuntimeError, "input must have 4 features"),
    "input 4-D": (X[None], {"return_all_states": True}, ValueError, "input must have 2 or 3 dimensions"),
    "input None": (None, {"return_all_states": True}, TypeError, "input must be a Tensor or a PackedSequence"),
    "no steps": (X[:0], {"return_all_states": True}, RuntimeError, "input must have at least one time step"),
}


@pytest.mark.parametrize("name", CALLS)
@every_cell
def test_module_refuses_what_does_not_fit(cell, name):
    module, _ = twins(cell, I, H)
    x, options, error, message = CALLS[name]
    if cell == "lstm" and "reset_state" in options:
        options = {"reset_state": (torch.zeros(1, B, H),) * 2}
    with pytest.raises(error, match=re.escape(message)) as caught:
        module(x, **options)
    assert "fastrnn." in str(caught.value)


@pytest.mark.parametrize("state", ["reset_state", "hx"])
@every_cell
def test_module_refuses_a_state_that_does_not_fit(cell, state):
    module, _ = twins(cell, I, H)

    def run(*tensors: Any) -> None:
        given = {state: tensors if cell == "lstm" else tensors[0]}
        module(X, reset=FLAGS, **given)

    good = torch.zeros(1, B, H)
    each = f"{state}[0]" if cell == "lstm" else state
    with pytest.raises(ValueError, match=re.escape(f"{each} must be [L*D, B, R] = [1, 2, 5], got [1, 2, 4]")):
        run(good[..., :4], good)
    with pytest.raises(ValueError, match=re.escape(f"{each} must be torch.float32 on cpu like x, got torch.float64")):
        run(good.double(), good)
    with pytest.raises(TypeError, match=re.escape(f"{each} must be a Tensor, got str")):
        run("zeros", good)
    if cell == "lstm":
        with pytest.raises(TypeError, match=re.escape(f"{state} must be a pair (h, c), got Tensor")):
            module(X, reset=FLAGS, **{state: good})


@pytest.mark.parametrize("name", ["h_mask", "zoneout_h", "zoneout_c", "reset_state"])
@pytest.mark.parametrize("cell", CELLS)
def test_functional_form_refuses_what_does_not_fit(cell, name):
    if name == "zoneout_c" and cell != "lstm":
        pytest.skip("only the LSTM has c")
    layer = small(cell)
    shape = {"h_mask": "[D, B, R] = [2, 2, 5]", "reset_state": "[D, B, R] = [2, 2, 5]"}
    rule = shape.get(name, f"[T, B, D*{name[-1].upper().replace('H', 'R').replace('C', 'H')}] = [3, 2, 10]")
    wrong = torch.zeros(7)
    pair = name == "reset_state" and cell == "lstm"
    function = "rnn" if cell.startswith("rnn") else cell
    label = f"{name}[0]" if pair else name
    with pytest.raises(ValueError, match=re.escape(f"fastrnn.{function}: {label} must be {rule}, got [7]")):
        functional_call(layer, reset=FLAGS, **{name: (wrong, wrong) if pair else wrong})
    with pytest.raises(TypeError, match=re.escape(f"fastrnn.{function}: {label} must be a Tensor, got int")):
        functional_call(layer, reset=FLAGS, **{name: (1, 1) if pair else 1})


def test_constructors_take_the_options_by_name_alone():
    for name in set(CLASSES.values()):
        with pytest.raises(TypeError):
            getattr(fastrnn, name)(4, 5, *([1, True, False, 0.0, False] + [None] * 3), 0.1, 0.1)
