"""robomimic's HDF5 layout: our reader and robomimic's own give the same numbers, and every fault one clear sentence."""

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from episodes import fingerprints, in_one_sentence, make_arrays

from modip_sb3.datasets import OfflineDataset, save_robomimic

KEYS = ["robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos", "object"]
SIZES = dict(zip(KEYS, [3, 4, 2, 5], strict=True)) | {"robot0_joint_vel": 7, "time": None}
LENGTHS = [3, 2, 4, 2, 3, 2, 5, 2, 3, 2, 6]  # demo_10 comes after demo_9, and not after demo_1


def write_robomimic(path: Path) -> Path:
    """A file like those of robomimic's benchmark: sparse rewards, doubles, an image, masks."""
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["env_args"] = json.dumps({"env_name": "Lift", "type": 1, "env_kwargs": {"robots": ["Panda"]}})
        data.attrs["total"] = sum(LENGTHS)
        for index, length in enumerate(LENGTHS):
            demo = data.create_group(f"demo_{index}")
            demo.attrs["num_samples"] = length
            demo["actions"] = rng.uniform(-1, 1, (length, 7))
            success = np.arange(length) >= length - (index % 3)  # every third demonstration fails
            demo["rewards"], demo["dones"] = success.astype(float), success.astype(int)
            for key, size in SIZES.items():
                values = rng.normal(size=(length + 1,) if size is None else (length + 1, size))
                demo[f"obs/{key}"], demo[f"next_obs/{key}"] = values[:-1], values[1:]
            demo["obs/agentview_image"] = demo["next_obs/agentview_image"] = np.zeros((length, 8, 8, 3), np.uint8)
        file["mask/train"] = np.array([b"demo_10", b"demo_2", b"demo_0"])
        file["mask/none"] = np.array([], "S8")
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_robomimic(tmp_path / "lift.hdf5")


def read_with_robomimic(path: Path, keys: list[str], filter_key: str | None = None) -> dict[str, np.ndarray]:
    """All rows, in robomimic's own order."""
    reason = "needs `pip install --no-deps robomimic==0.3.0`, and the extra 'robomimic'"
    dataset_module = pytest.importorskip("robomimic.utils.dataset", reason=reason)
    obs_utils = pytest.importorskip("robomimic.utils.obs_utils", reason=reason)
    obs_utils.initialize_obs_utils_with_obs_specs({"obs": {"low_dim": keys}})
    columns = ("actions", "rewards", "dones")
    dataset = dataset_module.SequenceDataset(str(path), keys, columns, filter_by_attribute=filter_key)
    rows = [dataset[index] for index in range(len(dataset))]
    found = {name: np.concatenate([row[name] for row in rows]) for name in columns}
    for name in ("obs", "next_obs"):
        found[name] = np.array([np.concatenate([row[name][key].reshape(-1) for key in keys]) for row in rows])
    return found


@pytest.mark.parametrize("filter_key", [None, "train"])
@pytest.mark.parametrize("keys", [KEYS, ["time", "object"]])
def test_same_numbers_as_robomimic(path: Path, keys: list[str], filter_key: str | None) -> None:
    before = fingerprints(path.parent)
    dataset = OfflineDataset.load({"dataset": path, "obs_keys": keys, "filter_key": filter_key})
    assert fingerprints(path.parent) == before
    expected = read_with_robomimic(path, keys, filter_key)
    np.testing.assert_array_equal(dataset.observations, expected["obs"].astype(np.float32))
    np.testing.assert_array_equal(dataset.final_observations, expected["next_obs"][dataset.episode_ends].astype("f4"))
    np.testing.assert_array_equal(dataset.actions, expected["actions"].astype(np.float32))
    np.testing.assert_array_equal(dataset.rewards, expected["rewards"].astype(np.float32))
    np.testing.assert_array_equal(dataset.terminations, (expected["dones"] * dataset.terminations) > 0)


def test_robomimic_reads_what_we_write(tmp_path: Path) -> None:
    dataset = OfflineDataset.load(make_arrays())
    expected = read_with_robomimic(save_robomimic(dataset, tmp_path / "data.hdf5"), ["flat"])
    np.testing.assert_array_equal(dataset.observations, expected["obs"])
    np.testing.assert_array_equal(dataset.final_observations, expected["next_obs"][dataset.episode_ends])
    np.testing.assert_array_equal(dataset.actions, expected["actions"])
    np.testing.assert_array_equal(dataset.rewards, expected["rewards"])
    np.testing.assert_array_equal(dataset.terminations, expected["dones"])


def test_env_args(tmp_path: Path) -> None:
    dataset = OfflineDataset.load(make_arrays() | {"env_id": "Pendulum-v1"})
    args = {"env_name": "Lift", "type": 1, "env_kwargs": {"robots": ["Panda"]}}
    for name, env_args, expected in (
        ("gym", None, {"env_name": "Pendulum-v1", "type": 2, "env_kwargs": {}}),
        ("robosuite", args, args),
    ):
        with h5py.File(save_robomimic(dataset, tmp_path / f"{name}.hdf5", env_args)) as file:
            assert json.loads(file["data"].attrs["env_args"]) == expected
            assert file["data"].attrs["total"] == 10
            assert [file[f"data/demo_{i}"].attrs["num_samples"] for i in range(3)] == [5, 1, 4]


def test_demos_in_numeric_order_end_with_success_or_are_truncated(path: Path) -> None:
    dataset = OfflineDataset.load(path)
    assert dataset.episode_lengths.tolist() == LENGTHS and dataset.env_id == "Lift"
    assert dataset.terminations[dataset.episode_ends].tolist() == [bool(i % 3) for i in range(len(LENGTHS))]
    filtered = OfflineDataset.load({"dataset": path, "filter_key": "train"})
    assert filtered.episode_lengths.tolist() == [LENGTHS[0], LENGTHS[2], LENGTHS[10]]


def test_default_keys(path: Path) -> None:
    def vector(*keys: str) -> list[float]:
        with h5py.File(path) as file:
            return np.concatenate([file[f"data/demo_0/obs/{key}"][0].reshape(-1) for key in keys]).astype("f4").tolist()

    def first() -> list[float]:
        return np.asarray(OfflineDataset.load(path).observations)[0].tolist()

    assert first() == vector(*KEYS)
    with h5py.File(path, "r+") as file:
        for demo in file["data"].values():
            for key in KEYS[:3]:
                for group in (demo["obs"], demo["next_obs"]):
                    group[key.replace("robot0", "robot1")] = group[key][()] + 1
    assert first() == vector(*KEYS[:3], *(key.replace("robot0", "robot1") for key in KEYS[:3]), "object")
    with h5py.File(path, "r+") as file:
        for demo in file["data"].values():
            del demo["obs/object"], demo["next_obs/object"]
    assert first() == vector(*sorted([*KEYS[:3], *(k.replace("0", "1") for k in KEYS[:3]), "robot0_joint_vel", "time"]))


def test_without_next_obs_truncated_episodes_lose_a_transition(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        for demo in file["data"].values():
            del demo["next_obs"]
    expected = [length - (i % 3 == 0) for i, length in enumerate(LENGTHS)]
    assert OfflineDataset.load(path).episode_lengths.tolist() == expected


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"obs_keys": ["objekt", "object"]}, ["names ['objekt'], expected keys of", "'agentview_image', 'object'"]),
        ({"obs_keys": []}, ["obs_keys=[] names nothing"]),
        ({"obs_keys": ["object", "agentview_image"]}, ["{'agentview_image': (8, 8, 3)}, expected vectors such as"]),
        ({"filter_key": "valid"}, ["filter_key='valid' is not under 'mask', which has ['none', 'train']"]),
        ({"filter_key": "none"}, ["found nothing under 'data'"]),
    ],
)
def test_wrong_options(path: Path, options: dict[str, Any], parts: list[str]) -> None:
    before = fingerprints(path.parent)
    with pytest.raises(ValueError) as error:
        OfflineDataset.load({"dataset": path, **options})
    in_one_sentence(error, f"robomimic dataset {path}: ", *parts)
    assert fingerprints(path.parent) == before


def test_damaged_files(path: Path) -> None:
    whole = path.read_bytes()

    def check(*parts: str, delete: str | None = None, **replaced: Any) -> None:
        path.write_bytes(whole)
        with h5py.File(path, "r+") as file:
            for name in [*([delete] if delete else []), *replaced]:
                del file["data/demo_4"][name]
            for name, values in replaced.items():
                file["data/demo_4"][name] = values
        with pytest.raises(ValueError) as error:
            OfflineDataset.load(path)
        in_one_sentence(error, str(path), *parts)

    check("demo_4 lacks ['dones'], found ['actions', 'next_obs', 'obs', 'rewards']", delete="dones")
    check("demo_4 lacks ['obs/object']", delete="obs/object")
    check("demo_4 lacks ['next_obs/object']", delete="next_obs/object")
    check("demo_4 has rows {'actions': 3, 'rewards': 2,", rewards=np.zeros(2))
    check("actions have shape (3, 1), expected (3, 7) as before", actions=np.zeros((3, 1)))
    check("Cannot cast array data from dtype('S4') to dtype('float32')", actions=np.full((3, 7), b"left"))
    for name in ("demo_0/obs", "demo_0/next_obs"):
        with h5py.File(path, "w") as file:
            file[f"data/{name}/flat"] = np.zeros((1, 3))
        with pytest.raises(ValueError, match="demo_0 (lacks|has)"):
            OfflineDataset.load(path)
    with h5py.File(path, "w") as file:
        file["data/episode_0/actions"] = np.zeros((1, 3))
    with pytest.raises(ValueError) as error:
        OfflineDataset.load(path)
    in_one_sentence(error, "found ['episode_0'] under 'data', expected the groups 'demo_0', 'demo_1' and so on")
    path.write_bytes(whole[:-500])
    with pytest.raises(ValueError) as error:
        OfflineDataset.load(path)
    in_one_sentence(error, "cannot be read as HDF5")


def test_nan_is_found_before_training(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file["data/demo_1/obs/object"][1, 0] = np.nan
    dataset = OfflineDataset.load(path)
    with pytest.raises(ValueError) as error:
        dataset._check_finite("observations", np.asarray(dataset.observations))
    in_one_sentence(error, str(path), "observations hold 1 NaN", "[4, 9]")
