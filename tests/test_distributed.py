# SPDX-License-Identifier: BSD-3-Clause
"""Two processes over gloo, each with half of the batch: DistributedDataParallel and FSDP2 against one process.

The truth is torch.nn in one process with the whole batch, in float64. All cases run in one pair of processes, which
leave their results in files; the tests look at these.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed
from apart import run_apart
from plain_calls import replaced_call
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastrnn
from fastrnn import autograd

RANKS, STEPS, T, B, I, H = 2, 3, 6, 8, 5, 12  # noqa: E741
WRAPPERS = ("ddp", "fsdp")


class Tagger(nn.Module):
    """Recurrent modules, one above the other, and a linear layer; padded input, or packed to given lengths."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        last = layers[-1]
        self.head = nn.Linear(last.hidden_size * (2 if last.bidirectional else 1), 3)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        if lengths is not None:
            x = pack_padded_sequence(x, lengths, enforce_sorted=False)
        for layer in self.layers:
            x = layer(x)[0]
        if lengths is not None:
            x = pad_packed_sequence(x, total_length=T)[0]
        return self.head(x) + 0.0  # not a view: FSDP2 warns of views


def stock(kind: str) -> Tagger:
    """The model of each case with torch.nn's modules."""
    torch.manual_seed(0)
    if kind == "mixed":
        return Tagger(nn.LSTM(I, H), nn.GRU(H, H, bidirectional=True), nn.RNN(2 * H, H)).double()
    if kind == "packed":
        return Tagger(nn.LSTM(I, H, bidirectional=True)).double()
    return Tagger(getattr(nn, kind.partition("-")[0])(I, H, 2, bidirectional=True)).double()


def ours(kind: str) -> Tagger:
    """The same model on fastrnn; of the mixed one the GRU stays torch.nn's, so that both kinds share buckets."""
    model = copy.deepcopy(stock(kind))
    for layer in model.layers:
        if not (kind == "mixed" and type(layer) is nn.GRU):
            fastrnn.convert(layer)
    return model


KINDS = ("LSTM", "GRU", "RNN", "mixed", "packed")


def batch(kind: str, step: int) -> tuple[Tensor, Tensor | None, Tensor]:
    """Input, lengths and targets of a step: the whole batch."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(T, B, I, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, T + 1, (B,), generator=generator) if kind == "packed" else None
    return x, lengths, torch.randn(T, B, 3, generator=generator, dtype=torch.float64)


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def train(model: nn.Module, kind: str, rows: slice) -> dict[str, Tensor]:
    """A few steps; the loss of every step, every gradient of the last, and the parameters after it."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    results = {}
    for step in range(STEPS):
        x, lengths, target = (None if part is None else part[rows] if part.dim() == 1 else part[:, rows]
                              for part in batch(kind, step))  # fmt: skip
        optimizer.zero_grad()
        loss = (model(x, lengths) - target).square().mean()
        loss.backward()
        optimizer.step()
        results[f"loss {step}"] = loss.detach()
    for name, parameter in model.named_parameters():
        name = name.removeprefix("module.")
        results[f"d {name}"], results[name] = whole(parameter.grad), whole(parameter)
    return results


def wrap(model: Tagger, wrapper: str) -> nn.Module:
    if wrapper == "ddp":
        return DistributedDataParallel(model)
    for layer in model.layers:
        fully_shard(layer)
    return fully_shard(model)


def work(rank: int, folder: Path) -> None:
    """One of the processes: every case, its results saved, with the rungs that its calls took."""
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    rungs: list[str] = []
    route = autograd.route

    def recorded(tensors: list[Tensor | None]) -> str:
        rungs.append(route(tensors))
        return rungs[-1]

    layer_call = autograd._C.layer_call

    def recorded_call(*arguments: object) -> object:  # the short way, which asks for no rung
        output = layer_call(*arguments)
        rungs.extend([] if output is None else ["kernel"])
        return output

    autograd.route, autograd._C.layer_call = recorded, recorded_call
    nn.Module._call_impl = replaced_call()
    group = f"file://{folder}/meeting"
    torch.distributed.init_process_group("gloo", init_method=group, rank=rank, world_size=RANKS)
    share = B // RANKS
    for wrapper in WRAPPERS:
        for kind in KINDS:
            rungs.clear()
            results = train(wrap(ours(kind), wrapper), kind, slice(rank * share, (rank + 1) * share))
            losses = torch.stack([results.pop(f"loss {step}") for step in range(STEPS)])
            torch.distributed.all_reduce(losses)
            results |= {f"loss {step}": loss / RANKS for step, loss in enumerate(losses)}
            torch.save((results, list(rungs)), folder / f"{wrapper}-{kind}-{rank}.pt")
    torch.save(half_precision(rungs), folder / f"half-{rank}.pt")
    torch.save(explained(rank), folder / f"explained-{rank}.pt")
    torch.distributed.destroy_process_group()


def half_precision(rungs: list[str]) -> tuple[Tensor, list[str]]:
    """FSDP2 that gathers the weights in bfloat16: the output of a call, and its rungs."""
    model = ours("LSTM").float()
    for layer in model.layers:
        fully_shard(layer, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    fully_shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32))
    rungs.clear()
    y = model(batch("LSTM", 0)[0].float())
    y.sum().backward()
    return y.detach(), list(rungs)


def explained(rank: int) -> list[str]:
    """What explain says of a sharded module: between calls, and with its weights gathered."""
    layer = fully_shard(fastrnn.LSTM(I, H))
    assert isinstance(layer, FSDPModule)
    x = torch.zeros(T, 1, I)
    sentences = [fastrnn.explain(layer, x)]
    layer.unshard()
    sentences.append(fastrnn.explain(layer, x))
    layer.reshard()
    return sentences


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the two processes have left their results."""
    folder = tmp_path_factory.mktemp("distributed")
    run_apart(work, folder, count=RANKS)
    return folder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_two_processes_equal_one_with_the_joined_batch(wrapper, kind, folder):
    expected = train(stock(kind), kind, slice(None))
    for rank in range(RANKS):
        found, _ = torch.load(folder / f"{wrapper}-{kind}-{rank}.pt")
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-8, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_two_processes_take_the_kernels(wrapper, kind, folder, compiled):
    _, rungs = torch.load(folder / f"{wrapper}-{kind}-0.pt")
    assert rungs == ["kernel"] * STEPS * (2 if kind == "mixed" else 1)


def test_weights_gathered_in_half_precision_take_the_kernels(folder, compiled):
    y, rungs = torch.load(folder / "half-0.pt")
    assert rungs == ["kernel"]
    expected = ours("LSTM")(batch("LSTM", 0)[0])
    assert (y - expected).abs().max() < 0.02  # of about 1; bfloat16 has 8 bits


def test_explain_knows_sharded_weights(folder, compiled):
    between, gathered = torch.load(folder / "explained-0.pt")
    assert between.startswith("fastrnn.LSTM -> torch")
    assert "unshard()" in between
    assert gathered.startswith("fastrnn.LSTM -> kernel")
