"""Offline data: every format gives the same episodes, and every fault one clear sentence."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import h5py
import minari
import numpy as np
import pytest
from gymnasium import spaces
from minari.data_collector import EpisodeBuffer

from modip_sb3.datasets import (
    REFERENCE_SCORES,
    OfflineDataset,
    has_reference_score,
    normalized_score,
    save_minari,
)

OBSERVATION_SPACE = spaces.Box(-np.inf, np.inf, (3,), np.float64)  # Pendulum's shapes
ACTION_SPACE = spaces.Box(-2.0, 2.0, (1,), np.float32)
COLUMNS = ["observations", "actions", "rewards", "terminations", "truncations", "final_observations"]
D4RL_NAMES = {"terminations": "terminals", "truncations": "timeouts"}


def make_arrays(lengths: tuple[int, ...] = (5, 1, 4), terminated: tuple[bool, ...] = (True, False, False)) -> dict:
    """Episodes whose observations count up, so that a misplaced row is seen."""
    ends, num = np.cumsum(lengths) - 1, sum(lengths)
    rng = np.random.default_rng(0)
    steps = np.arange(num + len(lengths), dtype=np.float32)
    is_final = np.isin(np.arange(len(steps)), ends + np.arange(len(lengths)) + 1)
    rows = np.stack([steps, steps**2, np.sin(steps)], axis=1)
    terminations, truncations = np.zeros(num, bool), np.zeros(num, bool)
    terminations[ends], truncations[ends] = terminated, ~np.array(terminated)
    return {
        "observations": rows[~is_final],
        "actions": rng.uniform(-2, 2, (num, 1)).astype(np.float32),
        "rewards": rng.normal(size=num).astype(np.float32),
        "terminations": terminations,
        "truncations": truncations,
        "final_observations": rows[is_final],
    }


def next_observations(arrays: dict) -> np.ndarray:
    after = np.roll(arrays["observations"], -1, axis=0)
    after[arrays["terminations"] | arrays["truncations"]] = arrays["final_observations"]
    return after


def write_d4rl(path: Path, arrays: dict, env_id: str | None = None) -> Path:
    with h5py.File(path, "w") as file:
        for name, values in arrays.items():
            if name != "final_observations":
                file[D4RL_NAMES.get(name, name)] = values
        if env_id is not None:
            file.attrs["env_id"] = env_id
    return path


def assert_same(dataset: OfflineDataset, expected: OfflineDataset) -> None:
    for name in COLUMNS:
        found, wanted = getattr(dataset, name), getattr(expected, name)
        if isinstance(wanted, dict):
            assert found.keys() == wanted.keys()
        for key in wanted if isinstance(wanted, dict) else [...]:
            assert found[key].dtype == wanted[key].dtype, name
            np.testing.assert_array_equal(found[key], wanted[key], err_msg=name)


def fingerprints(folder: Path) -> dict[Path, tuple[int, str]]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path: (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest()) for path in files}


@pytest.fixture
def arrays() -> dict:
    return make_arrays()


@pytest.fixture
def minari_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "minari"
    root.mkdir()
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(root))
    return root


def in_one_sentence(error: pytest.ExceptionInfo, *parts: str) -> None:
    message = str(error.value)
    assert message.endswith(".") and "\n" not in message
    for part in parts:
        assert part in message, f"{part!r} is not in {message!r}"


# ------------------------------------------------------------------ episodes


def test_sizes(arrays: dict) -> None:
    dataset = OfflineDataset.load(arrays)
    assert (dataset.num_transitions, dataset.num_episodes) == (10, 3)
    assert dataset.episode_ends.tolist() == [4, 5, 9] and dataset.episode_ends.dtype == np.int64
    assert dataset.episode_lengths.tolist() == [5, 1, 4]
    rewards = arrays["rewards"].astype(np.float64)
    np.testing.assert_allclose(dataset.episode_returns, [rewards[:5].sum(), rewards[5], rewards[6:].sum()])
    assert OfflineDataset.load(dataset) is dataset
    dataset.check(OBSERVATION_SPACE, ACTION_SPACE, min_length=5)


def test_arrays_are_kept_and_not_modified(arrays: dict) -> None:
    arrays["truncations"][-1] = False
    before = {name: values.copy() for name, values in arrays.items()}
    for values in arrays.values():
        values.flags.writeable = False
    dataset = OfflineDataset.load(arrays)
    for name in ("observations", "actions", "rewards", "final_observations"):
        assert np.shares_memory(getattr(dataset, name), arrays[name])
    for name, values in before.items():
        np.testing.assert_array_equal(arrays[name], values)


def test_floats_become_float32_and_integers_stay(arrays: dict) -> None:
    wide = {name: values.astype(np.float64) for name, values in arrays.items()}
    assert_same(OfflineDataset.load(wide), OfflineDataset.load(arrays))
    image = arrays | {name: arrays[name].astype(np.uint8) for name in ("observations", "final_observations")}
    assert np.asarray(OfflineDataset.load(image).observations).dtype == np.uint8


def test_unfinished_episode_is_truncated_and_termination_wins(arrays: dict) -> None:
    arrays["truncations"] = np.zeros(10, bool)
    arrays["truncations"][[4, 5]] = True  # 4 is a termination as well
    dataset = OfflineDataset.load(arrays)
    assert np.flatnonzero(dataset.terminations).tolist() == [4]
    assert np.flatnonzero(dataset.truncations).tolist() == [5, 9]


def test_without_next_observations_only_truncated_episodes_lose_a_transition(arrays: dict) -> None:
    del arrays["final_observations"]
    dataset = OfflineDataset.load(arrays)
    kept = [0, 1, 2, 3, 4, 6, 7, 8]  # row 5 was an episode of its own, row 9 the last one of a truncated episode
    np.testing.assert_array_equal(dataset.observations, arrays["observations"][kept])
    np.testing.assert_array_equal(dataset.actions, arrays["actions"][kept])
    np.testing.assert_array_equal(dataset.final_observations, arrays["observations"][[4, 9]])
    assert dataset.terminations.tolist() == [False] * 4 + [True] + [False] * 3
    assert dataset.truncations.tolist() == [False] * 7 + [True]


@pytest.mark.parametrize("seed", range(20))
def test_any_flags_give_whole_episodes(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modip_sb3.datasets.offline._BLOCK", 7)  # several blocks also for few rows
    rng = np.random.default_rng(seed)
    num = int(rng.integers(1, 40))
    flags = rng.random((2, num)) < 0.2
    rows = np.arange(num, dtype=np.float32)[:, None]
    given = dict(observations=rows, actions=rows, rewards=rows[:, 0], terminations=flags[0], truncations=flags[1])
    ends = flags[0] | flags[1]
    ends[-1] = True

    known = OfflineDataset.from_arrays(**given, next_observations=rows + 1)
    np.testing.assert_array_equal(known.episode_ends, np.flatnonzero(ends))
    np.testing.assert_array_equal(known.terminations, flags[0])
    np.testing.assert_array_equal(known.final_observations, rows[ends] + 1)

    lost = ends & ~flags[0]
    if lost.all():
        with pytest.raises(ValueError, match="no transitions"):
            OfflineDataset.from_arrays(**given)
        return
    dataset = OfflineDataset.from_arrays(**given)
    np.testing.assert_array_equal(dataset.observations, rows[~lost])
    last = np.asarray(dataset.observations)[dataset.episode_ends, 0]
    expected = last + dataset.truncations[dataset.episode_ends]
    np.testing.assert_array_equal(np.asarray(dataset.final_observations)[:, 0], expected)


# ------------------------------------------------------------------- formats


def test_d4rl_round_trip(arrays: dict, tmp_path: Path) -> None:
    path = write_d4rl(tmp_path / "data.hdf5", arrays | {"next_observations": next_observations(arrays)}, "Pendulum-v1")
    before = fingerprints(tmp_path)
    for source in (path, str(path)):
        dataset = OfflineDataset.load(source)
        assert_same(dataset, OfflineDataset.load(arrays))
        assert (dataset.env_id, dataset.source) == ("Pendulum-v1", str(path))
    assert fingerprints(tmp_path) == before


def test_d4rl_without_next_observations(arrays: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modip_sb3.datasets.offline._BLOCK", 3)
    path = write_d4rl(tmp_path / "data.h5", arrays)
    del arrays["final_observations"]
    dataset = OfflineDataset.load(path)
    assert_same(dataset, OfflineDataset.load(arrays))
    assert dataset.env_id is None


def test_minari_round_trip(arrays: dict, minari_root: Path) -> None:
    expected = OfflineDataset.load(arrays | {"env_id": "Pendulum-v1"})
    folder = save_minari(expected, "pendulum/test-v0", description="a test")
    assert folder == minari_root / "pendulum" / "test-v0"
    before = fingerprints(minari_root)
    for source in ("pendulum/test-v0", folder, str(folder), folder / "data"):
        dataset = OfflineDataset.load(source)
        assert_same(dataset, expected)
        assert (dataset.env_id, dataset.source) == ("Pendulum-v1", str(source))
    assert fingerprints(minari_root) == before


def test_minari_itself_reads_what_we_write(arrays: dict, tmp_path: Path, minari_root: Path) -> None:
    env = gym.make("Pendulum-v1")
    folder = save_minari(OfflineDataset.load(arrays), "test-v3", env=env, path=tmp_path / "elsewhere", author="me")
    assert folder == tmp_path / "elsewhere" / "test-v3" and not list(minari_root.iterdir())
    dataset = minari.MinariDataset(folder / "data")
    assert dataset.spec.total_steps == 10 and dataset.recover_environment().spec.id == "Pendulum-v1"
    assert [len(episode) for episode in dataset] == [5, 1, 4] and "total_steps=5" in repr(dataset[0])
    for episode in dataset:
        assert episode.observations.dtype == dataset.observation_space.dtype
        assert all(action in dataset.action_space for action in episode.actions)
    another = EpisodeBuffer(**{name: getattr(dataset[2], name) for name in COLUMNS[:-1]}, infos={})
    dataset.update_dataset_from_buffer([another])
    assert OfflineDataset.load(folder).episode_lengths.tolist() == [5, 1, 4, 4]


def test_minari_recording_that_just_stopped_is_truncated(arrays: dict, minari_root: Path) -> None:
    folder = save_minari(OfflineDataset.load(arrays), "stopped-v0", env="Pendulum-v1")
    with h5py.File(folder / "data" / "main_data.hdf5", "r+") as file:
        file["episode_1/truncations"][...] = False
    assert_same(OfflineDataset.load("stopped-v0"), OfflineDataset.load(arrays))


def test_minari_stays_small(minari_root: Path) -> None:
    arrays = make_arrays((200,) * 20, (True, False) * 10)
    rng = np.random.default_rng(0)
    for name in ("observations", "final_observations"):
        arrays[name] = rng.normal(size=arrays[name].shape).astype(np.float32)
    folder = save_minari(OfflineDataset.load(arrays), "small-v0", env="Pendulum-v1")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert size / 4000 < 4 * (3 + 1 + 1) + 15  # the float32 numbers, and what HDF5 needs for 5 arrays an episode


def test_dict_observations_in_every_format(arrays: dict, tmp_path: Path, minari_root: Path) -> None:
    class DictPendulum(gym.Env):
        observation_space = spaces.Dict({"arm": spaces.Box(-1e6, 1e6, (2,)), "goal": spaces.Box(-1.0, 1.0, (1,))})
        action_space = ACTION_SPACE

    def split(rows: np.ndarray) -> dict[str, np.ndarray]:
        return {"arm": rows[:, :2].copy(), "goal": rows[:, 2:].copy()}

    after = next_observations(arrays)
    arrays |= {name: split(arrays[name]) for name in ("observations", "final_observations")}
    expected = OfflineDataset.load(arrays)
    expected.check(DictPendulum.observation_space, ACTION_SPACE, min_length=2)

    save_minari(expected, "dict/test-v0", env=DictPendulum())
    assert_same(OfflineDataset.load("dict/test-v0"), expected)
    assert OfflineDataset.load("dict/test-v0").env_id is None  # such an environment has no spec to record

    with h5py.File(tmp_path / "dict.hdf5", "w") as file:
        for name in ("actions", "rewards", "terminations", "truncations"):
            file[D4RL_NAMES.get(name, name)] = arrays[name]
        for key, values in arrays["observations"].items():
            file[f"observations/{key}"] = values
            file[f"next_observations/{key}"] = split(after)[key]
    assert_same(OfflineDataset.load(tmp_path / "dict.hdf5"), expected)

    with pytest.raises(ValueError) as error:
        expected.check(OBSERVATION_SPACE, ACTION_SPACE, 1)
    in_one_sentence(error, "keys ['arm', 'goal'], expected none (one array)")
    del arrays["final_observations"]["goal"]
    with pytest.raises(ValueError, match="one per episode"):
        OfflineDataset.load(arrays)


# -------------------------------------------------------------------- faults


def set_value(name: str, index: Any, value: float) -> Callable[[dict], None]:
    def change(arrays: dict) -> None:
        arrays[name][index] = value

    return change


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (set_value("observations", (3, 1), np.nan), ["observations hold 1 NaN or infinite values", "[3, 1]"]),
        (set_value("final_observations", (2, 0), np.inf), ["final_observations hold 1 NaN", "[2, 0]"]),
        (set_value("actions", slice(2, 4), np.nan), ["actions hold 2 NaN", "[2, 0]"]),
        (set_value("rewards", 7, -np.inf), ["rewards hold 1 NaN", "[7]"]),
        (set_value("actions", slice(0, 3), 2.5), ["3 of 10 actions are outside", "to 2.5; clip or rescale"]),
        (lambda a: a.update(observations=a["observations"][:, :2], final_observations=a["final_observations"][:, :2],
                            env_id="Walker2d-v5"),
         ["observations have shape (2,), expected (3,)", "recorded on Walker2d-v5"]),
        (lambda a: a.update(actions=np.zeros((10, 2))), ["actions have shape (2,), expected (1,)"]),
        (lambda a: a.update({k: {"state": a[k]} for k in ("observations", "final_observations")}),
         ["the keys ['state'], expected none"]),
    ],
)  # fmt: skip
def test_data_that_does_not_fit_the_environment(arrays: dict, change: Callable[[dict], None], parts: list[str]) -> None:
    change(arrays)
    with pytest.raises(ValueError) as error:
        OfflineDataset.load(arrays).check(OBSERVATION_SPACE, ACTION_SPACE, 2)
    in_one_sentence(error, "Offline dataset arrays: ", *parts)


def test_check_says_which_length_is_missing_and_tolerates_rounding(arrays: dict) -> None:
    arrays["actions"][0] = 2.003
    dataset = OfflineDataset.load(arrays)
    dataset.check(OBSERVATION_SPACE, ACTION_SPACE, 5)
    with pytest.raises(ValueError) as error:
        dataset.check(OBSERVATION_SPACE, ACTION_SPACE, 6)
    in_one_sentence(error, "longest episode has 5 steps, expected at least 6")
    with pytest.raises(ValueError) as error:
        dataset.check(spaces.Dict({"state": OBSERVATION_SPACE}), ACTION_SPACE, 1)
    in_one_sentence(error, "keys none (one array), expected ['state']")


@pytest.mark.parametrize(
    ("changed", "parts"),
    [
        ({"actions": np.zeros((9, 1))}, ["one row per transition", "'actions': 9", "'rewards': 10"]),
        ({"rewards": np.zeros((10, 1))}, ["rewards have shape (10, 1), expected (10,)"]),
        ({"rewards": 1.0}, ["'rewards': None"]),
        ({"rewards": np.array(["a"] * 10)}, ["rewards hold values of type <U1, expected numbers"]),
        ({"observations": np.array([None] * 10)}, ["observations hold values of type object"]),
        ({"final_observations": np.array([["a"]] * 3)}, ["final_observations hold values of type <U1"]),
        ({"terminations": np.full(10, 0.5)}, ["terminations hold values from 0.5 to 0.5, expected only 0 and 1"]),
        ({"final_observations": np.zeros((2, 3))}, ["final_observations have shape (2, 3), expected (3, 3)"]),
        ({"next_observations": np.zeros((10, 3))}, ["final_observations or next_observations, not both"]),
        ({"reward": np.zeros(10)}, ["unknown ['reward']"]),
    ],
)
def test_arrays_that_do_not_fit_together(arrays: dict, changed: dict, parts: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        OfflineDataset.load(arrays | changed)
    in_one_sentence(error, *parts)


def test_empty_and_incomplete_arrays(arrays: dict) -> None:
    with pytest.raises(ValueError) as error:
        OfflineDataset.load({name: values[:0] for name, values in arrays.items()})
    in_one_sentence(error, "holds no transitions")
    del arrays["rewards"]
    with pytest.raises(ValueError) as error:
        OfflineDataset.load(arrays)
    in_one_sentence(error, "lacks ['rewards']")
    with pytest.raises(ValueError) as error:
        OfflineDataset.load(3)  # type: ignore[arg-type]
    in_one_sentence(error, "of type int")


def test_episode_marks_are_checked(arrays: dict) -> None:
    with pytest.raises(ValueError) as error:
        OfflineDataset(**(arrays | {"truncations": np.zeros(10, bool)}))
    in_one_sentence(error, "exactly one of terminations and truncations")


def test_faulty_hdf5_files(arrays: dict, tmp_path: Path) -> None:
    whole = write_d4rl(tmp_path / "whole.hdf5", arrays)
    (tmp_path / "truncated.hdf5").write_bytes(whole.read_bytes()[:-1000])
    (tmp_path / "empty.hdf5").touch()
    (tmp_path / "text.hdf5").write_text("not an HDF5 file")
    (tmp_path / "pickle.pkl").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    with h5py.File(tmp_path / "keys.hdf5", "w") as file:
        file["observations"], file["acts"] = arrays["observations"], arrays["actions"]
    with h5py.File(tmp_path / "group.hdf5", "w") as file:
        for name in ("observations", "rewards", "terminals", "timeouts"):
            file[name] = np.zeros(3)
        file["actions/left"] = np.zeros(3)
    for name, parts in {
        "truncated.hdf5": ["cannot be read as HDF5"],
        "empty.hdf5": ["the file is empty"],
        "text.hdf5": ["cannot be read as HDF5"],
        "pickle.pkl": ["a .pkl file, expected one of ['.h5', '.hdf5']"],
        "keys.hdf5": ["lacks ['actions', 'rewards', 'terminals', 'timeouts']", "found ['acts', 'observations']"],
        "group.hdf5": ["actions hold a group"],
    }.items():
        with pytest.raises(ValueError) as error:
            OfflineDataset.load(tmp_path / name)
        in_one_sentence(error, str(tmp_path / name), *parts)
    with pytest.raises(FileNotFoundError) as missing:
        OfflineDataset.load(tmp_path / "nowhere.hdf5")
    in_one_sentence(missing, "nowhere.hdf5: no such file")


def test_missing_minari_datasets(minari_root: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as error:
        OfflineDataset.load("mujoco/hopper/medium-v0")
    in_one_sentence(error, "minari download mujoco/hopper/medium-v0", "MINARI_DATASETS_PATH", str(minari_root))
    for source in ("./nowhere", tmp_path / "nowhere dir", tmp_path):
        with pytest.raises(FileNotFoundError) as error:
            OfflineDataset.load(source)
        in_one_sentence(error, str(source), "Minari folder")


def test_damaged_minari_datasets(arrays: dict, minari_root: Path) -> None:
    dataset = OfflineDataset.load(arrays)
    folder = save_minari(dataset, "damaged-v0", env="Pendulum-v1") / "data"
    metadata = json.loads((folder / "metadata.json").read_text())
    data = (folder / "main_data.hdf5").read_bytes()

    def load(parts: list[str], content: bytes = data, **changed: Any) -> None:
        (folder / "main_data.hdf5").write_bytes(content)
        (folder / "metadata.json").write_text(json.dumps({k: v for k, v in (metadata | changed).items() if v}))
        with pytest.raises(ValueError) as error:
            OfflineDataset.load("damaged-v0")
        in_one_sentence(error, "Minari dataset damaged-v0: ", *parts)

    load(["cannot be read", "counts 11 steps, its episodes hold 10"], total_steps=11)
    load(["cannot be read"], total_steps=9)
    load(["cannot be read"], content=data[:-2000])
    load(["cannot be read"], content=b"")
    load(["lacks ['action_space', 'observation_space']"], observation_space=None, action_space=None)
    nested = {"type": "Dict", "subspaces": {"goal": {"type": "Dict", "subspaces": {}}}}
    load(["holds a Dict space where a Box was expected"], observation_space=json.dumps(nested))
    (folder / "metadata.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        OfflineDataset.load("damaged-v0")


def test_save_minari_refuses_what_it_cannot_write(arrays: dict, minari_root: Path) -> None:
    dataset = OfflineDataset.load(arrays)
    for dataset_id in ("no-version", "../escape-v0", "/absolute-v0"):
        with pytest.raises(ValueError) as error:
            save_minari(dataset, dataset_id, env="Pendulum-v1")
        in_one_sentence(error, "is no Minari id")
    with pytest.raises(ValueError) as error:
        save_minari(dataset, "test-v0")
    in_one_sentence(error, "pass env=")
    with pytest.raises(ValueError, match="use data of this environment"):
        save_minari(dataset, "test-v0", env="MountainCarContinuous-v0")
    assert not list(minari_root.iterdir())


# -------------------------------------------------------------------- scores


def test_normalized_scores() -> None:
    for env_id in ("Hopper-v5", "hopper-medium-v2", "mujoco/hopper/medium-v0", "D4RL/hopper/expert-v2", "hopper"):
        assert has_reference_score(env_id)
        assert normalized_score(env_id, 3234.3) == pytest.approx(100.0)
        assert normalized_score(env_id, -20.272305) == pytest.approx(0.0)
    assert normalized_score("HalfCheetah-v4", -280.178953 + 0.5 * (12135.0 + 280.178953)) == pytest.approx(50.0)
    low, high = REFERENCE_SCORES["walker2d"]
    np.testing.assert_allclose(normalized_score("Walker2d-v5", np.array([low, high])), [0.0, 100.0])


def test_unknown_scores() -> None:
    for env_id in ("Ant-v5", "dm_control/hopper-hop-v0", "HopperBulletEnv-v0", ""):
        assert not has_reference_score(env_id)
        with pytest.raises(ValueError) as error:
            normalized_score(env_id, 1.0)
        in_one_sentence(error, repr(env_id), "['halfcheetah', 'hopper', 'walker2d']")
    assert not has_reference_score(None)
