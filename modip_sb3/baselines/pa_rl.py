"""PA-RL: policy-agnostic RL, which clones actions that the critic has improved (Mark et al., arXiv:2412.06685)."""

from typing import Any, ClassVar

import torch as th
from gymnasium import spaces
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule

from modip_sb3.base import Metrics, Phase
from modip_sb3.baselines.chunk_critics import ChunkTransitions
from modip_sb3.baselines.implicit_critics import ImplicitCriticAlgorithm, ImplicitCriticPolicy
from modip_sb3.buffers import SequenceBatch, SequenceReplayBuffer
from modip_sb3.checks import check_at_least, check_count
from modip_sb3.datasets import DatasetSources


class PARLPolicy(ImplicitCriticPolicy):
    """
    An :class:`ImplicitCriticPolicy` whose candidates are refined before one is chosen.

    :param observation_space: observation space, a Box or a Dict of Box spaces
    :param action_space: action space, a bounded Box
    :param lr_schedule: unused here: the algorithm owns the optimisers
    :param num_refined: best candidates that are refined (global optimisation keeps so many)
    :param num_gradient_steps: steps of local optimisation, along the gradient of the critics' mean
    :param step_size: their size
    :param kwargs: keyword arguments of :class:`ImplicitCriticPolicy`
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        lr_schedule: Schedule,
        num_refined: int = 10,
        num_gradient_steps: int = 10,
        step_size: float = 3e-4,
        **kwargs: Any,
    ):
        check_count(1, num_refined=num_refined)
        check_count(0, num_gradient_steps=num_gradient_steps)
        check_at_least(0, step_size=step_size)
        self.num_refined, self.num_gradient_steps, self.step_size = num_refined, num_gradient_steps, step_size
        super().__init__(observation_space, action_space, lr_schedule, **kwargs)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return super()._get_constructor_parameters() | {
            "num_refined": self.num_refined,
            "num_gradient_steps": self.num_gradient_steps,
            "step_size": self.step_size,
        }

    def sample_chunks(self, condition: th.Tensor, deterministic: bool = False) -> th.Tensor:
        """One of the refined candidates; see :meth:`DiffusionPolicy.sample_chunks`."""
        candidates = self.sample_candidates(condition, self.num_candidates, self.sampling_temperature, deterministic)
        return self._choose(self._refine(candidates, condition), condition, deterministic)

    def improve(self, condition: th.Tensor, chunks: th.Tensor) -> th.Tensor:
        """
        :param condition: features ``(N, F)``
        :param chunks: executed there ``(N, T, A)``
        :return: the best by the critics, of those and of the policy's own, after refinement ``(N, T, A)``
        """
        candidates = self.sample_candidates(condition, self.num_candidates, self.sampling_temperature)
        candidates = th.cat([candidates, chunks[:, None]], dim=1)
        return self._choose(self._refine(candidates, condition), condition, deterministic=True)

    def _refine(self, candidates: th.Tensor, condition: th.Tensor) -> th.Tensor:
        """The best of them, each at the best point of its way up the critics' mean ``(N, n, T, A) -> (N, k, T, A)``."""
        q_values = self._mean_q(candidates, condition)
        best = q_values.topk(min(self.num_refined, candidates.shape[1])).indices  # (N, k)
        points, values = [th.take_along_dim(candidates, best[..., None, None], dim=1)], []
        for _ in range(self.num_gradient_steps):
            with th.enable_grad():
                point = points[-1].requires_grad_()
                values.append(self._mean_q(point, condition))
                (gradient,) = th.autograd.grad(values[-1].sum(), point)
            points.append((point.detach() + self.step_size * gradient).clamp(-1, 1))
        values.append(self._mean_q(points[-1], condition))
        highest = th.stack(values).argmax(0)[None, ..., None, None]
        return th.take_along_dim(th.stack(points), highest, dim=0)[0]

    def _mean_q(self, chunks: th.Tensor, condition: th.Tensor) -> th.Tensor:
        """Of the critics ``(N, n)``."""
        return self.critic(condition[:, None].expand(-1, chunks.shape[1], -1), self.executed(chunks)).mean(0)


class PARL(ImplicitCriticAlgorithm):
    """
    Policy-agnostic RL: of 32 chunks of the policy the critics keep the best 10 and refine them by gradient steps; the
    best of those is what is executed, and what the policy clones with the denoising loss. The critics are those of
    implicit Q-learning, as in the paper's IQL variant; its other one is Cal-QL. In the offline phase the policy clones
    the data.

    :param policy: "MlpPolicy", "MultiInputPolicy" or a subclass of :class:`PARLPolicy`
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
    :param expectile: τ of the state value; towards 1 it takes the best chunk of the data for granted
    :param policy_delay: updates of the critics for one of the policy, which samples and refines chunks for every state
        of the batch
    :param actor_tau: rate at which the policy's exponential moving average follows
    :param actor_decay_start: updates of the policy after which its learning rate falls with the inverse square root of
        their number
    :param max_grad_norm: gradients are clipped to this norm
    :param stats_window_size: episodes that the rollout statistics average over
    :param tensorboard_log: where TensorBoard logs go
    :param policy_kwargs: arguments of :class:`PARLPolicy`
    :param verbose: 0 no output, 1 info, 2 debug
    :param seed: seed of the pseudo random generators
    :param device: "auto", "cpu", "cuda" ...
    :param _init_setup_model: whether to build the networks now
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": PARLPolicy,
        "MultiInputPolicy": PARLPolicy,
    }
    policy: PARLPolicy

    def __init__(
        self,
        policy: str | type[PARLPolicy],
        env: GymEnv | str | None,
        learning_rate: float | Schedule = 3e-4,
        buffer_size: int = 1_000_000,
        learning_starts: int = 100,
        batch_size: int = 256,
        tau: float = 0.005,
        gamma: float = 0.99,
        train_freq: int | tuple[int, str] = 1,
        gradient_steps: int = 1,
        action_noise: ActionNoise | None = None,
        replay_buffer_class: type[SequenceReplayBuffer] | None = None,
        replay_buffer_kwargs: dict[str, Any] | None = None,
        optimize_memory_usage: bool = False,
        offline_dataset: DatasetSources | None = None,
        pretrain_steps: int = 10_000,
        offline_fraction: float = 0.5,
        expectile: float = 0.7,
        policy_delay: int = 1,
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
            expectile=expectile,
        )
        check_count(1, policy_delay=policy_delay)
        self.policy_delay = policy_delay
        if _init_setup_model:
            self._setup_model()

    def _update_policy(self, batch: SequenceBatch, transitions: ChunkTransitions, phase: Phase) -> Metrics:
        """Clone the data's chunk or a refined one, whichever is better by the critics (eq. 4)."""
        if phase == "offline":
            return self._clone_batch(batch)
        if self._n_updates % self.policy_delay != 0:
            return {}
        with th.no_grad():
            chunks = self.policy.improve(transitions.features, transitions.chunks)
        return self._clone(chunks, transitions.features, transitions.mask)
