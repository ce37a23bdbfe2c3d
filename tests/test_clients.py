# SPDX-License-Identifier: BSD-3-Clause
"""Programs of other people that hold recurrent modules, run with torch.nn's and with fastrnn's.

sb3-contrib's RecurrentPPO and Lightning must learn the same; quantization and structured pruning, which know torch.nn's
own classes alone, must leave fastrnn's modules as they are. Each is skipped where its package is missing.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from plain_calls import replaced_call
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastrnn
from fastrnn import autograd

KINDS = ("LSTM", "GRU", "RNN")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Thousands of calls on tiny tensors: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def rungs(compiled: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The rung of every call of a fastrnn module in this test."""
    taken: list[str] = []
    route, layer_call = autograd.route, compiled.layer_call

    def recorded(tensors: list[Tensor | None]) -> str:
        taken.append(route(tensors))
        return taken[-1]

    def recorded_call(*arguments: object) -> object:  # the short way, which asks for no rung
        output = layer_call(*arguments)
        taken.extend([] if output is None else ["kernel"])
        return output

    monkeypatch.setattr(autograd, "route", recorded)
    monkeypatch.setattr(compiled, "layer_call", recorded_call)
    monkeypatch.setattr(nn.Module, "_call_impl", replaced_call())
    return taken


def reinforcement_learning() -> tuple[nn.Module, dict[str, list[float]]]:
    """A few updates of RecurrentPPO: its policy, every reward, and every figure that it logs of an update."""
    from sb3_contrib import RecurrentPPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env

    history: dict[str, list[float]] = {"reward": []}

    class Listener(BaseCallback):
        def _on_step(self) -> bool:
            history["reward"] += self.locals["rewards"].tolist()
            return True

        def _on_rollout_start(self) -> None:
            for name, value in self.model.logger.name_to_value.items():
                if name.startswith("train/"):
                    history.setdefault(name, []).append(float(value))

        _on_training_end = _on_rollout_start

    options = {"n_steps": 32, "batch_size": 32, "n_epochs": 2, "seed": 0, "device": "cpu"}
    width = {"lstm_hidden_size": 24, "net_arch": [16]}
    model = RecurrentPPO("MlpLstmPolicy", make_vec_env("CartPole-v1", 2, seed=0), policy_kwargs=width, **options)
    model.learn(3 * 2 * 32, callback=Listener(), log_interval=None)
    return model.policy, history


def test_recurrent_ppo_earns_and_loses_the_same(compiled, rungs, one_thread):
    pytest.importorskip("sb3_contrib", reason="sb3-contrib is not installed")
    policy, expected = reinforcement_learning()
    assert type(policy.lstm_actor) is nn.LSTM
    assert not rungs
    with fastrnn.patch():
        policy, found = reinforcement_learning()
    assert type(policy.lstm_actor) is type(policy.lstm_critic) is fastrnn.LSTM
    assert set(rungs) == {"kernel"}
    assert len(found["reward"]) == 3 * 2 * 32
    assert found["reward"] == expected["reward"]
    assert found.keys() == expected.keys()
    assert len(found["train/loss"]) == len(found["train/value_loss"]) == 3
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, rel=1e-3, abs=1e-5), name


def lightning_run(module: nn.Module, folder: Path) -> tuple[list[float], nn.Module]:
    """Two epochs with validation and gradient clipping; the losses of all steps, and the model of the checkpoint."""
    import pytorch_lightning as lightning

    class Learner(lightning.LightningModule):
        def __init__(self, recurrent: nn.Module) -> None:
            super().__init__()
            self.recurrent, self.head = recurrent, nn.Linear(12, 1)
            self.losses: list[float] = []

        def loss(self, batch: list[Tensor]) -> Tensor:
            x, target = batch
            return (self.head(self.recurrent(x)[0]) - target).square().mean()

        def training_step(self, batch: list[Tensor], _: int) -> Tensor:
            loss = self.loss(batch)
            self.losses.append(loss.item())
            return loss

        def validation_step(self, batch: list[Tensor], _: int) -> None:
            self.log("validation", self.loss(batch))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=0.02)

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 10, 5, generator=generator)
    data = TensorDataset(x, x.cumsum(1)[..., :1].tanh())
    torch.manual_seed(1)
    learner = Learner(module)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=4,
        gradient_clip_val=1.0,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(learner, DataLoader(data, batch_size=16, shuffle=True), DataLoader(data, batch_size=32))
    path = trainer.checkpoint_callback.best_model_path
    loaded = Learner.load_from_checkpoint(path, recurrent=copy.deepcopy(module), weights_only=True)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), learner.parameters(), strict=True))
    return learner.losses, loaded.recurrent


@pytest.mark.filterwarnings("ignore:The '.*dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:The number of training batches")
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_lightning_learns_the_same(kind, tmp_path, compiled, rungs, one_thread):
    pytest.importorskip("pytorch_lightning", reason="pytorch-lightning is not installed")
    made = []
    for library in (nn, fastrnn):
        torch.manual_seed(0)
        made.append(getattr(library, kind)(5, 12, num_layers=2, dropout=0.1, batch_first=True))
    expected, _ = lightning_run(made[0], tmp_path / "torch")
    assert not rungs
    found, loaded = lightning_run(made[1], tmp_path / "fastrnn")
    assert set(rungs) == {"kernel"}
    assert type(loaded) is getattr(fastrnn, kind)
    assert len(found) == 16
    assert found[-1] < 0.8 * found[0]
    assert found == pytest.approx(expected, rel=1e-3)


class Tagger(nn.Module):
    def __init__(self, recurrent: nn.Module) -> None:
        super().__init__()
        self.recurrent, self.head = recurrent, nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recurrent(x)[0])


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor.*deprecated:UserWarning")
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_dynamic_quantization_leaves_our_modules_and_takes_torchs(kind):
    """quantize_dynamic looks for torch.nn's exact classes: it passes over a fastrnn module without a word."""
    quantize = torch.ao.quantization.quantize_dynamic
    torch.manual_seed(0)
    model = Tagger(getattr(fastrnn, kind)(8, 16, bidirectional=True)).eval()
    x = torch.randn(5, 3, 8)
    every = {nn.LSTM, nn.GRU, nn.Linear}
    quantized = quantize(model, every)
    assert type(quantized.recurrent) is getattr(fastrnn, kind)
    assert type(quantized.head) is torch.ao.nn.quantized.dynamic.Linear
    assert torch.equal(quantized.recurrent(x)[0], model.recurrent(x)[0])

    asked = {getattr(fastrnn, kind): torch.ao.quantization.default_dynamic_qconfig}
    with pytest.raises(AssertionError, match=r"only works for nn\.LSTM and nn\.GRU"):
        quantize(model, asked, mapping={getattr(fastrnn, kind): getattr(torch.ao.nn.quantized.dynamic, kind)})

    fastrnn.revert(model)  # the way to a quantized module: torch.nn's class again
    quantized = quantize(model, every)
    assert type(quantized.recurrent) is getattr(torch.ao.nn.quantized.dynamic, kind)
    assert (quantized(x) - model(x)).abs().max() < 0.05


@pytest.mark.filterwarnings("ignore")  # of torchao's own import
def test_torchao_quantizes_what_is_linear_and_leaves_the_kernels(compiled):
    """Without a filter quantize_ takes nn.Linear alone; told to take an LSTM, it refuses torch.nn's as it does ours."""
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    config = quantization.Int8WeightOnlyConfig()
    for library in (nn, fastrnn):
        torch.manual_seed(0)
        model = Tagger(library.LSTM(8, 16, bidirectional=True)).eval()
        x = torch.randn(5, 3, 8)
        expected = model(x)
        with pytest.raises(AssertionError):
            quantization.quantize_(model, config, filter_fn=lambda module, _: isinstance(module, nn.LSTM))
        quantization.quantize_(model, config)
        assert type(model.head.weight) is not nn.Parameter
        assert type(model.recurrent.weight_hh_l0) is nn.Parameter
        assert (model(x) - expected).abs().max() < 0.05
    assert fastrnn.explain(model.recurrent, x).startswith("fastrnn.LSTM -> kernel")


def pruned(model: nn.Module) -> nn.Module:
    """The model without the first unit of its LSTM."""
    pruner = pytest.importorskip("torch.ao.pruning._experimental.pruner", reason="this torch has no structured pruning")

    class First(pruner.BaseStructuredSparsifier):
        def update_mask(self, module, tensor_name, **_):
            getattr(module.parametrizations, tensor_name)[0].mask.data.view(4, -1)[:, 0] = False

    sparsifier = First({})
    sparsifier.prepare(model, [{"tensor_fqn": f"recurrent.weight_{kind}_l0"} for kind in ("ih", "hh")])
    sparsifier.enable_mask_update = True
    sparsifier.step()
    return sparsifier.prune()


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
def test_structured_pruning_refuses_our_modules_and_takes_torchs():
    """torch's pruner knows modules by their exact class; what it made smaller can be converted again."""
    torch.manual_seed(0)
    model, x = Tagger(fastrnn.LSTM(8, 32)), torch.randn(5, 3, 8)
    with pytest.raises(Exception, match="still contains FakeStructuredSparsity"):
        pruned(copy.deepcopy(model))
    fastrnn.revert(model)
    smaller = pruned(model)
    assert smaller.recurrent.hidden_size == 31
    expected = smaller(x)
    assert fastrnn.convert(smaller).converted
    torch.testing.assert_close(smaller(x), expected)
