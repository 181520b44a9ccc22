"""Learning: from scratch, from offline data, with SB3's callbacks, loggers and seeds."""

import json
import warnings
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback, EvalCallback
from stable_baselines3.common.env_checker import check_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import configure
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from walk import (
    METRICS,
    ONE_STEP,
    PLANS,
    MakeModel,
    Recorder,
    Walk,
    assert_same,
    both_denoisers,
    both_modes,
    observations,
    parameters,
    record_walk,
    vec_walk,
)

from modip_sb3 import MODIP

# ------------------------------------------------------------------ learn


@both_denoisers
@both_modes
def test_learns_from_scratch_without_a_warning(make_model: MakeModel, denoiser: str, mode: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = make_model(policy_kwargs={"denoiser": denoiser}, rollout_with=mode)
        before = parameters(model)
        assert model.learn(20) is model
    assert (model.num_timesteps, model._n_updates) == (20, 10)
    unchanged = {name.split(".")[0] for name, value in parameters(model).items() if th.equal(value, before[name])}
    assert unchanged <= {"world_model", "value", "critic", "value_target", "critic_target", "trusts_planner", "blur"}
    assert not th.equal(before["normalizer.mean"], model.policy.normalizer.mean)
    for name in ("world_model", "value", "critic", "value_target", "critic_target", "actor", "actor_ema"):
        changed = [not th.equal(v, before[f"{name}.{k}"]) for k, v in getattr(model.policy, name).named_parameters()]
        assert any(changed), name
    assert all(th.isfinite(value).all() for value in parameters(model).values())


@pytest.mark.parametrize("kind", ["box", "dict", "discrete"])
def test_learns_on_every_observation_space(make_model: MakeModel, kind: str) -> None:
    check_env(Walk(kind), warn=False)
    policy = "MultiInputPolicy" if kind == "dict" else "MlpPolicy"
    model = make_model(Walk(kind), policy).learn(30)
    evaluate_policy(model, Walk(kind), n_eval_episodes=2, warn=False)
    make_model(Walk(kind), policy, offline_dataset=record_walk(kind=kind), learning_starts=0).pretrain(5).learn(10)


@pytest.mark.parametrize("vec_env_cls", [DummyVecEnv, SubprocVecEnv])
@pytest.mark.parametrize("n_envs", [1, 4])
def test_vec_envs(make_model: MakeModel, vec_env_cls: type[VecEnv], n_envs: int) -> None:
    env = vec_walk(n_envs, vec_env_cls)
    model = make_model(env, gradient_steps=-1, n_steps=2).learn(21)
    assert model.num_timesteps == (21 if n_envs == 1 else 24)  # whole steps of all environments, as in SB3
    assert model._n_updates == (11 if n_envs == 1 else 16)
    env.close()


@pytest.mark.parametrize(
    ("train_freq", "timesteps", "updates"),
    [(4, 20, 3), ((3, "step"), 18, 3), ((1, "episode"), None, None)],
)
def test_train_freq(make_model: MakeModel, train_freq: Any, timesteps: int | None, updates: int | None) -> None:
    recorder = Recorder()
    model = make_model(Walk(), train_freq=train_freq).learn(18, recorder)
    if timesteps is None:  # training follows every episode, and the last one is finished
        assert recorder.dones[-1].all()
        ends = 1 + np.flatnonzero(np.concatenate(recorder.dones))
        timesteps, updates = int(ends[-1]), int((ends > model.learning_starts).sum())
    assert (model.num_timesteps, model._n_updates) == (timesteps, updates)


def test_learn_can_go_on(make_model: MakeModel) -> None:
    model = make_model(Walk()).learn(15)
    model.learn(10, reset_num_timesteps=False)
    assert model.num_timesteps == 25
    model.learn(12)
    assert (model.num_timesteps, model._n_updates) == (12, 5 + 10 + 2)


@pytest.mark.parametrize("modes", [("planner", "policy"), ("policy", "planner"), ("planner", "auto")])
def test_rollout_with_can_change(make_model: MakeModel, modes: tuple[str, str]) -> None:
    model = make_model(Walk(), policy_kwargs={"horizon": 2}, rollout_with=modes[0]).learn(12)
    model.rollout_with = modes[1]
    model.learn(10, reset_num_timesteps=False)
    assert model._chunk_state[0].shape[1] == {"planner": 2, "policy": 4, "auto": 4}[modes[1]]


def test_optimize_memory_usage_and_saved_replay_buffer(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model(Walk(), optimize_memory_usage=True).learn(15)
    model.save_replay_buffer(tmp_path / "buffer")
    size = model.replay_buffer.size()
    model.save(tmp_path / "model")
    loaded = MODIP.load(tmp_path / "model", env=Walk())
    assert loaded.replay_buffer.size() == 0
    loaded.load_replay_buffer(tmp_path / "buffer")
    assert loaded.replay_buffer.size() == size == 15
    loaded.learn(5, reset_num_timesteps=False)


@pytest.mark.parametrize(
    "policy_kwargs",
    [
        {"net_arch": [16, 16]},
        {"net_arch": []},
        {"net_arch": {"pi": [], "qf": []}, "denoiser": "unet"},
        {"net_arch": {"pi": [8, 16], "qf": [8]}, "denoiser": "unet", "action_horizon": 5, "horizon": 3},
        {"n_critics": 3, "optimizer_class": th.optim.SGD, "optimizer_kwargs": {"weight_decay": 1e-4}},
        {"optimizer_class": th.optim.AdamW, "optimizer_kwargs": {"eps": 1e-5}},
        {"train_scheduler": "DDIMScheduler", "scheduler_kwargs": {"prediction_type": "v_prediction"}},
        {"sample_scheduler": "DPMSolverMultistepScheduler", "scheduler_kwargs": {"prediction_type": "sample"}},
        {"sample_scheduler": "DDPMScheduler"},
        ONE_STEP,
    ],
    ids=str,
)
def test_policy_kwargs(make_model: MakeModel, policy_kwargs: dict[str, Any], tmp_path: Path) -> None:
    model = make_model(Walk(), policy_kwargs=policy_kwargs).learn(14)
    model.save(tmp_path / "model")
    obs = observations(model)
    expected, _ = model.predict(obs, deterministic=True)
    np.testing.assert_array_equal(MODIP.load(tmp_path / "model").predict(obs, deterministic=True)[0], expected)


class Learned(FlattenExtractor):
    """A features extractor with parameters."""

    def __init__(self, observation_space: spaces.Box, features_dim: int = 6) -> None:
        super().__init__(observation_space)
        self._features_dim = features_dim
        self.linear = th.nn.Linear(2, features_dim)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.linear(super().forward(observations))


def test_features_extractor_learns(make_model: MakeModel, tmp_path: Path) -> None:
    kwargs = {"features_extractor_class": Learned, "features_extractor_kwargs": {"features_dim": 7}}
    model = make_model(Walk(), policy_kwargs=kwargs)
    before = parameters(model)
    model.learn(15)
    assert not th.equal(before["features_extractor.linear.weight"], model.policy.features_extractor.linear.weight)
    model.save(tmp_path / "model")
    assert_same(parameters(model), parameters(MODIP.load(tmp_path / "model")))


# ------------------------------------------------------------------ offline data


def test_pretrain_then_learn(make_model: MakeModel) -> None:
    model = make_model(Walk(), offline_dataset=record_walk())
    before = parameters(model)
    assert model.pretrain(6) is model
    assert (model._n_pretrain_updates, model._n_updates, model.num_timesteps) == (6, 0, 0)
    assert not th.equal(parameters(model)["world_model.encoder.0.weight"], before["world_model.encoder.0.weight"])
    recorder = Recorder()
    model.learn(15, recorder)
    assert recorder.chunk_states[0][1].tolist() == [1]  # no random actions first: the policy was cloned
    assert (model._n_pretrain_updates, model._n_updates, model.num_timesteps) == (6, 5, 15)


def test_learn_starts_with_the_offline_phase(make_model: MakeModel) -> None:
    model = make_model(Walk(), offline_dataset=record_walk(), pretrain_steps=7).learn(12)
    assert (model._n_pretrain_updates, model.num_timesteps) == (7, 12)
    model = make_model(Walk(), offline_dataset=record_walk(), pretrain_steps=0).learn(12)
    assert model._n_pretrain_updates == 0


def test_clone_only_leaves_world_model_and_critics_alone(make_model: MakeModel) -> None:
    model = make_model(Walk(), offline_dataset=record_walk())
    before = parameters(model)
    model.pretrain(3, clone_only=True)
    changed = {name.split(".")[0] for name, value in parameters(model).items() if not th.equal(value, before[name])}
    assert changed == {"actor", "actor_ema", "normalizer", "num_actor_updates"}


def test_pretrain_calls_callbacks_and_stops(make_model: MakeModel) -> None:
    model = make_model(Walk(), offline_dataset=record_walk())
    model.pretrain(20, callback=Recorder(stop_after=4), progress_bar=True)
    assert model._n_pretrain_updates == 4


@pytest.mark.parametrize("path_type", [str, Path])
def test_offline_data_may_be_a_path(make_model: MakeModel, tmp_path: Path, path_type: type) -> None:
    arrays = record_walk(terminates=True)
    names = {"terminations": "terminals", "truncations": "timeouts"}
    with h5py.File(tmp_path / "walk.hdf5", "w") as file:
        for name, values in arrays.items():
            file[names.get(name, name)] = values
    path = path_type(tmp_path / "walk.hdf5")
    model = make_model(Walk(), offline_dataset=path).pretrain(3)
    model.save(tmp_path / "model")
    loaded = MODIP.load(tmp_path / "model", env=Walk())
    assert loaded.offline_dataset == path
    loaded.learn(5)
    assert loaded._n_pretrain_updates == 3


def test_offline_batches_are_mixed(make_model: MakeModel) -> None:
    arrays = record_walk()
    arrays["rewards"] = np.full_like(arrays["rewards"], 100.0)
    model = make_model(Walk(), offline_dataset=arrays, offline_fraction=0.25).learn(5)
    batch = model._sample_batch(8)
    assert (batch.rewards[:, 0] == 100).sum() == 2


# ------------------------------------------------------------------ callbacks and logs


def test_callbacks(make_model: MakeModel, tmp_path: Path) -> None:
    folder = str(tmp_path)
    evaluation = EvalCallback(vec_walk(), None, None, 2, 10, folder, folder, verbose=0)
    model = make_model(vec_walk())
    model.learn(20, callback=[evaluation, CheckpointCallback(10, folder)], progress_bar=True)
    assert evaluation.evaluations_timesteps == [10, 20]
    saved = {"best_model.zip", "rl_model_10_steps.zip", "rl_model_20_steps.zip"}
    assert {path.name for path in tmp_path.glob("*.zip")} == saved
    MODIP.load(tmp_path / "best_model", env=vec_walk())


def test_a_callback_stops_learn(make_model: MakeModel) -> None:
    assert make_model(Walk()).learn(100, callback=Recorder(stop_after=13)).num_timesteps == 13
    assert make_model(Walk()).learn(100, callback=lambda *_: False).num_timesteps == 1


def read_rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "progress.json").read_text().splitlines()]


@both_modes
def test_logged_keys(make_model: MakeModel, tmp_path: Path, mode: str) -> None:
    model = make_model(Walk(), rollout_with=mode, offline_dataset=record_walk())
    model.set_logger(configure(str(tmp_path), ["json"]))
    model.pretrain(5, log_interval=5)
    model.learn(60)
    rows = read_rows(tmp_path)
    assert {f"pretrain/{name}" for name in METRICS} <= rows[0].keys()
    keys = set().union(*rows[1:])
    expected = {f"train/{name}" for name in METRICS | {"learning_rate", "n_updates"}}
    expected |= {"rollout/ep_rew_mean", "rollout/ep_len_mean", "time/total_timesteps", "time/fps"}
    assert expected <= keys
    assert PLANS & keys == (PLANS if mode == "planner" else set())
    assert max(map(len, keys)) <= 36
    assert all(np.isfinite(value) for row in rows for value in row.values())


def test_no_pretrain_numbers_on_the_axis_of_learn(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model(Walk(), offline_dataset=record_walk())
    model.set_logger(configure(str(tmp_path), ["json"]))
    model.pretrain(7, log_interval=5)
    model.learn(40)
    rows = read_rows(tmp_path)
    assert not [row for row in rows if {"time/total_timesteps", "pretrain/actor_loss"} <= row.keys()]
    assert len([row for row in rows if "pretrain/actor_loss" in row]) == 2  # the rest is logged at the end


def read_tensorboard(folder: Path) -> dict[str, set[str]]:
    tags = {}
    for run in folder.iterdir():
        events = EventAccumulator(str(run))
        tags[run.name] = set(events.Reload().Tags()["scalars"])
    return tags


def test_tensorboard(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model(Walk(), offline_dataset=record_walk(), tensorboard_log=str(tmp_path))
    model.pretrain(5, log_interval=5)
    model.learn(40)
    tags = set().union(*read_tensorboard(tmp_path).values())
    assert {"pretrain/actor_loss", "train/actor_loss", "rollout/ep_rew_mean", "rollout/plan_gain"} <= tags


@pytest.mark.parametrize(("name", "run"), [("mine", "mine_1"), (None, "MODIP_1")])
def test_offline_phase_of_learn_is_in_its_run(
    make_model: MakeModel, tmp_path: Path, name: str | None, run: str
) -> None:
    model = make_model(Walk(), offline_dataset=record_walk(), tensorboard_log=str(tmp_path))
    model.learn(40, tb_log_name=name)
    tags = read_tensorboard(tmp_path)
    assert tags.keys() == {run} and {"pretrain/actor_loss", "train/actor_loss"} <= tags[run]


class Interruption(BaseCallback):
    """Interrupts what it is hooked to, and notes whether training had started."""

    started = False

    def _on_training_start(self) -> None:
        self.started = True

    def _on_step(self) -> bool:
        return True

    def interrupt(self, *args: Any) -> None:
        raise KeyboardInterrupt


@pytest.mark.parametrize("progress_bar", [False, True])
def test_callbacks_have_started_when_the_offline_phase_is_interrupted(
    make_model: MakeModel, progress_bar: bool
) -> None:
    model, callback = make_model(Walk(), offline_dataset=record_walk()), Interruption()
    model.policy.actor.denoiser.register_forward_hook(callback.interrupt)
    with pytest.raises(KeyboardInterrupt):
        model.learn(40, callback, progress_bar=progress_bar)
    assert callback.started and model._n_pretrain_updates == 0


def test_learning_rate_schedule_reaches_every_optimizer(make_model: MakeModel) -> None:
    model = make_model(Walk(), learning_rate=lambda progress: progress * 1e-2)
    assert [group["lr"] for group in model.model_optimizer.param_groups] == pytest.approx([1e-2, 1e-2])
    model.learn(20)
    rate = 1e-2 * model._current_progress_remaining
    rates = {name: [group["lr"] for group in getattr(model, name).param_groups] for name in model.optimizer_names}
    assert 0 < 1e-2 - rate and rates == {
        "model_optimizer": pytest.approx([0.3 * rate, rate]),  # the encoder learns at 0.3 of it
        "value_optimizer": pytest.approx([rate]),
        "actor_optimizer": pytest.approx([rate]),
    }
    encoder = {id(parameter) for parameter in model.model_optimizer.param_groups[0]["params"]}
    assert encoder == {id(parameter) for parameter in model.policy.world_model.encoder.parameters()}


# ------------------------------------------------------------------ seeds


@both_modes
@pytest.mark.parametrize("n_envs", [1, 2])
def test_same_seed_same_numbers(make_model: MakeModel, n_envs: int, mode: str) -> None:
    def run(seed: int) -> dict[str, th.Tensor]:
        return parameters(make_model(vec_walk(n_envs), seed=seed, rollout_with=mode, offline_dataset=data).learn(16))

    data = record_walk() if mode == "planner" else None
    assert_same(run(3), run(3))
    with pytest.raises(AssertionError):
        assert_same(run(3), run(4))
