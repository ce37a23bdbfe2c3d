# SPDX-License-Identifier: BSD-3-Clause
"""What torch.nn's own modules do where fastrnn's do better: the middle column of docs/compatibility.md. A test here
that fails says that the page is out of date."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.func import functional_call, grad, vmap
from torch.nn.utils import _per_sample_grad
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.flop_counter import FlopCounterMode
from twins import LAYERS, NAMES, an_input, both, first

import fastrnn

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*torch.jit.script:DeprecationWarning",
    "ignore:.*LeafSpec:FutureWarning",
    "ignore:The tensor attributes:UserWarning",
    "ignore:There is a performance drop because we have not yet implemented the batching rule:UserWarning",
)


class Head(nn.Module):
    """A stock layer with something behind it."""

    def __init__(self, name: str, **options: object) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = getattr(nn, name)(4, 5, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0].relu()


@pytest.mark.parametrize("name", LAYERS)
def test_export_fixes_the_length(name: str) -> None:
    with pytest.raises(Exception, match=r"(?s)T.*(specialized|constant|Constraints violated)"):
        torch.export.export(Head(name), (torch.randn(5, 3, 4),), dynamic_shapes=({0: Dim("T", min=2), 1: Dim("B")},))


@pytest.mark.parametrize("name", LAYERS)
def test_decomposition_of_an_exported_program_loses_dropout(name: str) -> None:
    model = Head(name, num_layers=2, dropout=0.5).train()
    x = torch.randn(5, 3, 4)
    program = torch.export.export(model, (x,)).run_decompositions()
    assert torch.equal(program.module()(x), program.module()(x))
    assert not torch.equal(model(x), model(x))


@pytest.mark.parametrize("name", LAYERS)
def test_compile_refuses_layers(name: str) -> None:
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="RNN, GRU, or LSTM"):
        torch.compile(Head(name), backend="eager", fullgraph=True)(torch.randn(5, 3, 4))


def test_compiled_training_of_a_float32_lstm_fails() -> None:
    torch._dynamo.reset()
    with fastrnn.fullgraph(), pytest.raises(Exception, match="tensors_saved_with_vc_check"):
        torch.compile(Head("LSTM"), backend="aot_eager", fullgraph=True)(torch.randn(5, 3, 4))


def test_autocast_in_a_compiled_lstm_that_trains_fails_for_both() -> None:
    """In a compiled region under autocast torch.nn's own code runs in either library."""
    for library in (nn, fastrnn):
        torch._dynamo.reset()
        module = library.LSTM(4, 5)
        compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
        with (
            fastrnn.fullgraph(),
            torch.autocast("cpu", torch.bfloat16),
            pytest.raises(Exception, match="tensors_saved_with_vc_check"),
        ):
            compiled(torch.randn(5, 3, 4))


@pytest.mark.parametrize("name", LAYERS)
def test_compile_and_export_refuse_packed_sequences(name: str) -> None:
    packed = pack_sequence([torch.randn(3, 4), torch.randn(2, 4)])

    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = getattr(nn, name)(4, 5)

        def forward(self, data: Tensor, sizes: Tensor) -> Tensor:
            return self.layer(PackedSequence(data, sizes))[0].data

    torch._dynamo.reset()
    with fastrnn.fullgraph(), pytest.raises(Exception, match=r"(?s).+"):
        torch.compile(Packed(), backend="eager", fullgraph=True)(packed.data, packed.batch_sizes)
    with pytest.raises(Exception, match=r"(?s).+"):
        torch.export.export(Packed(), (packed.data, packed.batch_sizes))


@pytest.mark.parametrize("name", NAMES)
def test_vmap_refuses_all_but_two_cells(name: str) -> None:
    module, x = getattr(nn, name)(3, 5), torch.stack([an_input(name)] * 2)
    weights = {key: torch.stack([w.detach()] * 2) for key, w in module.named_parameters()}
    for run in (lambda: vmap(module)(x), lambda: vmap(lambda w: functional_call(module, w, (x[0],)))(weights)):
        if name in ("GRUCell", "RNNCell"):
            assert first(run()).shape[0] == 2
        else:
            with pytest.raises(RuntimeError, match=r"(?s).+"):
                run()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_per_sample_gradients_are_for_the_float32_lstm_alone(name: str, dtype: torch.dtype) -> None:
    module, x = getattr(nn, name)(3, 5, dtype=dtype), torch.stack([an_input(name).to(dtype)] * 2)
    weights = {key: w.detach() for key, w in module.named_parameters()}

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return first(functional_call(module, weights, (x,))).sum()

    if name == "LSTM" and dtype is torch.float32:  # oneDNN's operator has a backward that takes vmap
        assert first(tuple(vmap(grad(loss), (None, 0))(weights, x).values())).shape[0] == 2
        return
    with pytest.raises(RuntimeError, match=r"(?s).+"):
        vmap(grad(loss), (None, 0))(weights, x)


def test_the_c_of_a_batch_of_one_is_broadcast_over_a_packed_batch() -> None:
    x, h, c = PackedSequence(torch.randn(5, 3), torch.tensor([3, 2])), torch.randn(1, 3, 5), torch.randn(1, 1, 5)
    module = nn.LSTM(3, 5)
    assert torch.equal(first(module(x, (h, c))), first(module(x, (h, c.expand(1, 3, 5)))))


@pytest.mark.parametrize("name", LAYERS)
def test_a_deleted_weight_goes_on_counting(name: str) -> None:
    module, x = getattr(nn, name)(3, 5), an_input(name)
    expected = first(module(x))
    del module.weight_hh_l0
    assert torch.equal(first(module(x)), expected)


@pytest.mark.parametrize("name", LAYERS)
def test_call_for_per_sample_grads_takes_layers_but_for_the_float32_lstm(name: str) -> None:
    """torch documents it as not working for any of them. Of fastrnn's modules torch.nn's own code runs there."""
    x = torch.randn(2, 4, 3)
    for module in both(name, 3, 5, batch_first=True):
        call = _per_sample_grad.call_for_per_sample_grads(module, batch_size=2, loss_reduction="sum")
        if name == "LSTM":
            with pytest.raises(RuntimeError, match="Expanded Weights encountered but cannot handle function"):
                call(x)
            continue
        call(x)[0].square().sum().backward()
        for row in range(2):
            expected = torch.autograd.grad(module(x[row])[0].square().sum(), list(module.parameters()))
            for parameter, gradient in zip(module.parameters(), expected, strict=True):
                torch.testing.assert_close(parameter.grad_sample[row], gradient)


def test_operations_are_counted_but_for_the_float32_lstm() -> None:
    """torch's counter has no formula for oneDNN's LSTM."""
    uncounted = []
    for name in NAMES:
        module = getattr(nn, name)(3, 5)
        with FlopCounterMode(display=False) as counter:
            first(module(an_input(name))).sum().backward()
        if counter.get_total_flops() == 0:
            uncounted.append(name)
    assert uncounted == ["LSTM"]


def test_second_derivatives_are_there() -> None:
    """Not a failure: the middle column says yes for derivatives of any order outside of torch.func."""
    for module in (nn.LSTM(3, 5), nn.GRU(3, 5), nn.RNN(3, 5)):
        x = an_input("LSTM").requires_grad_()
        (gradient,) = torch.autograd.grad(first(module(x)).square().sum(), x, create_graph=True)
        assert torch.autograd.grad(gradient.square().sum(), x)[0].any()
