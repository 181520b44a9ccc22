"""Read D4RL's HDF5 layout: flat arrays over time, with ``terminals`` and ``timeouts`` apart."""

from os import PathLike
from pathlib import Path
from typing import Any

import h5py

from modip_sb3.datasets.offline import OfflineDataset

_COLUMNS = {
    "observations": "observations",
    "actions": "actions",
    "rewards": "rewards",
    "terminals": "terminations",
    "timeouts": "truncations",
}


def read_hdf5(path: str | PathLike[str]) -> OfflineDataset:
    """
    Read a D4RL file; see ``OfflineDataset.from_hdf5``.

    :param path: The file, which is only read.
    :return: The dataset, with the file's ``env_id`` attribute if it has one.
    :raises FileNotFoundError: If there is no such file.
    :raises ValueError: If it is not a whole HDF5 file, or lacks a key.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"Offline dataset {path}: no such file, expected an HDF5 file; check the path.")
    if path.stat().st_size == 0:
        raise ValueError(f"Offline dataset {path}: the file is empty, expected HDF5; fetch or write it again.")
    try:
        with h5py.File(path, "r") as file:
            env_id = file.attrs.get("env_id")
            return OfflineDataset.from_arrays(
                **_columns(file, path), env_id=env_id if isinstance(env_id, str) else None, source=str(path)
            )
    except OSError as error:  # what h5py raises on a bad signature, a truncated file or a damaged chunk
        raise ValueError(
            f"Offline dataset {path}: cannot be read as HDF5 ({error}), "
            "expected a whole HDF5 file; fetch or write it again."
        ) from error


def _columns(file: h5py.File, path: Path) -> dict[str, Any]:
    """The file's arrays under our names, unread: ``from_arrays`` reads them block by block."""
    missing = [key for key in _COLUMNS if key not in file]
    if missing:
        raise ValueError(
            f"Offline dataset {path}: lacks {missing}, found {sorted(file)}; expected D4RL's layout with "
            f"{list(_COLUMNS)} and optionally 'next_observations'."
        )
    columns = {name: file[key] for key, name in _COLUMNS.items()}
    if "next_observations" in file:
        columns["next_observations"] = file["next_observations"]
    return columns
