"""What SB3 promises of ``learn``, its callbacks and environments, for every algorithm."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch as th
from algorithms import LEARNERS, Endless, every_algorithm, every_learner, make, optimizers, random_data
from gymnasium.wrappers import TimeLimit
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    CheckpointCallback,
    EvalCallback,
    EveryNTimesteps,
    StopTrainingOnMaxEpisodes,
    StopTrainingOnNoModelImprovement,
    StopTrainingOnRewardThreshold,
)
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor, load_results
from stable_baselines3.common.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise, VectorizedActionNoise
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    SubprocVecEnv,
    VecCheckNan,
    VecEnv,
    VecFrameStack,
    VecNormalize,
)
from walk import Walk, assert_same, parameters, vec_walk

# ------------------------------------------------------------------ runs


@every_algorithm
@pytest.mark.parametrize(("n_envs", "vec_env_cls"), [(1, DummyVecEnv), (4, DummyVecEnv), (2, SubprocVecEnv)])
def test_learn_on_vec_envs(algo: str, n_envs: int, vec_env_cls: type[VecEnv]) -> None:
    env = vec_walk(n_envs, vec_env_cls)
    model = make(algo, env)
    before = parameters(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model.learn(13) is model
    env.close()
    assert model.num_timesteps == -(-13 // n_envs) * n_envs  # whole steps of all environments
    assert any(not th.equal(value, before[name]) for name, value in parameters(model).items())
    assert all(value.isfinite().all() for value in parameters(model).values())


class Curve(BaseCallback):
    """Everything that is seen and done while a model learns."""

    def _on_training_start(self) -> None:
        self.steps: list[Any] = []

    def _on_step(self) -> bool:
        if "rewards" in self.locals:
            self.steps.append([self.locals[name].copy() for name in ("actions", "rewards", "dones")])
        return True


def run(algo: str, folder: Path, n_envs: int, seed: int) -> tuple[Any, pd.DataFrame, dict]:
    env = vec_walk(n_envs)
    with_data = n_envs > 1 or algo == "DiffusionBC"
    model = make(algo, env, seed=seed, offline_dataset=random_data(env) if with_data else None)
    model.set_logger(configure(str(folder), ["csv"]))
    curve = Curve()
    model.learn(16, curve, log_interval=1).logger.close()
    evaluation = evaluate_policy(model, vec_walk(2), n_eval_episodes=2, return_episode_rewards=True)
    progress = pd.read_csv(folder / "progress.csv").drop(columns=["time/fps", "time/time_elapsed"])
    return (curve.steps, evaluation), progress, parameters(model)


@every_algorithm
@pytest.mark.parametrize("n_envs", [1, 4])
def test_same_seed_same_curves(algo: str, n_envs: int, tmp_path: Path) -> None:
    first, second, other = (run(algo, tmp_path / str(number), n_envs, seed) for number, seed in enumerate([3, 3, 4]))
    np.testing.assert_equal(first[0], second[0])
    pd.testing.assert_frame_equal(first[1], second[1], check_exact=True)
    assert {name.split("/")[0] for name in first[1]} >= {"rollout", "time"}
    assert_same(first[2], second[2])
    with pytest.raises(AssertionError):
        np.testing.assert_equal(first[0], other[0])
    with pytest.raises(AssertionError):
        assert_same(first[2], other[2])


@every_algorithm
def test_reset_num_timesteps(algo: str) -> None:
    model = make(algo, vec_walk(2)).learn(10)
    model.learn(10, reset_num_timesteps=False)
    assert model.num_timesteps == 20
    model.learn(10, reset_num_timesteps=True)
    assert model.num_timesteps == 10


@every_learner
@pytest.mark.parametrize(
    ("train_freq", "gradient_steps", "updates"), [((4, "step"), 1, 2), (4, -1, 16), (2, 3, 12), ((1, "episode"), 0, 0)]
)
def test_train_freq_and_gradient_steps(algo: str, train_freq: Any, gradient_steps: int, updates: int) -> None:
    n_envs = 1 if isinstance(train_freq, tuple) and train_freq[1] == "episode" else 2
    model = make(algo, vec_walk(n_envs), train_freq=train_freq, gradient_steps=gradient_steps, learning_starts=1)
    model.learn(16)
    assert model._n_updates == updates


@every_learner
@pytest.mark.parametrize("n_envs", [1, 2])
@pytest.mark.parametrize("noise", [NormalActionNoise, OrnsteinUhlenbeckActionNoise])
def test_action_noise(algo: str, n_envs: int, noise: type) -> None:
    action_noise = noise(np.zeros(2), 0.1 * np.ones(2))
    model = make(algo, vec_walk(n_envs, shape=(2,)), action_noise=action_noise).learn(10)
    assert isinstance(model.action_noise, VectorizedActionNoise if n_envs > 1 else noise)
    assert np.abs(model.replay_buffer.actions).max() <= 1


# ------------------------------------------------------------------ learning rates


@every_algorithm
@pytest.mark.parametrize("schedule", [LinearSchedule(1e-2, 0.0, 1.0), lambda left: 1e-2 * left])
def test_learning_rate_schedules(algo: str, schedule: Callable[[float], float]) -> None:
    kwargs: dict[str, Any] = {} if algo == "DiffusionBC" else {"train_freq": 5}
    model = make(algo, learning_rate=schedule, **kwargs).learn(20)
    # The last update is at the end; cloning, which is before the first step, is at the start
    expected = 1e-2 if algo == "DiffusionBC" else 0.0
    for name, optimizer in optimizers(model).items():
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(expected * group.get("lr_scale", 1.0)), name


@every_learner
def test_a_learning_rate_of_zero_changes_no_network(algo: str) -> None:
    targets = {"tau": 0.0}  # else they move by rounding errors
    targets |= {} if algo in ("TDMPC2", "RLPD") else {"actor_tau": 0.0}
    model = make(algo, learning_rate=lambda left: 0.0, **targets)
    before = parameters(model)
    model.learn(12)
    assert model._n_updates > 0
    changed = {name for name, value in parameters(model).items() if not th.equal(value, before[name])}
    assert {name.split(".")[0] for name in changed} <= {"normalizer", "num_actor_updates"}  # statistics and a count


# ------------------------------------------------------------------ callbacks


class Events(BaseCallback):
    """Keeps the order in which it is called."""

    def _on_training_start(self) -> None:
        self.events = ["training_start"]

    def _on_rollout_start(self) -> None:
        self.events.append("rollout_start")

    def _on_step(self) -> bool:
        self.events.append("step")
        return True

    def _on_rollout_end(self) -> None:
        self.events.append("rollout_end")

    def _on_training_end(self) -> None:
        self.events.append("training_end")


@every_algorithm
def test_order_of_callbacks(algo: str) -> None:
    events = Events()
    model = make(algo).learn(3, CallbackList([events]))
    assert events.events == ["training_start", *["rollout_start", "step", "rollout_end"] * 3, "training_end"]
    assert (events.num_timesteps, events.n_calls, events.model) == (3, 3, model)


@every_algorithm
def test_evaluations_and_checkpoints(algo: str, tmp_path: Path) -> None:
    best, stop = StopTrainingOnRewardThreshold(-1e6), StopTrainingOnNoModelImprovement(1000)
    evaluation = EvalCallback(
        vec_walk(2),
        callback_on_new_best=best,
        callback_after_eval=stop,
        eval_freq=4,
        n_eval_episodes=2,
        log_path=str(tmp_path),
        best_model_save_path=str(tmp_path),
        verbose=0,
        warn=False,
    )
    checkpoints = CheckpointCallback(3, str(tmp_path), "model", save_vecnormalize=True)
    checkpoints.save_replay_buffer = algo in LEARNERS  # the others keep none
    every = Events()
    model = make(algo).learn(100, [checkpoints, EveryNTimesteps(2, every), evaluation])
    assert model.num_timesteps == 4  # any reward is above the threshold
    assert every.events.count("step") == 2
    assert np.load(tmp_path / "evaluations.npz")["results"].shape == (1, 2)
    for name in ("best_model", "model_3_steps"):
        loaded = type(model).load(tmp_path / name, env=vec_walk(2))
        assert loaded.num_timesteps == (4 if name == "best_model" else 3)


class StopAfterRolloutStart(BaseCallback):
    def _on_step(self) -> bool:
        return self.n_calls < 5


@every_algorithm
@pytest.mark.parametrize(
    ("callback", "steps"),
    [
        (lambda: StopAfterRolloutStart(), 10),
        (lambda: StopTrainingOnMaxEpisodes(1), None),
        (lambda: lambda values, _: values["self"].num_timesteps < 6, 6),
    ],
    ids=["callback", "episodes", "function"],
)
def test_callbacks_stop_learning(algo: str, callback: Callable[[], Any], steps: int | None) -> None:
    model = make(algo, vec_walk(2))
    model.learn(100, callback())
    assert model.num_timesteps == steps if steps is not None else model.num_timesteps <= 12
    model.learn(4, reset_num_timesteps=False)  # and it can go on


@every_algorithm
def test_progress_bar(algo: str) -> None:
    assert make(algo).learn(4, progress_bar=True).num_timesteps == 4


# ------------------------------------------------------------------ environments


@every_algorithm
@pytest.mark.parametrize("kind", ["box", "dict"])
def test_vec_normalize(algo: str, kind: str, tmp_path: Path) -> None:
    env = VecNormalize(vec_walk(2, kind=kind), clip_obs=2.0)
    model = make(algo, env, **({"offline_dataset": random_data(env)} if algo == "DiffusionBC" else {})).learn(14)
    assert model.get_vec_normalize_env() is env
    seen = 14 + (18 if algo == "DiffusionBC" else 0)
    count = env.obs_rms["x"].count if isinstance(env.obs_rms, dict) else env.obs_rms.count
    assert seen <= count <= seen + 4  # and what reset() returned
    env.save(str(tmp_path / "statistics"))
    model.save(tmp_path / "model")
    again = VecNormalize.load(str(tmp_path / "statistics"), vec_walk(2, kind=kind))
    again.training = False
    loaded = type(model).load(tmp_path / "model", env=again)
    obs = again.reset()
    np.testing.assert_array_equal(loaded.predict(obs, deterministic=True)[0], model.predict(obs, deterministic=True)[0])
    evaluate_policy(loaded, again, n_eval_episodes=2)


@every_algorithm
def test_monitor(algo: str, tmp_path: Path) -> None:
    env = Monitor(Walk(), str(tmp_path / "walk"))
    model = make(algo, env).learn(20)
    results = load_results(str(tmp_path))
    assert len(results) >= 3 and set(results.l) <= {2, 3, 4, 5, 6}
    assert [info["l"] for info in model.ep_info_buffer] == results.l.tolist()
    np.testing.assert_allclose([info["r"] for info in model.ep_info_buffer], results.r, atol=1e-5)
    monitored = make(algo, Walk()).get_env()
    assert monitored.env_is_wrapped(Monitor) == [True]


@every_learner
@pytest.mark.parametrize(("end", "n_envs"), [("wrapper", 1), ("truncates", 2), ("terminates", 2)])
def test_a_time_limit_is_no_termination(algo: str, end: str, n_envs: int) -> None:
    makers: dict[str, Callable[[], Any]] = {
        "wrapper": lambda: TimeLimit(Endless(), 3),
        "truncates": Walk,
        "terminates": lambda: Walk(terminates=True),
    }
    model = make(algo, DummyVecEnv([makers[end] for _ in range(n_envs)]), gradient_steps=0).learn(24)
    buffer = model.replay_buffer
    rows = slice(buffer.pos)
    assert buffer.dones[rows].any()  # every end is one of an episode
    assert bool(buffer.timeouts[rows].any()) == (end != "terminates")
    assert bool(buffer.sample(200).dones.any()) == (end == "terminates")


@every_algorithm
@pytest.mark.parametrize(
    "wrap",
    [lambda env: VecFrameStack(env, 3), lambda env: VecCheckNan(env, raise_exception=True)],
    ids=["stack", "nan"],
)
def test_other_wrappers(algo: str, wrap: Callable[[VecEnv], VecEnv]) -> None:
    env = wrap(vec_walk(2))
    model = make(algo, env).learn(10)
    assert model.get_env() is env and model.observation_space == env.observation_space
    evaluate_policy(model, env, n_eval_episodes=2, warn=False)


@every_learner
def test_hindsight(algo: str) -> None:
    env = BitFlippingEnv(n_bits=3, continuous=True)
    if algo != "RLPD":
        with pytest.raises(ValueError, match="HerReplayBuffer is no class derived from SequenceReplayBuffer"):
            make(algo, env, replay_buffer_class=HerReplayBuffer)
    else:
        assert make(algo, env, replay_buffer_class=HerReplayBuffer, learning_starts=10).learn(20)._n_updates > 0


@every_algorithm
def test_set_env(algo: str) -> None:
    model = make(algo, vec_walk(2)).learn(10)
    other = vec_walk(2)
    model.set_env(other)
    model.learn(10, reset_num_timesteps=False)
    assert (model.num_timesteps, model.get_env()) == (20, other)
    with pytest.raises(AssertionError, match="load"):
        model.set_env(vec_walk(3))
    with pytest.raises(ValueError, match="Action spaces do not match"):
        model.set_env(vec_walk(2, low=-3.0))
    with pytest.raises(ValueError, match="Observation spaces do not match"):
        model.set_env(vec_walk(2, kind="discrete"))
    model.learn(4, reset_num_timesteps=False)
    assert model.get_env() is other
