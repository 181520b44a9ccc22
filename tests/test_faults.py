"""Environments and networks that fail: a clear error or a skipped update, and what was learned before is kept."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from algorithms import ALGORITHMS, LEARNERS, PLANNERS, every_algorithm, every_learner, make, random_data
from episodes import in_one_sentence
from stable_baselines3.common.buffers import BaseBuffer
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecNormalize
from walk import Walk, record_walk, vec_walk

from modip_sb3.benchmark.kills import contents
from modip_sb3.faults import MAX_SKIPPED_IN_A_ROW
from modip_sb3.resume import CheckpointCallback

# ------------------------------------------------------------------ what is not finite from the environment


class Faulty(Walk):
    """
    ``Walk`` with a fault in one of its steps.

    :param fault: done to observation, reward and end of the step, or raises
    :param at: number of the step, counted over all episodes; 0 for the first ``reset()``
    """

    def __init__(self, fault: Callable[[Any, float, bool], tuple[Any, float, bool]], at: int, kind: str = "box"):
        super().__init__(kind)
        self.fault, self.at, self.num_steps = fault, at, 0

    def reset(self, **kwargs: Any) -> tuple[Any, dict]:
        obs, info = super().reset(**kwargs)
        if self.at == 0:
            self.at = -1
            obs, *_ = self.fault(obs, 0.0, False)
        return obs, info

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict]:
        obs, reward, terminated, truncated, info = super().step(action)
        self.num_steps += 1
        if self.num_steps == self.at:
            obs, reward, truncated = self.fault(obs, reward, truncated)
        return obs, reward, terminated, truncated, info


def put(value: float, *, ends: bool = False) -> Callable:
    def fault(obs: Any, reward: float, end: bool) -> tuple[Any, float, bool]:
        array = (obs["speed"] if isinstance(obs, dict) else obs).copy()
        array[-1] = value
        return ({**obs, "speed": array} if isinstance(obs, dict) else array), reward, end or ends

    return fault


def pay(reward: float) -> Callable:
    return lambda obs, _, end: (obs, reward, end)


def two_envs(fault: Callable, at: int, kind: str = "box") -> VecEnv:
    envs: list[Callable[[], Walk]] = [lambda: Walk(kind), lambda: Faulty(fault, at, kind)]
    return DummyVecEnv(envs)  # type: ignore[arg-type]


def assert_finite(model: Any) -> None:
    """Nothing that was kept is not a number."""
    arrays = [value for value in vars(model.replay_buffer).values() if isinstance(value, np.ndarray)]
    observations = model.replay_buffer.observations
    arrays += [*observations.values()] if isinstance(observations, dict) else []
    arrays += [value.numpy() for value in model.policy.state_dict().values()]
    if model.get_vec_normalize_env() is not None:
        statistics = model.get_vec_normalize_env().obs_rms
        for each in [*statistics.values()] if isinstance(statistics, dict) else [statistics]:
            arrays += [each.mean, each.var]
        arrays.append(model.get_vec_normalize_env().ret_rms.var)
    assert all(np.isfinite(array).all() for array in arrays)


@every_algorithm
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(
    ("fault", "at", "kind", "message"),
    [
        (put(np.nan), 5, "box", r"an observation .* at time step 10 \(nan\)"),
        (put(-np.inf), 5, "dict", r"an observation 'speed' .* at time step 10 \(-inf\)"),
        (put(np.nan, ends=True), 5, "box", r"a final observation .* at time step 10 \(nan\)"),
        (put(np.nan), 0, "box", r"an observation .* at time step 0 \(nan\)"),
        (pay(np.inf), 5, "box", r"a reward .* at time step 10 \(inf\)"),
        (pay(1e30), 5, "box", r"a reward .* or beyond ±1e\+15, at time step 10 \(1.*e\+30\)"),
    ],
    ids=["nan", "inf-in-dict", "final", "reset", "reward", "too-large"],
)
def test_what_is_not_finite_is_refused(
    algo: str, normalize: bool, fault: Callable, at: int, kind: str, message: str
) -> None:
    env = two_envs(fault, at, kind)
    model = make(algo, VecNormalize(env) if normalize else env)
    with pytest.raises(ValueError, match=f"Environment 1 gave {message}, and nothing of this step was kept") as error:
        model.learn(40)
    in_one_sentence(error, "mend the environment")
    assert model.num_timesteps == 2 * at
    if algo in LEARNERS:
        assert model.replay_buffer.pos == max(at - 1, 0)
    assert_finite(model)
    model.learn(12, reset_num_timesteps=False)  # the fault has passed
    assert model.num_timesteps == 2 * at + 12
    assert_finite(model)


@every_algorithm
@pytest.mark.parametrize("inference", ["policy", "planner"])
def test_actions_of_networks_that_have_diverged_are_not_executed(algo: str, inference: str) -> None:
    env = Faulty(pay(0.0), -1)
    settings = {"inference": inference, "rollout_with": inference} if algo in PLANNERS else {}
    model = make(algo, env, **settings).learn(12)
    for parameter in model.policy.parameters():
        parameter.data.fill_(th.nan)
    num_steps, model._chunk_state = env.num_steps, None
    for deterministic in (False, True):
        with pytest.raises(FloatingPointError, match="not finite.*diverged.*go back") as error:
            model.predict(env.observation_space.sample(), deterministic=deterministic)
    in_one_sentence(error, "lower learning_rate")
    with pytest.raises(FloatingPointError, match="not finite"):
        model.learn(5, reset_num_timesteps=False)
    assert env.num_steps == num_steps


# ------------------------------------------------------------------ updates that are not finite


def poison(buffer: BaseBuffer, name: str, value: float = np.nan) -> None:
    getattr(buffer, name)[:] = value


def learned(model: Any) -> dict[str, Any]:
    """Everything that updates change, without their number and random generators."""
    return {
        name: value.copy()
        for name, value in contents(model).items()
        if not name.startswith(("/rng", "/_n_updates", "/_n_pretrain", "/replay_buffer", "/_chunk", "/_plan"))
    }


def changed(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not np.array_equal(before[name], after[name], equal_nan=True)}


@every_learner
def test_a_bad_batch_changes_nothing(algo: str) -> None:
    settings = {"distill_from": "both", "relabel_freq": 3} if algo == "MODIP" else {}
    model = make(algo, Walk(), **settings).learn(20)
    rewards, before, num_updates = model.replay_buffer.rewards.copy(), learned(model), model._n_updates
    poison(model.replay_buffer, "rewards")
    with pytest.warns(UserWarning, match="Updates are skipped .* train/skipped_updates; 20 in a row end the training"):
        model.train(4, 8)
    assert {name for name in changed(before, learned(model)) if not name.startswith("/_label_buffer")} == set()
    assert model.logger.name_to_value["train/skipped_updates"] == 4
    assert model._n_updates == num_updates + 4
    model.replay_buffer.rewards[:] = rewards
    model.train(2, 8)
    assert changed(before, learned(model)) and model.logger.name_to_value["train/skipped_updates"] == 4
    assert_finite(model)


@every_learner
def test_divergence_ends_the_training(algo: str, tmp_path: Path) -> None:
    model = make(algo, Walk()).learn(20, callback=CheckpointCallback(10, tmp_path))
    poison(model.replay_buffer, "rewards")
    message = f"diverged: {MAX_SKIPPED_IN_A_ROW} updates in a row were skipped, and in .*optimizer the loss is nan"
    with pytest.warns(UserWarning, match="skipped"), pytest.raises(FloatingPointError, match=message) as error:
        model.learn(60, reset_num_timesteps=False)
    in_one_sentence(error, "lower learning_rate")
    assert_finite(ALGORITHMS[algo].cls.resume(tmp_path, Walk(), device="cpu"))


@pytest.mark.parametrize("algo", [algo for algo in ALGORITHMS if algo != "RLPD"])
def test_a_bad_batch_in_the_offline_phase(algo: str, tmp_path: Path) -> None:
    model = make(algo, Walk(), offline_dataset=record_walk())
    model.set_logger(Logger(None, []))
    model.pretrain(2)
    before = learned(model)
    poison(model._offline_buffers[0], "actions")
    logged: list[float] = []
    callback = CheckpointCallback(1, tmp_path)
    model.logger.dump = lambda step: logged.append(model.logger.name_to_value["pretrain/skipped_updates"])
    with pytest.warns(UserWarning, match="pretrain/skipped_updates"):
        model.pretrain(3, callback, log_interval=1)
    assert changed(before, learned(model)) == set() and logged == [1, 2, 3]
    assert model._n_pretrain_updates == 5
    resumed = ALGORITHMS[algo].cls.resume(tmp_path, device="cpu", env=Walk(), offline_dataset=record_walk())
    assert resumed._skipped_updates == 3 and changed(before, learned(resumed)) == set()
    with pytest.warns(UserWarning, match="skipped"), pytest.raises(FloatingPointError, match="has diverged"):
        model.pretrain(MAX_SKIPPED_IN_A_ROW)
    assert changed(before, learned(model)) == set()


def test_the_scale_of_q_stays_where_the_prior_is_not_updated() -> None:
    model = make("TDMPC2").learn(12)
    scale, before = model.q_scale.item(), learned(model)
    model.entropy_coef = float("nan")
    with pytest.warns(UserWarning, match="skipped"):
        model.train(2, 8)
    assert model.q_scale.item() == scale
    different = changed(before, learned(model))
    assert different and not {name for name in different if "actor" in name or "critic_target" in name}


def test_the_moving_average_stays_where_the_policy_is_not_updated() -> None:
    model = make("MODIP", distill_from="relabel").learn(12)
    before = learned(model)
    model._label_buffer.chunks[:] = np.nan
    model.relabel_freq = 10**6
    with pytest.warns(UserWarning, match="skipped"):
        model.train(2, 8)
    different = changed(before, learned(model))
    assert different and not {name for name in different if "actor" in name}


# ------------------------------------------------------------------ environments that raise or die


class Broken(Exception):
    """What an environment raises."""


def breaks(*_: Any) -> Any:
    raise Broken("the motor is hot")


@every_algorithm
@pytest.mark.parametrize("n_envs", [1, 2])
def test_an_environment_that_raises(algo: str, n_envs: int, tmp_path: Path) -> None:
    def make_env() -> Any:
        return Faulty(breaks, 9) if n_envs == 1 else two_envs(breaks, 9)

    model = make(algo, make_env())
    with pytest.raises(Broken, match="the motor is hot"):
        model.learn(30, callback=CheckpointCallback(4 * n_envs, tmp_path))
    assert model.num_timesteps == 8 * n_envs
    obs = model.observation_space.sample()
    action, _ = model.predict(obs, deterministic=True)
    model.save(tmp_path / "model")
    loaded = ALGORITHMS[algo].cls.load(tmp_path / "model")
    np.testing.assert_array_equal(loaded.predict(obs, deterministic=True)[0], action)
    data = {"offline_dataset": random_data(Walk())} if algo == "DiffusionBC" else {}
    resumed = ALGORITHMS[algo].cls.resume(tmp_path, env=make_env(), **data)
    for each in resumed.get_env().envs:
        each.unwrapped.at = -1
    assert resumed.num_timesteps == 8 * n_envs
    model.set_env(vec_walk(n_envs))
    for each in (model, resumed):
        each.learn(30 if each is resumed else 10, reset_num_timesteps=False)
        assert_whole(each)
    with_the_same_env = make(algo, Faulty(breaks, 9))
    with pytest.raises(Broken):
        with_the_same_env.learn(20)
    assert_whole(with_the_same_env.learn(10, reset_num_timesteps=False))


def test_returns_end_where_the_environment_broke() -> None:
    model = make("RLPD", Faulty(breaks, 9), n_steps=3)
    model.action_space.seed(0)
    with pytest.raises(Broken):
        model.learn(20)
    buffer, broken = model.replay_buffer, model.replay_buffer.pos - 1
    assert not buffer.dones[broken].any()
    model.learn(10, reset_num_timesteps=False)
    sample = buffer._get_samples(np.array([broken]))
    assert sample.rewards.item() == pytest.approx(buffer.rewards[broken].item())
    assert (sample.discounts.item(), sample.dones.item()) == (pytest.approx(model.gamma), 0)


def assert_whole(model: Any) -> None:
    """Every step in the buffer is one that ``Walk`` makes."""
    buffer = model.replay_buffer
    if hasattr(buffer, "sample_sequences") and buffer.size() > 1:
        batch = buffer.sample_sequences(500, 3)
        obs, action, is_step = batch.observations, batch.actions, batch.mask.bool()
        expected = th.stack([(obs[:, :-1, 0] + obs[:, :-1, 1]).clamp(-5, 5), action[..., 0]], dim=2)
        assert th.allclose(obs[:, 1:][is_step], expected[is_step], atol=1e-6)
    elif buffer.size() > 1:
        batch = buffer.sample(500)
        positions = (batch.observations[:, 0] + batch.observations[:, 1]).clamp(-5, 5)
        expected = th.stack([positions, batch.actions[:, 0]], dim=1)
        assert th.allclose(batch.next_observations, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("algo", "how"), [("MODIP", "exits"), ("MODIP", "is killed"), ("RLPD", "raises"), ("TDMPC2", "is killed")]
)
def test_the_process_of_an_environment_dies(algo: str, how: str, tmp_path: Path) -> None:
    faults = {"exits": lambda *_: os._exit(3), "is killed": lambda *_: os.kill(os.getpid(), signal.SIGKILL)}
    makers: Any = [lambda: Faulty(faults.get(how, breaks), 15), Walk]
    env = SubprocVecEnv(makers, start_method="fork")
    model = make(algo, env)
    code = {"exits": 3, "is killed": -9, "raises": 1}[how]
    message = rf"The process of environment 0 \(exit code {code}\) has died; .* resume\(\), or here after set_env\(\)"
    with pytest.raises(ChildProcessError, match=message) as error:
        model.learn(40, callback=CheckpointCallback(8, tmp_path))
    assert isinstance(error.value.__cause__, EOFError | ConnectionError)
    resumed = ALGORITHMS[algo].cls.resume
    with pytest.warns(UserWarning, match="A new episode begins"):
        assert resumed(tmp_path, env=vec_walk(2)).learn(40).num_timesteps == 40
    with pytest.raises(ChildProcessError, match="has died"):  # it is still dead
        model.learn(20)
    model.set_env(vec_walk(2))
    assert_whole(model.learn(12))
    for process in env.processes:
        process.terminate()


def test_an_error_of_a_pipe_elsewhere_is_left_alone() -> None:
    def fault(*_: Any) -> Any:
        raise EOFError("of a file")

    env = SubprocVecEnv([Walk], start_method="fork")  # type: ignore[list-item]
    model = make("MODIP", env)
    with pytest.raises(EOFError, match="of a file"):
        model.learn(10, callback=fault)
    env.close()


# ------------------------------------------------------------------ settings


@pytest.mark.parametrize("algo", ["MODIP", "TDMPC2"])
def test_time_limits_are_no_terminations(algo: str) -> None:
    with pytest.raises(ValueError, match="handle_timeout_termination=False would .*: leave it out") as error:
        make(algo, replay_buffer_kwargs={"handle_timeout_termination": False})
    in_one_sentence(error, "handle_timeout_termination")
    make(algo, replay_buffer_kwargs={"handle_timeout_termination": True})
