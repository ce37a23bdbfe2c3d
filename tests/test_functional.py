# SPDX-License-Identifier: BSD-3-Clause
"""fastrnn.functional: the public form of a layer, its arguments and its errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accuracy import assert_accurate
from samples import CELLS, Sample, sample, stock
from torch import Tensor

from fastrnn import autograd, functional

# torch's own, for projections where the extension is not loaded
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")

SHAPES = {
    "plain": dict(T=5, B=3, I=4, H=9),
    "bidirectional": dict(T=3, B=2, I=3, H=5, D=2),
    "no-bias": dict(T=3, B=2, I=3, H=5, D=2, bias=False),
    "packed": dict(lengths=(5, 3, 3, 1), I=3, H=5, D=2),
    "empty-batch": dict(T=2, B=0, I=3, H=5),
}
CASES = [pytest.param(cell, options, id=f"{cell}-{name}") for cell in CELLS for name, options in SHAPES.items()] + [
    pytest.param("lstm", dict(T=4, B=3, I=4, H=6, P=2, D=2), id="lstm-projection"),
]


def call(layer: Sample, **changes: Any) -> tuple[Tensor, ...]:
    """functional.lstm, gru or rnn on the tensors of a layer: (y, h_n) or (y, h_n, c_n)."""
    cell, _, nonlinearity = layer.cell.partition("_")
    arguments = dict(
        state=layer.state if cell == "lstm" else layer.state[0],
        weights=layer.weights[0],
        reverse_weights=layer.weights[1] if len(layer.weights) == 2 else None,
        batch_sizes=layer.batch_sizes,
        **({"nonlinearity": nonlinearity} if nonlinearity else {}),
    )
    arguments |= changes
    x = arguments.pop("x", layer.x)
    y, state = getattr(functional, cell)(x, **arguments)
    return (y, *state) if isinstance(state, tuple) else (y, state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("cell", "options"), CASES)
def test_functional_equals_torch_nn(cell: str, options: dict, dtype: torch.dtype) -> None:
    layer = sample(cell, **options, dtype=dtype)
    for name, a, b, c in zip(("y", "h", "c"), call(layer), stock(layer), stock(layer.to(torch.float64)), strict=False):
        assert_accurate(a, b, c, name)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("lengths", [None, (4, 2)], ids=["padded", "packed"])
def test_no_state_is_a_state_of_zeros(cell: str, lengths: tuple[int, ...] | None) -> None:
    layer = sample(cell, B=2, D=2, lengths=lengths, P=3 if cell == "lstm" else 0)
    zeros = tuple(torch.zeros_like(state) for state in layer.state)
    given = call(layer, state=zeros if cell == "lstm" else zeros[0])
    for a, b in zip(call(layer, state=None), given, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("cell", CELLS)
def test_short_weights_have_no_bias_and_one_bias_is_enough(cell: str) -> None:
    layer = sample(cell)
    w_ih, w_hh, b_ih, b_hh, *_ = layer.weights[0]
    zero = torch.zeros_like(b_ih)
    for short, long in (
        ((w_ih, w_hh), (w_ih, w_hh, zero, zero)),
        ([w_ih, w_hh, b_ih], (w_ih, w_hh, b_ih, zero)),
        ((w_ih, w_hh, None, b_hh), (w_ih, w_hh, zero, b_hh)),
    ):
        for a, b in zip(call(layer, weights=short), call(layer, weights=long), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("lengths", [None, (4, 2, 1)], ids=["padded", "packed"])
def test_torch_rung_gives_the_same(cell: str, lengths: tuple[int, ...] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernels do not take is computed by torch's own functions, also with one bias, which torch lacks."""
    layer = sample(cell, D=2, lengths=lengths, P=3 if cell == "lstm" else 0)
    one_bias = layer.with_tensors([None if n.startswith("b_hh") else t for n, t in named(layer)])
    expected = [call(layer), call(one_bias)]
    monkeypatch.setattr(autograd, "route", lambda tensors: "torch")
    for given, results in zip((layer, one_bias), expected, strict=True):
        for a, b in zip(call(given), results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def named(layer: Sample) -> list[tuple[str, Tensor | None]]:
    return list(zip(layer.names(), layer.tensors(), strict=False))


@pytest.mark.parametrize("cell", CELLS)
def test_other_dtypes_and_devices_work(cell: str) -> None:
    meta = sample(cell, T=4, B=2, H=5, D=2)
    meta = meta.with_tensors([None if t is None else t.to("meta") for t in meta.tensors()])
    assert call(meta)[0].shape == (4, 2, 10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer = sample(cell, dtype=torch.float32)
        for a, b in zip(call(layer), stock(layer), strict=True):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b)


# ---- errors --------------------------------------------------------------------------------------------------------


def test_errors_name_function_argument_rule_and_what_was_received() -> None:
    layer = sample("lstm", T=5, B=3, I=4, H=7)
    w_ih, w_hh, b_ih, b_hh, _ = layer.weights[0]
    h, c = layer.state
    wrong = {
        r"fastrnn.lstm: w_ih must be \[4\*H, I\] = \[28, 4\], got \[28, 5\]": dict(weights=(torch.ones(28, 5), w_hh)),
        r"fastrnn.lstm: w_hh must be \[4\*H, H\] = \[28, 7\], got \[28, 8\]": dict(weights=(w_ih, torch.ones(28, 8))),
        r"fastrnn.lstm: w_hh must be \[4\*H, H\] with H >= 1, got \[27, 7\]": dict(weights=(w_ih, w_hh[:27])),
        r"fastrnn.lstm: w_hh must be \[4\*H, H\] with H >= 1, got \[28\]": dict(weights=(w_ih, b_hh)),
        r"fastrnn.lstm: b_ih must be \[4\*H\] = \[28\], got \[27\]": dict(weights=(w_ih, w_hh, b_ih[:27])),
        r"fastrnn.lstm: b_hh must be \[4\*H\] = \[28\], got \[1\]": dict(weights=(w_ih, w_hh, b_ih, b_hh[:1])),
        r"fastrnn.lstm: w_hh must be \[4\*H, P\] = \[28, 2\], got \[28, 7\]": dict(
            weights=(w_ih, w_hh, None, None, torch.ones(2, 7))
        ),
        r"fastrnn.lstm: w_hr must be given for both directions or for none": dict(
            weights=(w_ih, w_hh[:, :2], None, None, torch.ones(2, 7).double()), reverse_weights=(w_ih, w_hh[:, :2])
        ),
        r"fastrnn.lstm: w_ih_reverse must be \[4\*H, I\] = \[28, 4\], got \[28, 7\]": dict(
            reverse_weights=(w_hh, w_hh)
        ),
        r"fastrnn.lstm: h must be \[D, B, H\] = \[1, 3, 7\], got \[1, 2, 7\]": dict(state=(h[:, :2], c)),
        r"fastrnn.lstm: c must be \[D, B, H\] = \[1, 3, 7\], got \[3, 7\]": dict(state=(h, c[0])),
        r"fastrnn.lstm: x must be \[T, B, I\], got \[3, 4\]": dict(x=layer.x[0]),
        r"fastrnn.lstm: x must have at least one time step, got \[0, 3, 4\]": dict(x=layer.x[:0]),
        r"fastrnn.lstm: x must have at least one feature, got \[5, 3, 0\]": dict(x=layer.x[..., :0]),
        r"fastrnn.lstm: w_hh must be \[4\*H, H\] with H >= 1, got \[0, 0\]": dict(weights=(w_ih[:0], w_hh[:0, :0])),
        r"fastrnn.lstm: x must be \[N, I\] when batch_sizes is given, got \[5, 3, 4\]": dict(
            batch_sizes=torch.tensor([3, 3])
        ),
        r"fastrnn.lstm: batch_sizes must be int64 \[T\] on the CPU, got torch.int32 \[2\] on cpu": dict(
            batch_sizes=torch.tensor([3, 3], dtype=torch.int32), x=layer.x[0]
        ),
        r"fastrnn.lstm: weights must be 2 to 5 of \(w_ih, w_hh, b_ih, b_hh, w_hr\), got 1": dict(weights=(w_ih,)),
        r"fastrnn.lstm: c must be torch.float64 on cpu like x, got torch.float32 on cpu": dict(state=(h, c.float())),
        r"fastrnn.lstm: w_hh must be torch.float64 on cpu like x, got torch.float64 on meta": dict(
            weights=(w_ih, w_hh.to("meta"))
        ),
    }
    for message, change in wrong.items():
        with pytest.raises(ValueError, match=message):
            call(layer, **change)


def test_wrong_types_are_type_errors() -> None:
    layer = sample("lstm")
    w_ih, w_hh = layer.weights[0][:2]
    wrong = {
        "fastrnn.lstm: x must be a Tensor, got 1 values": dict(x=[[[0.0]]]),
        "fastrnn.lstm: x must be a Tensor, got NoneType": dict(x=None),
        "fastrnn.lstm: state must be a pair": dict(state=layer.state[0]),
        "fastrnn.lstm: h must be a Tensor, got NoneType": dict(state=(None, layer.state[1])),
        "fastrnn.lstm: weights must be a tuple of tensors, got Tensor": dict(weights=w_ih),
        "fastrnn.lstm: weights must be a tuple of tensors, got NoneType": dict(weights=None),
        "fastrnn.lstm: w_hh must be a Tensor, got NoneType": dict(weights=(w_ih, None)),
        "fastrnn.lstm: b_ih must be a Tensor, got float": dict(weights=(w_ih, w_hh, 0.0)),
        "fastrnn.lstm: batch_sizes must be a Tensor, got": dict(batch_sizes=[3, 3], x=layer.x[0]),
    }
    for message, change in wrong.items():
        with pytest.raises(TypeError, match=message):
            call(layer, **change)


def test_gru_and_rnn_say_so_too() -> None:
    gru, rnn = sample("gru", H=7), sample("rnn_tanh", H=7)
    with pytest.raises(ValueError, match=r"fastrnn.gru: w_hh must be \[3\*H, H\] with H >= 1, got \[22, 7\]"):
        call(gru, weights=(gru.weights[0][0], torch.ones(22, 7)))
    with pytest.raises(ValueError, match=r"fastrnn.gru: state must be \[D, B, H\] = \[1, 3, 7\], got \[2, 3, 7\]"):
        call(gru, state=torch.ones(2, 3, 7))
    with pytest.raises(ValueError, match=r"fastrnn.gru: weights must be 2 to 4 of \(w_ih, w_hh, b_ih, b_hh\), got 5"):
        call(gru, weights=(*gru.weights[0], None))
    with pytest.raises(ValueError, match=r"fastrnn.rnn: w_ih must be \[H, I\] = \[7, 4\], got \[7, 3\]"):
        call(rnn, weights=(torch.ones(7, 3), rnn.weights[0][1]))
    with pytest.raises(ValueError, match='nonlinearity must be "tanh" or "relu", got \'gelu\''):
        call(rnn, nonlinearity="gelu")


@pytest.mark.parametrize("rung", ["kernel", "reference", "torch"])
@pytest.mark.parametrize("batch_sizes", [[1, 2], [3, 0], [2, 1], [3, 3], [-1, 5], [3, 1, 1, 0]], ids=str)
def test_batch_sizes_that_do_not_fit_are_refused(
    batch_sizes: list[int], rung: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = sample("gru", lengths=(2, 2, 1))  # batch_sizes [3, 2]
    if rung != "kernel":
        monkeypatch.setattr(autograd, "route", lambda tensors: rung)
    with pytest.raises((ValueError, RuntimeError), match="batch_sizes"):
        call(layer, batch_sizes=torch.tensor(batch_sizes))
