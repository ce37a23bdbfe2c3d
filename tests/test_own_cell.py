# SPDX-License-Identifier: BSD-3-Clause
"""Cells of one's own: those of examples/own_cell against torch.nn, ONNX Runtime and their step in plain PyTorch; their
derivatives, bits and modules."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence

import pytest
import torch
from accuracy import assert_accurate
from own_cells import CELLS, layer, own_cells
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence, pad_sequence
from twins import like, random_state, tensors_of

import fastrnn
from fastrnn.own_cells import _reference

pytestmark = pytest.mark.usefixtures("compiled")

EACH = pytest.mark.parametrize("cell", CELLS)
# T, B, I, H, D, lengths: below and above a vector and a tile; few rows and many; both directions
SHAPES = {
    "tiny": (2, 9, 1, 1, 1, None),
    "vector": (5, 3, 5, 17, 1, None),
    "one-step": (1, 2, 8, 16, 2, None),
    "tiles": (3, 13, 33, 100, 2, None),
    "rows": (6, 70, 24, 64, 1, None),
    "ragged": (6, 5, 9, 40, 2, [3, 6, 0, 1, 6]),
}
ALL = pytest.mark.parametrize("shape", SHAPES)


def leaves(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if t is None else t.detach().clone().requires_grad_() for t in tensors]


def run(
    call: Callable[..., tuple[Tensor, ...]],
    x: Tensor,
    states: list[Tensor],
    weights: list[Tensor | None],
    cotangents: list[Tensor] | None = None,
    **options: Tensor,
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Outputs and every gradient by name, and the cotangents, random ones if none are given."""
    entries = leaves((x, *states, *weights))
    outputs = call(entries[0], entries[1 : 1 + len(states)], entries[1 + len(states) :], **options)
    if cotangents is None:
        cotangents = [torch.randn_like(output) for output in outputs]
    given = [(k, entry) for k, entry in enumerate(entries) if entry is not None]
    gradients = torch.autograd.grad(outputs, [entry for _, entry in given], cotangents)
    found = {f"output {k}": output.detach() for k, output in enumerate(outputs)}
    return found | {f"gradient {k}": g for (k, _), g in zip(given, gradients, strict=True)}, cotangents


def plain(own: object) -> Callable[..., tuple[Tensor, ...]]:
    """The layer by the step in plain PyTorch."""

    def call(x, states, weights, lengths=None, reset=None, reset_states=None):
        slots = 5 if own.parameters else 4
        rest = (None,) * (2 * slots - len(weights))
        replacements = reset_states or (None,) * own.states
        return _reference(own, (x, *states, *weights, *rest, lengths, None, reset, *replacements))

    return call


def sample(cell: str, shape: str, dtype: torch.dtype, **options: object):
    T, B, I, H, D, lengths = SHAPES[shape]  # noqa: E741
    own, x, states, weights = layer(cell, T, B, I, H, D, dtype=dtype, **options)
    return own, x, states, weights, {} if lengths is None else {"lengths": torch.tensor(lengths)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@ALL
@EACH
def test_layer_is_as_accurate_as_the_step(cell, shape, dtype, isa):
    own, x, states, weights, options = sample(cell, shape, dtype)
    ours, cotangents = run(own.layer, x, states, weights, **options)
    peer, _ = run(plain(own), x, states, weights, cotangents, **options)
    wide = [[None if t is None else t.double() for t in of] for of in ([x], states, weights, cotangents)]
    exact, _ = run(plain(own), wide[0][0], *wide[1:], **options)
    for name, tensor in ours.items():
        assert_accurate(tensor, peer[name], exact[name], name)


@EACH
def test_resets_and_missing_biases_are_as_the_step_has_them(cell, isa):
    own, x, states, weights = layer(cell, 6, 4, 5, 19, 2, bias=False)
    reset = torch.rand(6, 4) < 0.4
    others = [torch.rand_like(state) for state in states]
    for extra in ({}, {"reset_states": others}):
        ours, cotangents = run(own.layer, x, states, weights, reset=reset, **extra)
        exact, _ = run(plain(own), x, states, weights, cotangents, reset=reset, **extra)
        for name, tensor in ours.items():
            assert_accurate(tensor, exact[name], exact[name], name)


# ---- truth from outside --------------------------------------------------------------------------------------------


def test_peephole_lstm_without_peepholes_is_torch_lstm():
    ours = own_cells().PeepholeLSTM(5, 19, num_layers=2, bidirectional=True, dtype=torch.float64)
    theirs = nn.LSTM(5, 19, num_layers=2, bidirectional=True, dtype=torch.float64)
    with torch.no_grad():
        for name, weight in ours.named_parameters():
            weight.zero_() if "unit" in name else weight.copy_(theirs.get_parameter(name))
    x, hx = torch.randn(6, 4, 5, dtype=torch.float64), [torch.randn(4, 4, 19, dtype=torch.float64) for _ in range(2)]
    (y, (h, c)), (y_, (h_, c_)) = ours(x, hx), theirs(x, hx)
    for name, a, b in (("y", y, y_), ("h_n", h, h_), ("c_n", c, c_)):
        assert_accurate(a, b, b, name)


@pytest.mark.parametrize("directions", [1, 2])
def test_peephole_lstm_is_that_of_onnx(directions):
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    own, x, states, weights = layer("PeepholeLSTM", 6, 3, 5, 8, directions, dtype=torch.float32)
    y, h_n, c_n = own.layer(x, states, weights)

    def rearranged(weight: Tensor) -> Tensor:  # i f g o -> i o f c
        i, f, g, o = weight.chunk(4)
        return torch.cat([i, o, f, g])

    rows = [weights[5 * d : 5 * d + 5] for d in range(directions)]
    peepholes = [torch.cat([p.chunk(3)[k] for k in (0, 2, 1)]) for *_, p in rows]  # p_i p_f p_o -> i o f
    feed = {
        "X": x,
        "W": torch.stack([rearranged(row[0]) for row in rows]),
        "R": torch.stack([rearranged(row[1]) for row in rows]),
        "B": torch.stack([torch.cat([rearranged(row[2]), rearranged(row[3])]) for row in rows]),
        "h": states[0],
        "c": states[1],
        "P": torch.stack(peepholes),
    }
    direction = "forward" if directions == 1 else "bidirectional"
    inputs = ["X", "W", "R", "B", "", "h", "c", "P"]
    node = onnx.helper.make_node("LSTM", inputs, ["Y", "Y_h", "Y_c"], hidden_size=8, direction=direction)
    infos = [onnx.helper.make_tensor_value_info(name, 1, list(t.shape)) for name, t in feed.items()]
    results = [onnx.helper.make_tensor_value_info(name, 1, None) for name in ("Y", "Y_h", "Y_c")]
    graph = onnx.helper.make_graph([node], "peepholes", infos, results)
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    runtime = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    found = runtime.run(None, {name: t.numpy() for name, t in feed.items()})
    theirs = torch.from_numpy(found[0]).permute(0, 2, 1, 3).flatten(2)  # [T, D, B, H] -> [T, B, D*H]
    torch.testing.assert_close(y, theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(h_n, torch.from_numpy(found[1]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(c_n, torch.from_numpy(found[2]), rtol=1e-5, atol=1e-6)


def test_minimal_gated_unit_is_a_gru_with_tied_gates():
    """z = 1 - f, since 1 - sigmoid(a) = sigmoid(-a), and r = f."""
    ours = own_cells().MinimalGatedUnit(6, 21, dtype=torch.float64)
    theirs = nn.GRU(6, 21, dtype=torch.float64)
    with torch.no_grad():
        for name, weight in ours.named_parameters():
            f, n = weight.chunk(2)
            theirs.get_parameter(name).copy_(torch.cat([f, -f, n]))
    x = torch.randn(7, 5, 6, dtype=torch.float64, requires_grad=True)
    found, expected = ours(x), theirs(x)
    cotangent = torch.randn_like(found[0])
    pairs = [("y", found[0], expected[0]), ("h_n", found[1], expected[1])]
    pairs += [("d_x", *(torch.autograd.grad(y, x, cotangent)[0] for y in (found[0], expected[0])))]
    for name, a, b in pairs:
        assert_accurate(a, b, b, name)


# ---- derivatives ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [None, [3, 0, 2]], ids=["padded", "ragged"])
@pytest.mark.parametrize("directions", [1, 2])
@EACH
def test_gradients_pass_gradcheck(cell, directions, lengths):
    own, x, states, weights = layer(cell, 3, 3, 2, 3, directions)
    entries = leaves((x, *states, *weights))
    count = 1 + own.states
    options = {} if lengths is None else {"lengths": torch.tensor(lengths)}

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        return own.layer(tensors[0], tensors[1:count], tensors[count:], **options)

    assert torch.autograd.gradcheck(call, entries)
    assert torch.autograd.gradgradcheck(call, entries)


@EACH
def test_only_what_is_asked_for_has_a_gradient(cell):
    own, x, states, weights = layer(cell, 4, 3, 5, 18)
    every, cotangents = run(own.layer, x, states, weights)
    for position in range(1 + own.states + len(weights)):
        entries = [x, *states, *weights]
        entries[position] = entries[position].detach().clone().requires_grad_()
        outputs = own.layer(entries[0], entries[1 : 1 + own.states], entries[1 + own.states :])
        (gradient,) = torch.autograd.grad(outputs, entries[position], cotangents)
        assert torch.equal(gradient, every[f"gradient {position}"])


@EACH
def test_one_weight_for_both_directions_has_the_sum_of_gradients(cell):
    own, x, states, weights = layer(cell, 4, 3, 5, 6, 2)
    half = len(weights) // 2
    shared = leaves(weights[:half])
    own.layer(x, states, [*shared, *shared])[0].sum().backward()
    apart = leaves([*weights[:half], *weights[:half]])
    own.layer(x, states, apart)[0].sum().backward()
    for k, weight in enumerate(shared):
        torch.testing.assert_close(weight.grad, apart[k].grad + apart[half + k].grad)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch scripts its decompositions
@EACH
def test_torch_func_and_forward_mode_go_by_the_step(cell):
    own, x, states, weights = layer(cell, 3, 2, 4, 5)

    def loss(x: Tensor) -> Tensor:
        return own.layer(x, states, weights)[0].square().sum()

    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(x), expected)
    tangent = torch.randn_like(x)
    _, along = torch.func.jvp(loss, (x,), (tangent,))
    torch.testing.assert_close(along, (expected * tangent).sum())
    stacked = torch.func.vmap(loss)(torch.stack([x, 2 * x]))
    torch.testing.assert_close(stacked, torch.stack([loss(x), loss(2 * x)]))


# ---- bits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["rows", "units"])
@ALL
@EACH
def test_bits_do_not_depend_on_threads(cell, shape, split, threads, isa):
    own, x, states, weights, options = sample(cell, shape, torch.float32)
    threads(1)
    alone, cotangents = run(own.layer, x, states, weights, **options)
    for count in (2, 3):
        threads(count, split)
        together, _ = run(own.layer, x, states, weights, cotangents, **options)
        for name, tensor in alone.items():
            assert torch.equal(tensor, together[name]), name


@EACH
def test_bits_do_not_depend_on_batch_or_chunks(cell, isa):
    own, x, states, weights = layer(cell, 9, 11, 24, 50, dtype=torch.float32)
    y, *ends = own.layer(x, states, weights)
    few = own.layer(x[:, 3:5], [state[:, 3:5].contiguous() for state in states], weights)
    assert torch.equal(few[0], y[:, 3:5])
    carried, parts = states, []
    for part in x.split([1, 2, 6]):
        now, *carried = own.layer(part, carried, weights)
        parts.append(now)
    assert torch.equal(torch.cat(parts), y)
    assert all(map(torch.equal, carried, ends))


# ---- modules -------------------------------------------------------------------------------------------------------


@EACH
def test_module_has_torchs_names_and_shapes(cell):
    kind = getattr(own_cells(), cell)
    module = kind(5, 6, num_layers=2, bidirectional=True)
    gates, parameters = kind.cell.gates, kind.cell.parameters
    like = nn.RNN(5, 6, num_layers=2, bidirectional=True)
    expected = {
        name: (gates * shape[0], *shape[1:]) for name, shape in ((n, p.shape) for n, p in like.named_parameters())
    }
    if parameters:
        expected |= {f"weight_unit_l{k}{end}": (parameters * 6,) for k in range(2) for end in ("", "_reverse")}
    assert {name: tuple(p.shape) for name, p in module.named_parameters()} == expected
    again = kind(5, 6, num_layers=2, bidirectional=True)
    again.load_state_dict(module.state_dict())
    x = torch.randn(4, 3, 5)
    assert torch.equal(again(x)[0], module(x)[0])
    assert repr(module) == f"{cell}(5, 6, num_layers=2, bidirectional=True)"
    assert all((p.abs() <= 6**-0.5).all() for p in module.parameters())


@EACH
def test_module_is_copied_and_pickled(cell):
    module = getattr(own_cells(), cell)(5, 6)
    x = torch.randn(4, 3, 5)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(x)[0], module(x)[0])


@EACH
def test_module_runs_rows_to_their_own_lengths(cell):
    kind = getattr(own_cells(), cell)
    module = kind(5, 20, num_layers=2, bidirectional=True, batch_first=True)
    x, lengths = torch.randn(4, 7, 5), torch.tensor([7, 3, 0, 5])
    padded = x.clone()
    for b, length in enumerate(lengths):
        padded[b, length:] = torch.nan
    y, last = module(padded, lengths=lengths)
    ends = last if kind.cell.states == 2 else (last,)
    for b, length in enumerate(lengths.tolist()):
        assert not y[b, length:].any()
        if not length:
            assert not any(end[:, b].any() for end in ends)
            continue
        alone, last = module(x[b, :length])
        assert torch.equal(alone, y[b, :length])
        for end, expected in zip(ends, last if kind.cell.states == 2 else (last,), strict=True):
            assert torch.equal(end[:, b], expected)
    module.double()(x.double(), lengths=lengths)[0].sum().backward()
    assert all(p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("batch_first", [False, True], ids=["time", "batch"])
@pytest.mark.parametrize("is_sorted", [False, True], ids=["unsorted", "sorted"])
@EACH
def test_module_takes_packed_sequences(cell, is_sorted, batch_first):
    module = getattr(own_cells(), cell)(5, 20, num_layers=2, bidirectional=True, batch_first=batch_first)
    lengths = [7, 5, 3, 3] if is_sorted else [3, 7, 3, 5]
    pieces = [torch.randn(n, 5, requires_grad=True) for n in lengths]
    hx = like(random_state("lstm" if module.cell.states == 2 else "gru", 4, 4, H=20), lambda t: t.requires_grad_())
    wanted = [*pieces, *tensors_of(hx), *module.parameters()]
    packed, last = module(pack_sequence(pieces, enforce_sorted=is_sorted), hx)
    found = torch.autograd.grad([(packed.data**2).sum(), *(t.sum() for t in tensors_of(last))], wanted)
    y, ends = module(pad_sequence(pieces, batch_first), hx, lengths=torch.tensor(lengths))
    expected = torch.autograd.grad([(y**2).sum(), *(t.sum() for t in tensors_of(ends))], wanted)
    again, _ = pad_packed_sequence(packed, batch_first)
    assert all(map(torch.equal, [again, *tensors_of(last), *found], [y, *tensors_of(ends), *expected]))


@EACH
def test_one_row_replaces_the_state_of_every_sequence(cell):
    module = getattr(own_cells(), cell)(5, 20, num_layers=2)
    x, reset = torch.randn(6, 3, 5), torch.rand(6, 3) < 0.5
    row = like(random_state("lstm" if module.cell.states == 2 else "gru", 2, 1, H=20), lambda t: t.requires_grad_())
    y, _ = module(x, reset=reset, reset_state=row)
    assert torch.equal(y, module(x, reset=reset, reset_state=like(row, lambda t: t.expand(2, 3, 20)))[0])
    assert all(gradient.any() for gradient in torch.autograd.grad(y.sum(), tensors_of(row)))


@EACH
def test_module_resets_are_new_beginnings(cell):
    kind = getattr(own_cells(), cell)
    module = kind(5, 20)
    x, reset = torch.randn(6, 2, 5), torch.zeros(6, 2, dtype=torch.bool)
    reset[4, 1] = True
    y, _ = module(x, reset=reset)
    assert torch.equal(y[:, 0], module(x)[0][:, 0])
    assert torch.equal(y[4:, 1], module(x[4:])[0][:, 1])


@EACH
def test_output_changed_in_place_is_an_error_and_no_wrong_gradient(cell):
    y, _ = getattr(own_cells(), cell)(5, 6)(torch.randn(4, 3, 5))
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@EACH
def test_module_works_in_half_precision_under_autocast_and_compiled(cell):
    module = getattr(own_cells(), cell)(5, 16)
    x = torch.randn(4, 3, 5)
    y = module(x)[0]
    torch.testing.assert_close(module.bfloat16()(x.bfloat16())[0].float(), y, rtol=2e-2, atol=2e-2)
    module = module.float()
    y = module(x)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(module(x)[0].float(), y, rtol=2e-2, atol=2e-2)
    compiled_module = torch.compile(module, backend="eager")
    assert torch.equal(compiled_module(x)[0], y)


# ---- bad input -----------------------------------------------------------------------------------------------------


@EACH
def test_bad_input_is_named(cell):
    kind = getattr(own_cells(), cell)
    module = kind(5, 6, num_layers=2)
    x = torch.randn(4, 3, 5)
    two = kind.cell.states == 2
    state = torch.zeros(2, 3, 6)
    hx = (state, state) if two else state
    wide = like(hx, lambda t: t[:, :2])
    flags, packed = torch.zeros(4, 3, dtype=torch.bool), pack_sequence([x[:n, 0] for n in (4, 2, 1)])
    cases = [
        (ValueError, r"input must be \[T, B, 5\]", (torch.randn(4, 3, 6),), {}),
        (TypeError, "input must be a Tensor or a PackedSequence, got list", ([1.0],), {}),
        (ValueError, "input must be torch.float32 like the weights, got torch.float64", (x.double(),), {}),
        (ValueError, "input must be torch.float32 like the weights, got torch.int64", (x.long(),), {}),
        (ValueError, "input must be on cpu like the weights, got meta", (x.to("meta"),), {}),
        (ValueError, "lengths goes with a padded input", (packed,), {"lengths": torch.tensor([1, 2, 3])}),
        (ValueError, "reset goes with a padded input", (packed,), {"reset": torch.zeros(4, 3, dtype=torch.bool)}),
        (ValueError, "reset_state goes with a padded input", (packed,), {"reset_state": hx}),
        (ValueError, r"hx.* must be \[L\*D, B, H\] = \[2, 3, 6\]", (packed, like(hx, lambda t: t[:, :2])), {}),
        (ValueError, r"reset_state.* must be \[L\*D, B, H\]", (x,), {"reset": flags, "reset_state": wide}),
        (TypeError, "unexpected keyword argument 'return_all_states'", (x,), {"return_all_states": True}),
        (ValueError, r"hx.* must be \[L\*D, B, H\] = \[2, 3, 6\]", (x, (state[:1], state) if two else state[:1]), {}),
        (ValueError, "hx.* must be torch.float32", (x, (state.double(), state) if two else state.double()), {}),
        (ValueError, "lengths must be int64", (x, hx), {"lengths": torch.ones(3)}),
        (RuntimeError, "lengths must be from 0 to T = 4, got 5", (x,), {"lengths": torch.tensor([1, 5, 2])}),
        (ValueError, "reset must be bool", (x,), {"reset": torch.zeros(4, 3)}),
        (ValueError, "reset_state is given without reset", (x,), {"reset_state": hx}),
        (ValueError, "lengths go with a batch", (x[:, 0],), {"lengths": torch.tensor([1])}),
        (RuntimeError, "at least one time step", (x[:0],), {}),
    ]
    if two:
        cases.append((TypeError, r"hx must be a pair \(h, c\)", (x, state), {}))
    for error, match, arguments, options in cases:
        with pytest.raises(error, match=match):
            module(*arguments, **options)
    for option in ("proj_size", "zoneout", "recurrent_dropout", "weight_dropout", "recompute"):
        with pytest.raises(TypeError, match=option):
            kind(5, 6, **{option: 1})


@EACH
def test_layer_checks_shapes_of_weights(cell):
    own, x, states, weights = layer(cell, 3, 2, 4, 5)
    with pytest.raises(ValueError, match=r"states and . or .* weights are expected"):
        own.layer(x, states, weights[:3])
    last = weights[-1]
    with pytest.raises(RuntimeError, match=r"(parameters|b_hh) must be \[.*\], got"):
        own.layer(x, states, [*weights[:-1], last[:-1]])
    with pytest.raises(RuntimeError, match="h0 must be"):
        own.layer(x, [state[:, :1] for state in states], weights)


def test_module_without_a_cell_is_refused():
    class Nothing(fastrnn.CellModule):
        pass

    with pytest.raises(TypeError, match=r"Nothing\.cell must be a fastrnn\.OwnCell"):
        Nothing(3, 4)
    kind = own_cells().MinimalGatedUnit
    with pytest.raises(ValueError, match="hidden_size must be a positive integer, got 0"):
        kind(3, 0)
    with pytest.raises(ValueError, match=r"dropout must be a probability, in \[0, 1\], got 2"):
        kind(3, 4, dropout=2)
