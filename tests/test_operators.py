# SPDX-License-Identifier: BSD-3-Clause
"""The operators of csrc/ops.cpp on good input, through both doors: schemas, numbers, shapes, masks, strides, dtypes."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch
from calls import _C, DOORS, RESULTS, backward, backward_values, call, forward, given, schema
from samples import CELLS, Sample, gradients, sample, stock
from torch._subclasses.fake_tensor import FakeTensorMode

SHAPES = {
    "one": dict(T=1, B=1, I=1, H=1),
    "plain": dict(T=5, B=3, I=4, H=7),
    "vector": dict(T=3, B=2, I=5, H=17),
    "bidirectional": dict(T=4, B=2, I=3, H=5, D=2),
    "no-bias": dict(T=3, B=2, I=3, H=5, D=2, bias=False),
    "packed": dict(lengths=(5, 3, 3, 1), I=3, H=5),
    "packed-bidirectional": dict(lengths=(5, 3, 3, 1), I=3, H=5, D=2),
}
PROJECTED = {
    "projection": dict(T=4, B=3, I=4, H=6, P=2),
    "projection-packed-bidirectional": dict(lengths=(4, 2, 1), I=4, H=6, P=3, D=2),
}
CASES = [pytest.param(cell, shape, id=f"{cell}-{name}") for cell in CELLS for name, shape in SHAPES.items()]
CASES += [pytest.param("lstm", shape, id=f"lstm-{name}") for name, shape in PROJECTED.items()]
FEW = [pytest.param(cell, SHAPES[name], id=f"{cell}-{name}") for cell in CELLS for name in ("plain", "packed")]
FEW += [pytest.param("lstm", PROJECTED["projection-packed-bidirectional"], id="lstm-projection-packed-bidirectional")]
LOW = (torch.bfloat16, torch.float16)
both_doors = pytest.mark.parametrize("door", DOORS)

WEIGHTS = "Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, "
REVERSE = "Tensor? w_ih_reverse, Tensor? w_hh_reverse, Tensor? b_ih_reverse, Tensor? b_hh_reverse, "
LSTM = (
    f"Tensor x, Tensor h0, Tensor c0, {WEIGHTS}Tensor? w_hr, {REVERSE}Tensor? w_hr_reverse, Tensor? lengths, "
    "Tensor? batch_sizes, Tensor? reset, Tensor? reset_h, Tensor? reset_c, Tensor? h_mask, Tensor? zoneout_h, "
    "Tensor? zoneout_c"
)
GRU = (
    f"Tensor x, Tensor h0, {WEIGHTS}{REVERSE}Tensor? lengths, Tensor? batch_sizes, Tensor? reset, Tensor? reset_h, "
    "Tensor? h_mask, Tensor? zoneout_h"
)
SCHEMAS = {
    "lstm_layer": f"({LSTM}, bool save)",
    "gru_layer": f"({GRU}, bool save)",
    "rnn_layer": f"({GRU}, bool relu, bool save)",
    "lstm_layer_backward": f"(Tensor? d_y, Tensor? d_h_n, Tensor? d_c_n, {LSTM}, "
    "Tensor y, Tensor gates, Tensor cells, int needs, Tensor? d_cells=None)",
    "gru_layer_backward": f"(Tensor? d_y, Tensor? d_h_n, {GRU}, Tensor y, Tensor gates, int needs)",
    "rnn_layer_backward": f"(Tensor? d_y, Tensor? d_h_n, {GRU}, Tensor y, bool relu, int needs)",
}
SCHEMAS |= {
    name.replace("backward", "row_gradients"): arguments.replace(", Tensor? d_cells=None", "")
    for name, arguments in SCHEMAS.items()
    if "backward" in name
}


def tensors(values: dict) -> dict[str, torch.Tensor]:
    return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours.keys() - {"gates"}:  # opaque, and the subject of a test of its own
        assert torch.equal(ours[name], theirs[name]), name


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def test_schemas_are_these_nine() -> None:
    found = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fastrnn::")}
    assert found == {f"fastrnn::{name}" for name in SCHEMAS}
    for name, arguments in SCHEMAS.items():
        assert str(schema(name)).startswith(f"fastrnn::{name}{arguments} -> ("), name
        assert torch.Tag.pt2_compliant_tag in getattr(torch.ops.fastrnn, name).default.tags
        if name.endswith("row_gradients"):
            returned = ["d_x", "d_h0", "d_c0", "d_gates", "d_h"] if "lstm" in name else ["d_x", "d_h0", "d_gates"]
            assert [result.name for result in schema(name).returns] == returned
        elif name in RESULTS:
            assert tuple(result.name for result in schema(name).returns) == RESULTS[name]
        else:
            differentiable = [a.name for a in schema(name.removesuffix("_backward")).arguments]
            differentiable = differentiable[: differentiable.index("lengths")]
            differentiable += ["reset_h", "reset_c"] if name.startswith("lstm") else ["reset_h"]
            assert [result.name for result in schema(name).returns] == [f"d_{a}" for a in differentiable]


@pytest.mark.parametrize(("cell", "shape"), CASES)
def test_results_and_gradients_equal_torch_nn(isa: str, cell: str, shape: dict) -> None:
    layer = sample(cell, **shape, requires_grad=True)
    theirs = stock(layer)
    ours = forward("direct", layer)
    for name, expected in zip(("y", "h_n", "c_n"), theirs, strict=False):
        torch.testing.assert_close(ours[name], expected, rtol=1e-11, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
    found = backward("direct", layer)
    for name, expected in gradients(theirs, layer).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"d_{n}: {m}")


@pytest.mark.parametrize(("cell", "shape"), CASES)
def test_both_doors_agree(cell: str, shape: dict) -> None:
    layer = sample(cell, **shape, dtype=torch.float32)
    assert_same(forward("direct", layer, save=False), forward("dispatcher", layer, save=False))
    assert_same(backward("direct", layer), backward("dispatcher", layer))


@both_doors
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *LOW], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize(("cell", "shape"), CASES)
def test_shapes_and_dtypes_of_results(door: str, cell: str, shape: dict, dtype: torch.dtype) -> None:
    layer = sample(cell, **shape, dtype=dtype)
    w_hh = layer.weights[0][1]
    D, N, H = len(layer.weights), layer.x.shape[:-1].numel(), w_hh.shape[0] // {"l": 4, "g": 3, "r": 1}[cell[0]]
    B, R = layer.state[0].shape[1:]
    saved_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    for save in (False, True):
        expected = {
            "y": ((*layer.x.shape[:-1], D * R), dtype),
            "h_n": ((D, B, R), dtype),
            "c_n": ((D, B, H), dtype),
            "gates": ((D, N, 4 * (-(-H // 16) * 16)) if save else (0,), saved_dtype),
            "cells": ((D, N, H) if save else (0,), saved_dtype),
        }
        for name, result in forward(door, layer, save).items():
            assert (tuple(result.shape), result.dtype) == expected[name], name
            assert result.is_contiguous(), name
            assert not result.requires_grad
    values = backward_values(layer)
    for name, gradient in call_backward(door, layer, values).items():
        of = values.get(name)
        assert gradient.shape == (of.shape if of is not None else (0,)), name
        assert gradient.dtype == dtype, name
        assert gradient.is_contiguous(), name


def call_backward(door: str, layer: Sample, values: dict) -> dict[str, torch.Tensor]:
    operator = f"{layer.operator}_backward"
    return {r.name[2:]: g for r, g in zip(schema(operator).returns, call(door, operator, values), strict=True)}


@both_doors
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize(("cell", "shape"), [*FEW, pytest.param("lstm", SHAPES["one"], id="lstm-one")])
def test_results_alias_nothing_and_inputs_stay(door: str, cell: str, shape: dict, dtype: torch.dtype) -> None:
    layer = sample(cell, **shape, dtype=dtype)
    values = backward_values(layer)
    before = {name: value.clone() for name, value in tensors(values).items()}
    for results in (forward(door, layer, save=True), call_backward(door, layer, values)):
        everything = [*tensors(values).values(), *results.values()]
        storages = [t.untyped_storage().data_ptr() for t in everything if t.numel() > 0]
        assert len(storages) == len(set(storages))
    for name, value in tensors(values).items():
        assert torch.equal(bytes_of(value), bytes_of(before[name])), name


@pytest.mark.parametrize(("cell", "shape"), [case for case in FEW if not case.values[0].startswith("rnn")])
@pytest.mark.parametrize("units", [None, 24], ids=["units", "units24"])  # 24 fill vectors, but for those of AVX-512
def test_saved_arrays_are_written_throughout(isa: str, cell: str, shape: dict, units: int | None) -> None:
    """Also where units are padded: what happened to lie in memory would make two equal calls differ."""
    layer = sample(cell, **shape | ({"H": units} if units else {}), dtype=torch.float32)
    runs = []
    for stain in (0.0, torch.nan, 1.0):
        sizes = [result.shape for result in forward("direct", layer, save=True).values()]
        stained = [torch.full(size, stain) for size in sizes for _ in range(8)]
        del stained
        runs.append(forward("direct", layer, save=True))
    for name in ("gates", *(["cells"] if cell == "lstm" else [])):
        assert all(torch.equal(bytes_of(run[name]), bytes_of(runs[0][name])) for run in runs), name


@both_doors
@pytest.mark.parametrize(("cell", "shape"), [*FEW, pytest.param("gru", SHAPES["no-bias"], id="gru-no-bias")])
def test_needs_selects_gradients(door: str, cell: str, shape: dict) -> None:
    layer = sample(cell, **shape, dtype=torch.float32)
    values = backward_values(layer)
    every = call_backward(door, layer, values)
    full = values["needs"]
    for needs in (0, *(1 << k for k in range(len(every))), *(full & ~(1 << k) for k in range(len(every)))):
        found = call_backward(door, layer, values | {"needs": needs})
        for position, name in enumerate(every):
            if needs >> position & 1:
                assert torch.equal(found[name], every[name]), f"{name}, needs = {needs:b}"
            else:
                assert found[name].shape == (0,), f"{name}, needs = {needs:b}"


@pytest.mark.parametrize(("cell", "shape"), FEW)
def test_absent_cotangent_is_zero(cell: str, shape: dict) -> None:
    layer = sample(cell, **shape)
    names = [name for name in ("d_y", "d_h_n", "d_c_n") if name[2:] in RESULTS[layer.operator]]
    values = backward_values(layer)
    for name in names:
        zero = {name: torch.zeros_like(values[name])}
        assert_same(
            call_backward("direct", layer, values | {name: None}), call_backward("direct", layer, values | zero)
        )
    nothing = call_backward("direct", layer, values | dict.fromkeys(names))
    assert all(not gradient.any() for gradient in nothing.values())


def scattered(tensor: torch.Tensor) -> torch.Tensor:
    """Equal values, but no dimension is adjacent in memory."""
    poison = torch.nan if tensor.is_floating_point() else -9
    wide = tensor.new_full([2 * size + 1 for size in tensor.shape], poison)
    view = wide[tuple(slice(1, None, 2) for _ in tensor.shape)]
    return view.copy_(tensor)


def reversed_layout(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.permute(*reversed(range(tensor.dim()))).contiguous().permute(*reversed(range(tensor.dim())))


def negated(tensor: torch.Tensor) -> torch.Tensor:
    view = torch._neg_view(-tensor)
    assert view.is_neg()
    return view


@both_doors
@pytest.mark.parametrize("disguise", [scattered, reversed_layout, negated])
@pytest.mark.parametrize(("cell", "shape"), FEW)
def test_any_strides_are_read(door: str, disguise, cell: str, shape: dict) -> None:
    layer = sample(cell, **shape, dtype=torch.float32)
    values = backward_values(layer)
    expected, gradients = forward(door, layer, save=True), call_backward(door, layer, values)
    strange = {name: disguise(t) if t.is_floating_point() else scattered(t) for name, t in tensors(values).items()}
    assert_same(
        dict(zip(expected, call(door, layer.operator, given(layer) | {"save": True} | strange), strict=True)), expected
    )
    assert_same(call_backward(door, layer, values | strange), gradients)


@both_doors
@pytest.mark.parametrize("cell", CELLS)
def test_expanded_inputs_are_read(door: str, cell: str) -> None:
    layer = sample(cell, T=4, B=3, I=5, H=6, dtype=torch.float32)
    one_row, one_step = layer.x[:, :1].expand(4, 3, 5), layer.x[:1].expand(4, 3, 5)
    one_state = tuple(state[:, :1].expand(-1, 3, -1) for state in layer.state)
    for strange in (replace(layer, x=one_row), replace(layer, x=one_step), replace(layer, state=one_state)):
        plain = strange.to(torch.float32)
        values = backward_values(strange) | {"d_y": torch.ones(()).expand(4, 3, 6)}
        assert_same(forward(door, strange), forward(door, plain))
        expected = call_backward(door, plain, backward_values(plain) | {"d_y": torch.ones(4, 3, 6)})
        assert_same(call_backward(door, strange, values), expected)


def test_zero_tensor_is_read_as_zeros() -> None:
    layer = sample("lstm", dtype=torch.float32)
    names = ("x", "h0", "c0", "w_ih", "w_hh", "b_ih", "b_hh")
    for name in names:
        value = given(layer)[name]
        strange = forward("direct", layer, **{name: torch._efficientzerotensor(value.shape)})
        assert_same(strange, forward("direct", layer, **{name: torch.zeros(value.shape)}))


@both_doors
@pytest.mark.parametrize("dtype", LOW, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize(("cell", "shape"), FEW)
@pytest.mark.usefixtures("isa")  # those without products in bfloat16
def test_half_is_float32_rounded(door: str, cell: str, shape: dict, dtype: torch.dtype) -> None:
    layer = sample(cell, **shape, dtype=dtype)
    wide = layer.to(torch.float32)
    rounded = {n: r if n in ("gates", "cells") else r.to(dtype) for n, r in forward(door, wide, save=True).items()}
    assert_same(forward(door, layer, save=True), rounded)
    values = backward_values(layer)
    wide_values = {
        name: v.float() if name in tensors(values) and v.is_floating_point() else v for name, v in values.items()
    }
    exact = call_backward(door, wide, wide_values)
    assert_same(call_backward(door, layer, values), {name: gradient.to(dtype) for name, gradient in exact.items()})


@both_doors
@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("cell", CELLS)
def test_empty_batch(door: str, cell: str, D: int) -> None:
    layer = sample(cell, T=3, B=0, I=4, H=5, D=D, P=2 if cell == "lstm" else 0, dtype=torch.float32)
    results = forward(door, layer, save=True)
    assert all(result.numel() == 0 for result in results.values())
    assert results["y"].shape == (3, 0, D * (2 if cell == "lstm" else 5))
    for name, gradient in backward(door, layer).items():
        value = given(layer).get(name)
        assert gradient.shape == (value.shape if value is not None else (0,)), name
        assert not gradient.any(), name


def test_direct_door_records_nothing() -> None:
    layer = sample("gru", requires_grad=True)
    layer = replace(layer, x=layer.x.transpose(0, 2).contiguous().transpose(0, 2))  # is copied inside
    assert not any(result.requires_grad for result in forward("direct", layer, save=True).values())
    assert not any(result.requires_grad for result in backward("direct", layer).values())


def test_direct_door_is_blind_to_modes() -> None:
    layer = sample("lstm", dtype=torch.bfloat16)
    strange = replace(layer, x=scattered(layer.x), state=tuple(scattered(state) for state in layer.state))
    expected = forward("direct", layer)
    with FakeTensorMode(allow_non_fake_inputs=True):
        found = forward("direct", strange)
    assert_same(found, expected)

    def inside(scale: torch.Tensor) -> torch.Tensor:
        assert_same(forward("direct", strange), expected)
        return scale

    torch.vmap(inside)(torch.ones(2))


def test_threads_of_python_run_side_by_side() -> None:
    layers = [sample("lstm", T=20, B=4, I=8, H=16, dtype=torch.float32, seed=seed) for seed in range(4)]
    expected = [backward("direct", layer) for layer in layers]
    found: dict[int, dict] = {}

    def work(k: int) -> None:
        for _ in range(5):
            found[k] = backward("direct", layers[k])

    workers = [threading.Thread(target=work, args=(k,)) for k in range(len(layers))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for k, one in enumerate(expected):
        assert_same(found[k], one)


def test_facts_about_the_build() -> None:
    isas = _C.available_isas()
    assert isas[0] == "scalar"
    assert _C.isa() in isas
    assert _C.compiler().split()[0] in ("gcc", "clang")
    assert len(_C.openmp_runtimes()) == len(set(_C.openmp_runtimes())) >= 1


def test_select_isa_switches_or_refuses() -> None:
    before = _C.isa()
    try:
        for name in _C.available_isas():
            _C.select_isa(name)
            assert _C.isa() == name
    finally:
        _C.select_isa(before)
    with pytest.raises(ValueError, match=r"fastrnn\.select_isa: name must be one of scalar.*, got sse9"):
        _C.select_isa("sse9")
    assert _C.isa() == before
