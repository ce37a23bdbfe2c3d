# SPDX-License-Identifier: BSD-3-Clause
"""The __call__ of modules and cells (fastrnn/direct_calls.py): an ordinary call passes torch.nn.Module.__call__ by, and
nobody who would hear of it there can tell."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.profiler import ProfilerActivity, profile
from twins import LAYERS, NAMES, STEPS, an_input, both, first, tensors_of

import fastrnn
from fastrnn import direct_calls, extension
from fastrnn.stack import Stack

pytestmark = pytest.mark.usefixtures("compiled")


class ByTorchError(Exception):
    """The call goes to torch.nn.Module.__call__."""


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that is not direct raises."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise ByTorchError

    monkeypatch.setattr(direct_calls.DirectCalls, "_call_by_torch", refuse)


def made(name: str) -> tuple[nn.Module, Tensor]:
    return getattr(fastrnn, name)(3, 5), an_input(name)


@pytest.mark.usefixtures("refused")
@pytest.mark.parametrize("gradient", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("name", NAMES)
def test_ordinary_calls_are_direct(name: str, gradient: bool) -> None:
    module, x = made(name)
    with torch.set_grad_enabled(gradient):
        output = module(x)
        state = output if name in STEPS else output[1]
        for call in (
            lambda: module(x, state),
            lambda: module(x, hx=state),
            lambda: module(hx=state, input=x),
            lambda: module.__call__(x),
            lambda: type(module).__call__(module, x, hx=state),
        ):
            for a, b in zip(tensors_of(call()), tensors_of(module.forward(x, state)), strict=True):
                assert a.shape == b.shape
        if name in LAYERS:
            flags = torch.arange(8).eq(5).view(4, 2)
            module(x, lengths=torch.tensor([4, 2]), reset=flags, reset_state=state)


@pytest.mark.usefixtures("refused")
@pytest.mark.parametrize("name", NAMES)
def test_a_class_of_a_program_without_a_forward_of_its_own_is_direct(name: str) -> None:
    class Own(getattr(fastrnn, name)):
        pass

    Own(3, 5)(an_input(name))


def heard(library: object, name: str, listen: Callable[[nn.Module, list[Any]], object]) -> list[Any]:
    """What a listener hears of a few calls and their backwards."""
    torch.manual_seed(0)
    module, x = getattr(library, name)(3, 5), an_input(name)
    notes: list[Any] = []
    module(x)  # before anybody listens
    handle: Any = listen(module, notes)
    output = module(x.requires_grad_())
    state = [tensor.detach() for tensor in tensors_of(output if name in STEPS else output[1])]
    given = (state[0], state[1]) if name.startswith("LSTM") else state[0]
    first(module(x, hx=given)).sum().backward()
    module(hx=given, input=x)
    handle.remove()
    silent = len(notes)
    module(x)
    assert len(notes) == silent > 0
    return notes


def note(notes: list[Any], kind: str) -> Callable[..., None]:
    def hook(module: nn.Module, *heard: Any) -> None:
        notes.append((kind, torch.utils._pytree.tree_map(lambda t: getattr(t, "shape", t), heard)))

    return hook


LISTENERS: dict[str, Callable[[nn.Module, list[Any]], object]] = {
    "forward": lambda m, n: m.register_forward_hook(note(n, "forward"), with_kwargs=True),
    "forward_pre": lambda m, n: m.register_forward_pre_hook(note(n, "pre"), with_kwargs=True),
    "backward": lambda m, n: m.register_full_backward_hook(note(n, "backward")),
    "backward_pre": lambda m, n: m.register_full_backward_pre_hook(note(n, "backward_pre")),
    "all_forward": lambda m, n: torch_module.register_module_forward_hook(note(n, "forward")),
    "all_forward_pre": lambda m, n: torch_module.register_module_forward_pre_hook(note(n, "pre")),
    "all_backward": lambda m, n: torch_module.register_module_full_backward_hook(note(n, "backward")),
    "all_backward_pre": lambda m, n: torch_module.register_module_full_backward_pre_hook(note(n, "backward_pre")),
}


@pytest.mark.parametrize("listener", LISTENERS)
@pytest.mark.parametrize("name", NAMES)
def test_hooks_hear_what_they_hear_of_torch_nn(name: str, listener: str) -> None:
    assert heard(fastrnn, name, LISTENERS[listener]) == heard(nn, name, LISTENERS[listener])


def changed_class(module: nn.Module, monkeypatch: pytest.MonkeyPatch, name: str, value: object) -> None:
    monkeypatch.setattr(type(module), name, value, raising=False)


REPLACED: dict[str, Callable[[nn.Module, pytest.MonkeyPatch, Callable[..., str]], None]] = {
    "forward of the instance": lambda m, p, f: p.setitem(m.__dict__, "forward", f),
    "forward of the class": lambda m, p, f: changed_class(m, p, "forward", f),
    "forward of the base": lambda m, p, f: p.setattr(type(m) if hasattr(m, "weight_ih") else Stack, "forward", f),
    "compile()": lambda m, p, f: p.setitem(m.__dict__, "_compiled_call_impl", f),
    "_call_impl of the instance": lambda m, p, f: p.setitem(m.__dict__, "_call_impl", f),
    "_call_impl of the class": lambda m, p, f: changed_class(m, p, "_call_impl", f),
    "_call_impl of torch": lambda m, p, f: p.setattr(nn.Module, "_call_impl", f),
    "__call__ of the class": lambda m, p, f: changed_class(m, p, "__call__", f),
    "__call__ of torch": lambda m, p, f: p.setattr(nn.Module, "__call__", f),
}


@pytest.mark.parametrize("what", REPLACED)
@pytest.mark.parametrize("name", NAMES)
def test_what_a_program_replaces_is_called(name: str, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = made(name)
    before = first(module(x))
    with monkeypatch.context() as patch:
        REPLACED[what](module, patch, lambda *args, **kwargs: "replaced")
        assert module(x) == module(x) == "replaced"
    assert torch.equal(first(module(x)), before)
    monkeypatch.setattr(direct_calls.DirectCalls, "_call_by_torch", None)
    module(x)  # direct again


def test_the_next_class_is_asked_when_it_has_a_call_of_its_own() -> None:
    class Between(nn.Module):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return "between", super().__call__(*args, **kwargs)

    class Mixed(fastrnn.LSTM, Between):
        pass

    class Before(fastrnn.GRU):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return "before", super().__call__(*args, **kwargs)

    x = an_input("LSTM")
    for cls, word in ((Mixed, "between"), (Before, "before")):
        module = cls(3, 5)
        for _ in range(2):
            assert module(x)[0] == word
        assert torch.equal(module(x)[1][0], module.forward(x)[0])


def test_a_class_that_answers_for_its_attributes_itself_is_asked() -> None:
    class Own(fastrnn.RNN):
        def __getattribute__(self, name: str) -> Any:
            return (lambda *args: "mine") if name == "forward" else super().__getattribute__(name)

    assert Own(3, 5)(an_input("RNN")) == "mine"


def test_a_class_that_changes_while_it_is_asked_is_asked_again() -> None:
    class Own(fastrnn.RNN):
        @classmethod
        def _direct_call_kind(cls) -> int:
            kind = super()._direct_call_kind()
            cls.forward = lambda *args: "changed"
            return kind

    module, x = Own(3, 5), an_input("RNN")
    module(x)
    assert module(x) == module(x) == "changed"


@pytest.mark.usefixtures("refused")
@pytest.mark.parametrize(
    "options", [{"zoneout": 0.1}, {"recurrent_dropout": 0.1}, {"weight_dropout": 0.1}, {"recompute": 3}], ids=str
)
@pytest.mark.parametrize("own", [False, True], ids=["of_the_class", "of_the_instance"])
def test_options_are_not_lost(options: dict[str, Any], own: bool) -> None:
    class Own(fastrnn.GRU):
        pass

    module, x = Own(3, 5), an_input("GRU")
    module(x)
    for name, value in options.items():
        if own:
            module.__dict__[name] = value
        else:
            setattr(Own, name, value)
    with pytest.raises(ByTorchError):
        module(x)


@pytest.mark.parametrize("name", NAMES)
def test_wrong_arguments_raise_what_they_raise_in_torch_nn(name: str) -> None:
    ours, theirs = both(name, 3, 5)
    x = an_input(name)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((), {}),
        ((x,), {"input": x}),
        ((x, None, None), {}),
        ((x, None), {"hx": None}),
        ((x,), {"nonsense": 1}),
        ((), {"hx": None}),
    ]
    if name in STEPS:
        calls.extend(((x,), {"lengths": lengths}) for lengths in (torch.tensor([1, 1]), None))
    for args, kwargs in calls:
        for module in (ours, theirs):
            with pytest.raises(TypeError):
                module(*args, **kwargs)


@pytest.fixture(params=["profile", "trace"])
def frames(request: pytest.FixtureRequest) -> Iterator[list[str]]:
    """The functions that Python enters, as a profiler hears of them and as a debugger does."""
    entered: list[str] = []
    get, listen = (getattr(sys, f"{verb}{request.param}") for verb in ("get", "set"))
    before = get()
    listen(lambda frame, event, _: entered.append(frame.f_code.co_qualname) if event == "call" else None)
    yield entered
    listen(before)


@pytest.mark.parametrize("name", NAMES)
def test_profiles_and_traces_of_python_see_the_forward(name: str, frames: list[str]) -> None:
    module, x = made(name)
    frames.clear()
    module(x)
    assert {"Module._wrapped_call_impl", "Module._call_impl"} < set(frames)
    assert any(entered.endswith(".forward") for entered in frames)


@pytest.mark.parametrize("name", NAMES)
def test_torch_profiler_sees_the_module(name: str) -> None:
    module, x = made(name)
    module(x)
    with profile(activities=[ProfilerActivity.CPU], with_stack=True) as profiled:
        module(x)
    assert any(event.name.startswith(f"nn.Module: {name}_") for event in profiled.events())


def test_another_torch_takes_its_calls_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    assert direct_calls.torch_is_known()

    def asks_for_more(self: Any) -> None:
        self._backward_hooks, self._backward_pre_hooks, self._forward_hooks, self._forward_pre_hooks  # noqa: B018
        self._more_hooks  # noqa: B018

    for strange in (asks_for_more, len, None):
        with monkeypatch.context() as patch:
            patch.setattr(direct_calls, "_CALL_IMPL", strange)
            assert not direct_calls.torch_is_known()
        with monkeypatch.context() as patch:
            patch.setattr(direct_calls, "_CALL", strange)
            assert not direct_calls.torch_is_known()


def test_wrong_arguments_of_the_functions_are_refused() -> None:
    module, x = made("LSTM")
    for arguments in ((), (module, [x], {}), (module, (x,), None)):
        with pytest.raises(TypeError, match="direct_call: expected"):
            extension.module.direct_call(*arguments)
    for arguments in ((), (1, 2, {}, {}, {}, {}), (1, len, {}, {}, {}, 3)):
        with pytest.raises(TypeError, match="watch_calls: expected"):
            extension.module.watch_calls(*arguments)
    assert extension.module.direct_call(3, (x,), {}) is None
    assert extension.module.direct_call(nn.LSTM(3, 5), (x,), {}) is None
    assert extension.module.direct_call(module, (x,), {}) is not None


@pytest.mark.parametrize("extra", ["lengths", "reset"])
def test_extras_whose_memory_is_gone_are_refused(extra: str) -> None:
    module, x = made("GRU")
    given = torch.full((2,), 4) if extra == "lengths" else torch.zeros(4, 2, dtype=torch.bool)
    given.untyped_storage().resize_(0)
    with torch.no_grad(), pytest.raises(RuntimeError, match=extra):
        module(x, **{extra: given})
