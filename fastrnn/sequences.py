# SPDX-License-Identifier: BSD-3-Clause
"""A stack of layers with lengths, resets, every state as a result, or noise in the recurrence.

stack.py calls it for the calls that have any of these; what a module calls without them never comes here. Here are
also the constructor's options for noise: what they may be, and the masks that they become.
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from . import extended
from .extras import Extras
from .operators import GRU, LSTM, RNN
from .stock import noise_of, noise_options

OPERATORS = {4: LSTM, 3: GRU, 1: RNN}


def probability(module: str, name: str, value: Any) -> float:
    """The value as a float; TypeError if it is not a number, ValueError if it is outside [0, 1]."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"fastrnn.{module}: {name} must be a number, got {type(value).__name__}")
    if not 0 <= float(value) <= 1:
        raise ValueError(f"fastrnn.{module}: {name} must be a probability, in [0, 1], got {value}")
    return float(value)


def set_noise(module: Any, zoneout: Any, recurrent_dropout: Any, weight_dropout: Any) -> None:
    """Checks a constructor's options and keeps those that are set; the class has the others, which are zero."""
    name = module._get_name()
    zoneout = _checked_zoneout(module, zoneout)
    if zoneout and zoneout != (0, 0):
        module.zoneout = zoneout
    for option, value in (("recurrent_dropout", recurrent_dropout), ("weight_dropout", weight_dropout)):
        value = probability(name, option, value)
        if value:
            setattr(module, option, value)


def _checked_zoneout(module: Any, zoneout: Any) -> float | tuple[float, ...]:
    name = module._get_name()
    if module._fastrnn_gates != 4:
        return probability(name, "zoneout", zoneout)
    if not isinstance(zoneout, (tuple, list)) or len(zoneout) != 2:
        raise TypeError(f"fastrnn.{name}: zoneout must be a pair (p_h, p_c), got {zoneout!r}")
    return tuple(probability(name, f"zoneout[{k}]", p) for k, p in enumerate(zoneout))


def _check_noise(module: Any) -> None:
    """The same for options that were changed after the construction, at a call that has any of them."""
    name = module._get_name()
    zoneout, recurrent_dropout, weight_dropout = noise_of(module)
    if zoneout:
        _checked_zoneout(module, zoneout)
    probability(name, "recurrent_dropout", recurrent_dropout)
    probability(name, "weight_dropout", weight_dropout)


def noise_repr(module: Any) -> str:
    """What repr() shows of the options for noise, those that are set."""
    return "".join(f", {name}={value}" for name, value in noise_options(module).items())


def _zoneouts(module: Any) -> tuple[float, float]:
    zoneout = noise_of(module)[0]
    return tuple(zoneout) if isinstance(zoneout, (tuple, list)) else (zoneout, 0.0)


class Checked(NamedTuple):
    """What a call means, found right by check()."""

    x: Tensor  # [T, B, I] or packed [N, I]
    states: tuple[Tensor, ...]  # [L*D, B, ...]
    batch_sizes: Tensor | None
    sorted_indices: Tensor | None
    unsorted_indices: Tensor | None
    single: bool  # one sequence without a batch
    reset: Tensor | None  # [T, B]
    resets: tuple[Tensor, ...] | None  # what replaces the states there, as they are


def check(
    module: Any, input: Tensor | PackedSequence, hx: Any, lengths: Tensor | None, reset: Tensor | None, reset_state: Any
) -> Checked:
    """The arguments of modules.py's forward, in one form; TypeError, ValueError or RuntimeError where one does not fit.

    Everything is checked here, since torch.nn would not know what to say; but for what lengths hold, which the kernel
    looks at.
    """
    name, directions = module._get_name(), 2 if module.bidirectional else 1
    batch_sizes = sorted_indices = unsorted_indices = None
    x = input
    if isinstance(input, PackedSequence):
        x, batch_sizes, sorted_indices, unsorted_indices = input
    if not isinstance(x, Tensor):
        raise TypeError(f"fastrnn.{name}: input must be a Tensor or a PackedSequence, got {type(x).__name__}")
    if any(noise_of(module)):
        _check_noise(module)
    packed, single = batch_sizes is not None, batch_sizes is None and x.dim() == 2
    if x.dim() not in ((2,) if packed else (2, 3)):
        raise ValueError(f"fastrnn.{name}: input must have 2 or 3 dimensions, got {list(x.shape)}")
    weight = module._parameters.get("weight_ih_l0")
    if weight is not None and x.dtype is not weight.dtype and not extended.autocast_on(x.device):
        raise ValueError(f"fastrnn.{name}: input must be {weight.dtype} like the weights, got {x.dtype}")
    if x.shape[-1] != module.input_size:
        raise RuntimeError(f"fastrnn.{name}: input must have {module.input_size} features, got {list(x.shape)}")
    if single:
        if lengths is not None:
            raise ValueError(f"fastrnn.{name}: lengths go with a batch, got input {list(x.shape)}")
        x = x.unsqueeze(1)
    elif not packed and module.batch_first:
        x = x.transpose(0, 1)
    batch = int(batch_sizes[0]) if batch_sizes is not None else x.shape[1]
    if not packed and x.shape[0] == 0:
        raise RuntimeError(f"fastrnn.{name}: input must have at least one time step, got {list(x.shape)}")

    rows = directions * module.num_layers
    lead = (rows,) if single else (rows, batch)
    widths = tuple([shape[-1] for shape in module._fastrnn_state_shapes(lead)])
    states = _states(module, "hx", hx, lead, widths, x, expand=False)
    if states is None:
        states = module._fastrnn_zero_states(x, (rows, batch))
    elif sorted_indices is not None:
        states = tuple(state.index_select(1, sorted_indices) for state in states)
    if lengths is not None:
        extended.check_lengths(name, lengths, batch, x.device, packed)
    resets: tuple[Tensor, ...] | None = None
    if reset is not None:
        letters, shape = "[T, B]", tuple(x.shape[:2])
        if single:
            letters, shape = "[T]", (x.shape[0],)
        elif module.batch_first and not packed:
            letters, shape = "[B, T]", shape[::-1]
        extended.check_reset(name, reset, letters, shape, x.device, packed)
        reset = reset.unsqueeze(1) if single else reset.transpose(0, 1) if module.batch_first else reset
        resets = _states(module, "reset_state", reset_state, lead, widths, x, expand=True)
    elif reset_state is not None:
        raise ValueError(f"fastrnn.{name}: reset_state is given without reset")
    return Checked(x, states, batch_sizes, sorted_indices, unsorted_indices, single, reset, resets)


def forward(
    module: Any,
    input: Tensor | PackedSequence,
    hx: Any,
    lengths: Tensor | None,
    reset: Tensor | None,
    reset_state: Any,
    return_all_states: bool,
) -> tuple[Any, ...]:
    """stack.Stack.forward with what it passes on; see there."""
    checked = check(module, input, hx, lengths, reset, reset_state)
    x, states, batch_sizes, sorted_indices, unsorted_indices, single, reset, resets = checked
    packed = batch_sizes is not None
    module._refuse_recording((x, *states, *(resets or ()), *module.parameters()))
    y, finals, every_h, every_c = _stack(module, x, states, batch_sizes, lengths, reset, resets, return_all_states)
    if unsorted_indices is not None:
        finals = [state.index_select(1, unsorted_indices) for state in finals]

    def shaped(tensor: Tensor) -> Tensor | PackedSequence:
        if packed:
            return PackedSequence(tensor, batch_sizes, sorted_indices, unsorted_indices)
        return tensor.squeeze(1) if single else tensor.transpose(0, 1) if module.batch_first else tensor

    if single:
        finals = [state.squeeze(1) for state in finals]
    last = module._fastrnn_join_states(tuple(finals))
    if not return_all_states:
        return shaped(y), last
    h = tuple(shaped(tensor) for tensor in every_h)
    if module._fastrnn_gates != 4:
        return h[-1], last, h
    return h[-1], last, (h, tuple(shaped(tensor) for tensor in every_c))


def _states(
    module: Any, name: str, given: Any, lead: tuple[int, ...], widths: tuple[int, ...], x: Tensor, expand: bool
) -> tuple[Tensor, ...] | None:
    """States as a tuple of [L*D, B, width], checked; None stays. With expand a batch of one stands for all."""
    if given is None:
        return None
    states = module._fastrnn_split_states(given)
    function = module._get_name()
    if states is None:
        raise TypeError(f"fastrnn.{function}: {name} must be a pair (h, c), got {type(given).__name__}")
    found = []
    for k, (state, width) in enumerate(zip(states, widths, strict=True)):
        each = name if len(states) == 1 else f"{name}[{k}]"
        wide = expand and isinstance(state, Tensor) and len(lead) == 2 and state.shape == (lead[0], 1, width)
        if wide:
            state = state.expand(*lead, width)
        letters = "[L*D, B, R]" if len(lead) == 2 else "[L*D, R]"
        extended.check_operand(function, each, state, letters.replace("R", "RH"[k]), (*lead, width), x, mask=False)
        found.append(state if len(lead) == 2 else state.unsqueeze(1))
    return tuple(found)


def _stack(
    module: Any,
    x: Tensor,
    states: tuple[Tensor, ...],
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    resets: tuple[Tensor, ...] | None,
    all_states: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """The layers one above the other: y, the final states over L*D, and each layer's h and c at every step."""
    directions = 2 if module.bidirectional else 1
    operator = OPERATORS[module._fastrnn_gates]
    slots = module._fastrnn_weights_per_direction
    options = (module.mode == "RNN_RELU",) if module._fastrnn_gates == 1 else ()
    dropout = module.dropout if module.training else 0.0
    keep_cells = all_states and module._fastrnn_gates == 4
    zoneout, recurrent_dropout, weight_dropout = noise_of(module)
    noisy = zoneout or recurrent_dropout
    masks: tuple[Tensor | None, ...] = (None, None, None)
    finals, every_h, every_c = [], [], []
    layers = module._fastrnn_layer_weights()
    if layers is None:
        name = type(module).__name__
        raise RuntimeError(f"fastrnn.{name}: num_layers, bias or bidirectional is not what the weights were made for")
    for index, weights in enumerate(layers):
        if index and dropout:
            x = torch.dropout(x, dropout, True)
        weights += (None,) * (2 * slots - len(weights))
        firsts, others = states, resets or ()
        if module.num_layers > 1:
            own = slice(index * directions, (index + 1) * directions)
            firsts, others = (tuple([state[own] for state in of]) for of in (states, others))
        if weight_dropout and module.training:
            for position in range(1, directions * slots, slots):
                weights[position] = torch.dropout(weights[position], weight_dropout, True)
        if noisy:
            masks = _masks(module, x, firsts)
        extras = Extras(lengths, reset, *others, *(None,) * (2 - len(others)), *masks)
        found = extended.layer(
            operator, (x, *firsts, *weights), batch_sizes, extras, options, keep_cells, module.recompute
        )
        x = found[0]
        finals.append(found[1 : 1 + len(states)])
        if all_states:
            every_h.append(x.clone() if x.requires_grad else x)
        if keep_cells:
            every_c.append(extended.side_by_side(found[-1], x))
    y = every_h[-1] if all_states else _own(module, x)
    ends = finals[0] if len(finals) == 1 else [torch.cat(of_layers) for of_layers in zip(*finals, strict=True)]
    return y, list(ends), every_h, every_c


def _own(module: Any, y: Tensor) -> Tensor:
    """A copy of y where stack.py makes one: the derivative reads y, which a program may change in place."""
    onednn = (
        module._fastrnn_gates == 4 and y.dtype is torch.float32 and not module.bidirectional and not module.proj_size
    )
    return y.clone() if y.requires_grad and not onednn else y


def _masks(module: Any, x: Tensor, states: Sequence[Tensor]) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """h_mask, zoneout_h and zoneout_c of one layer, drawn from torch's generator in this order while training."""
    h_mask = None
    keeps: list[Tensor | None] = []
    p = noise_of(module)[1] if module.training else 0.0
    if p:
        h_mask = states[0].new_empty(states[0].shape).bernoulli_(1 - p)
        if p < 1:
            h_mask = h_mask / (1 - p)
    for p, state in zip(_zoneouts(module), (*states, None), strict=False):
        features = 0 if state is None else state.shape[0] * state.shape[2]
        if not p or not features:
            keeps.append(None)
        elif module.training:
            keeps.append(x.new_empty((*x.shape[:-1], features)).bernoulli_(p))
        else:
            keeps.append(x.new_full((features,), p).expand(*x.shape[:-1], features))
    return h_mask, keeps[0], keeps[1]
