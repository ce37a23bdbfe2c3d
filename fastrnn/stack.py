# SPDX-License-Identifier: BSD-3-Clause
"""The forward pass of a stack of layers: weights by name, layers, directions, dropout, packed sequences, states.

The base of modules.py's LSTM, GRU and RNN. It calls `fastrnn.autograd` once per layer, and torch.nn's own forward for
all that the kernels do not take, so that nothing that works with torch.nn stops working here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.utils.rnn import PackedSequence

from . import autograd, folding, sequences, tracing
from .direct_calls import DirectCalls
from .scripting import scriptable
from .stock import HasStock, NoNoise, noise_of

Weights = list[Tensor | None]
States = tuple[Tensor, ...]


# Methods that torch.nn's forward calls and fastrnn's does not.
_METHODS = (
    *("check_forward_args", "check_input", "check_hidden_size", "get_expected_hidden_size", "permute_hidden"),
    "_update_flat_weights",
)
_RECORDING = (
    "fastrnn.prepacked: a call inside the block needs a gradient; use torch.no_grad() or torch.inference_mode(), "
    "or train outside the block"
)


def read_weights(module: nn.Module, names: Sequence[str]) -> Weights:
    """What `getattr(module, name)` gives now for each name, without nn.Module's slow search for ordinary parameters.

    Called at every forward and never remembered: a weight may have been replaced by a parametrization (a property of
    the class), by pruning, weight norm or weight drop (a plain tensor in `__dict__`), or by functional_call (another
    entry in `_parameters`).
    """
    own = module.__dict__
    parameters = own["_parameters"]
    weights: Weights = []
    for name in names:
        if name in own:
            weights.append(own[name])
        elif name in parameters:
            weights.append(parameters[name])
        else:
            weights.append(getattr(module, name))
    return weights


def refuse_recording(module: nn.Module, tensors: Sequence[object]) -> None:
    """Raises if a call that needs a gradient is made inside `with fastrnn.prepacked(module):`."""
    if is_compiling() or module.__dict__.get("_prepacked") is None or not torch.is_grad_enabled():
        return
    if any(isinstance(tensor, Tensor) and tensor.requires_grad for tensor in tensors):
        raise RuntimeError(_RECORDING)


class Stack(HasStock, DirectCalls, nn.RNNBase):
    """The forward pass of a stack of layers. LSTM, GRU and RNN add their operator and the form of their states.

    Inside, states are always a tuple, (h, c) or (h,), and weights a list in the order of the operator's arguments.
    """

    _fastrnn_weights_per_direction = 4  # w_ih, w_hh, b_ih, b_hh; the LSTM also has w_hr
    _fastrnn_gates = 1
    recompute = False  # an attribute of the instance only where it was asked for: torch.nn's modules have none

    @classmethod
    def _direct_call_kind(cls) -> int:
        options = cls.recompute or cls.zoneout or cls.recurrent_dropout or cls.weight_dropout
        ordinary = cls.forward is _FORWARD and not cls._fastrnn_changes
        return cls._fastrnn_gates if ordinary and (cls._fastrnn_names_are_foreign or not options) else 0

    def _set_recompute(self, recompute: bool) -> None:
        if not isinstance(recompute, bool):
            raise TypeError(f"fastrnn.{self._get_name()}: recompute must be a bool, got {type(recompute).__name__}")
        if recompute:
            self.recompute = True

    def _refuse_recording(self, tensors: Sequence[object]) -> None:
        refuse_recording(self, tensors)

    # Options for noise, set on an instance where they are not zero: modules pickled before there were any have none.
    zoneout: Any = NoNoise()
    recurrent_dropout: Any = NoNoise()
    weight_dropout: Any = NoNoise()
    _fastrnn_names_are_foreign = False  # conversion.py sets it on classes that are made inside patch()
    _fastrnn_changes = ""  # the method of torch.nn's that a subclass replaces: then torch.nn's forward calls it

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        own = [base for base in cls.__mro__ if base.__module__.partition(".")[0] == __package__]
        written = cls.__mro__[: cls.__mro__.index(own[0])]
        changed = (name for base in written for name in _METHODS if name in vars(base))
        cls._fastrnn_changes = next(changed, "")

    def _fastrnn_layer(
        self, x: Tensor, states: States, weights: Weights, batch_sizes: Tensor | None
    ) -> tuple[Tensor, States]:
        """One layer with its directions. x is [T, B, I] or packed [N, I]; returns y and the final states."""
        raise NotImplementedError

    def _fastrnn_split_states(self, hx: Any) -> States | None:
        """hx as a tuple of states; None if it does not have the form that torch.nn asks for."""
        return (hx,)

    def _fastrnn_join_states(self, states: States) -> Tensor | States:
        """The final states in the form that torch.nn returns."""
        return states[0]

    def _fastrnn_state_shapes(self, lead: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """The shape of each state; lead is (L*D, B), or (L*D,) for an unbatched input."""
        return ((*lead, self.hidden_size),)

    def _fastrnn_zero_states(self, x: Tensor, lead: tuple[int, ...]) -> States:
        """Initial states of one layer; lead is (D, B)."""
        return (x.new_zeros((*lead, self.hidden_size)),)

    def _fastrnn_layer_weights(self) -> list[Weights] | None:
        """For each layer the weights of its directions, in the order of the operator's arguments.

        None if there are not as many as the attributes say, which a program may have changed since.
        """
        slots = self._fastrnn_weights_per_direction
        rows = self._all_weights  # torch.nn's list of names: an entry for each layer and direction
        expected = (4 if self.bias else 2) + (self.proj_size > 0)
        if len(rows) != self.num_layers * (2 if self.bidirectional else 1):
            return None
        layers: list[Weights] = []
        position, flat = 0, self._flat_weights
        for names in rows:
            if len(names) != expected:
                return None
            weights = read_weights(self, names)
            for weight in weights:
                if weight is None:
                    name = names[[given is None for given in weights].index(True)]
                    raise TypeError(f"fastrnn.{type(self).__name__}: {name} must be a Tensor, got None")
                if weight is not flat[position] and self._flat_weights_count(position, weight):
                    return None
                position += 1
            if not self.bias:
                weights[2:2] = (None, None)
            if len(weights) < slots:
                weights.append(None)  # no projection
            if self.bidirectional and layers and len(layers[-1]) == slots:
                layers[-1] += weights
            else:
                layers.append(weights)
        return layers

    def extra_repr(self) -> str:
        return super().extra_repr() + sequences.noise_repr(self) + (", recompute=True" if self.recompute else "")

    def _flat_weights_count(self, position: int, weight: Tensor) -> bool:
        """Whether torch.nn would take its list `_flat_weights` and not the weight of this name: the weight is the one
        that the list was made from, so that it is the list that a program has changed."""
        refs: list[Any] = self._flat_weight_refs
        return position < len(refs) and refs[position] is not None and refs[position]() is weight

    def _load_from_state_dict(self, *arguments: Any) -> None:
        """torch.nn keeps weak references to its weights, which may not be there when load_state_dict swaps them."""
        if torch.__future__.get_swap_module_params_on_conversion():
            self._flat_weight_refs = []
            super()._load_from_state_dict(*arguments)
            self._init_flat_weights()
        else:
            super()._load_from_state_dict(*arguments)

    def __prepare_scriptable__(self) -> nn.Module:
        return scriptable(self)

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | States | None = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
        reset_state: Tensor | States | None = None,
        return_all_states: bool = False,
    ) -> tuple[Any, ...]:
        """Runs the layers over a whole sequence.

        Args:
            input: [T, B, I]; [B, T, I] with batch_first; [T, I] for one sequence without a batch; or a PackedSequence.
                Its dtype is that of the weights.
            hx: the initial states, [L*D, B, R] for h and [L*D, B, H] for c (without B for an unbatched input), with
                R = proj_size if there is a projection, else H. An LSTM takes the pair (h, c). Zeros if not given.
            lengths: int64 [B], steps of each sequence, from 0 to T in any order; on the CPU or the input's device. What
                lies behind the end of a sequence is not read; y is zero there, and the final state is that at the end.
            reset: bool [T, B], [B, T] with batch_first, [T] without a batch. Where it is set, the state before step t
                is replaced, and no gradient crosses. In the reverse direction it is the state on its way from step t
                to step t-1, so that a sequence falls into the same parts for both.
            reset_state: what replaces it, in the form of hx; one row, [L*D, 1, R], stands for the whole batch. Zeros if
                not given.
            return_all_states: whether the states at every step are returned, too.

        Returns:
            (y, h_n), for an LSTM (y, (h_n, c_n)). y has the form of the input with D*R in place of I, the states have
            the form of hx. With return_all_states a third result: h at every step for each layer, a tuple of L tensors
            of the form of y; for an LSTM the pair (h, c) of such tuples. Differentiable any number of times.

        Raises:
            ValueError, RuntimeError, TypeError: an argument does not fit; the same type as torch.nn raises.
        """
        zoneout, recurrent_dropout, weight_dropout = noise_of(self)
        more = return_all_states or zoneout or recurrent_dropout or weight_dropout
        further = more or not (lengths is reset is reset_state is None)
        if self._fastrnn_changes and not further:
            return self._torch_forward(input, hx)
        if not is_compiling():
            output = None
            if not more and autograd._C is not None:  # the short way, for ordinary calls: csrc/layer_call.cpp
                output = autograd._C.layer_call(
                    self.__dict__, self._fastrnn_gates, self.recompute, input, hx, lengths, reset, reset_state
                )
            if output is None:
                output = self._whole_call(input, hx, lengths, reset, reset_state, return_all_states)
            if output is not None:
                return output
        if further:
            return sequences.forward(self, input, hx, lengths, reset, reset_state, return_all_states)
        if isinstance(input, PackedSequence):
            x, batch_sizes, sorted_indices, unsorted_indices = input
        else:
            x, batch_sizes, sorted_indices, unsorted_indices = input, None, None, None
        layers = self._fastrnn_layer_weights()
        states = () if hx is None else self._fastrnn_split_states(hx)
        if layers is None or states is None:
            return self._torch_forward(input, hx)
        tensors: Weights = [x, *states]
        for weights in layers:
            tensors += weights
        refuse_recording(self, tensors)
        if autograd.route(tensors) == "torch" and not (
            isinstance(x, Tensor) and x.is_cuda and self._cuda_route(tensors, batch_sizes)[0] == "kernel"
        ):
            return self._torch_forward(input, hx)

        # What has not the shape that it should have goes to torch.nn, which says so. The operator checks the weights.
        directions = 2 if self.bidirectional else 1
        if directions == 1:
            for weights in layers:
                weights += (None,) * self._fastrnn_weights_per_direction
        rows = directions * self.num_layers
        shape = x.shape
        lead: tuple[int, ...]
        batch: Any  # symbolic in an exported program
        if batch_sizes is not None:
            fits = len(shape) == 2
            batch = batch_sizes[0].item() if sorted_indices is None else sorted_indices.shape[0]
            lead = (rows, batch)
        elif len(shape) == 3:
            if self.batch_first:
                x = x.transpose(0, 1)
                shape = x.shape
            batch = shape[1]
            fits = shape[0] > 0
            lead = (rows, batch)
        else:
            batch = 1
            fits = len(shape) == 2 and shape[0] > 0
            lead = (rows,)
        if not fits or shape[-1] != self.input_size:
            return self._torch_forward(input, hx)
        if states:
            expected = self._fastrnn_state_shapes(lead)
            for k, state in enumerate(states):
                if state.shape != expected[k]:
                    return self._torch_forward(input, hx)
            if len(lead) == 1:
                states = tuple([state.unsqueeze(1) for state in states])
            elif sorted_indices is not None:
                states = tuple([state.index_select(1, sorted_indices) for state in states])
        if len(lead) == 1:
            x = x.unsqueeze(1)

        if len(layers) == 1:
            if not states:
                states = self._fastrnn_zero_states(x, (directions, batch))
            y, states = self._fastrnn_layer(x, states, layers[0], batch_sizes)
        else:
            y, states = self._fastrnn_stack(x, states, layers, batch_sizes, (directions, batch))
        # The derivative reads y. A program may change the output of torch.nn in place before backward, but for that of
        # oneDNN's LSTM, which torch saves too; a copy, about 1 % of a training step, keeps ours out of its reach.
        if y.requires_grad and not (
            self._fastrnn_gates == 4 and y.dtype == torch.float32 and directions == 1 and not self.proj_size
        ):
            y = y.clone()

        if batch_sizes is not None:
            if unsorted_indices is not None:
                states = tuple([state.index_select(1, unsorted_indices) for state in states])
            packed = PackedSequence(y, batch_sizes, sorted_indices, unsorted_indices)
            return packed, self._fastrnn_join_states(states)
        if len(lead) == 1:
            y = y.squeeze(1)
            states = tuple([state.squeeze(1) for state in states])
        elif self.batch_first:
            y = y.transpose(0, 1)
        return y, self._fastrnn_join_states(states)

    def _whole_call(
        self,
        input: Any,
        hx: Any,
        lengths: Tensor | None,
        reset: Tensor | None,
        reset_state: Any,
        return_all_states: bool,
    ) -> Any:
        """The call as a node of torch.fx's graph, or on the batch of all members of a vmap; None if it is neither."""
        extras: dict[str, Any] = {}
        if return_all_states or not (lengths is reset is reset_state is None):
            extras = dict(lengths=lengths, reset=reset, reset_state=reset_state, return_all_states=return_all_states)
        output = tracing.as_leaf(self, input, hx, extras)
        return folding.layers(self, Stack.forward, input, hx, extras) if output is None else output

    def _cuda_route(
        self, tensors: Sequence[Tensor | None], batch_sizes: Tensor | None, extended: bool = False
    ) -> tuple[str, str]:
        """autograd.cuda_route() of a call with these tensors, for which route() says "torch"."""
        x = tensors[0]
        assert x is not None
        if batch_sizes is not None:
            batch = int(batch_sizes[0])
        else:
            batch = 1 if x.dim() != 3 else x.shape[0 if self.batch_first else 1]
        return autograd.cuda_route(tensors, self._fastrnn_gates, self.hidden_size, batch, self.training, extended)

    def _fastrnn_stack(
        self,
        x: Tensor,
        states: States,
        layers: list[Weights],
        batch_sizes: Tensor | None,
        lead: tuple[int, int],
    ) -> tuple[Tensor, States]:
        """Several layers, each reading the output of the one below. states: [L*D, B, ...] each, () for zeros."""
        if states:
            firsts = list(zip(*[state.split(lead[0]) for state in states], strict=True))
        else:
            firsts = [self._fastrnn_zero_states(x, lead)] * len(layers)
        dropout = self.dropout if self.training else 0.0
        finals: list[States] = []
        for first, weights in zip(firsts, layers, strict=True):
            if finals and dropout != 0:
                x = torch.dropout(x, dropout, True)  # on [T, B, D*R] or packed rows: the same mask as torch.nn's
            x, final = self._fastrnn_layer(x, first, weights, batch_sizes)
            finals.append(final)
        return x, tuple([torch.cat(of_layers) for of_layers in zip(*finals, strict=True)])

    def _torch_forward(
        self, input: Tensor | PackedSequence, hx: Tensor | States | None
    ) -> tuple[Tensor | PackedSequence, Tensor | States]:
        """torch.nn's own forward, after the checks that it leaves out.

        torch.nn does not look at the shapes of weights (oneDNN then reads out of bounds) nor, with a PackedSequence,
        at those of the states (a larger batch is cut, a batch of one is broadcast).
        """
        if not torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            self._check_weights()
            if isinstance(input, PackedSequence) and hx is not None:
                self._check_packed_states(input, hx)
        return super().forward(input, hx)

    def _check_weights(self) -> None:
        """Checks the weights that torch.nn is about to read, as many as its attributes say."""
        self._update_flat_weights()
        units, width = self.hidden_size, self.proj_size or self.hidden_size
        rows, directions = self._fastrnn_gates * units, 2 if self.bidirectional else 1
        shapes: list[tuple[int, ...]] = []
        for layer in range(self.num_layers):
            features = self.input_size if layer == 0 else directions * width
            biases = [(rows,), (rows,)] if self.bias else []
            projection = [(self.proj_size, units)] if self.proj_size else []
            shapes += [(rows, features), (rows, width), *biases, *projection] * directions
        for name, weight, shape in zip(self._flat_weights_names, self._flat_weights, shapes, strict=False):
            if isinstance(weight, Tensor) and weight.shape != shape:
                got = list(weight.shape)
                raise RuntimeError(f"fastrnn.{type(self).__name__}: {name} must be {list(shape)}, got {got}")

    def _check_packed_states(self, input: PackedSequence, hx: Tensor | States) -> None:
        states = self._fastrnn_split_states(hx)
        if states is None:
            raise RuntimeError(f"fastrnn.{type(self).__name__}: hx must be a pair of tensors (h_0, c_0)")
        rows = self.num_layers * (2 if self.bidirectional else 1)
        shapes: Any = self._fastrnn_state_shapes((rows, int(input.batch_sizes[0])))
        for k, (state, expected) in enumerate(zip(states, shapes, strict=True)):
            name = "hidden" if len(states) == 1 else f"hidden[{k}]"
            self.check_hidden_size(state, expected, f"Expected {name} size {{}}, got {{}}")


_FORWARD: Any = Stack.forward
