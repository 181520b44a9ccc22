"""Checks of settings and spaces: one sentence with what was found and what was expected."""

from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.preprocessing import is_image_space


def check_observation_space(observation_space: spaces.Space) -> None:
    """
    :param observation_space: the environment's observation space
    :raises ValueError: for images, for nested dictionaries, and as :func:`check_one_hot` does
    """
    members = observation_space.spaces if isinstance(observation_space, spaces.Dict) else {"": observation_space}
    for key, space in members.items():
        name = f"Observation {key!r}" if key else "The observation"
        if is_image_space(space) or (isinstance(space, spaces.Box) and len(space.shape) >= 3):
            raise ValueError(
                f"{name} is an image ({space}), but MODIP plans on state observations; encode the image into a vector "
                "in an observation wrapper first."
            )
        if not isinstance(space, (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)):
            raise ValueError(f"{name} space {space} is not supported; expected a Box or a Dict of Box spaces.")
    check_one_hot(observation_space)


def check_one_hot(observation_space: spaces.Space) -> None:
    """
    :param observation_space: the environment's observation space
    :raises ValueError: for discrete observations that do not start at zero
    """
    members = observation_space.spaces if isinstance(observation_space, spaces.Dict) else {"": observation_space}
    for key, space in members.items():
        if np.any(getattr(space, "start", 0)):
            raise ValueError(
                f"{f'Observation {key!r}' if key else 'The observation'} space {space} does not start at 0, which SB3 "
                "expects of what it encodes as one-hot vectors; subtract the start in an observation wrapper."
            )


def check_choice(name: str, value: Any, *choices: str) -> None:
    """
    :param name: of an argument
    :param value: what was given
    :param choices: what may be given
    :raises ValueError: if it is none of them
    """
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown; choose from {list(choices)}.")


def check_at_least(minimum: float, **settings: float) -> None:
    """
    :param minimum: smallest value allowed
    :param settings: values by name
    :raises ValueError: if one is smaller
    """
    for name, value in settings.items():
        if not value >= minimum:
            raise ValueError(f"{name}={value} must be at least {minimum}.")


def check_fraction(**settings: float) -> None:
    """
    :param settings: values by name
    :raises ValueError: if one is not between 0 and 1
    """
    for name, value in settings.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name}={value} is not between 0 and 1.")
