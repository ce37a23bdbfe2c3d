# SPDX-License-Identifier: BSD-3-Clause
"""CUDA: streams, graphs, precision, derivatives, repeated calls, several GPUs, and what compute-sanitizer finds.

The rest of what a layer must do is tested by the files in placement.ON_EVERY_DEVICE, which run on CUDA too where it is
there. Where it is not, one test here skips and says why, and the others run on a stand-in (accelerator.py).
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import placement
import pytest
import torch
from accelerator import Gpu, StandIn
from torch import Tensor
from twins import CELLS, assert_as_accurate, random_state, tensors_of, training_step, twins

MISSING = placement.cuda_missing()
PROGRAM = Path(__file__).with_name("sanitized.py")
every_cell = pytest.mark.parametrize("cell", CELLS)
pytestmark = pytest.mark.filterwarnings("ignore:RNN module weights are not part of single contiguous chunk:UserWarning")
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.fixture(params=["stand-in" if MISSING else "cuda"])
def accelerator(request: pytest.FixtureRequest) -> Iterator[Gpu | StandIn]:
    if request.param == "stand-in":
        yield StandIn()
        return
    found = Gpu()
    with placement.placed(found.device):
        yield found


def changed(x: Tensor) -> Tensor:
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(9)).to(x.dtype)


def test_this_machine_tests_cuda():
    if MISSING:
        pytest.skip(f"nothing runs on CUDA: {MISSING}")
    assert torch.zeros(1, device="cuda").is_cuda


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@every_cell
def test_results_are_as_accurate_as_torch_nn(cell, dtype, accelerator):
    for sizes, options in (((5, 3, 6, 17), {}), ((12, 9, 20, 64), {"num_layers": 2, "bidirectional": True})):
        T, B, inputs, units = sizes
        ours, theirs = twins(cell, inputs, units, dtype=dtype, **options)
        rows = 4 if options else 1
        x, hx = torch.randn(T, B, inputs, dtype=dtype), random_state(cell, rows, B, H=units, dtype=dtype)
        assert_as_accurate(ours, theirs, x, hx)


@pytest.mark.parametrize("precision", ["tf32", "ieee"])
@every_cell
def test_float32_obeys_the_precision_of_torch_nn(cell, precision, accelerator):
    ours, theirs = twins(cell, 64, 128)
    x, hx = torch.randn(20, 16, 64), random_state(cell, 1, 16, H=128)
    exact = training_step(ours, x, hx)
    with placement.float32_products(precision):
        assert_as_accurate(ours, theirs, x, hx)
        found = training_step(ours, x, hx)
    if accelerator.name == "cuda" and torch.cuda.get_device_capability()[0] >= 8:
        assert torch.equal(found["y"], exact["y"]) == (precision == "ieee")


@pytest.mark.parametrize("T", [1, 5000])
@every_cell
def test_shortest_and_long_sequences(cell, T, accelerator):
    ours, theirs = twins(cell, 4, 9, bidirectional=True)
    T = T if accelerator.name == "cuda" else min(T, 200)
    assert_as_accurate(ours, theirs, torch.randn(T, 2, 4), random_state(cell, 2, 2, H=9))


@every_cell
def test_current_stream_is_used(cell, accelerator):
    ours, _ = twins(cell, 16, 40, 2, bidirectional=True)
    source, target = torch.randn(30, 5, 16), torch.zeros(30, 5, 16)
    d_y = changed(torch.empty(30, 5, 80))
    expected = training_step(ours, source)
    expected_y, _ = ours(source)
    (expected_d_x,) = torch.autograd.grad(ours(x := source.clone().requires_grad_())[0], x, d_y)
    with accelerator.busy_stream():
        leaf = target.copy_(source).requires_grad_()
        y, _ = ours(leaf)
        (d_x,) = torch.autograd.grad(y, leaf, d_y)
        y, d_x = y.detach().clone(), d_x.clone()
    accelerator.synchronize()
    assert torch.equal(y, expected_y)
    assert torch.equal(expected["y"], expected_y)
    assert torch.equal(d_x, expected_d_x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@every_cell
def test_captured_inference_is_replayed_on_new_numbers(cell, dtype, accelerator):
    ours, _ = twins(cell, 16, 40, 2, bidirectional=True, dtype=dtype)
    x, hx = torch.randn(12, 5, 16, dtype=dtype), random_state(cell, 4, 5, H=40, dtype=dtype)
    with torch.no_grad():
        replay = accelerator.captured(lambda: tuple(tensors_of(ours(x, hx))))
        x.copy_(changed(x))
        found = replay()
        expected = tensors_of(ours(x, hx))
        for ours_result, eager in zip(found, expected, strict=True):
            assert torch.equal(ours_result, eager)


@every_cell
def test_captured_training_is_replayed_on_new_numbers(cell, accelerator):
    ours, _ = twins(cell, 16, 40, 2, bidirectional=True)
    x, d_y = torch.randn(12, 5, 16).requires_grad_(), torch.randn(12, 5, 80)

    def step() -> tuple[Tensor, ...]:
        y, _ = ours(x)
        return (y.detach(), *torch.autograd.grad(y, [x, *ours.parameters()], d_y))

    replay = accelerator.captured(step)
    for tensor in (x, d_y):
        tensor.data.copy_(changed(tensor))
    found = [tensor.clone() for tensor in replay()]
    for captured, eager in zip(found, step(), strict=True):
        assert torch.equal(captured, eager)


@every_cell
def test_calls_do_not_wait_for_the_device(cell, accelerator):
    ours, _ = twins(cell, 16, 40, 2, bidirectional=True)
    x, d_y = torch.randn(12, 5, 16).requires_grad_(), torch.randn(12, 5, 80)
    lengths = torch.tensor([3, 12, 7, 1, 12])
    for given in (None, lengths):
        ours(x, lengths=given)[0].backward(d_y)
        with accelerator.without_synchronisation():
            ours(x, lengths=given)[0].backward(d_y)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@every_cell
def test_bits_are_the_same_from_run_to_run(cell, dtype, accelerator):
    ours, _ = twins(cell, 24, 70, 2, bidirectional=True, dtype=dtype)
    x, hx = torch.randn(19, 33, 24, dtype=dtype), random_state(cell, 4, 33, H=70, dtype=dtype)
    first = training_step(ours, x, hx)
    for _ in range(3):
        for name, tensor in training_step(ours, x, hx).items():
            assert torch.equal(tensor, first[name]), name


@every_cell
def test_backward_in_eval_mode_equals_the_one_in_training(cell, accelerator):
    """cuDNN refuses it."""
    ours, _ = twins(cell, 6, 17, 2, bidirectional=True)
    x = torch.randn(7, 3, 6)
    trained = training_step(ours.train(), x)
    for name, tensor in training_step(ours.eval(), x).items():
        assert torch.equal(tensor, trained[name]), name


@every_cell
def test_double_backward_equals_torch_nn_on_the_cpu(cell, accelerator):
    """cuDNN refuses it."""
    ours, theirs = twins(cell, 4, 7, dtype=torch.float64)
    weight = torch.randn(5, 3, 7, dtype=torch.float64)
    results = []
    for module, device in ((ours, accelerator.device), (theirs.cpu(), torch.device("cpu"))):
        x = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(device)
        x.requires_grad_()
        y, _ = module(x)
        (d_x,) = torch.autograd.grad((y * weight.to(device)).sum(), x, create_graph=True)
        found = torch.autograd.grad(d_x.square().sum(), [x, *module.parameters()], allow_unused=True)
        results.append([d_x, *(tensor for tensor in found if tensor is not None)])
    assert len(results[0]) == len(results[1])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found.cpu(), expected.cpu(), rtol=1e-9, atol=1e-11)


@every_cell
def test_graph_can_be_used_twice_and_inputs_are_not_written(cell, accelerator):
    ours, _ = twins(cell, 6, 17, 2, bidirectional=True)
    x, d_y = torch.randn(7, 3, 6).requires_grad_(), torch.randn(7, 3, 34)
    before = [tensor.detach().clone() for tensor in (x, d_y, *ours.parameters())]
    y, _ = ours(x)
    kept = y.detach().clone()
    leaves = [x, *ours.parameters()]
    first = torch.autograd.grad(y, leaves, d_y, retain_graph=True)
    second = torch.autograd.grad(y, leaves, d_y)
    for one, two in zip(first, second, strict=True):
        assert torch.equal(one, two)
    for tensor, old in zip((x, d_y, *ours.parameters(), y), (*before, kept), strict=True):
        assert torch.equal(tensor, old)


@every_cell
def test_lengths_on_the_device_equal_lengths_on_the_cpu(cell, accelerator):
    ours, _ = twins(cell, 6, 17, 2, bidirectional=True)
    x, lengths = torch.randn(7, 4, 6), torch.tensor([7, 1, 4, 7])
    here, there = (tensors_of(ours(x, lengths=given)) for given in (lengths.to(accelerator.device), lengths))
    for one, two in zip(here, there, strict=True):
        assert torch.equal(one, two)


def test_second_gpu_computes_the_same_while_the_first_is_current():
    if MISSING or torch.cuda.device_count() < 2:
        pytest.skip("this machine has no two GPUs")
    for cell in CELLS:
        ours, _ = twins(cell, 6, 17, 2, bidirectional=True)
        x = torch.randn(7, 3, 6)
        results = [training_step_on(ours, x, torch.device("cuda", index)) for index in (0, 1)]
        for name, tensor in results[0].items():
            assert torch.equal(tensor, results[1][name]), (cell, name)


def training_step_on(module: torch.nn.Module, x: Tensor, device: torch.device) -> dict[str, Tensor]:
    """y and the gradients of its sum of squares, on the CPU, of a call on a device that need not be the current one."""
    leaf = x.to(device).requires_grad_()
    module = module.to(device)
    y, _ = module(leaf)
    names = ["d_x", *(f"d_{name}" for name, _ in module.named_parameters())]
    found = torch.autograd.grad(y.square().sum(), [leaf, *module.parameters()])
    return {"y": y.detach().cpu(), **{name: tensor.cpu() for name, tensor in zip(names, found, strict=True)}}


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer_finds_nothing(tool):
    command = [sys.executable, str(PROGRAM), "cpu" if MISSING else "cuda"]
    if not MISSING:
        sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
        if not Path(sanitizer).exists():
            pytest.skip("compute-sanitizer is not installed")
        command = [sanitizer, "--tool", tool, "--error-exitcode", "7", *command]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=PROGRAM.parent.parent)
    said = done.stdout + done.stderr
    if "Device not supported" in said:
        pytest.skip("compute-sanitizer refuses this machine's device")
    assert done.returncode == 0, said[-3000:]
    assert "24 calls" in said
