"""``benchmark run``: settings, recording, resuming, failing; in this process, where that is the same code."""

import json
import random
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from bench import ENV_ID, PARAMS, command, planned, run
from stable_baselines3 import SAC
from stable_baselines3.common.utils import set_random_seed
from walk import Walk, record_walk

from modip_sb3 import MODIP, OfflineDataset
from modip_sb3.benchmark.runs import RunFolder, locked, read_rows
from modip_sb3.benchmark.worker import execute, restore_model
from modip_sb3.checkpoint import isolated_rng
from modip_sb3.datasets import save_d4rl
from modip_sb3.evaluation import evaluate

PROTOCOL = {"freq": 20, "episodes": 2, "seed": 1000, "actions": "default"}
FRAGILE = "modip-test/fragile-walk-v0"


class FragileWalk(Walk):
    """Says whether it ended in success; the first one that a run makes, to learn in, breaks after some steps."""

    metadata = {"render_modes": ["rgb_array"]}
    made = 0

    def __init__(self, fault: str) -> None:
        super().__init__()
        FragileWalk.made += 1
        self.number, self.fault, self.num_steps = FragileWalk.made, Path(fault), 0

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict]:
        self.num_steps += 1
        if self.number == 1 and self.fault.exists() and self.num_steps > int(self.fault.read_text()):
            raise RuntimeError("the robot fell off the table")
        obs, reward, terminated, truncated, info = super().step(action)
        return obs, reward, terminated, truncated, info | {"is_success": bool(obs[0] > 0)}


gym.register(FRAGILE, FragileWalk)


def steps_of(run_folder: RunFolder, inference: str = "policy") -> list[tuple[int, int]]:
    rows = read_rows(run_folder.path / "evaluations.csv")
    return [(int(row["env_steps"]), int(row["episode"])) for row in rows if row["inference"] == inference]


SCHEDULE = [(steps, episode) for steps in (0, 20, 40) for episode in (0, 1)]

# --------------------------------------------------------------------- recording


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunFolder]:
    """A run of SAC and one of MODIP."""
    runs = planned(command(tmp_path_factory.mktemp("finished"), "sac", "modip"))
    for folder in runs:
        execute(folder.path, 1)
    return dict(zip(("sac", "modip"), runs, strict=True))


def test_a_folder_holds_everything(finished: dict[str, RunFolder]) -> None:
    for algo, folder in finished.items():
        files = {path.name for path in folder.path.iterdir()}
        assert files == {".lock", "config.json", "status.json", "evaluations.csv", "progress.csv", "model.zip"}
        config = json.loads((folder.path / "config.json").read_text())
        assert (config["settings"]["algo"], config["settings"]["evaluation"]) == (algo, PROTOCOL)
        assert config["settings"]["defaults"]["gradient_steps"] == 1
        assert config["software"]["versions"]["torch"] == th.__version__
        status = folder.read_status()
        assert (status["state"], status["env_steps"], status["error"]) == ("finished", 40, None)
        assert status["steps_per_second"] == pytest.approx(40 / (status["train_seconds"] - status["offline_seconds"]))
        assert status["peak_memory_mb"] > 100
        (session,) = status["sessions"]
        assert session["from_step"] == 0 and session["threads"] == 1 and session["cores"] >= 1 and session["cpu"]
    assert finished["sac"].read_status()["ms_per_action"].keys() == {"policy"}
    assert finished["modip"].read_status()["ms_per_action"].keys() == {"policy", "planner"}
    model = MODIP.load(finished["modip"].path / "model.zip")
    assert (model.num_timesteps, model.inference, model.batch_size) == (40, "policy", 8)


def test_a_row_for_each_episode_of_each_evaluation(finished: dict[str, RunFolder]) -> None:
    assert steps_of(finished["sac"]) == steps_of(finished["modip"]) == SCHEDULE
    assert steps_of(finished["modip"], "planner") == SCHEDULE and steps_of(finished["sac"], "planner") == []
    rows = read_rows(finished["modip"].path / "evaluations.csv")
    assert {row["length"] for row in rows} == {"10"} and {row["success"] for row in rows} == {""}
    model = SAC.load(finished["sac"].path / "model.zip")
    expected = evaluate(model, ENV_ID, 2, deterministic=True, env_kwargs={"max_episode_steps": 10}).returns
    found = [float(row["return"]) for row in read_rows(finished["sac"].path / "evaluations.csv")[-2:]]
    np.testing.assert_allclose(found, expected)


def test_losses_are_logged(finished: dict[str, RunFolder]) -> None:
    for algo, loss in {"sac": "train/critic_loss", "modip": "train/actor_loss"}.items():
        rows = read_rows(finished[algo].path / "progress.csv")
        assert [row["time/total_timesteps"] for row in rows] == ["40"]  # every fourth episode
        assert np.isfinite(float(rows[0][loss]))


def test_evaluations_take_no_wall_time(finished: dict[str, RunFolder]) -> None:
    status = finished["modip"].read_status()
    seconds = [float(row["wall_seconds"]) for row in read_rows(finished["modip"].path / "evaluations.csv")]
    assert seconds == sorted(seconds) and seconds[-1] == pytest.approx(status["train_seconds"], abs=1e-3)
    assert len(set(seconds)) == 3 and status["evaluation_seconds"] > 0 and status["checkpoint_seconds"] > 0


def test_evaluations_leave_no_trace_in_training(tmp_path: Path) -> None:
    def numbers() -> tuple[float, ...]:
        return random.random(), float(np.random.rand()), float(th.rand(1))

    set_random_seed(3)
    expected = numbers()
    set_random_seed(3)
    inside = []
    for _ in range(2):
        with isolated_rng(7):
            inside.append(numbers())
    assert numbers() == expected and inside[0] == inside[1]
    parameters = []
    for freq in ("20", "7"):
        (folder,) = planned([*command(tmp_path / freq, "modip"), "--eval-freq", freq])
        execute(folder.path, 1)
        parameters.append(MODIP.load(folder.path / "model.zip").policy.state_dict())
    assert all(th.equal(value, parameters[1][name]) for name, value in parameters[0].items())


def test_an_offline_phase_is_timed_and_evaluated(tmp_path: Path) -> None:
    save_d4rl(OfflineDataset.from_arrays(**record_walk()), tmp_path / "walk.hdf5")
    (folder,) = planned(fragile(tmp_path, "modip", "modip.pretrain_steps:30", "--offline-dataset", "walk.hdf5"))
    execute(folder.path, 1)
    status, rows = folder.read_status(), read_rows(folder.path / "evaluations.csv")
    assert 0 < status["offline_seconds"] < status["train_seconds"]
    assert 0 < status["cpu_seconds"] < 1.5 * status["train_seconds"]  # one thread
    assert float(rows[0]["wall_seconds"]) == pytest.approx(status["offline_seconds"], abs=1e-3)
    assert {row["success"] for row in rows} <= {"0", "1"}
    assert any(row["pretrain/actor_loss"] for row in read_rows(folder.path / "progress.csv"))


# ---------------------------------------------------------------------- resuming


def fragile(folder: Path, algo: str, *params: str) -> list[str]:
    """A run that fails once there is a file."""
    own = [text for text in PARAMS[algo] if "env_kwargs" not in text] + [f"{algo}.policy:MlpPolicy"]
    names = ["--envs", FRAGILE, "--algos", algo, "--seeds", "0", "--timesteps", "40", "--eval-freq", "20"]
    more = [f"{algo}.env_kwargs:{{'fault': '{folder / 'fault'}'}}", *own]
    return ["run", *names, "--eval-episodes", "2", "--output", str(folder / "runs"), "-P", *more, *params]


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(FragileWalk, "made", 0)


def test_a_clone_is_evaluated_once(tmp_path: Path) -> None:
    data = tmp_path / "walk.hdf5"
    save_d4rl(OfflineDataset.from_arrays(**record_walk()), data)
    _, *rest = fragile(tmp_path, "diffusion_bc")
    (folder,) = planned(["run", "--offline-dataset", str(data), *rest, "--timesteps", "50"])
    execute(folder.path, 1)
    rows = read_rows(folder.path / "evaluations.csv")
    scored = [tuple(row[name] for name in ("episode", "return", "length", "success")) for row in rows]
    assert [row["env_steps"] for row in rows] == ["0", "0", "20", "20", "40", "40", "50", "50"]
    assert scored == 4 * scored[:2] and folder.read_status()["state"] == "finished"


@pytest.mark.parametrize(("algo", "params"), [("sac", ["sac.normalize:True"]), ("modip", [])])
def test_a_failed_run_goes_on_from_its_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, algo: str, params: list[str]
) -> None:
    (folder,) = planned(fragile(tmp_path, algo, *params))
    (tmp_path / "fault").write_text("33")
    with pytest.raises(RuntimeError, match="the robot fell off the table"):
        execute(folder.path, 1)
    status = folder.read_status()
    assert (status["state"], status["error"]) == ("failed", "RuntimeError: the robot fell off the table")
    assert "the robot fell off the table" in (folder.path / "traceback.txt").read_text()
    assert steps_of(folder) == SCHEDULE[:4]
    assert folder.last_checkpoint() == folder.path / "checkpoint-20"
    before, progress = read_rows(folder.path / "evaluations.csv"), read_rows(folder.path / "progress.csv")
    assert int(progress[-1]["time/total_timesteps"]) > 20  # what the checkpoint does not hold, and is done again

    (tmp_path / "fault").unlink()
    (folder.path / "unfinished-checkpoint").mkdir()  # a kill while it was written
    execute(folder.path, 1)
    status = folder.read_status()
    assert (status["state"], status["env_steps"], status["error"]) == ("finished", 40, None)
    assert [session["from_step"] for session in status["sessions"]] == [0, 20]
    assert not (folder.path / "traceback.txt").exists() and not list(folder.path.glob("*checkpoint*"))
    assert steps_of(folder) == SCHEDULE
    assert read_rows(folder.path / "evaluations.csv")[: len(before)] == before
    logged = [int(row["time/total_timesteps"]) for row in read_rows(folder.path / "progress.csv")]
    assert logged == sorted(set(logged)) and logged[-1] > 30
    model = {"sac": SAC, "modip": MODIP}[algo].load(folder.path / "model.zip")
    assert (model.num_timesteps, model._n_updates) == (40, {"sac": 35, "modip": 18}[algo])  # as if nothing had been
    assert (folder.path / "vecnormalize.pkl").exists() == bool(params)


def test_a_checkpoint_holds_the_replay_and_the_random_numbers(tmp_path: Path) -> None:
    (folder,) = planned(fragile(tmp_path, "modip"))
    (tmp_path / "fault").write_text("20")
    with pytest.raises(RuntimeError):
        execute(folder.path, 1)
    (tmp_path / "fault").unlink()  # the robot is restored too, and would fall again
    restored = []
    for _ in range(2):
        model, env, _ = restore_model(folder.read_settings(), folder.path, folder.path / "checkpoint-20")
        assert (model.num_timesteps, model.replay_buffer.size()) == (20, 20)
        restored.append(model.learn(10, reset_num_timesteps=False).policy.state_dict())
    assert all(th.equal(value, restored[1][name]) for name, value in restored[0].items())


def test_a_folder_belongs_to_one_process(tmp_path: Path) -> None:
    with locked(tmp_path, wait=True):
        assert run(*command(tmp_path, "sac")) == (
            f"{tmp_path} is in use by another benchmark: wait for it, or choose another --output."
        )
