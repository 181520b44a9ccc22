"""What TD-MPC2 (arXiv:2310.16828) acts with: its latent model, its Gaussian prior, its Q ensemble and the planner."""

import math
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, get_actor_critic_arch
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import nn

from modip_sb3.acting import ActingMode, ChunkState, PlanningPolicy
from modip_sb3.checks import check_choice, check_count, check_flags, check_fraction, check_keywords, check_widths
from modip_sb3.critics import ValueEnsemble
from modip_sb3.networks import Mish, SimNorm, TwoHot, init_truncated_normal, mlp, zero_init
from modip_sb3.planner import MPPI, PLANNER_ARGUMENTS, Plan
from modip_sb3.world_model import WorldModel

# The published sizes, by millions of parameters. "encoder_arch" are hidden layers: one more leads to the latent state.
MODEL_SIZES: dict[int, dict[str, Any]] = {
    1: {"encoder_arch": [256], "net_arch": [384, 384], "latent_dim": 128, "n_critics": 2},
    5: {"encoder_arch": [256], "net_arch": [512, 512], "latent_dim": 512, "n_critics": 5},
    19: {"encoder_arch": [1024, 1024], "net_arch": [1024, 1024], "latent_dim": 768, "n_critics": 5},
}
LOG_STD_MIN, LOG_STD_MAX = -10.0, 2.0
NUM_CANDIDATES = 512  # of each iteration of the planner, the prior's sequences among them


class PublishedWorldModel(WorldModel):
    """
    The world model with TD-MPC2's networks: Mish, a LayerNorm before each SimNorm, and dynamics that predict the next
    latent state itself.

    :param features_dim: number of observation features
    :param action_dim: number of (flat) action dimensions
    :param latent_dim: size of the latent state, a multiple of 8
    :param net_arch: hidden widths of the dynamics and of the heads
    :param encoder_arch: hidden widths of the encoder
    :param with_termination: whether there is a termination head
    """

    def __init__(
        self,
        features_dim: int,
        action_dim: int,
        latent_dim: int,
        net_arch: Sequence[int],
        encoder_arch: Sequence[int],
        with_termination: bool,
    ):
        super(WorldModel, self).__init__()
        if latent_dim % 8 != 0:
            raise ValueError(
                f"latent_dim={latent_dim} is not a multiple of 8, the size of a simplex; choose one that is."
            )

        def normed() -> nn.Module:
            return nn.Sequential(nn.LayerNorm(latent_dim), SimNorm(8))

        self.latent_dim = latent_dim
        self.two_hot = TwoHot()
        self.encoder = mlp(features_dim, encoder_arch, latent_dim, normed(), Mish)
        self.dynamics = mlp(latent_dim + action_dim, net_arch, latent_dim, normed(), Mish)
        self.reward_head = mlp(latent_dim + action_dim, net_arch, self.two_hot.num_bins, activation=Mish)
        self.termination_head = mlp(latent_dim, net_arch, 1, activation=Mish) if with_termination else None
        self.apply(init_truncated_normal)
        zero_init(self.reward_head[-1])

    def next(self, latents: th.Tensor, actions: th.Tensor) -> th.Tensor:
        return self.dynamics(th.cat([latents, actions], dim=-1))

    def terminated(self, latents: th.Tensor) -> th.Tensor:
        return (super().terminated(latents) > 0.5).to(latents.dtype)  # the planner ends a sequence, or it does not


class GaussianPrior(nn.Module):
    """
    TD-MPC2's policy prior, a Gaussian squashed by tanh.

    :param latent_dim: size of the latent state
    :param action_dim: number of action dimensions
    :param net_arch: hidden widths
    """

    def __init__(self, latent_dim: int, action_dim: int, net_arch: Sequence[int]):
        super().__init__()
        self.action_dim = action_dim
        self.net = mlp(latent_dim, net_arch, 2 * action_dim, activation=Mish)
        self.apply(init_truncated_normal)

    def forward(self, latents: th.Tensor, noise: th.Tensor | None = None) -> tuple[th.Tensor, th.Tensor]:
        """
        :param latents: ``(..., Z)``
        :param noise: what the Gaussian is sampled with ``(..., A)``, drawn here if it is None; zeros give its mean
        :return: actions in [-1, 1] ``(..., A)`` and estimates of the entropy ``(...)``: the Gaussian's before it is
            squashed, times the number of action dimensions, which is what the official code's ``scaled_entropy`` is
        """
        mean, log_std = self.net(latents).chunk(2, dim=-1)
        log_std = LOG_STD_MIN + (LOG_STD_MAX - LOG_STD_MIN) * (th.tanh(log_std) + 1) / 2
        if noise is None:
            noise = th.randn_like(mean)
        log_prob = (-0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)
        return th.tanh(mean + log_std.exp() * noise), -self.action_dim * log_prob


class TDMPC2Policy(PlanningPolicy):
    """
    World model, Gaussian prior, Q ensemble and its target.

    :param observation_space: observation space, a Box or a Dict of Box spaces
    :param action_space: action space, a bounded Box
    :param lr_schedule: unused here: the algorithm owns the optimisers
    :param net_arch: hidden widths of the prior (``pi``) and of dynamics, heads and critics (``qf``), or one list
    :param model_size: the published size, a key of :data:`MODEL_SIZES`; the next three arguments and ``net_arch``
        replace parts of it
    :param encoder_arch: hidden widths of the encoder
    :param latent_dim: size of the latent state
    :param n_critics: members of the Q ensemble
    :param dropout: of the first layer of each Q
    :param termination_head: whether the model predicts where episodes terminate
    :param horizon: environment steps that the planner looks ahead
    :param num_proposals: sequences of the prior among the planner's candidates
    :param planner_kwargs: settings of :class:`~modip_sb3.planner.MPPI` beside the published ones
    :param inference: what ``predict`` uses: "planner", or "policy" for the prior alone
    :param features_extractor_class: features extractor
    :param features_extractor_kwargs: its keyword arguments
    :param normalize_images: unused, as images are not supported
    :param optimizer_class: the optimisers' class
    :param optimizer_kwargs: the optimisers' keyword arguments, without the learning rate
    """

    normalizes_features = False  # the published agent takes observations as they are; VecNormalize is there for others

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        lr_schedule: Schedule,
        net_arch: list[int] | dict[str, list[int]] | None = None,
        model_size: int = 5,
        encoder_arch: list[int] | None = None,
        latent_dim: int | None = None,
        n_critics: int | None = None,
        dropout: float = 0.01,
        termination_head: bool = False,
        horizon: int = 3,
        num_proposals: int = 24,
        planner_kwargs: dict[str, Any] | None = None,
        inference: ActingMode = "planner",
        features_extractor_class: type[BaseFeaturesExtractor] | None = None,
        features_extractor_kwargs: dict[str, Any] | None = None,
        normalize_images: bool = True,
        optimizer_class: type[th.optim.Optimizer] = th.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
    ):
        super().__init__(
            observation_space,
            action_space,
            features_extractor_class,
            features_extractor_kwargs,
            normalize_images=normalize_images,
            optimizer_class=optimizer_class,
            optimizer_kwargs=optimizer_kwargs,
        )
        check_choice("model_size", model_size, *MODEL_SIZES)
        check_choice("inference", inference, "policy", "planner")
        check_count(1, horizon=horizon, num_proposals=num_proposals)
        check_flags(termination_head=termination_head)
        check_keywords("planner_kwargs", planner_kwargs, MPPI, *PLANNER_ARGUMENTS)
        check_fraction(dropout=dropout)
        size = MODEL_SIZES[model_size]
        self.model_size = model_size
        self.net_arch = size["net_arch"] if net_arch is None else net_arch
        self.encoder_arch = size["encoder_arch"] if encoder_arch is None else encoder_arch
        self.latent_dim = size["latent_dim"] if latent_dim is None else latent_dim
        self.n_critics = size["n_critics"] if n_critics is None else n_critics
        check_count(1, latent_dim=self.latent_dim, n_critics=self.n_critics)
        check_widths(encoder_arch=self.encoder_arch)
        self.dropout, self.termination_head, self.inference = dropout, termination_head, inference
        self.horizon = self.action_horizon = horizon
        self.num_proposals = num_proposals
        published = {
            "num_samples": max(NUM_CANDIDATES - num_proposals, 0),
            "num_elites": 64,
            "num_iterations": 6 if self.action_dim < 20 else 8,
            "temperature": 0.5,
            "min_std": 0.05,
            "max_std": 2.0,
            "pessimism": 0.0,
        }
        self.planner_kwargs = {**published, **(planner_kwargs or {})}
        self._build()
        self.check_planner()

    def _build(self) -> None:
        actor_arch, critic_arch = get_actor_critic_arch(self.net_arch)
        self.features_extractor = self.make_features_extractor()
        self.world_model = PublishedWorldModel(
            self.features_extractor.features_dim,
            self.action_dim,
            self.latent_dim,
            critic_arch,
            self.encoder_arch,
            self.termination_head,
        )
        self.critic = ValueEnsemble(self.latent_dim, self.action_dim, self.n_critics, critic_arch, Mish, self.dropout)
        self.critic.apply(init_truncated_normal)
        zero_init(self.critic.ensemble.layers[-1])
        self.actor = GaussianPrior(self.latent_dim, self.action_dim, actor_arch)
        self.critic_target = deepcopy(self.critic).requires_grad_(False)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        data = super()._get_constructor_parameters()
        data.update(
            lr_schedule=self._dummy_schedule,
            net_arch=self.net_arch,
            model_size=self.model_size,
            encoder_arch=self.encoder_arch,
            latent_dim=self.latent_dim,
            n_critics=self.n_critics,
            dropout=self.dropout,
            termination_head=self.termination_head,
            horizon=self.horizon,
            num_proposals=self.num_proposals,
            planner_kwargs=self.planner_kwargs,
            inference=self.inference,
            features_extractor_class=self.features_extractor_class,
            features_extractor_kwargs=self.features_extractor_kwargs,
            optimizer_class=self.optimizer_class,
            optimizer_kwargs=self.optimizer_kwargs,
        )
        return data

    def train(self, mode: bool = True) -> "TDMPC2Policy":
        """As every module's, but the target critics never drop features."""
        super().train(mode)
        self.critic_target.train(False)
        return self

    def random_pair(self) -> th.Tensor | None:
        """Two members of the Q ensemble, drawn anew at each call; None, for all, if there are no more than two."""
        if self.n_critics <= 2:
            return None
        return th.randperm(self.n_critics, device=self.device)[:2]

    def mode_actions(self, latents: th.Tensor) -> th.Tensor:
        """
        :param latents: ``(..., Z)``
        :return: the prior's actions without noise ``(..., A)``
        """
        return self.actor(latents, latents.new_zeros(*latents.shape[:-1], self.action_dim))[0]

    def check_planner(self) -> None:
        """Raise an error now, before anything is learned, if ``planner_kwargs`` are wrong."""
        self._make_planner(deterministic=False)

    def _make_planner(self, deterministic: bool) -> MPPI:
        noise = None
        if deterministic:
            shape = (self.horizon, self.num_proposals, self.action_dim)
            noise = th.randn(shape, generator=th.Generator().manual_seed(1)).to(self.device)

        def propose(latents: th.Tensor) -> th.Tensor:
            return self._roll_prior(latents, noise)

        def terminal_value(latents: th.Tensor) -> th.Tensor:
            if deterministic:  # no draws: the prior's mode and the mean of all critics
                return self.critic(latents, self.mode_actions(latents))
            return self.critic(latents, self.actor(latents)[0], self.random_pair())

        return MPPI(self.world_model, propose, terminal_value, **self.planner_kwargs)

    def _roll_prior(self, latents: th.Tensor, noise: th.Tensor | None) -> th.Tensor:
        """Sequences of the prior in the world model: ``(B, Z)``, noise ``(H, n, A)`` -> ``(B, n, H, A)``."""
        states = latents.repeat_interleave(self.num_proposals, dim=0)
        sequence: list[th.Tensor] = []
        for step in range(self.horizon):
            if step > 0:
                states = self.world_model.next(states, sequence[-1])
            sequence.append(self.actor(states, None if noise is None else noise[step].repeat(len(latents), 1))[0])
        return th.stack(sequence, dim=1).unflatten(0, (len(latents), self.num_proposals))

    @th.no_grad()
    def plan(self, obs: PyTorchObs, warm_start: th.Tensor, deterministic: bool = False) -> Plan:
        """
        :param obs: observations ``(B, *obs_shape)``
        :param warm_start: mean to search around first ``(B, H, A)``
        :param deterministic: the same plan for the same arguments, and the best sequence without exploration noise
        :return: the plan
        """
        return self._make_planner(deterministic).plan(self.encode(obs), warm_start, deterministic)

    def act(
        self, obs: PyTorchObs, state: ChunkState, mode: ActingMode, deterministic: bool
    ) -> tuple[np.ndarray, ChunkState, Plan | None]:
        """
        "planner" plans at every step around the last plan, shifted and with a zero at its end, and around zeros at an
        episode's start; "policy" samples the prior, or takes its mode; see :meth:`PlanningPolicy.act`.
        """
        means, position = state
        if mode == "planner":
            last_mean = th.as_tensor(means, device=self.device)
            warm_start = th.cat([last_mean[:, 1:], th.zeros_like(last_mean[:, :1])], dim=1)
            warm_start[position < 0] = 0
            plan = self.plan(obs, warm_start, deterministic)
            return plan.actions[:, 0].cpu().numpy(), (plan.mean.cpu().numpy(), np.ones_like(position)), plan
        with th.no_grad():
            latents = self.encode(obs)
            actions = self.mode_actions(latents) if deterministic else self.actor(latents)[0]
        return actions.cpu().numpy(), (means, np.ones_like(position)), None
