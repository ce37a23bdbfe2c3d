# SPDX-License-Identifier: BSD-3-Clause
"""The operators on bad input (csrc/checks.h), through both doors: an error that names the argument, never a crash."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from calls import CHECKED_DOORS, DOORS, backward_values, call, forward, given, schema
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from samples import CELLS, GATES, Sample, sample
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

both_doors = pytest.mark.parametrize("door", DOORS)
every_door = pytest.mark.parametrize("door", CHECKED_DOORS)
every_cell = pytest.mark.parametrize("cell", CELLS)
REFUSED = (RuntimeError, ValueError, TypeError)  # NotImplementedError is a RuntimeError
T, B, I, H, P, D = 3, 2, 4, 5, 3, 2  # noqa: E741


def layer(cell: str, packed: bool = False, **shape: Any) -> Sample:
    shape = dict(T=T, B=B, I=I, H=H, D=D, P=P if cell == "lstm" else 0, dtype=torch.float32) | shape
    return sample(cell, **shape, lengths=(3, 1) if packed else None)


def width(cell: str) -> int:
    return P if cell == "lstm" else H


def rows(cell: str) -> str:
    return {4: "[4*H", 3: "[3*H", 1: "[H"}[GATES[cell]]


def refused(door: str, operator: str, values: dict[str, Any], message: str, error: type = RuntimeError) -> None:
    """The call raises exactly this error, and the message starts with the operator's name."""
    with pytest.raises(REFUSED, match=re.escape(f"fastrnn.{operator}: {message}")) as caught:
        call(door, operator, values)
    assert caught.type is error


def short(*shape: int) -> Callable[[str], Tensor]:
    return lambda _: torch.zeros(shape)


# argument, what is given instead, the message
WRONG: list[tuple[str, Callable[[str], Any], Callable[[str], str]]] = [
    ("x", short(0, B, I), lambda _: "x must have at least one time step, got [T, B, I] = [0, 2, 4]"),
    ("x", short(T, B, 0), lambda _: "x must have at least one feature, got [3, 2, 0]"),
    ("x", short(T, 7, I), lambda c: f"h0 must be [D, B, R] = [2, 7, {width(c)}], got [2, 2, {width(c)}]"),
    ("x", short(T, B, 9), lambda c: f"w_ih must be {rows(c)}, I] = [{GATES[c] * H}, 9], got [{GATES[c] * H}, 4]"),
    ("h0", short(1, B, H), lambda c: f"h0 must be [D, B, R] = [2, 2, {width(c)}], got [1, 2, 5]"),
    ("h0", short(B, H), lambda c: f"h0 must be [D, B, R] = [2, 2, {width(c)}], got [2, 5]"),
    ("w_ih", short(I), lambda c: f"w_ih must be {rows(c)}, I] = [{GATES[c] * H}, 4], got [4]"),
    ("w_hh", short(), lambda c: f"w_hh must be {rows(c)}, R] with H >= 1, got []"),
    ("w_hh", short(0, H), lambda c: f"w_hh must be {rows(c)}, R] with H >= 1, got [0, 5]"),
    ("w_hh", lambda c: torch.zeros(GATES[c] * H, 9), lambda c: f"w_hh must be {rows(c)}, R] = "),
    ("b_ih", short(H + 1), lambda c: f"b_ih must be {rows(c)}] = [{GATES[c] * H}], got [6]"),
    ("b_hh", short(1, 1), lambda c: f"b_hh must be {rows(c)}] = [{GATES[c] * H}], got [1, 1]"),
    ("w_ih_reverse", short(3, 3), lambda c: f"w_ih_reverse must be {rows(c)}, I] = "),
    ("w_hh_reverse", short(3, 3), lambda c: f"w_hh_reverse must be {rows(c)}, R] = "),
    ("w_hh_reverse", lambda _: None, lambda _: "w_hh_reverse must be given"),
    ("b_ih_reverse", short(3), lambda c: f"b_ih_reverse must be {rows(c)}] = "),
    ("b_hh_reverse", short(3), lambda c: f"b_hh_reverse must be {rows(c)}] = "),
    ("x", lambda _: torch.zeros(T, B, I, dtype=torch.int32), lambda _: "x must be float32, float64, bfloat16 or"),
    ("x", lambda _: torch.zeros(T, B, I, dtype=torch.complex64), lambda _: "x must be float32, float64, bfloat16 or"),
    ("h0", lambda c: torch.zeros(D, B, width(c)).double(), lambda _: "h0 must be float32, got float64"),
]
WRONG_LSTM = [
    ("c0", short(D, B, P), "c0 must be [D, B, H] = [2, 2, 5], got [2, 2, 3]"),
    ("w_hh", short(18, P), "w_hh must be [4*H, R] with H >= 1, got [18, 3]"),
    ("w_hr", short(P), "w_hr must be [P, H] with P >= 1, got [3]"),
    ("w_hr", short(0, H), "w_hr must be [P, H] with P >= 1, got [0, 5]"),
    ("w_hr", short(P, 9), "w_hr must be [P, H] = [3, 5], got [3, 9]"),
    ("w_hr", short(4, H), "h0 must be [D, B, R] = [2, 2, 4], got [2, 2, 3]"),
    ("w_hr_reverse", short(4, H), "w_hr_reverse must be [P, H] = [3, 5], got [4, 5]"),
    ("w_hr_reverse", lambda _: None, "w_hr_reverse must be given"),
]


@every_door
@every_cell
@pytest.mark.parametrize(("name", "bad", "message"), WRONG, ids=[f"{k}-{w[0]}" for k, w in enumerate(WRONG)])
def test_wrong_argument_is_named(door: str, cell: str, name: str, bad: Callable, message: Callable) -> None:
    good = layer(cell)
    refused(door, good.operator, given(good) | {name: bad(cell)}, message(cell))
    values = backward_values(good) | {name: bad(cell)}
    refused(door, f"{good.operator}_backward", values, message(cell))


@every_door
@pytest.mark.parametrize(("name", "bad", "message"), WRONG_LSTM, ids=[f"{k}-{w[0]}" for k, w in enumerate(WRONG_LSTM)])
def test_wrong_argument_of_lstm_is_named(door: str, name: str, bad: Callable, message: str) -> None:
    good = layer("lstm")
    refused(door, "lstm_layer", given(good) | {name: bad("lstm")}, message)


@every_door
@every_cell
def test_errors_of_torch_nn_keep_their_type(door: str, cell: str) -> None:
    good = layer(cell)
    for shape in ((), (I,), (B, I), (1, T, B, I)):
        refused(door, good.operator, given(good) | {"x": torch.zeros(shape)}, "x must be [T, B, I], got ", ValueError)
    for name in ("w_ih", "w_hh", "b_ih", "b_hh", "w_ih_reverse"):
        wide = given(good)[name].double()
        refused(
            door, good.operator, given(good) | {name: wide}, f"{name} must be float32 like x, got float64", ValueError
        )


@every_door
@every_cell
def test_half_a_direction_is_refused(door: str, cell: str) -> None:
    one, two = layer(cell, D=1), given(layer(cell))
    for name in [name for name in two if name.endswith("_reverse") and name != "w_ih_reverse"]:
        message = f"{name} is given without w_{'hr' if name.startswith('w_hr') and cell != 'lstm' else 'ih_reverse'}"
        refused(door, one.operator, given(one) | {name: two[name]}, message)
    if cell == "lstm":
        plain = layer(cell, P=0)
        values = given(plain) | {"w_hr_reverse": torch.zeros(H, H)}
        refused(door, "lstm_layer", values, "w_hr_reverse is given without w_hr")


@every_door
@every_cell
def test_required_tensors_are_required(door: str, cell: str) -> None:
    good = layer(cell)
    for operator, values in ((good.operator, given(good)), (f"{good.operator}_backward", backward_values(good))):
        for argument in schema(operator).arguments:
            if str(argument.type) == "Tensor":
                with pytest.raises(REFUSED):
                    call(door, operator, values | {argument.name: None})


@every_door
@every_cell
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_wrong_argument_of_backward_is_named(door: str, cell: str, packed: bool) -> None:
    good = layer(cell, packed)
    operator, values = f"{good.operator}_backward", backward_values(good)
    R, N = width(cell), good.x.shape[:-1].numel()
    y = f"[N, D*R] = [{N}, {D * R}]" if packed else f"[T, B, D*R] = [{T}, {B}, {D * R}]"
    rules = {
        "y": f"y must be {y}",
        "d_y": f"d_y must be {y}",
        "d_h_n": f"d_h_n must be [D, B, R] = [2, 2, {R}]",
        "d_c_n": "d_c_n must be [D, B, H] = [2, 2, 5]",
        "gates": f"gates must be [D, N, 4*padded(H)] = [2, {N}, 64]",
        "cells": f"cells must be [D, N, H] = [2, {N}, 5]",
    }
    for name in [name for name in rules if isinstance(values.get(name), Tensor)]:
        refused(door, operator, values | {name: torch.zeros(0)}, f"{rules[name]}, got [0]")
        wide = torch.cat([values[name]] * 2, -1)
        refused(door, operator, values | {name: wide}, f"{rules[name]}, got ")
        refused(door, operator, values | {name: values[name].double()}, f"{name} must be float32, got float64")
    most = len(good.tensors()) + len(good.state)  # of the tensors, and of what replaces the states
    for needs in (-1, 1 << most, 2**63 - 1, -(2**63)):
        refused(door, operator, values | {"needs": needs}, f"needs must be in [0, 2^{most}), got {needs}")


def test_gates_of_half_layers_are_float32() -> None:
    values = backward_values(layer("lstm", dtype=torch.bfloat16))
    for name in ("gates", "cells"):
        half = values | {name: values[name].bfloat16()}
        refused("direct", "lstm_layer_backward", half, f"{name} must be float32, got bfloat16")


BATCH_SIZES = {
    "increasing": ([1, 2, 1], "batch_sizes must not increase, got 1 then 2 at step 1"),
    "zero": ([2, 2, 0], "batch_sizes must be positive, got 0 at step 2"),
    "negative": ([5, -1], "batch_sizes must sum to the rows of x, N = 4, got more"),
    "minus": ([-1, 5], "batch_sizes must be positive, got -1 at step 0"),
    "few": ([2, 1], "batch_sizes must sum to the rows of x, N = 4, got 3"),
    "many": ([2, 2, 1], "batch_sizes must sum to the rows of x, N = 4, got more"),
    "huge": ([2**63 - 1, 2**63 - 1], "batch_sizes must sum to the rows of x, N = 4, got more"),
    "long": ([1] * 5, "batch_sizes must be positive and sum to N = 4, got T = 5 steps"),
    "other-batch": ([3, 1], "h0 must be [D, B, R] = [2, 3, "),
    "empty": ([], "batch_sizes must have at least one time step, got [0]"),
    "matrix": ([[2, 1, 1]], "batch_sizes must be [T], got [1, 3]"),
    "scalar": (4, "batch_sizes must be [T], got []"),
}


@both_doors
@every_cell
@pytest.mark.parametrize("case", BATCH_SIZES)
def test_wrong_batch_sizes_are_refused(door: str, cell: str, case: str) -> None:
    good = layer(cell, packed=True)
    sizes, message = BATCH_SIZES[case]
    sizes = torch.tensor(sizes, dtype=torch.int64)
    refused(door, good.operator, given(good) | {"batch_sizes": sizes}, message)
    refused(door, f"{good.operator}_backward", backward_values(good) | {"batch_sizes": sizes}, message)


@both_doors
def test_wrong_kind_of_batch_sizes_is_refused(door: str) -> None:
    good = layer("gru", packed=True)
    for dtype in (torch.int32, torch.float32, torch.bool):
        sizes = good.batch_sizes.to(dtype)
        message = f"batch_sizes must be int64, got {str(dtype)[6:]}"
        refused(door, "gru_layer", given(good) | {"batch_sizes": sizes}, message)
    for x in (torch.zeros(4), torch.zeros(2, 2, 4)):
        refused(
            door, "gru_layer", given(good) | {"x": x}, "x must be [N, I] when batch_sizes is given, got ", ValueError
        )


@settings(max_examples=200, deadline=None)
@drawn(sizes=st.lists(st.integers(-1, 5), max_size=6), B=st.integers(1, 5), N=st.integers(0, 12))
def test_batch_sizes_are_taken_exactly_when_they_fit(sizes: list[int], B: int, N: int) -> None:
    good = sample("rnn_tanh", T=1, B=B, I=2, H=3, dtype=torch.float32)
    x = torch.randn(N, 2)
    fits = bool(sizes) and min(sizes) > 0 and sorted(sizes, reverse=True) == sizes and sum(sizes) == N and sizes[0] == B
    values = {"x": x, "batch_sizes": torch.tensor(sizes, dtype=torch.int64)}
    for door in DOORS:
        if fits:
            assert forward(door, good, **values)["y"].shape == (N, 3)
        else:
            with pytest.raises(RuntimeError, match=r"fastrnn\.rnn_layer: (batch_sizes|h0) must"):
                forward(door, good, **values)


def test_fake_kernels_refuse_what_needs_no_numbers_in_batch_sizes() -> None:
    good = layer("gru", packed=True)
    for case in ("empty", "matrix", "scalar"):
        sizes, message = BATCH_SIZES[case]
        refused("fake", "gru_layer", given(good) | {"batch_sizes": torch.tensor(sizes, dtype=torch.int64)}, message)


@both_doors
def test_enormous_sizes_are_refused(door: str) -> None:
    """Views of one element: they cost no memory until something is computed from their sizes."""
    one, big = torch.zeros(()), 2**31
    plain = layer("lstm", D=1, P=0)
    for name, shape, message in (
        ("x", (big, B, I), f"T must be at most {big - 1}, got {big}"),
        ("x", (T, big, I), f"B must be at most {big - 1}, got {big}"),
        ("x", (T, B, big), f"I must be at most {big - 1}, got {big}"),
        ("w_hh", (4 * big, H), f"H must be at most {big - 1}, got {big}"),
        ("w_hr", (big, H), f"R must be at most {big - 1}, got {big}"),
        ("x", (2**30, 2**16, 2**10), "the layer is too large: N = 70368744177664, I = 1024, H = 5, R = 5"),
        ("x", (2**30, 2**20, I), "the layer is too large: N = 1125899906842624, I = 4, H = 5, R = 5"),
        ("w_hh", (2**32, 2**30), "the layer is too large: N = 6, I = 4, H = 1073741824, R = 1073741824"),
    ):
        refused(door, "lstm_layer", given(plain) | {name: one.expand(shape)}, message)
    packed = layer("gru", packed=True)
    values = given(packed) | {"x": one.expand(2**40, I)}
    refused(door, "gru_layer", values | {"batch_sizes": torch.ones(1, dtype=torch.int64).expand(2**40)}, "T must be")
    refused(door, "gru_layer", values, "N must be at most 2147483647, got 1099511627776")


def freed(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(0)
    return tensor


def cut(tensor: Tensor) -> Tensor:
    """The last element lies behind the end of the memory."""
    tensor = tensor.clone()
    tensor.untyped_storage().resize_((tensor.numel() - 1) * tensor.itemsize)
    return tensor


KINDS = {
    "meta": (lambda t: t.to("meta"), "must be on the CPU, got meta"),
    "sparse": (lambda t: t.to_sparse(), "must be a dense tensor, got layout Sparse"),
    "mkldnn": (lambda t: t.to_mkldnn(), "must be a dense tensor, got layout Mkldnn"),
    "freed": (freed, "has no memory of its own"),
    "cut": (cut, "has no memory of its own"),
    "fake": (lambda t: FakeTensorMode().from_tensor(t), "must be on the CPU|must be a dense tensor|has no memory"),
    "nested": (lambda t: torch.nested.as_nested_tensor([t]), "must be a dense tensor|has no memory"),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@every_cell
@pytest.mark.parametrize("kind", KINDS)
def test_tensors_without_plain_memory_are_refused(cell: str, kind: str) -> None:
    make, message = KINDS[kind]
    good = layer(cell)
    for operator, values in ((good.operator, given(good)), (f"{good.operator}_backward", backward_values(good))):
        for name, value in values.items():
            if isinstance(value, Tensor):
                with pytest.raises(REFUSED, match=rf"fastrnn\.{operator}: {name} ({message})"):
                    call("direct", operator, values | {name: make(value)})
                if kind in ("freed", "cut"):  # the dispatcher has kernels of its own for the others
                    with pytest.raises(RuntimeError, match=rf"fastrnn\.{operator}: {name} {message}"):
                        call("dispatcher", operator, values | {name: make(value)})


def test_functorch_wrappers_are_refused_by_the_direct_door() -> None:
    good = layer("lstm")

    def inside(x: Tensor) -> Tensor:
        return forward("direct", good, x=x)["y"]

    for transformed in (torch.vmap(inside), torch.func.grad(lambda x: inside(x).sum())):
        with pytest.raises(RuntimeError, match=r"fastrnn\.lstm_layer: x (must be a dense tensor|has no memory)"):
            transformed(torch.ones(1, T, B, I) if transformed.__name__ == "inside" else torch.ones(T, B, I))


shapes = st.lists(st.integers(0, 9), max_size=4).map(tuple)
dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.complex64])


@st.composite
def strange_tensors(draw: st.DrawFn) -> Tensor | None:
    """Any shape, dtype and strides, meta tensors among them; or none."""
    shape, dtype = draw(shapes), draw(dtypes)
    kind = draw(st.sampled_from(["plain", "expanded", "permuted", "meta", "none"]))
    if kind == "none":
        return None
    if kind == "expanded":
        return torch.ones((), dtype=dtype).expand(shape)
    tensor = torch.ones(shape, dtype=dtype, device="meta" if kind == "meta" else "cpu")
    return tensor.permute(tuple(reversed(range(len(shape))))) if kind == "permuted" else tensor


@settings(max_examples=400, deadline=None)
@drawn(data=st.data())
def test_any_argument_may_be_anything(data: st.DataObject) -> None:
    """One to three arguments are replaced by arbitrary tensors: a right result or an error, from either door."""
    good = layer(data.draw(st.sampled_from(CELLS)), packed=data.draw(st.booleans()))
    forward_or_backward = data.draw(st.sampled_from(["", "_backward", "_row_gradients"]))
    operator = good.operator + forward_or_backward
    values = backward_values(good) | {"save": data.draw(st.booleans())}
    names = [argument.name for argument in schema(operator).arguments if "Tensor" in str(argument.type)]
    for name in data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True)):
        values[name] = data.draw(strange_tensors())
    results, error = None, None
    try:
        results = call("direct", operator, values)
    except REFUSED as raised:
        error = raised
    if results is not None:
        assert all(torch.isfinite(result).all() for result in results if result.shape[-1] != 64)  # 64: gates
        return
    assert f"fastrnn.{operator}: " in str(error) or isinstance(error, TypeError)
    if not any(isinstance(value, Tensor) and value.is_meta for value in values.values()):
        with pytest.raises(REFUSED):
            call("dispatcher", operator, values)
