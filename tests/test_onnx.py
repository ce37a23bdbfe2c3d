# SPDX-License-Identifier: BSD-3-Clause
"""Models with fastrnn's modules as ONNX: the standard operators in the graph, and ONNX Runtime's results from it."""

from __future__ import annotations

import copy
import io
from collections import Counter
from collections.abc import Callable, Sequence

import pytest
import torch
from accuracy import assert_accurate
from torch import Tensor, nn
from torch.export import Dim
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from twins import CELLS, CLASSES, LAYERS, like, tensors_of

import fastrnn

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")  # torch's exporter is written with it

pytestmark = [
    pytest.mark.usefixtures("compiled"),
    # of torch's own code, which copies tree specs, gives two inputs' equal dimensions one name, and marks the older
    # exporter and its own use of it
    pytest.mark.filterwarnings(
        "ignore:.*LeafSpec:FutureWarning",
        "ignore:.*axis name:UserWarning",
        "ignore:.*legacy TorchScript-based:DeprecationWarning",
        "ignore:The feature will be removed:DeprecationWarning",
    ),
]


class Every(nn.Module):
    """A model that holds one module of each cell, all called with the same input."""

    def __init__(self, kind: str = "", library: object = fastrnn, **options: object) -> None:
        super().__init__()
        self.cells = nn.ModuleDict()
        for cell in CELLS:
            torch.manual_seed(0)
            extra = {"nonlinearity": cell[4:]} if cell.startswith("rnn") else {}
            self.cells[cell] = getattr(library, CLASSES[cell] + kind)(4, 5, **options, **extra)

    def forward(self, x: Tensor, h: Tensor | None = None, c: Tensor | None = None) -> list[Tensor]:
        outputs = []
        for cell, module in self.cells.items():
            outputs += tensors_of(module(x) if h is None else module(x, (h, c) if cell == "lstm" else h))
        return outputs


def exported(model: nn.Module, arguments: tuple, shapes: tuple | None = None, **options: object) -> onnx.ModelProto:
    program = torch.onnx.export(model, arguments, dynamo=True, dynamic_shapes=shapes, verbose=False, **options)
    onnx.checker.check_model(program.model_proto, full_check=True)
    return program.model_proto


def session(proto: onnx.ModelProto) -> Callable[..., list[Tensor]]:
    """The model in ONNX Runtime, as a function of tensors."""
    runtime = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [entry.name for entry in runtime.get_inputs()]

    def run(*inputs: Tensor) -> list[Tensor]:
        given = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
        return [torch.from_numpy(output) for output in runtime.run(None, given)]

    return run


def operators(proto: onnx.ModelProto) -> Counter:
    """How often each operator stands in the graph, those of a loop's body included; a loop is not what we want."""
    count = Counter(node.op_type for node in proto.graph.node)
    assert not count.keys() & {"Loop", "Scan", "If"}
    return count


def assert_like_torch(found: Sequence[Tensor], model: nn.Module, *arguments: object) -> None:
    """ONNX Runtime's results have the accuracy that is asked of ours; truth is torch.nn in float64."""
    with torch.no_grad():
        peer = tensors_of(model(*arguments))
        exact = tensors_of(copy.deepcopy(model).double()(*(like(argument, Tensor.double) for argument in arguments)))
    assert len(found) == len(peer)
    for k, (ours, theirs, truth) in enumerate(zip(found, peer, exact, strict=True)):
        assert_accurate(ours, theirs, truth, f"output {k}")


@pytest.mark.parametrize(
    ("options", "layers"),
    [
        pytest.param(dict(bias=False), 1, id="no-bias"),
        pytest.param(dict(num_layers=2, bidirectional=True, batch_first=True, dropout=0.5), 2, id="stacked"),
    ],
)
def test_layers_are_standard_operators_of_any_length_and_batch(options: dict, layers: int) -> None:
    ours, theirs = Every(**options).eval(), Every(library=nn, **options).eval()
    batch = 0 if options.get("batch_first") else 1
    shapes = ({batch: Dim("B"), 1 - batch: Dim("T")},)
    proto = exported(ours, (torch.randn(6, 3, 4),), shapes)
    count = operators(proto)
    assert {name: count[name] for name in LAYERS} == {"LSTM": layers, "GRU": layers, "RNN": 2 * layers}
    run = session(proto)
    for sizes in ((6, 3), (1, 1), (9, 2), (2, 8)):
        x = torch.randn(*sizes, 4)
        assert_like_torch(run(x), theirs, x)


def test_initial_states_are_inputs() -> None:
    ours, theirs = Every(num_layers=2).eval(), Every(num_layers=2, library=nn).eval()
    inputs = lambda T, B: (torch.randn(T, B, 4), torch.randn(2, B, 5), torch.randn(2, B, 5))  # noqa: E731
    T, B = Dim("T"), Dim("B")
    run = session(exported(ours, inputs(6, 3), ({0: T, 1: B}, {1: B}, {1: B})))
    for sizes in ((6, 3), (4, 7)):
        tensors = inputs(*sizes)
        assert_like_torch(run(*tensors), theirs, *tensors)


def test_unbatched_sequence_of_any_length() -> None:
    run = session(exported(Every().eval(), (torch.randn(6, 4),), ({0: Dim("T")},)))
    for T in (6, 1, 8):
        x = torch.randn(T, 4)
        assert_like_torch(run(x), Every(library=nn).eval(), x)


class Loop(nn.Module):
    """Cells called step by step, as a decoder does."""

    def __init__(self, library: object) -> None:
        super().__init__()
        self.step = Every("Cell", library)

    def forward(self, x: Tensor) -> list[Tensor]:
        h = c = None
        for t in range(3):
            outputs = self.step(x[t], h, c)
            h, c = outputs[:2]
        return outputs


def test_cells_in_a_loop() -> None:
    run = session(exported(Loop(fastrnn).eval(), (torch.randn(3, 2, 4),), ({1: Dim("B")},)))
    for B in (2, 5):
        x = torch.randn(3, B, 4)
        assert_like_torch(run(x), Loop(nn).eval(), x)


class Packed(nn.Module):
    """A PackedSequence enters and leaves as its four tensors."""

    def __init__(self, library: object) -> None:
        super().__init__()
        self.layers = Every(library=library, bidirectional=True)

    def forward(self, *packed: Tensor) -> list[Tensor]:
        return self.layers(PackedSequence(*packed))


def test_packed_batch_becomes_sequence_lens() -> None:
    def batch(*lengths: int) -> PackedSequence:
        return pack_sequence([torch.randn(length, 4) for length in lengths], enforce_sorted=False)

    rows, steps, members = Dim("N"), Dim("T"), Dim("B")
    shapes = (({0: rows}, {0: steps}, {0: members}, {0: members}),)
    proto = exported(Packed(fastrnn).eval(), tuple(batch(3, 5, 1, 3)), shapes)
    assert all(node.input[4] for node in proto.graph.node if node.op_type in LAYERS)
    run = session(proto)
    for lengths in ((3, 5, 1, 3), (1,), (2, 2), (1, 7, 4, 4, 6, 2)):
        packed = batch(*lengths)
        assert_like_torch(run(*packed), Every(library=nn, bidirectional=True).eval(), packed)


@pytest.mark.filterwarnings("ignore")  # of torch's own
def test_torch_nn_is_exported_for_the_length_of_the_example() -> None:
    """When this fails, docs/compatibility.md is out of date."""
    model, shapes = nn.GRU(4, 5).eval(), ({0: Dim("T"), 1: Dim("B")},)
    run = session(exported(model, (torch.randn(6, 3, 4),), shapes))
    x = torch.randn(6, 3, 4)
    torch.testing.assert_close(run(x)[0], model(x)[0])
    x = torch.randn(9, 3, 4)
    try:
        found = run(x)[0]
    except Exception:  # what ONNX Runtime raises has no class of its own
        return
    assert found.shape != (9, 3, 5) or not torch.allclose(found, model(x)[0])


class OneBias(nn.Module):
    """The functional form takes one bias without the other, torch.nn takes both or none."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.GRU(4, 5, bidirectional=True)
        with torch.no_grad():
            self.layer.bias_ih_l0.zero_()
            self.layer.bias_hh_l0_reverse.zero_()

    def forward(self, x: Tensor) -> list[Tensor]:
        w_ih, w_hh, _, b_hh, w_ih_reverse, w_hh_reverse, b_ih_reverse, _ = self.layer._flat_weights
        weights = {"weights": (w_ih, w_hh, None, b_hh), "reverse_weights": (w_ih_reverse, w_hh_reverse, b_ih_reverse)}
        return list(fastrnn.functional.gru(x, **weights))


def test_functional_form_with_one_bias() -> None:
    model, x = OneBias().eval(), torch.randn(6, 3, 4)
    assert_like_torch(session(exported(model, (x,)))(x), model.layer, x)


def test_float64_stays_and_float16_is_computed_in_float32() -> None:
    """ONNX Runtime has neither type in these operators; ONNX's own evaluator knows float64."""
    model, x = fastrnn.LSTM(4, 5).eval(), torch.randn(6, 3, 4)
    proto = exported(model.double(), (x.double(),))
    found = onnx.reference.ReferenceEvaluator(proto).run(None, {proto.graph.input[0].name: x.double().numpy()})
    for ours, theirs in zip(found, tensors_of(model(x.double())), strict=True):
        torch.testing.assert_close(torch.from_numpy(ours), theirs, rtol=1e-12, atol=1e-13)
    model, x = model.half(), x.half()
    for ours, theirs in zip(session(exported(model, (x,)))(x), tensors_of(model(x)), strict=True):
        assert ours.dtype == torch.float16
        torch.testing.assert_close(ours, theirs, rtol=2 * torch.finfo(torch.float16).eps, atol=1e-6)


def test_projection_is_refused_by_name() -> None:
    with pytest.raises(torch.onnx.errors.OnnxExporterError) as caught:
        exported(fastrnn.LSTM(4, 5, proj_size=3).eval(), (torch.randn(6, 3, 4),))
    assert isinstance(caught.value.__cause__, NotImplementedError)
    assert "fastrnn.lstm_layer: ONNX's LSTM has no projection" in str(caught.value.__cause__)


class Ragged(nn.Module):
    """Padded sequences with their lengths; torch.nn's modules pack them."""

    def __init__(self, library: object, batch_first: bool) -> None:
        super().__init__()
        options = {"num_layers": 2, "bidirectional": True, "batch_first": batch_first}
        self.cells = Every(library=library, **options).cells

    def forward(self, x: Tensor, lengths: Tensor) -> list[Tensor]:
        outputs = []
        for module in self.cells.values():
            if isinstance(module, (fastrnn.LSTM, fastrnn.GRU, fastrnn.RNN)):
                outputs += tensors_of(module(x, lengths=lengths))
                continue
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths.long(), module.batch_first, enforce_sorted=False)
            y, state = module(packed)
            y, _ = nn.utils.rnn.pad_packed_sequence(y, module.batch_first, total_length=x.shape[module.batch_first])
            outputs += [y, *tensors_of(state)]
        return outputs


@pytest.mark.parametrize("batch_first", [False, True])
def test_lengths_become_sequence_lens(batch_first: bool) -> None:
    ours, theirs = Ragged(fastrnn, batch_first).eval(), Ragged(nn, batch_first).eval()
    batch = 0 if batch_first else 1
    shapes = ({batch: Dim("B"), 1 - batch: Dim("T")}, {0: Dim("B")})

    def inputs(steps: int, *lengths: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(steps, len(lengths), 4)
        return (x.transpose(0, 1).contiguous() if batch_first else x), torch.tensor(lengths)

    proto = exported(ours, inputs(6, 3, 6, 2), shapes)
    assert all(node.input[4] for node in proto.graph.node if node.op_type in LAYERS)
    run = session(proto)
    for given in (inputs(6, 3, 6, 2), inputs(7, 1, 5, 2, 5, 4), inputs(3, 2)):
        assert_like_torch(run(*given), theirs, *given)
    empty = inputs(5, 0, 4, 0)
    for a, b in zip(run(*empty), ours(*empty), strict=True):  # torch.nn packs no empty sequence
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", ["GRU", "RNN"])
def test_every_state_of_a_layer_of_one_state_is_its_output(kind: str) -> None:
    module, x = getattr(fastrnn, kind)(4, 5, 2).eval(), torch.randn(6, 3, 4)

    class All(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = module

        def forward(self, x: Tensor) -> list[Tensor]:
            return tensors_of(self.layers(x, return_all_states=True))

    for a, b in zip(session(exported(All().eval(), (x,)))(x), All()(x), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("options", [{"recurrent_dropout": 0.5}, {"weight_dropout": 0.5}], ids=str)
def test_noise_that_is_off_in_evaluation_is_no_hindrance(options: dict) -> None:
    ours, x = Every(**options).eval(), torch.randn(6, 3, 4)
    count = operators(exported(ours, (x,)))
    assert {name: count[name] for name in LAYERS} == {"LSTM": 1, "GRU": 1, "RNN": 2}
    assert_like_torch(session(exported(ours, (x,)))(x), Every(library=nn).eval(), x)


class Reset(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = fastrnn.GRU(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, reset=x[..., 0] > 0)[0]


class EveryState(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = fastrnn.LSTM(4, 5)

    def forward(self, x: Tensor) -> list[Tensor]:
        return tensors_of(self.layer(x, return_all_states=True))


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(lambda: fastrnn.LSTM(4, 5, zoneout=(0.5, 0.0)).eval(), id="zoneout"),
        pytest.param(lambda: fastrnn.LSTM(4, 5, recurrent_dropout=0.5).train(), id="recurrent dropout in training"),
        pytest.param(lambda: Reset().eval(), id="reset"),
        pytest.param(lambda: EveryState().eval(), id="every state"),
    ],
)
@pytest.mark.filterwarnings("ignore:Exporting a model while it is in training mode:UserWarning")
def test_what_onnx_lacks_is_refused_by_name(model: Callable[[], nn.Module]) -> None:
    with pytest.raises(torch.onnx.errors.OnnxExporterError) as caught:
        exported(model(), (torch.randn(6, 3, 4),))
    assert "ONNX has no such operator" in str(caught.value.__cause__)
    assert "nor can a call with reset, an LSTM's with return_all_states, a module with zoneout" in str(
        caught.value.__cause__
    )


def test_program_of_torch_export_is_refused_with_the_way_out() -> None:
    x = torch.randn(6, 3, 4)
    program = torch.export.export(fastrnn.GRU(4, 5).eval(), (x,))
    with pytest.raises(torch.onnx.errors.OnnxExporterError) as caught:
        exported(program, (x,))
    assert "give torch.onnx.export the module" in str(caught.value.__cause__)


class PackAndPad(nn.Module):
    """The form that the older exporter knows: packed before a module, padded after it."""

    def __init__(self, library: object) -> None:
        super().__init__()
        self.cells = Every(library=library, num_layers=2, bidirectional=True).cells

    def forward(self, x: Tensor, lengths: Tensor) -> list[Tensor]:
        outputs = []
        for module in self.cells.values():
            y, state = module(nn.utils.rnn.pack_padded_sequence(x, lengths))
            outputs += [nn.utils.rnn.pad_packed_sequence(y)[0], *tensors_of(state)]
        return outputs


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:Exporting a model to ONNX with a batch_size")
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_older_exporter_gives_the_same_operators(packed: bool) -> None:
    """dynamo=False traces the module, which then runs torch.nn's own code."""
    ours, theirs = (
        PackAndPad(library).eval() if packed else Every(library=library, num_layers=2, bidirectional=True).eval()
        for library in (fastrnn, nn)
    )
    names, buffer = ["x", "lengths"][: 2 if packed else 1], io.BytesIO()
    inputs = (torch.randn(6, 3, 4), torch.tensor([6, 4, 1]))[: len(names)]
    axes = {"x": {0: "T", 1: "B"}, "lengths": {0: "B"}}
    torch.onnx.export(
        ours, inputs, buffer, dynamo=False, input_names=names, dynamic_axes={name: axes[name] for name in names}
    )
    proto = onnx.load_from_string(buffer.getvalue())
    count = operators(proto)
    assert {name: count[name] for name in LAYERS} == {"LSTM": 2, "GRU": 2, "RNN": 4}
    inputs = (torch.randn(9, 2, 4), torch.tensor([9, 5]))[: len(names)]
    for a, b in zip(session(proto)(*inputs), theirs(*inputs), strict=True):
        torch.testing.assert_close(a, b)


def test_older_exporter_takes_cells() -> None:
    model, x, buffer = Every("Cell").eval(), torch.randn(2, 4), io.BytesIO()
    torch.onnx.export(model, (x,), buffer, dynamo=False)
    found = session(onnx.load_from_string(buffer.getvalue()))(x)
    assert_like_torch(found, Every("Cell", nn).eval(), x)
