# SPDX-License-Identifier: BSD-3-Clause
"""convert(), revert() and to_torch(): only the class of a module changes, in the models that programs really have."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from twins import LAYERS, NAMES, an_input, assert_as_accurate, both, first, tensors_of

import fastrnn


class Tagger(nn.Module):
    """One of each: layers in a list and a dict, a cell, a module under two names, tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.layers = nn.ModuleList([nn.LSTM(8, 6, bidirectional=True), nn.GRU(12, 6, 2, batch_first=False)])
        self.heads = nn.ModuleDict({"a": nn.RNN(6, 6), "b": nn.RNN(6, 6, nonlinearity="relu")})
        self.again = self.heads["a"]
        self.step = nn.GRUCell(6, 6)
        self.other_step = nn.GRUCell(6, 6)
        self.other_step.weight_hh = self.step.weight_hh
        self.plain_reference = [self.step]
        self.output = nn.Linear(6, 11)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x, _ = layer(x)
        x = self.heads["a"](x)[0] + self.heads["b"](x)[0] + self.again(x)[0]
        return self.output(self.other_step(self.plain_reference[0](x[-1])))


NAMES_IN_TAGGER = ("layers.0", "layers.1", "heads.a", "heads.b", "step", "other_step")


@pytest.fixture
def model() -> Tagger:
    torch.manual_seed(3)
    return Tagger()


def tokens() -> torch.Tensor:
    return torch.randint(11, (5, 3), generator=torch.Generator().manual_seed(1))


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# ---- what changes, and what does not -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_single_module_is_converted_and_reverted(name):
    ours, theirs = both(name, 3, 5)
    attributes = dict(vars(theirs))
    done = fastrnn.convert(theirs)
    assert done.converted == {"": f"torch.nn.{name} -> fastrnn.{name}"}
    assert type(theirs) is getattr(fastrnn, name)
    assert vars(theirs).keys() == vars(ours).keys()  # nothing that only fastrnn's constructor would make
    assert all(vars(theirs)[key] is value for key, value in attributes.items())
    assert vars(theirs).keys() == attributes.keys()
    for found, expected in zip(tensors_of(theirs(an_input(name))), tensors_of(ours(an_input(name))), strict=True):
        assert torch.equal(found, expected)
    assert "kernel" in fastrnn.explain(theirs, an_input(name)) or fastrnn.extension.module is None
    done = fastrnn.revert(theirs)
    assert done.converted == {"": f"fastrnn.{name} -> torch.nn.{name}"}
    assert type(theirs) is getattr(nn, name)
    assert all(vars(theirs)[key] is value for key, value in attributes.items())


def test_model_keeps_objects_ties_and_names(model):
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    keys, text = list(model.state_dict()), repr(model)
    done = fastrnn.convert(model)
    assert tuple(done.converted) == NAMES_IN_TAGGER
    assert done.left == {}
    assert all(type(modules[name]).__module__.startswith("fastrnn") for name in NAMES_IN_TAGGER)
    for before, after in ((modules, dict(model.named_modules())), (parameters, dict(model.named_parameters()))):
        assert before.keys() == after.keys()
        assert all(before[name] is after[name] for name in before)
    assert list(model.state_dict()) == keys
    assert repr(model) == text
    assert model.again is model.heads["a"]
    assert model.plain_reference[0] is model.step
    assert model.other_step.weight_hh is model.step.weight_hh
    assert fastrnn.convert(model) == fastrnn.Conversion({}, {})


def test_report_reads_well(model):
    lines = str(fastrnn.convert(model)).splitlines()
    assert lines[0] == "layers.0: torch.nn.LSTM -> fastrnn.LSTM"
    assert str(fastrnn.convert(model)) == "nothing to convert"
    assert str(fastrnn.revert(nn.ModuleList([fastrnn.LSTM(1, 1)])[0])) == "(the model): fastrnn.LSTM -> torch.nn.LSTM"


def test_training_goes_on_through_conversion_and_back(model):
    """One optimizer, made before: each step gives the loss that the stock model gives."""
    stock = copy.deepcopy(model)
    losses = []
    for network, changes in ((stock, [None] * 6), (model, [None, fastrnn.convert, None, fastrnn.revert, None, None])):
        optimizer = torch.optim.Adam(network.parameters(), 0.01)
        losses.append([])
        for change in changes:
            if change is not None:
                change(network)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(network(tokens()), torch.tensor([1, 5, 2]))
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-5)
    assert losses[0][0] > losses[0][-1]
    assert all(type(a) is type(b) for a, b in zip(model.modules(), stock.modules(), strict=True))


@pytest.mark.parametrize("name", LAYERS)
def test_converted_module_is_as_accurate_as_one_made_new(name):
    _, theirs = both(name, 3, 5, num_layers=2, bidirectional=True)
    converted = copy.deepcopy(theirs)
    fastrnn.convert(converted)
    assert_as_accurate(converted, theirs, an_input(name))


def test_hooks_and_training_flag_survive(model):
    calls = []
    layer = model.layers[0]
    layer.register_forward_hook(lambda module, *_: calls.append(("forward", module)))
    layer.register_full_backward_hook(lambda module, *_: calls.append(("backward", module)))
    handle = layer.register_forward_pre_hook(lambda module, *_: calls.append(("before", module)))
    model.eval()
    model.layers[1].train()
    fastrnn.convert(model)
    assert [module.training for module in model.layers] == [False, True]
    model(tokens()).sum().backward()
    assert calls == [("before", layer), ("forward", layer), ("backward", layer)]
    handle.remove()
    model(tokens())
    assert [kind for kind, _ in calls[3:]] == ["forward"]


def test_copies_are_of_the_converted_class_and_independent(model):
    fastrnn.convert(model)
    clone = copy.deepcopy(model)
    assert type(clone.layers[0]) is fastrnn.LSTM
    assert clone.again is clone.heads["a"]
    assert torch.equal(clone(tokens()), model(tokens()))
    fastrnn.revert(clone)
    assert type(model.layers[0]) is fastrnn.LSTM
    replica = model.layers[0]._replicate_for_data_parallel()
    assert type(replica) is fastrnn.LSTM
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    assert torch.equal(averaged(tokens()), model(tokens()))


@pytest.mark.parametrize("written_before", [True, False])
def test_saved_models_and_state_dicts_load_either_way(model, written_before):
    expected = model(tokens())
    if not written_before:
        fastrnn.convert(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert type(loaded.layers[0]) is (nn.LSTM if written_before else fastrnn.LSTM)
    fastrnn.convert(loaded)
    assert_close(loaded(tokens()), expected)
    assert_close(pickle.loads(pickle.dumps(loaded))(tokens()), expected)
    fresh = Tagger()
    fresh.load_state_dict(loaded.state_dict())
    assert_close(fresh(tokens()), expected)


def test_conversion_inside_wrappers(model):
    stock = copy.deepcopy(model)
    wrapped = nn.DataParallel(nn.Sequential(model))  # without a GPU it calls the module itself
    assert tuple(fastrnn.convert(wrapped).converted) == tuple(f"module.0.{name}" for name in NAMES_IN_TAGGER)
    assert_close(wrapped(tokens()), stock(tokens()))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*grad attribute of a Tensor that is not")
@pytest.mark.parametrize("way", ["torch.compile", "module.compile"])
def test_compiled_model_runs_the_new_class_at_the_next_call(model, way):
    """Although Dynamo has compiled for the old one."""
    torch._dynamo.reset()
    expected, prefix, called = model(tokens()), "", model
    if way == "torch.compile":
        called, prefix = torch.compile(model, backend="eager"), "_orig_mod."
    else:
        model.compile(backend="eager")
    for change, stock in ((None, True), (fastrnn.convert, False), (fastrnn.revert, True)):
        if change is not None:
            assert tuple(change(called).converted) == tuple(prefix + name for name in NAMES_IN_TAGGER)
        assert_close(called(tokens()), expected)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            called(tokens())
        ran = {event.key for event in profile.key_averages()} & {"aten::lstm", "aten::gru", "aten::gru_cell"}
        assert bool(ran) == (stock or fastrnn.extension.module is None)


# ---- weights that are not plain Parameters -------------------------------------------------------------------------

REPARAMETRIZED = {
    "weight norm": lambda module, name: parametrizations.weight_norm(module, name),
    "spectral norm": lambda module, name: parametrizations.spectral_norm(module, name),
    "orthogonal": lambda module, name: parametrizations.orthogonal(module, name),
    "pruned": lambda module, name: prune.l1_unstructured(module, name, amount=0.5),
    "weight norm by hooks": lambda module, name: nn.utils.weight_norm(module, name),
    "spectral norm by hooks": lambda module, name: nn.utils.spectral_norm(module, name),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("way", REPARAMETRIZED)
@pytest.mark.parametrize("name", NAMES)
def test_reparametrized_weights_survive_both_ways(name, way):
    made = []
    for _ in range(2):  # torch does not copy weights that are computed
        _, module = both(name, 3, 5)
        module.double()  # the gradient through a spectral norm cancels in float32
        REPARAMETRIZED[way](module, "weight_hh" if name.endswith("Cell") else "weight_hh_l0")
        made.append(module.eval())  # in training spectral norm turns its vectors at every call
    theirs, stock = made
    parameters = dict(theirs.named_parameters())
    assert list(fastrnn.convert(theirs).converted) == [""]
    assert isinstance(theirs, getattr(fastrnn, name))
    assert all(parameters[key] is parameter for key, parameter in theirs.named_parameters())
    x = an_input(name).double()
    outputs = [first(module(x)) for module in (theirs, stock)]
    assert_close(*outputs)
    for output in outputs:
        output.square().sum().backward()
    for ours, their in zip(theirs.parameters(), stock.parameters(), strict=True):
        assert_close(ours.grad, their.grad)
    fastrnn.revert(theirs)
    assert not isinstance(theirs, getattr(fastrnn, name))
    assert torch.equal(first(theirs(x)), first(stock(x)))


def test_parametrizations_can_be_removed_and_added_after_conversion():
    _, theirs = both("GRU", 3, 5)
    parametrizations.weight_norm(theirs, "weight_hh_l0")
    before = copy.deepcopy(theirs)
    fastrnn.convert(theirs)
    parametrizations.weight_norm(theirs, "weight_ih_l0")
    parametrize.remove_parametrizations(theirs, "weight_hh_l0")
    fastrnn.revert(theirs)
    assert isinstance(theirs, nn.GRU)
    assert type(theirs).__name__ == "ParametrizedGRU"
    parametrize.remove_parametrizations(theirs, "weight_ih_l0")
    assert type(theirs) is nn.GRU
    assert_close(first(theirs(an_input("GRU"))), first(before(an_input("GRU"))))


def test_copy_of_a_parametrized_module_stays_what_it_is():
    """Deep copies share the class that parametrize made; converting one must not convert the other."""
    _, theirs = both("LSTM", 3, 5)
    parametrizations.weight_norm(theirs, "weight_hh_l0")
    target = copy.deepcopy(theirs)
    assert type(target) is type(theirs)
    fastrnn.convert(theirs)
    assert not isinstance(target, fastrnn.LSTM)
    parametrize.remove_parametrizations(theirs, "weight_hh_l0")
    assert type(theirs) is fastrnn.LSTM
    first(target(an_input("LSTM"))).sum().backward()


# ---- what is left, and why -----------------------------------------------------------------------------------------


class OwnLstm(nn.LSTM):
    pass


class OwnFused(fastrnn.GRU):
    pass


def test_subclasses_are_left_with_the_reason():
    model = nn.ModuleDict({"own": OwnLstm(3, 5), "fused": OwnFused(3, 5), "plain": nn.GRU(3, 5)})
    done = fastrnn.convert(model)
    assert list(done.converted) == ["plain"]
    assert "OwnLstm, a subclass of torch.nn.LSTM" in done.left["own"]
    assert "own: left, it is a " in str(done)
    done = fastrnn.revert(model)
    assert list(done.converted) == ["plain"]
    assert "OwnFused, a subclass of fastrnn.GRU" in done.left["fused"]
    assert type(model["own"]) is OwnLstm


NOISE = {
    "zoneout": lambda name: (0.0, 0.5) if name == "LSTM" else 0.5,
    "recurrent_dropout": lambda name: 0.5,
    "weight_dropout": lambda name: 0.5,
}


@pytest.mark.parametrize("option", NOISE)
@pytest.mark.parametrize("name", LAYERS)
def test_noise_that_torch_lacks_is_left_and_refused(name, option):
    """Not changed into a module that silently computes without it. Read at each call: it may be set to zero later."""
    module = getattr(fastrnn, name)(3, 5, **{option: NOISE[option](name)})
    assert fastrnn.revert(module) == fastrnn.Conversion({}, {"": f"torch.nn.{name} has no {option}"})
    assert type(module) is getattr(fastrnn, name)
    with pytest.raises(TypeError, match=rf"fastrnn.to_torch: torch.nn.{name} has no {option}$"):
        module.to_torch()
    assert fastrnn.convert(module) == fastrnn.Conversion({}, {})
    setattr(module, option, (0.0, 0.0) if isinstance(getattr(module, option), tuple) else 0.0)
    assert type(module.to_torch()) is getattr(nn, name)
    assert list(fastrnn.revert(module).converted) == [""]


def test_parametrized_subclass_is_left():
    module = OwnLstm(3, 5)
    parametrizations.weight_norm(module, "weight_hh_l0")
    assert "OwnLstm, a subclass of torch.nn.LSTM" in fastrnn.convert(module).left[""]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per_tensor:UserWarning")
def test_quantized_modules_are_left():
    model = nn.ModuleDict({"lstm": nn.LSTM(3, 5), "cell": nn.GRUCell(3, 5), "rnn": nn.RNN(3, 5)})
    model = torch.ao.quantization.quantize_dynamic(model, {nn.LSTM, nn.GRUCell})
    done = fastrnn.convert(model)
    assert list(done.converted) == ["rnn"]
    assert done.left.keys() == {"lstm", "cell"}
    assert all(reason.startswith("it is quantized or prepared for it: torch.ao.nn.") for reason in done.left.values())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_scripted_and_traced_modules_are_left():
    scripted = torch.jit.script(nn.Sequential(nn.Linear(3, 3), nn.LSTM(3, 5)))
    traced = torch.jit.trace(nn.GRU(3, 5), (torch.randn(4, 2, 3),))
    done = fastrnn.convert(nn.ModuleDict({"scripted": scripted, "traced": traced}))
    reason = "it is scripted or traced: its code is fixed"
    assert done == fastrnn.Conversion({}, {"scripted.1": reason, "traced": reason})


def test_replaced_forward_is_left():
    """As accelerate and others hook a module: the new forward has the old class's bound inside."""
    module = nn.LSTM(3, 5)
    old = module.forward
    module.forward = lambda *arguments: old(*arguments)
    done = fastrnn.convert(module)
    assert done.left[""].startswith("its forward is replaced on the module itself")
    assert type(module) is nn.LSTM


def test_lazy_and_other_modules_are_not_touched():
    model = nn.Sequential(nn.LazyLinear(3), nn.Identity(), nn.RNNBase("LSTM", 3, 5), nn.LSTM(3, 5))
    assert list(fastrnn.convert(model).converted) == ["3"]
    assert [type(module).__name__ for module in model] == ["LazyLinear", "Identity", "RNNBase", "LSTM"]
    model[0](torch.randn(2, 6))
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("function", [fastrnn.convert, fastrnn.revert])
def test_what_is_not_a_module_is_refused(function):
    with pytest.raises(TypeError, match=rf"fastrnn.{function.__name__}: model must be a torch.nn.Module, got a list"):
        function([nn.LSTM(3, 5)])


# ---- to_torch ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_to_torch_shares_the_parameters(name):
    ours, theirs = both(name, 3, 5)
    stock = ours.to_torch()
    assert type(stock) is getattr(nn, name)
    assert repr(stock) == repr(theirs)
    assert stock.state_dict().keys() == theirs.state_dict().keys()
    for key, parameter in ours.named_parameters():
        assert dict(stock.named_parameters())[key] is parameter
    assert torch.equal(first(stock(an_input(name))), first(theirs(an_input(name))))
    with torch.no_grad():
        next(ours.parameters()).zero_()
    assert not next(stock.parameters()).any()
    stock.register_forward_hook(lambda *_: None)
    stock.weight_new = nn.Parameter(torch.zeros(1))
    assert not ours._forward_hooks
    assert "weight_new" not in dict(ours.named_parameters())
    assert type(ours) is getattr(fastrnn, name)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_to_torch_can_be_scripted_and_quantized(name):
    ours = getattr(fastrnn, name)(3, 5)
    holder = nn.Sequential(ours.to_torch())  # the forward of torch.nn has overloads: it is scripted as a submodule
    assert_close(torch.jit.script(holder)(an_input(name))[0], ours(an_input(name))[0])
    quantized = torch.ao.quantization.quantize_dynamic(holder, {getattr(nn, name)})
    assert type(quantized[0]).__module__.startswith("torch.ao.nn.quantized")


def test_to_torch_of_a_parametrized_module_shares_the_parametrization():
    ours = fastrnn.GRU(3, 5)
    parametrizations.weight_norm(ours, "weight_hh_l0")
    stock = ours.to_torch()
    assert not isinstance(stock, fastrnn.GRU)
    assert isinstance(stock, nn.GRU)
    assert stock.parametrizations is ours.parametrizations
    assert_close(first(stock(an_input("GRU"))), first(ours(an_input("GRU"))))


def test_to_torch_of_a_compiled_module_runs_torchs_code():
    ours = fastrnn.GRU(3, 5)
    ours.compile(backend="eager")
    stock = ours.to_torch()
    assert stock._compiled_call_impl is None
    assert_close(first(stock(an_input("GRU"))), first(nn.GRU.forward(stock, an_input("GRU"))))


def test_to_torch_of_a_subclass_is_refused():
    with pytest.raises(TypeError, match=r"fastrnn.to_torch: the class must be fastrnn's own, got the subclass .*OwnFu"):
        OwnFused(3, 5).to_torch()


def test_traced_graph_of_fx_is_converted(model):
    expected = model(tokens())
    graph = torch.fx.symbolic_trace(model)
    assert len(fastrnn.convert(graph).converted) == len(NAMES_IN_TAGGER)
    assert_close(graph(tokens()), expected)


@pytest.mark.parametrize("value", [0.5, nn.Dropout(0.5), nn.Parameter(torch.ones(2))], ids=lambda v: type(v).__name__)
@pytest.mark.parametrize("option", ["zoneout", "recurrent_dropout", "weight_dropout"])
@pytest.mark.parametrize("name", LAYERS)
def test_attributes_with_the_names_of_options_are_left_alone(name, option, value):
    module, x = getattr(nn, name)(3, 5), an_input(name)
    setattr(module, option, value)
    expected = first(module(x))
    done = fastrnn.convert(module)
    assert done.left == {"": f"its {option} would be an option of fastrnn.{name}"}
    assert type(module) is getattr(nn, name)
    assert torch.equal(first(module(x)), expected)
