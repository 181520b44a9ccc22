"""Evaluation with fixed seeds, of the diffusion policy alone and with the planner."""

from dataclasses import dataclass
from functools import partial
from typing import Any, SupportsFloat

import gymnasium as gym
import numpy as np
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from modip_sb3.acting import ActingMode


@dataclass(frozen=True)
class Evaluation:
    """
    Returns and lengths of evaluation episodes, and who acted in them.

    :param inference: who acted
    :param returns: ``(E,)``
    :param lengths: ``(E,)``, in environment steps
    :param successes: ``(E,)`` bool, ``info["is_success"]`` at the end of each episode; None where there is none
    """

    inference: ActingMode
    returns: np.ndarray
    lengths: np.ndarray
    successes: np.ndarray | None = None

    @property
    def mean(self) -> float:
        """Mean return."""
        return float(self.returns.mean())

    @property
    def standard_error(self) -> float:
        """Standard error of the mean return; 0 for a single episode."""
        return float(self.returns.std(ddof=1) / np.sqrt(len(self.returns))) if len(self.returns) > 1 else 0.0

    @property
    def success_rate(self) -> float | None:
        """Share of the episodes that ended in success; None where the environment does not say."""
        return None if self.successes is None else float(self.successes.mean())


def evaluate(
    model: BaseAlgorithm,
    env_id: str,
    n_episodes: int = 20,
    inference: ActingMode = "policy",
    seed: int = 1000,
    deterministic: bool = False,
    n_envs: int = 10,
    env_kwargs: dict[str, Any] | None = None,
) -> Evaluation:
    """
    SB3's ``evaluate_policy`` on fresh environments that start from the same states in every call.

    :param model: an algorithm of this package, or any of SB3's
    :param env_id: Gymnasium id of the environment
    :param n_episodes: number of episodes
    :param inference: who acts, "policy" or "planner"; the model's own setting is put back afterwards. Algorithms
        without the switch ``inference`` have a policy alone
    :param seed: seed of the environments' first states
    :param deterministic: whether actions are a function of the observation
    :param n_envs: environments that run side by side
    :param env_kwargs: keyword arguments of the environment
    :return: the evaluation, in the environment's own rewards
    :raises ValueError: if the planner is to act and the algorithm has none
    """
    previous = getattr(model, "inference", None)
    if previous is None and inference != "policy":
        raise ValueError(f"inference={inference!r}, but {type(model).__name__} has a policy alone; pass 'policy'.")
    n_envs = min(n_envs, n_episodes)
    share = partial(_Share, num_episodes=-(-n_episodes // n_envs))
    env: VecEnv = make_vec_env(env_id, n_envs, seed, env_kwargs=env_kwargs, wrapper_class=share)
    statistics = model.get_vec_normalize_env()
    if statistics is not None and statistics.norm_obs:
        env = VecNormalize(env, training=False, norm_reward=False, norm_obs_keys=statistics.norm_obs_keys)
        env.obs_rms, env.clip_obs, env.epsilon = statistics.obs_rms, statistics.clip_obs, statistics.epsilon
    successes: list[bool] = []

    def record_success(local_variables: dict[str, Any], _: dict[str, Any]) -> None:
        info = local_variables["info"]
        if local_variables["done"] and "is_success" in info:
            successes.append(bool(info["is_success"]))

    try:
        _set_inference(model, inference)
        returns, lengths = evaluate_policy(
            model,
            env,
            n_eval_episodes=n_episodes,
            deterministic=deterministic,
            callback=record_success,
            return_episode_rewards=True,
        )
    finally:
        _set_inference(model, previous)
        env.close()
    return Evaluation(inference, np.asarray(returns), np.asarray(lengths), np.array(successes) if successes else None)


class _Share(gym.Wrapper[Any, Any, Any, Any]):
    """Rests after its share of the episodes, while ``evaluate_policy`` goes on stepping all environments."""

    def __init__(self, env: gym.Env[Any, Any], num_episodes: int) -> None:
        super().__init__(env)
        self.num_left, self.last = num_episodes, None

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        return super().reset(**kwargs) if self.num_left > 0 else (self.last, {})

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:
        if self.num_left == 0:
            return self.last, 0.0, False, False, {}
        self.last, reward, terminated, truncated, info = super().step(action)
        self.num_left -= terminated or truncated
        return self.last, reward, terminated, truncated, info


def _set_inference(model: Any, inference: ActingMode | None) -> None:
    if hasattr(model, "inference"):
        model.inference = model.policy.inference = inference
