"""Offline data as episodes: one frozen container that every format becomes, and the checks it must pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from typing import Any, TypeAlias, Union

import numpy as np
from gymnasium import spaces
from numpy.typing import ArrayLike
from stable_baselines3.common.buffers import ReplayBuffer

from modip_sb3.datasets.columns import (
    Observations,
    as_flags,
    by_key,
    check_columns,
    check_numbers,
    key_names,
    named,
    named_columns,
    take,
    take_finals,
    take_rows,
    unkeyed,
)

DatasetSource: TypeAlias = Union["OfflineDataset", ReplayBuffer, str, PathLike[str], Mapping[str, Any]]
DatasetSources: TypeAlias = DatasetSource | Sequence[DatasetSource]

_LARGEST = 1e15  # sums of the squares of larger numbers are infinite in float32


@dataclass(frozen=True, eq=False)
class OfflineDataset:
    """
    Transitions of whole episodes, one episode after another. Nothing here is ever modified.

    Time limits are not terminations: the last step of every episode has exactly one of ``terminations`` and
    ``truncations`` set, and no other step has any.

    :param observations: ``(N, *obs_shape)``, or a dict of such arrays. Floats are float32, integers stay as they are.
    :param actions: ``(N, *action_shape)`` float32, in the environment's own units.
    :param rewards: ``(N,)`` float32.
    :param terminations: ``(N,)`` bool, the task ended here: nothing is to be bootstrapped.
    :param truncations: ``(N,)`` bool, the recording ended here: by a time limit, or because it just stopped.
    :param final_observations: ``(E, *obs_shape)``, the observation after the last step of each episode.
    :param env_id: Gymnasium id of the environment the data is from, if known.
    :param source: What errors call the data.
    :raises ValueError: If the arrays do not fit together.
    """

    observations: Observations
    actions: np.ndarray
    rewards: np.ndarray
    terminations: np.ndarray
    truncations: np.ndarray
    final_observations: Observations
    env_id: str | None = None
    source: str = "arrays"

    def __post_init__(self) -> None:
        columns = named_columns(self.observations, self.actions, self.rewards, self.terminations, self.truncations)
        check_columns(columns, self.source)
        for name in ("terminations", "truncations"):
            flags = getattr(self, name)
            if not (isinstance(flags, np.ndarray) and flags.dtype.kind == "b"):
                self._fail(f"{name} are no array of bool; let OfflineDataset.from_arrays make it one")
        ends = self.terminations | self.truncations
        if not ends[-1] or np.any(self.terminations & self.truncations):
            self._fail(
                "the last step of each episode must have exactly one of terminations and truncations set; "
                "let OfflineDataset.from_arrays set them"
            )
        observations, finals = by_key(self.observations), by_key(self.final_observations)
        found = {key: array.shape for key, array in finals.items()}
        expected = {key: (self.num_episodes, *array.shape[1:]) for key, array in observations.items()}
        if found != expected:
            self._fail(
                f"final_observations have shape {unkeyed(found)}, expected {unkeyed(expected)}: one per episode; "
                "check where the episodes end"
            )

    # ------------------------------------------------------------------ sizes

    @property
    def num_transitions(self) -> int:
        """Number of transitions N, over all episodes."""
        return len(self.actions)

    @property
    def num_episodes(self) -> int:
        """Number of episodes E."""
        return len(self.episode_ends)

    @cached_property
    def episode_ends(self) -> np.ndarray:
        """``(E,)`` int64, the index of each episode's last step."""
        return np.flatnonzero(self.terminations | self.truncations)

    @property
    def episode_lengths(self) -> np.ndarray:
        """``(E,)`` int64, the number of steps of each episode."""
        return np.diff(self.episode_ends, prepend=-1)

    @property
    def episode_returns(self) -> np.ndarray:
        """``(E,)`` float64, the undiscounted return of each episode."""
        return np.add.reduceat(self.rewards, self.episode_ends + 1 - self.episode_lengths, dtype=np.float64)

    # ---------------------------------------------------------------- loading

    @classmethod
    def load(cls, source: DatasetSource) -> OfflineDataset:
        """
        Load data from whatever names or holds it.

        :param source: One of

            - the id of a Minari dataset, which is downloaded if it is not there, or the path of its folder,
            - the path of an HDF5 file in D4RL's or robomimic's layout,
            - an SB3 replay buffer,
            - a mapping of the arrays that ``from_arrays`` takes,
            - a dataset, which is returned as it is,
            - a mapping ``{"dataset": <any of these>, ...}`` with options beside it: ``min_return`` and ``top_fraction``
              of :meth:`select`, ``obs_keys`` of ``read_robomimic`` and ``read_minari``, ``filter_key`` of the former.

        :return: The dataset.
        :raises FileNotFoundError: If there is no such file, folder or dataset.
        :raises ConnectionError: If a Minari dataset is not there, and cannot be downloaded.
        :raises ValueError: If it cannot be read, an option is unknown, or its arrays do not fit together.
        """
        from modip_sb3.datasets.sources import load_source

        return load_source(source)

    @classmethod
    def from_arrays(
        cls,
        observations: ArrayLike | Mapping[str, ArrayLike],
        actions: ArrayLike,
        rewards: ArrayLike,
        terminations: ArrayLike,
        truncations: ArrayLike,
        final_observations: ArrayLike | Mapping[str, ArrayLike] | None = None,
        next_observations: ArrayLike | Mapping[str, ArrayLike] | None = None,
        env_id: str | None = None,
        source: str = "arrays",
    ) -> OfflineDataset:
        """
        Make a dataset of flat arrays. Contiguous float32 arrays are kept, not copied.

        An unfinished last episode counts as truncated, and a step marked as both as terminated. With neither
        ``final_observations`` nor ``next_observations``, an episode that did not terminate loses its last transition,
        whose observation becomes the final one (an episode of a single transition is lost with it); one that terminated
        keeps all, and repeats its last observation, as no value is bootstrapped there.

        :param observations: ``(N, *obs_shape)``, or a mapping of such arrays.
        :param actions: ``(N, *action_shape)``, in the environment's own units.
        :param rewards: ``(N,)``.
        :param terminations: ``(N,)`` bool or 0 and 1.
        :param truncations: ``(N,)`` bool or 0 and 1.
        :param final_observations: ``(E, *obs_shape)``, the observation after the last step of each episode.
        :param next_observations: ``(N, *obs_shape)``, the observation after each step, in its place.
        :param env_id: Gymnasium id of the environment the data is from, if known.
        :param source: What errors call the data.
        :return: The dataset.
        :raises ValueError: If the arrays hold no numbers, are empty, or do not fit together, or if
            ``next_observations`` show that the rows are not in order.
        """
        if final_observations is not None and next_observations is not None:
            raise ValueError(f"Offline dataset {source}: pass final_observations or next_observations, not both.")
        columns = named_columns(observations, actions, rewards, terminations, truncations)
        if next_observations is not None:
            columns |= named("next_observations", next_observations)
        check_columns(columns, source)
        terminated = as_flags(columns["terminations"], "terminations", source)
        truncated = as_flags(columns["truncations"], "truncations", source) & ~terminated
        truncated[-1] = not terminated[-1]
        ends, kept = terminated | truncated, np.ones_like(terminated)
        if final_observations is not None:
            check_numbers(named("final_observations", final_observations), source)
            finals = take(final_observations)
        elif next_observations is not None:
            observations = take(observations)
            finals = take_finals(next_observations, observations, ends, source)
        else:
            kept = ~truncated
            starts = np.roll(ends, 1)
            finals = take(observations, ends & ~(truncated & starts))
            truncated = np.append(truncated[1:] & ~ends[:-1], False)
        return cls(
            observations=take(observations, kept),
            actions=take_rows(actions, kept, np.dtype(np.float32)),
            rewards=take_rows(rewards, kept, np.dtype(np.float32)),
            terminations=terminated[kept],
            truncations=truncated[kept],
            final_observations=finals,
            env_id=env_id,
            source=source,
        )

    # -------------------------------------------------------------- selecting

    def select(self, min_return: float | None = None, top_fraction: float | None = None) -> OfflineDataset:
        """
        The best episodes, in their order; with both filters those that pass both.

        :param min_return: Keep the episodes with at least this undiscounted return.
        :param top_fraction: Keep this share of all episodes, those with the highest returns and at least one.
        :return: A dataset of whole episodes; this one if there is no filter.
        :raises ValueError: If no episode is left, or the fraction is not in (0, 1].
        """
        for name, value in {"min_return": min_return, "top_fraction": top_fraction}.items():
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
                self._fail(f"{name}={value!r} is not a number")
        if min_return is None and top_fraction is None:
            return self
        returns = self.episode_returns
        kept = np.ones(self.num_episodes, bool) if min_return is None else returns >= min_return
        if top_fraction is not None:
            if not 0 < top_fraction <= 1:
                self._fail(f"top_fraction={top_fraction} is not in (0, 1]")
            best = np.argsort(-returns, kind="stable")[: max(1, round(top_fraction * self.num_episodes))]
            kept &= np.isin(np.arange(self.num_episodes), best)
        if not kept.any():
            self._fail(
                f"no episode has a return of min_return={min_return}, the best has {returns.max():.6g}; lower it"
            )
        steps = np.repeat(kept, self.episode_lengths)
        return OfflineDataset(
            observations=take(self.observations, steps),
            actions=take_rows(self.actions, steps),
            rewards=take_rows(self.rewards, steps),
            terminations=self.terminations[steps],
            truncations=self.truncations[steps],
            final_observations=take(self.final_observations, kept),
            env_id=self.env_id,
            source=self.source,
        )

    # --------------------------------------------------------------- checking

    def check(self, observation_space: spaces.Space, action_space: spaces.Space, min_length: int) -> None:
        """
        Check that the data can train a policy for an environment, before anything expensive is done with it.

        :param observation_space: The environment's observation space: a Box, or a Dict of Box.
        :param action_space: The environment's action space: a Box.
        :param min_length: Number of steps that at least one episode must have.
        :raises ValueError: On the first fault: shapes or keys of another environment, values that are not finite,
            actions out of bounds (by more than a thousandth of their range), or episodes that are all too short.
        """
        self._check_shapes(observation_space, action_space)
        columns = named_columns(self.observations, self.actions, self.rewards, self.terminations, self.truncations)
        for name, array in (columns | named("final_observations", self.final_observations)).items():
            self._check_finite(name, array)
        if isinstance(action_space, spaces.Box):
            self._check_bounds(action_space)
        longest = int(self.episode_lengths.max())
        if longest < min_length:
            self._fail(
                f"its longest episode has {longest} steps, expected at least {min_length}; "
                "use longer episodes or shorter sequences"
            )

    def _check_shapes(self, observation_space: spaces.Space, action_space: spaces.Space) -> None:
        parts = observation_space.spaces if isinstance(observation_space, spaces.Dict) else {"": observation_space}
        found = {key: array.shape[1:] for key, array in by_key(self.observations).items()}
        if found.keys() != parts.keys():
            self._fail(
                f"observations have the keys {key_names(found)}, expected {key_names(parts)}; "
                "use data of this environment"
            )
        shapes = {f"observations{key and f'[{key!r}]'}": (found[key], space.shape) for key, space in parts.items()}
        for name, (shape, expected) in (shapes | {"actions": (self.actions.shape[1:], action_space.shape)}).items():
            if shape != expected:
                recorded = f" (it was recorded on {self.env_id})" if self.env_id else ""
                self._fail(f"{name} have shape {shape}, expected {expected}{recorded}; use data of this environment")

    def _check_finite(self, name: str, array: np.ndarray) -> None:
        flat = array.reshape(-1)
        size = 1_000_000  # numbers at a time, so that no mask of the whole is needed
        faults = [
            s + np.flatnonzero(~(np.abs(flat[s : s + size], dtype=np.float64) <= _LARGEST))
            for s in range(0, flat.size, size)
        ]
        if count := sum(map(len, faults)):
            first = np.unravel_index(np.concatenate(faults)[0], array.shape)
            self._fail(
                f"{name} hold {count} NaN or infinite values (or beyond ±{_LARGEST:g}), the first at "
                f"{list(map(int, first))}, expected finite numbers; repair the data or drop its episode"
            )

    def _check_bounds(self, action_space: spaces.Box) -> None:
        tolerance = 1e-3 * (action_space.high.astype(np.float64) - action_space.low)
        low, high = action_space.low - tolerance, action_space.high + tolerance
        if np.all(self.actions.min(0) >= low) and np.all(self.actions.max(0) <= high):
            return
        outside = ((self.actions < low) | (self.actions > high)).reshape(self.num_transitions, -1).any(axis=1)
        self._fail(
            f"{np.count_nonzero(outside)} of {self.num_transitions} actions are outside of {action_space}, "
            f"found values from {self.actions.min():.6g} to {self.actions.max():.6g}; "
            "clip or rescale them to the environment's units"
        )

    def _fail(self, sentence: str) -> None:
        raise ValueError(f"Offline dataset {self.source}: {sentence}.")
