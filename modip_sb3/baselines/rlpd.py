"""RLPD: SAC with prior data (Ball et al., "Efficient Online Reinforcement Learning with Offline Data", 2302.02948)."""

from typing import Any, ClassVar, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3 import SAC
from stable_baselines3.common.buffers import NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.policies import BasePolicy, ContinuousCritic
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, create_mlp
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, ReplayBufferSamples, Schedule
from stable_baselines3.common.utils import polyak_update
from stable_baselines3.sac.policies import MultiInputPolicy, SACPolicy
from torch import nn
from torch.nn import functional as F

from modip_sb3.buffers import SequenceReplayBuffer, map_obs
from modip_sb3.checks import (
    BUFFER_ARGUMENTS,
    check_count,
    check_ent_coef,
    check_flags,
    check_fraction,
    check_keywords,
    check_number,
    check_one_hot,
)
from modip_sb3.datasets import DatasetSources
from modip_sb3.faults import finite_distribution
from modip_sb3.offline import OfflineDataAlgorithm

Metrics = dict[str, th.Tensor]
SelfRLPD = TypeVar("SelfRLPD", bound="RLPD")


class LayerNormCritic(ContinuousCritic):
    """
    SB3's critics with LayerNorm after every hidden layer, which bounds what they say of actions outside of the data
    (section 4.2). One network after another: as one batched product ten of them are no faster on a CPU.

    :param net_arch: widths of the hidden layers
    :param features_dim: number of features
    :param activation_fn: activation function
    :param n_critics: number of members
    :param kwargs: keyword arguments of :class:`ContinuousCritic`
    """

    def __init__(
        self,
        *,
        net_arch: list[int],
        features_dim: int,
        activation_fn: type[nn.Module] = nn.ReLU,
        n_critics: int = 10,
        **kwargs: Any,
    ):
        super().__init__(net_arch=net_arch, features_dim=features_dim, n_critics=0, **kwargs)
        self.n_critics = n_critics
        input_dim = features_dim + get_action_dim(self.action_space)
        for index in range(n_critics):
            layers = create_mlp(input_dim, 1, net_arch, activation_fn, post_linear_modules=[nn.LayerNorm])
            self.q_networks.append(nn.Sequential(*layers))
            self.add_module(f"qf{index}", self.q_networks[-1])

    def random_subset(self, obs: Any, actions: th.Tensor, size: int) -> th.Tensor:
        """
        :param obs: observations ``(B, *obs_shape)``
        :param actions: in [-1, 1] ``(B, A)``
        :param size: number of members, drawn at random (REDQ, arXiv:2101.05982)
        :return: their values ``(B, size)``
        """
        inputs = th.cat([self.extract_features(obs, self.features_extractor), actions], dim=1)
        members = np.random.choice(self.n_critics, size, replace=False)
        return th.cat([self.q_networks[member](inputs) for member in members], dim=1)


class RLPDPolicy(SACPolicy):
    """
    SAC's policy with an ensemble of critics with LayerNorm.

    :param observation_space: observation space
    :param action_space: action space
    :param lr_schedule: learning rate schedule
    :param n_critics: number of critics
    :param kwargs: keyword arguments of :class:`SACPolicy`
    """

    critic: LayerNormCritic
    critic_target: LayerNormCritic

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        lr_schedule: Schedule,
        n_critics: int = 10,
        **kwargs: Any,
    ):
        check_count(1, n_critics=n_critics)
        super().__init__(observation_space, action_space, lr_schedule, n_critics=n_critics, **kwargs)

    def make_critic(self, features_extractor: BaseFeaturesExtractor | None = None) -> LayerNormCritic:
        critic_kwargs = self._update_features_extractor(self.critic_kwargs, features_extractor)
        return LayerNormCritic(**critic_kwargs).to(self.device)

    def _predict(self, observation: Any, deterministic: bool = False) -> th.Tensor:
        with finite_distribution():
            return super()._predict(observation, deterministic)


class RLPDMultiInputPolicy(RLPDPolicy, MultiInputPolicy):
    """:class:`RLPDPolicy` for Dict observations."""


class RLPD(OfflineDataAlgorithm, SAC):
    """
    Soft Actor-Critic with offline data: half of every batch is drawn from it, the critics are an ensemble with
    LayerNorm, and they learn several times for each environment step. Nothing is learned before the first step.

    Without offline data this is SAC with that ensemble.

    :param policy: "MlpPolicy", "MultiInputPolicy" or a subclass of :class:`RLPDPolicy`
    :param env: the environment, or its Gymnasium id
    :param learning_rate: of all networks, or a schedule
    :param buffer_size: transitions of online experience that are kept
    :param learning_starts: random environment steps before learning; 5000 in the authors' runs
    :param batch_size: transitions in a batch, offline and online ones together
    :param tau: rate at which the target critics follow
    :param gamma: discount factor
    :param train_freq: environment steps (or episodes) between updates
    :param gradient_steps: updates of the critics each time; -1 for as many as environment steps. The paper's 20 take
        .8 s for each environment step on one CPU core; these 2 take about as long as a step of MODIP
    :param action_noise: added to what is executed; the policy explores without it
    :param replay_buffer_class: replay buffer of the online experience, SB3's by default
    :param replay_buffer_kwargs: its keyword arguments
    :param optimize_memory_usage: see :class:`ReplayBuffer`
    :param n_steps: rewards that are added up before the target bootstraps
    :param offline_dataset: Minari id or folder, D4RL or robomimic HDF5 file, SB3 replay buffer, arrays, or a list of
        them, with options; see :meth:`OfflineDataset.load` and :func:`~modip_sb3.datasets.load_sources`
    :param offline_fraction: share of offline transitions in every batch
    :param policy_delay: updates of the critics for one of actor and temperature; the paper's actor learns once for each
        environment step, so give it the value of ``gradient_steps``
    :param n_target_critics: random members of the ensemble whose minimum is the target; 1 in the authors' AntMaze runs
    :param backup_entropy: whether targets hold the entropy of the next action; the authors leave it out where rewards
        are sparse
    :param ent_coef: entropy coefficient, or "auto" to learn it, or "auto_0.1" to start at 0.1
    :param target_entropy: that ``ent_coef="auto"`` aims at; "auto" is half of the negative number of action dimensions,
        as in the authors' code
    :param stats_window_size: episodes that the rollout statistics average over
    :param tensorboard_log: where TensorBoard logs go
    :param policy_kwargs: arguments of :class:`RLPDPolicy`; the authors take ``net_arch=[256, 256, 256]`` where
        rewards are sparse
    :param verbose: 0 no output, 1 info, 2 debug
    :param seed: seed of the pseudo random generators
    :param device: "auto", "cpu", "cuda" ...
    :param _init_setup_model: whether to build the networks now
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": RLPDPolicy,
        "MultiInputPolicy": RLPDMultiInputPolicy,
    }
    policy: RLPDPolicy
    critic: LayerNormCritic
    critic_target: LayerNormCritic
    replay_buffer: ReplayBuffer

    def __init__(
        self,
        policy: str | type[RLPDPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 3e-4,
        buffer_size: int = 1_000_000,
        learning_starts: int = 100,
        batch_size: int = 256,
        tau: float = 0.005,
        gamma: float = 0.99,
        train_freq: int | tuple[int, str] = 1,
        gradient_steps: int = 2,
        action_noise: ActionNoise | None = None,
        replay_buffer_class: type[ReplayBuffer] | None = None,
        replay_buffer_kwargs: dict[str, Any] | None = None,
        optimize_memory_usage: bool = False,
        n_steps: int = 1,
        offline_dataset: DatasetSources | None = None,
        offline_fraction: float = 0.5,
        policy_delay: int = 2,
        n_target_critics: int = 2,
        backup_entropy: bool = True,
        ent_coef: str | float = "auto",
        target_entropy: str | float = "auto",
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
            n_steps=n_steps,
            ent_coef=ent_coef,
            target_entropy=target_entropy,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            seed=seed,
            device=device,
            _init_setup_model=False,
        )
        check_count(1, policy_delay=policy_delay, n_target_critics=n_target_critics)
        check_fraction(offline_fraction=offline_fraction)
        check_flags(backup_entropy=backup_entropy)
        check_ent_coef(ent_coef)
        if target_entropy != "auto":
            check_number(target_entropy=target_entropy)
        self.offline_dataset = offline_dataset
        self.offline_fraction = offline_fraction
        self.policy_delay = policy_delay
        self.n_target_critics = n_target_critics
        self.backup_entropy = backup_entropy
        if _init_setup_model:
            self._setup_model()

    def _setup_model(self) -> None:
        if self.target_entropy == "auto":
            self.target_entropy = -get_action_dim(self.action_space) / 2
        check_one_hot(self.observation_space)
        buffer_class = self.replay_buffer_class or (ReplayBuffer if self.n_steps == 1 else NStepReplayBuffer)
        check_keywords("replay_buffer_kwargs", self.replay_buffer_kwargs, buffer_class, *BUFFER_ARGUMENTS)
        super()._setup_model()
        if self.n_target_critics > self.critic.n_critics:
            raise ValueError(
                f"n_target_critics={self.n_target_critics} cannot be drawn from n_critics={self.critic.n_critics}: "
                "lower it, or raise n_critics in policy_kwargs."
            )

    def _load_offline_data(self) -> None:
        datasets = self._fill_offline_buffers(min_length=1)
        if datasets and self._n_updates == 0:
            self._fit_vec_normalize(datasets)
        for buffer in self._offline_buffers:
            buffer.n_steps, buffer.gamma = self.n_steps, self.gamma

    def learn(
        self: SelfRLPD,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 4,
        tb_log_name: str = "RLPD",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfRLPD:
        """Act and learn, from online and offline data alike; see :meth:`SAC.learn`."""
        self._load_offline_data()
        return super().learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)

    def _setup_learn(self, *args: Any, **kwargs: Any) -> Any:
        last_obs, buffer = self._last_obs, self.replay_buffer
        result = super()._setup_learn(*args, **kwargs)
        was_reset = self._last_obs is not last_obs
        if was_reset and isinstance(buffer, NStepReplayBuffer) and not isinstance(buffer, SequenceReplayBuffer):
            last = buffer.pos - 1  # or SB3's n-step returns would run on into the new episode
            buffer.timeouts[last] = np.logical_or(buffer.timeouts[last], np.logical_not(buffer.dones[last]))
        return result

    def train(self, gradient_steps: int, batch_size: int = 64) -> None:
        """
        Update the critics at every step, actor and temperature at every ``policy_delay``-th (algorithm 1).

        :param gradient_steps: number of updates
        :param batch_size: transitions in a batch
        """
        self.policy.set_training_mode(True)
        optimizers = [self.actor.optimizer, self.critic.optimizer]
        if self.ent_coef_optimizer is not None:
            optimizers.append(self.ent_coef_optimizer)
        self._update_learning_rate(optimizers)
        for _ in range(gradient_steps):
            self._n_updates += 1
            with self._skipping("train"):
                batch = self._sample_batch(batch_size)
                metrics = self._update_critic(batch)
                if self._n_updates % self.policy_delay == 0:
                    metrics |= self._update_actor(batch)
                for name, value in metrics.items():
                    self.logger.record_mean(f"train/{name}", value.item())
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")

    def _sample_batch(self, batch_size: int) -> ReplayBufferSamples:
        """Offline and online transitions in one batch: symmetric sampling (section 4.1)."""
        num_offline = round(batch_size * self.offline_fraction) if self._offline_buffers else 0
        vec_normalize = self._vec_normalize_env
        batches: list[Any] = []
        if num_offline > 0:
            batches += [buffer.sample(n, vec_normalize) for buffer, n in self._offline_counts(num_offline)]
        if num_offline < batch_size:
            online = self.replay_buffer.sample(batch_size - num_offline, vec_normalize)
            if online.discounts is None:  # SB3's buffers of single steps
                online = online._replace(discounts=th.full_like(online.rewards, self.gamma))
            batches.append(online)
        return ReplayBufferSamples(*(map_obs(lambda *p: th.cat(p), *parts) for parts in zip(*batches, strict=True)))

    @property
    def _entropy_weight(self) -> th.Tensor:
        """The entropy coefficient α, without gradient."""
        return self.ent_coef_tensor if self.log_ent_coef is None else self.log_ent_coef.detach().exp()

    def _update_critic(self, batch: ReplayBufferSamples) -> Metrics:
        assert batch.discounts is not None
        with th.no_grad():
            with finite_distribution():
                next_actions, next_log_probs = self.actor.action_log_prob(batch.next_observations)
            next_values = self.critic_target.random_subset(batch.next_observations, next_actions, self.n_target_critics)
            next_values = next_values.amin(1, keepdim=True)  # (B, 1)
            if self.backup_entropy:
                next_values = next_values - self._entropy_weight * next_log_probs[:, None]
            targets = batch.rewards + (1 - batch.dones) * batch.discounts * next_values
        q_values = th.cat(self.critic(batch.observations, batch.actions), dim=1)  # (B, E)
        loss = F.mse_loss(q_values, targets.expand_as(q_values))
        self._optimize(self.critic.optimizer, loss)
        polyak_update(self.critic.parameters(), self.critic_target.parameters(), self.tau)
        return {"critic_loss": loss.detach(), "q_mean": q_values.detach().mean()}

    def _update_actor(self, batch: ReplayBufferSamples) -> Metrics:
        """The actor towards the ensemble's mean, not its minimum; then the temperature."""
        weight = self._entropy_weight
        with finite_distribution():
            actions, log_probs = self.actor.action_log_prob(batch.observations)
        q_values = th.cat(self.critic(batch.observations, actions), dim=1).mean(1)
        loss = (weight * log_probs - q_values).mean()
        self._optimize(self.actor.optimizer, loss)
        metrics = {"actor_loss": loss.detach(), "ent_coef": weight}
        if self.ent_coef_optimizer is not None and self.log_ent_coef is not None:
            ent_coef_loss = -(self.log_ent_coef * (log_probs.detach() + float(self.target_entropy))).mean()
            self._optimize(self.ent_coef_optimizer, ent_coef_loss)
            metrics["ent_coef_loss"] = ent_coef_loss.detach()
        return metrics
