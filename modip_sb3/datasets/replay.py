"""Read the transitions of an SB3 replay buffer as episodes, in the order of time for each environment."""

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer

from modip_sb3.datasets.columns import blocks, by_key, join, unkeyed
from modip_sb3.datasets.offline import OfflineDataset

_SOURCE = "replay buffer"


def read_replay_buffer(buffer: ReplayBuffer) -> OfflineDataset:
    """
    Read an SB3 buffer, also one of Dict observations, or one of this package.

    Actions are unscaled from [-1, 1], in which SB3 stores them, to the bounds of the buffer's action space. The newest
    step of each environment counts as truncated unless it terminated, and so does a step that the next one does not
    continue, which a reset between two ``learn()`` leaves behind. With ``optimize_memory_usage``, SB3 does not
    keep what an episode's last step led to: there its observation is repeated.

    :param buffer: The buffer, which is only read.
    :return: The dataset.
    :raises ValueError: If the buffer is empty, or its actions are not those of a bounded Box.
    """
    space, rows = buffer.action_space, _rows(buffer)
    if not isinstance(space, spaces.Box) or not space.is_bounded():
        raise ValueError(f"Offline dataset {_SOURCE}: holds actions of {space}, expected those of a bounded Box.")
    if len(rows) == 0:
        raise ValueError(f"Offline dataset {_SOURCE}: holds no transitions, expected at least one; collect some first.")
    if not getattr(buffer, "handle_timeout_termination", True):
        warnings.warn(
            "This replay buffer has handle_timeout_termination=False, which does not tell time limits from "
            "terminations: every episode's end counts as a termination.",
            stacklevel=2,
        )
    chunks = (chunk for env in range(buffer.n_envs) for chunk in _chunks(buffer, rows, env, space))
    return OfflineDataset.from_arrays(**join(chunks, len(rows) * buffer.n_envs), source=_SOURCE)


def _keeps_next(buffer: ReplayBuffer) -> bool:
    return getattr(buffer, "next_observations", None) is not None


def _rows(buffer: ReplayBuffer) -> np.ndarray:
    """The rows of whole transitions, from the oldest to the newest."""
    if not buffer.full:
        return np.arange(buffer.pos)
    # Without next observations of its own, the newest step keeps its one in the oldest row; a closed buffer has none
    lost = 0 if _keeps_next(buffer) or getattr(buffer, "closed", False) else 1
    return (np.arange(lost, buffer.buffer_size) + buffer.pos) % buffer.buffer_size


def _chunks(buffer: ReplayBuffer, rows: np.ndarray, env: int, space: spaces.Box) -> Iterator[dict[str, Any]]:
    """One environment's columns, block by block."""
    timeouts = buffer.timeouts[rows, env].astype(bool)
    terminations = buffer.dones[rows, env].astype(bool) & ~timeouts
    truncations = (timeouts | _breaks(buffer, rows, env)) & ~terminations
    truncations[-1] = not terminations[-1]
    for block in blocks(len(rows)):
        taken = rows[block]
        ends = taken[terminations[block] | truncations[block]]
        scaled = buffer.actions[taken, env].reshape(-1, *space.shape)
        columns = {
            "observations": _observations(buffer, taken, env),
            "actions": space.low + 0.5 * (scaled + 1) * (space.high - space.low),
            "rewards": buffer.rewards[taken, env],
            "terminations": terminations[block],
            "truncations": truncations[block],
        }
        yield columns | {"final_observations": _finals(buffer, ends, env, newest=int(rows[-1]))}


def _observations(buffer: ReplayBuffer, rows: np.ndarray, env: int, name: str = "observations") -> Any:
    space: Any = buffer.observation_space
    parts = by_key(space.spaces if isinstance(space, spaces.Dict) else space)
    columns = by_key(getattr(buffer, name))
    # SB3 keeps a discrete observation, which is one number, as a vector of one
    return unkeyed({key: values[rows, env].reshape(-1, *parts[key].shape) for key, values in columns.items()})


def _breaks(buffer: ReplayBuffer, rows: np.ndarray, env: int) -> np.ndarray:
    """Where the next step does not go on from what this one led to."""
    broken = np.zeros(len(rows), bool)
    if _keeps_next(buffer):
        for block in blocks(len(rows) - 1):
            after = by_key(_observations(buffer, rows[block], env, "next_observations"))
            following = by_key(_observations(buffer, rows[1:][block], env))
            for key, values in after.items():
                differs = values.reshape(len(values), -1) != following[key].reshape(len(values), -1)
                broken[block] |= differs.any(1)
    return broken


def _finals(buffer: ReplayBuffer, ends: np.ndarray, env: int, newest: int) -> Any:
    """What the last steps of episodes led to."""
    if _keeps_next(buffer):
        return _observations(buffer, ends, env, "next_observations")
    # The newest step's next observation is in the following row, which for any other starts the next episode
    finals = by_key(_observations(buffer, np.where(ends == newest, (ends + 1) % buffer.buffer_size, ends), env))
    kept = getattr(buffer, "final_observations", {})  # of a SequenceReplayBuffer, by row and environment
    for index, row in enumerate(map(int, ends)):
        if (row, env) in kept:
            for key, value in by_key(kept[row, env]).items():
                finals[key][index] = value
    return unkeyed(finals)
