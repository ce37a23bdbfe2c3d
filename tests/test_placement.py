# SPDX-License-Identifier: BSD-3-Clause
"""How tests come to other devices (placement.py, conftest.py), with torch's meta device in the place of a GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import placement
import pytest
import torch
from torch import nn

TESTS = Path(__file__).resolve().parent
META = torch.device("meta")


def collected(*arguments: str) -> list[str]:
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=TESTS.parent, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return [line.partition("::")[2] for line in done.stdout.splitlines() if "::" in line]


def test_every_file_named_is_there():
    assert [name for name in placement.ON_EVERY_DEVICE if not (TESTS / f"{name}.py").exists()] == []


def test_device_is_a_parameter_only_where_it_is_chosen():
    files = [str(TESTS / f"{name}.py") for name in ("test_modules", "test_contract_saving", "test_numerics")]
    cpu, meta, both = (collected("--device", device, *files) for device in ("cpu", "meta", "cpu,meta"))
    assert not any("meta" in name for name in cpu)
    assert meta
    assert all("meta" in name for name in meta)
    assert sorted(both) == sorted([*_renamed(cpu, both), *meta])
    assert not any("rounded_once_per_layer" in name for name in meta)


def _renamed(cpu: list[str], both: list[str]) -> list[str]:
    """The tests of the CPU as they are called where there is a choice: no fewer, and of the same functions."""
    of_cpu = [name for name in both if "meta" not in name]
    assert [name.partition("[")[0] for name in of_cpu] == [name.partition("[")[0] for name in cpu]
    return of_cpu


def test_what_factories_make_is_moved_within_the_block():
    numbers = torch.randn(3, generator=torch.Generator().manual_seed(0))
    before = torch.backends.cudnn.rnn.fp32_precision
    with placement.placed(META):
        assert torch.randn(3, generator=torch.Generator().manual_seed(0)).is_meta
        leaf = torch.zeros(2, requires_grad=True)
        assert leaf.is_meta
        assert leaf.is_leaf
        assert leaf.requires_grad
        assert (torch.rand(5) < 0.5).is_meta
        assert torch.tensor([True]).is_meta
        assert torch.tensor([1.5]).is_meta
        assert not torch.tensor([3, 1]).is_meta
        assert not torch.zeros(2, dtype=torch.long).is_meta
        assert not torch.ones(2, device="cpu").is_meta
        assert all(parameter.is_meta for parameter in nn.LSTM(3, 4).parameters())
        assert torch.backends.cudnn.rnn.fp32_precision == "ieee"
    assert torch.equal(torch.randn(3, generator=torch.Generator().manual_seed(0)), numbers)
    assert torch.backends.cudnn.rnn.fp32_precision == before


@pytest.mark.parametrize(("option", "message"), [("cuda", "--device cuda: "), ("cdua", "--device: ")])
def test_device_that_is_not_there_is_refused(option, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(pytest.UsageError, match=message):
        placement.chosen(option)


def test_cuda_is_chosen_where_it_is_there(monkeypatch):
    monkeypatch.setattr(placement, "cuda_missing", lambda: "")
    assert placement.chosen("auto") == ["cpu", "cuda"]
    monkeypatch.setattr(placement, "cuda_missing", lambda: "torch sees no CUDA device")
    assert placement.chosen("auto") == ["cpu"]
