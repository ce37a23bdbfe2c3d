# SPDX-License-Identifier: BSD-3-Clause
"""Recurrent PPO in one file: CartPole with its velocities hidden, an LSTM policy, episodes cut inside the rollout.

Without the velocities one observation does not say which way the pole falls, so the policy has to remember. Rollouts
are of a fixed length and hold the ends of episodes; where an episode begins, the state begins anew. The update computes
whole rollouts again, with gradient. The old way is a call of torch.nn.LSTM for every step, to zero the state of those
rows whose episode begins (`--loop`). Here one call with `reset` covers the whole rollout.

    pip install gymnasium
    python examples/rl_ppo.py             # about a minute; solved is a mean return of 400, of at most 500
    python examples/rl_ppo.py --loop      # the old way: the same numbers but for rounding
    python examples/rl_ppo.py --compare   # the time of an update of one rollout, both ways in turn

PPO: Schulman et al. 2017, with the details that CleanRL's recurrent PPO made the common ones: advantages normalised per
minibatch, minibatches of whole rows, an annealed learning rate, orthogonal initial weights.

Shapes in the comments: T steps of a rollout, B environments, H hidden units.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

import fastrnn

State = tuple[Tensor, Tensor]  # (h, c), each [1, B, H]
SOLVED = 400.0  # mean return of the last hundred episodes, as in the description of CartPole-v1's predecessors


class BlindCartPoles:
    """B environments side by side, which show position and angle; an episode that ends is followed by a new one."""

    def __init__(self, count: int, seed: int) -> None:
        import gymnasium

        self.envs = [gymnasium.make("CartPole-v1", disable_env_checker=True) for _ in range(count)]
        self.scores = [0.0] * count
        self.returns: deque[float] = deque(maxlen=100)
        self.first = self._seen([env.reset(seed=seed + k)[0] for k, env in enumerate(self.envs)])

    @staticmethod
    def _seen(observations: list) -> Tensor:
        return torch.tensor([[position, angle] for position, _, angle, _ in observations], dtype=torch.float32)

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Actions [B]; observations [B, 2], rewards [B], and whether they are the first of an episode [B]."""
        observations, rewards, ended = [], [], []
        for k, (env, action) in enumerate(zip(self.envs, actions.tolist(), strict=True)):
            observation, reward, terminated, truncated, _ = env.step(action)
            self.scores[k] += float(reward)
            if terminated or truncated:
                self.returns.append(self.scores[k])
                self.scores[k] = 0.0
                observation, _ = env.reset()
            observations.append(observation)
            rewards.append(float(reward))
            ended.append(terminated or truncated)
        return self._seen(observations), torch.tensor(rewards), torch.tensor(ended)


def linear(inputs: int, outputs: int, gain: float) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


class Policy(nn.Module):
    """Observations -> features -> LSTM -> logits of the two actions, and the value. loop: the old way."""

    def __init__(self, hidden: int, loop: bool) -> None:
        super().__init__()
        self.loop = loop
        self.encoder = nn.Sequential(linear(2, 64, math.sqrt(2)), nn.Tanh())
        self.lstm = (nn if loop else fastrnn).LSTM(64, hidden)
        for name, weight in self.lstm.named_parameters():
            nn.init.zeros_(weight) if "bias" in name else nn.init.orthogonal_(weight)
        self.actor, self.critic = linear(hidden, 2, 0.01), linear(hidden, 1, 1.0)

    def first_state(self, rows: int) -> State:
        return torch.zeros(1, rows, self.lstm.hidden_size), torch.zeros(1, rows, self.lstm.hidden_size)

    def recur(self, x: Tensor, state: State, begins: Tensor) -> tuple[Tensor, State]:
        """The LSTM over [T, B, 64]; where begins [T, B], the state before the step is zero."""
        if not self.loop:
            return self.lstm(x, state, reset=begins)
        outputs = []
        for step, begin in zip(x, begins, strict=True):
            keep = (~begin).to(x.dtype).view(1, -1, 1)
            y, state = self.lstm(step[None], (keep * state[0], keep * state[1]))
            outputs.append(y)
        return torch.cat(outputs), state

    def forward(self, observations: Tensor, state: State, begins: Tensor) -> tuple[Tensor, Tensor, State]:
        """Observations [T, B, 2]; log probabilities [T, B, 2], values [T, B], and the final state."""
        y, state = self.recur(self.encoder(observations), state, begins)
        # One product for both heads: two read y twice, and their two gradients of y would have to be added.
        weight, bias = (torch.cat(both) for both in zip(self.actor.parameters(), self.critic.parameters(), strict=True))
        logits, value = nn.functional.linear(y, weight, bias).split((self.actor.out_features, 1), -1)
        return logits.log_softmax(-1), value.squeeze(-1), state


@dataclass
class Rollout:
    """T steps of B environments, each [T, B] or [T, B, ...]; `begins` belongs to the observation of its step."""

    observations: Tensor
    begins: Tensor
    actions: Tensor
    log_p: Tensor
    values: Tensor
    rewards: Tensor
    advantages: Tensor
    first_state: State

    def rows(self, chosen: Tensor) -> Rollout:
        """The rollout of some of the environments."""
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        state = parts.pop("first_state")
        return Rollout(
            **{name: part[:, chosen] for name, part in parts.items()},
            first_state=(state[0][:, chosen], state[1][:, chosen]),
        )


class Collector:
    """Runs the policy in the environments; remembers where the rollout before has ended."""

    def __init__(self, options: argparse.Namespace, policy: Policy) -> None:
        self.envs = BlindCartPoles(options.envs, options.seed)
        self.policy, self.options = policy, options
        self.observation = self.envs.first
        self.begins = torch.ones(options.envs, dtype=torch.bool)
        self.state = policy.first_state(options.envs)

    @torch.no_grad()
    def rollout(self) -> Rollout:
        first_state, steps = self.state, []
        for _ in range(self.options.rollout):
            log_p, value, self.state = self.policy(self.observation[None], self.state, self.begins[None])
            action = torch.multinomial(log_p[0].exp(), 1).squeeze(1)
            chosen = log_p[0].gather(1, action[:, None]).squeeze(1)
            before, begins = self.observation, self.begins
            self.observation, reward, self.begins = self.envs.step(action)
            steps.append((before, begins, action, chosen, value[0], reward))
        observations, begins, actions, log_p, values, rewards = (torch.stack(part) for part in zip(*steps, strict=True))
        _, next_value, _ = self.policy(self.observation[None], self.state, self.begins[None])
        advantages = self.advantages(rewards, values, torch.cat([begins[1:], self.begins[None]]), next_value[0])
        return Rollout(observations, begins, actions, log_p, values, rewards, advantages, first_state)

    def advantages(self, rewards: Tensor, values: Tensor, ends: Tensor, next_value: Tensor) -> Tensor:
        """Generalised advantage estimation; nothing crosses the end of an episode."""
        gamma, decay = self.options.gamma, self.options.gae_lambda
        rewards = (1 - gamma) * rewards  # so that values lie in [0, 1], and their loss leaves the policy's audible
        advantages, running = torch.zeros_like(rewards), torch.zeros_like(next_value)
        for t in range(len(rewards) - 1, -1, -1):
            goes_on = (~ends[t]).float()
            delta = rewards[t] + gamma * next_value * goes_on - values[t]
            running = delta + gamma * decay * goes_on * running
            advantages[t], next_value = running, values[t]
        return advantages


def loss_of(policy: Policy, part: Rollout, options: argparse.Namespace) -> Tensor:
    """PPO's loss of the rows of one minibatch, which are computed anew from the states that they began with."""
    log_p, values, _ = policy(part.observations, part.first_state, part.begins)
    ratio = (log_p.gather(2, part.actions.unsqueeze(2)).squeeze(2) - part.log_p).exp()
    advantages = (part.advantages - part.advantages.mean()) / (part.advantages.std() + 1e-8)
    clipped = ratio.clamp(1 - options.clip, 1 + options.clip)
    policy_loss = -torch.minimum(advantages * ratio, advantages * clipped).mean()
    targets = part.advantages + part.values
    value_loss = 0.5 * (values - targets).square().mean()
    entropy = -(log_p.exp() * log_p).sum(2).mean()
    return policy_loss + options.value_weight * value_loss - options.entropy_weight * entropy


def update(policy: Policy, optimizer: torch.optim.Optimizer, rollout: Rollout, options: argparse.Namespace) -> float:
    """Several epochs over the rollout in minibatches of whole rows; the last loss."""
    for _ in range(options.epochs):
        for chosen in torch.randperm(options.envs).chunk(options.minibatches):
            loss = loss_of(policy, rollout.rows(chosen), options)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(policy.parameters(), 0.5)
            optimizer.step()
    return loss.item()


def learner(options: argparse.Namespace, loop: bool) -> tuple[Policy, torch.optim.Optimizer]:
    """A policy from the seed, and its optimizer."""
    torch.manual_seed(options.seed)
    policy = Policy(options.hidden, loop)
    # fused: one pass over the weights instead of ten calls for each, which would take a tenth of a short update
    return policy, torch.optim.Adam(policy.parameters(), lr=options.lr, eps=1e-5, fused=True)


def train(options: argparse.Namespace) -> dict[str, float | list[float]]:
    """Trains until solved or out of steps; the figures of the run."""
    policy, optimizer = learner(options, options.loop)
    collector = Collector(options, policy)
    per_update = options.envs * options.rollout
    updates = max(1, options.steps // per_update)
    way = "a call of torch.nn a step" if options.loop else "one call with resets where an episode begins"
    print(f"LSTM {options.hidden}, {options.envs} environments, rollouts of {options.rollout}; {way}")
    losses: list[float] = []
    in_update, start, mean = 0.0, time.perf_counter(), 0.0
    for k in range(updates):
        optimizer.param_groups[0]["lr"] = options.lr * (1 - k / updates)
        rollout = collector.rollout()
        began = time.perf_counter()
        losses.append(update(policy, optimizer, rollout, options))
        in_update += time.perf_counter() - began
        returns = collector.envs.returns
        mean = sum(returns) / max(1, len(returns))
        solved = len(returns) == returns.maxlen and mean >= SOLVED
        if (k + 1) % options.print_every == 0 or solved or k + 1 == updates:
            seconds = time.perf_counter() - start
            made = (k + 1) * per_update
            print(
                f"step {made:7}   return {mean:6.1f}   loss {losses[-1]:7.3f}   {made / seconds:6.0f} steps/s   "
                f"update {1e3 * in_update / (k + 1):6.1f} ms",
                flush=True,
            )
        if solved:
            print(f"solved after {seconds:.0f} s")
            break
    return {"return": mean, "losses": losses, "update_seconds": in_update / len(losses)}


def compare(options: argparse.Namespace) -> dict[str, float]:
    """Times the update of one rollout in both ways, in turn, from the same weights; the median of each in seconds."""
    learners = [learner(options, loop) for loop in (False, True)]
    rollout = Collector(options, learners[0][0]).rollout()
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(1 + options.repeats):
        for (policy, optimizer), taken in zip(learners, seconds, strict=True):
            began = time.perf_counter()
            update(policy, optimizer, rollout, options)
            taken.append(time.perf_counter() - began)
    whole, loop = (sorted(taken[1:])[options.repeats // 2] for taken in seconds)  # the first fetches code and memory
    print(
        f"LSTM {options.hidden}, {options.envs} environments, rollouts of {options.rollout}, "
        f"{options.epochs} epochs of {options.minibatches} minibatches, threads: {torch.get_num_threads()}\n"
        f"update   one call with resets {1e3 * whole:.1f} ms   a call of torch.nn a step {1e3 * loop:.1f} ms   "
        f"{loop / whole:.1f} times"
    )
    return {"whole": whole, "loop": loop}


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options; leaves with a sentence on stderr and status 2 where they make no sense."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    ways = parser.add_mutually_exclusive_group()
    ways.add_argument("--loop", action="store_true", help="the old way: a call of torch.nn.LSTM for every step")
    ways.add_argument("--compare", action="store_true", help="time an update both ways, and train nothing")
    add("--steps", type=int, default=500_000, help="steps of all environments together, at most")
    add("--envs", type=int, default=16, help="B")
    add("--rollout", type=int, default=128, help="T")
    add("--hidden", type=int, default=128, help="H")
    add("--epochs", type=int, default=4)
    add("--minibatches", type=int, default=4)
    add("--lr", type=float, default=0.001)
    add("--gamma", type=float, default=0.99)
    add("--gae-lambda", type=float, default=0.95)
    add("--clip", type=float, default=0.2)
    add("--value-weight", type=float, default=0.5)
    add("--entropy-weight", type=float, default=0.005)
    add("--threads", type=int, default=torch.get_num_threads())
    add("--seed", type=int, default=0)
    add("--print-every", type=int, default=10, help="updates")
    add("--repeats", type=int, default=7, help="of --compare")
    options = parser.parse_args(argv)
    numbers = {name.replace("_", "-"): value for name, value in vars(options).items() if type(value) in (int, float)}
    rules = [
        *((0 < value < math.inf, f"--{name} must be above zero, got {value}") for name, value in numbers.items()
          if name not in {"seed", "entropy-weight"}),
        (options.minibatches <= options.envs, f"--minibatches must be at most --envs, got {options.minibatches}"),
    ]  # fmt: skip
    for holds, message in rules:
        if not holds:
            parser.error(message)
    return options


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the training, or the comparison; its figures."""
    options = parse_options(argv)
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        return compare(options) if options.compare else train(options)
    finally:
        torch.set_num_threads(before)


if __name__ == "__main__":
    main()
    sys.exit(0)
