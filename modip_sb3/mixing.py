"""What the policy clones: how much of the offline data while its own experience gets better, and with which weights."""

from collections.abc import Sequence

import numpy as np
import torch as th

PRIOR_STEPS = 1000  # of experience that count as worse than the data: a few short episodes say little
Episodes = tuple[np.ndarray, np.ndarray]


def offline_share(offline: Sequence[Episodes], weights: Sequence[float] | np.ndarray, online: Episodes) -> float:
    """
    The probability that the episode of a random offline step has a higher return than that of a random online step,
    ties counting half; 1 before there is experience.

    :param offline: returns and lengths of each source's episodes ``(E,)``
    :param weights: how often steps are drawn from each source, of sum one
    :param online: returns and lengths of the episodes that were experienced ``(F,)``
    :return: between 0 and 1
    """
    returns = np.concatenate([returns for returns, _ in offline])
    shares = np.concatenate([w * lengths / lengths.sum() for w, (_, lengths) in zip(weights, offline, strict=True)])
    order = np.argsort(returns)
    cumulative = np.concatenate([[0.0], np.cumsum(shares[order])])
    online_returns, online_lengths = online
    worse, not_better = (np.searchsorted(returns[order], online_returns, side) for side in ("left", "right"))
    better = 1 - (cumulative[worse] + cumulative[not_better]) / 2  # (F,)
    return float((PRIOR_STEPS + online_lengths @ better) / (PRIOR_STEPS + online_lengths.sum()))


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
