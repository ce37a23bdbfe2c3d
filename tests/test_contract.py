# SPDX-License-Identifier: BSD-3-Clause
"""What programs rely on in torch.nn's modules beside the numbers: construction, attributes, saving, seeds, weights that
are replaced, and what autograd, autocast, torch.func and tracing do with a module."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, skip_init
from torch.nn.utils.rnn import pack_sequence
from twins import CELLS, CLASSES, like, random_state, tensors_of, training_step, twins

import fastrnn

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")

LAYERS = ("LSTM", "GRU", "RNN")
STEPS = ("LSTMCell", "GRUCell", "RNNCell")
NAMES = LAYERS + STEPS


def both(name: str, *sizes: int, **options: object) -> tuple[nn.Module, nn.Module]:
    """(ours, torch's) from the same seed."""
    made = []
    for library in (fastrnn, nn):
        torch.manual_seed(7)
        made.append(getattr(library, name)(*sizes, **options))
    return made[0], made[1]


def an_input(name: str, features: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(*((2,) if name in STEPS else (4, 2)), features, generator=generator)


def first(output: object) -> torch.Tensor:
    return tensors_of(output)[0]


# --- construction ---------------------------------------------------------------------------------------------------


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
    assert [n for n, p in parameters.items() if p.kind is not inspect.Parameter.VAR_KEYWORD] == expected.split()


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
]  # fmt: skip


@pytest.mark.parametrize("mistake", SEQUENCE_MISTAKES, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_constructor_accepts_and_refuses_what_torch_does(name, mistake):
    options = {"input_size": 3, "hidden_size": 5} | mistake
    expected, found = (outcome(getattr(library, name), options) for library in (nn, fastrnn))
    assert found == expected


def outcome(make: type[nn.Module], options: dict) -> object:
    """The repr of the module that is made, or the type of the error."""
    try:
        return repr(make(**options))
    except Exception as error:
        return type(error)


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


# --- attributes, parameters, saving ---------------------------------------------------------------------------------

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


# --- dropout --------------------------------------------------------------------------------------------------------


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


# --- weights that are replaced --------------------------------------------------------------------------------------


def weight_norm_hook(module, name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(module, name)


def random_mask(module, name):
    mask = torch.randint(0, 2, getattr(module, name).shape, generator=torch.Generator().manual_seed(1))
    prune.custom_from_mask(module, name, mask)


def double_it(module, name):
    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight

    parametrize.register_parametrization(module, name, Double())


def weight_drop(module, name):
    raw = nn.Parameter(getattr(module, name).detach().clone())
    delattr(module, name)
    module.register_parameter(name + "_raw", raw)
    setattr(module, name, raw * 0.5)


def shadow(module, name):
    module.__dict__[name] = getattr(module, name) * 3


def swap_entry(module, name):
    module._parameters[name] = nn.Parameter(getattr(module, name).detach() * 3)


def assign(module, name):
    setattr(module, name, nn.Parameter(getattr(module, name).detach() * 3))


def change_data(module, name):
    getattr(module, name).data.copy_(getattr(module, name).detach() * 3)


REPLACEMENTS = [
    weight_norm_hook,
    parametrizations.weight_norm,
    parametrizations.orthogonal,
    random_mask,
    double_it,
    weight_drop,
    shadow,
    swap_entry,
    assign,
    change_data,
]


@pytest.mark.parametrize("replace", REPLACEMENTS, ids=lambda replace: replace.__name__)
@pytest.mark.parametrize("name", NAMES)
def test_replaced_weight_is_seen_at_the_next_call(name, replace):
    pair = both(name, 3, 5)
    x = an_input(name)
    before = first(pair[0](x)).detach()
    results = []
    for module in pair:
        torch.manual_seed(3)  # orthogonal draws
        replace(module, "weight_hh" if name in STEPS else "weight_hh_l0")
        replace(module, "weight_ih" if name in STEPS else "weight_ih_l0")
        output = module(x)
        sum(tensor.square().sum() for tensor in tensors_of(output)).backward()
        results.append([*tensors_of(output), *(p.grad for p in module.parameters() if p.grad is not None)])
    assert len(results[0]) > 3 or replace is weight_drop
    torch.testing.assert_close(*results)
    if replace not in (weight_norm_hook, parametrizations.weight_norm):
        assert not torch.allclose(before, first(results[0]), atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_spectral_norm_works(name):
    ours, plain = both(name, 3, 5)[0], both(name, 3, 5)[0]
    weight = "weight_hh" if name in STEPS else "weight_hh_l0"
    parametrizations.spectral_norm(ours, weight, n_power_iterations=30)
    ours.eval()  # in training every look at the weight changes it
    normed = getattr(ours, weight)
    assert torch.linalg.matrix_norm(normed, 2) < 1.01
    getattr(plain, weight).data.copy_(normed)
    assert torch.equal(first(ours(an_input(name))), first(plain(an_input(name))))


@pytest.mark.parametrize("name", NAMES)
def test_functional_call_uses_the_given_weights(name):
    pair = both(name, 3, 5)
    generator = torch.Generator().manual_seed(4)
    other = {n: torch.randn(p.shape, generator=generator) for n, p in pair[0].named_parameters()}
    x, results = an_input(name), []
    for module in pair:
        own = first(module(x)).detach()
        leaves = {n: tensor.clone().requires_grad_() for n, tensor in other.items()}
        output = torch.func.functional_call(module, leaves, (x,))
        sum(tensor.sum() for tensor in tensors_of(output)).backward()
        results.append([*tensors_of(output), *(leaf.grad for leaf in leaves.values())])
        assert torch.equal(first(module(x)), own)
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("cell", CELLS)
def test_tied_weights_collect_their_gradients(cell):
    results = []
    for module in twins(cell, 9, 9, 2):
        for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            setattr(module, f"{kind}_l1", getattr(module, f"{kind}_l0"))
        results.append(training_step(module, torch.randn(4, 2, 9, generator=torch.Generator().manual_seed(3))))
        assert len(list(module.parameters())) == 4
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("cell", CELLS)
def test_tied_directions_collect_their_gradients(cell):
    results = []
    for module in twins(cell, 3, 9, bidirectional=True):
        module.weight_hh_l0_reverse = module.weight_hh_l0
        module.weight_ih_l0_reverse = module.weight_ih_l0
        results.append(training_step(module, torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(3))))
    torch.testing.assert_close(*results)


# --- autograd -------------------------------------------------------------------------------------------------------


def scalar(outputs: list[torch.Tensor]) -> torch.Tensor:
    return sum((k + 1) * tensor.square().sum() for k, tensor in enumerate(outputs))


@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 1), (1, 2)], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_gradients_with_some_outputs_used(cell, used):
    results = []
    for module in twins(cell, 3, 9, bidirectional=True):
        generator = torch.Generator().manual_seed(3)
        x = torch.randn(4, 2, 3, generator=generator).requires_grad_()
        hx = like(random_state(cell, 2, 2, H=9), lambda t: t.requires_grad_())
        outputs = tensors_of(module(x, hx))
        if max(used) >= len(outputs):
            pytest.skip("no cell state")
        scalar([outputs[k] for k in used]).backward()
        results.append([x.grad, *(h.grad for h in tensors_of(hx)), *(p.grad for p in module.parameters())])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("wanted", ["x", "h0", "weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0_reverse"])
@pytest.mark.parametrize("cell", CELLS)
def test_gradient_of_one_tensor_alone(cell, wanted):
    results = []
    for module in twins(cell, 3, 9, bidirectional=True):
        module.requires_grad_(False)
        x = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(3))
        hx = random_state(cell, 2, 2, H=9)
        leaf = {"x": x, "h0": tensors_of(hx)[0]}.get(wanted)
        leaf = module.get_parameter(wanted) if leaf is None else leaf
        leaf.requires_grad_()
        scalar(tensors_of(module(x, hx))).backward()
        results.append(leaf.grad)
        others = [p for p in module.parameters() if p is not leaf]
        assert all(p.grad is None for p in others)
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_requires_grad_where_nothing_was_asked(name):
    ours, _ = both(name, 3, 5)
    x = an_input(name)
    assert first(ours(x)).requires_grad
    with torch.no_grad():
        assert not first(ours(x)).requires_grad
    with torch.inference_mode():
        assert first(ours(x)).is_inference()
    ours.requires_grad_(False)
    assert not first(ours(x)).requires_grad
    assert first(ours(x.requires_grad_())).requires_grad


@pytest.mark.parametrize("cell", CELLS)
def test_change_of_a_saved_tensor_is_noticed(cell):
    ours, _ = twins(cell, 3, 9)
    with torch.no_grad():
        for change in ("x", "weight_hh_l0", "h0"):
            x, hx = torch.randn(4, 2, 3), random_state(cell, 1, 2, H=9)
            with torch.enable_grad():
                y, _ = ours(x, hx)
            {"x": x, "h0": tensors_of(hx)[0], "weight_hh_l0": ours.weight_hh_l0}[change].add_(1)
            with torch.enable_grad(), pytest.raises(RuntimeError, match="modified by an inplace operation"):
                y.sum().backward()


@pytest.mark.parametrize("name", NAMES)
def test_backward_twice_needs_retain_graph(name):
    ours, _ = both(name, 3, 5)
    loss = first(ours(an_input(name))).sum()
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in ours.parameters()]
    loss.backward()
    for gradient, parameter in zip(once, ours.parameters(), strict=True):
        assert torch.equal(2 * gradient, parameter.grad)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=["plain", "deep"])
@pytest.mark.parametrize("name", NAMES)
def test_second_derivatives_are_right(name, options):
    if name in STEPS and options:
        pytest.skip("a cell has no layers")
    sizes = (2, 3)
    torch.manual_seed(0)
    ours = getattr(fastrnn, name)(*sizes, dtype=torch.float64, **options)
    lead = (2,) if name in STEPS else (3, 2)
    x = torch.randn(*lead, 2, dtype=torch.float64, requires_grad=True)
    rows = 4 if options else 1
    h = torch.randn(*((2,) if name in STEPS else (rows, 2)), 3, dtype=torch.float64, requires_grad=True)
    hx = (lambda h: (h, 0.5 * h)) if "LSTM" in name else (lambda h: h)
    weights = dict(ours.named_parameters())

    def run(x, h, *values):
        return tuple(tensors_of(torch.func.functional_call(ours, dict(zip(weights, values, strict=True)), (x, hx(h)))))

    arguments = (x, h, *weights.values())
    assert torch.autograd.gradcheck(run, arguments, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, arguments, fast_mode=True)


def test_gradient_penalty_equals_torch_nn():
    for cell in CELLS:
        results = []
        for module in twins(cell, 3, 9, 2):
            x = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(3)).requires_grad_()
            y, _ = module(x)
            (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
            gradient.square().sum().backward()
            results.append([p.grad for p in module.parameters()])
        torch.testing.assert_close(*results, rtol=1e-3, atol=1e-5)


# --- where the kernels do not go ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_autocast_is_torchs(name):
    ours, theirs = both(name, 3, 5)
    x = an_input(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for argument in (x, x.bfloat16()):
            found, expected = ours(argument), theirs(argument)
            for a, b in zip(tensors_of(found), tensors_of(expected), strict=True):
                assert a.dtype is b.dtype
                assert torch.equal(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_meta_device_and_fake_tensors_work(name):
    from torch._subclasses import FakeTensorMode

    ours = getattr(fastrnn, name)(3, 5, device="meta")
    assert first(ours(an_input(name).to("meta"))).device.type == "meta"
    with FakeTensorMode():
        fake = getattr(fastrnn, name)(3, 5)
        first(fake(torch.empty(an_input(name).shape))).sum().backward()
    ours.to_empty(device="cpu")
    torch.manual_seed(7)
    ours.reset_parameters()
    assert torch.equal(first(ours(an_input(name))), first(both(name, 3, 5)[0](an_input(name))))


@pytest.mark.parametrize("name", NAMES)
def test_complex_numbers_work_as_in_torch(name):
    ours, theirs = both(name, 3, 5, dtype=torch.complex64)
    x = an_input(name).to(torch.complex64)
    assert torch.equal(first(ours(x)), first(theirs(x)))


@pytest.mark.parametrize("name", NAMES)
def test_subclass_of_tensor_keeps_its_class(name):
    class Marked(torch.Tensor):
        pass

    ours, theirs = both(name, 3, 5)
    x = an_input(name).as_subclass(Marked)
    assert type(first(ours(x))) is type(first(theirs(x)))
    torch.testing.assert_close(first(ours(x)), first(theirs(x)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_jit_trace_works(name):
    ours, _ = both(name, 3, 5)
    x = an_input(name)
    traced = torch.jit.trace(ours, (x,))
    torch.testing.assert_close(first(traced(2 * x)), first(ours(2 * x)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_torch_func_works(name):
    ours, _ = both(name, 3, 5)
    ours.double()
    x = an_input(name).double()
    weights = dict(ours.named_parameters())

    def loss(values, x):
        return first(torch.func.functional_call(ours, values, (x,))).square().sum()

    tangent = torch.ones_like(x)
    _, forward_mode = torch.func.jvp(lambda x: loss(weights, x), (x,), (tangent,))
    reverse_mode = (torch.func.grad(loss, argnums=1)(weights, x) * tangent).sum()
    torch.testing.assert_close(forward_mode, reverse_mode)
    batch_dim = 0 if name in STEPS else 1
    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, batch_dim))(weights, x)
    whole = torch.func.grad(loss)(weights, x)
    for parameter, gradient in whole.items():
        torch.testing.assert_close(per_sample[parameter].sum(0), gradient)


@pytest.mark.parametrize("name", NAMES)
def test_checkpoint_gives_the_same_gradients(name):
    from torch.utils.checkpoint import checkpoint

    ours, _ = both(name, 3, 5)
    gradients = []
    for run in (ours, lambda x: checkpoint(ours, x, use_reentrant=False)):
        x = an_input(name).requires_grad_()
        first(run(x)).sum().backward()
        gradients.append([x.grad, *(p.grad for p in ours.parameters())])
        ours.zero_grad()
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", LAYERS)
def test_missing_extension_leaves_torchs_numbers(name, monkeypatch):
    monkeypatch.setattr(fastrnn.autograd, "_C", None)
    ours, theirs = both(name, 3, 5, num_layers=2, bidirectional=True)
    for x in (an_input(name), pack_sequence([torch.ones(3, 3), torch.ones(1, 3)])):
        for a, b in zip(tensors_of(ours(x)), tensors_of(theirs(x)), strict=True):
            assert torch.equal(a, b)


def test_classes_cover_the_cells():
    assert set(CLASSES.values()) == set(LAYERS)
