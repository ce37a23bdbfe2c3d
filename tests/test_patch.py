# SPDX-License-Identifier: BSD-3-Clause
"""patch(): programs that say torch.nn get fastrnn's modules, and torch.nn is what it was afterwards."""

from __future__ import annotations

import abc
import copy
import inspect
import pickle
import subprocess
import sys
import threading

import pytest
import torch
from torch import nn
from torch.nn import GRU as EarlyGru  # noqa: N811  as programs have it
from torch.nn import LSTM as EarlyLstm  # noqa: N811
from torch.nn.utils import skip_init
from twins import LAYERS, NAMES, an_input, first

import fastrnn

STOCK = {name: getattr(nn, name) for name in NAMES}


class EarlySubclass(nn.LSTM):
    """Defined before any block, as a library's would be."""


@pytest.fixture(autouse=True)
def _torch_is_restored():
    holders = (nn, nn.modules, nn.modules.rnn, *STOCK.values())
    before = [dict(vars(holder)) for holder in holders]
    yield
    for holder, names in zip(holders, before, strict=True):
        changed = {name for name, value in vars(holder).items() if names.get(name) is not value}
        assert changed <= {"__annotations__"}, holder  # torch.jit.script gives a class some


@pytest.mark.parametrize("name", NAMES)
def test_every_way_to_a_class_builds_fastrnns_module(name):
    torch.manual_seed(7)
    expected = getattr(fastrnn, name)(3, 5)
    with fastrnn.patch():
        for cls in (getattr(nn, name), getattr(nn.modules, name), getattr(nn.modules.rnn, name), STOCK[name]):
            torch.manual_seed(7)
            built = cls(3, hidden_size=5)
            assert type(built) is getattr(fastrnn, name)
            assert torch.equal(first(built(an_input(name))), first(expected(an_input(name))))
    assert type(built) is getattr(fastrnn, name)
    assert type(getattr(nn, name)(3, 5)) is STOCK[name]
    assert getattr(nn, name) is STOCK[name]
    assert torch.equal(first(built(an_input(name))), first(expected(an_input(name))))


@pytest.mark.parametrize("name", NAMES)
def test_isinstance_and_class_comparisons_hold_in_the_block(name):
    stock, other = STOCK[name](3, 5), nn.Linear(3, 5)
    with fastrnn.patch():
        cls = getattr(nn, name)
        built = cls(3, 5)
        for module in (built, stock):
            assert isinstance(module, cls)
            assert isinstance(module, (nn.Linear, cls))
            assert isinstance(module, STOCK[name])
            assert type(module) == cls  # noqa: E721  the idiom that must work
            assert type(module) in (nn.Linear, cls)
            assert issubclass(type(module), cls)
        assert {cls: "found"}[type(built)] == "found"
        assert not isinstance(other, cls)
        assert type(other) not in (cls,)
        assert issubclass(cls, (nn.RNNBase, nn.RNNCellBase))
        assert issubclass(cls, nn.Module)
        assert inspect.isclass(cls)
        assert cls.__name__ == name


def test_subclass_from_before_the_block_is_an_instance_and_works():
    with fastrnn.patch():
        module = EarlySubclass(3, 5)
        assert isinstance(module, nn.LSTM)
        assert type(module) is EarlySubclass
        assert not isinstance(module, fastrnn.LSTM)
        module(an_input("LSTM"))


def test_class_defined_in_the_block_inherits_from_fastrnns():
    with fastrnn.patch():

        class Doubled(nn.LSTM, abc.ABC):
            kind = "doubled"

            def __init__(self, *sizes: int) -> None:
                super().__init__(*sizes, batch_first=True)

            def forward(self, x, hx=None):
                y, state = super().forward(x, hx)
                return 2 * y, state

        built = Doubled(3, 5)
    assert Doubled.__mro__[:2] == (Doubled, fastrnn.LSTM)
    assert abc.ABC in Doubled.__mro__
    assert built.kind == "doubled"
    assert torch.equal(built(an_input("LSTM"))[0], 2 * fastrnn.LSTM.forward(built, an_input("LSTM"))[0])
    built = Doubled(3, 5)  # the class stays what it is after the block
    assert isinstance(built, fastrnn.LSTM)


def test_name_kept_from_the_block_means_torchs_class_afterwards():
    with fastrnn.patch():
        from torch.nn import RNN as KEPT
    assert type(KEPT(3, 5)) is nn.RNN
    assert isinstance(fastrnn.RNN(3, 5), KEPT)

    class Later(KEPT):
        pass

    assert Later.__mro__[1] is nn.RNN


def test_pickles_made_in_the_block_load_outside():
    stock = nn.GRU(3, 5)
    with fastrnn.patch():
        built = nn.Sequential(nn.LSTM(3, 5), EarlyGru(3, 5))
        pickled = [pickle.dumps(thing) for thing in (built, stock, nn.LSTM, copy.deepcopy(built))]
        assert type(pickle.loads(pickled[1])) is EarlyGru
        assert pickle.loads(pickled[2]) is nn.LSTM
    loaded = [pickle.loads(text) for text in pickled]
    assert [type(module) for module in loaded[0]] == [fastrnn.LSTM, fastrnn.GRU]
    assert [type(module) for module in loaded[3]] == [fastrnn.LSTM, fastrnn.GRU]
    assert type(loaded[1]) is nn.GRU
    assert loaded[2] is nn.LSTM


def test_pickle_from_the_block_loads_in_another_process(tmp_path):
    with fastrnn.patch():
        torch.save(nn.Sequential(nn.LSTM(3, 5)), tmp_path / "model.pt")
    code = f"import torch; m = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False); print(type(m[0]))"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "<class 'fastrnn.modules.LSTM'>\n", done.stderr


def test_blocks_nest_and_survive_exceptions():
    with fastrnn.patch():
        with pytest.raises(RuntimeError, match="inside"), fastrnn.patch():
            raise RuntimeError("inside")
        assert type(nn.LSTM(3, 5)) is fastrnn.LSTM
    assert type(nn.LSTM(3, 5)) is EarlyLstm
    with pytest.raises(ValueError, match="greater than zero"), fastrnn.patch():
        nn.LSTM(3, 0)
    assert type(nn.LSTM(3, 5)) is EarlyLstm


def test_works_as_a_decorator_that_may_call_itself():
    @fastrnn.patch()
    def build(depth: int) -> list[nn.Module]:
        """What the wrapped function says."""
        return [nn.GRU(3, 5), *(build(depth - 1) if depth else []), EarlyGru(3, 5)]

    assert build.__doc__ == "What the wrapped function says."
    for _ in range(2):
        assert {type(module) for module in build(2)} == {fastrnn.GRU}
    assert type(EarlyGru(3, 5)) is nn.GRU


def test_blocks_of_several_threads_may_overlap():
    opened, leave = threading.Event(), threading.Event()

    def other() -> None:
        with fastrnn.patch():
            opened.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with fastrnn.patch():
        thread.start()
        opened.wait(10)
    assert type(nn.LSTM(3, 5)) is fastrnn.LSTM
    leave.set()
    thread.join()
    assert type(nn.LSTM(3, 5)) is EarlyLstm


@pytest.mark.parametrize("name", NAMES)
def test_constructors_accept_and_refuse_the_same_in_the_block(name):
    with fastrnn.patch():
        assert inspect.signature(getattr(nn, name)) == inspect.signature(getattr(fastrnn, name))
        assert type(skip_init(getattr(nn, name), 3, 5)) is getattr(fastrnn, name)
        for cls in (getattr(nn, name), STOCK[name]):
            with pytest.raises(TypeError):
                cls()
            with pytest.raises(TypeError):
                cls(3, 5, unknown=1)


@pytest.mark.parametrize("name", LAYERS)
def test_copies_of_stock_modules_stay_stock(name):
    stock = STOCK[name](3, 5)
    with fastrnn.patch():
        assert type(copy.deepcopy(stock)) is STOCK[name]
        fastrnn.convert(stock)
        assert type(stock) is getattr(fastrnn, name)
        fastrnn.revert(stock)
        assert type(stock) is STOCK[name]
        assert type(getattr(fastrnn, name)(3, 5).to_torch()) is STOCK[name]


@pytest.mark.parametrize("name", LAYERS)
def test_names_of_options_are_a_programs_own_in_its_subclasses(name):
    """Code for torch.nn may call its attributes as fastrnn calls its options, or its methods."""
    x = torch.randn(4, 2, 3)
    with fastrnn.patch():

        class Dropping(getattr(nn, name)):
            def __init__(self, *sizes: int, weight_dropout: float = 0.5) -> None:
                super().__init__(*sizes)
                self.weight_dropout, self.zoneout = weight_dropout, 0.1
                self.recurrent_dropout = nn.Dropout(0.5)
                self._layer, self._stack, self._gates = nn.Linear(2, 2), [], 7

        module = Dropping(3, 5)
    assert isinstance(module, getattr(fastrnn, name))
    assert (module.weight_dropout, module.zoneout, module._gates) == (0.5, 0.1, 7)
    assert isinstance(module.recurrent_dropout, nn.Dropout)
    stock = STOCK[name](3, 5)
    stock.load_state_dict({key: value for key, value in module.state_dict().items() if key in stock.state_dict()})
    expected = first(stock(x))
    lengths = torch.tensor([4, 4])
    for found in (module(x), module(x, lengths=lengths), torch.vmap(module)(x[None])):
        torch.testing.assert_close(first(found).reshape(expected.shape), expected)
    assert fastrnn.explain(module, x).partition(" -> ")[2].startswith("kernel")
    assert "zoneout" not in repr(module)


def test_options_of_fastrnns_own_classes_hold_in_the_block():
    with fastrnn.patch():
        assert nn.GRU(3, 5, zoneout=0.25).zoneout == 0.25
        assert "zoneout=0.25" in repr(nn.GRU(3, 5, zoneout=0.25))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", NAMES)
def test_modules_are_scripted_in_the_block_as_outside(name):
    x = an_input(name)
    module = getattr(fastrnn, name)(3, 5)
    with fastrnn.patch():
        scripted = torch.jit.script(nn.Sequential(module))
    torch.testing.assert_close(first(scripted(x)), first(module(x)))
