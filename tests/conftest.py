# SPDX-License-Identifier: BSD-3-Clause
"""Fixtures of all tests: the instruction sets of this machine, the device, and a fixed seed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import placement
import pytest
import torch

from fastrnn import extension


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        default="auto",
        help="devices for the tests that can run on any: cpu, cuda, or cpu,cuda (default: both where both are there). "
        "Without cpu, tests of the CPU alone are left out.",
    )


DEVICES = pytest.StashKey[list[str]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[DEVICES] = devices = placement.chosen(config.getoption("device"))
    if devices != ["cpu"]:  # torch.nn's complaint about copies of modules in the memory that cuDNN wants
        config.addinivalue_line("filterwarnings", "ignore:RNN module weights are not part of single contiguous chunk")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """On the CPU alone nothing changes, ids included; else a test that can run on any device runs on each of them."""
    devices = metafunc.config.stash[DEVICES]
    is_on_every = metafunc.module.__name__ in placement.ON_EVERY_DEVICE
    is_of_cpu = "compiled" in metafunc.fixturenames or metafunc.definition.get_closest_marker("cpu_alone")
    if not is_on_every or is_of_cpu:
        devices = ["cpu"]
    if "isa" not in metafunc.fixturenames:
        if devices != ["cpu"]:
            metafunc.parametrize("device", devices, indirect=True)
        return
    if devices == ["cpu"]:
        metafunc.parametrize("isa", ISAS, indirect=True)
        return
    pairs = [pytest.param(isa, "cpu", id=str(isa)) for isa in ISAS if "cpu" in devices]
    pairs += [pytest.param(None, device, id=device) for device in devices if device != "cpu"]
    metafunc.parametrize(("isa", "device"), pairs, indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without the CPU among the devices: only what runs on the others."""
    devices = config.stash[DEVICES]
    if "cpu" in devices:
        return
    elsewhere = [
        item for item in items if _device_of(item) in devices or item.module.__name__ in ("test_cuda", "test_gpu_bench")
    ]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(elsewhere)])
    items[:] = elsewhere


def _device_of(item: pytest.Item) -> str:
    return item.callspec.params.get("device", "cpu") if hasattr(item, "callspec") else "cpu"


# avx512 in all but bfloat16.
BFLOAT16_ISAS = ("avx512_bf16", "amx")


def _isas(*without: str) -> list[str]:
    return ["none"] if extension.module is None else [n for n in extension.module.available_isas() if n not in without]


ISAS = _isas(*BFLOAT16_ISAS)


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> Iterator[str | None]:
    """The test once for each instruction set of this machine that float32 knows; the one chosen before is restored. On
    another device there is nothing to choose, and the value is None."""
    if request.param is None and extension.module is not None:
        yield None
    else:
        yield from _chosen(request.param)


@pytest.fixture(params=_isas("scalar", "avx2") or _isas())
def bfloat16_isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Likewise for those that differ in bfloat16, and one that converts it."""
    yield from _chosen(request.param)


def _chosen(name: str) -> Iterator[str]:
    if extension.module is None:
        pytest.skip(f"the extension is not loaded: {extension.reason}")
    before = extension.module.isa()
    extension.module.select_isa(name)
    yield name
    extension.module.select_isa(before)


@pytest.fixture
def compiled() -> object:
    """The module fastrnn._C; the test is skipped where it is not loaded."""
    if extension.module is None:
        pytest.skip(f"the extension is not loaded: {extension.reason}")
    return extension.module


@pytest.fixture
def threads() -> Iterator[Callable[..., None]]:
    """threads(count, split="chosen"): how many run a layer and how they share it, "rows" or "units" also where it does
    not pay; from there to the end of the test."""
    before = torch.get_num_threads()

    def share(count: int, split: str = "chosen") -> None:
        torch.set_num_threads(count)
        if extension.module is not None:
            extension.module.force_split(split)

    yield share
    share(before)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """The device of this test (--device), on which torch's factories make their tensors."""
    chosen = torch.device(getattr(request, "param", "cpu"))
    with contextlib.nullcontext() if chosen.type == "cpu" else placement.placed(chosen):
        yield chosen
