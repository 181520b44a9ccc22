"""``benchmark run``: settings, recording, resuming, failing; in this process, where that is the same code."""

import json
import random
import re
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from bench import ENV_ID, NAME, PARAMS, command, run
from stable_baselines3 import SAC
from stable_baselines3.common.utils import set_random_seed
from walk import Walk, record_walk

from modip_sb3 import MODIP, OfflineDataset
from modip_sb3.baselines import DiffusionBC
from modip_sb3.benchmark import settings as benchmark_settings
from modip_sb3.benchmark.__main__ import make_parser
from modip_sb3.benchmark.plan import plan
from modip_sb3.benchmark.records import check_comparable
from modip_sb3.benchmark.runs import RunFolder, differences, locked, read_rows
from modip_sb3.benchmark.settings import SUITES, make_settings, parse_overrides, share_threads
from modip_sb3.benchmark.worker import execute, make_model, restore_model
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


def planned(arguments: list[str]) -> list[RunFolder]:
    args = make_parser().parse_args(arguments)
    args.output.mkdir(parents=True, exist_ok=True)
    return plan(args)


def steps_of(run_folder: RunFolder, inference: str = "policy") -> list[tuple[int, int]]:
    rows = read_rows(run_folder.path / "evaluations.csv")
    return [(int(row["env_steps"]), int(row["episode"])) for row in rows if row["inference"] == inference]


SCHEDULE = [(steps, episode) for steps in (0, 20, 40) for episode in (0, 1)]

# ---------------------------------------------------------------------- settings


def test_suites_name_registered_environments() -> None:
    assert all(env_id in gym.registry for env_ids in SUITES.values() for env_id in env_ids)


def test_settings_are_ours_then_those_of_rl_zoo3_then_defaults() -> None:
    found = {
        (algo, env_id): benchmark_settings.find_hyperparameters(algo, env_id)
        for algo, env_id in (("modip", ENV_ID), ("td3", ENV_ID), ("td3", "Hopper-v5"))
    }
    assert [source for _, source in found.values()] == [
        "zoo_configs/modip.yml: Pendulum-v1",
        "hyperparams/td3.yml: Pendulum-v1",
        "the algorithm's defaults",
    ]
    assert found["td3", ENV_ID][0]["learning_rate"] == 1e-3
    made = make_settings("Hopper-v5", "td3", 0, 100, PROTOCOL, None, {})
    assert made["hyperparameters"] == {"policy": "MlpPolicy", "buffer_size": 1100} and made["defaults"]["tau"] == 0.005


def test_evaluations_sample_from_diffusion_policies_alone() -> None:
    for actions, expected in {
        "default": (False, True),
        "sampled": (False, False),
        "deterministic": (True, True),
    }.items():
        found = [
            make_settings(ENV_ID, algo, 0, 100, PROTOCOL | {"actions": actions}, None, {}) for algo in ("modip", "sac")
        ]
        assert tuple(settings["deterministic"] for settings in found) == expected


def test_the_same_data_for_whoever_takes_it(tmp_path: Path) -> None:
    dataset = OfflineDataset.from_arrays(**record_walk())
    save_d4rl(dataset, tmp_path / "walk.hdf5")
    path = str(tmp_path / "walk.hdf5")
    modip, sac = (make_settings(ENV_ID, algo, 0, 100, PROTOCOL, path, {}) for algo in ("modip", "sac"))
    assert modip["hyperparameters"]["offline_dataset"] == path == modip["dataset"]["source"]
    assert modip["dataset"]["transitions"] == 60 and len(modip["dataset"]["sha256"]) == 64
    assert sac["dataset"] is None and "offline_dataset" not in sac["hyperparameters"]
    arrays = record_walk()
    arrays["rewards"][7] += 1e-3
    save_d4rl(OfflineDataset.from_arrays(**arrays), tmp_path / "other.hdf5")
    other = benchmark_settings.fingerprint(str(tmp_path / "other.hdf5"))
    assert other["sha256"] != modip["dataset"]["sha256"]
    assert (
        benchmark_settings.default_dataset("modip/hopper-sac-medium-v5") == "examples/data/modip/hopper/sac-medium-v0"
    )
    assert benchmark_settings.default_dataset(ENV_ID) is None


def test_replay_no_larger_than_the_budget_can_fill() -> None:
    made = make_settings(ENV_ID, "sac", 0, 500, PROTOCOL, None, {})
    assert made["hyperparameters"]["buffer_size"] == 1500
    assert (
        make_settings(ENV_ID, "sac", 0, 500, PROTOCOL, None, {"buffer_size": 90})["hyperparameters"]["buffer_size"]
        == 90
    )


def test_overrides() -> None:
    texts = [
        "sac.tau:1e-2",
        "modip.policy_kwargs:{denoiser: mlp}",
        "sac.train_freq:(2, 'step')",
        "sac.ent_coef:auto_0.1",
    ]
    assert parse_overrides(texts) == {
        "sac": {"tau": 0.01, "train_freq": (2, "step"), "ent_coef": "auto_0.1"},
        "modip": {"policy_kwargs": {"denoiser": "mlp"}},
    }


def test_variants_are_the_algorithm_with_settings_of_their_own(tmp_path: Path) -> None:
    more = ("modip@slow.train_freq:8", "modip@slow.batch_size:4")
    runs = planned([*command(tmp_path, "modip", more=more), "--algos", "modip", "modip@slow"])
    assert [run_folder.path.parent.name for run_folder in runs] == ["modip", "modip@slow"]
    plain, slow = (run_folder.read_settings() for run_folder in runs)
    assert (plain["hyperparameters"]["batch_size"], slow["hyperparameters"]["batch_size"]) == (8, 4)
    assert slow["hyperparameters"] == plain["hyperparameters"] | {"train_freq": 8, "batch_size": 4}
    assert slow["hyperparameters_from"] == plain["hyperparameters_from"]
    assert slow["deterministic"] is plain["deterministic"] is False


def test_threads_are_a_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_settings, "count_cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [share_threads(workers) for workers in (1, 3, 8, 20)] == [8, 2, 1, 1]
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert [share_threads(workers) for workers in (1, 3, 8)] == [2, 2, 1]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--algos", "nodip", "--envs", ENV_ID], "Algorithm 'nodip' is unknown; choose from "),
        (["--algos", "nodip@x", "--envs", ENV_ID], "Algorithm 'nodip' is unknown; choose from "),
        (["--algos", "modip@", "--envs", ENV_ID], "'modip@' is no variant of an algorithm: expected algo@label, "),
        (
            ["--algos", "modip@a/b", "--envs", ENV_ID],
            "'modip@a/b' is no variant of an algorithm: expected algo@label, ",
        ),
        (["--algos", "sac", "--envs", "Pendulum-v9"], "Environment 'Pendulum-v9' is not registered in Gymnasium"),
        (["--algos", "sac", "--envs", ENV_ID, "--workers", "0"], "--workers is 0: it must be at least 1."),
        (["--algos", "sac", "--envs", ENV_ID, "-P", "tau:1"], "-P tau:1: expected algo.param:value, such as "),
        (["--algos", "sac", "--envs", ENV_ID, "-P", "modip.tau:1"], r"-P names \['modip'\], but --algos are \['sac'\]"),
        (
            ["--algos", "sac", "--envs", ENV_ID, "-P", "modip.tau:1", "-P", "sac.tau:1"],
            r"-P names \['modip'\], but --algos are \['sac'\]",
        ),
        (
            ["--algos", "sac", "--envs", ENV_ID, "-P", "sac.frame_stack:4"],
            "has frame_stack=4: the benchmark takes none",
        ),
        (["--algos", "modip", "--envs", ENV_ID, "-P", "modip.offline_dataset:x"], "give it with --offline-dataset"),
        (["--algos", "modip", "--envs", ENV_ID, "--offline-dataset", "no.hdf5"], "no.hdf5: no such file"),
    ],
)
def test_faults_are_found_before_anything_runs(tmp_path: Path, arguments: list[str], sentence: str) -> None:
    found = run("run", *arguments, "--timesteps", "10", "--output", str(tmp_path / "runs"))
    assert isinstance(found, str)
    assert re.search(sentence, found), found
    assert not list((tmp_path / "runs").glob("*/*"))


def test_changed_settings_are_named(tmp_path: Path) -> None:
    planned(command(tmp_path, "sac", "modip"))
    before = {path: path.read_text() for path in tmp_path.rglob("config.json")}
    assert len(before) == 2
    assert len(planned(command(tmp_path, "sac", "modip", seeds=(0, 1)))) == 4  # more runs are no change
    assert run(*command(tmp_path, "sac", "modip", timesteps=60, more=("modip.gamma:0.9",))) == "\n".join(
        [
            f"{tmp_path} has runs with other settings; choose another --output:",
            f"  {NAME}/sac/seed-0: timesteps was 40 and is now 60",
            f"  {NAME}/sac/seed-0: hyperparameters.buffer_size was 1040 and is now 1060",
            f"  {NAME}/modip/seed-0: timesteps was 40 and is now 60",
            f"  {NAME}/modip/seed-0: hyperparameters.gamma was 0.99 and is now 0.9",
            f"  {NAME}/modip/seed-0: hyperparameters.buffer_size was 1040 and is now 1060",
        ]
    )
    assert {path: path.read_text() for path in before} == before


def test_a_shared_diffusion_policy(tmp_path: Path) -> None:
    data = Path(__file__).parents[1] / "examples" / "data" / "modip" / "hopper" / "sac-medium-v0"
    names = ["--envs", "modip/hopper-sac-medium-v5", "--timesteps", "20", "--eval-episodes", "1", "--device", "cpu"]
    names += ["--offline-dataset", str(data)]
    clone = ["run", *names, "--algos", "diffusion_bc", "--seeds", "0", "--output", str(tmp_path / "cloned")]
    assert not run(*clone, "-P", "diffusion_bc.pretrain_steps:2", "diffusion_bc.policy_kwargs:{denoiser: mlp}")
    start = ["run", *names, "--algos", "modip", "sac", "--output", str(tmp_path / "runs")]
    start += ["--start-from", str(tmp_path / "cloned"), "-P", "modip.pretrain_steps:0", "--seeds"]
    sentence = r"cloned has no modip-hopper-sac-medium-v5/diffusion_bc/seed-1/model.zip: run diffusion_bc there first"
    assert re.search(sentence, str(run(*start, "1")))
    modip, sac = planned([*start, "0"])
    assert "start_from" not in sac.read_settings()
    assert modip.read_settings()["start_from"]["runs"] == str(tmp_path / "cloned")
    model, *_ = make_model(modip.read_settings(), tmp_path)
    cloned = DiffusionBC.load(modip.read_settings()["start_from"]["model"])
    weights = cloned.policy.actor_ema.state_dict()
    assert all(tensor.equal(weights[name]) for name, tensor in model.policy.actor_ema.state_dict().items())
    alike = {"modip/seed-0": modip.read_settings(), "modip/seed-1": modip.read_settings()}
    check_comparable(alike)
    del alike["modip/seed-1"]["start_from"]
    with pytest.raises(ValueError, match=r"start_from differs for modip/hopper-sac-medium-v5/modip: .*cloned.*None"):
        check_comparable(alike)


def test_differences_name_what_is_new() -> None:
    assert differences({"a": {"b": 1}}, {"a": {"b": 1, "c": None}}) == ["a.c was absent and is now None"]


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
