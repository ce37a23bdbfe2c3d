# SPDX-License-Identifier: BSD-3-Clause
"""sigmoid and tanh of every instruction set against float64 (float32) and 50 digits (float64), in units in the last
place of the exact result; the bounds are those of csrc/cpu/math.h and docs/numerics.md."""

from decimal import Decimal, localcontext

import pytest
import torch

from fastrnn import extension

SMALLEST_NORMAL = {torch.float32: 2.0**-126, torch.float64: 2.0**-1022}
BOUND = {"sigmoid": 2.0, "tanh": 3.0}


def ulp32(got: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """Distance of float32 results from float64 values, in float32 units in the last place of those."""
    _, exponent = torch.frexp(exact.abs())
    return (got.double() - exact).abs() / torch.ldexp(torch.ones_like(exact), (exponent - 24).clamp(min=-149))


def every_nth_float32(n: int) -> torch.Tensor:
    """Every n-th finite float32 of either sign, in the order of their bits, the ends included."""
    bits = torch.arange(0, 0x7F800000, n, dtype=torch.int64)
    positive = torch.cat([bits, torch.tensor([0x7F7FFFFF])]).to(torch.int32).view(torch.float32)
    return torch.cat([positive, -positive])


def dense_near_zero() -> torch.Tensor:
    """Where gates live: [-20, 20] in steps of 2^-16, two and a half million values."""
    return torch.arange(-20 * 2**16, 20 * 2**16, dtype=torch.float32) / 2**16


@pytest.mark.parametrize("name", ["sigmoid", "tanh"])
def test_float32_activation_is_within_its_bound(isa: str, name: str) -> None:
    x = torch.cat([every_nth_float32(997), dense_near_zero(), torch.linspace(-87.34, -87.33, 2000)])
    got = extension.module.activation(name, x)
    exact = getattr(torch, name)(x.double())
    error = ulp32(got, exact)[exact.abs() >= SMALLEST_NORMAL[torch.float32]]
    assert error.max().item() <= BOUND[name]


@pytest.mark.parametrize("name", ["sigmoid", "tanh"])
def test_float32_activation_ends_where_the_function_ends(isa: str, name: str) -> None:
    x = torch.tensor([float("inf"), -float("inf"), float("nan"), 1e30, -1e30, 0.0])
    low = 0.0 if name == "sigmoid" else -1.0
    middle = 0.5 if name == "sigmoid" else 0.0
    got = extension.module.activation(name, x)
    assert got[2].isnan()
    expected = torch.tensor([1.0, low, 1.0, low, middle])
    torch.testing.assert_close(got[[0, 1, 3, 4, 5]], expected, rtol=0, atol=2.0**-125)


@pytest.mark.parametrize("name", ["sigmoid", "tanh"])
def test_rounded_activation_is_within_its_bound(isa: str, name: str) -> None:
    """Of the cells with products in bfloat16, relative to the exact result; never beyond 1. Others have those above."""
    x = torch.cat([every_nth_float32(997), dense_near_zero()])
    got = extension.module.activation(name, x, rounded=True)
    exact = getattr(torch, name)(x.double())
    normal = exact.abs() >= 2.0**-125
    assert ((got.double() - exact).abs() / exact.abs())[normal].max().item() <= 1.4e-5
    assert got[~normal].abs().max().item() <= 2.0**-124
    assert got.abs().max().item() <= 1.0
    ends = extension.module.activation(name, torch.tensor([float("inf"), -float("inf"), float("nan")]), rounded=True)
    assert ends[2].isnan()
    torch.testing.assert_close(ends[:2], torch.tensor([1.0, 0.0 if name == "sigmoid" else -1.0]), rtol=0, atol=2e-5)


def exact_activation(name: str, x: float) -> Decimal:
    with localcontext() as context:
        context.prec = 50
        value = Decimal(x)
        if name == "sigmoid":
            return 1 / (1 + (-value).exp())
        e = (2 * value).exp()
        return (e - 1) / (e + 1)


@pytest.mark.parametrize("name", ["sigmoid", "tanh"])
def test_float64_activation_is_within_its_bound(isa: str, name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    uniform = torch.rand(1500, generator=generator, dtype=torch.float64)
    sign = torch.where(torch.rand(1500, generator=generator) < 0.5, -1.0, 1.0).double()
    smallest = torch.linspace(-708.4, -708.39, 300, dtype=torch.float64)
    x = torch.cat([40 * uniform - 20, sign * torch.exp2(uniform * 40 - 34), smallest])
    got = extension.module.activation(name, x)
    worst = 0.0
    for value, result in zip(x.tolist(), got.tolist(), strict=True):
        exact = exact_activation(name, value)
        if abs(exact) >= SMALLEST_NORMAL[torch.float64]:
            unit = Decimal(2) ** (torch.frexp(torch.tensor(float(exact), dtype=torch.float64))[1].item() - 53)
            worst = max(worst, float(abs(Decimal(result) - exact) / unit))
    assert worst <= BOUND[name]


def test_activation_refuses_another_name_and_another_dtype(isa: str) -> None:
    with pytest.raises(ValueError, match="sigmoid or tanh, got relu"):
        extension.module.activation("relu", torch.zeros(1))
    with pytest.raises(RuntimeError, match="float32 or float64"):
        extension.module.activation("tanh", torch.zeros(1, dtype=torch.int64))
