# SPDX-License-Identifier: BSD-3-Clause
"""A whole module under torch.vmap: the members become rows of one batch, and the call is an ordinary one below the
transform. modules.py and cells.py ask here first; batching.py has the rules for single layers.

Under vmap every small operation of a module's forward costs some 10 us, which a short sequence does not hide: here is
one fold at the top and one unfold at the end instead. 64 members of T = 32, H = 64 on one thread cost an LSTM and a GRU
1.2 times a batch of 64, an RNN 1.4 times; 1.3 and 1.8 by the rules of batching.py. About half of what it adds is
torch.vmap's own, whatever it maps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _functorch

from .batching import fold, only_vmap_active, unfold
from .stock import noise_of

_functorch_active = torch._C._are_functorch_transforms_active


def layers(module: Any, forward: Callable[..., Any], input: Any, hx: Any, extras: dict[str, Any]) -> Any:
    """forward(module, input, hx, **extras) where vmap alone is active, on one batch of all members.

    Args:
        module: an LSTM, GRU or RNN.
        forward: of its class.
        input, hx: as it was called with.
        extras: its arguments lengths, reset, reset_state and return_all_states; empty if none is given.

    Returns:
        The results; None if this is not such a call, or one that must be refused: the layers then see to it.
    """
    if not _functorch_active() or not only_vmap_active():
        return None
    noisy = any(noise_of(module)) or module.dropout
    if not isinstance(input, Tensor) or (module.training and noisy):  # how masks are drawn is vmap's own matter
        return None
    shape = input.shape
    if len(shape) not in (2, 3) or shape[-1] != module.input_size or not _weights_are_shared(module):
        return None
    single = len(shape) == 2
    rows = 0 if module.batch_first else 1
    tensors, places = [input], [rows]
    counts = []
    for given in (hx, extras.get("reset_state")) if extras else (hx,):
        states = () if given is None else module._fastrnn_split_states(given)
        if states is None or not all(isinstance(state, Tensor) for state in states):
            return None
        if states:
            layers = module.num_layers * (2 if module.bidirectional else 1)
            expected = module._fastrnn_state_shapes((layers,) if single else (layers, shape[rows]))
            if any(state.shape != wanted for state, wanted in zip(states, expected, strict=True)):
                return None
            tensors += states
            places += [1] * len(states)
        counts.append(len(states))
    if extras:
        for name, size, place in (("lengths", shape[rows : rows + 1], 0), ("reset", shape[:-1], rows)):
            given = extras[name]
            if given is not None:
                if not isinstance(given, Tensor) or given.shape != size or (single and name == "lengths"):
                    return None
                tensors.append(given)
                places.append(place)

    def run(folded: Sequence[Tensor]) -> Any:
        x, *rest = folded
        given = []
        for count in counts:
            given.append(module._fastrnn_join_states(tuple(rest[:count])) if count else None)
            rest = rest[count:]
        if not extras:
            return forward(module, x, given[0])
        changed = {name: rest.pop(0) for name in ("lengths", "reset") if extras[name] is not None}
        return forward(module, x, given[0], **(extras | changed | {"reset_state": given[1]}))

    return _below_vmap(run, tensors, places, single, (rows, 1, rows))


def cell(module: nn.RNNCellBase, forward: Callable[..., Any], input: Any, hx: Any) -> Any:
    """The same for a cell: its results, or None."""
    if not _functorch_active() or not only_vmap_active() or not isinstance(input, Tensor):
        return None
    shape = input.shape
    if len(shape) not in (1, 2) or shape[-1] != module.input_size or not _weights_are_shared(module):
        return None
    states = () if hx is None else tuple(hx) if isinstance(hx, (tuple, list)) else (hx,)
    expected = (*shape[:-1], module.hidden_size)
    if any(not isinstance(state, Tensor) or state.shape != expected for state in states):
        return None
    if states and (len(states) == 2) != isinstance(module, nn.LSTMCell):
        return None

    def run(folded: Sequence[Tensor]) -> Any:
        x, *rest = folded
        return forward(module, x, None if not rest else tuple(rest) if len(rest) == 2 else rest[0])

    return _below_vmap(run, [input, *states], [0] * (1 + len(states)), len(shape) == 1, (0, 0, 0))


def _weights_are_shared(module: nn.Module) -> bool:
    """Whether every weight is a plain one (a parametrization would be computed twice) of no member alone."""
    own: Any = module.__dict__
    parameters, level, level_of = own["_parameters"], _innermost_level(), _functorch.maybe_get_level
    for name in own.get("_flat_weights_names", ("weight_ih", "weight_hh", "bias_ih", "bias_hh")):
        if name in own:
            weight = own[name]
        elif name in parameters:
            weight = parameters[name]
        else:
            return False
        if isinstance(weight, Tensor) and level_of(weight) == level:
            return False
    flat = own.get("_flat_weights", ())  # what a program may have written there by hand counts too
    return all(not isinstance(weight, Tensor) or level_of(weight) != level for weight in flat)


def _innermost_level() -> int:
    return _functorch.peek_interpreter_stack().level()


def _below_vmap(
    run: Callable[[Sequence[Tensor]], Any],
    tensors: Sequence[Tensor],
    places: Sequence[int],
    single: bool,
    results: tuple[int, int, int],
) -> Any:
    """run(folded tensors) below the innermost vmap, with the dimension of members put back into what it returns.

    Args:
        run: gives a nested tuple of tensors.
        tensors: as vmap shows them.
        places: which dimension of each has the rows; with `single` the one that the members are to become.
        results: the same for the first, the second and the third of the results.
    """
    level = _innermost_level()
    unwrapped: list[Any] = [_functorch._unwrap_batched(tensor, level) for tensor in tensors]
    this_level = _functorch.pop_dynamic_layer_stack()
    try:
        members = next((value.shape[dim] for value, dim in unwrapped if dim is not None), None)
        if members is None:
            return run([value for value, _ in unwrapped])
        folded = [
            _fold(value, dim, members, place, single) for (value, dim), place in zip(unwrapped, places, strict=True)
        ]
        outputs = run(folded)
    finally:
        _functorch.push_dynamic_layer_stack(this_level)

    def wrapped(output: Any, place: int) -> Any:
        if not isinstance(output, Tensor):
            return tuple([wrapped(entry, place) for entry in output])
        if single:
            return _functorch._add_batch_dim(output, place, level)
        return _functorch._add_batch_dim(unfold(output, members, place), place + 1, level)

    if isinstance(outputs, Tensor):
        return wrapped(outputs, results[0])
    return tuple([wrapped(output, place) for output, place in zip(outputs, results, strict=False)])


def _fold(tensor: Tensor, dim: int | None, members: int, place: int, single: bool) -> Tensor:
    if not single:
        return fold(tensor, dim, members, place)
    if dim is None:
        return tensor.unsqueeze(place).expand(*tensor.shape[:place], members, *tensor.shape[place:])
    return tensor if dim == place else tensor.movedim(dim, place)
