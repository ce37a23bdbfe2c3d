# SPDX-License-Identifier: BSD-3-Clause
"""reference.py against two libraries that know nothing of it, torch.nn and ONNX Runtime, and its derivatives."""

from __future__ import annotations

import pytest
import torch
from samples import CELLS, GATES, Sample, gradients, sample, stock

from fastrnn import reference

# torch's own forward-mode decompositions are scripted at their first use, and torch warns of that
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")

SHAPES = {
    "one": dict(T=1, B=1, I=1, H=1),
    "plain": dict(T=5, B=3, I=4, H=7),
    "bidirectional": dict(T=4, B=2, I=3, H=5, D=2),
    "no-bias": dict(T=3, B=2, I=3, H=5, D=2, bias=False),
    "empty-batch": dict(T=2, B=0, I=3, H=5, D=2),
    "packed": dict(lengths=(5, 3, 3, 1), I=3, H=5),
    "packed-bidirectional": dict(lengths=(5, 3, 3, 1), I=3, H=5, D=2),
    "packed-equal": dict(lengths=(2, 2), I=3, H=5, D=2),
}
CASES = [pytest.param(cell, options, id=f"{cell}-{name}") for cell in CELLS for name, options in SHAPES.items()] + [
    pytest.param("lstm", dict(T=4, B=3, I=4, H=6, P=2), id="lstm-projection"),
    pytest.param("lstm", dict(lengths=(4, 2, 1), I=4, H=6, P=2, D=2), id="lstm-projection-packed-bidirectional"),
]


def run(layer: Sample) -> tuple[torch.Tensor, ...]:
    return getattr(reference, layer.operator)(*layer.arguments())


@pytest.mark.parametrize(("cell", "options"), CASES)
def test_reference_equals_torch_nn(cell: str, options: dict) -> None:
    layer = sample(cell, **options, requires_grad=True)
    ours, theirs = run(layer), stock(layer)
    for name, a, b in zip(("y", "h_n", "c_n"), ours, theirs, strict=False):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13, msg=lambda m, name=name: f"{name}: {m}")
    expected = gradients(theirs, layer)
    for name, gradient in gradients(ours, layer).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-11, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("cell", CELLS)
def test_reference_step_equals_layer_of_one_step(cell: str) -> None:
    layer = sample(cell, T=1, D=1, P=3 if cell == "lstm" else 0)
    h, *c = (entry[0] for entry in layer.state)
    relu = [cell == "rnn_relu"] if cell.startswith("rnn") else []
    step = getattr(reference, layer.operator.replace("layer", "step"))
    after = step(layer.x[0], h, *c, *layer.weights[0], *relu)
    after = after if isinstance(after, tuple) else (after,)
    for state, final in zip(after, run(layer)[1:], strict=True):
        assert torch.equal(state, final[0])


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_reference_derivatives_of_both_modes_and_second_order(cell: str, packed: bool) -> None:
    options = dict(lengths=(3, 2, 1)) if packed else dict(T=2, B=2)
    layer = sample(cell, **options, I=2, H=3, D=2, P=2 if cell == "lstm" else 0, requires_grad=True, seed=2)
    inputs = [t for t in layer.tensors() if t is not None]

    def outputs(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given = iter(tensors)
        return run(layer.with_tensors([None if t is None else next(given) for t in layer.tensors()]))

    assert torch.autograd.gradcheck(outputs, inputs, check_forward_ad=True, check_batched_grad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(outputs, inputs, check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("cell", CELLS)
def test_reference_vmap_and_per_sample_gradients(cell: str) -> None:
    """An ensemble of weights over a batch of inputs, and a gradient per sequence."""
    layers = [sample(cell, T=3, B=2, I=3, H=4, D=2, seed=seed) for seed in range(3)]
    inputs = [[t for t in layer.tensors() if t is not None] for layer in layers]
    stacked = [torch.stack(same) for same in zip(*inputs, strict=True)]

    def outputs(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given = iter(tensors)
        return run(layers[0].with_tensors([None if t is None else next(given) for t in layers[0].tensors()]))

    def loss(*tensors: torch.Tensor) -> torch.Tensor:
        return sum(out.square().sum() for out in outputs(*tensors))

    together = torch.func.vmap(outputs)(*stacked)
    together_gradients = torch.func.vmap(torch.func.grad(loss, tuple(range(len(stacked)))))(*stacked)
    for which, tensors in enumerate(inputs):
        for a, b in zip(together, outputs(*tensors), strict=True):
            torch.testing.assert_close(a[which], b)
        leaves = [t.clone().requires_grad_() for t in tensors]
        for a, b in zip(together_gradients, torch.autograd.grad(loss(*leaves), leaves), strict=True):
            torch.testing.assert_close(a[which], b)


# ONNX orders the gates of an LSTM i o f c and of a GRU z r h; row g of this table is where torch's gate g stands there.
ONNX_ORDER = {"lstm": (0, 3, 1, 2), "gru": (1, 0, 2), "rnn_tanh": (0,), "rnn_relu": (0,)}


def onnx_runtime(layer: Sample) -> tuple[torch.Tensor, ...]:
    """ONNX Runtime's own operator on the same float32 tensors: (Y [T, B, D*H], Y_h, Y_c for an LSTM)."""
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    from onnx import TensorProto, helper

    gates, H, D = GATES[layer.cell], layer.state[0].shape[2], len(layer.weights)

    def reorder(weight: torch.Tensor) -> torch.Tensor:
        return torch.cat([weight.chunk(gates)[gate] for gate in ONNX_ORDER[layer.cell]])

    feeds = {
        "X": layer.x,
        "W": torch.stack([reorder(row[0]) for row in layer.weights]),
        "R": torch.stack([reorder(row[1]) for row in layer.weights]),
        "B": torch.stack([torch.cat([reorder(row[2]), reorder(row[3])]) for row in layer.weights]),
        "initial_h": layer.state[0],
    }
    sizes = layer.batch_sizes
    if sizes is not None:  # ONNX takes padded rows and the length of each
        lengths = (sizes[:, None] > torch.arange(int(sizes[0]))).sum(0)
        padded = torch.zeros(len(sizes), int(sizes[0]), layer.x.shape[1])
        for t, rows in enumerate(layer.x.split(sizes.tolist())):
            padded[t, : len(rows)] = rows
        feeds |= {"X": padded, "sequence_lens": lengths.int()}
    if layer.cell == "lstm":
        feeds["initial_c"] = layer.state[1]
    activation = ["Relu" if layer.cell == "rnn_relu" else "Tanh"] * D if layer.cell.startswith("rnn") else None
    order = ["X", "W", "R", "B", "sequence_lens", "initial_h", "initial_c"]
    names = [name if name in feeds else "" for name in order]
    outputs = ["Y", "Y_h", "Y_c"] if layer.cell == "lstm" else ["Y", "Y_h"]
    node = helper.make_node(
        layer.cell.split("_")[0].upper(),
        names[: 7 if layer.cell == "lstm" else 6],
        outputs,
        hidden_size=H,
        direction="bidirectional" if D == 2 else "forward",
        **({"linear_before_reset": 1} if layer.cell == "gru" else {}),
        **({"activations": activation} if activation else {}),
    )
    kinds = {name: TensorProto.INT32 if name == "sequence_lens" else TensorProto.FLOAT for name in feeds}
    graph = helper.make_graph(
        [node],
        layer.cell,
        [helper.make_tensor_value_info(name, kinds[name], list(feeds[name].shape)) for name in feeds],
        [helper.make_tensor_value_info(out, TensorProto.FLOAT, [None] * (4 if out == "Y" else 3)) for out in outputs],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    y, *states = (torch.from_numpy(out) for out in session.run(None, {k: v.numpy() for k, v in feeds.items()}))
    y = y.transpose(1, 2).flatten(2)  # [T, D, B, H] -> [T, B, D*H]
    if sizes is not None:
        y = torch.cat([rows[:size] for rows, size in zip(y, sizes.tolist(), strict=True)])
    return y, *states


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("D", [1, 2], ids=["forward", "bidirectional"])
@pytest.mark.parametrize("lengths", [None, (6, 4, 4, 1)], ids=["padded", "packed"])
def test_reference_equals_onnx_runtime(cell: str, D: int, lengths: tuple[int, ...] | None) -> None:
    layer = sample(cell, T=6, B=4, I=3, H=5, D=D, lengths=lengths, dtype=torch.float32)
    exact = run(layer.to(torch.float64))
    for name, ours, theirs in zip(("y", "h_n", "c_n"), exact, onnx_runtime(layer), strict=False):
        torch.testing.assert_close(ours.float(), theirs, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
