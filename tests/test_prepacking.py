# SPDX-License-Identifier: BSD-3-Clause
"""prepacked(): the same bits from weights packed once, and an error where they are not the weights any more."""

from __future__ import annotations

import copy
import io
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.rnn import pack_sequence
from twins import CELLS, LAYERS, NAMES, STEPS, an_input, first, random_state, tensors_of, twins

import fastrnn
from fastrnn import extension

pytestmark = pytest.mark.usefixtures("compiled")

VARIANTS = [
    {},
    {"bias": False},
    {"num_layers": 3},
    {"num_layers": 2, "bidirectional": True, "batch_first": True},
]
SIZES = [(1, 1), (3, 7), (5, 17), (20, 64), (33, 100)]  # I, H


def assert_same(found: object, expected: object) -> None:
    for a, b in zip(tensors_of(found), tensors_of(expected), strict=True):
        assert a.shape == b.shape
        assert torch.equal(a, b)


def a_module(name: str = "LSTM", **options: object) -> nn.Module:
    return getattr(fastrnn, name)(3, 5, **options).eval()


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_layers_have_the_same_bits(cell, options, dtype, count, threads, isa):
    threads(count)
    for features, units in SIZES:
        module, _ = twins(cell, features, units, dtype=dtype, **options)
        if cell == "lstm" and units > 1:
            module, _ = twins(cell, features, units, dtype=dtype, proj_size=units // 2, **options)
        for T, B in ((1, 1), (2, 3), (5, 8)):
            x = torch.randn(*((B, T) if options.get("batch_first") else (T, B)), features, dtype=dtype)
            with torch.no_grad():
                expected = module(x)
                with fastrnn.prepacked(module):
                    assert_same(module(x), expected)


@pytest.mark.parametrize("split", ["rows", "units"])
@pytest.mark.parametrize("cell", CELLS)
def test_bits_do_not_depend_on_how_threads_share(cell, split, threads, isa):
    module, _ = twins(cell, 20, 64, bidirectional=True)
    x = torch.randn(6, 9, 20)
    threads(2, split)
    with torch.no_grad():
        expected = module(x)
        with fastrnn.prepacked(module):
            assert_same(module(x), expected)


@pytest.mark.parametrize("form", ["state", "unbatched", "packed", "transposed"])
@pytest.mark.parametrize("name", LAYERS)
def test_every_form_of_input_has_the_same_bits(name, form):
    module = a_module(name, num_layers=2)
    cell = {"LSTM": "lstm", "GRU": "gru", "RNN": "rnn_tanh"}[name]
    arguments = {
        "state": (torch.randn(4, 2, 3), random_state(cell, 2, 2, H=5)),
        "unbatched": (torch.randn(4, 3), random_state(cell, 2, H=5)),
        "packed": (pack_sequence([torch.randn(2, 3), torch.randn(4, 3)], enforce_sorted=False),),
        "transposed": (torch.randn(2, 4, 3).transpose(0, 1),),
    }[form]
    with torch.no_grad():
        expected = module(*arguments)
        with fastrnn.prepacked(module):
            assert_same(module(*arguments), expected)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("cell", CELLS)
def test_cells_have_the_same_bits(cell, bias, isa):
    for features, units in SIZES:
        module, _ = twins(cell, features, units, step=True, bias=bias)
        with torch.no_grad():
            for x, hx in (
                (torch.randn(4, features), random_state(cell, 4, H=units)),
                (torch.randn(features), random_state(cell, H=units)),
                (torch.randn(4, features), None),
            ):
                expected = module(x, hx)
                with fastrnn.prepacked(module):
                    assert_same(module(x, hx), expected)


def test_packed_weights_are_what_a_call_reads():
    """Without this the tests of bits would pass for a block that does nothing."""
    module, x = a_module(), an_input("LSTM")
    with torch.no_grad():
        expected = module(x)
        with pytest.raises(RuntimeError, match="weight_hh_l0 was changed"), fastrnn.prepacked(module):  # noqa: PT012
            module.weight_hh_l0.data.zero_()
            assert_same(module(x), expected)
        assert not torch.equal(first(module(x)), first(expected))


def test_layers_deep_in_a_model_are_packed():
    model = nn.ModuleDict({"encoder": nn.Sequential(nn.Linear(3, 3), fastrnn.LSTM(3, 5)), "stock": nn.GRU(3, 5)})
    with fastrnn.prepacked(model) as inside:
        assert inside is model
        assert model["encoder"][1].__dict__["_prepacked"] is not None
        assert "_prepacked" not in model["stock"].__dict__
    assert "_prepacked" not in model["encoder"][1].__dict__
    with pytest.raises(RuntimeError, match=r"encoder\.1\.weight_ih_l0 was changed"), fastrnn.prepacked(model):
        model["encoder"][1].weight_ih_l0.data.add_(1)


CHANGES = {
    "another tensor": (lambda m: setattr(m, "W", nn.Parameter(m.W.detach().clone())), "another tensor"),
    "in place": (lambda m: m.W.detach().mul_(2), "was written to"),
    "moved": (lambda m: setattr(m.W, "data", m.W.detach().clone()), "lies elsewhere"),
    "another dtype": (lambda m: m.double(), "another dtype"),
    "another shape": (lambda m: setattr(m.W, "data", m.W.detach()[:4]), "another shape"),
    "frozen": (lambda m: m.W.requires_grad_(False), "another requires_grad"),
    "loaded": (lambda m: m.load_state_dict(copy.deepcopy(m.state_dict())), "was written to"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", NAMES)
def test_changed_weight_is_found_at_the_next_call(name, change):
    module, x = a_module(name), an_input(name)
    weight = "weight_hh" + ("" if name in STEPS else "_l0")
    act, message = CHANGES[change]

    class Named:  # the change by one name, whatever the class calls the weight
        def __getattr__(self, attribute: str) -> object:
            return getattr(module, weight if attribute == "W" else attribute)

        def __setattr__(self, attribute: str, value: object) -> None:
            setattr(module, weight if attribute == "W" else attribute, value)

    with torch.no_grad(), pytest.raises(RuntimeError, match="changed inside the block"), fastrnn.prepacked(module):  # noqa: PT012
        module(x)
        act(Named())
        x = x.to(module.weight_ih.dtype if name in STEPS else module.weight_ih_l0.dtype)
        with pytest.raises(RuntimeError, match=rf"prepacked: \w+ .*{message}"):
            module(x)
    module.float()
    if change != "another shape":
        first(module(x.float()))  # the block is over: an ordinary module again


@pytest.mark.parametrize("name", NAMES)
def test_call_that_needs_a_gradient_is_refused(name):
    module, x = a_module(name), an_input(name)
    with fastrnn.prepacked(module):
        with pytest.raises(RuntimeError, match="needs a gradient"):
            module(x)
        with torch.no_grad():
            module(x)
        with torch.inference_mode():
            module(x)
    first(module(x)).sum().backward()
    module.requires_grad_(False)
    with fastrnn.prepacked(module):
        module(x)
        with pytest.raises(RuntimeError, match="needs a gradient"):
            module(x.requires_grad_())


def test_call_that_needs_a_gradient_is_refused_on_the_long_way_too():
    module = fastrnn.LSTM(3, 5, num_layers=2, dropout=0.5).train()
    with fastrnn.prepacked(module), pytest.raises(RuntimeError, match="needs a gradient"):
        module(an_input("LSTM"))
    packed = pack_sequence([torch.ones(3, 3)])
    with fastrnn.prepacked(module), pytest.raises(RuntimeError, match="needs a gradient"):
        module(packed)


@pytest.mark.parametrize("name", NAMES)
def test_calls_that_the_kernels_do_not_take_work(name):
    module, x = a_module(name), an_input(name)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected = module(x)
        with fastrnn.prepacked(module):
            assert_same(module(x), expected)
    with torch.no_grad(), fastrnn.prepacked(module):
        ordinary = first(module(x))
        mapped = torch.func.vmap(lambda x: first(module(x)))(torch.stack((x, x)))
        assert torch.equal(mapped[0], ordinary)


@pytest.mark.parametrize("name", LAYERS)
def test_calls_with_lengths_or_noise_read_the_weights_themselves(name):
    module, x, lengths = a_module(name), torch.randn(4, 2, 3), torch.tensor([4, 2])
    with torch.no_grad():
        expected = module(x, lengths=lengths)
        with fastrnn.prepacked(module):
            assert_same(module(x, lengths=lengths), expected)
            module.recurrent_dropout = 0.5
            assert_same(module(x, lengths=lengths), expected)  # in evaluation
            assert_same(module.train()(x)[0][0], expected[0][0])  # no h before the first step
    with fastrnn.prepacked(module), pytest.raises(RuntimeError, match="needs a gradient"):
        module(x, lengths=lengths)


@pytest.mark.parametrize("name", NAMES)
def test_module_may_be_reverted_inside_the_block(name):
    model, x = nn.ModuleList([a_module(name)]), an_input(name)
    with torch.no_grad(), fastrnn.prepacked(model):
        expected = model[0](x)
        fastrnn.revert(model)
        assert type(model[0]) is getattr(nn, name)
        for a, b in zip(tensors_of(model[0](x)), tensors_of(expected), strict=True):
            torch.testing.assert_close(a, b)


def test_nested_blocks_share_one_copy():
    module, x = a_module(), an_input("LSTM")
    with torch.no_grad(), fastrnn.prepacked(module):
        outer = module.__dict__["_prepacked"]
        with fastrnn.prepacked(nn.Sequential(module)):
            assert module.__dict__["_prepacked"] is outer
        assert module.__dict__["_prepacked"] is outer
        module(x)
    assert "_prepacked" not in module.__dict__


def test_inner_block_finds_a_change():
    module = a_module()
    with pytest.raises(RuntimeError, match="bias_ih_l0 was changed"), fastrnn.prepacked(module):  # noqa: PT012
        module.bias_ih_l0.data.add_(1)
        with fastrnn.prepacked(module):
            raise AssertionError("the block was entered")
    with fastrnn.prepacked(module):
        assert module.__dict__["_prepacked"] is not None
    assert "_prepacked" not in module.__dict__


def test_exception_inside_the_block_is_the_one_that_comes_out():
    module = a_module()
    with pytest.raises(KeyError, match="mine") as caught, fastrnn.prepacked(module):
        raise KeyError("mine")
    assert not getattr(caught.value, "__notes__", [])
    with pytest.raises(KeyError, match="mine") as caught, fastrnn.prepacked(module):  # noqa: PT012
        module.weight_ih_l0.data.add_(1)
        raise KeyError("mine")
    assert "weight_ih_l0 was changed" in caught.value.__notes__[0]
    assert "_prepacked" not in module.__dict__


@pytest.mark.parametrize("name", NAMES)
def test_copies_are_outside_the_block(name):
    module, x = a_module(name), an_input(name)
    with torch.no_grad(), fastrnn.prepacked(module):
        expected = module(x)
        buffer = io.BytesIO()
        torch.save(module, buffer)
        buffer.seek(0)
        copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(buffer, weights_only=False)]
        for other in copies:
            assert_same(other(x), expected)
            for parameter in other.parameters():
                parameter.zero_()
            assert not torch.equal(first(other(x)), first(expected))
    for other in copies:
        first(other(x)).sum().backward()


def test_shallow_copy_is_outside_when_the_block_is_over():
    module, x = a_module(), an_input("LSTM")
    with fastrnn.prepacked(module):
        other = copy.copy(module)
    other.weight_ih_l0.data.add_(1)
    first(other(x)).sum().backward()
    assert torch.equal(first(other(x)), first(module(x)))


def test_threads_share_the_packed_weights():
    module, x = a_module("GRU"), an_input("GRU")
    with torch.no_grad():
        expected = module(x)
    failures = []

    def work() -> None:
        try:
            for _ in range(50):
                with torch.no_grad(), fastrnn.prepacked(module):
                    for _ in range(5):
                        assert_same(module(x), expected)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert "_prepacked" not in module.__dict__


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["float32", "float16", "bfloat16"]
)
@pytest.mark.parametrize("features", [3, 4096])
def test_another_instruction_set_is_refused(features, dtype):
    before, names = extension.module.isa(), extension.module.available_isas()
    if len(names) < 2:
        pytest.skip("this machine has one instruction set")
    module, x = fastrnn.LSTM(features, 64).to(dtype), an_input("LSTM", features).to(dtype)
    for other in names:
        same = {other, before} <= {"avx512", "avx512_bf16", "amx"} and dtype != torch.bfloat16
        if other == before or (same and not (features == 4096 and "amx" in (other, before))):
            continue  # the kernels of the two are the same, and so is how W_ih lies, but for AMX's large ones in parts
        try:
            with torch.no_grad(), fastrnn.prepacked(module):
                extension.module.select_isa(other)
                with pytest.raises(RuntimeError, match="another instruction set"):
                    module(x)
                extension.module.select_isa(before)
                module(x)
                extension.module.select_isa(other)  # what is compared at the end was packed for the one before
        finally:
            extension.module.select_isa(before)


def _parametrized(module: nn.Module) -> None:
    class Same(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return weight

    parametrize.register_parametrization(module, "weight_hh_l0", Same())


REFUSED = {
    "parametrized": (_parametrized, "weight_hh_l0 is parametrized"),
    "pruned": (lambda m: prune.random_unstructured(m, "weight_hh_l0", amount=0.5), "weight_hh_l0 is parametrized"),
    "meta": (lambda m: m.to("meta"), "must be dense CPU tensors"),
    "complex": (lambda m: m.to(torch.complex64), "must be dense CPU tensors"),
    "mixed": (lambda m: setattr(m, "bias_ih_l0", nn.Parameter(m.bias_ih_l0.detach().double())), "of one dtype"),
    "none": (lambda m: setattr(m, "bias_ih_l0", None), "bias_ih_l0 must be a Tensor, got None"),
    "not materialised": (
        lambda m: setattr(m, "weight_ih_l0", nn.UninitializedParameter()),
        "weight_ih_l0 is not materialised",
    ),
    "wrong shape": (lambda m: setattr(m, "weight_ih_l0", nn.Parameter(torch.ones(8, 3))), "w_ih must be"),
}


@pytest.mark.parametrize("why", REFUSED)
@pytest.mark.filterwarnings("ignore:Complex modules are a new feature:UserWarning")
def test_what_cannot_be_packed_is_refused(why):
    good, module = a_module(), a_module()
    spoil, message = REFUSED[why]
    spoil(module)
    with pytest.raises((RuntimeError, ValueError), match=message), fastrnn.prepacked(nn.Sequential(good, module)):
        raise AssertionError("the block was entered")
    assert "_prepacked" not in good.__dict__  # nothing stays half entered
    assert "_prepacked" not in module.__dict__


def test_modules_without_a_layer_are_refused():
    with (
        pytest.raises(ValueError, match="LSTM holds no LSTM, GRU or RNN of fastrnn; "),
        fastrnn.prepacked(nn.LSTM(3, 5)),
    ):
        raise AssertionError("the block was entered")
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got int"), fastrnn.prepacked(3):
        raise AssertionError("the block was entered")


def test_missing_extension_is_said(monkeypatch):
    monkeypatch.setattr(fastrnn.autograd, "_C", None)
    with pytest.raises(RuntimeError, match="extension is not loaded"), fastrnn.prepacked(a_module()):
        raise AssertionError("the block was entered")


def test_weights_of_inference_mode_are_taken():
    with torch.inference_mode():
        module, x = a_module(), an_input("LSTM")
        expected = module(x)
        with fastrnn.prepacked(module):
            assert_same(module(x), expected)
        with pytest.raises(RuntimeError, match="weight_ih_l0 was changed"), fastrnn.prepacked(module):
            module.weight_ih_l0.add_(1)
