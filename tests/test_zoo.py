"""rl_zoo3's scripts with MODIP: real runs on a walk of four steps, and every entry of the settings."""

import contextlib
import csv
import importlib
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import h5py
import matplotlib
import numpy as np
import pytest
import rl_zoo3
import yaml
from rl_zoo3.exp_manager import ExperimentManager
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from walk import Walk, record_walk

from modip_sb3 import MODIP, zoo
from modip_sb3.baselines import DPPO, RLPD, DiffusionBC
from modip_sb3.datasets import has_reference_score

ROOT = Path(__file__).parent.parent
CONFIGS = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / "zoo_configs").glob("*.yml")}
CONFIG = CONFIGS["modip"]
ENV_ID, NAME = "modip-test/walk-v0", "modip-test-walk-v0"
RUN = ["train", "--algo", "modip", "--env", ENV_ID, "--seed", "0", "--verbose", "0"]
SMALL = [
    "batch_size:8",
    "learning_starts:10",
    "pretrain_steps:7",
    "buffer_size:1000",
    "policy_kwargs:dict(denoiser='mlp', net_arch=dict(pi=[16], qf=[16]), latent_dim=16, num_inference_steps=2)",
]
TINY = "policy_kwargs:dict(denoiser='mlp', net_arch=[16])"
DATA = "offline_dataset:'data/walk.hdf5'"  # relative to the working directory
SETTINGS = ["--hyperparams", *SMALL, DATA, "n_envs:2", "normalize:True"]
BUDGET = [*SETTINGS, "-n", "80", "--eval-freq", "20", "--eval-episodes", "2"]


class FilmedWalk(Walk):
    """Episodes that terminate after 2 to 6 steps, and that a video can be made of."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}

    def __init__(self, render_mode: str | None = None) -> None:
        super().__init__(terminates=True)
        self.render_mode = render_mode

    def render(self) -> np.ndarray:  # type: ignore[override]
        return np.full((32, 32, 3), 20 * self.steps_left, np.uint8)


gym.register(ENV_ID, FilmedWalk, max_episode_steps=4)


def run(*arguments: str) -> None:
    zoo.main(arguments)


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working directory for all tests here, with a dataset."""
    path = tmp_path_factory.mktemp("zoo")
    (path / "data").mkdir()
    names = {"terminations": "terminals", "truncations": "timeouts"}
    with h5py.File(path / "data" / "walk.hdf5", "w") as file:
        for name, values in record_walk(terminates=True).items():
            file[names.get(name, name)] = values
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(path):
        patch.setattr(sys, "argv", sys.argv)  # which rl_zoo3's scripts read
        matplotlib.use("Agg")
        yield path


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    """The folder of a run with everything that rl_zoo3 offers besides."""
    run(*RUN, *BUDGET, "--save-freq", "40", "--save-replay-buffer", "--progress", "--tensorboard-log", "tb")
    return folder / "logs" / "modip" / f"{NAME}_1"


# ------------------------------------------------------------------ settings


def test_every_id_has_settings_and_data_of_its_own() -> None:
    ids = {env_id for env_id in gym.registry if env_id.startswith("modip/")}
    assert {env_id for env_id in CONFIG if env_id.startswith("modip/")} == ids
    mujoco = {env_id for env_id in ids if env_id.endswith("-v5")}
    assert len(mujoco) == 10
    for env_id in mujoco:
        task, data = env_id.removeprefix("modip/").removesuffix("-v5").split("-", 1)
        shipped = f"examples/data/modip/{task}/{data}-v0"
        expected = shipped if (ROOT / shipped).is_dir() else f"mujoco/{task}/{data}-v0"
        assert CONFIG[env_id]["offline_dataset"] == expected
        assert has_reference_score(env_id)
        spec, base = gym.spec(env_id), gym.spec(f"{ {'halfcheetah': 'HalfCheetah'}.get(task, task.capitalize()) }-v5")
        assert (spec.entry_point, spec.max_episode_steps) == (base.entry_point, base.max_episode_steps)


@pytest.mark.parametrize("env_id", CONFIG)
def test_every_entry_makes_a_model(env_id: str) -> None:
    settings = dict(CONFIG[env_id])
    assert settings.pop("n_timesteps") > 0
    try:
        env = gym.make("Pendulum-v1" if env_id == "default" else env_id)
    except ImportError as error:  # which names the extra to install
        pytest.skip(str(error))
    model = MODIP(env=env, **settings)
    assert model.offline_dataset == settings.get("offline_dataset")


@pytest.mark.parametrize("algo", sorted(CONFIGS.keys() - {"modip"}))
def test_every_entry_of_other_algorithms_makes_a_model(algo: str) -> None:
    zoo.register()
    made = []
    for env_id, settings in CONFIGS[algo].items():
        assert env_id in gym.registry or env_id == "default"
        own = ("n_timesteps", "n_envs", "offline_dataset")
        rest = {name: value for name, value in settings.items() if name not in own}
        assert settings["n_timesteps"] > 0
        if rest not in made:  # the data is not loaded, and entries differ in little else
            rl_zoo3.ALGOS[algo](env="Pendulum-v1", **ExperimentManager._preprocess_schedules(dict(rest)))
            made.append(rest)


@pytest.mark.parametrize("algo", ["diffusion_bc", "dppo", "dql", "dsrl", "idql", "pa_rl", "rlpd", "tdmpc2"])
def test_baselines_have_the_data_of_modip(algo: str) -> None:
    for env_id, settings in CONFIG.items():
        found = CONFIGS[algo].get(env_id, CONFIGS[algo]["default"])
        assert found.get("offline_dataset") == settings.get("offline_dataset")


@pytest.mark.parametrize("algo", ["dppo", "dql", "dsrl", "idql", "modip", "pa_rl"])
def test_all_clone_as_diffusion_bc_does(algo: str) -> None:
    for env_id, settings in CONFIGS["diffusion_bc"].items():
        expected, found = (
            [entry["policy_kwargs"].get(name) for name in ("denoiser", "action_horizon", "condition_noise")]
            for entry in (settings, CONFIGS[algo].get(env_id, CONFIGS[algo]["default"]))
        )
        assert found == expected, env_id


def test_the_robots_example_has_these_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples")
    example = importlib.import_module("finetune_robots")
    for task, expected in example.SETTINGS.items():
        entries = [settings for env_id, settings in CONFIG.items() if env_id.startswith(f"modip/{task}-")]
        assert len(entries) >= 2
        for entry in entries:
            assert {name: entry[name] for name in expected} == expected


def test_settings_of_rl_zoo3_stand_for_ids_that_ours_leave_out() -> None:
    ours = str(ROOT / "zoo_configs" / "sac.yml")
    for env_id, added in {"Hopper-v5": ["--conf-file", ours], "BipedalWalker-v3": []}.items():
        arguments = ["--algo", "sac", "--env", env_id]
        assert zoo.with_config(arguments) == arguments + added


def test_settings_are_found_beside_and_in_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert zoo.find_config("modip") == ROOT / "zoo_configs" / "modip.yml"
    assert zoo.find_config("ppo") is None
    installed = tmp_path / "modip_sb3" / "zoo_configs" / "modip.yml"
    installed.parent.mkdir(parents=True)
    installed.touch()
    monkeypatch.setattr(zoo, "__file__", str(tmp_path / "modip_sb3" / "zoo.py"))
    assert zoo.find_config("modip") == installed


def test_settings_of_the_user_come_first(tmp_path: Path) -> None:
    (tmp_path / "mine.yml").write_text("Pendulum-v1: {policy: MlpPolicy, n_timesteps: 10}")
    with pytest.raises(ValueError, match=f"Hyperparameters not found for modip-{ENV_ID} in .*mine.yml"):
        run(*RUN, "-conf", str(tmp_path / "mine.yml"))


# ------------------------------------------------------------------ training


def test_train(trained: Path) -> None:
    files = {str(path.relative_to(trained)) for path in trained.rglob("*") if path.is_file()}
    models = {"rl_model_40_steps.zip", "rl_model_80_steps.zip", "best_model.zip", f"{NAME}.zip"}
    settings = {f"{NAME}/{name}" for name in ("args.yml", "command.txt", "config.yml", "vecnormalize.pkl")}
    logs = {"0.monitor.csv", "1.monitor.csv", "evaluations.npz"}
    assert files == models | settings | logs | {"replay_buffer.pkl"}
    evaluations = np.load(trained / "evaluations.npz")
    assert evaluations["timesteps"].tolist() == [20, 40, 60, 80]
    assert evaluations["results"].shape == (4, 2) and (evaluations["ep_lengths"] <= 4).all()
    model = MODIP.load(trained / f"{NAME}.zip")
    assert (model._n_pretrain_updates, model.num_timesteps, model.batch_size) == (7, 80, 8)
    assert model._n_updates > 0 and model.offline_dataset == "data/walk.hdf5"
    events = [EventAccumulator(str(run)).Reload() for run in trained.parents[2].glob("tb/*/*")]
    tags = {tag for event in events for tag in event.Tags()["scalars"]}
    assert {"pretrain/actor_loss", "train/actor_loss", "eval/mean_reward"} <= tags


@pytest.mark.parametrize(
    ("algo", "cls", "small"),
    [
        ("rlpd", RLPD, ["learning_starts:10", "policy_kwargs:dict(net_arch=[16])"]),
        ("diffusion_bc", DiffusionBC, ["pretrain_steps:7", TINY]),
        ("dppo", DPPO, ["pretrain_steps:7", TINY, "train_freq:10", "n_envs:1"]),
    ],
)
def test_train_and_enjoy_baselines(
    algo: str, cls: type[RLPD | DiffusionBC | DPPO], small: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    which = ["--algo", algo, "--env", ENV_ID]
    settings = ["--hyperparams", "batch_size:8", *small, DATA, "normalize:True"]
    run("train", *which, "--seed", "0", "--verbose", "0", *settings, "-n", "40", "--eval-freq", "20")
    model = cls.load(f"logs/{algo}/{NAME}_1/{NAME}.zip")
    assert (model.num_timesteps, model.batch_size, model.offline_dataset) == (40, 8, "data/walk.hdf5")
    run("enjoy", *which, "-f", "logs", "--exp-id", "1", "-n", "30", "--no-render", "--load-best")
    assert "Mean reward: " in capsys.readouterr().out


def test_time_limits_are_no_terminations(trained: Path) -> None:
    zoo.register()  # by now rl_zoo3 has put its own TimeLimit in Gymnasium's place
    env, seen = gym.make(ENV_ID), set()
    assert type(env).__module__ == "rl_zoo3.gym_patches"
    for seed in range(30):
        env.reset(seed=seed)
        length, steps, end = env.unwrapped.steps_left, 0, (False, False)  # type: ignore[attr-defined]
        while end == (False, False):
            end = env.step(env.action_space.sample())[2:4]
            steps += 1
        assert (steps, *end) == ((length, True, False) if length <= 4 else (4, False, True))
        seen.add(length)
    assert seen == {2, 3, 4, 5, 6}
    with open(trained / "replay_buffer.pkl", "rb") as file:
        buffer = pickle.load(file)
    episodes = [np.split(np.arange(40), np.flatnonzero(buffer.dones[:40, env]) + 1)[:-1] for env in range(2)]
    lengths = {(len(rows), bool(buffer.timeouts[rows[-1], env])) for env in range(2) for rows in episodes[env]}
    assert {(4, True)} < lengths <= {(2, False), (3, False), (4, False), (4, True)}


def test_enjoy(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    which_run = ["--algo", "modip", "--env", ENV_ID, "-f", "logs", "--exp-id", "1"]
    for which_model in ([], ["--load-best"], ["--load-checkpoint", "40"]):
        run("enjoy", *which_run, *which_model, "-n", "30", "--no-render")
        printed = capsys.readouterr().out
        assert "Loading running average" in printed and "Mean reward: " in printed


def test_continue_training(trained: Path) -> None:
    before = MODIP.load(trained / f"{NAME}.zip")
    agent = ["-i", str(trained / f"{NAME}.zip"), "--eval-freq", "-1", "-n", "40", "-f", "continued"]
    run(*RUN, *SETTINGS, *agent)
    after = MODIP.load(trained.parents[2] / "continued" / "modip" / f"{NAME}_1" / f"{NAME}.zip")
    assert after._n_pretrain_updates == 7  # the offline phase is not repeated
    assert after._n_updates > before._n_updates and after.num_timesteps == 40


def test_record_video(trained: Path) -> None:
    run("record_video", "--algo", "modip", "--env", ENV_ID, "-f", "logs", "-n", "10", "--exp-id", "1")
    (video,) = (trained / "videos").glob("*.mp4")
    assert video.stat().st_size > 500


def test_plots(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from matplotlib import pyplot as plt

    run(*RUN, *BUDGET)  # box plots want two runs
    plt.close("all")
    run("plot_train", "-a", "modip", "-e", ENV_ID, "-f", "logs", "-w", "3")
    curves = {str(line.get_label()): np.asarray(line.get_ydata()) for line in plt.gca().get_lines()}
    assert curves.keys() == {f"{NAME}_1", f"{NAME}_2"} and all(len(curve) > 10 for curve in curves.values())
    run("all_plots", "-a", "modip", "-e", ENV_ID, "-f", "logs", "-o", "plots", "--no-million")
    assert f"|{NAME}|" in capsys.readouterr().out
    run("plot_from_file", "-i", "plots.pkl", "-o", "plots.png", "--format", "png", "-b")
    assert (trained.parents[2] / "plots.png").stat().st_size > 5000
    plt.close("all")


# ---------------------------------------------------------------- optimising


def test_optimize(folder: Path) -> None:
    budget = ["-n", "16", "--eval-episodes", "1", "--hyperparams", *SMALL[:-1], DATA]  # the search sets policy_kwargs
    study = ["--storage", "study.log", "--study-name", "walk", "-f", "optimized"]
    run(*RUN, *budget, *study, "--optimize", "--n-trials", "2", "--n-evaluations", "1", "--no-optim-plots")
    (report,) = (folder / "optimized" / "modip").glob("*.csv")
    with open(report, newline="") as file:
        trials = list(csv.DictReader(file))
    assert [trial["state"] for trial in trials] == ["COMPLETE", "COMPLETE"]
    run(*RUN, *budget, *study, "--trial-id", "1", "--eval-freq", "-1")
    model = MODIP.load(next((folder / "optimized").glob(f"modip/*/{NAME}.zip")))
    sampled = {name.removeprefix("params_"): float(value) for name, value in trials[1].items() if "params_" in name}
    assert model.expectile == sampled["expectile"] and model.gamma == 1 - sampled["one_minus_gamma"]
    assert model.policy.num_proposals == 2 ** sampled["num_proposals_pow"]
    assert model.planner_kwargs["max_std"] == sampled["min_std"] * sampled["std_ratio"]


# -------------------------------------------------------------------- faults


@pytest.mark.parametrize("script", [*zoo.FUNCTIONS, *zoo.MODULES])
def test_every_script_starts(script: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="^0$"):
        run(script, "--help")
    assert "usage: " in capsys.readouterr().out


def test_unknown_names(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, sentence in {
        ("paint",): "invalid choice: 'paint' (choose from 'train', 'enjoy'",
        ("train", "--algo", "nodip", "--env", ENV_ID): "invalid choice: 'nodip'",
    }.items():
        with pytest.raises(SystemExit):
            run(*arguments)
        assert sentence in capsys.readouterr().err
    with pytest.raises(ValueError, match="modip/hoper-medium-v5 not found .* maybe meant modip/hopper-medium-v5?"):
        run("train", "--algo", "modip", "--env", "modip/hoper-medium-v5")


def test_missing_data_is_named_despite_the_progress_bar() -> None:
    with pytest.raises(FileNotFoundError, match="nowhere.hdf5: no such file"):
        run(*RUN, "--hyperparams", "offline_dataset:'nowhere.hdf5'", "-f", "failed", "--progress")


def test_missing_rl_zoo3(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rl_zoo3", None)
    with pytest.raises(SystemExit, match=r'^rl_zoo3 cannot be imported .*: run pip install "modip-sb3\[zoo\]"\.$'):
        run("train", "--algo", "modip", "--env", "Pendulum-v1")


def test_command_line(folder: Path) -> None:
    arguments = ["train", "--algo", "modip", "--env", "Pendulum-v1", "-n", "4", "--vec-env", "subproc"]
    result = subprocess.run(
        [sys.executable, "-m", "modip_sb3.zoo", *arguments, "--eval-freq", "-1", "--hyperparams", *SMALL],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    saved: dict[str, Any] = yaml.unsafe_load((folder / "logs/modip/Pendulum-v1_1/Pendulum-v1/config.yml").read_text())
    assert saved["n_timesteps"] == 15000 and saved["batch_size"] == 8  # ours, and the command line's
    assert (folder / "logs/modip/Pendulum-v1_1/Pendulum-v1.zip").is_file()
