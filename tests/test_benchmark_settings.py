"""``benchmark run``: what a command asks for, before anything runs."""

import re
from pathlib import Path

import gymnasium as gym
import pytest
from bench import ENV_ID, NAME, command, planned, run
from walk import record_walk

from modip_sb3 import OfflineDataset
from modip_sb3.baselines import DiffusionBC
from modip_sb3.benchmark import settings as benchmark_settings
from modip_sb3.benchmark.records import check_comparable
from modip_sb3.benchmark.runs import differences
from modip_sb3.benchmark.settings import SUITES, make_settings, parse_overrides, share_threads
from modip_sb3.benchmark.worker import make_model
from modip_sb3.datasets import save_d4rl

PROTOCOL = {"freq": 20, "episodes": 2, "seed": 1000, "actions": "default"}


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
