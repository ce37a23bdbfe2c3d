# SPDX-License-Identifier: BSD-3-Clause
"""Small models that hold fastrnn's modules, for the tests of compilers and exporters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fastrnn


class Tagger(nn.Module):
    """Two bidirectional layers between two linear ones: [T, B, 4] -> [T, B, 3]."""

    def __init__(self, name: str, **options: object) -> None:
        super().__init__()
        self.enter = nn.Linear(4, 6)
        self.layers = getattr(fastrnn, name)(6, 5, num_layers=2, bidirectional=True, **options)
        self.leave = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.layers(self.enter(x))[0])


class Loop(nn.Module):
    """A cell called step by step, as a decoder does: [T, B, 4] -> [T, B, 5], T as given at the first call."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = fastrnn.LSTMCell(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        state, outputs = None, []
        for step in x.unbind(0):
            state = self.cell(step, state)
            outputs.append(state[0])
        return torch.stack(outputs)
