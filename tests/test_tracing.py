# SPDX-License-Identifier: BSD-3-Clause
"""torch.fx.symbolic_trace: fastrnn's modules are leaves of the graph, as torch.nn's are."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from twins import LAYERS, NAMES, STEPS, an_input, tensors_of

import fastrnn


class Model(nn.Module):
    """Two calls of one module, the second from the state of the first, and a second module in a container."""

    def __init__(self, library: object, name: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.more = getattr(library, name)(3, 5), nn.Sequential(getattr(library, name)(3, 5))

    def forward(self, x: Tensor) -> list[Tensor]:
        output = self.first(x)
        state = output if isinstance(self.first, nn.RNNCellBase) else output[1]
        return [self.first(x, state), self.first(hx=state, input=x), self.more(2 * x)]


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
@pytest.mark.parametrize("name", NAMES)
def test_graph_is_that_of_torch_nn(name: str) -> None:
    ours, theirs = Model(fastrnn, name), Model(nn, name)
    traced, expected = torch.fx.symbolic_trace(ours), torch.fx.symbolic_trace(theirs)
    assert [(node.op, str(node.target)) for node in traced.graph.nodes] == [
        (node.op, str(node.target)) for node in expected.graph.nodes
    ]
    assert traced.first is ours.first
    x = an_input(name)
    for module in (traced, copy.deepcopy(traced)):
        for a, b in zip(tensors_of(module(x)), tensors_of(ours(x)), strict=True):
            assert torch.equal(a, b)


def test_extras_stand_in_the_graph() -> None:
    class Ragged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = fastrnn.LSTM(3, 5, zoneout=(0.1, 0.1)).eval()

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            return self.layer(x, lengths=lengths)[0]

    model, x, lengths = Ragged(), torch.randn(4, 2, 3), torch.tensor([4, 1])
    traced = torch.fx.symbolic_trace(model)
    assert torch.equal(traced(x, lengths), model(x, lengths))
    assert not torch.equal(traced(x, torch.tensor([4, 2])), model(x, lengths))


@pytest.mark.parametrize("name", LAYERS + STEPS)
def test_a_traced_model_can_be_converted(name: str) -> None:
    traced, x = torch.fx.symbolic_trace(Model(nn, name)), an_input(name)
    expected = tensors_of(traced(x))
    assert len(fastrnn.convert(traced).converted) == 2
    for a, b in zip(tensors_of(traced(x)), expected, strict=True):
        torch.testing.assert_close(a, b)
