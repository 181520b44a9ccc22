"""MODIP's policy: everything that is needed to act, with the diffusion model or with the planner."""

from copy import deepcopy
from typing import Any, Literal

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, get_actor_critic_arch
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule

from modip_sb3.acting import ActingMode, ChunkState, PlanningPolicy
from modip_sb3.buffers import map_obs
from modip_sb3.checks import check_at_least, check_choice, check_count, check_keywords
from modip_sb3.critics import ValueEnsemble
from modip_sb3.diffusion_policy import DiffusionPolicy
from modip_sb3.networks import RunningNormalizer
from modip_sb3.planner import MPPI, PLANNER_ARGUMENTS, Plan
from modip_sb3.world_model import WorldModel


class MODIPPolicy(DiffusionPolicy, PlanningPolicy):
    """
    Diffusion policy, its EMA copy, latent world model, critics and their targets.

    :param observation_space: observation space, a Box or a Dict of Box spaces
    :param action_space: action space, a bounded Box
    :param lr_schedule: unused here: the algorithm owns the optimisers
    :param net_arch: widths of the denoiser (``pi``) and of world model and critics (``qf``), or one list for both
    :param denoiser: "unet" (diffusers' ``UNet1DModel``) or "mlp" (a residual MLP, several times cheaper on a CPU)
    :param proposal: "diffusion", or "gaussian" for the ablation with a Gaussian MLP in the diffusion policy's place
    :param action_horizon: actions in a chunk
    :param n_action_steps: how many of them, or of a plan's, are executed before the next is predicted; None for all
    :param horizon: environment steps that the planner looks ahead, at most ``action_horizon``
    :param num_proposals: chunks that the actor proposes for each plan
    :param proposal_temperature: scale of the noise that they start from; below 1 where the planner errs by choosing
        among unlikely ones, as it does after good demonstrations alone
    :param planner_kwargs: settings of :class:`~modip_sb3.planner.MPPI`
    :param terminal_value: what ends a plan's score: "v" for V(z_H), or "q" for the ablation with Q(z_H, π(z_H)), where
        the actor sees the world model's latent instead of the observation
    :param inference: what ``predict`` uses: "policy" (the diffusion policy alone, fast) or "planner"
    :param train_scheduler: class name of the diffusers scheduler for training
    :param sample_scheduler: class name of the diffusers scheduler for sampling
    :param scheduler_kwargs: arguments of both schedulers
    :param num_inference_steps: denoising steps of one sample
    :param sampling_temperature: scale of the noise that the policy's own chunks start from, not the proposals; below 1
        they keep closer to what is most likely (low-temperature sampling, Decision Diffuser, arXiv:2211.15657)
    :param condition_noise: of the noise on what the actor is conditioned on while it clones, in standard deviations of
        each feature; "auto" for as much as the data leaves room for, see :func:`~modip_sb3.offline.measure_blur`
    :param latent_dim: size of the world model's latent state
    :param n_critics: members of the V and of the Q ensemble
    :param features_extractor_class: features extractor
    :param features_extractor_kwargs: its keyword arguments
    :param normalize_images: unused, as images are not supported
    :param optimizer_class: the optimisers' class
    :param optimizer_kwargs: the optimisers' keyword arguments, without the learning rate
    """

    trusts_planner: th.Tensor
    """Whether the planner is better than the policy alone, as far as is known (bool)."""

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        lr_schedule: Schedule,
        net_arch: list[int] | dict[str, list[int]] | None = None,
        denoiser: Literal["unet", "mlp"] = "unet",
        proposal: Literal["diffusion", "gaussian"] = "diffusion",
        action_horizon: int = 4,
        n_action_steps: int | None = 1,
        horizon: int = 4,
        num_proposals: int = 16,
        proposal_temperature: float = 1.0,
        planner_kwargs: dict[str, Any] | None = None,
        terminal_value: Literal["v", "q"] = "v",
        inference: ActingMode = "policy",
        train_scheduler: str = "DDPMScheduler",
        sample_scheduler: str = "DDIMScheduler",
        scheduler_kwargs: dict[str, Any] | None = None,
        num_inference_steps: int = 5,
        sampling_temperature: float = 0.3,
        condition_noise: float | Literal["auto"] = 0.0,
        latent_dim: int = 128,
        n_critics: int = 2,
        features_extractor_class: type[BaseFeaturesExtractor] | None = None,
        features_extractor_kwargs: dict[str, Any] | None = None,
        normalize_images: bool = True,
        optimizer_class: type[th.optim.Optimizer] = th.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
    ):
        check_count(1, num_proposals=num_proposals, n_critics=n_critics, latent_dim=latent_dim)
        check_count(0, horizon=horizon, action_horizon=action_horizon)
        check_at_least(0, proposal_temperature=proposal_temperature)
        check_keywords("planner_kwargs", planner_kwargs, MPPI, *PLANNER_ARGUMENTS)
        check_choice("terminal_value", terminal_value, "v", "q")
        check_choice("inference", inference, "policy", "planner")
        if not 1 <= horizon <= action_horizon:
            raise ValueError(
                f"horizon={horizon} must lie between 1 and action_horizon={action_horizon}: a chunk is planned from "
                "its start."
            )
        self.num_proposals, self.proposal_temperature = num_proposals, proposal_temperature
        self.planner_kwargs = dict(planner_kwargs or {})
        self.terminal_value, self.latent_dim, self.n_critics = terminal_value, latent_dim, n_critics
        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            net_arch,
            denoiser,
            proposal,
            action_horizon,
            n_action_steps,
            train_scheduler,
            sample_scheduler,
            scheduler_kwargs,
            num_inference_steps,
            sampling_temperature,
            condition_noise,
            features_extractor_class,
            features_extractor_kwargs,
            normalize_images,
            optimizer_class,
            optimizer_kwargs,
        )
        self.horizon, self.inference = horizon, inference
        self.check_planner()

    @property
    def acting_mode(self) -> ActingMode:
        """Who acts in ``predict()``: ``inference``, but the policy where it was found to be better than the planner."""
        return self.inference if self.trusts_planner else "policy"

    def _build(self) -> None:
        actor_arch, critic_arch = get_actor_critic_arch(self.net_arch)
        self.features_extractor = self.make_features_extractor()
        features_dim = self.features_extractor.features_dim
        self.normalizer = RunningNormalizer(features_dim)
        self.world_model = WorldModel(features_dim, self.action_dim, self.latent_dim, critic_arch)
        self.value = ValueEnsemble(self.latent_dim, 0, self.n_critics, critic_arch)
        self.critic = ValueEnsemble(self.latent_dim, self.action_dim, self.n_critics, critic_arch)
        self._build_actor(self.latent_dim if self.terminal_value == "q" else features_dim, actor_arch)
        self.register_buffer("trusts_planner", th.ones((), dtype=th.bool))
        self.value_target = deepcopy(self.value).requires_grad_(False)
        self.critic_target = deepcopy(self.critic).requires_grad_(False)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return super()._get_constructor_parameters() | {
            "horizon": self.horizon,
            "num_proposals": self.num_proposals,
            "proposal_temperature": self.proposal_temperature,
            "planner_kwargs": self.planner_kwargs,
            "terminal_value": self.terminal_value,
            "inference": self.inference,
            "latent_dim": self.latent_dim,
            "n_critics": self.n_critics,
        }

    def actor_condition(self, features: th.Tensor) -> th.Tensor:
        """The features, or the latents that the planner has in their place; see :class:`DiffusionPolicy`."""
        return super().actor_condition(self.world_model.encode(features) if self.terminal_value == "q" else features)

    def plan(self, obs: PyTorchObs, warm_start: th.Tensor | None = None, deterministic: bool = False) -> Plan:
        """
        Improve the actor's proposals with the planner.

        :param obs: observations ``(B, *obs_shape)``
        :param warm_start: shifted mean of the last plan ``(B, H, A)``
        :param deterministic: the same plan for the same arguments
        :return: the plan
        """
        with th.no_grad():
            features = self.features(obs)
            condition = self.actor_condition(features)

            def propose(latents: th.Tensor) -> th.Tensor:
                candidates = self.sample_candidates(
                    condition, self.num_proposals, self.proposal_temperature, deterministic
                )
                return candidates[:, :, : self.horizon]

            return self._make_planner(propose).plan(self.world_model.encode(features), warm_start, deterministic)

    def check_planner(self) -> None:
        """Raise an error now, before anything is learned, if ``planner_kwargs`` are wrong."""
        self._make_planner(lambda latents: latents[:, None])

    def _make_planner(self, propose: Any) -> MPPI:
        terminal_value = self.value if self.terminal_value == "v" else self._q_of_policy
        return MPPI(self.world_model, propose, terminal_value, **self.planner_kwargs)

    def _q_of_policy(self, latents: th.Tensor) -> th.Tensor:
        """Q(z, π(z)), the policy-dependent terminal value of the paper's ablation: ``(N, Z) -> (E, N)``."""
        return self.critic(latents, self.sample_chunks(latents, deterministic=True)[:, 0])

    def act(
        self, obs: PyTorchObs, state: ChunkState, mode: ActingMode, deterministic: bool, n_plan_steps: int | None = None
    ) -> tuple[np.ndarray, ChunkState, Plan | None]:
        """
        "policy" executes ``n_action_steps`` of each of the actor's chunks, "planner" as many of each plan, which is
        warm-started from the last one, or ``n_plan_steps``; see :meth:`ActingPolicy.act`.
        """
        if mode == "policy":
            return super().act(obs, state, mode, deterministic)
        n_plan_steps = n_plan_steps or min(self.n_action_steps, self.horizon)
        plans, position = state[0].copy(), state[1].copy()
        due, plan = (position < 0) | (position >= n_plan_steps), None
        if due.any():
            index = th.as_tensor(np.flatnonzero(due), device=self.device)
            last = th.as_tensor(plans[due], device=self.device)
            warm_start = th.cat([last[:, n_plan_steps:], last[:, -1:].expand(-1, n_plan_steps, -1)], dim=1)
            warm_start[position[due] < 0] = th.nan
            plan = self.plan(map_obs(lambda part: part[index], obs), warm_start, deterministic)
            plans[due] = (plan.mean if n_plan_steps == 1 else plan.actions).cpu().numpy()
            position[due] = 0
        actions = plans[np.arange(len(position)), position]
        if plan is not None:
            actions[due] = plan.actions[:, 0].cpu().numpy()
        return actions, (plans, position + 1), plan
