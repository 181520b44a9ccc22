"""A small environment, and what the tests of the algorithm share."""

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv

from modip_sb3 import MODIP

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
