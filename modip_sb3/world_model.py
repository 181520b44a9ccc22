"""Latent world model: encoder, dynamics, reward and termination heads, and the loss that trains them."""

from collections.abc import Sequence

import torch as th
import torch.nn.functional as F
from torch import nn

from modip_sb3.networks import SimNorm, TwoHot, mlp, zero_init


class WorldModel(nn.Module):
    """
    A decoder-free latent model in the manner of TD-MPC2 (arXiv:2310.16828), with a termination head.

    :param features_dim: number of observation features
    :param action_dim: number of (flat) action dimensions
    :param latent_dim: size of the latent state, a multiple of ``simnorm_dim``
    :param net_arch: hidden widths of the dynamics and of the heads; the encoder uses the first of them
    :param simnorm_dim: size of one simplex of the latent state
    """

    termination_head: nn.Sequential | None

    def __init__(
        self,
        features_dim: int,
        action_dim: int,
        latent_dim: int = 128,
        net_arch: Sequence[int] = (256, 256),
        simnorm_dim: int = 8,
    ):
        super().__init__()
        if latent_dim % simnorm_dim != 0:
            raise ValueError(
                f"latent_dim={latent_dim} is not a multiple of simnorm_dim={simnorm_dim}; choose one that is."
            )
        self.latent_dim = latent_dim
        self.two_hot = TwoHot()
        self.encoder = mlp(features_dim, net_arch[:1], latent_dim, SimNorm(simnorm_dim))
        self.dynamics = mlp(latent_dim + action_dim, net_arch, latent_dim)
        self.simnorm = SimNorm(simnorm_dim)
        self.reward_head = mlp(latent_dim + action_dim, net_arch, self.two_hot.num_bins)
        self.termination_head = mlp(latent_dim, net_arch[:1], 1)
        zero_init(self.dynamics[-1])  # the first predictions are: nothing changes, and no reward
        zero_init(self.reward_head[-1])

    def encode(self, features: th.Tensor) -> th.Tensor:
        """
        :param features: observation features ``(..., F)``
        :return: latents ``(..., Z)``
        """
        return self.encoder(features)

    def next(self, latents: th.Tensor, actions: th.Tensor) -> th.Tensor:
        """
        :param latents: ``(..., Z)``
        :param actions: in [-1, 1], ``(..., A)``
        :return: the latents one environment step later ``(..., Z)``
        """
        # The change of the simplices' logits is easier to learn than the next latent: ten times the accuracy here
        change = self.dynamics(th.cat([latents, actions], dim=-1))
        return self.simnorm(th.log(latents + 1e-4) + change)

    def reward(self, latents: th.Tensor, actions: th.Tensor) -> th.Tensor:
        """
        :param latents: ``(..., Z)``
        :param actions: in [-1, 1], ``(..., A)``
        :return: expected rewards ``(...)``
        """
        return self.two_hot.decode(self.reward_head(th.cat([latents, actions], dim=-1)))

    def terminated(self, latents: th.Tensor) -> th.Tensor:
        """
        :param latents: states that were just entered ``(..., Z)``
        :return: the probability that the episode terminated there ``(...)``
        """
        if self.termination_head is None:
            return latents.new_zeros(latents.shape[:-1])
        return th.sigmoid(self.termination_head(latents).squeeze(-1))

    def rollout(self, latents: th.Tensor, actions: th.Tensor) -> th.Tensor:
        """
        :param latents: start states ``(B, Z)``
        :param actions: action sequences ``(B, H, A)``
        :return: the start states and the predicted ones ``(B, H + 1, Z)``
        """
        trajectory = [latents]
        for step_actions in actions.unbind(1):
            trajectory.append(self.next(trajectory[-1], step_actions))
        return th.stack(trajectory, dim=1)


def compute_world_model_errors(
    model: WorldModel,
    latents: th.Tensor,
    target_latents: th.Tensor,
    actions: th.Tensor,
    rewards: th.Tensor,
    terminations: th.Tensor,
) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
    """
    Squared latent error, reward cross-entropy and termination cross-entropy of each step of a rollout.

    :param model: the world model
    :param latents: rollout of the model under ``actions`` ``(B, H + 1, Z)``
    :param target_latents: encodings of the observations that followed, without gradient ``(B, H, Z)``
    :param actions: in [-1, 1], ``(B, H, A)``
    :param rewards: ``(B, H)``
    :param terminations: 1 where the step terminated the episode ``(B, H)``
    :return: three errors ``(B, H)``; the last is zero for a model without a termination head
    """
    consistency = F.mse_loss(latents[:, 1:], target_latents, reduction="none").mean(-1)
    reward_logits = model.reward_head(th.cat([latents[:, :-1], actions], dim=-1))
    reward = model.two_hot.cross_entropy(reward_logits, rewards)
    if model.termination_head is None:
        return consistency, reward, th.zeros_like(reward)
    termination_logits = model.termination_head(latents[:, 1:]).squeeze(-1)
    return consistency, reward, F.binary_cross_entropy_with_logits(termination_logits, terminations, reduction="none")


def compute_world_model_loss(
    model: WorldModel,
    latents: th.Tensor,
    target_latents: th.Tensor,
    actions: th.Tensor,
    rewards: th.Tensor,
    terminations: th.Tensor,
    weights: th.Tensor,
    consistency_coef: float = 200.0,
    reward_coef: float = 0.1,
    termination_coef: float = 1.0,
) -> tuple[th.Tensor, dict[str, th.Tensor]]:
    """
    Latent consistency, reward cross-entropy and termination cross-entropy along a rollout (TD-MPC2, eq. 3).

    :param model: the world model
    :param latents: rollout of the model under ``actions`` ``(B, H + 1, Z)``
    :param target_latents: encodings of the observations that followed, without gradient ``(B, H, Z)``
    :param actions: in [-1, 1], ``(B, H, A)``
    :param rewards: ``(B, H)``
    :param terminations: 1 where the step terminated the episode ``(B, H)``
    :param weights: weight of each step, zero after an episode's end ``(B, H)``
    :param consistency_coef: weight of the squared latent prediction error
    :param reward_coef: weight of the reward cross-entropy
    :param termination_coef: weight of the termination cross-entropy
    :return: the loss and its parts
    """
    consistency, reward, termination = compute_world_model_errors(
        model, latents, target_latents, actions, rewards, terminations
    )
    normalizer = weights.sum().clamp(min=1e-6)
    consistency_loss = (weights * consistency).sum() / normalizer
    reward_loss = (weights * reward).sum() / normalizer
    termination_loss = (weights * termination).sum() / normalizer
    loss = consistency_coef * consistency_loss + reward_coef * reward_loss + termination_coef * termination_loss
    metrics = {
        "consistency_loss": consistency_loss.detach(),
        "reward_loss": reward_loss.detach(),
        "termination_loss": termination_loss.detach(),
    }
    return loss, metrics
