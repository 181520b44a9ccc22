"""What the policy clones: whose episodes, how much of the offline data beside them, and with which weights."""

from collections.abc import Sequence

import numpy as np
import torch as th

from modip_sb3.buffers import Episodes

PRIOR_STEPS = 1000  # of experience that count as worse than the data: a few short episodes say little


def rate_episodes(offline: Sequence[Episodes], weights: Sequence[float] | np.ndarray, online: Episodes) -> np.ndarray:
    """
    For each online episode the probability that the episode of a random offline step has a lower return, ties counting
    half.

    :param offline: each source's episodes
    :param weights: how often steps are drawn from each source, of sum one
    :param online: the episodes that were experienced ``(F,)``
    :return: between 0 and 1 ``(F,)``
    """
    returns = np.concatenate([source.returns for source in offline])
    shares = np.concatenate([w * s.lengths / s.lengths.sum() for w, s in zip(weights, offline, strict=True)])
    order = np.argsort(returns)
    cumulative = np.concatenate([[0.0], np.cumsum(shares[order])])
    worse, not_better = (np.searchsorted(returns[order], online.returns, side) for side in ("left", "right"))
    return (cumulative[worse] + cumulative[not_better]) / (2 * cumulative[-1])  # the median is exactly 1/2


def offline_share(ratings: np.ndarray, lengths: np.ndarray, offline_steps: int) -> float:
    """
    The share of offline steps in a batch. Its odds are those of the episode of a random offline step being better than
    that of a random online step, and are lower by as much as there is less data than experience that is as good.

    :param ratings: what :func:`rate_episodes` returned ``(F,)``
    :param lengths: of the same episodes ``(F,)``
    :param offline_steps: how many there are
    :return: between 0 and 1; 1 before there is experience
    """
    prior = min(PRIOR_STEPS, offline_steps)
    better = (prior + lengths @ (1 - ratings)) / (prior + lengths.sum())
    scarcity = min(1.0, offline_steps / 2 / max(1.0, lengths @ ratings))  # an offline step's mean rating is 1/2
    weight = better * scarcity
    return float(weight / (weight + 1 - better))


def better_weights(ratings: np.ndarray, num_offline: int) -> np.ndarray:
    """
    How often a step of each online episode is cloned, where a step of the data is once: the odds of being better than
    the data, as if that had one episode more, which none is better than. Episodes below the median are left out: they
    show mostly what went wrong in them.

    :param ratings: what :func:`rate_episodes` returned ``(F,)``
    :param num_offline: number of episodes in the data
    :return: at most ``num_offline`` ``(F,)``
    """
    return np.where(ratings >= 0.5, ratings / (1 - ratings + 1 / num_offline), 0.0)


def better_share(weights: np.ndarray, lengths: np.ndarray, offline_steps: int) -> float:
    """
    The share of offline steps in a batch where online ones are drawn by their weights.

    :param weights: what :func:`better_weights` returned ``(F,)``
    :param lengths: of the same episodes ``(F,)``
    :param offline_steps: how many there are
    :return: between 0 and 1; 1 where no episode is to be cloned
    """
    return float(offline_steps / (offline_steps + lengths @ weights))


def advantage_weights(advantages: th.Tensor, beta: float) -> th.Tensor:
    """
    exp(β A / σ_A), centred, clipped, of mean one (AWR, arXiv:1910.00177).

    :param advantages: A = G^λ - V(s) of each chunk ``(B,)``
    :param beta: 0 weights all chunks the same
    :return: ``(B,)``
    """
    centred = advantages - advantages.mean()  # else optimistic values would put every weight at the clip
    weights = th.exp(beta * centred / centred.std(correction=0).clamp(min=1e-6)).clamp(max=20.0)
    return weights / weights.mean()
