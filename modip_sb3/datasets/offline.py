"""Offline data as episodes: one frozen container that every format becomes, and the checks it must pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias, Union

import h5py
import numpy as np
from gymnasium import spaces
from numpy.typing import ArrayLike

Observations: TypeAlias = np.ndarray | dict[str, np.ndarray]
DatasetSource: TypeAlias = Union["OfflineDataset", str, PathLike[str], Mapping[str, Any]]

_REQUIRED = {"observations", "actions", "rewards", "terminations", "truncations"}
_OPTIONAL = {"final_observations", "next_observations", "env_id", "source"}
_HDF5_SUFFIXES = {".hdf5", ".h5"}
_BLOCK = 65_536  # rows read at a time, so that a column is never held twice


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
        columns = _columns(self.observations, self.actions, self.rewards, self.terminations, self.truncations)
        _check_columns(columns, self.source)
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

        :param source: A dataset (returned as it is), a mapping of the arrays that ``from_arrays`` takes, the path of an
            HDF5 file in D4RL's layout, the path of a Minari dataset's folder, or the id of a local Minari dataset.
        :return: The dataset.
        :raises FileNotFoundError: If there is no such file, folder or dataset.
        :raises ValueError: If it cannot be read, or its arrays do not fit together.
        """
        if isinstance(source, OfflineDataset):
            return source
        if isinstance(source, Mapping):
            missing, unknown = _REQUIRED - source.keys(), source.keys() - _REQUIRED - _OPTIONAL
            if missing or unknown:
                raise ValueError(
                    f"Offline dataset given as a mapping: lacks {sorted(missing)} and has unknown {sorted(unknown)}; "
                    f"expected {sorted(_REQUIRED)} and optionally {sorted(_OPTIONAL)}."
                )
            return cls.from_arrays(**source)
        if not isinstance(source, str | PathLike):
            raise ValueError(
                f"Offline dataset of type {type(source).__name__}: expected a Minari id, a path, "
                "a mapping of arrays or an OfflineDataset."
            )
        path = Path(source).expanduser()
        if path.suffix.lower() in _HDF5_SUFFIXES:
            return cls.from_hdf5(path)
        if path.is_file():
            raise ValueError(
                f"Offline dataset {path}: a {path.suffix or 'suffix-less'} file, expected one of "
                f"{sorted(_HDF5_SUFFIXES)} or a Minari folder; pass the arrays of other formats as a mapping."
            )
        return cls.from_minari(source)

    @classmethod
    def from_minari(cls, id_or_folder: str | PathLike[str]) -> OfflineDataset:
        """
        Load a Minari dataset with a Box or flat Dict observation space; nothing is downloaded.

        :param id_or_folder: Id of a local dataset, such as ``"mujoco/hopper/medium-v0"``, or a dataset's folder.
        :return: The dataset, with the id of the environment it was recorded on if it names one.
        :raises FileNotFoundError: If it is not there.
        :raises ValueError: If its spaces are not supported, or its files are damaged.
        """
        from modip_sb3.datasets.minari_io import read_minari

        return read_minari(id_or_folder)

    @classmethod
    def from_hdf5(cls, path: str | PathLike[str]) -> OfflineDataset:
        """
        Load a file in D4RL's layout: flat ``observations``, ``actions``, ``rewards``, ``terminals`` and ``timeouts``.

        Without ``next_observations``, final observations are found as ``from_arrays`` says.

        :param path: The file.
        :return: The dataset, with the file's ``env_id`` attribute if it has one.
        :raises FileNotFoundError: If there is no such file.
        :raises ValueError: If it is not a whole HDF5 file, lacks a key, or its arrays do not fit together.
        """
        from modip_sb3.datasets.hdf5 import read_hdf5

        return read_hdf5(path)

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
        :raises ValueError: If the arrays hold no numbers, are empty, or do not fit together.
        """
        if final_observations is not None and next_observations is not None:
            raise ValueError(f"Offline dataset {source}: pass final_observations or next_observations, not both.")
        columns = _columns(observations, actions, rewards, terminations, truncations)
        if next_observations is not None:
            columns |= _named("next_observations", next_observations)
        _check_columns(columns, source)
        terminated = _flags(columns["terminations"], "terminations", source)
        truncated = _flags(columns["truncations"], "truncations", source) & ~terminated
        truncated[-1] = not terminated[-1]
        ends, kept = terminated | truncated, np.ones_like(terminated)
        if final_observations is not None:
            _check_numbers(_named("final_observations", final_observations), source)
            finals = _take(final_observations)
        elif next_observations is not None:
            finals = _take(next_observations, ends)
        else:
            kept = ~truncated
            starts = np.roll(ends, 1)
            finals = _take(observations, ends & ~(truncated & starts))
            truncated = np.append(truncated[1:] & ~ends[:-1], False)
        return cls(
            observations=_take(observations, kept),
            actions=_take_rows(actions, kept, np.dtype(np.float32)),
            rewards=_take_rows(rewards, kept, np.dtype(np.float32)),
            terminations=terminated[kept],
            truncations=truncated[kept],
            final_observations=finals,
            env_id=env_id,
            source=source,
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
        columns = _columns(self.observations, self.actions, self.rewards, self.terminations, self.truncations)
        for name, array in (columns | _named("final_observations", self.final_observations)).items():
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
                f"observations have the keys {_keys(found)}, expected {_keys(parts)}; use data of this environment"
            )
        shapes = {f"observations{key and f'[{key!r}]'}": (found[key], space.shape) for key, space in parts.items()}
        for name, (shape, expected) in (shapes | {"actions": (self.actions.shape[1:], action_space.shape)}).items():
            if shape != expected:
                recorded = f" (it was recorded on {self.env_id})" if self.env_id else ""
                self._fail(f"{name} have shape {shape}, expected {expected}{recorded}; use data of this environment")

    def _check_finite(self, name: str, array: np.ndarray) -> None:
        finite = np.isfinite(array)
        if not finite.all():
            first = tuple(int(i) for i in np.unravel_index(np.argmin(finite), finite.shape))
            self._fail(
                f"{name} hold {finite.size - np.count_nonzero(finite)} NaN or infinite values, the first at "
                f"{list(first)}, expected finite numbers; repair the data or drop its episode"
            )

    def _check_bounds(self, action_space: spaces.Box) -> None:
        tolerance = 1e-3 * (action_space.high.astype(np.float64) - action_space.low)
        outside = (self.actions < action_space.low - tolerance) | (self.actions > action_space.high + tolerance)
        count = np.count_nonzero(outside.reshape(self.num_transitions, -1).any(axis=1))
        if count:
            self._fail(
                f"{count} of {self.num_transitions} actions are outside of {action_space}, found values from "
                f"{self.actions.min():.6g} to {self.actions.max():.6g}; clip or rescale them to the environment's units"
            )

    def _fail(self, sentence: str) -> None:
        raise ValueError(f"Offline dataset {self.source}: {sentence}.")


def by_key(observations: Any) -> dict[str, Any]:
    """Observations of either kind as a dict; the key of plain ones is the empty string."""
    return dict(observations) if isinstance(observations, Mapping) else {"": observations}


def unkeyed(parts: dict[str, Any]) -> Any:
    """The inverse of ``by_key``."""
    return parts[""] if parts.keys() == {""} else parts


def stored_dtype(dtype: np.dtype) -> np.dtype:
    """Floats are stored as float32, everything else as it is."""
    return np.dtype(np.float32) if dtype.kind == "f" else dtype


def _keys(parts: Mapping[str, Any]) -> str:
    return "none (one array)" if parts.keys() == {""} else str(sorted(parts))


def _array(values: Any) -> Any:
    """An array, or what is still to be read from an HDF5 file."""
    return values if isinstance(values, h5py.Dataset | h5py.Group) else np.asarray(values)


def _named(name: str, observations: Any) -> dict[str, Any]:
    return {f"{name}{key and f'[{key!r}]'}": _array(values) for key, values in by_key(observations).items()}


def _columns(observations: Any, actions: Any, rewards: Any, terminations: Any, truncations: Any) -> dict[str, Any]:
    rest = {"actions": actions, "rewards": rewards, "terminations": terminations, "truncations": truncations}
    return _named("observations", observations) | {name: _array(values) for name, values in rest.items()}


def _check_numbers(columns: dict[str, Any], source: str) -> None:
    for name, array in columns.items():
        if isinstance(array, h5py.Group) or array.dtype.kind not in "biuf":
            kind = "a group" if isinstance(array, h5py.Group) else f"values of type {array.dtype}"
            raise ValueError(f"Offline dataset {source}: {name} hold {kind}, expected numbers; convert them first.")


def _check_columns(columns: dict[str, Any], source: str) -> None:
    """Numbers only, one row per transition, and at least one."""
    _check_numbers(columns, source)
    lengths = {name: array.shape[0] if array.shape else None for name, array in columns.items()}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"Offline dataset {source}: expected one row per transition in each array, found {lengths}.")
    if not lengths["actions"]:
        raise ValueError(f"Offline dataset {source}: holds no transitions, expected at least one; check its origin.")
    for name in ("rewards", "terminations", "truncations"):
        if columns[name].ndim != 1:
            raise ValueError(
                f"Offline dataset {source}: {name} have shape {columns[name].shape}, "
                f"expected {columns[name].shape[:1]}; flatten them."
            )


def _flags(values: Any, name: str, source: str) -> np.ndarray:
    flags = np.asarray(values)
    if not np.isin(flags, (0, 1)).all():
        raise ValueError(
            f"Offline dataset {source}: {name} hold values from {flags.min()} to {flags.max()}, "
            "expected only 0 and 1; check which array is which."
        )
    return flags.astype(bool)


def _take(observations: Any, rows: np.ndarray | None = None) -> Observations:
    return unkeyed({key: _take_rows(_array(values), rows) for key, values in by_key(observations).items()})


def _take_rows(values: Any, rows: np.ndarray | None = None, dtype: np.dtype | None = None) -> np.ndarray:
    """
    The marked rows as they are stored: without a copy where all are marked and the array is in memory as it should be.
    """
    array = _array(values)
    dtype = dtype or stored_dtype(array.dtype)
    rows = np.ones(len(array), bool) if rows is None else rows
    if isinstance(array, np.ndarray) and rows.all():
        return np.ascontiguousarray(array, dtype)
    taken = np.empty((np.count_nonzero(rows), *array.shape[1:]), dtype)
    filled = 0
    for start in range(0, len(rows), _BLOCK):
        marked = rows[start : start + _BLOCK]
        block = array[start : start + _BLOCK][marked]
        taken[filled : filled + len(block)] = block
        filled += len(block)
    return taken
