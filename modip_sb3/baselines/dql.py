"""Diffusion Q-learning (Wang et al., 'Diffusion Policies as an Expressive Policy Class', arXiv:2208.06193)."""

from typing import Any, ClassVar

import torch as th
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule

from modip_sb3.base import Metrics, Phase
from modip_sb3.baselines.chunk_critics import CandidatePolicy, ChunkCriticAlgorithm, ChunkTransitions
from modip_sb3.buffers import SequenceBatch, SequenceReplayBuffer
from modip_sb3.checks import check_at_least, check_keywords
from modip_sb3.datasets import DatasetSources


class DQL(ChunkCriticAlgorithm):
    """
    Diffusion Q-learning: the policy descends the denoising loss and ascends Q at once, with the gradient of Q through
    every denoising step. It acts with one of 50 chunks, drawn in proportion to exp(Q).

    The paper's policy predicts single actions, which ``action_horizon=1, n_action_steps=1`` in ``policy_kwargs`` gives;
    here critics value whole chunks.

    :param policy: "MlpPolicy", "MultiInputPolicy" or a subclass of :class:`CandidatePolicy`
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
    :param eta: η, the weight of Q in the policy's loss; the paper has 1 for MuJoCo's medium data, .005 to 3.5 elsewhere
    :param actor_tau: rate at which the policy's exponential moving average follows
    :param actor_decay_start: updates of the policy after which its learning rate falls with the inverse square root of
        their number
    :param max_grad_norm: gradients are clipped to this norm
    :param stats_window_size: episodes that the rollout statistics average over
    :param tensorboard_log: where TensorBoard logs go
    :param policy_kwargs: arguments of :class:`CandidatePolicy`
    :param verbose: 0 no output, 1 info, 2 debug
    :param seed: seed of the pseudo random generators
    :param device: "auto", "cpu", "cuda" ...
    :param _init_setup_model: whether to build the networks now
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": CandidatePolicy,
        "MultiInputPolicy": CandidatePolicy,
    }
    policy: CandidatePolicy

    def __init__(
        self,
        policy: str | type[CandidatePolicy],
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
        eta: float = 1.0,
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
            policy_kwargs={"num_candidates": 50, "selection": "softmax", **(policy_kwargs or {})},
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
        check_at_least(0, eta=eta)
        self.eta = eta
        if _init_setup_model:
            self._setup_model()

    def _next_values(self, features: th.Tensor) -> th.Tensor:
        """The least target Q of a chunk from the policy's moving average (the target of eq. 4)."""
        policy = self.policy
        next_chunks = policy.actor_ema.sample(features)
        return policy.critic_target(features, policy.executed(next_chunks)).amin(0)

    def _update_policy(self, batch: SequenceBatch, transitions: ChunkTransitions, phase: Phase) -> Metrics:
        """The denoising loss minus η Q(s, a⁰), with Q in units of its mean magnitude in the batch (eq. 3)."""
        policy, features = self.policy, transitions.features
        loss, metrics = policy.compute_loss(transitions.chunks, features, transitions.mask)
        chunks = policy.actor.generate(features)
        q_values = policy.critic(features, policy.executed(chunks))  # (E, B)
        # As the authors do: a random member is climbed, in units of another's magnitude
        climbed, *others = th.randperm(policy.n_critics).tolist()
        scale = q_values[others[0] if others else climbed].detach().abs().mean()
        q_loss = -q_values[climbed].mean() / scale.clamp(min=1e-6)
        self._update_actor(loss + self.eta * q_loss)
        return metrics | {"actor_q_loss": q_loss.detach()}
