"""MODIP: fine-tune a diffusion policy with a model-predictive planner (arXiv:2606.10825)."""

from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, PyTorchObs, Schedule
from stable_baselines3.common.utils import polyak_update

from modip_sb3.acting import ActingMode, ChunkState
from modip_sb3.base import Metrics, Phase
from modip_sb3.buffers import LabelBuffer, SequenceBatch, SequenceReplayBuffer, map_obs
from modip_sb3.checks import check_at_least, check_choice, check_count, check_fraction, check_keywords
from modip_sb3.critics import compute_expectile_loss, compute_lambda_returns, compute_q_loss
from modip_sb3.datasets import DatasetSources
from modip_sb3.mixing import advantage_weights, better_share, better_weights, offline_share, rate_episodes
from modip_sb3.planner import MPPI, PLANNER_ARGUMENTS, Plan
from modip_sb3.policies import MODIPPolicy
from modip_sb3.pretrained import DiffusionAlgorithm
from modip_sb3.world_model import compute_world_model_loss

# With data the model is trusted only between the policy's own proposals: the best of them, without refinement
RANK_PROPOSALS = {"num_samples": 0, "num_elites": 1, "min_std": 0.02, "max_std": 0.02}
SEARCH_WIDELY = {"num_samples": 48, "min_std": 0.1, "max_std": 1.0}


class Chunks(NamedTuple):
    """What the policy clones."""

    actions: th.Tensor
    """In [-1, 1] ``(B, T, A)``."""
    condition: th.Tensor
    """What the actor is conditioned on where they start ``(B, C)``."""
    weights: th.Tensor
    """Of each action in the loss ``(B, T)``."""


class MODIP(DiffusionAlgorithm):
    """
    Model-based optimisation of a diffusion policy (MODIP, arXiv:2606.10825).

    A diffusion policy is cloned from offline data, together with a latent world model and critics that do not depend
    on it.
    Online, MPPI in the world model improves on the policy's proposals, and what it executes is cloned back into the
    policy with the denoising loss. Without offline data everything is learned from the planner's own experience.

    :param policy: "MlpPolicy", "MultiInputPolicy" or a subclass of :class:`MODIPPolicy`
    :param env: the environment, or its Gymnasium id
    :param learning_rate: of all networks (the encoder learns at 0.3 of it, as in TD-MPC2), or a schedule
    :param buffer_size: transitions of online experience that are kept
    :param learning_starts: environment steps before learning; random ones unless there was an offline phase
    :param batch_size: sequences in a batch
    :param tau: rate at which the critics' targets follow
    :param gamma: discount factor; at 0.99 a failure 200 steps ahead hardly counts: on Hopper 0.995 is much better
    :param train_freq: environment steps (or episodes) between updates; with one at each step the policy alone was
        worse after 10,000 steps on Hopper and HalfCheetah
    :param gradient_steps: updates each time; -1 for as many as environment steps
    :param action_noise: added to what is executed; the planner's own spread explores without it
    :param replay_buffer_class: a subclass of :class:`SequenceReplayBuffer`
    :param replay_buffer_kwargs: its keyword arguments
    :param optimize_memory_usage: accepted for SB3's sake, observations are never stored twice
    :param n_steps: rewards that the λ-returns look at before they bootstrap; 1 is the one-step TD target
    :param offline_dataset: Minari id or folder, D4RL or robomimic HDF5 file, SB3 replay buffer, arrays, or a list of
        them, with options; see :meth:`OfflineDataset.load` and :func:`~modip_sb3.datasets.load_sources`
    :param pretrain_steps: updates of the offline phase that ``learn()`` starts with if ``pretrain()`` was not called
    :param offline_fraction: share of offline sequences in every online batch
    :param rollout_with: what collects experience in ``learn()``, "planner" or "policy"; "auto" for whichever has the
        better episodes, see :class:`~modip_sb3.trial.Trial`, where good demonstrations mislead the planner
    :param n_plan_steps: environment steps that ``learn()`` executes a plan for, None for the whole plan; ``predict()``
        executes the policy's ``n_action_steps`` of it
    :param inference: what ``predict()`` uses, "policy" or "planner"; also with the latter the policy acts alone once
        ``rollout_with="auto"`` has found it to be better
    :param planner_kwargs: settings of :class:`~modip_sb3.planner.MPPI`; by default the best of the policy's proposals
        is taken where there is offline data, and the search is wide otherwise
    :param critic_target: "v" for r + γV(s'), or "policy" for r + γQ(s', π(s'))
    :param td_lambda: λ of the critics' targets
    :param expectile: τ of the state value; towards 1 it takes the best action in the data for granted
    :param rho: weight of each further step of the model's rollout in its losses
    :param distill_steps: updates of the policy in each update, on batches of their own
    :param distill_batch_size: chunks in those batches, of which the weights let a part count; with 64 the policy alone
        fell at first on HalfCheetah
    :param distill_offline_fraction: share of offline chunks in those batches; "auto" lowers it as the episodes of
        ``learn()`` become better, or more, than those of the data, see :func:`~modip_sb3.mixing.offline_share`
        and :func:`~modip_sb3.mixing.better_share`
    :param distill_episodes: "all" draws the other chunks from all of ``learn()``; "better" from each episode that is as
        good as the data's median, by its odds of being better than the data: where rewards are sparse, failures are
        most of the steps, see :func:`~modip_sb3.mixing.better_weights`
    :param distill_from: what the policy clones: "executed" chunks, "relabel" (replay states, the planner's chunks),
        "both"
    :param distill_weighting: "advantage" weights executed chunks by exp(β A / σ_A), "uniform" is the paper's loss
    :param distill_beta: β of the advantage weights; raising it clones fewer, better chunks
    :param relabel_freq: updates between two calls of the planner for a batch of labels
    :param actor_tau: rate at which the policy's exponential moving average follows
    :param actor_decay_start: updates of the policy after which its learning rate falls with the inverse square root of
        their number
    :param actor_reset_freq: updates between two clonings of the policy anew, from other first weights, 0 for never:
        a clone of few demonstrations takes up little of what comes after them
    :param actor_reset_steps: updates of each of these clonings
    :param max_grad_norm: gradients are clipped to this norm
    :param stats_window_size: episodes that the rollout statistics average over
    :param tensorboard_log: where TensorBoard logs go
    :param policy_kwargs: arguments of :class:`MODIPPolicy`: denoiser, chunk and planning lengths, networks
    :param verbose: 0 no output, 1 info, 2 debug
    :param seed: seed of the pseudo random generators
    :param device: "auto", "cpu", "cuda" ...
    :param _init_setup_model: whether to build the networks now
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MODIPPolicy,
        "MultiInputPolicy": MODIPPolicy,
    }
    policy: MODIPPolicy
    optimizer_names = ("model_optimizer", "value_optimizer", "actor_optimizer")
    rollout_choices = ("auto", "policy", "planner")

    def __init__(
        self,
        policy: str | type[MODIPPolicy],
        env: GymEnv | str | None,
        learning_rate: float | Schedule = 1e-3,
        buffer_size: int = 1_000_000,
        learning_starts: int = 100,
        batch_size: int = 64,
        tau: float = 0.02,
        gamma: float = 0.99,
        train_freq: int | tuple[int, str] = 2,
        gradient_steps: int = 1,
        action_noise: ActionNoise | None = None,
        replay_buffer_class: type[SequenceReplayBuffer] | None = None,
        replay_buffer_kwargs: dict[str, Any] | None = None,
        optimize_memory_usage: bool = False,
        n_steps: int = 16,
        offline_dataset: DatasetSources | None = None,
        pretrain_steps: int = 10_000,
        offline_fraction: float = 0.5,
        rollout_with: Literal["auto"] | ActingMode = "planner",
        n_plan_steps: int | None = None,
        inference: ActingMode = "policy",
        planner_kwargs: dict[str, Any] | None = None,
        critic_target: Literal["v", "policy"] = "v",
        td_lambda: float = 0.95,
        expectile: float = 0.7,
        rho: float = 0.5,
        distill_steps: int = 1,
        distill_batch_size: int = 256,
        distill_offline_fraction: float | Literal["auto"] = "auto",
        distill_episodes: Literal["all", "better"] = "all",
        distill_from: Literal["executed", "relabel", "both"] = "executed",
        distill_weighting: Literal["advantage", "uniform"] = "advantage",
        distill_beta: float = 2.0,
        relabel_freq: int = 50,
        actor_tau: float = 0.005,
        actor_decay_start: int = 1000,
        actor_reset_freq: int = 0,
        actor_reset_steps: int = 15_000,
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
            n_steps=n_steps,
            policy_kwargs=policy_kwargs,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            verbose=verbose,
            device=device,
            seed=seed,
            sde_support=False,
            supported_action_spaces=(spaces.Box,),
            support_multi_env=True,
            offline_dataset=offline_dataset,
            pretrain_steps=pretrain_steps,
            offline_fraction=offline_fraction,
            rollout_with=rollout_with,
            inference=inference,
            actor_tau=actor_tau,
            actor_decay_start=actor_decay_start,
            max_grad_norm=max_grad_norm,
        )
        check_count(0, distill_steps=distill_steps, actor_reset_freq=actor_reset_freq)
        check_count(1, distill_batch_size=distill_batch_size, relabel_freq=relabel_freq)
        check_count(1, actor_reset_steps=actor_reset_steps)
        check_at_least(0, distill_beta=distill_beta)
        check_fraction(td_lambda=td_lambda, expectile=expectile, rho=rho)
        if distill_offline_fraction != "auto":
            check_fraction(distill_offline_fraction=distill_offline_fraction)
        check_choice("critic_target", critic_target, "v", "policy")
        check_choice("distill_episodes", distill_episodes, "all", "better")
        check_choice("distill_from", distill_from, "executed", "relabel", "both")
        check_choice("distill_weighting", distill_weighting, "advantage", "uniform")
        check_keywords("planner_kwargs", planner_kwargs, MPPI, *PLANNER_ARGUMENTS)
        self.planner_defaults = SEARCH_WIDELY if offline_dataset is None else RANK_PROPOSALS
        self.planner_kwargs = dict(planner_kwargs or {})
        self.n_plan_steps = n_plan_steps
        self.critic_target = critic_target
        self.td_lambda, self.expectile, self.rho = td_lambda, expectile, rho
        self.distill_steps, self.distill_batch_size = distill_steps, distill_batch_size
        self.distill_offline_fraction, self.distill_episodes = distill_offline_fraction, distill_episodes
        self.distill_from = distill_from
        self.distill_weighting = distill_weighting
        self.distill_beta = distill_beta
        self.relabel_freq = relabel_freq
        self.actor_reset_freq, self.actor_reset_steps = actor_reset_freq, actor_reset_steps
        if _init_setup_model:
            self._setup_model()

    def _setup_model(self) -> None:
        super()._setup_model()
        self.policy.inference = self.inference
        self.policy.planner_kwargs = {"gamma": self.gamma, **self.planner_defaults, **self.planner_kwargs}
        self.policy.check_planner()
        if self.n_plan_steps is None:
            self.n_plan_steps = self.policy.horizon
        check_count(1, n_plan_steps=self.n_plan_steps)
        if self.n_plan_steps > self.policy.horizon:
            raise ValueError(
                f"n_plan_steps={self.n_plan_steps} must not exceed the plans' horizon={self.policy.horizon}: lower it, "
                "or raise horizon in policy_kwargs."
            )
        if self.distill_from != "executed" and self.policy.horizon != self.policy.action_horizon:
            raise ValueError(
                f"distill_from={self.distill_from!r} clones plans of horizon={self.policy.horizon} as chunks of "
                f"action_horizon={self.policy.action_horizon}: set both to the same length in policy_kwargs."
            )
        self._label_buffer = LabelBuffer(10_000)
        self._setup_optimizers()

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_label_buffer"]

    def _act(self, obs: PyTorchObs, state: ChunkState, mode: ActingMode) -> tuple[np.ndarray, ChunkState, Plan | None]:
        assert self.n_plan_steps is not None
        return self.policy.act(obs, state, mode, deterministic=False, n_plan_steps=self.n_plan_steps)

    def _setup_optimizers(self) -> None:
        self.model_optimizer = self._make_model_optimizer()
        self.value_optimizer = self._make_optimizer(self.policy.value.parameters())
        self.actor_optimizer = self._make_optimizer(self.policy.actor.parameters())

    def _update(self, batch: SequenceBatch, phase: Phase) -> Metrics:
        """World model, critics, policy and targets."""
        features = self._features(batch)
        metrics = {} if phase == "clone" else self._update_model_and_critics(batch, features)
        if phase == "online":
            if self.distill_from != "executed":
                self._relabel_if_due()
            if self.actor_reset_freq > 0 and (self._n_updates + 1) % self.actor_reset_freq == 0:
                self._clone_anew(self.actor_reset_steps, self._distill)
            for _ in range(self.distill_steps):
                metrics.update(self._distill())
        else:
            horizon = self.policy.action_horizon
            condition = self.policy.actor_condition(features[:, 0])
            metrics.update(self._clone(batch.actions[:, :horizon], condition, batch.mask[:, :horizon]))
        return metrics

    def _features(self, batch: SequenceBatch) -> th.Tensor:
        """Of all observations ``(B, L + 1, F)``."""
        flat_obs = map_obs(lambda obs: obs.flatten(0, 1), batch.observations)
        return self.policy.features(flat_obs).unflatten(0, (len(batch.mask), -1))

    def _update_model_and_critics(self, batch: SequenceBatch, features: th.Tensor) -> Metrics:
        """World model, Q, V and their targets."""
        policy, horizon = self.policy, self.policy.horizon
        returns, _, data_latents = self._compute_returns(batch, features.detach())
        steps = SequenceBatch(batch.observations, *(part[:, :horizon] for part in batch[1:]))
        features, targets = features[:, 0], data_latents[:, 1 : horizon + 1]
        latents, metrics = self._update_model(steps, features, targets, returns[:, :horizon])
        metrics.update(self._update_value(steps, latents.detach()))
        polyak_update(policy.value.parameters(), policy.value_target.parameters(), self.tau)
        polyak_update(policy.critic.parameters(), policy.critic_target.parameters(), self.tau)
        return metrics

    @th.no_grad()
    def _compute_returns(self, batch: SequenceBatch, features: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """
        λ-returns of every step, from target values that need no policy, or from Q(s', π(s')) ``(B, L)``; with the
        target values ``(B, L + 1)`` and the latents ``(B, L + 1, Z)``.
        """
        latents = self.policy.world_model.encode(features)
        values = self.policy.value_target(latents).mean(0)
        next_values = values[:, 1:]
        if self.critic_target == "policy":
            condition = self.policy.actor_condition(features[:, 1:].flatten(0, 1))
            next_actions = self.policy.sample_chunks(condition)[:, 0].view_as(batch.actions)
            next_values = self.policy.critic_target(latents[:, 1:], next_actions).amin(0)
        returns = compute_lambda_returns(
            batch.rewards, next_values, batch.terminations, batch.mask, self.gamma, self.td_lambda, self.n_steps
        )
        return returns, values, latents

    def _step_weights(self, mask: th.Tensor) -> th.Tensor:
        return mask * self.rho ** th.arange(mask.shape[1], device=mask.device)

    def _update_model(
        self, batch: SequenceBatch, features: th.Tensor, target_latents: th.Tensor, returns: th.Tensor
    ) -> tuple[th.Tensor, Metrics]:
        """World model and Q, whose gradient reaches the encoder; returns the rollout's latents ``(B, L + 1, Z)``."""
        model, weights = self.policy.world_model, self._step_weights(batch.mask)
        latents = model.rollout(model.encode(features), batch.actions)
        loss, metrics = compute_world_model_loss(
            model, latents, target_latents, batch.actions, batch.rewards, batch.terminations, weights
        )
        q_loss, q_metrics = compute_q_loss(self.policy.critic, latents[:, :-1], batch.actions, returns, weights)
        self._optimize(self.model_optimizer, loss + 0.1 * q_loss)
        return latents, metrics | q_metrics

    def _update_value(self, batch: SequenceBatch, latents: th.Tensor) -> Metrics:
        """V towards the upper expectile of the target Q over the data's actions."""
        latents, weights = latents[:, :-1], self._step_weights(batch.mask)
        with th.no_grad():
            q_values = self.policy.critic_target(latents, batch.actions).amin(0)
        loss, metrics = compute_expectile_loss(self.policy.value, latents, q_values, weights, self.expectile)
        self._optimize(self.value_optimizer, loss)
        return metrics

    def _distill(self) -> Metrics:
        """Clone what was executed, the planner's labels, or both."""
        sources = []
        if self.distill_from != "relabel":
            sources.append(self._executed_chunks(self.distill_batch_size))
        if self.distill_from != "executed":
            sources.append(self._labelled_chunks(self.distill_batch_size))
        return self._clone(*map(th.cat, zip(*sources, strict=True)))

    def _sample_distilled(self, batch_size: int, length: int) -> SequenceBatch:
        """From offline data and replay, in the shares that are to be cloned."""
        fraction, replay = self.distill_offline_fraction, self.replay_buffer
        better = self.distill_episodes == "better"
        if not self._offline_buffers or (fraction != "auto" and not better):
            return self._sample_batch(batch_size, length, None if fraction == "auto" else fraction)
        online, offline = replay.episodes(), [buffer.episodes() for buffer in self._offline_buffers]
        offline_steps = sum(buffer.size() for buffer in self._offline_buffers)
        ratings = rate_episodes(offline, self._offline_shares, online)
        if better:
            weights = better_weights(ratings, sum(len(source.returns) for source in offline))
            share = better_share(weights, online.lengths, offline_steps)
            sample_online = partial(replay.sample_episodes, weights)
        else:
            share, sample_online = offline_share(ratings, online.lengths, offline_steps), None
        if fraction == "auto" or share == 1:  # nothing else is to be cloned yet
            fraction = share
        self.logger.record("train/offline_share", fraction)
        return self._sample_batch(batch_size, length, fraction, sample_online)

    @th.no_grad()
    def _executed_chunks(self, batch_size: int) -> Chunks:
        """Chunks from replay, weighted by their advantage or not."""
        batch = self._sample_distilled(batch_size, self.policy.action_horizon)
        features, weights = self._features(batch), batch.mask
        if self.distill_weighting == "advantage":
            returns, values, _ = self._compute_returns(batch, features)
            weights = weights * advantage_weights(returns[:, 0] - values[:, 0], self.distill_beta)[:, None]
        return Chunks(batch.actions, self.policy.actor_condition(features[:, 0]), weights)

    @th.no_grad()
    def _labelled_chunks(self, batch_size: int) -> Chunks:
        obs, actions = self._label_buffer.sample(batch_size, self.device)
        return Chunks(actions, self.policy.actor_condition(self.policy.features(obs)), th.ones_like(actions[..., 0]))

    def _relabel_if_due(self) -> None:
        """Plan at states of the policy's batches and keep the chunks for it to clone."""
        if self._n_updates % self.relabel_freq != 0 and len(self._label_buffer) > 0:
            return
        obs = map_obs(lambda array: array[:, 0], self._sample_distilled(self.batch_size, 1).observations)
        self.policy.set_training_mode(False)
        try:
            plan = self.policy.plan(obs, deterministic=True)
        finally:
            self.policy.set_training_mode(True)
        self._label_buffer.add(map_obs(lambda array: array.cpu().numpy(), obs), plan.actions.cpu().numpy())
        self.logger.record("train/label_gain", (plan.value - plan.proposal_value).mean().item())
