"""What a dataset holds, in numbers: also of data that no algorithm would take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from modip_sb3.datasets.columns import by_key
from modip_sb3.datasets.offline import OfflineDataset
from modip_sb3.datasets.scores import has_reference_score, normalized_score

_TOLERANCE = 1e-3  # of an action's range


@dataclass(frozen=True)
class Spread:
    """Where some numbers lie."""

    min: float
    median: float
    mean: float
    max: float

    @classmethod
    def of(cls, values: np.ndarray) -> Spread | None:
        """
        :param values: Any numbers; those that are not finite are left out.
        :return: Their spread, or None if no number is left.
        """
        values = values[np.isfinite(values)]
        if len(values) == 0:
            return None
        return cls(*(float(number) for number in (values.min(), np.median(values), values.mean(), values.max())))


@dataclass(frozen=True)
class DatasetSummary:
    """
    The numbers that one looks at before training on a dataset.

    :param source: What the data was loaded from.
    :param env_id: Gymnasium id of the environment, if known.
    :param observations: The environment's observation space, or the shape of the data, by key of the observations.
    :param actions: The environment's action space, or the shape of the data.
    :param fault: Why an algorithm would refuse the data for the environment, or why that cannot be told, else None.
    :param num_episodes: Number of episodes.
    :param num_transitions: Number of transitions, over all episodes.
    :param lengths: Steps of the episodes.
    :param returns: Undiscounted returns of the episodes, None if not one is finite.
    :param scores: The returns normalised as D4RL does, where the task has reference returns.
    :param num_terminated: Episodes that ended because of what happened.
    :param num_truncated: Episodes that were cut off, by a time limit or the end of the recording.
    :param non_finite: Number of NaN and infinite values of every array that has some.
    :param saturation: Share of all action entries within a thousandth of the range from a bound, in [0, 1].
    :param bounds: Whose bounds these are: the environment's, or the smallest and largest action of the data.
    """

    source: str
    env_id: str | None
    observations: dict[str, str]
    actions: str
    fault: str | None
    num_episodes: int
    num_transitions: int
    lengths: Spread | None
    returns: Spread | None
    scores: Spread | None
    num_terminated: int
    num_truncated: int
    non_finite: dict[str, int]
    saturation: float
    bounds: str


def summarize(dataset: OfflineDataset, env: str | gym.Env | None = None) -> DatasetSummary:
    """
    Count and measure a dataset; nothing is refused.

    :param dataset: Any data.
    :param env: Its environment, or the Gymnasium id of it; by default the one it names, if Gymnasium knows that.
    :return: Its summary.
    :raises ValueError: If the environment that is asked for cannot be made.
    """
    if isinstance(env, str):
        env = make_env(env)
    fault = None
    try:
        env = env if env is not None else named_env(dataset)
        dataset.check(env.observation_space, env.action_space, min_length=1)
    except ValueError as error:
        fault = str(error)
    env_id = dataset.env_id if env is None or env.spec is None else env.spec.id
    space = None if env is None else env.action_space
    bounds = space if isinstance(space, spaces.Box) and space.is_bounded() else None
    if bounds is not None and bounds.shape != dataset.actions.shape[1:]:
        bounds = None
    with np.errstate(invalid="ignore"):  # rewards of both infinities
        returns = dataset.episode_returns
    scores = normalized_score(env_id, returns) if env_id is not None and has_reference_score(env_id) else None
    return DatasetSummary(
        source=dataset.source,
        env_id=env_id,
        observations=_observations(dataset, env),
        actions=_shape(dataset.actions) if space is None else str(space),
        fault=fault,
        num_episodes=dataset.num_episodes,
        num_transitions=dataset.num_transitions,
        lengths=Spread.of(dataset.episode_lengths),
        returns=Spread.of(returns),
        scores=None if scores is None else Spread.of(np.asarray(scores)),
        num_terminated=int(dataset.terminations.sum()),
        num_truncated=int(dataset.truncations.sum()),
        non_finite=_non_finite(dataset),
        saturation=_saturation(dataset.actions, bounds),
        bounds="data" if bounds is None else "environment",
    )


def make_env(env_id: str, **kwargs: Any) -> gym.Env:
    """
    ``gymnasium.make`` with one sentence for every fault.

    :param env_id: A Gymnasium id, or ``"module:id"`` to import what registers it.
    :param kwargs: Arguments of the environment.
    :return: The environment.
    :raises ValueError: If there is no such environment, or it takes no such arguments.
    """
    try:
        return gym.make(env_id, **kwargs)
    except (gym.error.Error, ImportError, TypeError) as error:
        raise ValueError(
            f"Environment {env_id}: cannot be made ({error}), expected an id that Gymnasium knows; "
            "check the id, its arguments, and that its package is installed."
        ) from error


def named_env(dataset: OfflineDataset) -> gym.Env:
    """
    The environment that a dataset names. No module is imported because a file says so.

    :param dataset: Any data.
    :return: The environment.
    :raises ValueError: If it names none that Gymnasium knows.
    """
    if dataset.env_id not in gym.registry:
        raise ValueError(
            f"Offline dataset {dataset.source}: names {dataset.env_id or 'no environment'}, expected an environment "
            "that Gymnasium knows; say which it is (--env on the command line)."
        )
    return make_env(str(dataset.env_id))


def _observations(dataset: OfflineDataset, env: gym.Env | None) -> dict[str, str]:
    if env is None:
        return {key: _shape(values) for key, values in by_key(dataset.observations).items()}
    return {key: str(space) for key, space in by_key(env.observation_space).items()}


def _shape(values: np.ndarray) -> str:
    return f"{values.shape[1:]} {values.dtype}"


def _non_finite(dataset: OfflineDataset) -> dict[str, int]:
    columns = {"actions": dataset.actions, "rewards": dataset.rewards}
    for name in ("observations", "final_observations"):
        parts = by_key(getattr(dataset, name))
        columns |= {f"{name}{key and f'[{key!r}]'}": values for key, values in parts.items()}
    counts = {name: int(values.size - np.isfinite(values).sum()) for name, values in columns.items()}
    return {name: count for name, count in counts.items() if count > 0}


def _saturation(actions: np.ndarray, bounds: spaces.Box | None) -> float:
    if bounds is None:
        finite = np.isfinite(actions)
        low = actions.min(axis=0, where=finite, initial=np.inf)
        high = actions.max(axis=0, where=finite, initial=-np.inf)
    else:
        low, high = bounds.low, bounds.high
    margin = _TOLERANCE * np.maximum(high - low, 0)
    return float(np.mean((actions <= low + margin) | (actions >= high - margin)))
