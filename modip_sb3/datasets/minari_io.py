"""Read Minari datasets by id or folder, and write any ``OfflineDataset`` as one."""

import os
import warnings
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import chain
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gymnasium as gym
import h5py
import minari
import numpy as np
from gymnasium import spaces
from minari.data_collector import EpisodeBuffer
from minari.dataset.minari_dataset import DATASET_ID_RE, parse_dataset_id
from minari.dataset.minari_storage import METADATA_FILE_NAME, MinariStorage
from minari.namespace import create_namespace, list_local_namespaces
from minari.storage import get_dataset_path

from modip_sb3.datasets.columns import by_key, join, unkeyed
from modip_sb3.datasets.files import EPISODES_AT_A_TIME
from modip_sb3.datasets.offline import OfflineDataset

_ROOT = "MINARI_DATASETS_PATH"


def read_minari(id_or_folder: str | PathLike[str], obs_keys: Sequence[str] | None = None) -> OfflineDataset:
    """
    Read a Minari dataset with a Box or flat Dict observation space, or some vectors of any Dict space.

    :param id_or_folder: An id such as ``"mujoco/hopper/medium-v0"``, or a folder that holds a dataset. An id that is
        not there is downloaded with ``minari.download_dataset``.
    :param obs_keys: Keys of a Dict observation space, whose vectors are put side by side in one; of a goal-conditioned
        environment, such as the kitchen, ``["observation"]`` leaves the goals out. By default all keys are kept apart.
    :return: The dataset, with the id of the environment it was recorded on if it names one.
    :raises FileNotFoundError: If there is no such folder, and no such id in Minari's remote storage either.
    :raises ConnectionError: If an id is not there, and the remote storage cannot be reached.
    :raises ValueError: If its spaces are not supported, it lacks a key, or its files are damaged.
    """
    folder = _minari_folder(Path(id_or_folder)) or _folder_of_id(str(id_or_folder))
    with _explained(id_or_folder):
        metadata = MinariStorage.read_raw_metadata(folder)
        # Without its spaces, Minari would make the environment that the file names: code of the file's choice.
        missing = {"observation_space", "action_space", "dataset_id", "minari_version"} - metadata.keys()
        if missing:
            raise ValueError(f"{METADATA_FILE_NAME} lacks {sorted(missing)}")
        dataset = minari.MinariDataset(folder)
    _check_spaces(dataset, id_or_folder, obs_keys)
    with (
        _explained(id_or_folder),
        closing(_episodes(dataset, obs_keys)) as episodes,
    ):  # closes the file after a fault, too
        columns = join(episodes, dataset.total_steps)
    env_id = dataset.env_spec.id if dataset.env_spec is not None else None
    return OfflineDataset.from_arrays(**columns, env_id=env_id, source=str(id_or_folder))


@contextmanager
def _explained(source: str | PathLike[str]) -> Iterator[None]:
    """Whatever Minari, JSON and HDF5 raise on damaged files, in one sentence."""
    try:
        yield
    except (OSError, KeyError, ValueError, TypeError, IndexError, AssertionError) as error:
        reason = str(error) or "its episodes are not as they should be"
        raise ValueError(f"Minari dataset {source}: cannot be read ({reason}); fetch or write it again.") from error


def _minari_folder(path: Path) -> Path | None:
    """The ``data`` folder of a Minari dataset's folder (or that folder itself), or None if it is no Minari dataset."""
    path = path.expanduser()
    return next((folder for folder in (path / "data", path) if (folder / METADATA_FILE_NAME).is_file()), None)


def _folder_of_id(dataset_id: str) -> Path:
    match = DATASET_ID_RE.fullmatch(dataset_id)
    if match is None or match["version"] is None:
        raise FileNotFoundError(
            f"Offline dataset {dataset_id}: neither an HDF5 file nor a Minari folder that is there, "
            "nor a Minari id like 'mujoco/hopper/medium-v0'; check the path."
        )
    root = get_dataset_path()
    if _minari_folder(root / dataset_id) is None:
        _download(dataset_id, root)
    folder = _minari_folder(root / dataset_id)
    if folder is None:
        raise FileNotFoundError(f"Minari dataset {dataset_id}: was not found in {root} after it was downloaded there.")
    return folder


def _download(dataset_id: str, root: Path) -> None:
    """Minari says on the console what it fetches, and from where."""
    missing = f"Minari dataset {dataset_id}: not found in {root}"
    try:
        minari.download_dataset(dataset_id)
    except ValueError as error:  # what Minari raises for an id or version that its remote storage does not have
        raise FileNotFoundError(
            f"{missing}, and not to be downloaded either ({str(error).rstrip('.')}); check the id with "
            f"`minari list remote`, or point {_ROOT} to the folder that holds it."
        ) from error
    except Exception as error:  # each remote storage, and each release of its client, has errors of its own
        reason = " ".join(str(error).split()).rstrip(".")
        raise ConnectionError(
            f"{missing}, and downloading it failed ({type(error).__name__}: {reason}); check the network, "
            f"or point {_ROOT} to the folder that holds it."
        ) from error


def _check_spaces(dataset: minari.MinariDataset, source: str | PathLike[str], obs_keys: Sequence[str] | None) -> None:
    space = dataset.observation_space
    parts = dict(space.spaces) if isinstance(space, spaces.Dict) else {"": space}
    if obs_keys is not None:
        vectors = sorted(
            key for key, part in parts.items() if key and isinstance(part, spaces.Box) and len(part.shape) == 1
        )
        if not obs_keys or not set(obs_keys) <= set(vectors):
            raise ValueError(
                f"Minari dataset {source}: obs_keys={list(obs_keys)} names no vectors of its {type(space).__name__} "
                f"space, expected some of {vectors}; name others, or leave obs_keys out."
            )
        parts = {key: parts[key] for key in obs_keys}
    for found in (*parts.values(), dataset.action_space):
        if isinstance(found, spaces.Dict | spaces.Tuple | spaces.Text):
            raise ValueError(
                f"Minari dataset {source}: holds a {type(found).__name__} space where a Box was expected: "
                "observations are a Box or a Dict of Box, and actions a Box; flatten it first, "
                "or choose vectors of a Dict with obs_keys."
            )


def _episodes(dataset: minari.MinariDataset, obs_keys: Sequence[str] | None) -> Generator[dict[str, Any], None, None]:
    """The columns of each episode; a recording that just stopped is truncated."""
    indices = dataset.episode_indices
    parts = (indices[start : start + EPISODES_AT_A_TIME] for start in range(0, len(indices), EPISODES_AT_A_TIME))
    for episode in chain.from_iterable(map(dataset.iterate_episodes, parts)):  # each part opens the file anew
        for name in ("terminations", "truncations"):
            if (dtype := getattr(episode, name).dtype).kind != "b":
                raise ValueError(f"{name} hold values of type {dtype}, expected bool")
        if (steps := len(episode.terminations)) != len(episode.truncations):
            raise ValueError(f"found {steps} terminations and {len(episode.truncations)} truncations of an episode")
        truncations = episode.truncations.copy()
        truncations[-1] |= not episode.terminations[-1]
        ends = episode.terminations | truncations
        observations = by_key(episode.observations)  # one more than steps
        if obs_keys is not None:
            observations = {"": np.concatenate([observations[key] for key in obs_keys], axis=1)}
        yield {
            "observations": unkeyed({key: part[:-1] for key, part in observations.items()}),
            "actions": episode.actions,
            "rewards": episode.rewards,
            "terminations": episode.terminations,
            "truncations": truncations,
            "final_observations": unkeyed({key: part[1:][ends] for key, part in observations.items()}),
        }


def save_minari(
    dataset: OfflineDataset,
    dataset_id: str,
    env: str | gym.Env | None = None,
    path: str | PathLike[str] | None = None,
    **metadata: Any,
) -> Path:
    """
    Write a dataset as a compressed Minari dataset, which ``minari.load_dataset`` reads like any other.

    :param dataset: What to write.
    :param dataset_id: Its id, such as ``"mujoco/hopper/mine-v0"``.
    :param env: The environment (or its id) whose spec and spaces are recorded; ``dataset.env_id`` by default.
    :param path: Folder of Minari datasets to write into; ``MINARI_DATASETS_PATH`` or Minari's own by default.
    :param metadata: What ``minari.create_dataset_from_buffers`` takes besides, such as ``author`` or ``description``.
    :return: The dataset's folder, from which ``OfflineDataset.load`` reads it as well.
    :raises ValueError: If the id is not one of Minari's, or no environment is known.
    :raises FileExistsError: If the id is taken.
    """
    folder = new_minari_folder(dataset_id, path)
    env = env if env is not None else dataset.env_id
    if env is None:
        raise ValueError(f"Offline dataset {dataset.source}: names no environment, expected one; pass env=.")
    made = gym.make(env) if isinstance(env, str) else env
    dataset.check(made.observation_space, made.action_space, min_length=1)
    with _staged(dataset_id, path) as staging, _minari_root(staging), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # Minari's advice to give every piece of metadata
        written = minari.create_dataset_from_buffers(
            dataset_id,
            _episode_buffers(dataset),  # an iterator: no second copy of the data
            env=made,
            observation_space=_as_float32(made.observation_space),
            action_space=_as_float32(made.action_space),
            **metadata,
        )
        _compress(Path(written.storage.data_path) / "main_data.hdf5")
        written.storage.update_metadata({"dataset_size": written.storage.get_size()})
    if isinstance(env, str):
        made.close()
    return folder


def new_minari_folder(dataset_id: str, path: str | PathLike[str] | None = None) -> Path:
    """
    Where a dataset that is to be written will be; to be asked before the work of making it.

    :param dataset_id: Its id.
    :param path: As in ``save_minari``.
    :return: Its folder, which does not exist.
    :raises ValueError: If the id is not one of Minari's.
    :raises FileExistsError: If it is taken.
    """
    match = DATASET_ID_RE.fullmatch(dataset_id)
    if match is None or match["version"] is None:
        raise ValueError(f"dataset_id={dataset_id!r} is no Minari id, expected one like 'mujoco/hopper/mine-v0'.")
    with _minari_root(path):
        folder = get_dataset_path(dataset_id)
    if folder.exists():
        raise FileExistsError(f"Minari dataset {dataset_id}: {folder} exists and is not replaced; choose another.")
    return folder


@contextmanager
def _staged(dataset_id: str, path: str | PathLike[str] | None) -> Iterator[Path]:
    """A hidden folder to write a dataset in, which appears among the others once it is complete."""
    with _minari_root(path):
        with TemporaryDirectory(prefix=".unfinished-", dir=get_dataset_path()) as staging:
            yield Path(staging)
            namespace = parse_dataset_id(dataset_id)[0]
            if namespace is not None and namespace not in list_local_namespaces():
                create_namespace(namespace)
            os.rename(Path(staging) / dataset_id, get_dataset_path(dataset_id))


@contextmanager
def _minari_root(path: str | PathLike[str] | None) -> Iterator[None]:
    """Minari takes the folder it writes into from the environment variable alone."""
    before = os.environ.get(_ROOT)
    if path is not None:
        os.environ[_ROOT] = str(Path(path).expanduser().resolve())
    try:
        yield
    finally:
        if before is not None:
            os.environ[_ROOT] = before
        elif path is not None:
            del os.environ[_ROOT]


def _episode_buffers(dataset: OfflineDataset) -> Iterator[EpisodeBuffer]:
    observations, finals = by_key(dataset.observations), by_key(dataset.final_observations)
    for episode, (length, end) in enumerate(zip(dataset.episode_lengths, dataset.episode_ends, strict=True)):
        steps = slice(end + 1 - length, end + 1)
        parts = {key: np.concatenate([values[steps], finals[key][[episode]]]) for key, values in observations.items()}
        yield EpisodeBuffer(
            observations=unkeyed(parts),
            actions=dataset.actions[steps],
            rewards=dataset.rewards[steps],
            terminations=dataset.terminations[steps],
            truncations=dataset.truncations[steps],
            infos={},
        )


def _as_float32(space: spaces.Space) -> spaces.Space:
    """The space of what is stored: MuJoCo's environments say float64."""
    if isinstance(space, spaces.Dict):
        return spaces.Dict({key: _as_float32(part) for key, part in space.spaces.items()})
    if isinstance(space, spaces.Box) and space.dtype == np.float64:
        return spaces.Box(space.low.astype(np.float32), space.high.astype(np.float32), dtype=np.float32)
    return space


def _compress(path: Path) -> None:
    """
    Rewrite Minari's file with each array as one compressed chunk, in the compact format of HDF5 1.10.

    This halves it: Minari's chunks are not full after some hundred steps. Episodes can still be added, none continued.
    """
    packed = path.with_suffix(".tmp")
    with h5py.File(path, "r") as source, h5py.File(packed, "w", libver=("v110", "v110")) as target:

        def copy(name: str, item: h5py.Group | h5py.Dataset) -> None:
            if isinstance(item, h5py.Group):
                target.create_group(name).attrs.update(item.attrs)
            else:
                layout = {"chunks": item.shape, "compression": "gzip", "shuffle": True}
                target.create_dataset(name, data=item[()], **layout)

        source.visititems(copy)
    os.replace(packed, path)
