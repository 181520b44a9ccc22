"""The kitchen: environment, D4RL's data, scripted demonstrations and the examples."""

import csv
import subprocess
import sys
from ctypes.util import find_library
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env as check_gymnasium_env
from stable_baselines3.common.env_checker import check_env
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv
from test_examples import run_example

import modip_sb3.envs  # noqa: F401  (registers the ids)
from modip_sb3 import OfflineDataset
from modip_sb3.envs.kitchen import TASKS, KitchenEnv

SCRIPTED = "modip/kitchen-scripted-v1"
DONE = {"microwave": [-0.7], "kettle": [-0.23, 0.75, 1.62, 0.99, 0, 0, -0.06], "light_switch": [-0.65]}
DONE |= {"slide_cabinet": [0.35], "knob_Joint_2": [-0.85]}  # positions of the kitchen's joints

needs_kitchen = pytest.mark.skipif(
    find_spec("gymnasium_robotics") is None, reason='needs gymnasium-robotics: pip install "modip-sb3[kitchen]"'
)


def do(env: gym.Env, joint: str) -> dict[str, Any]:
    """Put one of the kitchen's joints where its subtask wants it, and stand still for a step."""
    kitchen: Any = env.unwrapped
    kitchen.kitchen.data.joint(joint).qpos[:] = DONE[joint]
    _, reward, terminated, truncated, info = env.step(np.zeros(9, np.float32))
    return {"reward": reward, "terminated": terminated, "truncated": truncated} | info


# --------------------------------------------------------------- environment


def test_ids_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import sys, modip_sb3.envs; sys.exit('gymnasium_robotics' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    for name in ["gymnasium_robotics", *(name for name in sys.modules if name.startswith("gymnasium_robotics."))]:
        monkeypatch.setitem(sys.modules, name, None)  # what Python makes of a package that is not installed
    with pytest.raises(ImportError, match=r'The kitchen needs .*: run pip install "modip-sb3\[kitchen\]"\.$'):
        gym.make(SCRIPTED)


def test_wrong_tasks() -> None:
    with pytest.raises(
        ValueError, match=r"tasks='all' is no set .* expected one of \['complete', 'mixed', 'partial'\]"
    ):
        KitchenEnv("all")


@needs_kitchen
@pytest.mark.filterwarnings("ignore:.*A Box observation space m(in|ax)imum value")
def test_checkers_find_no_fault() -> None:
    env = KitchenEnv()
    check_env(env)
    check_gymnasium_env(env, skip_render_check=True)
    env.close()


@needs_kitchen
def test_reward_and_success_count_subtasks() -> None:
    env = gym.make(SCRIPTED)
    _, info = env.reset(seed=0)
    nothing = {"completed_tasks": [], "completed": 0, "completed_fraction": 0.0, "is_success": False}
    assert info == nothing
    *_, info = env.step(np.zeros(9, np.float32))
    assert info == nothing
    for number, joint in enumerate(["slide_cabinet", "microwave", "kettle", "light_switch"], 1):
        found = do(env, joint)
        assert (found["reward"], found["completed"], found["completed_fraction"]) == (1, number, number / 4)
        assert found["is_success"] is found["terminated"] is (number == 4)
        assert not found["truncated"]
    assert found["completed_tasks"] == ["slide cabinet", "microwave", "kettle", "light switch"]
    assert env.reset()[1] == nothing
    env.close()


@needs_kitchen
@pytest.mark.parametrize("data", sorted(TASKS))
def test_ids_of_d4rl_reward_what_holds(data: str) -> None:
    env = gym.make(f"modip/kitchen-{data}-v1")
    env.reset(seed=0)
    assert [do(env, joint)["reward"] for joint in ("microwave", "light_switch")] == [1, 2]
    last = "knob_Joint_2" if data == "mixed" else "slide_cabinet"
    other = "slide_cabinet" if data == "mixed" else "knob_Joint_2"
    assert do(env, other)["completed"] == 2  # no subtask of this set
    assert do(env, last)["reward"] == 3
    found = do(env, "kettle")
    assert (found["reward"], found["is_success"], found["terminated"]) == (4, True, False)
    found = do(env, "kettle")
    assert (found["reward"], found["completed"]) == (4, 4)
    env.close()


@needs_kitchen
def test_same_seed_same_episode_of_280_steps() -> None:
    actions = np.random.default_rng(0).uniform(-1, 1, (280, 9)).astype(np.float32)

    def roll(env: gym.Env, num_steps: int) -> tuple[np.ndarray, bool]:
        rows, truncated = [env.reset(seed=7)[0]], False
        for action in actions[:num_steps]:
            obs, _, _, truncated, _ = env.step(action)
            rows.append(obs)
        return np.stack(rows), truncated

    env, another = gym.make(SCRIPTED), gym.make(SCRIPTED)
    rows, truncated = roll(env, 280)
    assert truncated and not roll(env, 20)[1]
    np.testing.assert_array_equal(roll(another, 20)[0], rows[:21])
    positions = rows[:, :9]
    assert np.isfinite(rows).all() and positions.std(axis=0).min() > 1e-3  # every joint moves
    assert np.any(env.reset(seed=8)[0] != rows[0])
    env.close()
    another.close()


@needs_kitchen
@pytest.mark.parametrize("vec_env_cls", [DummyVecEnv, SubprocVecEnv])
def test_vectorised(vec_env_cls: type[DummyVecEnv] | type[SubprocVecEnv]) -> None:
    env = make_vec_env(f"modip_sb3.envs:{SCRIPTED}", n_envs=2, seed=0, vec_env_cls=vec_env_cls)
    assert env.reset().shape == (2, 59)
    _, rewards, dones, infos = env.step(np.zeros((2, 9), np.float32))
    assert not rewards.any() and not dones.any() and [info["completed"] for info in infos] == [0, 0]
    env.close()


@needs_kitchen
@pytest.mark.skipif(find_library("EGL") is None, reason="needs libEGL to render without a display")
def test_render(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUJOCO_GL", "egl")
    env = gym.make(SCRIPTED, render_mode="rgb_array", width=64, height=48)
    env.reset(seed=0)
    before: Any = env.render()
    for _ in range(10):
        env.step(np.ones(9, np.float32))
    after: Any = env.render()
    assert before.shape == after.shape == (48, 64, 3) and before.std() > 10
    assert np.mean(before != after) > 0.01  # the arm moved
    env.close()


# ---------------------------------------------------------------------- data


@needs_kitchen
def test_demonstrations_and_fine_tuning(tmp_path: Path) -> None:
    printed = run_example("make_kitchen_demos.py", tmp_path, "--episodes", "2")
    again = run_example("make_kitchen_demos.py", tmp_path, "--episodes", "1", "--output", "again.hdf5")
    path = tmp_path / "runs" / "kitchen" / "demos.hdf5"
    demos, first = OfflineDataset.load(path), OfflineDataset.load(tmp_path / "again.hdf5")
    assert demos.env_id == SCRIPTED and demos.num_episodes == 2 and first.num_episodes == 1
    np.testing.assert_array_equal(demos.actions[: first.num_transitions], first.actions)
    assert demos.episode_returns.min() >= 2 and f"{demos.num_transitions:,} steps" in printed and "100.0%" in again

    budget = "--pretrain 5 --clone 5 --timesteps 102 --episodes 1 --output out".split()
    printed = run_example("finetune_robots.py", tmp_path, "--task", "kitchen", *budget)
    with open(tmp_path / "out" / "finetune-0.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["stage"] for row in rows] == ["BC", "MODIP, policy alone", "MODIP, policy + planner"]
    for row in rows:
        assert 0 <= float(row["score"]) == float(row["return"]) / 4 <= 1
        assert 0 <= float(row["success"]) <= float(row["score"])
    assert "subtasks of 4" in printed and (tmp_path / "out" / "modip.zip").is_file()
