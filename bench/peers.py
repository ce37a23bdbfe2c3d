# SPDX-License-Identifier: BSD-3-Clause
"""Who is measured: fastrnn, torch.nn and ONNX Runtime on the same weights and inputs. Used by runner.py.

Each contender gives two things: its outputs, to be compared before anything is timed, and a function of no arguments
that does the work once. Peers run in their best mode. torch.nn: inference_mode, oneDNN on. ONNX Runtime: weights as
initializers (packed when the session is made, outside the timing), all graph optimisations, inputs and outputs bound
to fixed memory, workers that spin between calls, and no transpose of its [T,D,B,H] output.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fastrnn

from .check import Outputs
from .shapes import GATES, Shape

KINDS = {"lstm": "LSTM", "gru": "GRU", "rnn": "RNN"}
TORCH = "torch.nn"
ONNX_RUNTIME = "ONNX Runtime"
State = Tensor | tuple[Tensor, Tensor] | None


@dataclass(frozen=True)
class Problem:
    """One shape with its numbers: what every contender computes."""

    cell: str
    shape: Shape
    pass_: str
    x: Tensor  # [T, B, I]
    lengths: Tensor | None  # [B], for the packed passes and those with lengths
    state: State  # for the passes of one step: h, or (h, c), each [D*L, B, R or H]
    d_y: Tensor  # cotangent of y, or of y.data where packed
    weights: dict[str, Tensor]
    reset: Tensor | None = None  # [T, B], for the passes with resets

    @property
    def packed(self) -> bool:
        return self.pass_.startswith("packed")

    @property
    def training(self) -> bool:
        return self.pass_.endswith("training")

    @property
    def tokens(self) -> int:
        return self.shape.T * self.shape.B if self.lengths is None else int(self.lengths.sum())

    def double(self) -> Problem:
        """The same numbers in float64."""
        state = tuple(s.double() for s in self.state) if isinstance(self.state, tuple) else self.state
        state = state.double() if isinstance(state, Tensor) else state
        weights = {name: weight.double() for name, weight in self.weights.items()}
        return replace(self, x=self.x.double(), state=state, d_y=self.d_y.double(), weights=weights)


def build_module(library: ModuleType, cell: str, shape: Shape, dtype: torch.dtype) -> nn.RNNBase:
    """nn.LSTM, nn.GRU or nn.RNN of a library with torch.nn's interface."""
    projection = {"proj_size": shape.P} if shape.P else {}
    layer = getattr(library, KINDS[cell])
    return layer(shape.I, shape.H, num_layers=shape.L, bidirectional=shape.D == 2, dtype=dtype, **projection)


def make_problem(cell: str, shape: Shape, pass_: str, dtype: torch.dtype) -> Problem:
    """Weights of torch.nn's own distribution, normal inputs; the same from call to call."""
    torch.manual_seed(0)
    weights = build_module(nn, cell, shape, dtype).state_dict()
    x = torch.randn(shape.T, shape.B, shape.I, dtype=dtype)
    lengths = reset = None
    if pass_.startswith("reset"):
        reset = torch.rand(shape.T, shape.B) < 0.02
    if pass_.startswith(("packed", "lengths")):
        lengths = torch.randint((shape.T + 3) // 4, shape.T + 1, (shape.B,))
        lengths[torch.randint(shape.B, ())] = shape.T
    state: State = None
    if shape.T == 1:
        h = torch.randn(shape.D * shape.L, shape.B, shape.R, dtype=dtype)
        state = (h, torch.randn(shape.D * shape.L, shape.B, shape.H, dtype=dtype)) if cell == "lstm" else h
    rows = (int(lengths.sum()),) if pass_.startswith("packed") else (shape.T, shape.B)
    d_y = torch.randn(*rows, shape.D * shape.R, dtype=dtype)
    return Problem(cell, shape, pass_, x, lengths, state, d_y, weights, reset)


def _packed(x: Tensor, lengths: Tensor) -> PackedSequence:
    return pack_padded_sequence(x, lengths, enforce_sorted=False)


def _loop(module: nn.RNNBase, x: Tensor, reset: Tensor) -> tuple[Tensor, State]:
    """What programs do with torch.nn where an episode may end: one call a step, the state zeroed in between."""
    ys, state = [], None
    for now, flags in zip(x, (~reset).to(x.dtype)[..., None], strict=True):
        if state is not None:
            state = tuple(s * flags for s in state) if isinstance(state, tuple) else state * flags
        y, state = module(now[None], state)
        ys.append(y)
    return torch.cat(ys), state


class TorchContender:
    """A library with torch.nn's interface: torch.nn itself, or fastrnn."""

    def __init__(self, name: str, library: ModuleType, problem: Problem) -> None:
        self.name = name
        self._problem = problem
        self._module = build_module(library, problem.cell, problem.shape, problem.x.dtype)
        self._module.load_state_dict(problem.weights)
        self._module.train(problem.training)  # in train mode oneDNN's LSTM keeps a workspace, also without gradient
        self._members = problem.pass_ == "vmap" and library is not nn  # torch.nn's layers refuse vmap
        if problem.pass_ == "prepacked-call" and hasattr(library, "prepacked"):
            self._block = library.prepacked(self._module)  # left when the contender is
            self._block.__enter__()
        self._cell: nn.RNNCellBase | None = None
        if problem.pass_ == "cell":
            layer = getattr(library, KINDS[problem.cell] + "Cell")
            self._cell = layer(problem.shape.I, problem.shape.H, dtype=problem.x.dtype)
            self._cell.load_state_dict({name.removesuffix("_l0"): w for name, w in problem.weights.items()})

    def function(self) -> Callable[[], object]:
        """The work, once a call. Whoever times it turns gradients off by inference_mode unless the pass trains."""
        problem, module, cell = self._problem, self._module, self._cell
        if problem.training:
            return self._training_step()
        if cell is not None:
            x = problem.x[0]
            state = tuple(s[0] for s in problem.state) if isinstance(problem.state, tuple) else problem.state[0]
            return lambda: cell(x, state)
        if problem.state is not None:
            return lambda: module(problem.x, problem.state)
        if self._members:
            mapped = torch.vmap(module, in_dims=1, out_dims=1)
            return lambda: mapped(problem.x)
        call = self._call
        x = _packed(problem.x, problem.lengths) if problem.packed else problem.x
        return lambda: call(x, None)

    def _call(self, x: Tensor | PackedSequence, state: State) -> tuple[Tensor | PackedSequence, State]:
        """The module on the problem's input; fastrnn's takes lengths and resets, around torch.nn's stands the usual."""
        problem, module = self._problem, self._module
        if problem.packed or (problem.lengths is None and problem.reset is None):
            return module(x, state)
        if isinstance(module, (fastrnn.LSTM, fastrnn.GRU, fastrnn.RNN)):
            return module(x, state, lengths=problem.lengths, reset=problem.reset)
        if problem.reset is not None:
            return _loop(module, x, problem.reset)
        y, final = module(_packed(x, problem.lengths), state)
        return pad_packed_sequence(y, total_length=problem.shape.T)[0], final

    def _training_step(self) -> Callable[[], object]:
        problem, module, call = self._problem, self._module, self._call
        x: Tensor | PackedSequence = problem.x.clone()
        if problem.packed:
            x = _packed(x, problem.lengths)
            x = PackedSequence(x.data.detach(), x.batch_sizes, x.sorted_indices, x.unsorted_indices)
        data = x.data if isinstance(x, PackedSequence) else x
        data.requires_grad_()
        leaves = [data, *module.parameters()]
        state, d_y = problem.state, problem.d_y
        self._data = data

        def step() -> tuple[object, object]:
            for leaf in leaves:
                leaf.grad = None
            y, final = call(x, state)
            torch.autograd.backward(y.data if isinstance(y, PackedSequence) else y, d_y)
            return y, final

        return step

    def outputs(self) -> Outputs:
        """The results of one call, with the gradients where the pass trains."""
        function = self.function()
        with torch.inference_mode(not self._problem.training):
            return self.named(function())

    def named(self, result: object) -> Outputs:
        """What the function of this contender returned, and the gradients that it left, by their names."""
        if self._cell is not None:
            states = result if isinstance(result, tuple) else (result,)
            found = dict(zip(("h_n", "c_n"), states, strict=False))
        else:
            y, final = result
            y = y.data if isinstance(y, PackedSequence) else y
            states = final if isinstance(final, tuple) else (final,)
            found = dict(zip(("y", "h_n", "c_n"), (y, *states), strict=False))
        if self._problem.training:
            gradients = {"d_" + name: parameter.grad for name, parameter in self._module.named_parameters()}
            found |= {"d_x": self._data.grad, **gradients}
        return {name: value.detach().clone() for name, value in found.items() if value is not None}


def onnx_runtime_missing(problem: Problem) -> str:
    """Why ONNX Runtime cannot take part, or an empty string."""
    if not all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime")):
        return "onnx or onnxruntime is not installed: pip install 'fastrnn[bench]'"
    if problem.training or problem.pass_ == "cell":
        return f"{problem.pass_}: inference of layers only"
    if problem.reset is not None:
        return "it has no resets"
    if problem.shape.P:
        return "its LSTM has no projection"
    return "" if problem.x.dtype == torch.float32 else "float32 only"


# torch's gate order -> ONNX's: LSTM i f g o -> i o f c, GRU r z n -> z r h.
_ONNX_GATES = {"lstm": (0, 3, 1, 2), "gru": (1, 0, 2), "rnn": (0,)}


def _gates_for_onnx(weight: Tensor, cell: str) -> np.ndarray:
    return np.concatenate([weight.chunk(GATES[cell])[gate].numpy() for gate in _ONNX_GATES[cell]])


def _onnx_model(problem: Problem) -> bytes:
    """The layers as one ONNX graph: x, [initial_h, initial_c], [lengths] -> y [T,D,B,H], h_n, c_n of the last layer."""
    from onnx import TensorProto, helper, numpy_helper

    shape, cell = problem.shape, problem.cell
    T, B, H, D = shape.T, shape.B, shape.H, shape.D
    real = TensorProto.FLOAT
    inputs = [helper.make_tensor_value_info("x", real, [T, B, shape.I])]
    states = ("h", "c") if cell == "lstm" else ("h",)
    if problem.state is not None:
        inputs += [helper.make_tensor_value_info(f"initial_{s}", real, [D, B, H]) for s in states]
    if problem.lengths is not None:
        inputs += [helper.make_tensor_value_info("lengths", TensorProto.INT32, [B])]
    attributes = {"hidden_size": H, "direction": "bidirectional" if D == 2 else "forward"}
    attributes |= {"linear_before_reset": 1} if cell == "gru" else {}  # torch's GRU: reset after the product
    nodes, initializers, below = [], [], "x"
    for layer in range(shape.L):
        names = [f"l{layer}" + ("_reverse" if d else "") for d in range(D)]
        stacked = {
            f"W{layer}": [_gates_for_onnx(problem.weights[f"weight_ih_{n}"], cell) for n in names],
            f"R{layer}": [_gates_for_onnx(problem.weights[f"weight_hh_{n}"], cell) for n in names],
            f"B{layer}": [
                np.concatenate([_gates_for_onnx(problem.weights[f"bias_{s}_{n}"], cell) for s in ("ih", "hh")])
                for n in names
            ],
        }
        initializers += [numpy_helper.from_array(np.stack(arrays), name) for name, arrays in stacked.items()]
        last = layer == shape.L - 1
        feeds = [below, *stacked, "lengths" if problem.lengths is not None else ""]
        feeds += [f"initial_{s}" for s in states] if problem.state is not None else []
        results = ["y", *(f"{s}_n" for s in states)] if last else [f"y{layer}"]
        nodes.append(helper.make_node(KINDS[cell], feeds, results, **attributes))
        if not last:
            # [T,D,B,H] -> [T,B,D*H], the input of the next layer
            nodes.append(helper.make_node("Transpose", [f"y{layer}"], [f"y{layer}_t"], perm=[0, 2, 1, 3]))
            nodes.append(helper.make_node("Reshape", [f"y{layer}_t", "flat"], [f"x{layer + 1}"]))
            below = f"x{layer + 1}"
    if shape.L > 1:
        initializers.append(numpy_helper.from_array(np.array([T, B, D * H], np.int64), "flat"))
    outputs = [helper.make_tensor_value_info("y", real, [T, D, B, H])]
    outputs += [helper.make_tensor_value_info(f"{s}_n", real, [D, B, H]) for s in states]
    graph = helper.make_graph(nodes, KINDS[cell], inputs, outputs, initializers)
    # An old opset and IR version, so that any ONNX Runtime of the last years takes the model.
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8).SerializeToString()


class OnnxContender:
    """ONNX Runtime's LSTM, GRU or RNN operator on the CPU."""

    name = ONNX_RUNTIME

    def __init__(self, problem: Problem, threads: int) -> None:
        import onnxruntime

        self._problem = problem
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        model = _onnx_model(problem)
        self._session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self._binding = self._session.io_binding()
        feeds = {"x": problem.x.numpy()}
        if problem.state is not None:
            states = problem.state if isinstance(problem.state, tuple) else (problem.state,)
            feeds |= {f"initial_{s}": value.numpy() for s, value in zip(("h", "c"), states, strict=False)}
        if problem.lengths is not None:
            feeds["lengths"] = problem.lengths.numpy().astype(np.int32)
        self._values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(value) for name, value in feeds.items()}
        for name, value in self._values.items():
            self._binding.bind_ortvalue_input(name, value)
        for output in self._session.get_outputs():
            empty = np.empty(output.shape, np.float32)
            self._values[output.name] = onnxruntime.OrtValue.ortvalue_from_numpy(empty)
            self._binding.bind_ortvalue_output(output.name, self._values[output.name])

    def function(self) -> Callable[[], object]:
        """The work, once a call. Bound memory saves 2 of 8 us at T=1, H=64."""
        session, binding = self._session, self._binding
        return lambda: session.run_with_iobinding(binding)

    def outputs(self) -> Outputs:
        """The results of one call in torch's layout; of the states, those of the last layer."""
        self.function()()
        found = {o.name: torch.from_numpy(self._values[o.name].numpy().copy()) for o in self._session.get_outputs()}
        y = found["y"].permute(0, 2, 1, 3).flatten(2)
        lengths = self._problem.lengths
        return {**found, "y": _packed(y, lengths).data if self._problem.packed else y}
