"""Evaluations can be repeated, count their episodes, and leave the model as it was."""

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3 import SAC
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecNormalize
from walk import Walk

from modip_sb3 import MODIP
from modip_sb3.evaluation import Evaluation, evaluate

MakeModel = Callable[..., MODIP]

SHORT = {"max_episode_steps": 8}


@pytest.mark.parametrize("inference", ["policy", "planner"])
def test_the_same_seed_gives_the_same_numbers(make_model: MakeModel, inference: str) -> None:
    model = make_model()

    def run(seed: int, deterministic: bool) -> np.ndarray:
        th.manual_seed(0)  # the starts depend on evaluate's seed, sampled actions on torch's
        return evaluate(model, "Pendulum-v1", 3, inference, seed, deterministic, env_kwargs=SHORT).returns

    for deterministic in (True, False):
        first = run(1, deterministic)
        np.testing.assert_array_equal(run(1, deterministic), first)
        assert (run(2, deterministic) != first).all()


@pytest.mark.parametrize(("n_episodes", "n_envs"), [(1, 10), (3, 10), (5, 2)])
def test_number_of_episodes(make_model: MakeModel, n_episodes: int, n_envs: int) -> None:
    result = evaluate(make_model(), "Pendulum-v1", n_episodes, n_envs=n_envs, env_kwargs=SHORT)
    assert result.returns.shape == (n_episodes,)
    assert result.lengths.tolist() == [8] * n_episodes
    assert result.inference == "policy"
    assert len(set(result.returns)) == n_episodes


class CountedWalk(Walk):
    """Counts the steps of all its instances."""

    metadata = {"render_modes": ["rgb_array"]}
    num_steps = 0

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict]:
        CountedWalk.num_steps += 1
        return super().step(action)


gym.register("modip-test/counted-walk-v0", CountedWalk)


def test_environments_rest_after_their_share(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CountedWalk, "num_steps", 0)
    model = make_model(CountedWalk())
    plain = make_vec_env(CountedWalk, 3, seed=1000)
    expected = evaluate_policy(model, plain, 12, deterministic=True, return_episode_rewards=True)
    assert CountedWalk.num_steps > sum(expected[1])
    CountedWalk.num_steps = 0
    result = evaluate(model, "modip-test/counted-walk-v0", 12, deterministic=True, n_envs=3)
    assert CountedWalk.num_steps == result.lengths.sum()
    np.testing.assert_allclose((result.returns, result.lengths), expected, rtol=1e-6)


def test_mean_and_standard_error() -> None:
    result = Evaluation("policy", np.array([1.0, 2.0, 3.0, 6.0]), np.full(4, 8))
    assert result.mean == 3.0
    assert result.standard_error == pytest.approx(np.sqrt(14 / 3) / 2)  # Σ (x - 3)² = 14, over n - 1, over n
    assert Evaluation("policy", np.array([5.0]), np.array([8])).standard_error == 0.0


def test_the_model_acts_as_before(make_model: MakeModel) -> None:
    model = make_model(inference="policy")
    evaluate(model, "Pendulum-v1", 1, "planner", env_kwargs=SHORT)
    assert model.inference == "policy"
    assert model.policy.inference == "policy"
    with pytest.raises(Exception, match="NoSuchEnv"):
        evaluate(model, "NoSuchEnv-v0", 1, "planner")
    with pytest.raises(ValueError):
        evaluate(model, "CartPole-v1", 1, "planner")  # fails at the first observation
    assert model.inference == model.policy.inference == "policy"


def test_the_planner_is_another_actor(make_model: MakeModel) -> None:
    model = make_model()
    policy, planner = (
        evaluate(model, "Pendulum-v1", 2, inference, deterministic=True, env_kwargs=SHORT)
        for inference in ("policy", "planner")
    )
    assert (policy.inference, planner.inference) == ("policy", "planner")
    assert (policy.returns != planner.returns).all()


def test_a_model_with_vec_normalize_sees_normalised_observations(make_model: MakeModel) -> None:
    env = VecNormalize(make_vec_env("Pendulum-v1"))
    model = make_model(env).learn(12)
    fresh = VecNormalize(make_vec_env("Pendulum-v1", 2, 1000, env_kwargs=SHORT), training=False, norm_reward=False)
    fresh.obs_rms = env.obs_rms
    expected, _ = evaluate_policy(model, fresh, 2, return_episode_rewards=True)
    result = evaluate(model, "Pendulum-v1", 2, deterministic=True, env_kwargs=SHORT)
    np.testing.assert_allclose(result.returns, expected, rtol=1e-5)


def test_an_algorithm_of_sb3() -> None:
    model = SAC("MlpPolicy", "Pendulum-v1", policy_kwargs={"net_arch": [8]}, buffer_size=10)
    assert evaluate(model, "Pendulum-v1", 2, deterministic=True, env_kwargs=SHORT).returns.shape == (2,)
    with pytest.raises(ValueError, match="inference='planner', but SAC has a policy alone"):
        evaluate(model, "Pendulum-v1", 2, "planner", env_kwargs=SHORT)
