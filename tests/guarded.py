# SPDX-License-Identifier: BSD-3-Clause
"""Layers whose arguments lie against pages that nobody may touch: the program that test_bounds.py runs. A read or write
beside an argument ends the process with a signal.

python tests/guarded.py ISA [SHAPES]
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import mmap
import random
import sys
from collections.abc import Iterator

import torch
from torch import Tensor, nn

import fastrnn
from fastrnn import extension

PAGE = mmap.PAGESIZE
KINDS = ("LSTM", "GRU", "RNN")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# T, B, I, H, P: one and two steps (weights read in place), whole and broken blocks of units, passes over a panel, both
# sides of the widths that other sizes take another way at; then as many by chance as the command line says.
SHAPES = (
    (1, 1, 64, 64, 0),
    (1, 8, 12, 20, 0),
    (1, 11, 64, 48, 0),
    (1, 14, 36, 32, 0),
    (2, 3, 33, 47, 0),
    (2, 2, 300, 272, 0),
    (3, 1, 1, 1, 0),
    (3, 17, 7, 130, 0),
    (2, 70, 20, 530, 0),
    (4, 9, 24, 48, 16),
    (1, 2, 20, 36, 5),
    (2, 33, 16, 31, 30),
)


class Guards:
    """Memory that ends, or begins, at a page without access."""

    def __init__(self, at_end: bool) -> None:
        self.at_end = at_end
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        self._kept: list[mmap.mmap] = []

    def copy(self, tensor: Tensor) -> Tensor:
        """A copy of the tensor there."""
        count = tensor.numel() * tensor.element_size()
        pages = -(-count // PAGE) * PAGE
        memory = mmap.mmap(-1, pages + 2 * PAGE)
        self._kept.append(memory)
        base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        for guard in (base, base + PAGE + pages):
            if self._libc.mprotect(guard, PAGE, 0) != 0:
                raise OSError(ctypes.get_errno(), "mprotect")
        start = PAGE + (pages - count if self.at_end else 0)
        copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=start).view(tensor.shape)
        return copy.copy_(tensor)


def a_layer(kind: str, sizes: tuple[int, ...], dtype: torch.dtype, guards: Guards) -> nn.Module:
    _, _, inputs, units, projected = sizes
    options = {"proj_size": projected} if projected and kind == "LSTM" else {}
    layer = getattr(fastrnn, kind)(inputs, units, bidirectional=units % 2 == 0, **options).to(dtype)
    for parameter in layer.parameters():
        parameter.data = guards.copy(parameter.data)
    return layer


def states(layer: nn.Module, B: int, guards: Guards) -> Tensor | tuple[Tensor, ...]:
    D, dtype = 1 + layer.bidirectional, layer.weight_hh_l0.dtype
    h = guards.copy(torch.randn(D, B, layer.proj_size or layer.hidden_size, dtype=dtype)).requires_grad_()
    if not isinstance(layer, nn.LSTM):
        return h
    return h, guards.copy(torch.randn(D, B, layer.hidden_size, dtype=dtype)).requires_grad_()


def run(kind: str, sizes: tuple[int, ...], dtype: torch.dtype, at_end: bool) -> int:
    """Every way to call one layer; how many calls."""
    T, B, inputs = sizes[:3]
    guards = Guards(at_end)
    layer = a_layer(kind, sizes, dtype, guards)
    x = guards.copy(torch.randn(T, B, inputs, dtype=dtype)).requires_grad_()
    hx = states(layer, B, guards)
    extras: list[dict[str, Tensor]] = [{}]
    extras += [{"lengths": guards.copy(torch.randint(0, T + 1, (B,)))}, {"reset": guards.copy(torch.rand(T, B) < 0.3)}]
    for more in extras:
        y, last = layer(x, hx, **more)
        every = [y, *(last if isinstance(last, tuple) else (last,))]
        torch.autograd.backward(every, [guards.copy(torch.randn_like(result)) for result in every])
        with torch.inference_mode():
            layer(x, hx, **more)
    with torch.inference_mode(), fastrnn.prepacked(layer):
        layer(x, hx)
    return 2 * len(extras) + 1


@contextlib.contextmanager
def sharing(threads: int, split: str) -> Iterator[None]:
    torch.set_num_threads(threads)
    extension.module.force_split(split)
    yield
    extension.module.force_split("chosen")


def main(isa: str, by_chance: int = 0) -> None:
    """Prints the number of calls."""
    extension.module.select_isa(isa)
    chance = random.Random(0)
    shapes = list(SHAPES)
    for _ in range(by_chance):
        units = chance.choice((chance.randint(2, 140), 4 * chance.randint(1, 80)))
        projected = chance.choice((0, 0, chance.randint(1, units - 1)))
        batch = chance.choice((1, 2, 3, 5, 8, 9, 17, 40))
        shapes.append((chance.randint(1, 5), batch, chance.randint(1, 90), units, projected))
    calls = 0
    ways = ((1, "chosen"), (2, "units"), (2, "rows"))
    for n, sizes in enumerate(shapes):
        for m, (kind, dtype, at_end) in enumerate(itertools.product(KINDS, DTYPES, (True, False))):
            with sharing(*ways[(n + m) % len(ways)]):
                calls += run(kind, sizes, dtype, at_end)
    print(f"{calls} calls")


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
