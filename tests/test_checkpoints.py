"""Exact resume: a training that dies goes on from its last checkpoint as if nothing had been."""

import resource
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from algorithms import ALGORITHMS
from conftest import SMALL_PLANNER, SMALL_POLICY
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.noise import OrnsteinUhlenbeckActionNoise
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize
from walk import Walk, record_walk, vec_walk

from modip_sb3 import MODIP
from modip_sb3.baselines import DPPO, DSRL, PARL, RLPD, TDMPC2, DiffusionBC
from modip_sb3.benchmark.kills import contents
from modip_sb3.datasets import OfflineDataset, save_d4rl
from modip_sb3.resume import CheckpointCallback, find_checkpoint
from modip_sb3.storage import KEPT

SMALL = {"batch_size": 8, "learning_starts": 10, "buffer_size": 60, "seed": 0, "device": "cpu"}
SETTINGS: dict[type, dict[str, Any]] = {
    MODIP: SMALL
    | {"train_freq": 1, "policy_kwargs": SMALL_POLICY, "planner_kwargs": SMALL_PLANNER, "pretrain_steps": 12}
    | {"actor_reset_freq": 7, "actor_reset_steps": 2},
    TDMPC2: SMALL
    | {
        "policy_kwargs": {"net_arch": [16], "encoder_arch": [16], "latent_dim": 16, "n_critics": 2, "num_proposals": 2},
        "planner_kwargs": SMALL_PLANNER,
        "pretrain_steps": 12,
        "gamma": 0.9,
    },
    RLPD: SMALL | {"policy_kwargs": {"net_arch": [16], "n_critics": 2}, "gradient_steps": 1},
    DiffusionBC: {
        "policy_kwargs": {"denoiser": "mlp", "net_arch": [16], "num_inference_steps": 2},
        "batch_size": 8,
        "pretrain_steps": 12,
        "seed": 0,
        "device": "cpu",
    },
    PARL: ALGORITHMS["PARL"].settings | SMALL | {"pretrain_steps": 12},
    DSRL: ALGORITHMS["DSRL"].settings | SMALL | {"pretrain_steps": 12},
    DPPO: ALGORITHMS["DPPO"].settings | {"pretrain_steps": 12, "train_freq": 4, "seed": 0, "device": "cpu"},
}
ENV_ID = "checkpoint-test/walk-v0"
gym.register(ENV_ID, Walk, max_episode_steps=4)


class Death(Exception):
    """The process dies."""


class Killer(BaseCallback):
    """Dies in the middle of a step, or of an update."""

    def __init__(self, env_steps: int = 10_000, updates: int = 10_000) -> None:
        super().__init__()
        self.env_steps, self.updates = env_steps, updates

    def _on_step(self) -> bool:
        if self.num_timesteps >= self.env_steps or getattr(self.model, "_n_pretrain_updates", 0) >= self.updates:
            raise Death
        return True


@pytest.fixture
def data(tmp_path: Path) -> str:
    return str(save_d4rl(OfflineDataset.from_arrays(**record_walk()), tmp_path / "walk.hdf5"))


def make(algorithm: type, env: Any, **settings: Any) -> Any:
    env = make_vec_env(env, seed=0) if isinstance(env, str) else env
    return algorithm("MlpPolicy", env, **(SETTINGS[algorithm] | settings))


def die(function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    with pytest.raises(Death):
        function(*args, **kwargs)


def assert_equal(first: Any, second: Any) -> None:
    expected, found = contents(first), contents(second)
    assert expected.keys() == found.keys()
    assert [name for name in expected if not np.array_equal(expected[name], found[name], equal_nan=True)] == []


# ------------------------------------------------------------------ equal numbers


@pytest.mark.parametrize("n_envs", [1, 4])
@pytest.mark.parametrize("env_id", ["Hopper-v5", "Pendulum-v1"])
@pytest.mark.parametrize("algorithm", [MODIP, TDMPC2])
def test_online(algorithm: type, env_id: str, n_envs: int, tmp_path: Path) -> None:
    whole = make(algorithm, make_vec_env(env_id, n_envs, seed=0)).learn(48)
    killed = make(algorithm, make_vec_env(env_id, n_envs, seed=0))
    die(killed.learn, 48, callback=[CheckpointCallback(16, tmp_path), Killer(env_steps=40)])
    model = algorithm.resume(tmp_path, device="cpu")
    assert model.num_timesteps == 32 and model.get_env() is not killed.get_env()
    th.rand(1)  # what a script does before it goes on is no matter
    assert_equal(whole, model.learn(48))


@pytest.mark.parametrize("explicit", [True, False])
@pytest.mark.parametrize("algorithm", [MODIP, TDMPC2, DiffusionBC, PARL, DSRL, DPPO])
def test_offline_phase(algorithm: type, explicit: bool, tmp_path: Path, data: str) -> None:
    settings = {"distill_from": "both", "relabel_freq": 3} if algorithm is MODIP else {}

    def begin() -> Any:
        return make(algorithm, ENV_ID, offline_dataset=data, **settings)

    def go_on(model: Any, *callbacks: BaseCallback) -> Any:
        if explicit:
            model.pretrain(12, callback=list(callbacks), log_interval=5)
        return model.learn(30, callback=list(callbacks))

    whole = go_on(begin())
    checkpoints = CheckpointCallback(4, tmp_path / "runs")
    if explicit:
        die(go_on, begin(), checkpoints, Killer(updates=7))
    else:  # only checkpoints are called in the offline phase of learn(): die in one of them
        die(go_on, begin(), DiesAfter(4, tmp_path / "runs", 1))
    model = algorithm.resume(tmp_path / "runs", device="cpu")
    assert (model._n_pretrain_updates, model.num_timesteps) == (4, 0)
    die(go_on, model, checkpoints, Killer(env_steps=21))
    model = algorithm.resume(tmp_path / "runs", device="cpu")
    assert (model._n_pretrain_updates, model.num_timesteps) == (12, 20)
    assert_equal(whole, go_on(model))


class DiesAfter(CheckpointCallback):
    def __init__(self, save_freq: int, folder: Path, number: int) -> None:
        super().__init__(save_freq, folder)
        self.number = number

    def save(self) -> None:
        super().save()
        self.number -= 1
        if self.number == 0:
            raise Death


def test_learn_finishes_an_interrupted_pretrain(tmp_path: Path, data: str) -> None:
    whole = make(MODIP, ENV_ID, offline_dataset=data).pretrain(9, clone_only=True).learn(20)
    killed = make(MODIP, ENV_ID, offline_dataset=data)
    die(killed.pretrain, 9, callback=[CheckpointCallback(4, tmp_path / "runs"), Killer(updates=6)], clone_only=True)
    assert_equal(whole, MODIP.resume(tmp_path / "runs", device="cpu").learn(20))


def test_rlpd_with_normalisation_noise_and_evaluations(tmp_path: Path, data: str) -> None:
    def begin() -> RLPD:
        noise = OrnsteinUhlenbeckActionNoise(np.zeros(1), 0.3 * np.ones(1))
        return make(RLPD, VecNormalize(make_vec_env(ENV_ID, 2, seed=0)), offline_dataset=data, action_noise=noise)

    def evaluations() -> EvalCallback:
        env = VecNormalize(make_vec_env(ENV_ID, 1, seed=1))
        return EvalCallback(env, eval_freq=7, n_eval_episodes=2, deterministic=False, verbose=0)

    whole = begin().learn(80, callback=evaluations())
    killed = begin()
    die(killed.learn, 80, callback=[evaluations(), CheckpointCallback(20, tmp_path / "runs"), Killer(env_steps=57)])
    model = RLPD.resume(tmp_path / "runs", device="cpu")
    assert model.num_timesteps == 40
    assert_equal(whole, model.learn(80, callback=[evaluations()]))
    statistics = [each.get_vec_normalize_env().obs_rms for each in (whole, model)]
    np.testing.assert_array_equal(statistics[0].mean, statistics[1].mean)


def test_arrays_have_to_be_given_again(tmp_path: Path) -> None:
    arrays = record_walk()
    whole = make(MODIP, ENV_ID, offline_dataset=arrays).learn(30)
    killed = make(MODIP, ENV_ID, offline_dataset=arrays)
    die(killed.learn, 30, callback=[CheckpointCallback(10, tmp_path), Killer(env_steps=27)])
    with pytest.raises(ValueError, match="learns from arrays, which its checkpoint does not hold: pass the same data"):
        MODIP.resume(tmp_path)
    with pytest.raises(ValueError, match=r"The offline data has changed .*: give resume\(\) the same data"):
        MODIP.resume(tmp_path, offline_dataset=arrays | {"rewards": arrays["rewards"] + 1})
    assert_equal(whole, MODIP.resume(tmp_path, device="cpu", offline_dataset=arrays).learn(30))


def test_checkpoints_leave_no_trace_in_training(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with_them = make(MODIP, vec_walk()).learn(30, callback=CheckpointCallback(7, tmp_path))
    assert_equal(make(MODIP, vec_walk()).learn(30), with_them)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["checkpoint-4", "checkpoint-5"] and len(names) == KEPT


# ------------------------------------------------------------------ what is left of a call


def checkpointed(folder: Path, **settings: Any) -> None:
    die(make(MODIP, ENV_ID, **settings).learn, 40, callback=[CheckpointCallback(10, folder), Killer(env_steps=25)])


def test_the_same_call_goes_on_and_another_number_is_an_error(tmp_path: Path) -> None:
    checkpointed(tmp_path)
    model = MODIP.resume(tmp_path)
    message = r"learn\(20\) after resume\(\): the checkpoint was made in or after learn\(40\), and 20 of these are done"
    with pytest.raises(ValueError, match=message):
        model.learn(20)
    assert model.learn(40).num_timesteps == 40
    assert model.learn(10, reset_num_timesteps=False).num_timesteps == 50  # a call of its own
    assert model.learn(10).num_timesteps == 10


def test_a_finished_training_is_finished(tmp_path: Path) -> None:
    whole = make(MODIP, ENV_ID).learn(20, callback=CheckpointCallback(8, tmp_path))
    model = MODIP.resume(tmp_path, device="cpu").learn(20)
    assert_equal(whole, model)
    assert_equal(whole.learn(12, reset_num_timesteps=False), model.learn(12, reset_num_timesteps=False))


def test_a_second_call_is_counted_from_its_start(tmp_path: Path) -> None:
    whole = make(MODIP, ENV_ID).learn(15).learn(30, reset_num_timesteps=False)
    killed = make(MODIP, ENV_ID).learn(15)
    callbacks = [CheckpointCallback(10, tmp_path), Killer(env_steps=37)]
    die(killed.learn, 30, callback=callbacks, reset_num_timesteps=False)
    assert_equal(whole, MODIP.resume(tmp_path, device="cpu").learn(30, reset_num_timesteps=False))


def test_a_pretrain_that_was_stopped_is_not_finished_by_learn(tmp_path: Path, data: str) -> None:
    model = make(MODIP, ENV_ID, offline_dataset=data)
    stop = type("Stop", (BaseCallback,), {"_on_step": lambda self: self.n_calls < 5})
    model.pretrain(9, callback=[stop()])
    die(model.learn, 20, callback=[CheckpointCallback(5, tmp_path / "runs"), Killer(env_steps=12)])
    resumed = MODIP.resume(tmp_path / "runs")
    assert resumed.pretrain(9).learn(20)._n_pretrain_updates == 5


# ------------------------------------------------------------------ checkpoints on the disk


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path) -> None:
    checkpointed(tmp_path)
    newest = find_checkpoint(tmp_path)
    assert newest == tmp_path / "checkpoint-2"
    content = (newest / "state.zip").read_bytes()
    for damaged, why in ((content[:-1], "bytes instead of"), (bytes([content[0] ^ 1]) + content[1:], "has changed")):
        (newest / "state.zip").write_bytes(damaged)
        with pytest.warns(UserWarning, match=rf"checkpoint-2 is damaged \(state.zip .*{why}.*the one before"):
            assert MODIP.resume(tmp_path).num_timesteps == 10
    (newest / "state.zip").unlink()
    (tmp_path / "checkpoint-1" / "manifest.json").write_text("{")
    with pytest.warns(UserWarning, match="damaged"), pytest.raises(FileNotFoundError, match="no complete checkpoint"):
        MODIP.resume(tmp_path)


def test_what_a_kill_left_unfinished_is_not_taken(tmp_path: Path) -> None:
    checkpointed(tmp_path)
    shutil.copytree(tmp_path / "checkpoint-2", tmp_path / "unfinished-checkpoint")
    shutil.rmtree(tmp_path / "checkpoint-2")
    assert MODIP.resume(tmp_path).num_timesteps == 10
    make(MODIP, ENV_ID).learn(11, callback=CheckpointCallback(10, tmp_path))
    assert not (tmp_path / "unfinished-checkpoint").exists()


def test_a_disk_that_takes_no_more_does_not_stop_the_training(tmp_path: Path) -> None:
    checkpointed(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # bytes in a file; a checkpoint has more
    try:
        with pytest.warns(UserWarning, match=f"No checkpoint was written to {tmp_path}: .*The last one stays"):
            model = make(MODIP, ENV_ID).learn(11, callback=CheckpointCallback(10, tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert model.num_timesteps == 11 and find_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    assert not (tmp_path / "unfinished-checkpoint").exists()


def test_no_checkpoint(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path / "none") is None
    with pytest.raises(FileNotFoundError, match="none has no complete checkpoint: give the folder of a Checkpoint"):
        MODIP.resume(tmp_path / "none")
    checkpointed(tmp_path)
    with pytest.raises(ValueError, match="is a checkpoint of MODIP, not of TDMPC2"):
        TDMPC2.resume(tmp_path)


# ------------------------------------------------------------------ environments


class Handle(Walk):
    """Its state is somewhere else."""

    def __init__(self) -> None:
        super().__init__()
        self.simulation = th.zeros(1)


@pytest.mark.parametrize(
    ("make_env", "reason"),
    [
        (lambda: vec_walk(2, SubprocVecEnv), "the environments of a SubprocVecEnv are out of reach"),
        (lambda: DummyVecEnv([Handle] * 2), "Handle.simulation holds a torch.Tensor"),
    ],
)
def test_a_state_that_cannot_be_had_begins_a_new_episode(make_env: Any, reason: str, tmp_path: Path) -> None:
    killed = make(MODIP, make_env())
    die(killed.learn, 60, callback=[CheckpointCallback(20, tmp_path), Killer(env_steps=50)])
    killed.env.close()
    with pytest.raises(ValueError, match="cannot be made again .*: pass env, made as it was for the training"):
        MODIP.resume(tmp_path)
    with pytest.warns(UserWarning, match=rf"not in the checkpoint: .*{reason}\. A new episode begins"):
        model = MODIP.resume(tmp_path, make_env())
    filled = model.replay_buffer.size()
    assert model.learn(60).num_timesteps == 60
    assert model.replay_buffer.dones[filled - 1].all()  # no sequence crosses the gap
    model.env.close()


def test_other_environments_are_refused(tmp_path: Path) -> None:
    checkpointed(tmp_path)
    with pytest.raises(ValueError, match="but those of the checkpoint were .*: make them the same way"):
        MODIP.resume(tmp_path, VecNormalize(make_vec_env(ENV_ID, 1)))
    with pytest.raises(ValueError, match="The checkpoint has 1 environments, but env has 2"):
        MODIP.resume(tmp_path, make_vec_env(ENV_ID, 2))


def test_a_buffer_without_its_empty_rows(tmp_path: Path) -> None:
    model = make(MODIP, ENV_ID, buffer_size=100_000)
    die(model.learn, 40, callback=[CheckpointCallback(10, tmp_path), Killer(env_steps=25)])
    path = find_checkpoint(tmp_path)
    assert path is not None and (path / "replay.pkl").stat().st_size < 20_000
    buffer = MODIP.resume(tmp_path).replay_buffer
    assert (len(buffer.observations), len(buffer.actions), buffer.size()) == (100_000, 100_000, 20)
