"""What DQL, IDQL, DSRL and PA-RL share: critics of whole action chunks, and acting with the best of several chunks."""

from abc import abstractmethod
from copy import deepcopy
from typing import Any, Literal, NamedTuple

import torch as th
from gymnasium import spaces
from stable_baselines3.common.torch_layers import get_actor_critic_arch
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.utils import polyak_update

from modip_sb3.base import Metrics, Phase
from modip_sb3.buffers import SequenceBatch, map_obs
from modip_sb3.checks import check_choice, check_count
from modip_sb3.critics import ValueEnsemble, compute_q_loss
from modip_sb3.diffusion_policy import DiffusionPolicy
from modip_sb3.pretrained import DiffusionAlgorithm


class ChunkTransitions(NamedTuple):
    """What happens while a chunk is executed: a step of the chunks' decision process (Q-chunking, arXiv:2507.07969)."""

    features: th.Tensor
    """Where the chunk begins, without gradient ``(B, F)``."""
    chunks: th.Tensor
    """In [-1, 1] ``(B, T, A)``."""
    mask: th.Tensor
    """1 for actions of the episode ``(B, T)``."""
    rewards: th.Tensor
    """Discounted sum over the executed steps ``(B,)``."""
    discounts: th.Tensor
    """Of the value that follows: γ^steps, 0 after a termination; a time limit is not a termination ``(B,)``."""
    next_features: th.Tensor
    """Where the chunk, or the episode, ends ``(B, F)``."""


class ChunkCriticPolicy(DiffusionPolicy):
    """
    A diffusion policy and an ensemble of critics Q(s, chunk) with targets, on the actor's features.

    :param observation_space: observation space, a Box or a Dict of Box spaces
    :param action_space: action space, a bounded Box
    :param lr_schedule: unused here: the algorithm owns the optimisers
    :param net_arch: widths of the denoiser (``pi``) and of the critics (``qf``), or one list for both
    :param n_critics: members of the Q ensemble
    :param kwargs: keyword arguments of :class:`DiffusionPolicy`
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        lr_schedule: Schedule,
        net_arch: list[int] | dict[str, list[int]] | None = None,
        n_critics: int = 2,
        **kwargs: Any,
    ):
        check_count(1, n_critics=n_critics)
        self.n_critics = n_critics
        super().__init__(observation_space, action_space, lr_schedule, net_arch, **kwargs)

    def _build(self) -> None:
        super()._build()
        _, self.critic_arch = get_actor_critic_arch(self.net_arch)
        self.critic = self._make_critic(self.n_action_steps * self.action_dim, self.n_critics)
        self.critic_target = deepcopy(self.critic).requires_grad_(False)

    def _make_critic(self, action_dim: int, n_critics: int) -> ValueEnsemble:
        return ValueEnsemble(self.features_extractor.features_dim, action_dim, n_critics, self.critic_arch)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return super()._get_constructor_parameters() | {"n_critics": self.n_critics}

    def executed(self, chunks: th.Tensor) -> th.Tensor:
        """
        :param chunks: ``(..., T, A)``
        :return: what a critic sees of them: the actions that are executed, in a row ``(..., n_action_steps * A)``
        """
        return chunks[..., : self.n_action_steps, :].flatten(-2)


class CandidatePolicy(ChunkCriticPolicy):
    """
    A :class:`ChunkCriticPolicy` that acts with one of several chunks, chosen by the critics.

    :param observation_space: observation space, a Box or a Dict of Box spaces
    :param action_space: action space, a bounded Box
    :param lr_schedule: unused here: the algorithm owns the optimisers
    :param num_candidates: chunks that are sampled; 1 leaves it to the diffusion policy alone
    :param selection: which one: "best" has the highest Q, "softmax" is drawn with probabilities in proportion to exp(Q)
    :param kwargs: keyword arguments of :class:`ChunkCriticPolicy`
    """

    selections: tuple[str, ...] = ("best", "softmax")

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        lr_schedule: Schedule,
        num_candidates: int = 32,
        selection: Literal["best", "softmax", "expectile"] = "best",
        **kwargs: Any,
    ):
        check_count(1, num_candidates=num_candidates)
        check_choice("selection", selection, *self.selections)
        self.num_candidates, self.selection = num_candidates, selection
        super().__init__(observation_space, action_space, lr_schedule, **kwargs)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        data = super()._get_constructor_parameters()
        return data | {"num_candidates": self.num_candidates, "selection": self.selection}

    def sample_chunks(self, condition: th.Tensor, deterministic: bool = False) -> th.Tensor:
        """One of the candidates, the best of fixed ones if deterministic; see :meth:`DiffusionPolicy.sample_chunks`."""
        if self.num_candidates == 1:
            return super().sample_chunks(condition, deterministic)
        candidates = self.sample_candidates(condition, self.num_candidates, self.sampling_temperature, deterministic)
        return self._choose(candidates, condition, deterministic)

    def _choose(self, candidates: th.Tensor, condition: th.Tensor, deterministic: bool) -> th.Tensor:
        """``(N, n, T, A) -> (N, T, A)``, by the least of the target critics' values."""
        inputs = condition[:, None].expand(-1, candidates.shape[1], -1)
        q_values = self.critic_target(inputs, self.executed(candidates)).amin(0)  # (N, n)
        scores = q_values
        if not deterministic and self.selection != "best":  # the highest logit with Gumbel noise is a draw
            scores = self._logits(q_values, condition) - th.empty_like(q_values).exponential_().log()
        return candidates[th.arange(len(candidates), device=candidates.device), scores.argmax(1)]

    def _logits(self, q_values: th.Tensor, condition: th.Tensor) -> th.Tensor:
        """Of the probabilities that candidates are drawn with ``(N, n)``."""
        return q_values


class ChunkCriticAlgorithm(DiffusionAlgorithm):
    """
    An algorithm with critics of chunks, by temporal differences from chunk to chunk, on offline and online data.

    A subclass says what follows (:meth:`_next_values`) and how the policy improves (:meth:`_update_policy`).

    :param args: arguments of :class:`DiffusionAlgorithm`
    :param kwargs: keyword arguments of :class:`DiffusionAlgorithm`
    """

    policy: ChunkCriticPolicy
    optimizer_names: tuple[str, ...] = ("critic_optimizer", "actor_optimizer")

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(
            *args,
            sde_support=False,
            supported_action_spaces=(spaces.Box,),
            support_multi_env=True,
            rollout_with="policy",
            inference="policy",
            **kwargs,
        )

    def _setup_model(self) -> None:
        super()._setup_model()
        self.critic_optimizer = self._make_optimizer(self.policy.critic.parameters())
        self.actor_optimizer = self._make_actor_optimizer()

    def _update(self, batch: SequenceBatch, phase: Phase) -> Metrics:
        """Critics, policy and targets."""
        if phase == "clone":
            return self._clone_batch(batch)
        transitions = self._make_transitions(batch)
        metrics = self._update_critics(transitions)
        polyak_update(self.policy.critic.parameters(), self.policy.critic_target.parameters(), self.tau)
        return metrics | self._update_policy(batch, transitions, phase)

    @th.no_grad()
    def _make_transitions(self, batch: SequenceBatch) -> ChunkTransitions:
        num_steps = self.policy.n_action_steps
        features, next_features = (
            self.policy.features(map_obs(lambda obs, step=step: obs[:, step], batch.observations))
            for step in (0, num_steps)
        )
        mask, terminations = batch.mask[:, :num_steps], batch.terminations[:, :num_steps]
        discounts = self.gamma ** th.arange(num_steps, device=mask.device)
        return ChunkTransitions(
            features,
            batch.actions,
            batch.mask,
            (batch.rewards[:, :num_steps] * mask * discounts).sum(1),
            self.gamma ** mask.sum(1) * (1 - terminations.amax(1)),
            next_features,
        )

    def _update_critics(self, transitions: ChunkTransitions) -> Metrics:
        """Q towards the discounted rewards of the chunk and the value of what follows."""
        with th.no_grad():
            targets = transitions.rewards + transitions.discounts * self._next_values(transitions.next_features)
        actions = self.policy.executed(transitions.chunks)
        return self._regress(self.policy.critic, self.critic_optimizer, transitions.features, actions, targets)

    def _regress(
        self,
        critic: ValueEnsemble,
        optimizer: th.optim.Optimizer,
        features: th.Tensor,
        actions: th.Tensor,
        targets: th.Tensor,
    ) -> Metrics:
        """One step of Q(s, a) towards its targets: ``(B, F)``, ``(B, A)``, ``(B,)``."""
        features, actions, targets = features[:, None], actions[:, None], targets[:, None]
        loss, metrics = compute_q_loss(critic, features, actions, targets, th.ones_like(targets))
        self._optimize(optimizer, loss)
        return metrics

    @abstractmethod
    def _next_values(self, features: th.Tensor) -> th.Tensor:
        """Of states that chunks lead to ``(B, F) -> (B,)``."""

    @abstractmethod
    def _update_policy(self, batch: SequenceBatch, transitions: ChunkTransitions, phase: Phase) -> Metrics:
        """One update of what acts."""
