"""``python -m modip_sb3.datasets``: each command on real data, and one sentence for every fault."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import h5py
import minari
import numpy as np
import pytest
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize
from test_collect import replay

from modip_sb3.datasets import minari_io, normalized_score
from modip_sb3.datasets.__main__ import main
from modip_sb3.datasets.offline import OfflineDataset
from modip_sb3.datasets.report import plot_dataset
from modip_sb3.datasets.rollout import COLUMNS
from modip_sb3.datasets.summary import Spread, summarize

DATASET_ID = "me/pendulum/mine-v0"
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of SAC and of PPO with VecNormalize, trained for a few steps on Pendulum."""
    folder = tmp_path_factory.mktemp("checkpoints")
    settings: dict[str, Any] = {"learning_starts": 10, "batch_size": 8, "policy_kwargs": {"net_arch": [16]}, "seed": 0}
    SAC("MlpPolicy", "Pendulum-v1", **settings).learn(20).save(folder / "sac.zip")
    env = VecNormalize(make_vec_env("Pendulum-v1", env_kwargs={"g": 5.0}))
    PPO("MlpPolicy", env, n_steps=32, batch_size=32, n_epochs=1, seed=0).learn(32).save(folder / "ppo.zip")
    env.save(str(folder / "statistics.pkl"))
    return folder


@pytest.fixture(autouse=True)
def minari_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "minari"
    root.mkdir()
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(root))
    monkeypatch.setenv("COLUMNS", "200")
    return root


def collect_sac(folder: Path, *args: str) -> int:
    checkpoint = str(folder / "sac.zip")
    return main(["collect", checkpoint, "--algo", "sac", "--env", "Pendulum-v1", "--dataset-id", DATASET_ID, *args])


def make_dataset(lengths: tuple[int, ...] = (5, 1, 4), env_id: str | None = "Pendulum-v1") -> OfflineDataset:
    """Episodes with returns 10, 1 and -4; the first terminates; a quarter of the actions are at a bound."""
    num, ends = sum(lengths), np.cumsum(lengths) - 1
    rows = np.arange(3 * (num + len(lengths)), dtype=np.float32).reshape(-1, 3)
    is_final = np.isin(np.arange(len(rows)), ends + np.arange(len(lengths)) + 1)
    flags = np.isin(np.arange(num), ends)
    return OfflineDataset.from_arrays(
        observations=rows[~is_final],
        actions=np.linspace(-2, 2, num)[:, None],
        rewards=np.repeat([2.0, 1.0, -1.0], lengths),
        terminations=flags & (np.arange(num) == ends[0]),
        truncations=flags & (np.arange(num) > ends[0]),
        final_observations=rows[is_final],
        env_id=env_id,
    )


def assert_same(found: OfflineDataset, expected: OfflineDataset) -> None:
    for name in COLUMNS:
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)
    assert found.env_id == expected.env_id


def fails(capsys: pytest.CaptureFixture, argv: list[str], *parts: str) -> None:
    capsys.readouterr()
    assert main(argv) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and "Traceback" not in printed.err
    for part in parts:
        assert part in printed.err, f"{part!r} is not in {printed.err!r}"


# -------------------------------------------------------------------- collect


def test_collect(folder: Path, minari_root: Path, capsys: pytest.CaptureFixture) -> None:
    assert collect_sac(folder, "--episodes", "3", "--n-envs", "2", "--seed", "7") == 0
    dataset = OfflineDataset.load(DATASET_ID)
    assert replay(dataset, lambda: gym.make("Pendulum-v1"), seed=7, n_envs=2) == [1, 2]
    assert dataset.episode_lengths.tolist() == [200] * 3 and dataset.truncations.sum() == 3
    table = capsys.readouterr().out
    assert all(text in table for text in ("Pendulum-v1", "600", "3 episodes", "the data fits the environment"))

    read = minari.load_dataset(DATASET_ID)
    assert (read.total_episodes, read.total_steps) == (3, 600)
    assert read.storage.metadata["algorithm_name"] == "SAC" and "seed=7" in read.storage.metadata["description"]
    np.testing.assert_array_equal(read[1].actions, dataset.actions[200:400])
    assert minari.list_local_datasets().keys() == {DATASET_ID}
    assert sorted(path.name for path in minari_root.iterdir()) == ["me"]


def test_collect_is_repeatable_and_deterministic_if_asked(folder: Path, tmp_path: Path) -> None:
    roots = [tmp_path / name for name in ("first", "second", "sure")]
    for root, args in zip(roots, ([], [], ["--deterministic"]), strict=True):
        assert collect_sac(folder, "--steps", "10", "--path", str(root), *args) == 0
    first, second, sure = (OfflineDataset.load(root / DATASET_ID) for root in roots)
    assert first.num_transitions == 200
    assert_same(first, second)
    model = SAC.load(folder / "sac.zip")
    np.testing.assert_allclose(sure.actions, model.predict(sure.observations, deterministic=True)[0], atol=1e-5)
    assert not np.allclose(first.actions, sure.actions, atol=1e-3)


def test_collect_with_statistics_and_arguments_of_the_environment(folder: Path) -> None:
    command = ["collect", str(folder / "ppo"), "--algo", "stable_baselines3.PPO", "--env", "Pendulum-v1"]
    command += ["--vec-normalize", str(folder / "statistics.pkl"), "--dataset-id", DATASET_ID, "--episodes", "1"]
    assert main([*command, "--deterministic", "--env-kwargs", "g=5.0"]) == 0
    dataset = OfflineDataset.load(DATASET_ID)
    assert replay(dataset, lambda: gym.make("Pendulum-v1", g=5.0), seed=0) == [1]
    env = VecNormalize.load(str(folder / "statistics.pkl"), make_vec_env("Pendulum-v1"))
    seen = env.normalize_obs(np.asarray(dataset.observations))
    expected = PPO.load(folder / "ppo.zip").predict(seen, deterministic=True)[0]
    np.testing.assert_allclose(dataset.actions, expected, atol=1e-5)
    assert minari.load_dataset(DATASET_ID).recover_environment().unwrapped.g == 5.0


def test_collect_refuses_before_it_rolls_out(folder: Path, minari_root: Path, capsys: pytest.CaptureFixture) -> None:
    sac, given = str(folder / "sac.zip"), ["--env", "Pendulum-v1", "--dataset-id", DATASET_ID]
    (minari_root / "text.zip").write_text("no checkpoint")
    fails(capsys, ["collect", "nowhere", "--algo", "sac", *given], "Checkpoint nowhere: no such file")
    fails(capsys, ["collect", str(minari_root / "text.zip"), "--algo", "sac", *given], "cannot be loaded as SAC")
    fails(capsys, ["collect", sac, "--algo", "ppo", *given], "cannot be loaded as PPO")
    fails(capsys, ["collect", sac, "--algo", "sacc", *given], "Algorithm sacc: unknown", "'tqc', 'trpo'")
    fails(capsys, ["collect", sac, "--algo", "sac", *given, "--n-envs", "0"], "n_envs=0 must be at least 1")
    fails(capsys, ["collect", sac, "--algo", "sac", *given, "--vec-normalize", "no.pkl"], "Statistics no.pkl: no such")
    fails(capsys, ["collect", sac, "--algo", "sac", *given, "--vec-normalize", sac], "VecNormalize.save")
    fails(capsys, ["collect", sac, "--algo", "sac", *given, "--env-kwargs", "gee=1"], "Environment Pendulum-v1: cannot")
    each = ["--env-kwargs", "gee=1", "--env-kwargs", "g=5.0"]
    fails(capsys, ["collect", sac, "--algo", "sac", *given, *each], "Environment Pendulum-v1: cannot")
    given = ["--dataset-id", DATASET_ID]
    fails(capsys, ["collect", sac, "--algo", "sac", *given, "--env", "Pendulun-v1"], "Environment Pendulun-v1: cannot")
    fails(capsys, ["collect", sac, "--algo", "sac", *given, "--env", "MountainCarContinuous-v0"], "spaces do not match")
    fails(capsys, ["collect", sac, "--algo", "sac", "--env", "Pendulum-v1", "--dataset-id", "mine"], "is no Minari id")
    assert [path.name for path in minari_root.iterdir()] == ["text.zip"]

    minari_io.save_minari(make_dataset(), DATASET_ID)
    fails(capsys, ["collect", sac, "--algo", "sac", "--env", "Pendulum-v1", *given], "exists and is not replaced")
    with pytest.raises(SystemExit) as stopped:
        collect_sac(folder, "--steps", "5", "--episodes", "5")
    assert stopped.value.code == 2


# -------------------------------------------------------------------- inspect


def test_summary_has_the_right_numbers() -> None:
    summary = summarize(make_dataset())
    assert (summary.env_id, summary.num_episodes, summary.num_transitions) == ("Pendulum-v1", 3, 10)
    assert summary.observations == {"": str(gym.make("Pendulum-v1").observation_space)}
    assert summary.lengths == Spread(1, 4, 10 / 3, 5) and summary.returns == Spread(-4, 1, 7 / 3, 10)
    assert (summary.num_terminated, summary.num_truncated) == (1, 2)
    assert (summary.saturation, summary.bounds) == (0.2, "environment")
    assert (summary.non_finite, summary.fault, summary.scores) == ({}, None, None)


def test_summary_without_a_known_environment() -> None:
    summary = summarize(make_dataset(env_id="hopper-medium-v2"))
    assert summary.observations == {"": "(3,) float32"} and summary.actions == "(1,) float32"
    assert (summary.saturation, summary.bounds) == (0.2, "data")  # the smallest and the largest
    assert "names hopper-medium-v2" in str(summary.fault) and summary.scores is not None
    assert summary.scores.max == pytest.approx(normalized_score("hopper", 10.0))
    named = summarize(make_dataset(env_id=None), "Hopper-v5")
    assert named.env_id == "Hopper-v5" and "observations have shape (3,), expected (11,)" in str(named.fault)
    assert named.bounds == "data"  # three actions against one
    with pytest.raises(ValueError, match="cannot be made"):
        summarize(make_dataset(), "Nothing-v0")


def test_no_module_is_imported_because_a_file_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "evil_module.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    dataset = make_dataset(env_id="evil_module:Pendulum-v1")
    assert "names evil_module:Pendulum-v1" in str(summarize(dataset).fault)


def test_damaged_data_can_be_inspected(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    good = make_dataset()
    columns = {name: getattr(good, name).copy() for name in COLUMNS}
    columns["observations"][2:4, 1] = np.nan
    columns["final_observations"][1] = np.inf
    columns["rewards"][[6, 7]] = np.inf, -np.inf
    columns["actions"][0] = np.nan
    dataset = OfflineDataset(**columns, env_id="Pendulum-v1")
    summary = summarize(dataset)
    assert summary.non_finite == {"actions": 1, "rewards": 2, "observations": 2, "final_observations": 3}
    assert summary.returns == Spread(1, 5.5, 5.5, 10) and summary.saturation == 0.1
    assert "NaN or infinite" in str(summary.fault)
    nothing = OfflineDataset(**columns | {"actions": np.full((10, 1), np.nan), "rewards": np.full(10, np.nan)})
    assert summarize(nothing).returns is None and summarize(nothing).saturation == 0
    for name, data in {"some.png": dataset, "none.png": nothing}.items():
        plot_dataset(data, tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(PNG)

    with h5py.File(tmp_path / "nan.hdf5", "w") as file:
        for name, key in zip(COLUMNS, ("observations", "actions", "rewards", "terminals", "timeouts"), strict=False):
            file[key] = columns[name]
    assert main(["inspect", str(tmp_path / "nan.hdf5"), "--env", "Pendulum-v1"]) == 0
    table = capsys.readouterr().out
    assert "observations: 2" in table and "rewards: 2" in table


def test_dict_observations_have_a_row_each() -> None:
    good = make_dataset(env_id=None)
    columns = {name: getattr(good, name) for name in COLUMNS}
    for name in ("observations", "final_observations"):
        columns[name] = {"arm": columns[name][:, :2].copy(), "goal": columns[name][:, 2:]}
    columns["observations"]["arm"][0, 0] = np.nan
    summary = summarize(OfflineDataset(**columns))
    assert summary.observations == {"arm": "(2,) float32", "goal": "(1,) float32"}
    assert summary.non_finite == {"observations['arm']": 1}


def test_inspect_in_a_process_of_its_own(tmp_path: Path, minari_root: Path) -> None:
    minari_io.save_minari(make_dataset(), DATASET_ID)
    command = [sys.executable, "-m", "modip_sb3.datasets", "inspect", DATASET_ID, "--plot", "plot.png"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    for text in (
        DATASET_ID,
        "Pendulum-v1",
        "Box(-2.0, 2.0, (1,), float32)",
        "min -4.0, median 1.0, mean 2.3, max 10.0",
    ):
        assert text in result.stdout
    assert (tmp_path / "plot.png").read_bytes().startswith(PNG)


def test_inspect_faults(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    minari_io.save_minari(make_dataset(), DATASET_ID)
    fails(capsys, ["inspect", "nowhere.hdf5"], "nowhere.hdf5: no such file")
    fails(capsys, ["inspect", DATASET_ID, "--obs-keys", "object"], "obs_keys=['object'] names no vectors of its Box")
    fails(capsys, ["inspect", DATASET_ID, "--top-fraction", "2"], "top_fraction=2.0")
    fails(capsys, ["inspect", DATASET_ID, "--env", "Nothing-v0"], "Environment Nothing-v0: cannot be made")
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # what Python makes of a package that is not installed
    fails(capsys, ["inspect", DATASET_ID, "--plot", str(tmp_path / "a.png")], 'pip install "modip-sb3[plots]"')


# -------------------------------------------------------------------- convert


def test_convert_through_every_format(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    dataset = make_dataset()
    minari_io.save_minari(dataset, DATASET_ID)
    d4rl, robomimic = str(tmp_path / "d4rl.hdf5"), str(tmp_path / "robomimic.hdf5")
    assert main(["convert", DATASET_ID, d4rl]) == 0
    assert_same(OfflineDataset.load(d4rl), dataset)
    assert main(["convert", d4rl, robomimic, "--format", "robomimic"]) == 0
    assert_same(OfflineDataset.load(robomimic), dataset)
    assert main(["convert", robomimic, "me/pendulum/back-v0", "--path", str(tmp_path / "elsewhere")]) == 0
    assert_same(OfflineDataset.load(tmp_path / "elsewhere/me/pendulum/back-v0"), dataset)
    assert "10 transitions, 3 episodes" in capsys.readouterr().out


def test_convert_takes_a_part(tmp_path: Path) -> None:
    dataset = make_dataset(env_id=None)
    minari_io.save_minari(dataset, DATASET_ID, env="Pendulum-v1")
    for name, *args in (("best.h5", "--top-fraction", "0.4"), ("good.h5", "--min-return", "0", "--env", "Hopper-v5")):
        assert main(["convert", DATASET_ID, str(tmp_path / name), *args]) == 0
    best, good = OfflineDataset.load(tmp_path / "best.h5"), OfflineDataset.load(tmp_path / "good.h5")
    assert best.episode_returns.tolist() == [10.0]
    assert good.episode_returns.tolist() == [10.0, 1.0] and good.env_id == "Hopper-v5"
    np.testing.assert_array_equal(good.actions, dataset.actions[:6])


def test_convert_replaces_nothing(tmp_path: Path, minari_root: Path, capsys: pytest.CaptureFixture) -> None:
    minari_io.save_minari(make_dataset(), DATASET_ID)
    (tmp_path / "there.hdf5").write_text("mine")
    fails(capsys, ["convert", DATASET_ID, str(tmp_path / "there.hdf5")], "exists and is not replaced")
    fails(capsys, ["convert", DATASET_ID, DATASET_ID], "exists and is not replaced")
    fails(capsys, ["convert", DATASET_ID, "some.npz"], "neither a Minari id", "--format")
    fails(capsys, ["convert", DATASET_ID, "me/no-version"], "is no Minari id")
    assert (tmp_path / "there.hdf5").read_text() == "mine"
    assert main(["convert", DATASET_ID, str(tmp_path / "foreign.h5"), "--env", "my:Robot-v0"]) == 0
    fails(capsys, ["convert", str(tmp_path / "foreign.h5"), "me/robot-v0"], "names my:Robot-v0", "--env")
    assert main(["convert", str(tmp_path / "foreign.h5"), "me/robot-v0", "--env", "Pendulum-v1"]) == 0


def test_ctrl_c_leaves_nothing(
    folder: Path, minari_root: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    minari_io.save_minari(make_dataset(), "source-v0")

    def interrupt(path: Path) -> None:
        assert path.stat().st_size > 0  # Minari's file is written, and not yet complete
        raise KeyboardInterrupt

    monkeypatch.setattr(minari_io, "_compress", interrupt)
    for command in (["convert", "source-v0", DATASET_ID], None):
        assert (main(command) if command else collect_sac(folder, "--episodes", "1")) == 130
        assert "Interrupted: nothing was written." in capsys.readouterr().err
        assert [path.name for path in minari_root.iterdir()] == ["source-v0"]


@pytest.mark.parametrize("command", ["inspect", "collect", "convert"])
def test_help_has_an_example(command: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    printed = capsys.readouterr().out
    assert stopped.value.code == 0 and f"example: python -m modip_sb3.datasets {command} " in printed
    assert ("people you trust" in printed) == (command == "collect")
