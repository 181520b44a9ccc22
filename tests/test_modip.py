"""MODIP is an SB3 algorithm: small real runs of everything that SB3's users do with one."""

import json
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import gymnasium as gym
import h5py
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from gymnasium.wrappers import TimeLimit
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback, EvalCallback
from stable_baselines3.common.env_checker import check_env
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import configure
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecNormalize
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from modip_sb3 import MODIP, MODIPPolicy
from modip_sb3.buffers import SequenceReplayBuffer

MakeModel = Callable[..., MODIP]

both_denoisers = pytest.mark.parametrize("denoiser", ["mlp", "unet"])
both_modes = pytest.mark.parametrize("mode", ["policy", "planner"])

LOSSES = {"consistency_loss", "reward_loss", "termination_loss", "q_loss", "v_loss", "actor_loss"}
METRICS = LOSSES | {"q_mean", "v_mean"}
ONE_STEP = {"action_horizon": 1, "n_action_steps": 1, "horizon": 1}
PLANS = {"rollout/plan_gain", "rollout/plan_predicted", "rollout/plan_realized"}


class Walk(gym.Env):
    """
    A point that is pushed along a line, in episodes of a random length of 2 to 6 steps.

    :param kind: observation space: "box", "dict" or one-hot "discrete"
    :param terminates: whether episodes terminate at their end instead of being cut off
    :param low: lower bound of the actions
    :param high: upper bound of the actions
    :param shape: shape of the actions
    """

    SPACES = {
        "box": spaces.Box(-5, 5, (2,), np.float32),
        "dict": spaces.Dict({"x": spaces.Box(-5, 5, (1,), np.float32), "speed": spaces.Box(-5, 5, (1,), np.float32)}),
        "discrete": spaces.Discrete(11),
    }

    def __init__(
        self,
        kind: str = "box",
        terminates: bool = False,
        low: float = -1.0,
        high: float = 1.0,
        shape: tuple[int, ...] = (1,),
    ) -> None:
        self.kind, self.terminates = kind, terminates
        self.observation_space = self.SPACES[kind]
        self.action_space = spaces.Box(low, high, shape, np.float32)

    def _observe(self) -> Any:
        if self.kind == "discrete":
            return int(self.state[0]) + 5
        return self.state.copy() if self.kind == "box" else {"x": self.state[:1].copy(), "speed": self.state[1:].copy()}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self.state = self.np_random.uniform(-1, 1, 2).astype(np.float32)
        self.steps_left = int(self.np_random.integers(2, 7))
        return self._observe(), {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict]:
        assert self.action_space.contains(action)
        self.state = np.array([self.state[0] + self.state[1], action.mean()], np.float32).clip(-5, 5)
        self.steps_left -= 1
        end = self.steps_left == 0
        return self._observe(), -abs(float(self.state[0])), end and self.terminates, end and not self.terminates, {}


def vec_walk(n_envs: int = 1, vec_env_cls: type[VecEnv] | None = None, **env_kwargs: Any) -> VecEnv:
    options = {"start_method": "fork"} if vec_env_cls is SubprocVecEnv else None
    return make_vec_env(Walk, n_envs, seed=0, env_kwargs=env_kwargs, vec_env_cls=vec_env_cls, vec_env_kwargs=options)


def stack(rows: list[Any]) -> Any:
    return {key: stack([row[key] for row in rows]) for key in rows[0]} if isinstance(rows[0], dict) else np.array(rows)


def record_walk(num_steps: int = 60, **env_kwargs: Any) -> dict[str, Any]:
    """Arrays of a random walk, as a user would record them."""
    env = Walk(**env_kwargs)
    env.action_space.seed(0)
    obs, _ = env.reset(seed=0)
    rows = []
    for _ in range(num_steps):
        action = env.action_space.sample()
        next_obs, reward, terminated, truncated, _ = env.step(action)
        rows.append((obs, action, reward, terminated, truncated, next_obs))
        obs = env.reset()[0] if terminated or truncated else next_obs
    names = ("observations", "actions", "rewards", "terminations", "truncations", "next_observations")
    arrays: dict[str, Any] = dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))
    return {name: stack(values) for name, values in arrays.items()}


def parameters(model: MODIP) -> dict[str, th.Tensor]:
    return {name: value.clone() for name, value in model.policy.state_dict().items()}


def assert_same(first: dict[str, th.Tensor], second: dict[str, th.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [name for name in first if not th.equal(first[name], second[name])] == []


def observations(model: MODIP, num: int = 3) -> Any:
    space = model.observation_space
    space.seed(0)
    rows = [space.sample() for _ in range(num)]
    return stack(rows)


def rows_of(obs: Any, rows: Any) -> Any:
    return {key: value[rows] for key, value in obs.items()} if isinstance(obs, dict) else obs[rows]


class Recorder(BaseCallback):
    """Keeps what ``learn()`` knows at each environment step, and stops it after ``stop_after`` of them."""

    def __init__(self, stop_after: int | None = None) -> None:
        super().__init__()
        self.stop_after = stop_after
        self.actions: list[np.ndarray] = []
        self.dones: list[np.ndarray] = []
        self.chunk_states: list[tuple[np.ndarray, np.ndarray]] = []
        self.keys: set[str] = set()

    def _on_step(self) -> bool:
        assert isinstance(self.model, MODIP)
        if "dones" in self.locals:
            self.actions.append(self.locals["buffer_actions"].copy())
            self.dones.append(self.locals["dones"].copy())
            assert self.model._chunk_state is not None
            self.chunk_states.append((self.model._chunk_state[0].copy(), self.model._chunk_state[1].copy()))
        self.keys |= set(self.model.logger.name_to_value)
        return self.stop_after is None or self.n_calls < self.stop_after


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
    assert unchanged <= {"world_model", "value", "critic", "value_target", "critic_target"}
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


@pytest.mark.parametrize("modes", [("planner", "policy"), ("policy", "planner")])
def test_rollout_with_can_change(make_model: MakeModel, modes: tuple[str, str]) -> None:
    model = make_model(Walk(), policy_kwargs={"horizon": 2}, rollout_with=modes[0]).learn(12)
    model.rollout_with = modes[1]
    model.learn(10, reset_num_timesteps=False)
    assert model._chunk_state[0].shape[1] == {"planner": 2, "policy": 4}[modes[1]]


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
    assert changed == {"actor", "actor_ema", "normalizer"}


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
    model = make_model(Walk(), offline_dataset=arrays, offline_fraction=0.25)
    for online_steps in (5, 20, 60):  # an online sequence counts four times, until the online share is full
        model.learn(online_steps - model.num_timesteps, reset_num_timesteps=False)
        online_share = min(4 * online_steps / (4 * online_steps + len(arrays["rewards"])), 0.75)
        batch = model._sample_batch(64)
        assert (batch.rewards[:, 0] != 100).sum() == round(64 * online_share)
    assert online_share == 0.75


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


def test_offline_phase_of_learn_has_the_name_of_the_run(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model(Walk(), offline_dataset=record_walk(), tensorboard_log=str(tmp_path))
    model.learn(20, tb_log_name="mine")
    assert {path.name.split("_")[0] for path in tmp_path.iterdir()} == {"mine"}


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


# ------------------------------------------------------------------ save and load


@both_denoisers
@pytest.mark.parametrize("kind", ["box", "dict"])
def test_save_and_load(make_model: MakeModel, tmp_path: Path, denoiser: str, kind: str) -> None:
    policy = "MultiInputPolicy" if kind == "dict" else "MlpPolicy"
    model = make_model(Walk(kind), policy, policy_kwargs={"denoiser": denoiser}).learn(15)
    model.save(tmp_path / "model")
    loaded = MODIP.load(tmp_path / "model", env=Walk(kind))
    assert_same(parameters(model), parameters(loaded))
    for name in model.optimizer_names:
        saved, restored = getattr(model, name).state_dict(), getattr(loaded, name).state_dict()
        assert saved["param_groups"] == restored["param_groups"]
        assert all(th.equal(entry["exp_avg"], restored["state"][i]["exp_avg"]) for i, entry in saved["state"].items())
    obs = observations(model)
    for inference in ("policy", "planner"):
        model.inference = loaded.inference = inference
        for deterministic in (True, False):
            th.manual_seed(0)
            expected, _ = model.predict(obs, deterministic=deterministic)
            th.manual_seed(0)
            np.testing.assert_array_equal(loaded.predict(obs, deterministic=deterministic)[0], expected)
    assert loaded.num_timesteps == 15
    loaded.learn(10, reset_num_timesteps=False)
    assert (loaded.num_timesteps, loaded._n_updates) == (25, 15)


def test_inference_and_rollouts_are_saved_and_can_be_changed(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model(Walk(), inference="planner", rollout_with="policy", gamma=0.9)
    model.save(tmp_path / "model")
    loaded = MODIP.load(tmp_path / "model")
    assert (loaded.inference, loaded.policy.inference, loaded.rollout_with) == ("planner", "planner", "policy")
    assert loaded.planner_kwargs == model.planner_kwargs and loaded.policy.planner_kwargs["gamma"] == 0.9
    assert MODIP.load(tmp_path / "model", inference="policy").policy.inference == "policy"


def test_get_and_set_parameters(make_model: MakeModel) -> None:
    first, second = make_model(Walk()).learn(14), make_model(Walk(), seed=1)
    assert set(first.get_parameters()) == {"policy", *first.optimizer_names}
    second.set_parameters(first.get_parameters(), exact_match=True)
    assert_same(parameters(first), parameters(second))
    second.learn(14)
    with pytest.raises(ValueError):
        second.set_parameters({"policy": first.policy.state_dict()}, exact_match=True)


@pytest.mark.parametrize("distill_from", ["executed", "both"])
def test_no_data_in_the_zip(make_model: MakeModel, tmp_path: Path, distill_from: str) -> None:
    arrays = record_walk(5000)
    model = make_model(Walk(), offline_dataset=arrays, distill_from=distill_from, relabel_freq=2, buffer_size=100_000)
    model.learn(8)
    model.save(tmp_path / "model")
    with zipfile.ZipFile(tmp_path / "model.zip") as file:
        data = json.loads(file.read("data"))
        weights = {name for name in file.namelist() if name.endswith(".pth")}
    assert not {"replay_buffer", "_offline_buffer", "_label_buffer", "_chunk_state", "offline_dataset"} & data.keys()
    assert weights == {"policy.pth", "pytorch_variables.pth", *(f"{name}.pth" for name in model.optimizer_names)}
    assert (tmp_path / "model.zip").stat().st_size < 400_000
    loaded = MODIP.load(tmp_path / "model", env=Walk())  # the data are not needed to act, nor to go on without them
    loaded.learn(5, reset_num_timesteps=False)


def test_loaded_model_takes_its_data_again(make_model: MakeModel, tmp_path: Path) -> None:
    arrays = record_walk()
    model = make_model(Walk(), offline_dataset=arrays).pretrain(3)
    model.save(tmp_path / "model")
    loaded = MODIP.load(tmp_path / "model", env=Walk(), offline_dataset=arrays)
    normalizer = loaded.policy.normalizer.mean.clone()
    loaded.pretrain(2).learn(5)
    assert loaded._n_pretrain_updates == 5
    assert th.equal(loaded.policy.normalizer.mean, normalizer)
    assert loaded.planner_kwargs == model.planner_kwargs


@both_modes
def test_policy_saves_loads_and_pickles_alone(make_model: MakeModel, tmp_path: Path, mode: str) -> None:
    model = make_model(Walk(), inference=mode).learn(12)
    obs = observations(model)
    expected, _ = model.predict(obs, deterministic=True)
    model.policy.save(tmp_path / "policy")
    for policy in (MODIPPolicy.load(tmp_path / "policy"), cloudpickle.loads(cloudpickle.dumps(model.policy))):
        assert policy.inference == mode
        np.testing.assert_array_equal(policy.predict(obs, deterministic=True)[0], expected)


def test_set_env(make_model: MakeModel) -> None:
    model = make_model(vec_walk(2)).learn(20)
    model.set_env(vec_walk(2, terminates=True))
    model.learn(20, reset_num_timesteps=False)
    assert model.num_timesteps == 40
    with pytest.raises(ValueError):
        model.set_env(vec_walk(2, low=-3.0))


def test_load_with_another_number_of_envs(make_model: MakeModel, tmp_path: Path) -> None:
    make_model(vec_walk(1)).learn(12).save(tmp_path / "model")
    loaded = MODIP.load(tmp_path / "model", env=vec_walk(3))
    loaded.learn(9)
    assert (loaded.n_envs, loaded.num_timesteps) == (3, 9)


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


# ------------------------------------------------------------------ VecNormalize


@pytest.mark.parametrize("kind", ["box", "dict"])
def test_vec_normalize(make_model: MakeModel, tmp_path: Path, kind: str) -> None:
    policy = "MultiInputPolicy" if kind == "dict" else "MlpPolicy"
    env = VecNormalize(vec_walk(2, kind=kind))
    model = make_model(env, policy, offline_dataset=record_walk(kind=kind)).learn(20)
    model.save(tmp_path / "model")
    env.save(str(tmp_path / "statistics"))
    normalized = VecNormalize.load(str(tmp_path / "statistics"), vec_walk(2, kind=kind))
    loaded = MODIP.load(tmp_path / "model", env=normalized)
    obs = env.reset()
    np.testing.assert_array_equal(loaded.predict(obs, deterministic=True)[0], model.predict(obs, deterministic=True)[0])
    loaded.learn(10, reset_num_timesteps=False)
    evaluate_policy(loaded, loaded.get_env(), n_eval_episodes=2, warn=False)


def test_offline_data_go_through_vec_normalize(make_model: MakeModel) -> None:
    arrays = record_walk(200)
    for name in ("observations", "next_observations"):
        arrays[name] = 3 + arrays[name] / 10
    env = VecNormalize(vec_walk(), norm_reward=False)
    model = make_model(env, offline_dataset=arrays).pretrain(2)
    np.testing.assert_allclose(env.obs_rms.mean, arrays["observations"].mean(0), atol=1e-2)
    batch = model._sample_batch(200)
    assert batch.observations.mean().abs() < 0.3 and 0.7 < batch.observations.std() < 1.3
    assert model.policy.normalizer.mean.abs().max() < 0.01  # nothing is normalised twice
    model.learn(12)
    stored = model.replay_buffer.observations[:12]
    assert np.abs(stored).max() <= 5 and stored.std() > 0.3  # raw


def test_offline_rewards_have_the_scale_of_online_ones(make_model: MakeModel) -> None:
    arrays = record_walk(200)
    arrays["rewards"] = arrays["rewards"] * 1000
    model = make_model(VecNormalize(vec_walk()), offline_dataset=arrays).pretrain(2)
    assert model._sample_batch(200).rewards.std() < 3  # neither raw nor clipped flat
    assert len(model._sample_batch(200).rewards.unique()) > 20


# ------------------------------------------------------------------ predict


@both_denoisers
@both_modes
@pytest.mark.parametrize("kind", ["box", "dict", "discrete"])
def test_deterministic_predict(make_model: MakeModel, denoiser: str, mode: str, kind: str) -> None:
    policy = "MultiInputPolicy" if kind == "dict" else "MlpPolicy"
    model = make_model(Walk(kind), policy, inference=mode, policy_kwargs={"denoiser": denoiser}).learn(12)
    obs = observations(model, num=5)
    together, _ = model.predict(obs, deterministic=True)
    np.testing.assert_array_equal(model.predict(obs, deterministic=True)[0], together)
    alone = [model.predict(rows_of(obs, i), deterministic=True)[0] for i in range(5)]
    assert alone[0].shape == (1,) and together.shape == (5, 1)
    np.testing.assert_allclose(alone, together, atol=1e-4)
    assert (model.predict(obs)[0] != model.predict(obs)[0]).any()


def test_deterministic_predict_with_a_stochastic_scheduler(make_model: MakeModel) -> None:
    model = make_model(Walk(), policy_kwargs={"sample_scheduler": "DDPMScheduler"})
    obs = observations(model, num=3)
    together, _ = model.predict(obs, deterministic=True)
    np.testing.assert_array_equal(model.predict(obs, deterministic=True)[0], together)
    np.testing.assert_allclose(model.predict(obs[2], deterministic=True)[0], together[2], atol=1e-4)


def test_the_rest_of_a_chunk_is_in_the_state(make_model: MakeModel) -> None:
    model = make_model(Walk(), policy_kwargs={"n_action_steps": 3})
    obs = observations(model, num=2)
    chunk = model.policy.sample_chunks(model.policy.features(model.policy.obs_to_tensor(obs)[0]), deterministic=True)
    state, actions = None, []
    for _ in range(4):
        action, state = model.predict(obs, state, deterministic=True)
        actions.append(action)
    np.testing.assert_allclose(actions[:3], chunk.transpose(0, 1)[:3], atol=1e-6)
    np.testing.assert_allclose(actions[3], actions[0], atol=1e-6)  # a new chunk for the same observation


def test_episode_start_drops_the_chunk_of_that_env_alone(make_model: MakeModel) -> None:
    model = make_model(Walk(), policy_kwargs={"n_action_steps": 3})
    obs = observations(model, num=2)
    first, state = model.predict(obs, deterministic=True)
    kept = [array.copy() for array in state]
    unbroken, _ = model.predict(obs, state, np.array([False, False]), deterministic=True)
    broken, after = model.predict(obs, state, np.array([True, False]), deterministic=True)
    np.testing.assert_allclose(broken[0], first[0], atol=1e-6)
    np.testing.assert_array_equal(broken[1], unbroken[1])
    assert after[1].tolist() == [1, 2]
    assert all((array == before).all() for array, before in zip(state, kept, strict=True))  # the caller's is untouched
    without_state, _ = model.predict(obs, episode_start=np.array([True, True]), deterministic=True)
    np.testing.assert_allclose(without_state, first, atol=1e-6)


def test_planner_warm_starts_from_the_state(make_model: MakeModel) -> None:
    model = make_model(Walk(), inference="planner")
    obs = observations(model, num=2)
    first, state = model.predict(obs, deterministic=True)
    assert state[0].shape == (2, 4, 1) and state[1].tolist() == [1, 1]
    again, _ = model.predict(obs, state, np.array([True, True]), deterministic=True)
    np.testing.assert_allclose(again, first, atol=1e-6)
    moved = (np.clip(state[0] + 0.9, -1, 1), state[1])
    warm, next_state = model.predict(obs, moved, np.array([True, False]), deterministic=True)
    np.testing.assert_allclose(warm[0], first[0], atol=1e-6)
    np.testing.assert_allclose(next_state[0][0], state[0][0], atol=1e-6)
    assert np.abs(next_state[0][1] - state[0][1]).max() > 1e-3  # the search began somewhere else


@both_modes
@pytest.mark.parametrize(("low", "high", "shape"), [(-2.0, 0.5, (1,)), (-0.3, 0.7, (2, 2)), (10.0, 11.0, (3,))])
def test_actions_lie_in_the_box(
    make_model: MakeModel, mode: str, low: float, high: float, shape: tuple[int, ...]
) -> None:
    settings = {"low": low, "high": high, "shape": shape}
    model = make_model(Walk(**settings), inference=mode, rollout_with=mode, offline_dataset=record_walk(**settings))
    model.learn(12)
    obs = np.random.default_rng(0).uniform(-5, 5, (50, 2)).astype(np.float32)
    actions, _ = model.predict(obs)
    assert actions.shape == (50, *shape) and actions.dtype == np.float32
    assert all(model.action_space.contains(action) for action in actions)
    assert model.action_space.contains(model.predict(obs[0])[0])
    assert np.abs(model.replay_buffer.actions).max() <= 1
    assert model._offline_buffer.actions.min() < -0.9 and model._offline_buffer.actions.max() > 0.9


@pytest.mark.parametrize("n_envs", [1, 2])
@pytest.mark.parametrize("shape", [(2,), (2, 2)])
def test_action_noise_is_executed_and_stored(make_model: MakeModel, n_envs: int, shape: tuple[int, ...]) -> None:
    noise = NormalActionNoise(np.full(shape, 5.0), np.zeros(shape))  # so large that the bound is executed
    model = make_model(vec_walk(n_envs, shape=shape), action_noise=noise, learning_starts=0, gradient_steps=0)
    model.learn(6)
    assert (model.replay_buffer.actions[: 6 // n_envs] == 1).all()


# ------------------------------------------------------------------ episodes


def test_chunks_end_with_their_episode_in_learn(make_model: MakeModel) -> None:
    recorder = Recorder()
    model = make_model(
        vec_walk(3), rollout_with="policy", gradient_steps=0, learning_starts=0, policy_kwargs={"n_action_steps": 3}
    )
    model.learn(120, recorder)
    dones = np.array(recorder.dones)
    assert 10 < dones.sum() and not dones.all(axis=1).all()
    expected = np.ones(3)
    previous = np.full((3, 4, 1), np.nan)
    for step, (chunks, positions) in enumerate(recorder.chunk_states):
        np.testing.assert_array_equal(positions, expected)
        np.testing.assert_array_equal(recorder.actions[step], chunks[np.arange(3), positions - 1])
        kept = (chunks == previous).all(axis=(1, 2))
        np.testing.assert_array_equal(kept, positions > 1)  # a new chunk where one begins, and nowhere else
        expected = np.where(dones[step] | (positions == 3), 1, positions + 1)
        previous = chunks


def test_plans_start_afresh_after_an_episode(make_model: MakeModel) -> None:
    model = make_model(vec_walk(3), learning_starts=0, gradient_steps=0).learn(3)
    for _ in range(20):
        recorder = Recorder()
        model.learn(3, recorder, reset_num_timesteps=False)
        np.testing.assert_array_equal(model._chunk_state[1], np.where(recorder.dones[-1], -1, 1))


@pytest.mark.parametrize("limit", ["own", "wrapper"])
def test_a_time_limit_is_no_termination(make_model: MakeModel, limit: str) -> None:
    env = Walk() if limit == "own" else TimeLimit(Walk(terminates=True), max_episode_steps=1)
    model = make_model(env).learn(40)
    assert model.replay_buffer.dones[:40].sum() >= 6
    assert model.replay_buffer.sample_sequences(200, 4).terminations.sum() == 0
    assert model.replay_buffer.sample(200).dones.sum() == 0


def test_terminations_are_learned(make_model: MakeModel) -> None:
    model = make_model(Walk(terminates=True)).learn(40)
    batch = model.replay_buffer.sample_sequences(200, 4)
    assert 0 < batch.terminations.sum() <= batch.mask.sum()
    assert model.replay_buffer.sample(200).dones.sum() > 0


# ------------------------------------------------------------------ ablations


@pytest.mark.parametrize(
    "settings",
    [
        {"critic_target": "policy"},
        {"distill_from": "relabel", "relabel_freq": 4},
        {"distill_from": "both", "relabel_freq": 4},
        {"distill_weighting": "uniform"},
        {"rollout_with": "policy"},
        {"planner_kwargs": {"num_samples": 0}},
        {"n_steps": 1},
        {"offline_fraction": 0.0},
        {"offline_fraction": 1.0},
        {"policy_kwargs": {"terminal_value": "q"}},
        {"policy_kwargs": {"proposal": "gaussian"}},
        {"policy_kwargs": {"terminal_value": "q", "proposal": "gaussian"}, "distill_from": "both"},
    ],
    ids=str,
)
def test_ablations(make_model: MakeModel, settings: dict[str, Any], tmp_path: Path) -> None:
    model = make_model(vec_walk(2, terminates=True), offline_dataset=record_walk(terminates=True), **settings)
    model.learn(24)
    assert all(th.isfinite(value).all() for value in parameters(model).values())
    model.save(tmp_path / "model")
    loaded = MODIP.load(tmp_path / "model", env=vec_walk(2, terminates=True))
    for inference in ("policy", "planner"):
        model.inference = loaded.inference = inference
        obs = observations(model)
        expected, _ = model.predict(obs, deterministic=True)
        np.testing.assert_array_equal(loaded.predict(obs, deterministic=True)[0], expected)
    loaded.learn(4, reset_num_timesteps=False)


@pytest.mark.parametrize("advantage", [-100.0, 100.0, 0.0])
def test_equal_advantages_weigh_the_same(make_model: MakeModel, advantage: float) -> None:
    weights = make_model(Walk())._advantage_weights(th.full((8,), advantage))
    np.testing.assert_allclose(weights, 1.0, rtol=1e-5)


def test_advantage_weights_do_not_depend_on_an_offset_or_a_scale(make_model: MakeModel) -> None:
    advantages = th.tensor([-1.0, 0.0, 1.0, 0.0])  # standard deviation sqrt(1/2)
    expected = np.exp(2 * np.array([-1, 0, 1, 0]) * np.sqrt(2))
    model = make_model(Walk(), distill_beta=2.0)
    for offset, scale in ((0.0, 1.0), (-500.0, 1.0), (500.0, 7.0)):
        weights = model._advantage_weights(offset + scale * advantages)
        np.testing.assert_allclose(weights, expected / expected.mean(), rtol=1e-4)


def test_learns_from_its_first_transition(make_model: MakeModel) -> None:
    model = make_model(Walk(), learning_starts=0).learn(3)
    assert all(th.isfinite(value).all() for value in parameters(model).values())


def test_batches_of_one_sequence(make_model: MakeModel) -> None:
    model = make_model(Walk(), batch_size=1, gradient_steps=2).learn(14)
    assert all(th.isfinite(value).all() for value in parameters(model).values())


# ------------------------------------------------------------------ errors


class Other(gym.Env):
    """An environment that only has spaces."""

    def __init__(self, observation_space: spaces.Space | None = None, action_space: spaces.Space | None = None) -> None:
        self.observation_space = observation_space or spaces.Box(-1, 1, (2,))
        self.action_space = action_space or spaces.Box(-1, 1, (1,))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        return self.observation_space.sample(), {}


IMAGE = spaces.Box(0, 255, (3, 64, 64), np.uint8)
NESTED = spaces.Dict({"a": spaces.Dict({"b": spaces.Box(-1, 1, (1,))})})


@pytest.mark.parametrize(
    ("env", "policy", "message"),
    [
        (Other(action_space=spaces.Discrete(3)), "MlpPolicy", "only supports .*Box.* Discrete"),
        (Other(action_space=spaces.Box(-np.inf, np.inf, (1,))), "MlpPolicy", "finite lower and upper bound"),
        (Other(IMAGE), "MlpPolicy", "The observation is an image .* wrapper"),
        (Other(spaces.Dict({"x": spaces.Box(-1, 1, (1,)), "eye": IMAGE})), "MultiInputPolicy", "'eye' is an image"),
        (Other(NESTED), "MultiInputPolicy", "Nested observation spaces are not supported"),
        (Walk("dict"), "MlpPolicy", "must use `MultiInputPolicy`"),
        (Walk(), "CnnPolicy", "Policy CnnPolicy unknown"),
    ],
)
def test_wrong_spaces(make_model: MakeModel, env: gym.Env, policy: str, message: str) -> None:
    with pytest.raises((ValueError, AssertionError, NotImplementedError), match=message):
        make_model(env, policy)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"policy_kwargs": {"denoiser": "transformer"}}, "denoiser='transformer'.*'unet'"),
        ({"policy_kwargs": {"proposal": "flow"}}, "proposal='flow'.*'gaussian'"),
        ({"policy_kwargs": {"terminal_value": "w"}}, "terminal_value='w'.*'q'"),
        ({"policy_kwargs": {"train_scheduler": "Adam"}}, "'Adam' is not a scheduler"),
        ({"policy_kwargs": {"sample_scheduler": "UNet1DModel"}}, "'UNet1DModel' is not a scheduler"),
        ({"policy_kwargs": {"horizon": 5}}, "horizon=5 .* action_horizon=4"),
        ({"policy_kwargs": {"n_action_steps": 0}}, "n_action_steps=0"),
        ({"policy_kwargs": {"num_inference_steps": 21}}, "num_inference_steps=21 .* num_train_timesteps=20"),
        ({"policy_kwargs": {"latent_dim": 17}}, "latent_dim=17"),
        ({"policy_kwargs": {"net_arch": [16, 32]}}, r"equal widths.*\[16, 32\]"),
        ({"inference": "both"}, "inference='both'.*'planner'"),
        ({"rollout_with": "random"}, "rollout_with='random'.*'planner'"),
        ({"offline_fraction": 1.5}, "offline_fraction=1.5"),
        ({"critic_target": "q"}, "critic_target='q'.*'policy'"),
        ({"distill_from": "none"}, "distill_from='none'.*'both'"),
        ({"distill_weighting": "softmax"}, "distill_weighting='softmax'.*'uniform'"),
        ({"planner_kwargs": {"num_elites": 0}}, "num_elites >= 1"),
        ({"planner_kwargs": {"min_std": 2.0}}, "min_std <= max_std"),
    ],
    ids=str,
)
def test_wrong_settings(make_model: MakeModel, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_model(Walk(), **settings)


def test_unknown_planner_setting(make_model: MakeModel) -> None:
    with pytest.raises((TypeError, ValueError), match="num_sample"):
        make_model(Walk(), planner_kwargs={"num_sample": 3})


def test_wrong_replay_buffer(make_model: MakeModel) -> None:
    with pytest.raises(ValueError, match="replay_buffer_class=ReplayBuffer .* use a SequenceReplayBuffer"):
        make_model(Walk(), replay_buffer_class=ReplayBuffer)
    assert isinstance(make_model(Walk(), replay_buffer_class=SequenceReplayBuffer).replay_buffer, SequenceReplayBuffer)


def test_pretrain_without_data(make_model: MakeModel) -> None:
    with pytest.raises(ValueError, match="offline_dataset"):
        make_model(Walk()).pretrain(5)


@pytest.mark.parametrize("method", ["pretrain", "learn"])
def test_missing_dataset(make_model: MakeModel, method: str) -> None:
    model = make_model(Walk(), offline_dataset="/nowhere/data.hdf5")
    with pytest.raises(FileNotFoundError, match="/nowhere/data.hdf5"):
        getattr(model, method)(5)


def bad_arrays(fault: str) -> dict[str, Any]:
    arrays = record_walk(kind="dict") if fault == "keys" else record_walk(shape=(2,) if fault == "actions" else (1,))
    if fault == "rewards":
        arrays["rewards"][7] = np.nan
    elif fault == "bounds":
        arrays["actions"] = arrays["actions"] * 3
    elif fault == "observations":
        for name in ("observations", "next_observations"):
            arrays[name] = arrays[name][:, :1]
    elif fault == "short":
        arrays["truncations"][:] = True
    elif fault == "names":
        arrays["obs"] = arrays.pop("observations")
    return arrays


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("observations", r"observations have shape \(1,\), expected \(2,\)"),
        ("actions", r"actions have shape \(2,\), expected \(1,\)"),
        ("keys", r"have the keys \['speed', 'x'\], expected none"),
        ("rewards", r"rewards hold 1 NaN .* \[7\]"),
        ("bounds", "outside of Box"),
        ("short", "longest episode has 1 steps"),
        ("names", r"lacks \['observations'\] and has unknown \['obs'\]"),
    ],
)
def test_wrong_data(make_model: MakeModel, fault: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_model(Walk(), offline_dataset=bad_arrays(fault)).learn(5)
