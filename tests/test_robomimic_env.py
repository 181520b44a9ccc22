"""robomimic's tasks as Gymnasium environments: the datasets' observations, success, states, seeds and errors."""

import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import gymnasium as gym
import h5py
import numpy as np
import pytest
from episodes import in_one_sentence
from gymnasium.utils.env_checker import check_env as check_env_gymnasium
from stable_baselines3.common.env_checker import check_env
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv
from test_examples import run_example

from modip_sb3 import OfflineDataset
from modip_sb3.benchmark import fidelity
from modip_sb3.envs import ROBOMIMIC_TASKS
from modip_sb3.envs.robomimic import INSTALL, RobomimicEnv, benchmark_env_args, read_env_args

LIFT = "modip/lift-scripted-v1"
needs_robosuite = pytest.mark.skipif(find_spec("robosuite") is None, reason=f"robosuite is not there: {INSTALL}")
HEIGHT_OF_CUBE = 1 + 9 + 2  # in Lift's simulator state: time, 9 joints of arm and fingers, x, y, z


@pytest.fixture(scope="module")
def env() -> Iterator[gym.Env]:
    env = gym.make(LIFT)
    yield env
    env.close()


@pytest.fixture(scope="module")
def demos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two successful episodes of the scripted demonstrator on Lift."""
    folder = tmp_path_factory.mktemp("demos")
    printed = run_example("make_robomimic_demos.py", folder, "--episodes", "2", "--output", "lift.hdf5")
    assert "2 of 2 episodes succeeded (100.0%)" in printed
    return folder / "lift.hdf5"


def roll(env: gym.Env, seed: int | None, steps: int = 5, **options: Any) -> np.ndarray:
    observations = [env.reset(seed=seed, options=options)[0]]
    actions = np.random.default_rng(0).uniform(-1, 1, (steps, *env.action_space.shape)).astype(np.float32)
    return np.array(observations + [env.step(action)[0] for action in actions])


@needs_robosuite
def test_checkers_find_nothing(env: gym.Env) -> None:
    check_env(env.unwrapped)
    check_env_gymnasium(env.unwrapped, skip_render_check=True)
    assert (env.action_space.low == -1).all() and (env.action_space.high == 1).all()


@needs_robosuite
def test_same_seed_same_episode(env: gym.Env) -> None:
    before = np.random.get_state()[1]
    first, second = roll(env, seed=3), roll(env, seed=None)
    np.testing.assert_array_equal(roll(env, seed=3), first)
    np.testing.assert_array_equal(roll(env, seed=None), second)
    assert (first[0] != second[0]).any() and (roll(env, seed=4)[0] != first[0]).any()
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # robosuite draws from numpy's global generator


@needs_robosuite
@pytest.mark.parametrize("task", ROBOMIMIC_TASKS)
def test_same_observations_as_robomimic(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mujoco_py", ModuleType("mujoco_py"))  # imported there for an exception's name
    reason = "needs pip install --no-deps robomimic==0.3.0"
    EnvRobosuite = pytest.importorskip("robomimic.envs.env_robosuite", reason=reason).EnvRobosuite
    from robomimic.utils.obs_utils import initialize_obs_utils_with_obs_specs

    env_args = ROBOMIMIC_TASKS[task][0]
    ours = RobomimicEnv(env_args)
    initialize_obs_utils_with_obs_specs({"obs": {"low_dim": ours.obs_keys}})
    roll(ours, seed=0, steps=3)
    theirs = EnvRobosuite(env_args["env_name"], **env_args["env_kwargs"])
    found = theirs.reset_to({"model": ours.model_xml, "states": ours.simulator_state})
    expected = np.concatenate([found[key] for key in ours.obs_keys])
    np.testing.assert_allclose(ours.observe(), expected, atol=1e-6)
    assert len(ours.obs_keys) == (7 if task == "transport" else 4)
    assert theirs.is_success() == {"task": False}


@needs_robosuite
def test_stored_states_give_stored_observations(demos: Path) -> None:
    dataset = OfflineDataset.load(demos)
    env = RobomimicEnv(demos)
    with h5py.File(demos) as file:
        states = np.concatenate([file[f"data/demo_{i}/states"] for i in range(2)])
        models = [file[f"data/demo_{i}"].attrs["model_file"] for i in range(2)]
    env.reset(seed=0)
    for i in range(0, dataset.num_transitions, 7):
        env.simulator_state = states[i]
        np.testing.assert_allclose(env.observe(), dataset.observations[i], atol=1e-6)
    sizes = []
    for model in models:  # robosuite draws the cube's size, which is in the model alone
        env.reset(seed=0, options={"model": model})
        sizes.append(env.robosuite_env.sim.model.geom_size.sum())
    assert sizes[0] != sizes[1]


@needs_robosuite
def test_fidelity(demos: Path, tmp_path: Path) -> None:
    assert fidelity.main([str(demos), "--every", "10"]) == 0
    shutil.copy(demos, changed := tmp_path / "changed.hdf5")
    with h5py.File(changed, "r+") as file:
        file["data/demo_1/obs/object"][10, 2] += 1e-4  # metres
    assert fidelity.main([str(changed), "--every", "10"]) == 1
    assert fidelity.main([str(changed), "--every", "10", "--tolerance", "1e-3"]) == 0


@needs_robosuite
def test_a_demonstration_succeeds_again_from_its_first_state(demos: Path) -> None:
    dataset, env = OfflineDataset.load(demos), gym.make(LIFT)
    with h5py.File(demos) as file:
        options = {"state": file["data/demo_1/states"][0], "model": file["data/demo_1"].attrs["model_file"]}
    first = dataset.episode_lengths[0]
    found = [env.reset(seed=5, options=options)[0]]
    for action in dataset.actions[first:]:
        obs, reward, terminated, _, info = env.step(action)
        found.append(obs)
    np.testing.assert_allclose(found[:-1], dataset.observations[first:], atol=1e-3)
    assert reward == 1 and terminated and info == {"is_success": True}


@needs_robosuite
@pytest.mark.parametrize("terminate", [True, False])
def test_success(terminate: bool) -> None:
    env = RobomimicEnv(benchmark_env_args("Lift"), terminate_on_success=terminate)
    env.reset(seed=0)
    state, still = env.simulator_state, np.zeros(7)
    assert env.step(still)[1:] == (0.0, False, False, {"is_success": False})
    state[HEIGHT_OF_CUBE] += 0.1  # it falls 1 cm in the first step
    env.reset(options={"state": state})
    assert env.step(still)[1:] == (1.0, terminate, False, {"is_success": True})


@needs_robosuite
def test_observations_by_key() -> None:
    env = RobomimicEnv(benchmark_env_args("Lift"), obs_keys=["object", "robot0_joint_pos"])
    obs, _ = env.reset(seed=0)
    parts = env.split(np.stack([obs, obs]))
    assert {key: part.shape for key, part in parts.items()} == {"object": (2, 10), "robot0_joint_pos": (2, 7)}
    np.testing.assert_allclose(parts["robot0_joint_pos"][0], env.simulator_state[1:8], atol=1e-6)
    np.testing.assert_allclose(parts["object"][0, :3], env.simulator_state[10:13], atol=1e-6)


@needs_robosuite
def test_images_show_the_robot() -> None:
    env = gym.make(LIFT, render_mode="rgb_array", image_size=(64, 96))
    env.reset(seed=0)
    first = env.render()
    for _ in range(5):
        env.step(np.array([1, 0, 0, 0, 0, 0, 0], np.float32))
    second = env.render()
    env.close()
    assert first.shape == (64, 96, 3) and first.dtype == np.uint8 and first.std() > 20
    assert (first != second).any()


@needs_robosuite
@pytest.mark.parametrize("vec_env_class", [DummyVecEnv, SubprocVecEnv])
def test_several_environments(vec_env_class: type, env: gym.Env) -> None:
    # "module:id" tells the processes to import what registers the id
    vec_env = make_vec_env(
        f"modip_sb3:{LIFT}", 2, seed=3, vec_env_cls=vec_env_class, env_kwargs={"max_episode_steps": 2}
    )
    np.testing.assert_array_equal(vec_env.reset()[0], env.reset(seed=3)[0])
    for ended in (False, True):
        _, _, dones, infos = vec_env.step(np.zeros((2, 7)))
        assert dones.tolist() == [ended, ended]
    assert [(info["TimeLimit.truncated"], info["is_success"]) for info in infos] == [(True, False)] * 2
    vec_env.close()


def test_descriptions(tmp_path: Path) -> None:
    env_args = benchmark_env_args("Lift")
    (tmp_path / "lift.json").write_text(json.dumps(env_args))
    with h5py.File(tmp_path / "lift.hdf5", "w") as file:
        file.create_group("data").attrs["env_args"] = json.dumps(env_args)
    assert read_env_args(env_args) == read_env_args(tmp_path / "lift.json") == read_env_args(tmp_path / "lift.hdf5")
    with h5py.File(tmp_path / "none.hdf5", "w") as file:
        file.create_group("data")
    with pytest.raises(ValueError) as error:
        read_env_args(tmp_path / "none.hdf5")
    in_one_sentence(error, f"env_args in {tmp_path / 'none.hdf5'} lack ['env_kwargs', 'env_name'], found []")
    with pytest.raises(ValueError) as error:
        read_env_args(env_args | {"type": 2})
    in_one_sentence(error, "env_args have type 2, expected 1")
    with pytest.raises(FileNotFoundError):
        read_env_args(tmp_path / "other.json")


@needs_robosuite
def test_data_without_states(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with h5py.File(tmp_path / "lift.hdf5", "w") as file:
        file.create_group("data").attrs["env_args"] = json.dumps(benchmark_env_args("Lift"))
        file.create_group("data/demo_0/obs")
    assert fidelity.main([str(tmp_path / "lift.hdf5")]) == 2
    assert "demo_0 holds ['obs'], expected states and obs; extract them first." in capsys.readouterr().err


@needs_robosuite
def test_wrong_arguments(env: gym.Env) -> None:
    for arguments, message in (
        ({"obs_keys": ["objekt"]}, r"obs_keys=\['objekt'\] names \['objekt'\], expected some of"),
        ({"render_mode": "human"}, "render_mode='human' is unknown"),
    ):
        with pytest.raises(ValueError, match=message):
            RobomimicEnv(benchmark_env_args("Lift"), **arguments)
    with pytest.raises(ValueError, match=r"shape \(3,\), expected \(32,\) for Lift"):
        env.reset(options={"state": np.zeros(3)})
    with pytest.raises(ValueError, match=r"options \['states'\] of reset are unknown"):
        env.reset(options={"states": np.zeros(32)})


def test_without_robosuite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "robosuite", None)
    with pytest.raises(ImportError) as error:
        gym.make(LIFT)
    in_one_sentence(error, "robosuite cannot be imported", INSTALL)


def test_importing_the_package_does_not_import_robosuite() -> None:
    code = "import sys, modip_sb3.evaluation; assert not {'robosuite', 'robomimic'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


@needs_robosuite
def test_demonstrations(demos: Path) -> None:
    dataset = OfflineDataset.load(demos)
    assert dataset.env_id == "Lift" and dataset.num_episodes == 2
    assert dataset.terminations[dataset.episode_ends].all() and dataset.episode_returns.tolist() == [1, 1]
    space = gym.spaces.Box(-np.inf, np.inf, (19,), np.float32)
    dataset.check(space, gym.spaces.Box(-1, 1, (7,)), min_length=4)
    run_example("make_robomimic_demos.py", demos.parent, "--episodes", "1", "--output", "again.hdf5")
    again = OfflineDataset.load(demos.parent / "again.hdf5")
    np.testing.assert_array_equal(again.actions, dataset.actions[: again.num_transitions])


@needs_robosuite
def test_finetune_robomimic(demos: Path) -> None:
    budget = "--pretrain 3 --clone 3 --timesteps 110 --episodes 1 --seed 1".split()
    printed = run_example("finetune_robots.py", demos.parent, "--task", "lift", "--dataset", demos.name, *budget)
    assert "modip/lift-scripted-v1, seed 1" in printed
    folder = demos.parent / "runs" / "lift"
    assert {path.name for path in folder.iterdir()} == {"bc.zip", "modip.zip", "tensorboard", "finetune-1.csv"}
    with open(folder / "finetune-1.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["stage"] for row in rows] == ["BC", "MODIP, policy alone", "MODIP, policy + planner"]
    for row in rows:
        assert float(row["return"]) == float(row["score"]) == float(row["success"]) in (0, 1)
