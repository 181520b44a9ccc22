"""Model-predictive path integral control in a latent space. It knows neither a policy nor a critic."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch as th

from modip_sb3.checks import check_at_least, check_count, check_fraction, check_number

PLANNER_ARGUMENTS = ("model", "propose", "terminal_value")  # of MPPI, which are no settings


class LatentModel(Protocol):
    """What the planner needs of a model, as :class:`~modip_sb3.world_model.WorldModel` has it."""

    def rollout(self, latents: th.Tensor, actions: th.Tensor) -> th.Tensor:
        """``(N, Z), (N, H, A) -> (N, H + 1, Z)``"""

    def reward(self, latents: th.Tensor, actions: th.Tensor) -> th.Tensor:
        """``(N, H, Z), (N, H, A) -> (N, H)``"""

    def terminated(self, latents: th.Tensor) -> th.Tensor:
        """``(N, H, Z) -> (N, H)``"""


class Plan(NamedTuple):
    """What a call of :class:`MPPI` returns; every action is in [-1, 1]."""

    actions: th.Tensor
    """The chosen action sequences ``(B, H, A)``."""
    mean: th.Tensor
    """The elites' weighted mean, from which the next call warm-starts ``(B, H, A)``."""
    std: th.Tensor
    """The elites' spread ``(B, H, A)``."""
    value: th.Tensor
    """The score of ``actions`` ``(B,)``."""
    proposal_value: th.Tensor
    """The mean score of the proposals ``(B,)``."""


@dataclass(frozen=True)
class MPPI:
    """
    MPPI (Williams et al., 2015) as in TD-MPC2 (arXiv:2310.16828): candidates are the proposals and sequences drawn
    around the elites' mean; a candidate's score is Σ γ^t r_t + γ^H V(z_H), weighted by the probability of not having
    terminated.

    :param model: the latent model to roll
    :param propose: draws action sequences for the start latents, ``(B, Z) -> (B, n, H, A)`` with ``n >= 1``
    :param terminal_value: values of final latents, ``(N, Z) -> (E, N)``, one row for each ensemble member
    :param num_samples: sequences drawn around the elites' mean in each iteration; 0 only ranks the proposals
    :param num_elites: best candidates that the mean and spread are computed from, or all if there are fewer
    :param num_iterations: refinements of mean and spread
    :param temperature: inverse temperature of the elites' weights; raising it trusts the best candidate more
    :param min_std: lower bound of the search spread, which is also the exploration noise
    :param max_std: upper bound of the search spread, and its start
    :param pessimism: standard deviations of the terminal value's ensemble taken off its mean; with two members 1 is
        their minimum
    :param trust_region: how far, in each action dimension, a candidate may leave the range of the proposals;
        None for anywhere
    :param gamma: discount factor
    """

    model: LatentModel
    propose: Callable[[th.Tensor], th.Tensor]
    terminal_value: Callable[[th.Tensor], th.Tensor]
    num_samples: int = 16
    num_elites: int = 8
    num_iterations: int = 2
    temperature: float = 0.5
    min_std: float = 0.05
    max_std: float = 0.5
    pessimism: float = 1.0
    trust_region: float | None = None
    gamma: float = 0.99

    def __post_init__(self) -> None:
        check_count(0, num_samples=self.num_samples, num_iterations=self.num_iterations)
        check_count(1, num_elites=self.num_elites)
        check_at_least(0, temperature=self.temperature, min_std=self.min_std, max_std=self.max_std)
        check_number(pessimism=self.pessimism)
        if self.trust_region is not None:
            check_at_least(0, trust_region=self.trust_region)
        check_fraction(gamma=self.gamma)
        if self.min_std > self.max_std:
            raise ValueError(
                f"The planner needs min_std <= max_std, but got {self.min_std} and {self.max_std}; raise the latter."
            )

    @th.no_grad()
    def plan(self, latents: th.Tensor, warm_start: th.Tensor | None = None, deterministic: bool = False) -> Plan:
        """
        :param latents: start states ``(B, Z)``
        :param warm_start: mean to search around first, the shifted one of the last plan ``(B, H, A)``; None, or NaN
            for single states, starts from the proposals' elites
        :param deterministic: choose the best of all candidates, with noise that is the same in every call and for every
            state; otherwise an elite is drawn by its weight and perturbed by the search spread
        :return: the plan; with ``deterministic`` it scores no worse than the best proposal
        """
        generator = th.Generator(latents.device).manual_seed(0) if deterministic else None
        proposals = self.propose(latents)  # (B, n, H, A)
        low, high = self._bounds(proposals)
        proposal_values = self.evaluate(latents, proposals)
        elites, elite_values = self._select_elites(proposals, proposal_values)
        best, best_value = elites[:, 0], elite_values[:, 0]
        mean, std = self._fit(elites, elite_values)
        if self.num_samples > 0 and self.num_iterations > 0:
            if warm_start is not None:
                mean = th.where(warm_start.isnan(), mean, warm_start)
            std = th.full_like(mean, self.max_std)
            for _ in range(self.num_iterations):
                samples = mean[:, None] + std[:, None] * self._noise(mean, self.num_samples, generator)
                samples = th.maximum(th.minimum(samples, high[:, None]), low[:, None])
                candidates = th.cat([proposals, samples], dim=1)
                values = th.cat([proposal_values, self.evaluate(latents, samples)], dim=1)
                elites, elite_values = self._select_elites(candidates, values)
                better = elite_values[:, 0] > best_value
                best = th.where(better[:, None, None], elites[:, 0], best)
                best_value = th.where(better, elite_values[:, 0], best_value)
                mean, std = self._fit(elites, elite_values)
        if not elite_values.isfinite().all():
            raise FloatingPointError(
                "The planner's scores are not finite: the networks have diverged, or the observation was not finite; "
                "go back to an earlier checkpoint or model, and lower learning_rate."
            )
        if not deterministic:
            chosen = th.multinomial(self._weights(elite_values), 1)  # (B, 1)
            best_value = elite_values.gather(1, chosen).squeeze(1)
            best = elites[th.arange(len(elites), device=elites.device), chosen.squeeze(1)]
            best = (best + std * th.randn_like(best)).clamp(-1, 1)
        return Plan(best, mean, std, best_value, proposal_values.mean(1))

    def evaluate(self, latents: th.Tensor, candidates: th.Tensor) -> th.Tensor:
        """
        :param latents: start states ``(B, Z)``
        :param candidates: action sequences ``(B, N, H, A)``
        :return: their scores under the model ``(B, N)``
        """
        actions = candidates.flatten(0, 1)  # (B * N, H, A)
        states = self.model.rollout(latents.repeat_interleave(candidates.shape[1], dim=0), actions)
        rewards = self.model.reward(states[:, :-1], actions)  # (B * N, H)
        discounts = (self.gamma * (1 - self.model.terminated(states[:, 1:]))).cumprod(1)
        terminal_values = self.terminal_value(states[:, -1])  # (E, B * N)
        value = terminal_values.mean(0) - self.pessimism * terminal_values.std(0, correction=0)
        scores = rewards[:, 0] + (discounts * th.cat([rewards[:, 1:], value[:, None]], dim=1)).sum(1)
        return scores.view(candidates.shape[:2])

    def _bounds(self, proposals: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        if self.trust_region is None:
            ones = th.ones_like(proposals[:, 0])
            return -ones, ones
        low, high = proposals.amin(1) - self.trust_region, proposals.amax(1) + self.trust_region
        return low.clamp(min=-1), high.clamp(max=1)

    def _noise(self, mean: th.Tensor, num_samples: int, generator: th.Generator | None) -> th.Tensor:
        batch_size = len(mean) if generator is None else 1
        shape = (batch_size, num_samples, *mean.shape[1:])
        return th.randn(shape, generator=generator, device=mean.device)

    def _select_elites(self, candidates: th.Tensor, values: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        elite_values, index = values.topk(min(self.num_elites, values.shape[1]), dim=1)
        index = index[:, :, None, None].expand(-1, -1, *candidates.shape[2:])
        return candidates.gather(1, index), elite_values

    def _weights(self, elite_values: th.Tensor) -> th.Tensor:
        return th.softmax(self.temperature * elite_values, dim=1)

    def _fit(self, elites: th.Tensor, elite_values: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        weights = self._weights(elite_values)[:, :, None, None]
        mean = (weights * elites).sum(1)
        std = (weights * (elites - mean[:, None]) ** 2).sum(1).sqrt()
        return mean, std.clamp(self.min_std, self.max_std)


class PlanTracker:
    """
    Compares what plans promised with what the rest of their episodes gave: Σ γ^t r from the plan on. Where a time limit
    cut the episode off the last plan's promise stands for the rest, and is itself not judged.

    :param n_envs: number of environments
    :param gamma: discount factor
    :param max_steps: episodes are judged in pieces of this length, as if a time limit had cut them
    """

    def __init__(self, n_envs: int, gamma: float, max_steps: int = 1000):
        self.gamma, self.max_steps = gamma, max_steps
        self.rewards: list[list[float]] = [[] for _ in range(n_envs)]
        self.plans: list[list[tuple[int, float]]] = [[] for _ in range(n_envs)]  # at which step, and what was promised

    def start(self, predicted: np.ndarray) -> None:
        """
        :param predicted: scores of the plans that are about to be executed, NaN for none ``(n_envs,)``
        """
        for env in np.flatnonzero(~np.isnan(predicted)):
            self.plans[env].append((len(self.rewards[env]), float(predicted[env])))

    def step(self, rewards: np.ndarray, terminated: np.ndarray, truncated: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """
        :param rewards: of the last environment step ``(n_envs,)``
        :param terminated: where it terminated the episode ``(n_envs,)``
        :param truncated: where the episode was cut off instead ``(n_envs,)``
        :return: predicted and realised returns of the plans of episodes that are over ``(n,)``
        """
        judged = [np.empty((2, 0))]
        for env, reward in enumerate(rewards):
            self.rewards[env].append(float(reward))
            if terminated[env] or truncated[env] or len(self.rewards[env]) == self.max_steps:
                if self.plans[env]:
                    judged.append(self._judge(env, bool(terminated[env])))
                self.rewards[env], self.plans[env] = [], []
        predicted, realized = np.concatenate(judged, axis=1)
        return predicted, realized

    def _judge(self, env: int, terminated: bool) -> np.ndarray:
        """Predicted and realised returns of one episode's plans ``(2, n)``."""
        starts, predicted = (np.array(column) for column in zip(*self.plans[env], strict=True))
        rewards, rest = self.rewards[env], 0.0
        if not terminated:
            rewards, rest = rewards[: starts[-1]], predicted[-1]
            starts, predicted = starts[:-1], predicted[:-1]
        returns = np.empty(len(rewards))
        for step in reversed(range(len(rewards))):
            returns[step] = rest = rewards[step] + self.gamma * rest
        return np.stack([predicted, returns[starts]])
