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
    :param scores: of each algorithm ``(seeds, envs)``
    :param baseline: one of them
    :return: for each other one, how probably its run is better than one of the baseline, over the environments
    """
    from rliable.metrics import probability_of_improvement

    pairs = {name: (values, scores[baseline]) for name, values in scores.items() if name != baseline}
    estimates = _estimates(pairs, probability_of_improvement)
    return {name: Estimate(*(float(np.squeeze(part)) for part in estimate)) for name, estimate in estimates.items()}
