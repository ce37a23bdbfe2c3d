# SPDX-License-Identifier: BSD-3-Clause
"""torch.export: programs with the operators in them, for every length and batch, saved, loaded and trained."""

from __future__ import annotations

import io
from collections.abc import Sequence

import pytest
import torch
from models import Loop, Tagger
from samples import cotangents, sample
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from twins import LAYERS, STEPS, tensors_of

import fastrnn

pytestmark = [
    pytest.mark.usefixtures("compiled"),
    # of torch's own code, which scripts decompositions and copies tree specs
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning", "ignore:.*LeafSpec:FutureWarning"),
]
both_ways = pytest.mark.parametrize("strict", [True, False], ids=["strict", "nonstrict"])


def operators(program: ExportedProgram) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if "fastrnn" in str(node.target)]


def through_a_file(program: ExportedProgram) -> ExportedProgram:
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    return torch.export.load(buffer)


def step(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Outputs and gradients, in the order of the names of the parameters."""
    x = x.detach().requires_grad_()
    outputs = tensors_of(model(x))
    parameters = [parameter for _, parameter in sorted(model.named_parameters())]
    return [*outputs, *torch.autograd.grad(outputs, [x, *parameters], cotangents(outputs))]


def assert_equal(ours: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


@both_ways
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_relu"])
def test_functional_form_keeps_length_and_batch_dynamic(cell: str, strict: bool) -> None:
    layer = sample(cell, T=5, B=3, dtype=torch.float32)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.ParameterList([w for w in layer.weights[0] if w is not None])

        def forward(self, x: Tensor) -> Tensor:
            name, _, nonlinearity = cell.partition("_")
            options = {"nonlinearity": nonlinearity} if nonlinearity else {}
            return getattr(fastrnn.functional, name)(x, weights=tuple(self.weights), **options)[0].relu()

    net = Net()
    T, B = Dim("T", min=1, max=512), Dim("B", min=1, max=512)
    program = torch.export.export(net, (layer.x,), dynamic_shapes={"x": {0: T, 1: B}}, strict=strict)
    assert operators(program) == [f"fastrnn.{layer.operator}.default"]
    for shape in ((5, 3, 4), (9, 2, 4)):
        x = torch.randn(shape)
        assert torch.equal(program.module()(x), net(x))


@both_ways
@pytest.mark.parametrize("name", LAYERS)
def test_model_is_saved_loaded_and_trained_at_any_length_and_batch(name: str, strict: bool) -> None:
    model = Tagger(name)
    shapes = ({0: Dim("T", min=1, max=512), 1: Dim("B", min=1, max=512)},)
    program = torch.export.export(model, (torch.randn(5, 3, 4),), dynamic_shapes=shapes, strict=strict)
    loaded = through_a_file(program)
    assert len(operators(loaded)) == 2
    for T, B in ((5, 3), (9, 2), (1, 1)):
        x = torch.randn(T, B, 4)
        assert_equal(step(loaded.module(), x), step(model, x))


@pytest.mark.parametrize("name", LAYERS)
def test_decompositions_leave_the_operators_whole(name: str) -> None:
    model, x = Tagger(name).eval(), torch.randn(5, 3, 4)
    program = torch.export.export(model, (x,)).run_decompositions()
    assert len(operators(program)) == 2
    assert torch.equal(program.module()(x), model(x))


@both_ways
def test_dropout_between_layers_survives(strict: bool) -> None:
    """torch.nn's is lost when its program is decomposed."""
    model, x = Tagger("LSTM", dropout=0.5).train(), torch.randn(5, 3, 4)
    program = through_a_file(torch.export.export(model, (x,), strict=strict))
    for form in (program, program.run_decompositions()):
        dropping = form.module()
        torch.manual_seed(1)
        first = dropping(x)
        torch.manual_seed(2)
        assert not torch.equal(dropping(x), first)
        torch.manual_seed(1)
        assert torch.equal(model(x), first)


@both_ways
@pytest.mark.parametrize("sort", [False, True], ids=["unsorted", "sorted"])
def test_packed_sequence_is_an_input(sort: bool, strict: bool) -> None:
    """torch.nn's modules cannot be exported with one."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = fastrnn.LSTM(4, 5, num_layers=2, bidirectional=True)

        def forward(self, *packed: Tensor) -> list[Tensor]:
            return tensors_of(self.layers(PackedSequence(*packed)))

    def batch(*lengths: int) -> list[Tensor]:
        packed = pack_sequence([torch.randn(length, 4) for length in lengths], enforce_sorted=sort)
        return [tensor for tensor in packed if tensor is not None]

    net, example = Net(), batch(5, 3, 2)
    shapes = (({0: Dim("N")}, {0: Dim("T")}, *[{0: Dim("B")}] * (len(example) - 2)),)
    program = torch.export.export(net, tuple(example), dynamic_shapes=shapes, strict=strict)
    for packed in (example, batch(7, 1), batch(2, 2, 2, 2, 1)):
        assert_equal(program.module()(*packed), net(*packed))


@pytest.mark.parametrize("name", STEPS)
def test_cells_keep_the_batch_dynamic(name: str) -> None:
    cell, x = getattr(fastrnn, name)(4, 5), torch.randn(3, 4)
    program = through_a_file(torch.export.export(cell, (x,), dynamic_shapes=({0: Dim("B", min=1, max=64)},)))
    for B in (3, 1, 7):
        x = torch.randn(B, 4)
        assert_equal(step(program.module(), x), step(cell, x))


def test_cell_in_a_loop_is_one_program() -> None:
    model, x = Loop(), torch.randn(4, 3, 4)
    program = torch.export.export(model, (x,))
    assert len(operators(program)) == 4
    assert_equal(step(program.module(), x), step(model, x))


def test_wrong_shape_shows_while_exporting() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor, w_hh: Tensor) -> Tensor:
            tensors = (x, torch.zeros(1, 3, 6), torch.zeros(5, 4), w_hh)
            return torch.ops.fastrnn.rnn_layer(*tensors, *[None] * 12, False, False)[0]

    with pytest.raises(RuntimeError, match=r"fastrnn\.rnn_layer: w_ih must be \[H, I\] = \[6, 4\], got \[5, 4\]"):
        torch.export.export(Net(), (torch.randn(2, 3, 4), torch.randn(6, 6)))
