"""Implicit Q-learning (IQL, arXiv:2110.06169) of chunks: critics that never ask what the policy would do."""

from typing import Any

import torch as th

from modip_sb3.base import Metrics
from modip_sb3.baselines.chunk_critics import CandidatePolicy, ChunkCriticAlgorithm, ChunkTransitions
from modip_sb3.checks import check_fraction
from modip_sb3.critics import compute_expectile_loss


class ImplicitCriticPolicy(CandidatePolicy):
    """
    A :class:`CandidatePolicy` with a state value V(s) beside Q.

    :param args: arguments of :class:`CandidatePolicy`
    :param kwargs: keyword arguments of :class:`CandidatePolicy`; ``selection="expectile"`` draws candidates with the
        weights of the implicit policy: τ for those with Q ≥ V, 1 - τ for the others (IDQL, eq. 9)
    """

    selections = ("best", "softmax", "expectile")
    expectile: float
    """τ; the algorithm sets it."""

    def _build(self) -> None:
        super()._build()
        self.value = self._make_critic(action_dim=0, n_critics=1)

    def _logits(self, q_values: th.Tensor, condition: th.Tensor) -> th.Tensor:
        if self.selection == "softmax":
            return super()._logits(q_values, condition)
        values = self.value(condition)[0][:, None]
        return th.where(q_values >= values, self.expectile, 1 - self.expectile).log()


class ImplicitCriticAlgorithm(ChunkCriticAlgorithm):
    """
    V towards an upper expectile of Q over the data's chunks, and Q towards V of what follows (IQL, eqs. 5 and 6).

    :param args: arguments of :class:`ChunkCriticAlgorithm`
    :param expectile: τ of V; towards 1 it takes the best chunk of the data for granted
    :param kwargs: keyword arguments of :class:`ChunkCriticAlgorithm`
    """

    policy: ImplicitCriticPolicy
    optimizer_names = ("critic_optimizer", "value_optimizer", "actor_optimizer")

    def __init__(self, *args: Any, expectile: float, **kwargs: Any):
        super().__init__(*args, **kwargs)
        check_fraction(expectile=expectile)
        self.expectile = expectile

    def _setup_model(self) -> None:
        super()._setup_model()
        self.policy.expectile = self.expectile
        self.value_optimizer = self._make_optimizer(self.policy.value.parameters())

    def _update_critics(self, transitions: ChunkTransitions) -> Metrics:
        metrics = super()._update_critics(transitions)
        policy, features = self.policy, transitions.features
        with th.no_grad():
            targets = policy.critic_target(features, policy.executed(transitions.chunks)).amin(0)
        weights = th.ones_like(targets)[:, None]
        loss, value_metrics = compute_expectile_loss(
            policy.value, features[:, None], targets[:, None], weights, self.expectile
        )
        self._optimize(self.value_optimizer, loss)
        return metrics | value_metrics

    def _next_values(self, features: th.Tensor) -> th.Tensor:
        return self.policy.value(features)[0]
