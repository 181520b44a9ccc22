"""Columns of transitions, in memory or still in an HDF5 file: checked, read and joined block by block."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import h5py
import numpy as np

Observations: TypeAlias = np.ndarray | dict[str, np.ndarray]

BLOCK = 4096  # rows read at a time, so that a column is never held twice


def by_key(observations: Any) -> dict[str, Any]:
    """Observations of either kind as a dict; the key of plain ones is the empty string."""
    return dict(observations) if isinstance(observations, Mapping) else {"": observations}


def unkeyed(parts: dict[str, Any]) -> Any:
    """The inverse of ``by_key``."""
    return parts[""] if parts.keys() == {""} else parts


def key_names(parts: Mapping[str, Any]) -> str:
    """The keys of ``by_key`` in a sentence."""
    return "none (one array)" if parts.keys() == {""} else str(sorted(parts, key=str))


def stored_dtype(dtype: np.dtype) -> np.dtype:
    """Floats are stored as float32, everything else as it is."""
    return np.dtype(np.float32) if dtype.kind == "f" else dtype


def blocks(rows: int) -> Iterator[slice]:
    """Slices of at most ``BLOCK`` rows that cover all of them."""
    return (slice(start, min(start + BLOCK, rows)) for start in range(0, rows, BLOCK))


def as_array(values: Any, name: str = "columns") -> Any:
    """An array, or what is still to be read from an HDF5 file; ``name`` is what errors call it."""
    if isinstance(values, h5py.Dataset | h5py.Group):
        return values
    try:
        return np.asarray(values)
    except ValueError as error:
        raise ValueError(
            f"Offline dataset: {name} are nested lists of different lengths, expected one row of the same shape per "
            "step; put episodes one after another."
        ) from error


def named(name: str, observations: Any) -> dict[str, Any]:
    """Observations under the names that errors call them: ``name``, or ``name['key']`` for each key."""
    names = {f"{name}{key and f'[{key!r}]'}": values for key, values in by_key(observations).items()}
    return {full_name: as_array(values, full_name) for full_name, values in names.items()}


def named_columns(observations: Any, actions: Any, rewards: Any, terminations: Any, truncations: Any) -> dict[str, Any]:
    """The five columns that have one row per transition, under the names that errors call them."""
    rest = {"actions": actions, "rewards": rewards, "terminations": terminations, "truncations": truncations}
    return named("observations", observations) | {name: as_array(values, name) for name, values in rest.items()}


def check_numbers(columns: dict[str, Any], source: str) -> None:
    """
    :param columns: arrays by name
    :param source: what errors call the data
    :raises ValueError: if one holds no numbers
    """
    for name, array in columns.items():
        if isinstance(array, h5py.Group) or array.dtype.kind not in "biuf":
            kind = "a group" if isinstance(array, h5py.Group) else f"values of type {array.dtype}"
            raise ValueError(f"Offline dataset {source}: {name} hold {kind}, expected numbers; convert them first.")


def check_columns(columns: dict[str, Any], source: str) -> None:
    """
    Numbers only, one row per transition, and at least one.

    :param columns: arrays by name
    :param source: what errors call the data
    :raises ValueError: if they are anything else
    """
    check_numbers(columns, source)
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


def as_flags(values: Any, name: str, source: str) -> np.ndarray:
    """
    :param values: ``(N,)`` bool or 0 and 1
    :param name: what errors call them
    :param source: what errors call the data
    :return: ``(N,)`` bool
    :raises ValueError: if there is any other value
    """
    flags = np.asarray(values)
    if flags.dtype != bool and not ((flags == 0) | (flags == 1)).all():
        raise ValueError(
            f"Offline dataset {source}: {name} hold values from {flags.min()} to {flags.max()}, "
            "expected only 0 and 1; check which array is which."
        )
    return flags.astype(bool, copy=False)


def take(observations: Any, rows: np.ndarray | None = None) -> Observations:
    """``take_rows`` for observations of either kind."""
    return unkeyed({key: take_rows(as_array(values), rows) for key, values in by_key(observations).items()})


def take_rows(values: Any, rows: np.ndarray | None = None, dtype: np.dtype | None = None) -> np.ndarray:
    """
    The marked rows as they are stored: without a copy where all are marked and the array is in memory as it should be.

    :param values: an array, or an HDF5 dataset, which is read block by block
    :param rows: ``(N,)`` bool; all by default
    :param dtype: of the result; ``stored_dtype`` by default
    :return: the rows
    """
    array = as_array(values)
    dtype = dtype or stored_dtype(array.dtype)
    rows = np.ones(len(array), bool) if rows is None else rows
    if isinstance(array, np.ndarray) and rows.all():
        return np.ascontiguousarray(array, dtype)
    taken = np.empty((np.count_nonzero(rows), *array.shape[1:]), dtype)
    filled = 0
    for block in blocks(len(rows)):
        kept = array[block][rows[block]]
        taken[filled : filled + len(kept)] = kept
        filled += len(kept)
    return taken


def take_finals(next_observations: Any, observations: Observations, ends: np.ndarray, source: str) -> Observations:
    """
    The observation after each episode's end, and a check that every other one is the next row's.

    :param next_observations: ``(N, *obs_shape)``, what each step led to
    :param observations: ``(N, *obs_shape)``, as they are stored
    :param ends: ``(N,)`` bool, the last steps of the episodes
    :param source: what errors call the data
    :return: ``(E, *obs_shape)``
    :raises ValueError: if a row within an episode is not what the row before led to
    """
    parts = by_key(observations)
    finals: dict[str, list[np.ndarray]] = {key: [] for key in parts}
    if (found := by_key(next_observations)).keys() != parts.keys():
        raise ValueError(
            f"Offline dataset {source}: next_observations have the keys {key_names(found)}, "
            f"expected {key_names(parts)} as in observations."
        )
    for key, values in found.items():
        array, part = as_array(values), parts[key]
        if array.shape != part.shape:
            raise ValueError(
                f"Offline dataset {source}: next_observations have shape {array.shape}, expected {part.shape}."
            )
        for block in blocks(len(part)):
            after = array[block].astype(part.dtype, copy=False)
            finals[key].append(after[ends[block]])
            following = part[block.start + 1 : block.stop + 1]
            same = np.isclose(after[: len(following)], following, rtol=1e-4, atol=1e-5, equal_nan=True)
            same = same.all(tuple(range(1, same.ndim))) | ends[block][: len(following)]
            if not same.all():
                row = block.start + int(np.argmin(same))
                raise ValueError(
                    f"Offline dataset {source}: row {row + 1} is not what row {row} led to, and no episode ends there; "
                    "sort the rows by episode and time, and mark where a recording stopped as truncated."
                )
    return unkeyed({key: np.concatenate(kept) for key, kept in finals.items()})


def join(chunks: Iterable[Mapping[str, Any]], rows: int) -> dict[str, Any]:
    """
    Join chunks of columns, one after another, in arrays that are allocated once: nothing is held twice.

    :param chunks: columns by the names of ``OfflineDataset.from_arrays``, in each the same; the first gives the types
    :param rows: transitions in all chunks together
    :return: the joined columns
    :raises ValueError: if the chunks do not fit together
    """
    joined: dict[str, dict[str, np.ndarray]] = {}
    finals: list[dict[str, np.ndarray]] = []
    stop = 0
    for chunk in chunks:
        start, stop = stop, stop + len(chunk["rewards"])
        for name, values in chunk.items():
            parts = by_key(values)
            if name == "final_observations":
                finals.append({key: part.astype(stored_dtype(part.dtype)) for key, part in parts.items()})
                continue
            if start == 0:
                joined[name] = {key: _allocate(rows, part) for key, part in parts.items()}
            for key, part in parts.items():
                target = joined[name][key][start:stop]
                if part.shape != target.shape:
                    raise ValueError(f"{name} have shape {part.shape}, expected {target.shape} as before")
                np.copyto(target, part, casting="same_kind")
    if stop != rows:
        raise ValueError(f"expected {rows} steps in all, found {stop}")
    columns = {name: unkeyed(parts) for name, parts in joined.items()}
    if finals:
        columns["final_observations"] = unkeyed({key: np.concatenate([f[key] for f in finals]) for key in finals[0]})
    return columns


def _allocate(rows: int, example: np.ndarray) -> np.ndarray:
    return np.empty((rows, *example.shape[1:]), stored_dtype(example.dtype))
