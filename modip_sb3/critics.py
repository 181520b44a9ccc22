"""Value ensembles on latent states, their targets and their losses. No target here needs the policy."""

from collections.abc import Sequence

import torch as th
from torch import nn

from modip_sb3.networks import EnsembleMLP, TwoHot, zero_init


class ValueEnsemble(nn.Module):
    """
    An ensemble of state values V(z), or of action values Q(z, a) when ``action_dim`` is positive, with two-hot heads.

    :param latent_dim: size of the latent state
    :param action_dim: number of action dimensions; 0 for V
    :param n_critics: number of ensemble members
    :param net_arch: hidden widths
    :param activation: class of the activation
    :param dropout: probability of dropping a feature of the first hidden layer
    """

    def __init__(
        self,
        latent_dim: int,
        action_dim: int,
        n_critics: int = 2,
        net_arch: Sequence[int] = (256, 256),
        activation: type[nn.Module] = nn.SiLU,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.two_hot = TwoHot()
        self.ensemble = EnsembleMLP(
            n_critics, latent_dim + action_dim, net_arch, self.two_hot.num_bins, activation, dropout
        )
        zero_init(self.ensemble.layers[-1])

    def logits(
        self, latents: th.Tensor, actions: th.Tensor | None = None, members: th.Tensor | None = None
    ) -> th.Tensor:
        """
        :param latents: ``(..., Z)``
        :param actions: in [-1, 1], ``(..., A)``; left out for V
        :param members: indices of the members to evaluate ``(E,)``; None for all
        :return: ``(E, ..., num_bins)``
        """
        return self.ensemble(latents if actions is None else th.cat([latents, actions], dim=-1), members)

    def forward(
        self, latents: th.Tensor, actions: th.Tensor | None = None, members: th.Tensor | None = None
    ) -> th.Tensor:
        """
        :param latents: ``(..., Z)``
        :param actions: in [-1, 1], ``(..., A)``; left out for V
        :param members: indices of the members to evaluate ``(E,)``; None for all
        :return: values ``(E, ...)``
        """
        return self.two_hot.decode(self.logits(latents, actions, members))


def compute_lambda_returns(
    rewards: th.Tensor,
    next_values: th.Tensor,
    terminations: th.Tensor,
    mask: th.Tensor,
    gamma: float,
    td_lambda: float,
    n_steps: int,
) -> th.Tensor:
    """
    λ-returns along a sequence of data, bootstrapped where the data ends (Sutton & Barto, eq. 12.18)::

        G_t = r_t + γ (1 - d_t) [(1 - λ) V(s_{t+1}) + λ G_{t+1}]

    With ``td_lambda=0`` or ``n_steps=1`` this is the one-step TD target r + γV(s'). A time limit is no termination:
    its step has ``d_t = 0`` and is the last of the mask, so the value of the state it reached is bootstrapped.

    :param rewards: ``(B, L)``
    :param next_values: target values of the states entered ``(B, L)``
    :param terminations: 1 where the step terminated the episode ``(B, L)``
    :param mask: 1 for steps of the episode, 0 after its end ``(B, L)``
    :param gamma: discount factor
    :param td_lambda: 0 bootstraps after each step, 1 only at the end of the sequence
    :param n_steps: the most rewards a return looks at before it bootstraps
    :return: ``(B, L)``
    """
    continues = gamma * (1 - terminations)
    one_step = rewards + continues * next_values
    follows = th.zeros_like(mask)  # 1 where the next step of the sequence belongs to the same episode
    follows[:, :-1] = mask[:, 1:]
    returns = one_step
    for _ in range(n_steps - 1):
        following = th.zeros_like(returns)
        following[:, :-1] = returns[:, 1:]
        longer = rewards + continues * ((1 - td_lambda) * next_values + td_lambda * following)
        returns = th.where(follows.bool(), longer, one_step)
    return returns


def compute_q_loss(
    critic: ValueEnsemble, latents: th.Tensor, actions: th.Tensor, targets: th.Tensor, weights: th.Tensor
) -> tuple[th.Tensor, dict[str, th.Tensor]]:
    """
    Two-hot cross-entropy between Q(z, a) and its target, averaged over steps and members.

    :param critic: the Q ensemble
    :param latents: ``(B, L, Z)``
    :param actions: in [-1, 1], ``(B, L, A)``
    :param targets: ``(B, L)``
    :param weights: weight of each step ``(B, L)``
    :return: the loss and its metrics
    """
    logits = critic.logits(latents, actions)
    cross_entropy = critic.two_hot.cross_entropy(logits, targets)  # (E, B, L)
    normalizer = weights.sum().clamp(min=1e-6)
    loss = (weights * cross_entropy.mean(0)).sum() / normalizer
    q_values = critic.two_hot.decode(logits.detach()).mean(0)
    return loss, {"q_loss": loss.detach(), "q_mean": (weights * q_values).sum() / normalizer}


def compute_expectile_loss(
    value: ValueEnsemble, latents: th.Tensor, targets: th.Tensor, weights: th.Tensor, expectile: float
) -> tuple[th.Tensor, dict[str, th.Tensor]]:
    """
    V(z) towards an upper expectile of Q over the data's actions (IQL, arXiv:2110.06169, eq. 5), with the two-hot
    cross-entropy in the squared error's place: the weight is |τ - 1(Q < V)|, the expectile is taken on the symlog axis.

    :param value: the V ensemble
    :param latents: ``(B, L, Z)``, detached
    :param targets: Q of the data's actions ``(B, L)``
    :param weights: weight of each step ``(B, L)``
    :param expectile: τ; 0.5 is the mean, towards 1 the value of the best action in the data
    :return: the loss and its metrics
    """
    logits = value.logits(latents)
    values = value.two_hot.decode(logits.detach())
    asymmetry = th.where(targets < values, 1 - expectile, expectile)
    cross_entropy = asymmetry * value.two_hot.cross_entropy(logits, targets)  # (E, B, L)
    normalizer = weights.sum().clamp(min=1e-6)
    loss = (weights * cross_entropy.mean(0)).sum() / normalizer
    return loss, {"v_loss": loss.detach(), "v_mean": (weights * values.mean(0)).sum() / normalizer}
