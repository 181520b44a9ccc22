"""Every algorithm of the package with networks small enough to learn in a second, and environments for all of them."""

from operator import attrgetter
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from conftest import SMALL_PLANNER, SMALL_POLICY
from gymnasium import spaces
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.vec_env import VecEnv
from walk import Walk, stack

from modip_sb3 import MODIP
from modip_sb3.baselines import DPPO, DQL, DSRL, IDQL, PARL, RLPD, TDMPC2, DiffusionBC

REPLAY = {"learning_starts": 6, "buffer_size": 200}
OFFLINE = {"pretrain_steps": 3}
ACTOR = {"denoiser": "mlp", "net_arch": [16], "num_inference_steps": 2}


class Algorithm(NamedTuple):
    cls: Any
    settings: dict[str, Any]


ALGORITHMS = {
    "MODIP": Algorithm(
        MODIP, REPLAY | OFFLINE | {"train_freq": 1, "policy_kwargs": SMALL_POLICY, "planner_kwargs": SMALL_PLANNER}
    ),
    "TDMPC2": Algorithm(
        TDMPC2,
        REPLAY
        | OFFLINE
        | {
            "gamma": 0.9,
            "termination_head": True,
            "policy_kwargs": {"net_arch": [16], "encoder_arch": [16], "latent_dim": 16, "num_proposals": 2},
            "planner_kwargs": {"num_samples": 6, "num_elites": 3, "num_iterations": 2},
        },
    ),
    "RLPD": Algorithm(RLPD, REPLAY | {"policy_kwargs": {"net_arch": [16], "n_critics": 3}}),
    "DiffusionBC": Algorithm(DiffusionBC, OFFLINE | {"policy_kwargs": ACTOR}),
    "DQL": Algorithm(DQL, REPLAY | OFFLINE | {"policy_kwargs": ACTOR | {"num_candidates": 4}}),
    "IDQL": Algorithm(IDQL, REPLAY | OFFLINE | {"policy_kwargs": ACTOR | {"num_candidates": 4}}),
    "PARL": Algorithm(
        PARL,
        REPLAY | OFFLINE | {"policy_kwargs": ACTOR | {"num_candidates": 4, "num_refined": 2, "num_gradient_steps": 2}},
    ),
    "DSRL": Algorithm(DSRL, REPLAY | OFFLINE | {"gradient_steps": 1, "policy_kwargs": ACTOR | {"noise_arch": [16]}}),
    "DPPO": Algorithm(DPPO, OFFLINE | {"train_freq": 1, "n_epochs": 2, "policy_kwargs": ACTOR}),
}
PLANNERS = ("MODIP", "TDMPC2")
WITHOUT_REPLAY = ("DiffusionBC", "DPPO")
LEARNERS = [name for name in ALGORITHMS if name not in WITHOUT_REPLAY]  # from replayed environment steps

every_algorithm = pytest.mark.parametrize("algo", ALGORITHMS)
every_learner = pytest.mark.parametrize("algo", LEARNERS)


def make(algo: str, env: Any = None, **kwargs: Any) -> Any:
    """
    A model on ``Walk``, or on another environment. ``DiffusionBC``, which learns from nothing else, gets offline data;
    entries of ``policy_kwargs`` are added to the small ones.
    """
    env = Walk() if env is None else env
    cls, settings = ALGORITHMS[algo]
    if algo == "DiffusionBC" and "offline_dataset" not in kwargs:
        kwargs["offline_dataset"] = random_data(env)
    settings = {"batch_size": 8, "seed": 0, "device": "cpu"} | settings | kwargs
    settings["policy_kwargs"] = ALGORITHMS[algo].settings["policy_kwargs"] | kwargs.get("policy_kwargs", {})
    is_dict = isinstance(env.observation_space, spaces.Dict)
    return cls("MultiInputPolicy" if is_dict else "MlpPolicy", env, **settings)


def random_data(env: gym.Env | VecEnv, num_episodes: int = 3, length: int = 6) -> dict[str, Any]:
    """Episodes of samples from an environment's spaces."""
    env.observation_space.seed(0)
    env.action_space.seed(0)
    num_steps = num_episodes * length
    return {
        "observations": stack([env.observation_space.sample() for _ in range(num_steps)]),
        "actions": stack([env.action_space.sample() for _ in range(num_steps)]),
        "rewards": np.linspace(-1, 1, num_steps),
        "terminations": np.zeros(num_steps, bool),
        "truncations": np.arange(num_steps) % length == length - 1,
        "final_observations": stack([env.observation_space.sample() for _ in range(num_episodes)]),
    }


def optimizers(model: OffPolicyAlgorithm) -> dict[str, th.optim.Optimizer]:
    names = [name for name in model._get_torch_save_params()[0] if name != "policy"]
    return {name: attrgetter(name)(model) for name in names}


def assert_same_state(first: Any, second: Any) -> None:
    """Of optimisers: the same groups, and the same moments to the last bit."""
    assert first["param_groups"] == second["param_groups"]
    assert first["state"].keys() == second["state"].keys()
    for index, entry in first["state"].items():
        assert all(th.equal(value, second["state"][index][name]) for name, value in entry.items())


class Endless(Walk):
    """``Walk`` without an end."""

    def reset(self, **kwargs: Any) -> tuple[Any, dict]:
        obs, info = super().reset(**kwargs)
        self.steps_left = -1
        return obs, info


class Sampler(gym.Env):
    """
    Observations drawn from any space, in episodes of four steps, and actions that must lie in theirs.

    :param observation_space: what observations are drawn from
    :param action_space: what actions must lie in
    """

    def __init__(self, observation_space: spaces.Space, action_space: spaces.Space) -> None:
        self.observation_space, self.action_space = observation_space, action_space
        self.observation_space.seed(0)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self.steps = 0
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        assert self.action_space.contains(action), f"{action!r} is not in {self.action_space}"
        self.steps += 1
        return self.observation_space.sample(), float(np.mean(action)), False, self.steps == 4, {}
