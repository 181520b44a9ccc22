"""What the policy clones: whose episodes, how much of the offline data beside them, and with which weights."""

from collections.abc import Sequence

import numpy as np
import torch as th

from modip_sb3.buffers import Episodes

PRIOR_STEPS = 1000  # of experience that count as worse than the data: a few short episodes say little
MEDIAN = 0.5  # the rating of an episode as good as the one in the middle of the data


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
    return (cumulative[worse] + cumulative[not_better]) / (2 * cumulative[-1])


def without_worse(ratings: np.ndarray) -> np.ndarray:
    """
    The ratings, 0 in place of those below the data's median: an episode that falls short of most of the data shows
    mostly what went wrong in it.

    :param ratings: what :func:`rate_episodes` returned ``(F,)``
    """
    return np.where(ratings >= MEDIAN, ratings, 0.0)


def offline_share(ratings: np.ndarray, lengths: np.ndarray, offline_steps: int, by_rating: bool) -> float:
    """
    The share of offline steps in a batch. Its odds are those of the episode of a random offline step being better than
    that of a random online step, and are lower by as much as there is less data than experience that is as good.

    :param ratings: what :func:`rate_episodes` returned ``(F,)``
    :param lengths: of the same episodes ``(F,)``
    :param offline_steps: how many there are
    :param by_rating: whether an online step is drawn in proportion to the rating of its episode
    :return: between 0 and 1; 1 before there is experience
    """
    drawn = lengths * ratings if by_rating else lengths
    prior = min(PRIOR_STEPS, offline_steps)
    better = (prior + drawn @ (1 - ratings)) / (prior + drawn.sum())
    scarcity = min(1.0, offline_steps / 2 / max(1.0, lengths @ ratings))  # an offline step's mean rating is 1/2
    weight = better * scarcity
    return float(weight / (weight + 1 - better))


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
