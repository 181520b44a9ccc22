"""A policy that is a diffusion model of action chunks."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from typing import Any, Literal

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, get_actor_critic_arch
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule

from modip_sb3.acting import ActingMode, ActingPolicy, ChunkState
from modip_sb3.buffers import map_obs
from modip_sb3.checks import check_at_least, check_choice, check_count
from modip_sb3.denoisers import Denoiser, MLPDenoiser, UNetDenoiser
from modip_sb3.diffusion import DiffusionModel, GaussianModel
from modip_sb3.networks import RunningNormalizer
from modip_sb3.planner import Plan

DEFAULT_NET_ARCH: dict[str, dict[str, list[int]]] = {
    "unet": {"pi": [32], "qf": [128, 128]},
    "mlp": {"pi": [256, 256, 256], "qf": [128, 128]},
}


class DiffusionPolicy(ActingPolicy):
    """
    A diffusion model of action chunks and its EMA copy, which acts.

    :param observation_space: observation space, a Box or a Dict of Box spaces
    :param action_space: action space, a bounded Box
    :param lr_schedule: unused here: the algorithm owns the optimisers
    :param net_arch: widths of the denoiser, or a dictionary with them as ``pi``
    :param denoiser: "unet" (diffusers' ``UNet1DModel``) or "mlp" (a residual MLP, several times cheaper on a CPU)
    :param proposal: "diffusion", or "gaussian" for the ablation with a Gaussian MLP in the diffusion policy's place
    :param action_horizon: actions in a chunk
    :param n_action_steps: how many of them the policy executes before it predicts the next chunk; None for all
    :param train_scheduler: class name of the diffusers scheduler for training
    :param sample_scheduler: class name of the diffusers scheduler for sampling
    :param scheduler_kwargs: arguments of both schedulers
    :param num_inference_steps: denoising steps of one sample
    :param sampling_temperature: scale of the noise that the policy's own chunks start from; below 1 they keep closer
        to what is most likely (low-temperature sampling, Decision Diffuser, arXiv:2211.15657)
    :param condition_noise: of the noise on what the actor is conditioned on while it clones, in standard deviations of
        each feature; "auto" for as much as the data leaves room for, see :func:`~modip_sb3.offline.measure_blur`
    :param features_extractor_class: features extractor
    :param features_extractor_kwargs: its keyword arguments
    :param normalize_images: unused, as images are not supported
    :param optimizer_class: the optimisers' class
    :param optimizer_kwargs: the optimisers' keyword arguments, without the learning rate
    """

    actor: DiffusionModel | GaussianModel
    actor_ema: DiffusionModel | GaussianModel
    num_actor_updates: th.Tensor
    """Steps of the denoising loss that the actor has had, a scalar."""
    blur: th.Tensor
    """What ``condition_noise="auto"`` stands for, a scalar: 0 until there is data."""

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        lr_schedule: Schedule,
        net_arch: list[int] | dict[str, list[int]] | None = None,
        denoiser: Literal["unet", "mlp"] = "unet",
        proposal: Literal["diffusion", "gaussian"] = "diffusion",
        action_horizon: int = 4,
        n_action_steps: int | None = None,
        train_scheduler: str = "DDPMScheduler",
        sample_scheduler: str = "DDIMScheduler",
        scheduler_kwargs: dict[str, Any] | None = None,
        num_inference_steps: int = 5,
        sampling_temperature: float = 1.0,
        condition_noise: float | Literal["auto"] = 0.0,
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
        check_count(1, action_horizon=action_horizon, num_inference_steps=num_inference_steps)
        check_at_least(0, sampling_temperature=sampling_temperature)
        if condition_noise != "auto":
            check_at_least(0, condition_noise=condition_noise)
        n_action_steps = action_horizon if n_action_steps is None else n_action_steps
        check_count(0, n_action_steps=n_action_steps)
        if not 1 <= n_action_steps <= action_horizon:
            raise ValueError(
                f"n_action_steps={n_action_steps} must lie between 1 and action_horizon={action_horizon}: a chunk is "
                "executed from its start."
            )
        check_choice("denoiser", denoiser, *DEFAULT_NET_ARCH)
        check_choice("proposal", proposal, "diffusion", "gaussian")
        self.denoiser_name, self.proposal = denoiser, proposal
        self.net_arch = DEFAULT_NET_ARCH[denoiser] if net_arch is None else net_arch
        self.action_horizon = self.horizon = action_horizon
        self.n_action_steps, self.inference = n_action_steps, "policy"
        self.sampling_temperature, self.condition_noise = sampling_temperature, condition_noise
        self.diffusion_kwargs: dict[str, Any] = {
            "train_scheduler": train_scheduler,
            "sample_scheduler": sample_scheduler,
            "scheduler_kwargs": scheduler_kwargs,
            "num_inference_steps": num_inference_steps,
        }
        self.chunk_shape = (action_horizon, self.action_dim)
        self._build()

    def _build(self) -> None:
        actor_arch, _ = get_actor_critic_arch(self.net_arch)
        self.features_extractor = self.make_features_extractor()
        self.normalizer = RunningNormalizer(self.features_extractor.features_dim)
        self._build_actor(self.features_extractor.features_dim, actor_arch)

    def _build_actor(self, condition_dim: int, net_arch: Sequence[int]) -> None:
        self._make_new_actor = partial(self._make_actor, condition_dim, net_arch)
        self.actor = self._make_new_actor()
        self.actor_ema = deepcopy(self.actor).requires_grad_(False)
        self.register_buffer("num_actor_updates", th.zeros(()))
        self.register_buffer("blur", th.zeros(()))

    def _make_actor(self, condition_dim: int, net_arch: Sequence[int]) -> DiffusionModel | GaussianModel:
        if self.proposal == "gaussian":
            return GaussianModel(self.chunk_shape, condition_dim, net_arch)
        denoiser: Denoiser
        if self.denoiser_name == "unet":
            denoiser = UNetDenoiser(self.action_dim, condition_dim, net_arch)
        else:
            denoiser = MLPDenoiser(self.chunk_shape, condition_dim, net_arch)
        return DiffusionModel(denoiser, self.chunk_shape, **self.diffusion_kwargs)

    def reset_actor(self) -> None:
        """Other first weights for the actor, which has not learned anything then."""
        weights = self._make_new_actor().state_dict()
        self.actor.load_state_dict(weights)
        self.actor_ema.load_state_dict(weights)
        self.num_actor_updates.zero_()

    def _get_constructor_parameters(self) -> dict[str, Any]:
        data = super()._get_constructor_parameters()
        data.update(
            lr_schedule=self._dummy_schedule,
            net_arch=self.net_arch,
            denoiser=self.denoiser_name,
            proposal=self.proposal,
            action_horizon=self.action_horizon,
            n_action_steps=self.n_action_steps,
            sampling_temperature=self.sampling_temperature,
            condition_noise=self.condition_noise,
            features_extractor_class=self.features_extractor_class,
            features_extractor_kwargs=self.features_extractor_kwargs,
            optimizer_class=self.optimizer_class,
            optimizer_kwargs=self.optimizer_kwargs,
            **self.diffusion_kwargs,
        )
        return data

    @property
    def normalizes_features(self) -> bool:  # type: ignore[override]
        """A features extractor that learns is its own normaliser: its output would drift away from any statistics."""
        return not any(True for _ in self.features_extractor.parameters())

    def actor_condition(self, features: th.Tensor) -> th.Tensor:
        """
        :param features: normalised features ``(N, F)``
        :return: what the actor is conditioned on, without gradient ``(N, C)``
        """
        return features.detach()

    def compute_loss(
        self, chunks: th.Tensor, condition: th.Tensor, weights: th.Tensor
    ) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        """
        The actor's loss, with noise on its condition (which smooths what is learned: Bishop, "Training with Noise is
        Equivalent to Tikhonov Regularization", 1995); see :meth:`DiffusionModel.compute_loss`.

        :param chunks: ``(B, T, A)`` in [-1, 1]
        :param condition: see :meth:`actor_condition` ``(B, C)``
        :param weights: ``(B, T)``
        :return: the loss and its metrics
        """
        noise = self.blur if self.condition_noise == "auto" else self.condition_noise
        if noise > 0:
            spread = condition.detach().std(dim=0, correction=0)
            condition = condition + noise * spread * th.randn_like(condition)
        return self.actor.compute_loss(chunks, condition, weights)

    def sample_chunks(self, condition: th.Tensor, deterministic: bool = False) -> th.Tensor:
        """
        :param condition: see :meth:`actor_condition` ``(N, C)``
        :param deterministic: start every denoising from zero, the noise's mean: any other fixed noise would pick one
            behaviour out of the data's, for better or worse
        :return: action chunks of the EMA actor in [-1, 1] ``(N, T, A)``
        """
        noise = condition.new_zeros(len(condition), *self.chunk_shape) if deterministic else None
        return self.actor_ema.sample(condition, noise, self.sampling_temperature)

    def sample_candidates(
        self, condition: th.Tensor, num_candidates: int, temperature: float, deterministic: bool = False
    ) -> th.Tensor:
        """
        :param condition: see :meth:`actor_condition` ``(N, C)``
        :param num_candidates: n, chunks to choose from
        :param temperature: scale of the noise that they start from
        :param deterministic: the same chunks for the same condition
        :return: action chunks of the EMA actor in [-1, 1] ``(N, n, T, A)``
        """
        noise = None
        if deterministic:
            shape = (num_candidates, *self.chunk_shape)
            noise = temperature * th.randn(shape, generator=th.Generator().manual_seed(1)).to(self.device)
            noise = noise.repeat(len(condition), 1, 1)
        chunks = self.actor_ema.sample(condition.repeat_interleave(num_candidates, dim=0), noise, temperature)
        return chunks.view(len(condition), num_candidates, *self.chunk_shape)

    def act(
        self, obs: PyTorchObs, state: ChunkState, mode: ActingMode, deterministic: bool
    ) -> tuple[np.ndarray, ChunkState, Plan | None]:
        """Execute chunks of the actor, each to its end; see :meth:`ActingPolicy.act`."""
        check_choice("inference", mode, "policy")
        actions, next_state = self.continue_chunks(
            obs, state, lambda condition: self.sample_chunks(condition, deterministic)
        )
        return actions, next_state, None

    @th.no_grad()
    def continue_chunks(
        self, obs: PyTorchObs, state: ChunkState, sample: Callable[[th.Tensor], th.Tensor]
    ) -> tuple[np.ndarray, ChunkState]:
        """
        :param obs: observations ``(B, *obs_shape)``
        :param state: as in :meth:`ActingPolicy.act`
        :param sample: new chunks ``(N, T, A)``, for environments that need one, from their conditions ``(N, C)``
        :return: the next actions ``(B, A)``, and the next state, where the position is 1 if a chunk has begun
        """
        chunks, position = state[0].copy(), state[1].copy()
        used_up = (position < 0) | (position >= self.n_action_steps)
        if used_up.any():
            index = th.as_tensor(np.flatnonzero(used_up), device=self.device)
            condition = self.actor_condition(self.features(map_obs(lambda part: part[index], obs)))
            chunks[used_up] = sample(condition).cpu().numpy()
            position[used_up] = 0
        actions = chunks[np.arange(len(position)), position]
        return actions, (chunks, position + 1)
