"""Dict observations and terminations are the same in every format, and writers never replace a file."""

from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from episodes import ACTION_SPACE, OBSERVATION_SPACE, assert_same, fingerprints, in_one_sentence, make_arrays
from gymnasium import spaces

from modip_sb3.datasets import OfflineDataset, save_d4rl, save_minari, save_robomimic


class DictPendulum(gym.Env):
    """An environment that only has spaces."""

    observation_space = spaces.Dict({"arm": spaces.Box(-1e6, 1e6, (2,)), "goal": spaces.Box(-1.0, 1.0, (1,))})
    action_space = ACTION_SPACE


@pytest.fixture
def dict_arrays(arrays: dict) -> dict:
    for name in ("observations", "final_observations"):
        arrays[name] = {"arm": arrays[name][:, :2].copy(), "goal": arrays[name][:, 2:].copy()}
    return arrays


def test_dict_observations(dict_arrays: dict, tmp_path: Path, minari_root: Path) -> None:
    expected = OfflineDataset.load(dict_arrays)
    expected.check(DictPendulum.observation_space, ACTION_SPACE, min_length=2)

    save_minari(expected, "dict/test-v0", env=DictPendulum())
    assert_same(OfflineDataset.load("dict/test-v0"), expected)
    assert OfflineDataset.load("dict/test-v0").env_id is None  # such an environment has no spec to record

    assert_same(OfflineDataset.load(save_d4rl(expected, tmp_path / "dict.hdf5")), expected)

    path = save_robomimic(expected, tmp_path / "robomimic.hdf5")
    beside = OfflineDataset.load({"dataset": path, "obs_keys": ["arm", "goal"]})
    assert_same(beside, OfflineDataset.load(make_arrays()))  # one vector, as robomimic's policies take it


def test_dict_observations_that_do_not_fit(dict_arrays: dict) -> None:
    with pytest.raises(ValueError) as error:
        OfflineDataset.load(dict_arrays).check(OBSERVATION_SPACE, ACTION_SPACE, 1)
    in_one_sentence(error, "keys ['arm', 'goal'], expected none (one array)")
    del dict_arrays["final_observations"]["goal"]
    with pytest.raises(ValueError, match="one per episode"):
        OfflineDataset.load(dict_arrays)


@pytest.mark.parametrize("save", [save_d4rl, save_robomimic])
@pytest.mark.parametrize("block", [3, 1000])
def test_round_trip(save, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ANN001
    monkeypatch.setattr("modip_sb3.datasets.columns.BLOCK", block)
    arrays = make_arrays((5, 1, 4, 2), (True, False, False, True)) | {"env_id": "Pendulum-v1"}
    arrays["rewards"] = -np.abs(arrays["rewards"])  # an episode may terminate without any reward
    expected = OfflineDataset.load(arrays)
    path = save(expected, tmp_path / "new folder" / "data.hdf5")
    assert [file.name for file in path.parent.iterdir()] == ["data.hdf5"]
    dataset = OfflineDataset.load(path)
    assert_same(dataset, expected)
    assert dataset.env_id == "Pendulum-v1"
    assert OfflineDataset.load(save(OfflineDataset.load(make_arrays()), tmp_path / "none.hdf5")).env_id is None


@pytest.mark.parametrize("save", [save_d4rl, save_robomimic])
def test_writers_replace_nothing_and_leave_nothing_behind(save, arrays: dict, tmp_path: Path) -> None:  # noqa: ANN001
    dataset = OfflineDataset.load(arrays)
    path = save(dataset, tmp_path / "data.hdf5")
    before = fingerprints(tmp_path)
    with pytest.raises(FileExistsError) as error:
        save(dataset, path)
    in_one_sentence(error, str(path), "is not replaced")
    object.__setattr__(dataset, "rewards", None)  # as when the disk is full half-way
    with pytest.raises(TypeError):
        save(dataset, tmp_path / "another.hdf5")
    assert fingerprints(tmp_path) == before
