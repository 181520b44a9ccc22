"""Rollouts of SB3 models: what is recorded is what the environment did and what the model decided."""

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from sb3_contrib import TQC, RecurrentPPO
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import VecEnv, VecFrameStack, VecNormalize
from walk import MakeModel, Walk, rows_of, vec_walk

from modip_sb3 import MODIP
from modip_sb3.datasets.columns import by_key
from modip_sb3.datasets.offline import OfflineDataset
from modip_sb3.datasets.rollout import collect, concatenate, find_algorithm


def trained_sac(env: Any, policy: str = "MlpPolicy", **kwargs: Any) -> SAC:
    settings: dict[str, Any] = {"learning_starts": 10, "batch_size": 8, "buffer_size": 100, "seed": 0}
    return SAC(policy, env, policy_kwargs={"net_arch": [16]}, **settings, **kwargs).learn(20)


def episodes_of(dataset: OfflineDataset) -> list[slice]:
    return [
        slice(end + 1 - length, end + 1)
        for length, end in zip(dataset.episode_lengths, dataset.episode_ends, strict=True)
    ]


def assert_equal_obs(found: Any, expected: Any) -> None:
    assert by_key(found).keys() == by_key(expected).keys()
    for key, values in by_key(expected).items():
        np.testing.assert_array_equal(by_key(found)[key], np.asarray(values, by_key(found)[key].dtype))


def replay(dataset: OfflineDataset, make_env: Callable[[], gym.Env], seed: int, n_envs: int = 1) -> list[int]:
    """
    Do on fresh environments what was recorded, and compare everything that they answer.

    :return: the episodes of each environment
    """
    waiting = episodes_of(dataset)
    numbers = {steps.start: number for number, steps in enumerate(waiting)}
    counts = []
    for rank in range(n_envs):
        env, count = make_env(), 0
        obs, _ = env.reset(seed=seed + rank)
        while steps := next((s for s in waiting if same_obs(rows_of(dataset.observations, s.start), obs)), None):
            waiting.remove(steps)
            for step in range(steps.start, steps.stop):
                assert_equal_obs(rows_of(dataset.observations, step), obs)
                obs, reward, terminated, truncated, _ = env.step(dataset.actions[step])
                assert dataset.rewards[step] == np.float32(reward)
                assert dataset.terminations[step] == terminated
                assert dataset.truncations[step] == (truncated and not terminated)
            assert_equal_obs(rows_of(dataset.final_observations, numbers[steps.start]), obs)
            obs, _ = env.reset()
            count += 1
        counts.append(count)
    assert waiting == []
    return counts


def same_obs(found: Any, expected: Any) -> bool:
    return all(np.array_equal(by_key(found)[key], np.float32(values)) for key, values in by_key(expected).items())


@pytest.mark.parametrize("terminates", [True, False])
@pytest.mark.parametrize("kind", ["box", "dict"])
def test_recorded_is_what_the_environment_did(kind: str, terminates: bool) -> None:
    model = trained_sac(vec_walk(kind=kind), "MultiInputPolicy" if kind == "dict" else "MlpPolicy")
    dataset = collect(model, vec_walk(n_envs=3, kind=kind, terminates=terminates), num_episodes=11, seed=5)
    assert replay(dataset, lambda: Walk(kind=kind, terminates=terminates), seed=5, n_envs=3) == [3, 4, 4]
    ended = dataset.terminations if terminates else dataset.truncations
    assert ended.sum() == dataset.num_episodes == 11
    assert dataset.env_id is None and dataset.source == "rollouts of SAC"
    dataset.check(model.observation_space, model.action_space, min_length=2)


def test_pendulum_by_id() -> None:
    model = trained_sac("Pendulum-v1")
    dataset = collect(model, "Pendulum-v1", num_steps=201, seed=3)
    assert replay(dataset, lambda: gym.make("Pendulum-v1"), seed=3) == [2]
    assert dataset.episode_lengths.tolist() == [200, 200] and dataset.truncations.sum() == 2
    assert dataset.env_id == "Pendulum-v1"


def test_steps_are_whole_episodes() -> None:
    model = trained_sac(vec_walk())
    dataset = collect(model, vec_walk(), num_steps=30, seed=0)
    assert dataset.num_transitions >= 30 > dataset.num_transitions - dataset.episode_lengths[-1]
    several = collect(model, vec_walk(n_envs=4), num_steps=30, seed=0)
    assert 30 <= several.num_transitions < 30 + 4 * 6
    few = collect(model, vec_walk(n_envs=4), num_episodes=2, seed=0)
    assert few.num_episodes == 2


def test_a_seed_repeats_the_rollouts_and_actions_are_sampled() -> None:
    model, env = trained_sac(vec_walk()), Walk()
    first, again = (collect(model, env, num_episodes=5, seed=1) for _ in range(2))
    other = collect(model, env, num_episodes=5, seed=2)
    sure = collect(model, env, num_episodes=5, seed=1, deterministic=True)
    np.testing.assert_array_equal(first.actions, again.actions)
    assert not np.array_equal(first.actions[:2], other.actions[:2])
    np.testing.assert_array_equal(sure.actions, model.predict(sure.observations, deterministic=True)[0])
    np.testing.assert_array_equal(first.observations[0], sure.observations[0])
    assert not np.array_equal(first.actions[:2], sure.actions[:2])


def act_by_hand(model: BaseAlgorithm, dataset: OfflineDataset, keep_state: bool = True) -> np.ndarray:
    """What the model does along each episode, one environment at a time."""
    actions: list[np.ndarray] = []
    for steps in episodes_of(dataset):
        state, start = None, np.ones(1, bool)
        for step in range(steps.start, steps.stop):
            obs = np.asarray(dataset.observations)[[step]]
            action, next_state = model.predict(obs, state=state, episode_start=start, deterministic=True)
            state, start = (next_state, np.zeros(1, bool)) if keep_state else (None, np.ones(1, bool))
            actions.extend(action)
    return np.array(actions)


def recurrent_ppo(env: VecEnv) -> BaseAlgorithm:
    kwargs = {"net_arch": [16], "lstm_hidden_size": 16}
    model = RecurrentPPO("MlpLstmPolicy", env, n_steps=8, batch_size=8, n_epochs=1, policy_kwargs=kwargs, seed=0)
    return model.learn(16)


@pytest.mark.parametrize("algorithm", ["RecurrentPPO", "MODIP"])
def test_state_lasts_as_long_as_the_episode(algorithm: str, make_model: MakeModel) -> None:
    model = (
        recurrent_ppo(vec_walk())
        if algorithm == "RecurrentPPO"
        else make_model(vec_walk(), policy_kwargs={"n_action_steps": 4})
    )
    dataset = collect(model, vec_walk(n_envs=2), num_episodes=8, deterministic=True, seed=0)
    assert dataset.episode_lengths.max() > 4
    np.testing.assert_allclose(dataset.actions, act_by_hand(model, dataset), atol=1e-5)
    assert not np.allclose(dataset.actions, act_by_hand(model, dataset, keep_state=False), atol=1e-5)


def test_normalised_models_see_normalised_observations_and_raw_ones_are_recorded() -> None:
    env = VecNormalize(vec_walk(n_envs=2))
    model = PPO("MlpPolicy", env, n_steps=64, batch_size=64, n_epochs=1, seed=0).learn(128)
    mean = env.obs_rms.mean.copy()  # type: ignore[attr-defined]
    dataset = collect(model, env, num_episodes=6, deterministic=True, seed=4)
    replay(dataset, Walk, seed=4, n_envs=2)
    raw = np.asarray(dataset.observations)
    np.testing.assert_allclose(dataset.actions, model.predict(env.normalize_obs(raw), deterministic=True)[0], atol=1e-5)
    assert not np.allclose(dataset.actions, model.predict(raw, deterministic=True)[0], atol=1e-3)
    np.testing.assert_array_equal(env.obs_rms.mean, mean)  # type: ignore[attr-defined]


def test_state_dependent_noise_is_drawn_for_every_episode() -> None:
    model = trained_sac(vec_walk(), use_sde=True)
    dataset = collect(model, vec_walk(), num_episodes=3, seed=0)
    with th.no_grad():
        obs = th.as_tensor(np.asarray(dataset.observations))
        one_noise = model.actor(obs, deterministic=False).numpy()  # the last episode's
    last = episodes_of(dataset)[-1]
    np.testing.assert_allclose(dataset.actions[last], one_noise[last], atol=1e-5)
    assert not np.allclose(dataset.actions[: last.start], one_noise[: last.start], atol=1e-3)


def test_concatenate() -> None:
    model = trained_sac(vec_walk(kind="dict"), "MultiInputPolicy")
    first, second = (collect(model, vec_walk(kind="dict"), num_episodes=3, seed=seed) for seed in (0, 9))
    both = concatenate([first, second])
    assert both.episode_lengths.tolist() == [*first.episode_lengths, *second.episode_lengths]
    assert_equal_obs(rows_of(both.observations, slice(first.num_transitions, None)), second.observations)
    assert_equal_obs(rows_of(both.final_observations, slice(3, None)), second.final_observations)
    np.testing.assert_array_equal(both.rewards[: first.num_transitions], first.rewards)


def test_algorithms_by_name() -> None:
    for name, expected in {"sac": SAC, "TQC": TQC, "recurrentppo": RecurrentPPO, "modip_sb3.MODIP": MODIP}.items():
        assert find_algorithm(name) is expected
    for name, part in {
        "sacc": "expected one of ['a2c', 'ars', 'crossq'",
        "modip_sb3.Nothing": "Nothing",
        "no_such_package.SAC": "no_such_package",
        "modip_sb3.OfflineDataset": "dotted path of an SB3 algorithm",
    }.items():
        with pytest.raises(ValueError) as error:
            find_algorithm(name)
        assert part in str(error.value) and str(error.value).endswith(".")


def test_what_cannot_be_recorded() -> None:
    model = trained_sac(vec_walk())
    for amounts in ({}, {"num_steps": 1, "num_episodes": 1}):
        with pytest.raises(ValueError, match="give exactly one"):
            collect(model, Walk(), **amounts)
    with pytest.raises(ValueError, match="num_episodes=0 must be at least 1"):
        collect(model, Walk(), num_episodes=0)
    with pytest.raises(ValueError, match="expected a Box"):
        collect(PPO("MlpPolicy", "CartPole-v1"), "CartPole-v1", num_episodes=1)
    with pytest.raises(ValueError, match="spaces do not match"):
        collect(model, "Pendulum-v1", num_episodes=1)
    with pytest.raises(ValueError, match="expected it outermost"):
        collect(model, VecFrameStack(VecNormalize(vec_walk()), 1), num_episodes=1)
