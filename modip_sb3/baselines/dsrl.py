"""DSRL: steering a diffusion policy by the noise that it starts from (Wagenmaker et al., arXiv:2506.15799)."""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from stable_baselines3.sac.policies import Actor

from modip_sb3.base import Metrics, Phase
from modip_sb3.baselines.chunk_critics import ChunkCriticAlgorithm, ChunkCriticPolicy, ChunkTransitions
from modip_sb3.buffers import SequenceBatch, SequenceReplayBuffer
from modip_sb3.checks import check_at_least, check_count, check_ent_coef, check_number, check_widths
from modip_sb3.datasets import DatasetSources
from modip_sb3.faults import finite_distribution


class DSRLPolicy(ChunkCriticPolicy):
    """
    A :class:`ChunkCriticPolicy` whose chunks start from noise that an actor chooses.

    :param observation_space: observation space, a Box or a Dict of Box spaces
    :param action_space: action space, a bounded Box
    :param lr_schedule: unused here: the algorithm owns the optimisers
    :param noise_magnitude: the largest noise that the actor can choose, in standard deviations
    :param noise_arch: widths of the noise actor, SB3's of SAC
    :param kwargs: keyword arguments of :class:`ChunkCriticPolicy`
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        lr_schedule: Schedule,
        noise_magnitude: float = 1.5,
        noise_arch: Sequence[int] = (256, 256),
        **kwargs: Any,
    ):
        check_at_least(0, noise_magnitude=noise_magnitude)
        check_widths(noise_arch=noise_arch)
        self.noise_magnitude, self.noise_arch = noise_magnitude, list(noise_arch)
        super().__init__(observation_space, action_space, lr_schedule, **kwargs)

    def _build(self) -> None:
        super()._build()
        self.noise_dim = self.action_horizon * self.action_dim
        features_dim = self.features_extractor.features_dim
        features_space = spaces.Box(-np.inf, np.inf, (features_dim,))
        noise_space = spaces.Box(-1, 1, (self.noise_dim,))
        extractor = FlattenExtractor(features_space)
        self.noise_actor = Actor(features_space, noise_space, self.noise_arch, extractor, features_dim)
        self.noise_critic = self._make_critic(self.noise_dim, self.n_critics)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        data = super()._get_constructor_parameters()
        return data | {"noise_magnitude": self.noise_magnitude, "noise_arch": self.noise_arch}

    def denoise(self, condition: th.Tensor, noise: th.Tensor) -> th.Tensor:
        """
        :param condition: features ``(N, F)``
        :param noise: in [-1, 1] ``(N, T * A)``
        :return: the chunks that it becomes ``(N, T, A)``
        """
        return self.actor_ema.sample(condition, self.noise_magnitude * noise.view(-1, *self.chunk_shape))

    def sample_chunks(self, condition: th.Tensor, deterministic: bool = False) -> th.Tensor:
        """Of the noise actor's draw, or of its mode; see :meth:`DiffusionPolicy.sample_chunks`."""
        with finite_distribution():
            return self.denoise(condition, self.noise_actor(condition, deterministic))


class DSRL(ChunkCriticAlgorithm):
    """
    Diffusion steering: a soft actor-critic chooses the noise that a frozen diffusion policy denoises, in its
    noise-aliased variant: Q(s, chunk) learns from what was executed, from the offline data too, and Q(s, noise) learns
    Q(s, chunk) of the chunks that noises become, which is what the noise actor ascends. The policy is cloned in the
    offline phase, or comes from :meth:`from_pretrained`, and does not change online.

    :param policy: "MlpPolicy", "MultiInputPolicy" or a subclass of :class:`DSRLPolicy`
    :param env: the environment, or its Gymnasium id
    :param learning_rate: of all networks, or a schedule
    :param buffer_size: transitions of online experience that are kept
    :param learning_starts: environment steps before learning; random ones unless there was an offline phase
    :param batch_size: chunks in a batch
    :param tau: rate at which the critics' targets follow
    :param gamma: discount factor
    :param train_freq: environment steps (or episodes) between updates
    :param gradient_steps: updates each time; -1 for as many as environment steps
    :param action_noise: added to what is executed
    :param replay_buffer_class: a subclass of :class:`SequenceReplayBuffer`
    :param replay_buffer_kwargs: its keyword arguments
    :param optimize_memory_usage: accepted for SB3's sake, observations are never stored twice
    :param offline_dataset: Minari id or folder, D4RL or robomimic HDF5 file, SB3 replay buffer, arrays, or a list of
        them, with options; see :meth:`OfflineDataset.load` and :func:`~modip_sb3.datasets.load_sources`
    :param pretrain_steps: updates of the offline phase that ``learn()`` starts with if ``pretrain()`` was not called
    :param offline_fraction: share of offline chunks in every online batch
    :param noise_critic_steps: updates of Q(s, noise) in each update; the authors make 10 for 20 of the others
    :param ent_coef: entropy coefficient, or "auto" to learn it, or "auto_0.1" to start at 0.1
    :param target_entropy: that ``ent_coef="auto"`` aims at, of noise in [-1, 1]
    :param actor_tau: rate at which the policy's exponential moving average follows
    :param actor_decay_start: updates of the policy after which its learning rate falls with the inverse square root of
        their number
    :param max_grad_norm: gradients are clipped to this norm
    :param stats_window_size: episodes that the rollout statistics average over
    :param tensorboard_log: where TensorBoard logs go
    :param policy_kwargs: arguments of :class:`DSRLPolicy`
    :param verbose: 0 no output, 1 info, 2 debug
    :param seed: seed of the pseudo random generators
    :param device: "auto", "cpu", "cuda" ...
    :param _init_setup_model: whether to build the networks now
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": DSRLPolicy,
        "MultiInputPolicy": DSRLPolicy,
    }
    policy: DSRLPolicy
    optimizer_names = (
        "critic_optimizer",
        "actor_optimizer",
        "noise_critic_optimizer",
        "noise_actor_optimizer",
        "ent_coef_optimizer",
    )

    def __init__(
        self,
        policy: str | type[DSRLPolicy],
        env: GymEnv | str | None,
        learning_rate: float | Schedule = 3e-4,
        buffer_size: int = 1_000_000,
        learning_starts: int = 100,
        batch_size: int = 256,
        tau: float = 0.005,
        gamma: float = 0.99,
        train_freq: int | tuple[int, str] = 1,
        gradient_steps: int = 20,
        action_noise: ActionNoise | None = None,
        replay_buffer_class: type[SequenceReplayBuffer] | None = None,
        replay_buffer_kwargs: dict[str, Any] | None = None,
        optimize_memory_usage: bool = False,
        offline_dataset: DatasetSources | None = None,
        pretrain_steps: int = 10_000,
        offline_fraction: float = 0.5,
        noise_critic_steps: int = 1,
        ent_coef: str | float = "auto",
        target_entropy: float = 0.0,
        actor_tau: float = 0.005,
        actor_decay_start: int = 1000,
        max_grad_norm: float = 20.0,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
    ):
        super().__init__(
            policy,
            env,
            learning_rate,
            buffer_size,
            learning_starts,
            batch_size,
            tau,
            gamma,
            train_freq,
            gradient_steps,
            action_noise,
            replay_buffer_class=replay_buffer_class,
            replay_buffer_kwargs=replay_buffer_kwargs,
            optimize_memory_usage=optimize_memory_usage,
            policy_kwargs=policy_kwargs,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            verbose=verbose,
            device=device,
            seed=seed,
            offline_dataset=offline_dataset,
            pretrain_steps=pretrain_steps,
            offline_fraction=offline_fraction,
            actor_tau=actor_tau,
            actor_decay_start=actor_decay_start,
            max_grad_norm=max_grad_norm,
        )
        check_count(1, noise_critic_steps=noise_critic_steps)
        check_ent_coef(ent_coef)
        check_number(target_entropy=target_entropy)
        self.noise_critic_steps = noise_critic_steps
        self.ent_coef = ent_coef
        self.target_entropy = target_entropy
        if _init_setup_model:
            self._setup_model()

    def _setup_model(self) -> None:
        super()._setup_model()
        self.noise_critic_optimizer = self._make_optimizer(self.policy.noise_critic.parameters())
        self.noise_actor_optimizer = self._make_optimizer(self.policy.noise_actor.parameters())
        start = str(self.ent_coef).removeprefix("auto").removeprefix("_") or "1"
        self.log_ent_coef = th.tensor(float(start), device=self.device).log().requires_grad_()
        self.ent_coef_optimizer = self._make_optimizer([self.log_ent_coef])

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return super()._get_torch_save_params()[0], ["log_ent_coef"]

    def _next_values(self, features: th.Tensor) -> th.Tensor:
        """The least target Q of the steered policy's chunk, and its entropy (algorithm 1, as in SAC)."""
        policy = self.policy
        noise, log_prob = policy.noise_actor.action_log_prob(features)
        chunks = policy.denoise(features, noise)
        return policy.critic_target(features, policy.executed(chunks)).amin(0) - self.log_ent_coef.exp() * log_prob

    def _update_policy(self, batch: SequenceBatch, transitions: ChunkTransitions, phase: Phase) -> Metrics:
        metrics = {}
        if phase == "offline" and not self._actor_is_given:
            metrics["clone_loss"] = self._clone_batch(batch)["actor_loss"]
        for _ in range(self.noise_critic_steps):
            metrics |= self._update_noise_critic(transitions)
        return metrics | self._update_noise_actor(transitions.features)

    def _update_noise_critic(self, transitions: ChunkTransitions) -> Metrics:
        """Q(s, noise) towards Q(s, chunk) of what random noise becomes (eq. 2)."""
        policy, features = self.policy, transitions.features
        with th.no_grad():
            noise = th.randn(len(features), policy.noise_dim, device=self.device) / policy.noise_magnitude
            noise = noise.clamp(-1, 1)  # what the actor can choose
            targets = policy.critic(features, policy.executed(policy.denoise(features, noise))).amin(0)
        metrics = self._regress(policy.noise_critic, self.noise_critic_optimizer, features, noise, targets)
        return {"noise_q_loss": metrics["q_loss"]}

    def _update_noise_actor(self, features: th.Tensor) -> Metrics:
        """SAC's actor and temperature on Q(s, noise)."""
        policy = self.policy
        noise, log_prob = policy.noise_actor.action_log_prob(features)
        q_values = policy.noise_critic(features, noise).amin(0)
        ent_coef = self.log_ent_coef.detach().exp()
        loss = (ent_coef * log_prob - q_values).mean()
        self._optimize(self.noise_actor_optimizer, loss)
        if isinstance(self.ent_coef, str):
            surplus = (log_prob + self.target_entropy).detach().mean()
            self._optimize(self.ent_coef_optimizer, -self.log_ent_coef * surplus)
        return {"actor_loss": loss.detach(), "ent_coef": ent_coef, "entropy": -log_prob.detach().mean()}
