# SPDX-License-Identifier: BSD-3-Clause
"""Zoneout, recurrent dropout and weight dropout: the functional forms with masks as tensors against plain loops over
steps typed here, and the modules' options: what they draw, what they do in evaluation, how they are kept."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from samples import Sample, cotangents, sample
from test_lengths import every_cell
from torch import Tensor, nn
from twins import CELLS, CLASSES, like, random_state, tensors_of

import fastrnn
from fastrnn import functional

NOISE = {
    "h_mask": ("h_mask",),
    "zoneout_h": ("zoneout_h",),
    "zoneout_c": ("zoneout_c",),
    "everything": ("h_mask", "zoneout_h", "zoneout_c"),
    "expectation": ("expected_h", "expected_c"),
}
SHAPES = {
    "plain": {"T": 4, "B": 3, "I": 4, "H": 17},
    "both": {"T": 4, "B": 3, "I": 4, "H": 17, "D": 2},
    "projection": {"T": 4, "B": 3, "I": 4, "H": 17, "P": 5, "D": 2},
    "packed": {"lengths": (4, 2, 2, 1), "I": 4, "H": 17, "D": 2},
}


def masks(layer: Sample, names: tuple[str, ...]) -> dict[str, Tensor]:
    """What the functional form is called with."""
    D, B, R = layer.state[0].shape
    generator = torch.Generator().manual_seed(6)

    def draw(*shape: int) -> Tensor:
        return (torch.rand(shape, generator=generator) < 0.4).double()

    rows, H = layer.x.shape[:-1], layer.state[-1].shape[2]
    made = {
        "h_mask": lambda: draw(D, B, R) / 0.4,
        "zoneout_h": lambda: draw(*rows, D * R),
        "zoneout_c": lambda: draw(*rows, D * H),
        "expected_h": lambda: torch.full((D * R,), 0.3).double().expand(*rows, D * R),
        "expected_c": lambda: torch.full((), 0.6).double().expand(*rows, D * H),
    }
    lstm = layer.cell == "lstm"
    return {name.replace("expected", "zoneout"): made[name]() for name in names if lstm or not name.endswith("_c")}


def functional_call(layer: Sample, **options: object) -> tuple:
    rows = {"weights": layer.weights[0], "reverse_weights": layer.weights[1] if len(layer.weights) == 2 else None}
    state = layer.state if layer.cell == "lstm" else layer.state[0]
    if layer.cell.startswith("rnn"):
        options["nonlinearity"] = layer.cell.removeprefix("rnn_")
    function = getattr(functional, layer.operator.removesuffix("_layer"))
    return function(layer.x, state, **rows, batch_sizes=layer.batch_sizes, **options)


def plain_loop(layer: Sample, given: dict[str, Tensor]) -> list[Tensor]:
    """One sequence, one direction, one step at a time: y, the final states and, for an LSTM, c at every step.

    Krueger et al. 2017: s_t = d * s_{t-1} + (1 - d) * s~_t for h and for c, where h~_t = o_t * tanh(c~_t) is made of
    the c that has not been blended. Gal & Ghahramani 2016: W_hh (m * h_{t-1}).
    """
    B, lstm = layer.state[0].shape[1], layer.cell == "lstm"
    sizes = [B] * layer.x.shape[0] if layer.batch_sizes is None else layer.batch_sizes.tolist()
    starts = [sum(sizes[:t]) for t in range(len(sizes))]
    x = layer.x.flatten(0, -2)
    ys = [[None] * x.shape[0] for _ in layer.weights]
    cs = [[None] * x.shape[0] for _ in layer.weights]
    finals = []
    for d, (w_ih, w_hh, b_ih, b_hh, *rest) in enumerate(layer.weights):
        ends = []
        for b in range(B):
            state = [entry[d, b] for entry in layer.state]
            steps = [t for t, size in enumerate(sizes) if b < size]
            for t in reversed(steps) if d else steps:
                n = starts[t] + b
                h = state[0]
                entering = h * given["h_mask"][d, b] if "h_mask" in given else h
                a, r = w_ih @ x[n] + b_ih, w_hh @ entering + b_hh
                if lstm:
                    i, f, g, o = (a + r).chunk(4)
                    c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
                    made = [o.sigmoid() * c.tanh(), c]
                    if rest[0] is not None:
                        made[0] = rest[0] @ made[0]
                elif layer.cell == "gru":
                    (a_r, a_z, a_n), (r_r, r_z, r_n) = a.chunk(3), r.chunk(3)
                    z = (a_z + r_z).sigmoid()
                    made = [(1 - z) * (a_n + (a_r + r_r).sigmoid() * r_n).tanh() + z * h]
                else:
                    made = [(a + r).tanh() if layer.cell == "rnn_tanh" else (a + r).relu()]
                for k, name in enumerate(("zoneout_h", "zoneout_c")[: len(made)]):
                    if name in given:
                        width = made[k].shape[0]
                        keep = given[name].flatten(0, -2)[n, d * width : (d + 1) * width]
                        made[k] = keep * state[k] + (1 - keep) * made[k]
                state = made
                ys[d][n] = state[0]
                cs[d][n] = state[-1]
            ends.append(state)
        finals.append([torch.stack(entries) for entries in zip(*ends, strict=True)])
    shape = layer.x.shape[:-1]
    y, c = (torch.cat([torch.stack(rows) for rows in every], dim=-1).unflatten(0, shape) for every in (ys, cs))
    states = [torch.stack(entries) for entries in zip(*finals, strict=True)]
    return [y, *states, c] if lstm else [y, *states]


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("names", NOISE.values(), ids=NOISE)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@every_cell
def test_masks_equal_a_plain_loop(cell, shape, names):
    if "P" in shape and cell != "lstm":
        pytest.skip("only the LSTM has a projection")
    layer = sample(cell, **shape, requires_grad=True)
    given = masks(layer, names)
    if not given:
        pytest.skip("only the LSTM has c")
    results = functional_call(layer, **given, return_all_states=True)
    ours = [results[0], *tensors_of(results[1]), *([results[2][1]] if cell == "lstm" else [])]
    expected = plain_loop(layer, given)
    wanted = [t for t in layer.tensors() if t is not None]
    generator = cotangents(expected)
    found = torch.autograd.grad(ours, wanted, generator, retain_graph=True)
    again = torch.autograd.grad(ours, wanted, generator, create_graph=True)
    truth = torch.autograd.grad(expected, wanted, generator, create_graph=True)
    for k, (one, other) in enumerate(zip([*ours, *found, *again], [*expected, *truth, *truth], strict=True)):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12, msg=lambda m, k=k: f"{k}: {m}")
    twice = torch.autograd.grad([g.square().sum() for g in again], wanted)
    for one, other in zip(twice, torch.autograd.grad([g.square().sum() for g in truth], wanted), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


def noisy(cell: str, seed: int = 0, **options: object) -> nn.Module:
    torch.manual_seed(seed)
    if cell == "rnn_relu":
        options["nonlinearity"] = "relu"
    return getattr(fastrnn, CLASSES[cell])(4, 17, **options)


def all_noise(cell: str) -> dict[str, object]:
    zoneout = (0.2, 0.3) if cell == "lstm" else 0.2
    return {"zoneout": zoneout, "recurrent_dropout": 0.25, "weight_dropout": 0.35}


@every_cell
def test_masks_come_from_torchs_generator(cell):
    module = noisy(cell, num_layers=2, bidirectional=True, **all_noise(cell))
    x = torch.randn(6, 3, 4)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        y, state = module(x)
        results.append([y, *tensors_of(state)])
    assert all(map(torch.equal, results[0], results[1]))
    assert not torch.equal(results[0][0], results[2][0])


@every_cell
def test_evaluation_takes_the_expectation(cell):
    module, plain = noisy(cell, num_layers=2, **all_noise(cell)).eval(), noisy(cell, num_layers=2)
    x = torch.randn(6, 3, 4)
    y, _ = module(x)
    assert torch.equal(y, module(x)[0])
    dropouts = noisy(cell, num_layers=2, recurrent_dropout=0.5, weight_dropout=0.5).eval()
    assert torch.equal(dropouts(x)[0], plain(x)[0])
    p_h, p_c = module.zoneout if cell == "lstm" else (module.zoneout, 0)
    names = ("weight_ih_l", "weight_hh_l", "bias_ih_l", "bias_hh_l")
    for layer in range(2):
        weights = tuple(getattr(plain, f"{name}{layer}") for name in names)
        masked = {"zoneout_h": torch.full((6, 3, 17), p_h)}
        if cell == "lstm":
            masked["zoneout_c"] = torch.full((6, 3, 17), p_c)
        one = Sample(cell, x, (torch.zeros(1, 3, 17),) * (2 if cell == "lstm" else 1), (weights,))
        x = functional_call(one, **masked)[0]
    torch.testing.assert_close(y, x, rtol=1e-5, atol=1e-6)


@every_cell
def test_zoneout_keeps_the_share_that_it_says(cell):
    zoneout = (0.25, 0.75) if cell == "lstm" else 0.25
    module = noisy(cell, zoneout=zoneout)
    y, _, states = module(torch.randn(200, 5, 4), return_all_states=True)
    for p, every in zip((0.25, 0.75), ((states[0][0], states[1][0]) if cell == "lstm" else (y,)), strict=False):
        same = every[1:] == every[:-1]
        if cell == "rnn_relu":
            same = same[every[:-1] > 0]
        assert abs(same.double().mean().item() - p) < 0.03


@every_cell
def test_recurrent_dropout_masks_a_sequence_on_its_way_into_w_hh_alone(cell):
    module = noisy(cell, recurrent_dropout=1.0)
    x, hx = torch.randn(6, 3, 4), random_state(cell, 1, 3, H=17)
    y, _ = module(x, hx)
    plain = noisy(cell)
    with torch.no_grad():
        plain.weight_hh_l0.zero_()
    assert torch.equal(y, plain(x, hx)[0])
    half = noisy(cell, recurrent_dropout=0.5)
    torch.manual_seed(3)
    mask = torch.empty(1, 3, 17).bernoulli_(0.5) / 0.5
    torch.manual_seed(3)
    expected = Sample(cell, x, tuple(tensors_of(hx)), (tuple(half.parameters()),))
    assert torch.equal(half(x, hx)[0], functional_call(expected, h_mask=mask)[0])


@every_cell
def test_weight_dropout_drops_weights_of_the_recurrence(cell):
    module, plain = noisy(cell, weight_dropout=0.5), noisy(cell)
    x = torch.randn(6, 3, 4)
    torch.manual_seed(5)
    y, _ = module(x)
    torch.manual_seed(5)
    with torch.no_grad():
        plain.weight_hh_l0.copy_(torch.dropout(plain.weight_hh_l0, 0.5, True))
    assert torch.equal(y, plain(x)[0])
    y.sum().backward()
    assert ((module.weight_hh_l0.grad != 0) == (plain.weight_hh_l0 != 0))[module.weight_hh_l0.grad != 0].all()
    full = noisy(cell, weight_dropout=1.0)
    full(x)[0].sum().backward()
    assert not full.weight_hh_l0.grad.any()


@every_cell
def test_noise_with_lengths_and_resets(cell):
    """Drawn masks are those of the rows that exist: the same call with a batch cut to one row is that row."""
    module = noisy(cell, zoneout=(0.5, 0.5) if cell == "lstm" else 0.5, bidirectional=True).eval()
    x, lengths, reset = torch.randn(6, 3, 4), torch.tensor([2, 6, 0]), torch.rand(6, 3) < 0.3
    y, _ = module(x, lengths=lengths, reset=reset)
    for row, length in enumerate(lengths.tolist()):
        assert not y[length:, row].any()
        if length:
            assert torch.equal(y[:length, row], module(x[:length, [row]], reset=reset[:length, [row]])[0][:, 0])


@every_cell
def test_options_are_shown_only_if_set_and_are_no_state(cell):
    plain, module = noisy(cell), noisy(cell, **all_noise(cell))
    assert "dropout" not in repr(plain)
    assert "zoneout" not in repr(plain)
    zoneout = "(0.2, 0.3)" if cell == "lstm" else "0.2"
    assert repr(module).endswith(f", zoneout={zoneout}, recurrent_dropout=0.25, weight_dropout=0.35)")
    assert module.state_dict().keys() == plain.state_dict().keys()
    plain.load_state_dict(module.state_dict())
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert repr(other) == repr(module)
        assert not torch.equal(other(torch.ones(4, 2, 4))[0], plain(torch.ones(4, 2, 4))[0])


@every_cell
def test_options_may_be_changed_as_dropout_may(cell):
    module, other = noisy(cell), noisy(cell, recurrent_dropout=0.5)
    module.recurrent_dropout = 0.5
    x, results = torch.randn(6, 3, 4), []
    for each in (module, other):
        torch.manual_seed(2)
        results.append(each(x)[0])
    assert torch.equal(*results)
    module.recurrent_dropout = 0.0
    assert torch.equal(module(x)[0], noisy(cell)(x)[0])


@every_cell
def test_module_pickled_before_the_options_has_none(cell):
    module = noisy(cell)
    assert not vars(module).keys() & {"zoneout", "recurrent_dropout", "weight_dropout"}
    made = getattr(fastrnn, CLASSES[cell]).__new__(type(module))
    made.__setstate__(module.__dict__)
    x = torch.randn(3, 2, 4)
    assert torch.equal(made(x)[0], module(x)[0])


@every_cell
def test_options_of_zero_change_no_bit(cell):
    zero = noisy(cell, zoneout=(0.0, 0.0) if cell == "lstm" else 0.0, recurrent_dropout=0.0, weight_dropout=0.0)
    x = torch.randn(6, 3, 4)
    before = torch.get_rng_state()
    y, _ = zero(x)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(y, noisy(cell)(x)[0])


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
@pytest.mark.parametrize("option", ["zoneout", "recurrent_dropout", "weight_dropout"])
@every_cell
def test_probability_outside_the_unit_interval_is_refused(cell, option, value):
    given = (0.1, value) if option == "zoneout" and cell == "lstm" else value
    with pytest.raises(
        ValueError, match=rf"fastrnn.{CLASSES[cell]}: {option}.* must be a probability, in \[0, 1\], got"
    ):
        noisy(cell, **{option: given})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("LSTM", {"zoneout": 0.1}, r"zoneout must be a pair \(p_h, p_c\), got 0.1"),
        ("LSTM", {"zoneout": (0.1,)}, r"zoneout must be a pair \(p_h, p_c\), got \(0.1,\)"),
        ("GRU", {"zoneout": (0.1, 0.1)}, "zoneout must be a number, got tuple"),
        ("RNN", {"recurrent_dropout": None}, "recurrent_dropout must be a number, got NoneType"),
        ("RNN", {"weight_dropout": True}, "weight_dropout must be a number, got bool"),
    ],
)
def test_option_of_the_wrong_kind_is_refused(name, options, message):
    with pytest.raises(TypeError, match=f"fastrnn.{name}: {message}"):
        getattr(fastrnn, name)(4, 5, **options)
    module = getattr(fastrnn, name)(4, 5)
    for option, value in options.items():
        setattr(module, option, value)
        if value is not None:  # which is as good as none
            with pytest.raises(TypeError, match=f"fastrnn.{name}: {message}"):
                module(torch.randn(2, 1, 4))


@pytest.mark.parametrize("cell", CELLS)
def test_mask_with_a_gradient_is_refused(cell):
    layer = sample(cell)
    mask = like(layer.state[0], lambda t: torch.ones_like(t).requires_grad_())
    with pytest.raises(ValueError, match="h_mask must not require a gradient"):
        functional_call(layer, h_mask=mask)
