# SPDX-License-Identifier: BSD-3-Clause
"""What programs rely on in torch.nn's modules beside the numbers: construction, attributes, initial values, saving,
copies, and dropout from a seed."""

from __future__ import annotations

import copy
import importlib.resources
import inspect
import io
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import skip_init
from twins import (
    CELLS,
    LAYERS,
    NAMES,
    STEPS,
    an_input,
    both,
    first,
    tensors_of,
    twins,
)

import fastrnn


@pytest.mark.parametrize("name", NAMES)
def test_class_is_torchs(name):
    assert issubclass(getattr(fastrnn, name), getattr(nn, name))
    assert getattr(fastrnn, name).__name__ == name


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("LSTM", "input_size hidden_size num_layers bias batch_first dropout bidirectional proj_size device dtype"),
        ("GRU", "input_size hidden_size num_layers bias batch_first dropout bidirectional device dtype"),
        ("RNN", "input_size hidden_size num_layers nonlinearity bias batch_first dropout bidirectional device dtype"),
        ("LSTMCell", "input_size hidden_size bias device dtype"),
        ("GRUCell", "input_size hidden_size bias device dtype"),
        ("RNNCell", "input_size hidden_size bias nonlinearity device dtype"),
    ],
)
def test_signature_names_every_argument_in_torchs_order(name, expected):
    parameters = inspect.signature(getattr(fastrnn, name)).parameters
    kinds = inspect.Parameter
    assert [n for n, p in parameters.items() if p.kind is kinds.POSITIONAL_OR_KEYWORD] == expected.split()
    own = {n for n, p in parameters.items() if p.kind is kinds.KEYWORD_ONLY}
    ours = {"zoneout", "recurrent_dropout", "weight_dropout", "recompute"}
    assert own == (ours if name in LAYERS else set())


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("LSTM", (3, 5, 2, False, True, 0.5, True, 2)),
        ("GRU", (3, 5, 2, False, True, 0.5, True)),
        ("RNN", (3, 5, 2, "relu", False, True, 0.5, True)),
        ("LSTMCell", (3, 5, False)),
        ("GRUCell", (3, 5, False)),
        ("RNNCell", (3, 5, False, "relu")),
    ],
)
def test_positional_arguments_mean_what_they_mean_in_torch(name, arguments):
    ours, theirs = both(name, *arguments)
    assert repr(ours) == repr(theirs)
    assert ours.state_dict().keys() == theirs.state_dict().keys()


SEQUENCE_MISTAKES = [
    {"dropout": None}, {"dropout": "a"}, {"dropout": True}, {"dropout": -0.1}, {"dropout": 1.1},
    {"dropout": float("nan")},
    {"bias": 1}, {"bias": None}, {"batch_first": 0}, {"batch_first": "yes"}, {"input_size": 0}, {"input_size": -1},
    {"input_size": 3.0}, {"hidden_size": 0}, {"hidden_size": 5.0}, {"hidden_size": "5"}, {"num_layers": 0},
    {"num_layers": -1}, {"num_layers": 2.0}, {"proj_size": 2}, {"proj_size": -1}, {"proj_size": 5}, {"proj_size": 0},
    {"nonlinearity": "sigmoid"}, {"unknown": 1}, {"device": "nowhere"}, {"dtype": torch.int64},
    {"bidirectional": 1}, {"num_layers": True}, {"dropout": "0.5", "num_layers": 2},
    {"dropout": None, "bias": 1}, {"bias": 1, "hidden_size": 0}, {"batch_first": None, "input_size": 0},
]  # fmt: skip


@pytest.mark.parametrize("mistake", SEQUENCE_MISTAKES, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_constructor_accepts_and_refuses_what_torch_does(name, mistake):
    options = {"input_size": 3, "hidden_size": 5} | mistake
    expected, found = (outcome(getattr(library, name), options) for library in (nn, fastrnn))
    assert found == expected


def outcome(make: type[nn.Module], options: dict) -> object:
    """The repr of the module that is made, or the type and the words of the error, without the name of a function."""
    try:
        return repr(make(**options))
    except Exception as error:
        return type(error), str(error).rpartition(".__init__() ")[2]


@pytest.mark.parametrize("name", LAYERS)
def test_dropout_with_one_layer_warns(name):
    with pytest.warns(UserWarning, match="dropout option adds dropout after all but last"):
        getattr(fastrnn, name)(3, 5, dropout=0.5)


@pytest.mark.parametrize("name", STEPS)
def test_cells_check_nothing_at_construction(name):
    getattr(fastrnn, name)(3, 5, 0)
    module = getattr(fastrnn, name)(3, 5, "relu")
    assert module.bias == "relu"
    assert module.bias_ih is not None


@pytest.mark.parametrize("name", NAMES)
def test_skip_init_works(name):
    module = skip_init(getattr(fastrnn, name), 3, 5)
    assert repr(module) == repr(getattr(nn, name)(3, 5))
    assert all(parameter.device.type == "cpu" for parameter in module.parameters())


OPTIONS = {
    "LSTM": [
        {},
        {"num_layers": 2, "bidirectional": True},
        {"bias": False, "proj_size": 2},
        {"proj_size": 2, "num_layers": 2},
    ],
    "GRU": [{}, {"num_layers": 2, "bidirectional": True}, {"bias": False, "batch_first": True}],
    "RNN": [{}, {"num_layers": 2, "bidirectional": True, "nonlinearity": "relu", "dropout": 0.5}, {"bias": False}],
    "LSTMCell": [{}, {"bias": False}],
    "GRUCell": [{}, {"bias": False}],
    "RNNCell": [{}, {"bias": False}, {"nonlinearity": "relu"}],
}
VARIANTS = [pytest.param(name, options, id=f"{name}-{options}") for name in NAMES for options in OPTIONS[name]]


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_attributes_parameters_and_initial_bits_are_torchs(name, options):
    ours, theirs = both(name, 3, 5, **options)
    assert repr(ours) == repr(theirs)
    state = ours.__dict__
    for attribute, value in theirs.__dict__.items():
        assert attribute in state, attribute
        if isinstance(value, (int, float, str, bool)):
            assert state[attribute] == value, attribute
    assert state.keys() == theirs.__dict__.keys()
    for (our_name, our_parameter), (their_name, their_parameter) in zip(
        ours.named_parameters(), theirs.named_parameters(), strict=True
    ):
        assert our_name == their_name
        assert torch.equal(our_parameter, their_parameter)
    if name in LAYERS:
        assert ours._flat_weights_names == theirs._flat_weights_names
        assert [[w.shape for w in row] for row in ours.all_weights] == [
            [w.shape for w in row] for row in theirs.all_weights
        ]
        assert ours.flatten_parameters() is None
    else:
        assert (ours.bias_ih is None) == (theirs.bias_ih is None)
    torch.manual_seed(9)
    ours.reset_parameters()
    torch.manual_seed(9)
    theirs.reset_parameters()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_state_dict_goes_both_ways(name, options):
    ours, theirs = both(name, 3, 5, **options)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1)
    assert str(ours.load_state_dict(theirs.state_dict())) == "<All keys matched successfully>"
    x = an_input(name)
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(x), theirs(x))
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.sub_(0.3)
    assert str(theirs.load_state_dict(ours.state_dict())) == "<All keys matched successfully>"
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_copies_are_whole_and_independent(name, options):
    ours, _ = both(name, 3, 5, **options)
    ours.eval()
    x = an_input(name)
    expected = first(ours(x))
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    copies = [pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours), torch.load(buffer, weights_only=False)]
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.zero_()
    for other in copies:
        assert type(other) is type(ours)
        assert repr(other) == repr(ours)
        assert torch.equal(first(other(x)), expected)
        other.double()(x.double())


@pytest.mark.parametrize("name", LAYERS)
def test_pickle_of_an_old_torch_is_read(name):
    ours, _ = both(name, 3, 5)
    state = ours.__getstate__()
    del state["proj_size"]  # was added in PyTorch 1.8
    old = getattr(fastrnn, name).__new__(getattr(fastrnn, name))
    old.__setstate__(state)
    assert torch.equal(first(old(an_input(name))), first(ours(an_input(name))))


@pytest.mark.parametrize("name", NAMES)
def test_module_is_freed_without_the_garbage_collector(name):
    module = getattr(fastrnn, name)(3, 5)
    first(module(an_input(name))).sum().backward()
    reference = weakref.ref(module)
    del module
    assert reference() is None


@pytest.mark.parametrize("name", NAMES)
def test_conversion_by_swapping_parameters_works(name):
    module = getattr(fastrnn, name)(3, 5)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        module.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert first(module(an_input(name).double())).dtype is torch.float64


@pytest.mark.parametrize("name", NAMES)
def test_subclass_of_a_user_works(name):
    class Mine(getattr(fastrnn, name)):
        def forward(self, input, hx=None):
            return super().forward(2 * input, hx)

    torch.manual_seed(7)
    mine, (ours, _) = Mine(3, 5), both(name, 3, 5)
    x = an_input(name)
    assert repr(mine) == repr(ours).replace(name, "Mine")
    assert torch.equal(first(mine(x)), first(ours(2 * x)))


@pytest.mark.parametrize("name", NAMES)
def test_arguments_may_be_named_and_hooks_run(name):
    ours, _ = both(name, 3, 5)
    seen = []
    ours.register_forward_hook(lambda module, arguments, output: seen.append(output))
    x = an_input(name)
    output = ours(input=x, hx=None)
    assert seen == [output]
    assert torch.equal(first(output), first(ours.forward(x)))


@pytest.mark.parametrize("name", ["LSTM", "LSTMCell"])
def test_states_may_be_a_list_or_one_tensor_twice(name):
    ours, theirs = both(name, 3, 5)
    x = an_input(name)
    h = torch.randn(2, 5) if name == "LSTMCell" else torch.randn(1, 2, 5)
    torch.testing.assert_close(ours(x, [h, h]), theirs(x, [h, h]))
    assert type(ours(x, [h, h])) is tuple
    assert name == "LSTMCell" or type(ours(x, [h, h])[1]) is tuple


@pytest.mark.parametrize("options", [{}, {"batch_first": True}, {"bidirectional": True}, {"num_layers": 3}], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_dropout_has_torchs_bits(cell, options):
    """A mask is where the gradient of the input of the second layer is zero; the results agree only if masks do."""
    results = []
    for module in twins(cell, 3, 9, **{"num_layers": 2, "dropout": 0.4} | options):
        torch.manual_seed(21)
        x = torch.randn(5, 6, 3)
        results.append([*tensors_of(module(x)), torch.rand(1)])
    assert torch.equal(results[0][-1], results[1][-1])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cell", CELLS)
def test_dropout_may_be_changed_and_is_off_in_eval(cell):
    ours, theirs = twins(cell, 3, 9, 2, dropout=0.0)
    x = torch.randn(5, 6, 3)
    for p, training in ((0.7, True), (1.0, True), (0.5, False), (0.0, True)):
        results = []
        for module in (ours, theirs):
            module.dropout = p
            module.train(training)
            torch.manual_seed(5)
            results.append([*tensors_of(module(x)), torch.rand(1)])
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
        assert torch.equal(results[0][-1], results[1][-1])


def test_package_is_typed():
    """Checkers of types read the annotations of a package that says so; mypy --strict runs over it in `make lint`."""
    assert (importlib.resources.files("fastrnn") / "py.typed").is_file()
    for name in fastrnn.__all__:
        thing = getattr(fastrnn, name)
        functions = [thing] if inspect.isfunction(thing) else [thing.forward] if name in NAMES else []
        for function in functions + ([thing.__init__] if name in LAYERS else []):
            signature = inspect.signature(function)
            assert signature.return_annotation is not signature.empty
            for parameter in signature.parameters.values():
                assert parameter.name == "self" or parameter.annotation is not parameter.empty, (name, parameter)
