"""What SB3 promises of logs, for every algorithm: keys, CSV, JSON, TensorBoard."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from algorithms import every_algorithm, make, random_data
from stable_baselines3.common.callbacks import LogEveryNTimesteps
from stable_baselines3.common.logger import configure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from walk import vec_walk

ROLLOUT = {"rollout/ep_len_mean", "rollout/ep_rew_mean"}
TIME = {"time/episodes", "time/fps", "time/time_elapsed", "time/total_timesteps"}
NOT_ON_TENSORBOARD = {"time/episodes", "time/time_elapsed", "time/total_timesteps", "train/n_updates"}
TRAIN = {"train/learning_rate", "train/n_updates", "train/actor_loss"}


def expected_keys(algo: str) -> set[str]:
    return ROLLOUT | TIME | (TRAIN if algo != "DiffusionBC" else set())


def read_tensorboard(folder: Path) -> dict[str, list[tuple[int, float]]]:
    accumulator = EventAccumulator(str(folder)).Reload()
    scalars = {}
    for tag in accumulator.Tags()["scalars"]:
        # Files of the same second are read in the order of their names, where 10 comes before 9
        events = sorted(accumulator.Scalars(tag), key=lambda event: event.wall_time)
        scalars[tag] = [(event.step, event.value) for event in events]
    return scalars


@every_algorithm
def test_every_output_has_the_same_numbers(algo: str, tmp_path: Path) -> None:
    env = vec_walk(2)
    model = make(algo, env, offline_dataset=random_data(env))
    model.set_logger(configure(str(tmp_path), ["csv", "json", "tensorboard", "log"]))
    model.learn(30, log_interval=1).logger.close()
    rows = pd.read_csv(tmp_path / "progress.csv")
    lines = [json.loads(line) for line in (tmp_path / "progress.json").read_text().splitlines()]
    scalars = read_tensorboard(tmp_path)
    assert set(rows) == set().union(*lines) >= expected_keys(algo)
    assert set(scalars) == set(rows) - NOT_ON_TENSORBOARD
    for (_, row), line in zip(rows.iterrows(), lines, strict=True):
        assert row.dropna().to_dict() == pytest.approx(line)
    for key, points in scalars.items():
        if not key.startswith("pretrain/"):  # these are counted in updates
            expected = [(line["time/total_timesteps"], line[key]) for line in lines if key in line]
            np.testing.assert_allclose(points, expected, rtol=1e-5)
    assert "ep_rew_mean" in (tmp_path / "log.txt").read_text()
    assert all(len(key) <= 36 for key in rows)  # SB3's table of longer ones would collide


@every_algorithm
@pytest.mark.parametrize("name", [None, "mine"])
def test_tensorboard_runs_are_numbered(algo: str, name: str | None, tmp_path: Path) -> None:
    model = make(algo, vec_walk(2), tensorboard_log=str(tmp_path))
    arguments: dict[str, Any] = {} if name is None else {"tb_log_name": name}
    model.learn(12, log_interval=1, **arguments)
    model.learn(12, log_interval=1, reset_num_timesteps=False, **arguments)
    model.learn(12, log_interval=1, **arguments)
    runs = sorted(path.name for path in tmp_path.iterdir())
    assert runs == [f"{name or algo}_1", f"{name or algo}_2"]
    steps = [step for step, _ in read_tensorboard(tmp_path / runs[0])["rollout/ep_rew_mean"]]
    assert steps == sorted(steps) and steps[-1] > 12  # the second call goes on in the first one's run


@every_algorithm
def test_stats_window_and_verbose(algo: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = make(algo, vec_walk(2), stats_window_size=2, verbose=1)
    capsys.readouterr()
    model.learn(24, log_interval=1)
    assert len(model.ep_info_buffer) == 2
    assert "ep_rew_mean" in capsys.readouterr().out
    make(algo, vec_walk(2), verbose=0).learn(20, log_interval=1)
    assert capsys.readouterr().out == ""


@every_algorithm
def test_log_every_n_timesteps(algo: str, tmp_path: Path) -> None:
    model = make(algo)
    model.set_logger(configure(str(tmp_path), ["csv"]))
    model.learn(18, LogEveryNTimesteps(6), log_interval=1000).logger.close()
    assert pd.read_csv(tmp_path / "progress.csv")["time/total_timesteps"].tolist()[-3:] == [6, 12, 18]
