# SPDX-License-Identifier: BSD-3-Clause
"""reset: where the state is replaced within a sequence, against a loop that does so between the steps, and against
every part of every sequence run alone; with several layers, both directions, lengths and a state to replace it."""

from __future__ import annotations

import itertools

import pytest
import torch
from accuracy import assert_accurate
from samples import cotangents
from test_lengths import an_input, every_cell, option_ids, skip_projection
from torch import Tensor, nn
from twins import like, random_state, tensors_of, twins

pytestmark = [
    pytest.mark.usefixtures("isa"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning"),
]

T, B = 5, 4
RESET = torch.tensor(
    [[False, True, False, False], [True, False, True, False], [True] * 4, [False] * 4, [False, True, False, False]]
)
FORWARD = ({}, {"num_layers": 2}, {"num_layers": 2, "batch_first": True}, {"proj_size": 3, "num_layers": 2})
BOTH = ({"bidirectional": True}, {"num_layers": 2, "bidirectional": True}, {"bidirectional": True, "proj_size": 3})
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
REPLACED = pytest.mark.parametrize("replaced", [False, True], ids=["zeros", "state"])
LENGTHS = {"whole": None, "ragged": (3, 5, 1, 4), "with_none": (5, 0, 2, 4)}


def states(cell: str, options: dict, dtype: torch.dtype) -> tuple[object, object]:
    """hx and a state to replace it."""
    rows = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
    sizes = {"H": 17, "P": options.get("proj_size", 0), "dtype": dtype}
    return random_state(cell, rows, B, **sizes), random_state(cell, rows, B, **sizes, seed=9)


def layout(module: nn.Module, tensor: Tensor) -> Tensor:
    return tensor.transpose(0, 1) if module.batch_first else tensor


def joined(pieces: list[Tensor]) -> object:
    return tuple(pieces) if len(pieces) == 2 else pieces[0]


def loop(module: nn.Module, x: Tensor, hx: object, replacement: object) -> tuple[Tensor, object]:
    """One call a step; where RESET is set, the state is replaced before it."""
    ys = []
    for t, now in enumerate(layout(module, x)):
        flags = RESET[t][:, None]
        before = [torch.where(flags, r, s) for r, s in zip(tensors_of(replacement), tensors_of(hx), strict=True)]
        y, hx = module(layout(module, now[None]), joined(before))
        ys.append(layout(module, y)[0])
    return layout(module, torch.stack(ys)), hx


def gradients(module: nn.Module, run: object, leaves: list[Tensor]) -> tuple[list[Tensor], dict[str, Tensor | None]]:
    outputs = tensors_of(run())
    wanted = [*leaves, *module.parameters()]
    found = torch.autograd.grad(outputs, wanted, cotangents(outputs), allow_unused=True)
    names = [f"leaf {k}" for k in range(len(leaves))] + [name for name, _ in module.named_parameters()]
    return [out.detach() for out in outputs], dict(zip(names, found, strict=True))


@DTYPES
@REPLACED
@pytest.mark.parametrize("options", FORWARD, ids=option_ids)
@every_cell
def test_reset_equals_a_loop_of_calls(cell, options, replaced, dtype):
    skip_projection(cell, options)
    module, theirs = twins(cell, 4, 17, dtype=dtype, **options)
    hx, other = states(cell, options, dtype)
    x, hx = (like(a, lambda t: t.detach().requires_grad_()) for a in (an_input(B, module.batch_first, dtype), hx))
    replacement = like(other, lambda t: t.requires_grad_() if replaced else torch.zeros_like(t))
    leaves = [x, *tensors_of(hx), *(tensors_of(replacement) if replaced else ())]

    def whole() -> object:
        state = replacement if replaced else None
        return module(x, hx, reset=layout(module, RESET), reset_state=state)

    outputs, found = gradients(module, whole, leaves)
    expected, looped = gradients(module, lambda: loop(module, x, hx, replacement), leaves)
    for ours, reference in zip(outputs, expected, strict=True):
        assert torch.equal(ours, reference)
    states_of_x = 1 + len(tensors_of(hx))
    for k in range(states_of_x):  # x and the initial states
        assert torch.equal(found[f"leaf {k}"], looped[f"leaf {k}"]), k
    peer_outputs, peer = gradients(theirs, lambda: loop(theirs, x, hx, replacement), leaves)
    theirs = theirs.double()
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    count = len(tensors_of(hx))
    wide_hx = joined(wide[1 : 1 + count])
    wide_replacement = joined(wide[1 + count :]) if replaced else like(replacement, lambda t: t.double())
    exact_outputs, exact = gradients(theirs, lambda: loop(theirs, wide[0], wide_hx, wide_replacement), wide)
    for ours, other_one, truth in zip(outputs, peer_outputs, exact_outputs, strict=True):
        assert_accurate(ours, other_one, truth, "outputs")
    for name, gradient in found.items():
        assert_accurate(gradient, peer[name], exact[name], name)


def parts(row: int, length: int) -> list[tuple[int, int]]:
    """[begin, end) of the parts into which a sequence falls."""
    begins = [t for t in range(length) if t == 0 or RESET[t, row]]
    return list(itertools.pairwise([*begins, length]))


def each_part_alone(
    module: nn.Module, x: Tensor, hx: object, replacement: object, lengths: list[int]
) -> tuple[Tensor, ...]:
    """Every layer, and in it every part of every sequence, by a call of its own.

    The forward direction starts a part from the replacement, but the first from hx if step 0 has no flag; the reverse
    direction starts a part from the replacement, but the last from hx.
    """
    directions = 2 if module.bidirectional else 1
    finals = [[] for _ in tensors_of(hx)]
    for layer in range(module.num_layers):
        single = one_layer(module, layer, x.shape[-1])
        own = slice(layer * directions, (layer + 1) * directions)
        rows, ends = [], []
        for b, length in enumerate(lengths):
            start = [state[own, b : b + 1] for state in tensors_of(hx)]
            other = [state[own, b : b + 1] for state in tensors_of(replacement)]
            pieces, last = [], start
            for k, (begin, end) in enumerate(parts(b, length)):
                first = k == 0 and not RESET[0, b]
                state = [
                    torch.cat([(s if first else o)[:1], (s if end == length else o)[1:]])
                    for s, o in zip(start, other, strict=True)
                ]
                y, state = single(x[begin:end, b : b + 1], joined(state))
                pieces.append(y)
                state = tensors_of(state)
                last = [
                    torch.cat([new[:1], (new if k == 0 else old)[1:]]) for new, old in zip(state, last, strict=True)
                ]
            padding = x.new_zeros(T - length, 1, directions * (module.proj_size or module.hidden_size))
            rows.append(torch.cat([*pieces, padding]))
            ends.append(last)
        x = torch.cat(rows, dim=1)
        for final, of_rows in zip(finals, zip(*ends, strict=True), strict=True):
            final.append(torch.cat(of_rows, dim=1))
    return x, *(torch.cat(final) for final in finals)


def one_layer(module: nn.Module, layer: int, features: int) -> nn.Module:
    options = {"bidirectional": module.bidirectional, "dtype": x_dtype(module)}
    if module.proj_size:
        options["proj_size"] = module.proj_size
    if isinstance(module, nn.RNN):
        options["nonlinearity"] = module.nonlinearity
    made = type(module)(features, module.hidden_size, **options)
    for name in list(made._parameters):
        del made._parameters[name]
        setattr(made, name, getattr(module, name.replace("_l0", f"_l{layer}")))
    made._flat_weights = [getattr(made, name) for name in made._flat_weights_names]
    return made


def x_dtype(module: nn.Module) -> torch.dtype:
    return module.weight_ih_l0.dtype


@DTYPES
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("options", BOTH + FORWARD[1:2], ids=option_ids)
@every_cell
def test_reset_equals_each_part_alone(cell, options, lengths, dtype):
    skip_projection(cell, options)
    module, _ = twins(cell, 4, 17, dtype=dtype, **options)
    hx, other = states(cell, options, dtype)
    x, hx, replacement = (like(a, lambda t: t.detach().requires_grad_()) for a in (an_input(B, dtype=dtype), hx, other))
    leaves = [x, *tensors_of(hx), *tensors_of(replacement)]
    given = None if lengths is None else torch.tensor(lengths)
    outputs, found = gradients(
        module, lambda: module(x, hx, lengths=given, reset=RESET, reset_state=replacement), leaves
    )
    expected, alone = gradients(
        module, lambda: each_part_alone(module, x, hx, replacement, list(lengths or (T,) * B)), leaves
    )
    for ours, reference in zip(outputs, expected, strict=True):
        assert torch.equal(ours, reference)
    for name, gradient in found.items():
        if name in [f"leaf {k}" for k in range(1 + len(tensors_of(hx)))]:
            assert torch.equal(gradient, alone[name]), name
        elif dtype is torch.float64:
            torch.testing.assert_close(gradient, alone[name], rtol=1e-11, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@every_cell
def test_nothing_crosses_a_reset(cell):
    module, _ = twins(cell, 4, 17, num_layers=2)
    x = torch.randn(T, B, 4)
    x[:2] = torch.nan
    reset = torch.zeros(T, B, dtype=torch.bool)
    reset[2] = True
    x.requires_grad_()
    y, _ = module(x, reset=reset)
    assert torch.isnan(y[:2]).all()
    assert torch.isfinite(y[2:]).all()
    assert torch.equal(y[2:], module(x[2:])[0])
    clean = torch.randn(T, B, 4, requires_grad=True)
    h0 = random_state(cell, 2, B, H=17)
    h0 = like(h0, lambda t: t.requires_grad_())
    y, _ = module(clean, h0, reset=reset)
    for gradient in torch.autograd.grad(y[2:].sum(), [clean, *tensors_of(h0)]):
        assert not (gradient[:2] if gradient.shape[0] == T else gradient).any()


@every_cell
def test_one_row_of_reset_state_stands_for_the_batch(cell):
    module, _ = twins(cell, 4, 17, num_layers=2, bidirectional=True, dtype=torch.float64)
    row = like(random_state(cell, 4, 1, H=17, dtype=torch.float64), lambda t: t.requires_grad_())
    x = torch.randn(T, B, 4, dtype=torch.float64)
    found = module(x, reset=RESET, reset_state=row)
    expected = module(x, reset=RESET, reset_state=like(row, lambda t: t.expand(-1, B, -1)))
    for ours, other in zip(tensors_of(found), tensors_of(expected), strict=True):
        assert torch.equal(ours, other)
    assert all(t.grad is None for t in tensors_of(row))
    found[0].sum().backward()
    assert all(t.grad.shape == t.shape and t.grad.all() for t in tensors_of(row))


@pytest.mark.parametrize("learns", [False, True], ids=["inference", "training"])
@every_cell
def test_flags_may_lie_in_memory_as_they_like(cell, learns):
    module, _ = twins(cell, 4, 17, bidirectional=True)
    module.requires_grad_(learns)
    x = an_input(B, False, torch.float32)
    expected = tensors_of(module(x, reset=RESET))
    spread = torch.zeros(2 * T, 3 * B, dtype=torch.bool)
    spread[::2, 1::3] = RESET
    for reset in (RESET.t().contiguous().t(), spread[::2, 1::3], RESET[:, :1].expand(T, B)):
        wanted = expected if reset.stride(1) else tensors_of(module(x, reset=reset.contiguous()))
        assert all(map(torch.equal, tensors_of(module(x, reset=reset)), wanted))


@every_cell
def test_flags_of_which_none_is_set_change_nothing(cell):
    module, _ = twins(cell, 4, 17, num_layers=2, bidirectional=True)
    x, (hx, other) = an_input(B, False, torch.float32).requires_grad_(), states(cell, BOTH[1], torch.float32)
    other = like(other, lambda t: t.requires_grad_())
    plain, expected = gradients(module, lambda: module(x, hx), [x])
    none = torch.zeros(T, B, dtype=torch.bool)
    outputs, found = gradients(module, lambda: module(x, hx, reset=none, reset_state=other), [x, *tensors_of(other)])
    assert all(map(torch.equal, outputs, plain))
    for name in expected:
        assert torch.equal(found[name], expected[name]), name
    for k in range(1, 1 + len(tensors_of(other))):
        assert not found.pop(f"leaf {k}").any()


@pytest.mark.parametrize("units", [1024, 1025])
def test_any_number_of_units_starts_from_zeros(units):
    module, _ = twins("gru", 1, units, dtype=torch.float64)
    x = torch.randn(2, 1, 1, dtype=torch.float64)
    y, _ = module(x, reset=torch.tensor([[False], [True]]))
    assert torch.equal(y[1:], module(x[1:])[0])


@every_cell
def test_bits_with_resets_do_not_depend_on_threads(cell, compiled, threads):
    module, _ = twins(cell, 24, 70, bidirectional=True)
    lengths = torch.tensor([9, 1, 4, 0, 9, 2, 6, 1, 3, 5, 7, 2, 8])
    x = torch.randn(9, len(lengths), 24, requires_grad=True)
    reset = torch.rand(9, len(lengths)) < 0.3
    hx, other = (like(random_state(cell, 2, len(lengths), H=70, seed=s), lambda t: t.requires_grad_()) for s in (1, 2))
    leaves = [x, *tensors_of(hx), *tensors_of(other)]
    results = []
    for count, split in ((1, "chosen"), (2, "rows"), (2, "units"), (5, "rows"), (6, "units")):
        threads(count, split)
        outputs, found = gradients(
            module, lambda: module(x, hx, lengths=lengths, reset=reset, reset_state=other), leaves
        )
        results.append([*outputs, *found.values()])
    for other_results in results[1:]:
        assert all(map(torch.equal, results[0], other_results))


@every_cell
def test_sequence_without_a_batch(cell):
    module, _ = twins(cell, 4, 17, num_layers=2)
    x = torch.randn(T, 4)
    y, state = module(x, reset=RESET[:, 0])
    expected, expected_state = module(x[:, None], reset=RESET[:, :1])
    assert torch.equal(y, expected[:, 0])
    for ours, other in zip(tensors_of(state), tensors_of(expected_state), strict=True):
        assert torch.equal(ours, other[:, 0])
