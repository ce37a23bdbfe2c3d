# SPDX-License-Identifier: BSD-3-Clause
"""Programs that test_processes.py runs, each in a process of its own; by hand: `python tests/programs.py NAME`.

They fork, count threads, change the floating-point mode or take signals, which would disturb other tests; and what goes
wrong here hangs or kills the process, which the test then sees. A program that returns has found all as it should be.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import fastrnn
from fastrnn import extension

KINDS = ("LSTM", "GRU", "RNN")


def a_module(kind: str = "LSTM", units: int = 40, layers: int = 2) -> nn.Module:
    torch.manual_seed(0)
    return getattr(fastrnn, kind)(6, units, layers, bidirectional=True)


def an_input(T: int = 7, B: int = 8) -> Tensor:
    return torch.randn(T, B, 6, generator=torch.Generator().manual_seed(1))


def step(module: nn.Module, x: Tensor) -> list[Tensor]:
    """One forward and one backward: the output and every gradient, without touching `.grad`."""
    y = module(x)[0]
    return [y.detach(), *torch.autograd.grad(y.square().sum(), list(module.parameters()))]


def equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    return len(found) == len(expected) and all(map(torch.equal, found, expected))


def wait_for(child: int) -> None:
    _, status = os.waitpid(child, 0)
    assert status == 0, f"the forked process ended with the status {status}"


def in_a_fork(work: Callable[[], bool]) -> None:
    """Runs work() in a forked process, which must come to an end and find it true."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if work() else 2
        finally:
            os._exit(code)
    wait_for(child)


def fork_after_a_team() -> None:
    """A forked process computes, whatever its parent did before: the threads of the parent's team are not in it."""
    torch.set_num_threads(4)
    cases = [(a_module(kind), an_input()) for kind in KINDS]
    for split in ("rows", "units"):
        extension.module.force_split(split)
        expected = [step(module, x) for module, x in cases]

        def again(expected: list[list[Tensor]] = expected) -> bool:
            torch.set_num_threads(4)  # a child may ask for threads; it gets one
            return all(equal(step(module, x), one) for (module, x), one in zip(cases, expected, strict=True))

        in_a_fork(again)
        in_a_fork(lambda: in_a_fork(again) is None and again())  # and so does the child of a child
        assert again(), "the parent after a fork"


def fork_before_any_call() -> None:
    """A process that forks first, and calls the modules for the first time in the child and in the parent."""
    module, x = a_module(), an_input()
    torch.set_num_threads(2)
    extension.module.force_split("rows")
    in_a_fork(lambda: len(step(module, x)) > 1)
    step(module, x)


def fork_while_a_thread_computes() -> None:
    """A fork in the middle of another thread's call: the child has the memory of that call, but not its thread."""
    torch.set_num_threads(2)
    extension.module.force_split("units")
    module, x = a_module(), an_input()
    expected = step(module, x)
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            step(module, x)

    worker = threading.Thread(target=work)
    worker.start()
    try:
        for _ in range(20):
            in_a_fork(lambda: equal(step(module, x), expected))
    finally:
        stop.set()
        worker.join()


class Encoded(Dataset):
    """A data set that runs a module on each item, forward and backward."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        y, *gradients = step(self.module, an_input(B=index + 1))
        return y.sum(1), gradients[0]


def data_loader_with_forked_workers() -> None:
    torch.set_num_threads(4)
    extension.module.force_split("rows")
    data = Encoded(a_module("GRU"))
    expected = [data[index] for index in range(len(data))]
    loader = DataLoader(data, batch_size=None, num_workers=2, multiprocessing_context="fork")
    for _ in range(2):
        for found, one in zip(loader, expected, strict=True):
            assert equal(list(found), list(one))


def _spawned(rank: int, module: nn.Module, results: Tensor) -> None:
    torch.set_num_threads(2)
    with torch.no_grad():
        results[rank] = module(an_input(B=rank + 2))[0].sum(1)
    step(module, an_input())


def spawned_processes_share_a_module() -> None:
    """torch.multiprocessing: the weights lie in shared memory, as for Hogwild training."""
    module = a_module()
    module.share_memory()
    step(module, an_input())
    results = torch.zeros(2, 7, 80).share_memory_()
    torch.multiprocessing.spawn(_spawned, (module, results), nprocs=2)
    for rank in range(2):
        assert torch.equal(results[rank], module(an_input(B=rank + 2))[0].sum(1))


def two_threads_call_one_module() -> None:
    """Python threads that call the same module at once, each with a team of its own, get what each gets alone."""
    torch.set_num_threads(2)
    for split in ("chosen", "rows", "units"):
        extension.module.force_split(split)
        for kind in KINDS:
            module = a_module(kind)
            inputs = [an_input(T, B) for T, B in ((7, 8), (30, 3))]
            expected = [step(module, x) for x in inputs]
            right = [0, 0]

            def work(k: int) -> None:
                torch.set_num_threads(2)
                for _ in range(20):
                    right[k] += equal(step(module, inputs[k]), expected[k])  # noqa: B023  joined within the turn

            workers = [threading.Thread(target=work, args=(k,)) for k in range(2)]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
            assert right == [20, 20], (split, kind, right)


def other_threads_run_during_a_call() -> None:
    """The interpreter's lock is released in the kernels, forward and backward.

    With an endless switch interval a thread gives the lock away only where it says so; this one does so nowhere but in
    the call. So the other thread's counter stands still unless the kernel lets it run.
    """
    module = extension.module
    torch.set_num_threads(1)
    T, B, H = 20, 4, 512
    generator = torch.Generator().manual_seed(0)
    x, h0 = torch.randn(T, B, H, generator=generator), torch.zeros(1, B, H)
    w_ih, w_hh = (torch.randn(3 * H, H, generator=generator) / 32 for _ in range(2))
    weights = [w_ih, w_hh, *[None] * 6]
    extras = [None] * 6
    y, h_n, gates = module.gru_layer(x, h0, *weights, *extras, True)
    only_d_x = 1
    calls = {
        "forward": lambda: module.gru_layer(x, h0, *weights, *extras, False),
        "backward": lambda: module.gru_layer_backward(y, h_n, x, h0, *weights, *extras, y, gates, only_d_x),
    }
    kept = []  # freeing a tensor gives the lock away, too
    count, stop = [0], threading.Event()

    def work() -> None:
        while not stop.is_set():
            count[0] += 1
            time.sleep(1e-5)  # gives the lock back

    worker = threading.Thread(target=work)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e6)  # before the other thread begins: a wait keeps the interval that it began with
    try:
        worker.start()
        for name, call in calls.items():
            before, first = count[0], len(kept)
            while count[0] == before and len(kept) < first + 300:
                kept.append(call())
            assert count[0] > before, f"{name}: no other thread ran in {len(kept) - first} calls"
    finally:
        sys.setswitchinterval(interval)
        stop.set()
        worker.join()


def more_threads_than_cores() -> None:
    """Two Python threads with teams of 8 and 24, with a barrier at every step, on whatever cores there are."""
    extension.module.force_split("units")
    module, x = a_module(units=400, layers=1), an_input(T=20)
    torch.set_num_threads(1)
    expected = step(module, x)
    right = []

    def work(threads: int) -> None:
        torch.set_num_threads(threads)
        right.extend(equal(step(module, x), expected) for _ in range(3))

    workers = [threading.Thread(target=work, args=(threads,)) for threads in (8, 24)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert right == [True] * 6


def fewer_threads_than_planned() -> None:
    """Run with OMP_THREAD_LIMIT=3: the runtime grants less than a team of 4, and the call is made by one thread."""
    module, x = a_module(), an_input()
    torch.set_num_threads(1)
    expected = step(module, x)
    torch.set_num_threads(4)
    for split in ("rows", "units"):
        extension.module.force_split(split)
        assert equal(step(module, x), expected), split


def call_inside_a_parallel_region() -> None:
    """Every thread of somebody else's parallel region calls the module, which then stays on that thread."""
    runtime = next(path for path in extension.module.openmp_runtimes() if "gomp" in path)
    torch.set_num_threads(4)
    extension.module.force_split("units")
    module, x = a_module(), an_input()
    expected = step(module, x)
    right: list[bool] = []

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    def body(_: int | None) -> None:
        torch.set_num_threads(4)
        right.append(equal(step(module, x), expected))

    ctypes.CDLL(runtime).GOMP_parallel(body, None, 3, 0)
    assert right == [True] * 3
    assert equal(step(module, x), expected)


def interrupted_during_and_after_calls() -> None:
    """Ctrl-C: KeyboardInterrupt rises when the call is done, and the next call is right."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts its background jobs with SIGINT ignored
    torch.set_num_threads(2)
    extension.module.force_split("units")
    module, x = a_module(), an_input(T=400)
    expected = step(module, x)
    process = os.getpid()
    for _ in range(3):
        begun = threading.Event()

        def interrupt(begun: threading.Event = begun) -> None:
            begun.wait()
            os.kill(process, signal.SIGINT)

        other = threading.Thread(target=interrupt)
        other.start()
        try:
            begun.set()
            while True:
                step(module, x)
        except KeyboardInterrupt:
            other.join()
        assert equal(step(module, x), expected)
    try:
        step(module, x)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("no KeyboardInterrupt")
    except KeyboardInterrupt:
        assert equal(step(module, x), expected)


def flush_denormal_reaches_every_thread() -> None:
    """torch.set_flush_denormal holds for the whole team, and only as long as a call.

    An RNN of relu halves its state at every step, exactly, from the smallest normal number down: with denormals the
    states are powers of two, without them zero.
    """
    H, B, T = 64, 12, 6
    module = fastrnn.RNN(1, H, nonlinearity="relu", bias=False)
    with torch.no_grad():
        module.weight_ih_l0.zero_()
        module.weight_hh_l0.copy_(torch.eye(H) / 2)
    x, h0 = torch.zeros(T, B, 1), torch.full((1, B, H), 2.0**-126)
    halves = torch.tensor([2.0 ** (-127 - t) for t in range(T)]).view(T, 1, 1).expand(T, B, H)
    tiny = torch.full((1 << 20,), 2.0**-120)
    assert torch.set_flush_denormal(False)
    for threads, split in ((1, "chosen"), (4, "rows"), (4, "units")):
        torch.set_num_threads(threads)
        extension.module.force_split(split)
        for flush in (False, True, False):
            torch.set_flush_denormal(flush)
            with torch.no_grad():
                y = module(x, h0)[0]
            state = torch.ones_like(h0).requires_grad_()
            last = module(x, state)[0][-1]
            (d_state,) = torch.autograd.grad(last, state, torch.full_like(last, 2.0**-124))  # halved T times, too
            torch.set_flush_denormal(False)  # a comparison with denormals must not flush them
            assert torch.equal(y, torch.zeros(T, B, H) if flush else halves), (threads, split, flush)
            assert torch.equal(d_state[0], torch.full((B, H), 0.0 if flush else 2.0**-130)), (threads, split, flush)
            # torch's own work on the same threads: they have their own mode back
            bits = (tiny * 2.0**-20).view(torch.int32)  # a thread that flushes would take a denormal for zero
            assert torch.equal(bits, torch.full_like(bits, 1 << 9)), (threads, split, flush)


PROGRAMS: tuple[Callable[[], None], ...] = (
    fork_after_a_team,
    fork_before_any_call,
    fork_while_a_thread_computes,
    data_loader_with_forked_workers,
    spawned_processes_share_a_module,
    two_threads_call_one_module,
    other_threads_run_during_a_call,
    more_threads_than_cores,
    call_inside_a_parallel_region,
    interrupted_during_and_after_calls,
    flush_denormal_reaches_every_thread,
)

if __name__ == "__main__":
    globals()[sys.argv[1]]()
