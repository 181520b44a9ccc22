"""D4RL's reference returns, which put the score of a random policy at 0 and of an expert at 100."""

import re
from typing import overload

import numpy as np
from numpy.typing import ArrayLike

# Returns of D4RL's random policy and of its expert (Fu et al., 2020, https://arxiv.org/abs/2004.07219).
REFERENCE_SCORES: dict[str, tuple[float, float]] = {
    "halfcheetah": (-280.178953, 12135.0),
    "hopper": (-20.272305, 3234.3),
    "walker2d": (1.629008, 4592.3),
    "kitchen-scripted": (0.0, 4.0),  # its return is the number of subtasks; Minari's kitchen data counts other rewards
}

# "Hopper-v5", "hopper-medium-v2", "mujoco/hopper/medium-v0"; other namespaces (dm_control/hopper-...) are other tasks.
_KNOWN_ID = re.compile(rf"(?:(?:mujoco|d4rl|modip)/)?({'|'.join(REFERENCE_SCORES)})(?:[-/].*)?", re.IGNORECASE)


def has_reference_score(env_id: str | None) -> bool:
    """
    Whether ``normalized_score`` knows a task.

    :param env_id: Id of a Gymnasium environment, or of a D4RL or Minari dataset. None is no task.
    :return: True if the task has reference returns.
    """
    return env_id is not None and _KNOWN_ID.fullmatch(env_id) is not None


@overload
def normalized_score(env_id: str, returns: float) -> float: ...
@overload
def normalized_score(env_id: str, returns: ArrayLike) -> float | np.ndarray: ...
def normalized_score(env_id: str, returns: ArrayLike) -> float | np.ndarray:
    """
    D4RL's normalised return, ``100 * (return - random) / (expert - random)``.

    :param env_id: Id of a Gymnasium environment, or of a D4RL or Minari dataset.
    :param returns: Undiscounted return of one episode, or of several.
    :return: A float for one return, else an array of the same shape.
    :raises ValueError: If the task has no reference returns.
    """
    match = _KNOWN_ID.fullmatch(env_id)
    if match is None:
        raise ValueError(
            f"{env_id!r} has no reference returns: expected a task among {sorted(REFERENCE_SCORES)}, "
            "so report its raw return instead."
        )
    low, high = REFERENCE_SCORES[match[1].lower()]
    scores = 100.0 * (np.asarray(returns, dtype=np.float64) - low) / (high - low)
    return float(scores) if scores.ndim == 0 else scores
