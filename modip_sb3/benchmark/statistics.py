"""Aggregates over seeds and environments with rliable (Agarwal et al., 2021, https://arxiv.org/abs/2108.13264)."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import trim_mean

REPS = 2000  # resamples of the bootstrap

Scores = Mapping[str, np.ndarray]


class Estimate(NamedTuple):
    """A point estimate and its 95 % interval; arrays of the same shape, or numbers."""

    value: Any
    low: Any
    high: Any


def _rliable() -> Any:
    try:
        from rliable import library
    except ImportError as error:
        raise ImportError(f'The report needs rliable ({error}): run pip install "modip-sb3[benchmark]".') from error
    return library


@contextmanager
def _repeatable() -> Iterator[None]:
    """rliable's resamples are drawn from numpy's global generator, whatever ``random_state`` it is given."""
    state = np.random.get_state()
    np.random.seed(0)
    try:
        yield
    finally:
        np.random.set_state(state)


def _estimates(scores: Any, function: Callable[..., Any]) -> dict[str, Estimate]:
    with _repeatable():
        points, intervals = _rliable().get_interval_estimates(scores, function, reps=REPS)
    return {name: Estimate(points[name], *intervals[name]) for name in scores}


def interquartile_means(scores: Scores) -> dict[str, Estimate]:
    """
    :param scores: of each algorithm ``(seeds, envs)``
    :return: the mean of the middle half of all runs; the bootstrap resamples the seeds of each environment
    """
    estimates = _estimates(scores, lambda x: np.array([trim_mean(x, 0.25, axis=None)]))
    return {name: Estimate(*(float(np.squeeze(part)) for part in estimate)) for name, estimate in estimates.items()}


def means(scores: Scores) -> dict[str, Estimate]:
    """
    :param scores: of each algorithm ``(seeds, envs)``
    :return: the mean over all runs
    """
    estimates = _estimates(scores, lambda x: np.array([x.mean()]))
    return {name: Estimate(*(float(np.squeeze(part)) for part in estimate)) for name, estimate in estimates.items()}


def curves(scores: Scores) -> dict[str, Estimate]:
    """
    :param scores: of each algorithm along its training ``(seeds, points)``
    :return: interquartile means over the seeds ``(points,)``
    """
    stacked = {name: values[:, None] for name, values in scores.items()}
    return _estimates(stacked, lambda x: trim_mean(x.reshape(-1, x.shape[-1]), 0.25, axis=0))


def performance_profiles(scores: Scores, thresholds: np.ndarray) -> dict[str, Estimate]:
    """
    :param scores: of each algorithm ``(seeds, envs)``
    :param thresholds: ``(T,)``
    :return: share of runs above each threshold ``(T,)``
    """
    with _repeatable():
        points, intervals = _rliable().create_performance_profile(dict(scores), thresholds, reps=REPS)
    return {name: Estimate(points[name], *intervals[name]) for name in scores}


def probabilities_of_improvement(scores: Scores, baseline: str) -> dict[str, Estimate]:
    """
    rliable's measure (its equation of section 4.3: the Mann-Whitney statistic, ties counting half) on all resamples at
    once, which takes milliseconds where rliable takes seconds.

    :param scores: of each algorithm ``(seeds, envs)``
    :param baseline: one of them
    :return: for each other one, how probably its run is better than one of the baseline, over the environments; the
        bootstrap resamples the seeds of each environment
    """
    estimates = {}
    for name in [name for name in scores if name != baseline]:
        rng = np.random.default_rng(0)
        points = _share_of_wins(scores[name][None], scores[baseline][None])
        wins = _share_of_wins(_resample(scores[name], rng), _resample(scores[baseline], rng))
        estimates[name] = Estimate(float(points[0]), *map(float, np.percentile(wins, [2.5, 97.5])))
    return estimates


def _resample(runs: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """``(seeds, envs)`` -> ``(REPS, seeds, envs)``, the seeds of each environment by themselves."""
    seeds = rng.integers(len(runs), size=(REPS, *runs.shape))
    return np.take_along_axis(np.broadcast_to(runs, seeds.shape), seeds, axis=1)


def _share_of_wins(runs: np.ndarray, others: np.ndarray) -> np.ndarray:
    """``(R, n, envs), (R, m, envs) -> (R,)``: over all pairs in an environment, ties counting half."""
    differences = runs[:, :, None] - others[:, None]
    return (0.5 * (1 + np.sign(differences))).mean((1, 2, 3))
