"""From whatever names or holds data to datasets: the formats, filters over episodes, and weights of several sources."""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import h5py
import numpy as np
from stable_baselines3.common.buffers import ReplayBuffer

from modip_sb3.datasets.d4rl import read_d4rl
from modip_sb3.datasets.files import open_hdf5
from modip_sb3.datasets.minari_io import read_minari
from modip_sb3.datasets.offline import DatasetSource, DatasetSources, OfflineDataset
from modip_sb3.datasets.replay import read_replay_buffer
from modip_sb3.datasets.robomimic import read_robomimic

_REQUIRED = {"observations", "actions", "rewards", "terminations", "truncations"}
_OPTIONAL = {"final_observations", "next_observations", "env_id", "source"}
_FILTERS = {"min_return", "top_fraction"}
_READING = {"obs_keys", "filter_key"}
_HDF5_SUFFIXES = {".hdf5", ".h5"}
_PICKLE_SUFFIXES = {".pkl", ".pickle"}


class WeightedDataset(NamedTuple):
    """A dataset and its weight: how often batches draw from it, beside the other weights."""

    dataset: OfflineDataset
    weight: float


def load_sources(sources: DatasetSources) -> list[WeightedDataset]:
    """
    Load one source or several.

    :param sources: What ``OfflineDataset.load`` takes, or a list of it, where each mapping
        ``{"dataset": ..., "weight": ...}`` may say how often batches draw from it. Without weights every transition
        counts the same.
    :return: The datasets and their weights, in the order given.
    :raises ValueError: If there is none, or some have a weight and others do not.
    """
    listed = [*sources] if _is_list(sources) else [sources]
    if not listed:
        raise ValueError("The list of offline datasets is empty, expected at least one.")
    weights = [source.get("weight") if _has_options(source) else None for source in listed]
    if None in weights and any(weight is not None for weight in weights):
        raise ValueError(f"The offline datasets have weights {weights}; give all of them a weight, or none.")
    for weight in weights:
        if weight is not None and not (_is_number(weight) and 0 < weight < math.inf):
            raise ValueError(f"weight={weight!r} of an offline dataset is not a positive number.")
    datasets = [OfflineDataset.load(_without_weight(source)) for source in listed]
    return [
        WeightedDataset(dataset, float(dataset.num_transitions if weight is None else weight))
        for dataset, weight in zip(datasets, weights, strict=True)
    ]


def holds_no_data(sources: Any) -> bool:
    """Whether sources are named with plain values alone, so that they can be saved with a model."""
    if _is_list(sources):
        return all(map(holds_no_data, sources))
    if _has_options(sources):
        return holds_no_data(sources["dataset"])
    return isinstance(sources, str | PathLike)


def fingerprint(datasets: Sequence[WeightedDataset]) -> str:
    """
    :param datasets: What :func:`load_sources` returned.
    :return: A hash of all their numbers and of their weights.
    """
    digest = hashlib.sha256()
    for dataset, weight in datasets:
        for array in _arrays(dataset):
            digest.update(np.ascontiguousarray(array).data)
        digest.update(str(weight).encode())
    return digest.hexdigest()


def _arrays(dataset: OfflineDataset) -> Iterator[np.ndarray]:
    for field in fields(dataset):
        column = getattr(dataset, field.name)
        if isinstance(column, np.ndarray):
            yield column
        elif isinstance(column, dict):
            yield from (column[key] for key in sorted(column))


def load_source(source: DatasetSource) -> OfflineDataset:
    """Load one source; see ``OfflineDataset.load``."""
    if isinstance(source, OfflineDataset):
        return source
    if isinstance(source, ReplayBuffer):
        return read_replay_buffer(source)
    if _has_options(source):
        return _load_with_options(source)
    if isinstance(source, Mapping):
        missing = sorted(_REQUIRED - source.keys())
        unknown = sorted(source.keys() - _REQUIRED - _OPTIONAL, key=str)
        if missing or unknown:
            raise ValueError(
                f"Offline dataset given as a mapping: lacks {missing} and has unknown {unknown}; "
                f"expected {sorted(_REQUIRED)} and optionally {sorted(_OPTIONAL)}, or 'dataset' and options."
            )
        return OfflineDataset.from_arrays(**source)
    if not isinstance(source, str | PathLike):
        raise ValueError(
            f"Offline dataset of type {type(source).__name__}: expected a Minari id, a path, an SB3 replay buffer, "
            "a mapping of arrays, a mapping with 'dataset' and options, or an OfflineDataset."
        )
    return _load_path(source)


def _load_with_options(source: Mapping[str, Any]) -> OfflineDataset:
    dataset = source["dataset"]
    options = {name: value for name, value in source.items() if name != "dataset"}
    unknown = sorted(options.keys() - _FILTERS - _READING, key=str)
    if unknown:
        raise ValueError(
            f"Offline dataset {{'dataset': {_short(dataset)}, ...}}: has unknown options {unknown}; expected "
            f"some of {sorted(_FILTERS | _READING)}, and 'weight' where several are given."
        )
    keys = {name: value for name, value in options.items() if name in _READING}
    loaded = _load_path(dataset, **keys) if keys else load_source(dataset)
    return loaded.select(**{name: value for name, value in options.items() if name in _FILTERS})


def _load_path(source: Any, **options: Any) -> OfflineDataset:
    path = Path(source).expanduser() if isinstance(source, str | PathLike) else Path()
    if path.suffix.lower() in _HDF5_SUFFIXES or (path.is_file() and h5py.is_hdf5(path)):
        with open_hdf5(path) as file:
            is_robomimic = isinstance(file.get("data"), h5py.Group)
        if is_robomimic:
            return read_robomimic(path, **options)
        if not options:
            return read_d4rl(path)
    elif isinstance(source, str | PathLike) and not path.is_file() and "filter_key" not in options:
        return read_minari(source, **options)
    if options:
        raise ValueError(
            f"Offline dataset {_short(source)}: takes no {sorted(options)}: 'filter_key' is for robomimic files, and "
            "'obs_keys' for those and Minari datasets; leave them out."
        )
    if path.suffix.lower() in _PICKLE_SUFFIXES:
        raise ValueError(
            f"Offline dataset {path}: a pickle, which is not opened here because it can run any code; if you trust it, "
            "load it with SB3's model.load_replay_buffer and pass model.replay_buffer."
        )
    raise ValueError(
        f"Offline dataset {path}: a {path.suffix or 'suffix-less'} file, expected HDF5 (one of "
        f"{sorted(_HDF5_SUFFIXES)}) or a Minari folder; pass the arrays of other formats as a mapping."
    )


def _without_weight(source: Any) -> Any:
    return {key: value for key, value in source.items() if key != "weight"} if _has_options(source) else source


def _has_options(source: Any) -> TypeGuard[Mapping[str, Any]]:
    return isinstance(source, Mapping) and "dataset" in source


def _is_list(source: Any) -> TypeGuard[Sequence[DatasetSource]]:
    return isinstance(source, Sequence) and not isinstance(source, str)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _short(dataset: Any) -> str:
    return repr(str(dataset)) if isinstance(dataset, str | PathLike) else f"a {type(dataset).__name__}"
