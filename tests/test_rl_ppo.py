# SPDX-License-Identifier: BSD-3-Clause
"""examples/rl_ppo.py in tiny runs: both ways to treat the ends of episodes give the same numbers."""

from __future__ import annotations

import types

import pytest
import torch
from load_example import load_example

import fastrnn

TINY = ["--steps", "800", "--envs", "4", "--rollout", "50", "--hidden", "16", "--threads", "1", "--minibatches", "2"]


@pytest.fixture(scope="module")
def rl_ppo() -> types.ModuleType:
    return load_example("rl_ppo")


def test_both_ways_learn_the_same(rl_ppo, capsys):
    pytest.importorskip("gymnasium", reason="gymnasium is not installed")
    whole, loop = rl_ppo.main(TINY), rl_ppo.main([*TINY, "--loop"])
    assert len(whole["losses"]) == 4
    assert whole["losses"][:3] == pytest.approx(loop["losses"][:3], rel=1e-3)
    assert whole["return"] > 5
    assert "steps/s" in capsys.readouterr().out


def test_comparison_updates_the_same_policy_in_both_ways(rl_ppo, capsys, monkeypatch):
    pytest.importorskip("gymnasium", reason="gymnasium is not installed")
    losses: dict[type, list[float]] = {fastrnn.LSTM: [], torch.nn.LSTM: []}
    update = rl_ppo.update

    def recorded(policy, *arguments):
        torch.manual_seed(len(losses[type(policy.lstm)]))  # of the minibatches
        losses[type(policy.lstm)].append(update(policy, *arguments))

    monkeypatch.setattr(rl_ppo, "update", recorded)
    figures = rl_ppo.main([*TINY, "--compare", "--repeats", "2"])
    assert figures["whole"] > 0 < figures["loop"]
    assert len(losses[fastrnn.LSTM]) == 3
    assert losses[fastrnn.LSTM] == pytest.approx(losses[torch.nn.LSTM], rel=1e-3, abs=1e-4)
    printed = capsys.readouterr().out
    assert f"{figures['loop'] / figures['whole']:.1f} times" in printed
    assert "LSTM 16, 4 environments, rollouts of 50, 4 epochs of 2 minibatches, threads: 1" in printed


def test_state_is_cut_where_an_episode_begins(rl_ppo):
    torch.manual_seed(0)
    x = torch.randn(9, 3, 2)
    begins = torch.rand(9, 3) < 0.3
    assert begins.any(0).all()
    state = tuple(torch.randn(1, 3, 8) for _ in range(2))
    results = []
    for loop in (False, True):
        torch.manual_seed(1)
        policy = rl_ppo.Policy(8, loop)
        log_p, values, (h, c) = policy(x, state, begins)
        (log_p[..., 0].sum() + values.sum()).backward()
        results.append([log_p, values, h, c, *(parameter.grad for parameter in policy.parameters())])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)
    # a row alone, from its last beginning on, with a state of zeros
    for row in range(3):
        first = int(begins[:, row].nonzero()[-1])
        alone, *_ = policy(x[first:, row : row + 1], policy.first_state(1), torch.zeros(9 - first, 1, dtype=torch.bool))
        torch.testing.assert_close(alone, results[0][0][first:, row : row + 1])


def test_advantages_are_those_of_each_episode_alone(rl_ppo):
    options = rl_ppo.parse_options([])
    collector = rl_ppo.Collector.__new__(rl_ppo.Collector)
    collector.options = options
    torch.manual_seed(0)
    rewards, values = torch.randn(6, 1), torch.randn(6, 1)
    ends = torch.tensor([0, 0, 1, 0, 0, 0]).bool().unsqueeze(1)
    found = collector.advantages(rewards, values, ends, torch.zeros(1))
    for part in (slice(0, 3), slice(3, 6)):
        alone = collector.advantages(rewards[part], values[part], torch.zeros(3, 1).bool(), torch.zeros(1))
        torch.testing.assert_close(found[part], alone)


@pytest.mark.parametrize("options", ["--envs 0", "--lr nan", "--minibatches 17"])
def test_bad_options_are_refused(rl_ppo, options, capsys):
    with pytest.raises(SystemExit) as stop:
        rl_ppo.main(options.split())
    assert stop.value.code == 2
    assert options.split()[0] in capsys.readouterr().err
