"""Read and write D4RL's HDF5 layout: flat arrays over time, with ``terminals`` and ``timeouts`` apart."""

from os import PathLike
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from modip_sb3.datasets.columns import blocks, by_key
from modip_sb3.datasets.files import new_hdf5, open_hdf5
from modip_sb3.datasets.offline import OfflineDataset

_COLUMNS = {
    "observations": "observations",
    "actions": "actions",
    "rewards": "rewards",
    "terminals": "terminations",
    "timeouts": "truncations",
}


def read_d4rl(path: str | PathLike[str]) -> OfflineDataset:
    """
    Read flat ``observations``, ``actions``, ``rewards``, ``terminals`` and ``timeouts``.

    Without ``next_observations``, final observations are found as ``OfflineDataset.from_arrays`` says.

    :param path: The file, which is only read. Dict observations are groups of arrays.
    :return: The dataset, with the file's ``env_id`` attribute if it has one.
    :raises FileNotFoundError: If there is no such file.
    :raises ValueError: If it is not a whole HDF5 file, lacks a key, or its arrays do not fit together.
    """
    path = Path(path).expanduser()
    with open_hdf5(path) as file:
        env_id = file.attrs.get("env_id")
        return OfflineDataset.from_arrays(
            **_columns(file, path), env_id=env_id if isinstance(env_id, str) else None, source=str(path)
        )


def _columns(file: h5py.File, path: Path) -> dict[str, Any]:
    """The file's arrays under our names, unread: ``from_arrays`` reads them block by block."""
    missing = [key for key in _COLUMNS if key not in file]
    if missing:
        raise ValueError(
            f"Offline dataset {path}: lacks {missing}, found {sorted(file)}; expected D4RL's layout with "
            f"{list(_COLUMNS)} and optionally 'next_observations', or robomimic's with 'data/demo_0' and so on."
        )
    columns = {name: file[key] for key, name in _COLUMNS.items()}
    if "next_observations" in file:
        columns["next_observations"] = file["next_observations"]
    return columns


def save_d4rl(dataset: OfflineDataset, path: str | PathLike[str]) -> Path:
    """
    Write a dataset in D4RL's layout, with ``next_observations`` and, if it is known, the attribute ``env_id``.

    :param dataset: What to write; Dict observations become groups of arrays.
    :param path: The file, which must not exist. It appears once it is complete.
    :return: Its path.
    :raises FileExistsError: If there is such a file.
    """
    path = Path(path).expanduser()
    with new_hdf5(path) as file:
        for key, name in _COLUMNS.items():
            for part, values in by_key(getattr(dataset, name)).items():
                file[f"{key}/{part}".rstrip("/")] = values
        finals = by_key(dataset.final_observations)
        for part, values in by_key(dataset.observations).items():
            after = file.create_dataset(f"next_observations/{part}".rstrip("/"), values.shape, values.dtype)
            for block in blocks(len(values)):
                after[block] = _next_rows(values, finals[part], dataset.episode_ends, block)
        if dataset.env_id is not None:
            file.attrs["env_id"] = dataset.env_id
    return path


def _next_rows(rows: np.ndarray, finals: np.ndarray, ends: np.ndarray, block: slice) -> np.ndarray:
    """What the steps of a block led to: the next row, or the final observation where an episode ends."""
    after = rows[np.minimum(np.arange(block.start, block.stop) + 1, len(rows) - 1)]
    first, last = np.searchsorted(ends, [block.start, block.stop])
    after[ends[first:last] - block.start] = finals[first:last]
    return after
