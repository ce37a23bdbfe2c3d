# SPDX-License-Identifier: BSD-3-Clause
"""Everything at once: random modules with random lengths, resets, states to reset to, noise and layouts, against a loop
over layers, directions, sequences and steps typed here; outputs, every state, gradients, and gradients of gradients.

In float64. The loop knows torch's generator: it draws its masks in the order that docs/noise.md gives.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from samples import cotangents
from torch import Tensor, nn
from twins import CELLS, CLASSES, tensors_of

import fastrnn

State = list[Tensor]


@dataclass
class Call:
    """A module and what it is called with, time first; lengths, reset and states may be None."""

    cell: str
    module: nn.Module
    x: Tensor  # [T, B, I], NaN behind the ends
    hx: State | None
    lengths: Tensor | None
    reset: Tensor | None
    reset_state: State | None
    batched: bool
    every_state: bool

    @property
    def leaves(self) -> list[Tensor]:
        return [self.x, *(self.hx or ()), *(self.reset_state or ()), *self.module.parameters()]


def draw(seed: int) -> Call:
    pick = random.Random(seed)
    torch.manual_seed(seed)
    cell = CELLS[seed % len(CELLS)]
    lstm = cell == "lstm"
    T, B, I, H = (pick.choice(sizes) for sizes in ((1, 2, 5), (1, 2, 4), (1, 4), (1, 3, 17)))  # noqa: E741
    options: dict[str, Any] = {"num_layers": pick.choice((1, 2, 3)), "dtype": torch.float64}
    for name in ("bidirectional", "batch_first", "bias", "recompute"):
        options[name] = pick.random() < 0.4
    if lstm and H > 1 and pick.random() < 0.3:
        options["proj_size"] = pick.randint(1, H - 1)
    if options["num_layers"] > 1 and pick.random() < 0.3:
        options["dropout"] = 0.3
    for name, values in (("recurrent_dropout", (0.3, 1.0)), ("weight_dropout", (0.4,)), ("zoneout", (0.3, 1.0))):
        if pick.random() < 0.35:
            options[name] = pick.choice(values)
    if lstm and "zoneout" in options:
        options["zoneout"] = (options["zoneout"], pick.choice((0.0, 0.5)))
    if cell == "rnn_relu":
        options["nonlinearity"] = "relu"
    module = getattr(fastrnn, CLASSES[cell])(I, H, **options).train(pick.random() < 0.6)
    batched = pick.random() < 0.85
    B = B if batched else 1
    rows = module.num_layers * (2 if module.bidirectional else 1)
    widths = [module.proj_size or H, H] if lstm else [H]

    def states(batch: int) -> State:
        return [torch.randn(rows, batch, width, dtype=torch.float64, requires_grad=True) for width in widths]

    x = torch.randn(T, B, I, dtype=torch.float64)
    lengths = torch.tensor([pick.randint(0, T) for _ in range(B)]) if batched and pick.random() < 0.6 else None
    if lengths is not None:
        lengths[pick.randrange(B)] = T  # else there may be nothing that has a gradient
        x[torch.arange(T)[:, None] >= lengths] = torch.nan
    reset = torch.rand(T, B) < pick.choice((0.0, 0.3, 1.0)) if pick.random() < 0.7 else None
    replacement = states(pick.choice((1, B))) if reset is not None and pick.random() < 0.6 else None
    hx = states(B) if pick.random() < 0.6 else None
    return Call(cell, module, x.requires_grad_(), hx, lengths, reset, replacement, batched, pick.random() < 0.4)


def joined(states: State | None) -> Any:
    return None if states is None else tuple(states) if len(states) == 2 else states[0]


def by_module(call: Call) -> list[Tensor]:
    """y, the final states, and every state of every layer, [T, B, ...] and [L*D, B, ...]."""
    swapped = call.module.batch_first and call.batched

    def inward(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or not call.batched:
            return None if tensor is None else tensor[:, 0]
        return tensor.transpose(0, 1) if swapped else tensor

    def rows(states: State | None) -> Any:
        return joined(states if call.batched or states is None else [state[:, 0] for state in states])

    results = call.module(
        inward(call.x),
        rows(call.hx),
        lengths=call.lengths,
        reset=inward(call.reset),
        reset_state=rows(call.reset_state),
        return_all_states=call.every_state,
    )
    y, state, *every = results
    outward = [t.transpose(0, 1) if swapped else t if call.batched else t.unsqueeze(1) for t in tensors_of([y, *every])]
    finals = [t if call.batched else t.unsqueeze(1) for t in tensors_of(state)]
    return [outward[0], *finals, *outward[1:]]


def one_step(cell: str, weights: list[Tensor | None], x: Tensor, state: State, entering: Tensor) -> State:
    w_ih, w_hh, b_ih, b_hh, w_hr = weights
    a, r = w_ih @ x, w_hh @ entering
    if b_ih is not None:
        a, r = a + b_ih, r + b_hh
    if cell == "lstm":
        i, f, g, o = (a + r).chunk(4)
        c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        return [h if w_hr is None else w_hr @ h, c]
    if cell == "gru":
        (a_r, a_z, a_n), (r_r, r_z, r_n) = a.chunk(3), r.chunk(3)
        z = (a_z + r_z).sigmoid()
        return [(1 - z) * (a_n + (a_r + r_r).sigmoid() * r_n).tanh() + z * state[0]]
    return [(a + r).tanh() if cell == "rnn_tanh" else (a + r).relu()]


def noise(module: nn.Module, rows: tuple[int, int], D: int, widths: list[int]) -> tuple[Tensor | None, list]:
    """The mask on h, [D, B, R], and for each state how much of it stays, [T, B, D*width]."""
    mask, p = None, module.recurrent_dropout
    if p and module.training:
        mask = torch.empty(D, rows[1], widths[0], dtype=torch.float64).bernoulli_(1 - p)
        mask = mask / (1 - p) if p < 1 else mask
    zoneout = module.zoneout if isinstance(module.zoneout, tuple) else (module.zoneout,)
    keeps: list[Tensor | None] = [None, None]
    for k, (p, width) in enumerate(zip(zoneout, widths, strict=False)):
        keep = torch.full((*rows, D * width), p, dtype=torch.float64)
        if p:
            keeps[k] = keep.bernoulli_(p) if module.training else keep
    return mask, keeps


def by_loop(call: Call) -> list[Tensor]:
    module, x = call.module, call.x
    (T, B, _), D = x.shape, 2 if module.bidirectional else 1
    widths = [module.proj_size or module.hidden_size, module.hidden_size][: 2 if call.cell == "lstm" else 1]
    total = module.num_layers * D
    hx = call.hx or [torch.zeros(total, B, width, dtype=torch.float64) for width in widths]
    fresh = call.reset_state or [torch.zeros(total, B, width, dtype=torch.float64) for width in widths]
    fresh = [state.expand(total, B, -1) for state in fresh]
    lengths = [T] * B if call.lengths is None else call.lengths.tolist()
    finals: list[list[State]] = []
    every: list[list[Tensor]] = []
    for layer in range(module.num_layers):
        if layer and module.dropout and module.training:
            x = torch.dropout(x, module.dropout, True)
        weights = []
        for suffix in (f"_l{layer}", f"_l{layer}_reverse")[:D]:
            names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
            weights.append([getattr(module, name + suffix, None) for name in names])
        for row in weights:
            row[1] = torch.dropout(row[1], module.weight_dropout, module.training)
        mask, keeps = noise(module, (T, B), D, widths)
        made = [[[[torch.zeros(w, dtype=torch.float64)] * D for _ in range(B)] for _ in range(T)] for w in widths]
        for d in range(D):
            ends = []
            for b in range(B):
                state = [entry[layer * D + d, b] for entry in hx]
                for t in range(lengths[b])[:: -1 if d else 1]:
                    cut = t + 1 if d else t  # in reverse the flag of the step above lies between
                    if call.reset is not None and cut < lengths[b] and call.reset[cut, b]:
                        state = [entry[layer * D + d, b] for entry in fresh]
                    entering = state[0] if mask is None else state[0] * mask[d, b]
                    new = one_step(call.cell, weights[d], x[t, b], state, entering)
                    for k, keep in enumerate(keeps[: len(new)]):
                        if keep is not None:
                            share = keep[t, b, d * widths[k] : (d + 1) * widths[k]]
                            new[k] = share * state[k] + (1 - share) * new[k]
                    state = new
                    for k, entry in enumerate(state):
                        made[k][t][b][d] = entry
                ends.append(state)
            finals.append(ends)
        steps = [torch.stack([torch.stack([torch.cat(cells) for cells in rows]) for rows in state]) for state in made]
        x = steps[0]
        every.append(steps)
    last = [torch.stack([torch.stack([row[k] for row in ends]) for ends in finals]) for k in range(len(widths))]
    states = [steps[k] for k in range(len(widths)) for steps in every] if call.every_state else []
    return [x, *last, *states]


@pytest.mark.filterwarnings("ignore:dropout option adds dropout after all but last:UserWarning")
@pytest.mark.parametrize("seed", range(160))
def test_random_calls_equal_a_plain_loop(seed):
    call = draw(seed)
    results = []
    for run in (by_module, by_loop):
        torch.manual_seed(1000 + seed)
        outputs = run(call)
        given = cotangents(outputs)
        options = {"create_graph": True, "allow_unused": True, "materialize_grads": True}
        plain = torch.autograd.grad(outputs, call.leaves, given, retain_graph=True, **options | {"create_graph": False})
        again = torch.autograd.grad(outputs, call.leaves, given, **options)
        recorded = [g for g in again if g.requires_grad]
        twice = torch.autograd.grad([g.square().sum() for g in recorded], call.leaves, **options) if recorded else ()
        results.append([*outputs, *plain, *again, *twice])
    assert len(results[0]) == len(results[1])
    for k, (found, expected) in enumerate(zip(*results, strict=True)):
        scale = max(1.0, expected.abs().max().item() if expected.numel() else 0.0)
        torch.testing.assert_close(
            found, expected, rtol=1e-8, atol=1e-9 * scale, msg=lambda m, k=k: f"{k}: {call}\n{m}"
        )
