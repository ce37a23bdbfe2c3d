# SPDX-License-Identifier: BSD-3-Clause
"""Training programs: autocast, GradScaler, checkpoints, hooks, modes of autograd, optimizers."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.checkpoint import checkpoint, checkpoint_sequential
from twins import LAYERS, NAMES, STEPS, an_input, both, first, tensors_of


def gradients(module: nn.Module) -> list[Tensor | None]:
    return [parameter.grad for parameter in module.parameters()]


def autocast_step(module: nn.Module, x: Tensor, dtype: torch.dtype) -> list[Tensor | None] | str:
    x = x.requires_grad_()
    try:
        with torch.autocast("cpu", dtype=dtype):
            outputs = tensors_of(module(x))
            loss = sum(out.float().square().sum() for out in outputs)
    except RuntimeError as error:
        return str(error)
    loss.backward()
    return [*outputs, x.grad, *gradients(module)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_autocast_trains_with_torchs_dtypes_and_numbers(name: str, dtype: torch.dtype) -> None:
    """Or with its error: oneDNN has no float16 LSTM that trains."""
    found, expected = (autocast_step(module, an_input(name), dtype) for module in both(name, 3, 5))
    assert isinstance(expected, list) or dtype is torch.float16
    if isinstance(expected, str):
        assert found == expected
        return
    for a, b in zip(found, expected, strict=True):
        assert a.dtype is b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", LAYERS)
def test_autocast_of_a_packed_deep_module_is_torchs(name: str) -> None:
    packed = pack_sequence([torch.randn(4, 3), torch.randn(2, 3)])
    ours, theirs = both(name, 3, 5, num_layers=2, bidirectional=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for a, b in zip(tensors_of(ours(packed)), tensors_of(theirs(packed)), strict=True):
            assert a.dtype is b.dtype
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_grad_scaler_steps_as_with_torch(name: str) -> None:
    results = []
    for module in both(name, 3, 5):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        for infinite in (False, True, False):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = first(module(an_input(name))).float().square().sum() * (float("inf") if infinite else 1)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == 2.0**9
        results.append(list(module.parameters()))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("reentrant", [False, True], ids=["hooks", "reentrant"])
@pytest.mark.parametrize("name", NAMES)
def test_checkpoint_replays_dropout_and_gives_the_same_gradients(name: str, reentrant: bool) -> None:
    options = {} if name in STEPS else {"num_layers": 2, "dropout": 0.5}
    ours, _ = both(name, 3, 5, **options)
    found = []
    for run in (ours, lambda x: checkpoint(ours, x, use_reentrant=reentrant)):
        x = an_input(name).requires_grad_()
        torch.manual_seed(3)
        first(run(x)).square().sum().backward()
        found.append([x.grad, *gradients(ours)])
        ours.zero_grad()
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_checkpoint_sequential_works() -> None:
    class Output(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)[0]

    model = nn.Sequential(*(Output(both(name, 3, 3)[0]) for name in LAYERS))
    x = an_input("LSTM").requires_grad_()
    whole = torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()])
    again = torch.autograd.grad(
        checkpoint_sequential(model, 2, x, use_reentrant=False).square().sum(), [x, *model.parameters()]
    )
    for a, b in zip(whole, again, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_every_kind_of_hook_sees_what_it_sees_with_torch(name: str) -> None:
    seen: list[list] = []
    for module in both(name, 3, 5):
        log: list = []
        module.register_forward_pre_hook(lambda m, args, log=log: log.append(("pre", len(args))))
        module.register_forward_hook(lambda m, args, out, log=log: log.append(("forward", type(out).__name__)))
        module.register_full_backward_pre_hook(lambda m, out, log=log: log.append(("before", len(out))))
        module.register_full_backward_hook(lambda m, i, out, log=log: log.append(("backward", i[0].shape, len(out))))
        for key, parameter in module.named_parameters():
            parameter.register_hook(lambda g, log=log, key=key: log.append((key, g.shape)))
            parameter.register_post_accumulate_grad_hook(lambda p, log=log, key=key: log.append((key, "accumulated")))
        first(module(an_input(name).requires_grad_())).sum().backward()
        seen.append(sorted(map(str, log)))
    assert seen[0] == seen[1]


@pytest.mark.parametrize("name", NAMES)
def test_hooks_may_replace_inputs_outputs_and_gradients(name: str) -> None:
    results = []
    for module in both(name, 3, 5):
        module.register_forward_pre_hook(lambda m, args: (2 * args[0], *args[1:]))
        weight = next(module.parameters())
        weight.register_hook(lambda gradient: 3 * gradient)
        x = an_input(name).requires_grad_()
        first(module(x)).square().sum().backward()
        results.append([x.grad, *gradients(module)])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("name", NAMES)
def test_saved_tensors_may_be_packed_away_and_anomalies_looked_for(name: str) -> None:
    ours, _ = both(name, 3, 5)
    x = an_input(name)
    plain = torch.autograd.grad(first(ours(x)).square().sum(), list(ours.parameters()))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()):
        packed = torch.autograd.grad(first(ours(x)).square().sum(), list(ours.parameters()))
    with torch.autograd.graph.save_on_cpu():
        moved = torch.autograd.grad(first(ours(x)).square().sum(), list(ours.parameters()))
    for a, b, c in zip(plain, packed, moved, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    with (
        pytest.warns(UserWarning, match="Anomaly Detection has been enabled"),
        torch.autograd.detect_anomaly(),
        pytest.warns(UserWarning, match="Error detected in"),
        pytest.raises(RuntimeError, match="returned nan values"),
    ):
        (first(ours(x)) * float("nan")).sum().backward()


@pytest.mark.parametrize("name", NAMES)
def test_inference_tensors_may_not_be_trained_on_and_say_so(name: str) -> None:
    ours, _ = both(name, 3, 5)
    with torch.inference_mode():
        x = an_input(name)
    assert first(ours(x.clone())).requires_grad
    with torch.no_grad():
        assert not first(ours(x)).requires_grad
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        first(ours(x)).sum().backward()


@pytest.mark.parametrize("name", NAMES)
def test_gradients_accumulate_and_optimizers_step_as_with_torch(name: str) -> None:
    results = []
    for module in both(name, 3, 5):
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.01, foreach=True)
        for step in range(3):
            for part in range(2):
                x = torch.randn(an_input(name).shape, generator=torch.Generator().manual_seed(2 * step + part))
                first(module(x)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=step % 2 == 0)
        results.append(list(module.parameters()))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_truncated_backpropagation_with_detached_states_equals_torch(name: str) -> None:
    results = []
    for module in both(name, 3, 5, num_layers=2):
        hx = None
        for chunk in an_input(name).split(2):
            y, hx = module(chunk, hx)
            y.square().sum().backward()
            hx = tuple(h.detach() for h in hx) if name == "LSTM" else hx.detach()
        results.append(gradients(module))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("name", NAMES)
def test_one_module_used_several_times_collects_all_gradients(name: str) -> None:
    results = []
    for module in both(name, 3, 5):
        x = an_input(name)
        (first(module(x)).sum() + first(module(2 * x)).square().sum()).backward()
        results.append(gradients(module))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("name", LAYERS)
def test_weights_changed_between_forward_and_backward_are_noticed(name: str) -> None:
    """By an optimizer, by hand, by load_state_dict: the version counters of what was saved."""
    for change in (
        lambda m: torch.optim.SGD(m.parameters(), lr=0.1).step(),
        lambda m: m.load_state_dict(copy.deepcopy(m.state_dict())),
        lambda m: m.reset_parameters(),
    ):
        for module in both(name, 3, 5):
            y = module(an_input(name).requires_grad_())[0]
            y.sum().backward(retain_graph=True)
            change(module)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                y.sum().backward()


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("name", NAMES)
def test_deterministic_algorithms_may_be_asked_for(name: str) -> None:
    ours, _ = both(name, 3, 5)
    found = [torch.autograd.grad(first(ours(an_input(name))).sum(), list(ours.parameters())) for _ in range(2)]
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", LAYERS)
def test_the_random_stream_is_torchs_for_packed_and_batch_first(name: str) -> None:
    """The mask of dropout, and what comes from the generator after it."""
    x = torch.randn(4, 6, 3)
    packed = pack_sequence([x[:, 0], x[:3, 1], x[:1, 2]])
    for options, argument in (({"batch_first": True}, x), ({"bidirectional": True}, packed)):
        results = []
        for module in both(name, 3, 5, num_layers=3, dropout=0.3, **options):
            torch.manual_seed(11)
            output = module(argument)
            results.append([*tensors_of(output), torch.rand(2)])
            assert isinstance(output[0], PackedSequence) == isinstance(argument, PackedSequence)
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
        assert torch.equal(results[0][-1], results[1][-1])
