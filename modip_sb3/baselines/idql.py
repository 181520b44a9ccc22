"""IDQL: implicit Q-learning as an actor-critic with a diffusion policy (Hansen-Estruch et al., arXiv:2304.10573)."""

from typing import Any, ClassVar

import torch as th
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule

from modip_sb3.base import Metrics, Phase
from modip_sb3.baselines.chunk_critics import ChunkTransitions
from modip_sb3.baselines.implicit_critics import ImplicitCriticAlgorithm, ImplicitCriticPolicy
from modip_sb3.buffers import SequenceBatch, SequenceReplayBuffer
from modip_sb3.checks import check_keywords
from modip_sb3.datasets import DatasetSources


class IDQL(ImplicitCriticAlgorithm):
    """
    Implicit Q-learning with a diffusion policy that only clones: what it acts with is the best of 64 of its chunks by
    the critics, or one drawn with the weights of the implicit policy (``selection="expectile"`` in ``policy_kwargs``).
    Online the policy goes on cloning, the data and what was executed.

    :param policy: "MlpPolicy", "MultiInputPolicy" or a subclass of :class:`ImplicitCriticPolicy`
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
    :param actor_tau: rate at which the policy's exponential moving average follows
    :param actor_decay_start: updates of the policy after which its learning rate falls with the inverse square root of
        their number
    :param max_grad_norm: gradients are clipped to this norm
    :param stats_window_size: episodes that the rollout statistics average over
    :param tensorboard_log: where TensorBoard logs go
    :param policy_kwargs: arguments of :class:`ImplicitCriticPolicy`
    :param verbose: 0 no output, 1 info, 2 debug
    :param seed: seed of the pseudo random generators
    :param device: "auto", "cpu", "cuda" ...
    :param _init_setup_model: whether to build the networks now
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": ImplicitCriticPolicy,
        "MultiInputPolicy": ImplicitCriticPolicy,
    }
    policy: ImplicitCriticPolicy

    def __init__(
        self,
        policy: str | type[ImplicitCriticPolicy],
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
        check_keywords("policy_kwargs", policy_kwargs)
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
            policy_kwargs={"num_candidates": 64, **(policy_kwargs or {})},
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
        if _init_setup_model:
            self._setup_model()

    def _update_policy(self, batch: SequenceBatch, transitions: ChunkTransitions, phase: Phase) -> Metrics:
        return self._clone_batch(batch)
