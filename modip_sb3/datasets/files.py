"""HDF5 files: opened with one sentence for every fault, and written whole or not at all."""

from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path

import h5py

from modip_sb3.storage import whole_file

# HDF5 keeps the description of every group it has opened, some 30 kB an episode, until the file is closed
EPISODES_AT_A_TIME = 32


@contextmanager
def open_hdf5(path: str | PathLike[str]) -> Iterator[h5py.File]:
    """
    Open a file for reading.

    :param path: the file, which is only read
    :return: the open file
    :raises FileNotFoundError: if there is no such file
    :raises ValueError: if it is empty, damaged or no HDF5 file, also where that is only found while it is read
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"Offline dataset {path}: no such file, expected an HDF5 file; check the path.")
    if path.stat().st_size == 0:
        raise ValueError(f"Offline dataset {path}: the file is empty, expected HDF5; fetch or write it again.")
    with explained(path), h5py.File(path, "r") as file:
        yield file


@contextmanager
def explained(path: str | PathLike[str]) -> Iterator[None]:
    """
    :param path: what is read within
    :raises ValueError: for what h5py raises on a bad signature, a truncated file, a damaged chunk or a dangling link
    """
    try:
        yield
    except (OSError, KeyError) as error:
        raise ValueError(
            f"Offline dataset {path}: cannot be read as HDF5 ({error}), "
            "expected a whole HDF5 file; fetch or write it again."
        ) from error


@contextmanager
def new_hdf5(path: str | PathLike[str]) -> Iterator[h5py.File]:
    """
    Write a file that appears under its name once it is complete, and never replaces another.

    :param path: the file; folders that are missing are made
    :return: the open file
    :raises FileExistsError: if there is such a file
    """
    path = Path(path).expanduser()
    if path.exists():
        raise FileExistsError(f"{path} exists and is not replaced; choose another path, or remove it first.")
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as unfinished, h5py.File(unfinished, "w") as file:
        yield file
