"""Roll out a Stable-Baselines3 model into an ``OfflineDataset``."""

from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import sb3_contrib
import stable_baselines3
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.utils import check_for_correct_spaces, set_random_seed
from stable_baselines3.common.vec_env import VecEnv, VecNormalize, unwrap_vec_normalize
from tqdm import tqdm

from modip_sb3.checks import check_count, check_observation_space
from modip_sb3.datasets.columns import by_key, join, unkeyed
from modip_sb3.datasets.offline import OfflineDataset

COLUMNS = ("observations", "actions", "rewards", "terminations", "truncations", "final_observations")


def find_algorithm(name: str) -> type[BaseAlgorithm]:
    """
    The class of an algorithm.

    :param name: An algorithm that SB3 or sb3-contrib exports, in any case, such as ``"sac"``; or the dotted path of a
        class, such as ``"modip_sb3.MODIP"``.
    :return: The class.
    :raises ValueError: If there is none of that name.
    """
    exported = {
        value.__name__.lower(): value
        for package in (stable_baselines3, sb3_contrib)
        for value in vars(package).values()
        if isinstance(value, type) and issubclass(value, BaseAlgorithm)
    }
    found: Any = exported.get(name.lower())
    module, _, attribute = name.rpartition(".")
    if module:
        try:
            found = getattr(import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"Algorithm {name}: not found ({error}), expected a class; check its path.") from error
    if not (isinstance(found, type) and issubclass(found, BaseAlgorithm)):
        raise ValueError(
            f"Algorithm {name}: unknown, expected one of {sorted(exported)} or the dotted path of an SB3 algorithm, "
            "such as modip_sb3.MODIP."
        )
    return found


def load_model(path: str | PathLike[str], algorithm: type[BaseAlgorithm], env: VecEnv) -> BaseAlgorithm:
    """
    Load a model to act with. SB3 unpickles its zip files: load only those of people you trust. What ``save_weights``
    of this package's algorithms wrote is not unpickled.

    :param path: The zip file, with or without its suffix, or a ``.safetensors`` file.
    :param algorithm: The class that saved it.
    :param env: The environment to act in, normalised if the model was trained so.
    :return: The model.
    :raises FileNotFoundError: If there is no such file.
    :raises ValueError: If it cannot be loaded as such a model, or is of other spaces than the environment.
    """
    path = Path(path).expanduser()
    if path.suffix == ".safetensors":
        from_weights = getattr(algorithm, "from_weights", None)
        if from_weights is None:
            raise ValueError(f"{path}: {algorithm.__name__} reads no weights, expected an algorithm of modip_sb3.")
        return from_weights(path, env)
    if not path.is_file() and not path.with_name(f"{path.name}.zip").is_file():
        raise FileNotFoundError(f"Checkpoint {path}: no such file, expected a zip file that SB3 saved; check the path.")
    try:
        return algorithm.load(path, env=env)
    except Exception as error:  # what is unpickled can raise anything
        raise ValueError(
            f"Checkpoint {path}: cannot be loaded as {algorithm.__name__} for this environment ({error}); check which "
            "algorithm, environment and normalisation it was trained with."
        ) from error


def load_vec_normalize(path: str | PathLike[str], env: VecEnv) -> VecNormalize:
    """
    Load the statistics that a model's observations were normalised with. Like a checkpoint, they are unpickled.

    :param path: What ``VecNormalize.save`` wrote.
    :param env: The environment to normalise.
    :return: The environment, normalised.
    :raises FileNotFoundError: If there is no such file.
    :raises ValueError: If it holds no statistics of such observations.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"Statistics {path}: no such file, expected one of VecNormalize.save; check the path.")
    try:
        return VecNormalize.load(str(path), env)
    except Exception as error:  # what is unpickled can raise anything
        raise ValueError(
            f"Statistics {path}: cannot be loaded for this environment ({error}), expected a file of "
            "VecNormalize.save; check which environment it was trained with."
        ) from error


def collect(
    model: BaseAlgorithm,
    env: str | gym.Env | VecEnv,
    num_steps: int | None = None,
    num_episodes: int | None = None,
    deterministic: bool = False,
    seed: int | None = None,
    progress_bar: bool = False,
) -> OfflineDataset:
    """
    Record whole episodes of a model that acts in an environment.

    Each of several environments records its share, in whole episodes: taking whichever ended first would prefer short
    episodes. What a ``VecNormalize`` around them normalises is for the model alone; the data has what the environment
    said.

    :param model: Any SB3 or sb3-contrib algorithm; the state of recurrent and of chunked policies is kept.
    :param env: A Gymnasium id, an environment, or a VecEnv with ``VecNormalize``, if any, outermost.
    :param num_steps: Transitions to record at least; whole episodes go beyond it.
    :param num_episodes: Episodes to record, in place of ``num_steps``.
    :param deterministic: Take the model's most likely actions instead of sampling them.
    :param seed: Seed of the environments and of the global generators that actions are sampled with.
    :param progress_bar: Show a progress bar.
    :return: The episodes in the order in which they ended, with raw observations and rewards.
    :raises ValueError: If model and environment do not fit together, or the number to record is not given once.
    """
    if (num_steps is None) == (num_episodes is None):
        raise ValueError(f"num_steps={num_steps} and num_episodes={num_episodes}: give exactly one of them.")
    unit, total = ("steps", num_steps) if num_steps is not None else ("episodes", num_episodes)
    assert total is not None
    check_count(1, **{f"num_{unit}": total})
    vec_env = env if isinstance(env, VecEnv) else make_vec_env(env if isinstance(env, str) else lambda: env)
    try:
        _check_fit(model, vec_env)
        if seed is not None:
            set_random_seed(seed)
            vec_env.seed(seed)
        with tqdm(total=total, desc="collect", unit=f" {unit}", disable=not progress_bar) as bar:
            episodes = _record(model, vec_env, total, unit, deterministic, bar)
        spec = vec_env.get_attr("spec")[0]
    finally:
        if isinstance(env, str):
            vec_env.close()
    dataset = concatenate(episodes, source=f"rollouts of {type(model).__name__}")
    return dataset if spec is None else replace(dataset, env_id=spec.id)


def concatenate(datasets: Sequence[OfflineDataset], source: str = "several datasets") -> OfflineDataset:
    """
    Join datasets of one environment.

    :param datasets: At least one, with observations and actions of the same shapes.
    :param source: What errors call the whole.
    :return: All their episodes in one dataset, which is from the first one's environment.
    """
    chunks = ({name: getattr(dataset, name) for name in COLUMNS} for dataset in datasets)
    columns = join(chunks, sum(dataset.num_transitions for dataset in datasets))
    return OfflineDataset(**columns, env_id=datasets[0].env_id, source=source)


def _check_fit(model: BaseAlgorithm, env: VecEnv) -> None:
    check_observation_space(env.observation_space)
    if not isinstance(env.action_space, spaces.Box):
        raise ValueError(f"The action space is {env.action_space}, expected a Box; choose another environment.")
    if unwrap_vec_normalize(env) is not None and not isinstance(env, VecNormalize):
        raise ValueError(f"VecNormalize is inside of {type(env).__name__}, expected it outermost; wrap it last.")
    check_for_correct_spaces(env, model.observation_space, model.action_space)


def _record(
    model: BaseAlgorithm, env: VecEnv, total: int, unit: str, deterministic: bool, bar: tqdm
) -> list[OfflineDataset]:
    """Each episode as a dataset of its own."""
    normalize = env if isinstance(env, VecNormalize) else None
    raw_env = env if normalize is None else normalize.venv
    quotas = (total + np.arange(env.num_envs)) // env.num_envs
    counts = np.zeros_like(quotas)
    running: list[list[tuple[Any, ...]]] = [[] for _ in quotas]
    episodes = []
    policy: Any = model.policy
    obs: Any = raw_env.reset()
    state, episode_start = None, np.ones(env.num_envs, bool)
    while (counts < quotas).any():
        if model.use_sde and episode_start.any():
            policy.reset_noise(env.num_envs)  # gSDE's noise is a function of the state until it is drawn anew
        seen = obs if normalize is None else normalize.normalize_obs(obs)
        actions, state = model.predict(seen, state=state, episode_start=episode_start, deterministic=deterministic)
        next_obs, rewards, episode_start, infos = raw_env.step(actions)
        for i in np.flatnonzero(counts < quotas):
            running[i].append(({key: values[i].copy() for key, values in by_key(obs).items()}, actions[i], rewards[i]))
            if episode_start[i]:
                episodes.append(_episode(running[i], infos[i]))
                added = len(running[i]) if unit == "steps" else 1
                counts[i] += added
                bar.update(added)
                running[i] = []
        obs = next_obs
    return episodes


def _episode(steps: list[tuple[Any, ...]], last_info: dict[str, Any]) -> OfflineDataset:
    """
    :param steps: Observation by key, action and reward of each step.
    :param last_info: Of the last step, in which a VecEnv tells how the episode ended, and what came after it.
    """
    observations, actions, rewards = zip(*steps, strict=True)
    is_last = np.arange(len(steps)) == len(steps) - 1
    timed_out = last_info.get("TimeLimit.truncated", False)
    final = {key: np.asarray(values)[None] for key, values in by_key(last_info["terminal_observation"]).items()}
    return OfflineDataset.from_arrays(
        observations=unkeyed({key: np.stack([row[key] for row in observations]) for key in observations[0]}),
        actions=np.stack(actions),
        rewards=np.stack(rewards),
        terminations=is_last & (not timed_out),
        truncations=is_last & timed_out,
        final_observations=unkeyed(final),
    )
