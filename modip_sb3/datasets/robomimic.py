"""Read and write robomimic's HDF5 layout: one group ``data/demo_i`` per episode."""

import json
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from modip_sb3.datasets.columns import by_key, join
from modip_sb3.datasets.files import EPISODES_AT_A_TIME, explained, new_hdf5, open_hdf5
from modip_sb3.datasets.offline import OfflineDataset

_ARM_KEYS = ["robot{}_eef_pos", "robot{}_eef_quat", "robot{}_gripper_qpos"]
_GYM_TYPE = 2  # robomimic's EnvType.GYM_TYPE
_TERMINALS = "terminals"  # D4RL's name; robomimic has no place for terminations apart from success and ignores it


def read_robomimic(
    path: str | PathLike[str], obs_keys: Sequence[str] | None = None, filter_key: str | None = None
) -> OfflineDataset:
    """
    Read demonstrations in numeric order, with their low-dimensional observations side by side in one vector.

    An episode terminates if its last step is done and rewarded, which is robomimic's mark of success, and is truncated
    otherwise; where a demonstration has ``terminals``, as ``save_robomimic`` writes them, they say it. Without
    ``next_obs``, final observations are found as ``OfflineDataset.from_arrays`` says.

    :param path: The file, which is only read.
    :param obs_keys: Low-dimensional keys under ``obs``, in the order of the vector. By default those of robomimic's
        low-dim benchmark if the file has them (``robot0_eef_pos``, ``robot0_eef_quat``, ``robot0_gripper_qpos``, the
        same of ``robot1`` if there is one, ``object``), else every low-dimensional key in alphabetical order.
    :param filter_key: Name under ``mask`` of a list of demonstrations, such as "train"; all by default.
    :return: The dataset, with the name of the environment in ``env_args`` if it is there.
    :raises FileNotFoundError: If there is no such file.
    :raises ValueError: If it is not a whole HDF5 file, lacks a key, or its arrays do not fit together.
    """
    path = Path(path).expanduser()
    with open_hdf5(path) as file, _explained(path):
        demos = _demos(file, filter_key)
        keys = _low_dim_keys(file["data"][demos[0]], obs_keys)
        env_name = json.loads(file["data"].attrs.get("env_args", "{}")).get("env_name")
    with explained(path), _explained(path), closing(_groups(path, demos)) as groups:
        steps = sum(_count_steps(demo, keys) for demo in groups)
    with explained(path), _explained(path), closing(_groups(path, demos)) as groups:
        columns = join((_read_demo(demo, keys) for demo in groups), steps)
    return OfflineDataset.from_arrays(**columns, env_id=env_name or None, source=str(path))


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Whatever is missing or does not fit, in one sentence that names the file."""
    try:
        yield
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"robomimic dataset {path}: {error.args[0]}.") from error


def _groups(path: Path, demos: list[str]) -> Generator[h5py.Group, None, None]:
    """The demonstrations' groups, from a file that is opened anew now and then to free what HDF5 keeps of them."""
    for start in range(0, len(demos), EPISODES_AT_A_TIME):
        with h5py.File(path, "r") as file:
            yield from (file["data"][name] for name in demos[start : start + EPISODES_AT_A_TIME])


def _demos(file: h5py.File, filter_key: str | None) -> list[str]:
    names = list(file["data"])
    if filter_key is not None:
        masks = sorted(file.get("mask", []))
        if filter_key not in masks:
            raise ValueError(f"filter_key={filter_key!r} is not under 'mask', which has {masks}")
        names = [name.decode() for name in file["mask"][filter_key][()]]
    unknown = [name for name in names if name not in file["data"] or not name.removeprefix("demo_").isdecimal()]
    if unknown or not names:
        raise ValueError(f"found {unknown or 'nothing'} under 'data', expected the groups 'demo_0', 'demo_1' and so on")
    return sorted(names, key=lambda name: int(name.removeprefix("demo_")))


def default_obs_keys(available: Iterable[str]) -> list[str]:
    """
    :param available: low-dimensional observations that there are
    :return: those of robomimic's low-dim benchmark in its order, if they are there; else all of them
    """
    known = list(available)
    arms = [[key.format(robot) for key in _ARM_KEYS] for robot in range(2)]
    if not {*arms[0], "object"} <= set(known):
        return known
    return [*arms[0], *(arms[1] if set(arms[1]) <= set(known) else []), "object"]


def _low_dim_keys(demo: h5py.Group, obs_keys: Sequence[str] | None) -> list[str]:
    if "obs" not in demo:
        raise ValueError(
            f"{_name(demo)} has {sorted(demo)} and no 'obs'; extract observations with robomimic's "
            "dataset_states_to_obs.py first"
        )
    arrays = {key: values for key, values in demo["obs"].items() if isinstance(values, h5py.Dataset)}
    shapes = {key: values.shape[1:] for key, values in arrays.items()}
    if not shapes:
        raise ValueError(f"{_name(demo)} has no arrays under 'obs', expected at least one")
    low_dim = [key for key, shape in shapes.items() if len(shape) <= 1]
    if obs_keys is None:
        return default_obs_keys(low_dim)
    unknown = [key for key in obs_keys if key not in shapes]
    if unknown or not obs_keys:
        raise ValueError(f"obs_keys={list(obs_keys)} names {unknown or 'nothing'}, expected keys of {sorted(shapes)}")
    images = {key: shapes[key] for key in obs_keys if key not in low_dim}
    if images:
        raise ValueError(f"obs_keys={list(obs_keys)} names {images}, expected vectors such as {low_dim}")
    return list(obs_keys)


def _count_steps(demo: h5py.Group, keys: list[str]) -> int:
    required = ["actions", "rewards", "dones", *(f"obs/{key}" for key in keys)]
    required += [f"next_obs/{key}" for key in keys if "next_obs" in demo]
    missing = [key for key in required if not isinstance(demo.get(key), h5py.Dataset)]
    if missing:
        raise ValueError(f"{_name(demo)} lacks {missing}, found {sorted(demo)}")
    lengths = {key: len(demo[key]) for key in required}
    if len(set(lengths.values())) != 1 or not lengths["actions"]:
        raise ValueError(f"{_name(demo)} has rows {lengths}, expected one per step in each")
    return lengths["actions"]


def _read_demo(demo: h5py.Group, keys: list[str]) -> dict[str, Any]:
    columns = {"actions": demo["actions"][()], "rewards": demo["rewards"][()]}
    ended = np.arange(1, len(columns["rewards"]) + 1) == len(columns["rewards"])
    success = demo["dones"][-1] != 0 and columns["rewards"][-1] > 0
    terminated = ended & bool(demo[_TERMINALS][-1] if _TERMINALS in demo else success)
    columns |= {"terminations": terminated, "truncations": ended & ~terminated}
    if "next_obs" in demo:
        columns["final_observations"] = _side_by_side(demo["next_obs"], keys, slice(-1, None))
    return columns | {"observations": _side_by_side(demo["obs"], keys, slice(None))}


def _side_by_side(group: h5py.Group, keys: list[str], rows: slice) -> np.ndarray:
    parts = [group[key][rows] for key in keys]
    return np.concatenate([part.reshape(len(part), -1) for part in parts], axis=1, dtype=np.float32)


def _name(demo: h5py.Group) -> str:
    return demo.name.rsplit("/", 1)[-1]


def save_robomimic(
    dataset: OfflineDataset,
    path: str | PathLike[str],
    env_args: dict[str, Any] | None = None,
    states: Sequence[np.ndarray] | None = None,
    models: Sequence[str] | None = None,
) -> Path:
    """
    Write a dataset in robomimic's layout, which its ``SequenceDataset`` reads like any other.

    ``dones`` marks terminations and no time limits; ``terminals`` repeats it, as a done alone means success there.

    :param dataset: What to write; one array of observations is stored under the key "flat".
    :param path: The file, which must not exist. It appears once it is complete.
    :param env_args: robomimic's description of the environment; a gym environment of the dataset's id by default.
    :param states: The simulator's states before each step, ``(T, state_dim)`` for each episode, if they are known.
    :param models: The simulator's model of each episode as XML, if it is known.
    :return: The file's path.
    :raises FileExistsError: If there is such a file.
    """
    path = Path(path).expanduser()
    env_args = env_args or {"env_name": dataset.env_id or "", "type": _GYM_TYPE, "env_kwargs": {}}
    observations, finals = by_key(dataset.observations), by_key(dataset.final_observations)
    with new_hdf5(path) as file:
        data = file.create_group("data")
        data.attrs.update({"total": dataset.num_transitions, "env_args": json.dumps(env_args)})
        for episode, (length, end) in enumerate(zip(dataset.episode_lengths, dataset.episode_ends, strict=True)):
            demo, steps = data.create_group(f"demo_{episode}"), slice(end + 1 - length, end + 1)
            demo.attrs["num_samples"] = length
            demo["actions"], demo["rewards"] = dataset.actions[steps], dataset.rewards[steps]
            if states is not None:
                demo["states"] = states[episode]
            if models is not None:
                demo.attrs["model_file"] = models[episode]
            demo["dones"] = demo[_TERMINALS] = dataset.terminations[steps].astype(np.int64)
            for key, values in observations.items():
                demo[f"obs/{key or 'flat'}"] = values[steps]
                demo[f"next_obs/{key or 'flat'}"] = np.concatenate([values[steps][1:], finals[key][[episode]]])
    return path
