"""Checks of settings and spaces: one sentence with what was found and what was expected."""

import inspect
import math
import reprlib
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, CombinedExtractor
from stable_baselines3.common.type_aliases import TrainFreq

BUFFER_ARGUMENTS = ("buffer_size", "observation_space", "action_space", "device", "n_envs", "optimize_memory_usage")
POLICY_ARGUMENTS = ("observation_space", "action_space", "lr_schedule")
# ------------------------------------------------------------------ spaces


def _members(observation_space: spaces.Space) -> dict[str, spaces.Space]:
    """Observation spaces by what errors call them."""
    if isinstance(observation_space, spaces.Dict):
        return {f"Observation {key!r}": space for key, space in observation_space.spaces.items()}
    return {"The observation": observation_space}


def check_observation_space(observation_space: spaces.Space) -> None:
    """
    :param observation_space: the environment's observation space
    :raises ValueError: for images, for nested dictionaries, for nothing to see, and as :func:`check_one_hot` does
    """
    check_kinds_of_space(observation_space)
    members = _members(observation_space)
    for name, space in members.items():
        if is_image_space(space) or (isinstance(space, spaces.Box) and len(space.shape) >= 3):
            raise ValueError(
                f"{name} is an image ({space}), but MODIP plans on state observations; encode the image into a vector "
                "in an observation wrapper first."
            )
    if not any(math.prod(space.shape or ()) for space in members.values()):
        raise ValueError(f"The observation space {observation_space} holds no numbers, expected at least one.")
    check_one_hot(observation_space)


def check_kinds_of_space(observation_space: spaces.Space) -> None:
    """
    :param observation_space: the environment's observation space
    :raises ValueError: for what is no vector, such as sequences and texts; nested dictionaries SB3 refuses itself
    """
    for name, space in _members(observation_space).items():
        vectors = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)
        if not isinstance(space, (*vectors, spaces.Dict)):
            raise ValueError(f"{name} space {space} is not supported; expected a Box or a Dict of Box spaces.")


def check_one_hot(observation_space: spaces.Space) -> None:
    """
    :param observation_space: the environment's observation space
    :raises ValueError: for discrete observations that do not start at zero
    """
    for name, space in _members(observation_space).items():
        if np.any(getattr(space, "start", 0)):
            raise ValueError(
                f"{name} space {space} does not start at 0, which SB3 "
                "expects of what it encodes as one-hot vectors; subtract the start in an observation wrapper."
            )


def check_action_space(action_space: spaces.Space) -> None:
    """
    :param action_space: the environment's action space
    :raises ValueError: if it is no Box of finite, distinct bounds for real numbers
    """
    if not isinstance(action_space, spaces.Box) or not np.issubdtype(action_space.dtype, np.floating):
        raise ValueError(f"The action space {action_space} is not supported; expected a Box of floating-point numbers.")
    if not math.prod(action_space.shape):
        raise ValueError(f"The action space {action_space} holds no numbers, expected at least one.")
    low, high = action_space.low.astype(np.float64), action_space.high.astype(np.float64)
    if not (np.isfinite(low) & np.isfinite(high) & (low < high)).all():
        raise ValueError(
            f"The action space {action_space} has bounds that are not finite or leave no room; expected low < high in "
            "each dimension: set the bounds, or drop what is fixed in an action wrapper."
        )


# ------------------------------------------------------------------ single settings


def _shown(value: Any) -> str:
    """What was found, in a few words of one line."""
    return " ".join(reprlib.repr(value).split())


def check_choice(name: str, value: Any, *choices: Any) -> None:
    """
    :param name: of an argument
    :param value: what was given
    :param choices: what may be given
    :raises ValueError: if it is none of them
    """
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        raise ValueError(f"{name}={_shown(value)} is unknown; choose from {list(choices)}.")


def _check_real(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"{name}={_shown(value)} is no number; give one, without quotes or brackets.")


def check_number(**settings: Any) -> None:
    """
    :param settings: values by name
    :raises ValueError: if one is no number, or infinite, or NaN
    """
    for name, value in settings.items():
        _check_real(name, value)
        if not math.isfinite(value):
            raise ValueError(f"{name}={value} is not finite; give a finite number.")


def check_count(minimum: int, **settings: Any) -> None:
    """
    :param minimum: smallest value allowed
    :param settings: values by name
    :raises ValueError: if one is smaller, or no whole number
    """
    for name, value in settings.items():
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise ValueError(f"{name}={_shown(value)} is no whole number; give one, without point, quotes or brackets.")
        if value < minimum:
            raise ValueError(f"{name}={value} must be at least {minimum}.")


def check_at_least(minimum: float, **settings: Any) -> None:
    """
    :param minimum: smallest value allowed
    :param settings: values by name
    :raises ValueError: if one is smaller, or no finite number
    """
    for name, value in settings.items():
        _check_real(name, value)
        if not minimum <= value < math.inf:
            raise ValueError(f"{name}={value} must be at least {minimum}, and finite.")


def check_fraction(**settings: Any) -> None:
    """
    :param settings: values by name
    :raises ValueError: if one is not between 0 and 1
    """
    for name, value in settings.items():
        _check_real(name, value)
        if not 0 <= value <= 1:
            raise ValueError(f"{name}={value} is not between 0 and 1.")


def check_flags(**settings: Any) -> None:
    """
    :param settings: values by name
    :raises ValueError: if one is neither True nor False; text would always count as True
    """
    for name, value in settings.items():
        if not isinstance(value, bool | np.bool_):
            raise ValueError(f"{name}={_shown(value)} is neither True nor False; give one of them, without quotes.")


def check_ent_coef(ent_coef: Any) -> None:
    """
    :param ent_coef: entropy coefficient of SAC and its kin
    :raises ValueError: if it is neither "auto", nor a start above 0 such as "auto_0.1", nor a number of at least 0
    """
    start = str(ent_coef).removeprefix("auto_")
    try:
        number = 1.0 if start == "auto" else float(start)
    except ValueError:
        number = np.nan
    lowest = 1e-9 if start != str(ent_coef) else 0  # a start is taken the logarithm of
    if isinstance(ent_coef, bool) or not lowest <= number < np.inf:
        raise ValueError(
            f"ent_coef={ent_coef!r} is neither 'auto', nor a start above 0 such as 'auto_0.1', nor a number of "
            "at least 0; give one of them."
        )


def check_widths(**settings: Any) -> None:
    """
    :param settings: hidden widths by name
    :raises ValueError: if one is no list of them
    """
    for name, widths in settings.items():
        if not isinstance(widths, list | tuple):
            raise ValueError(f"{name}={_shown(widths)} is no list of widths; give one such as [256, 256].")
        for index, width in enumerate(widths):
            check_count(1, **{f"{name}[{index}]": width})


def check_net_arch(net_arch: Any) -> None:
    """
    :param net_arch: hidden widths, or a dictionary with those of actor (``pi``) and critics (``qf``)
    :raises ValueError: if it is anything else
    """
    if not isinstance(net_arch, Mapping):
        check_widths(net_arch=net_arch)
    elif set(net_arch) != {"pi", "qf"}:
        raise ValueError(f"net_arch={_shown(net_arch)} has other keys than 'pi' and 'qf'; give both, or one list.")
    else:
        check_widths(**{f"net_arch[{part!r}]": widths for part, widths in net_arch.items()})


# ------------------------------------------------------------------ settings in dictionaries


def _parameters(cls: type) -> set[str] | None:
    """What a class may be called with by name; None if there is no telling."""
    names: set[str] = set()
    for base in cls.__mro__[:-1]:
        if "__init__" in vars(base):
            parameters = inspect.signature(vars(base)["__init__"]).parameters.values()
            names.update(parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD)
            if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters):
                return names - {"self"}
    return None


def check_keywords(name: str, given: Any, cls: type | None = None, *taken: str) -> None:
    """
    :param name: of an argument
    :param given: what was given for it, a dictionary or None
    :param cls: class whose arguments it holds
    :param taken: arguments of the class that it gets elsewhere
    :raises ValueError: if it is no dictionary, or has other keys
    """
    if given is None:
        return
    if not isinstance(given, Mapping):
        raise ValueError(f"{name}={_shown(given)} is no dictionary; give one, with settings by name.")
    known = None if cls is None else _parameters(cls)
    if known is not None and (unknown := [key for key in given if key not in known - {*taken}]):
        raise ValueError(f"{name} has unknown {_shown(unknown)}; choose from {sorted(known - {*taken})}.")


def check_subclass(name: str, value: Any, parent: type) -> None:
    """
    :param name: of an argument
    :param value: what was given
    :param parent: class that it must be, or be derived from
    :raises ValueError: if it is anything else
    """
    if not (isinstance(value, type) and issubclass(value, parent)):
        found, wanted = getattr(value, "__name__", _shown(value)), parent.__name__
        raise ValueError(f"{name}={found} is no class derived from {wanted}; use a {wanted}, the class itself.")


def _check_extractor(features_extractor_class: Any, features_extractor_kwargs: Any) -> None:
    if features_extractor_class is not None:
        check_subclass("features_extractor_class", features_extractor_class, BaseFeaturesExtractor)
    cls = features_extractor_class or CombinedExtractor
    check_keywords("features_extractor_kwargs", features_extractor_kwargs, cls, "observation_space")


def _check_optimizer(optimizer_class: Any, optimizer_kwargs: Any) -> None:
    """Make an optimiser of one number, and take a step."""
    check_subclass("optimizer_class", optimizer_class, th.optim.Optimizer)
    check_keywords("optimizer_kwargs", optimizer_kwargs, optimizer_class, "params", "lr")
    parameter = th.nn.Parameter(th.ones(1))
    parameter.grad = th.ones(1)
    try:
        optimizer_class([parameter], lr=1e-3, **(optimizer_kwargs or {})).step()
        fault = "" if parameter.isfinite().all() else "one step leads to NaN or infinity"
    except TypeError:
        fault = "one of them has the wrong type"
    except (ValueError, RuntimeError) as error:
        fault = " ".join(str(error).rstrip(".").split())
    if fault:
        raise ValueError(
            f"optimizer_kwargs={_shown(optimizer_kwargs)} do not suit {optimizer_class.__name__}: {fault}."
        )


# ------------------------------------------------------------------ what all algorithms share


def check_off_policy(model: OffPolicyAlgorithm) -> None:
    """
    Check the settings that SB3 takes as they are, and what they say of the policy.

    :param model: an algorithm before ``_setup_model()``
    :raises ValueError: on the first that it could not learn with
    """
    if model.env is not None:
        check_action_space(model.action_space)
    check_count(1, buffer_size=model.buffer_size, batch_size=model.batch_size, n_steps=model.n_steps)
    check_count(1, stats_window_size=model._stats_window_size)
    check_count(0, learning_starts=model.learning_starts)
    check_count(-1, gradient_steps=model.gradient_steps)
    check_fraction(gamma=model.gamma, tau=model.tau)
    check_flags(optimize_memory_usage=model.optimize_memory_usage)
    if not callable(model.learning_rate):
        check_at_least(0, learning_rate=model.learning_rate)
    if model.seed is not None:
        check_count(0, seed=model.seed)
        if model.seed >= 2**32:
            raise ValueError(f"seed={model.seed} is more than NumPy takes; choose one below 2**32.")
    if not isinstance(model.train_freq, TrainFreq):
        pair: Any = model.train_freq
        frequency, unit = pair if isinstance(pair, tuple) and len(pair) == 2 else (pair, "step")
        check_count(1, train_freq=frequency)
        check_choice("train_freq: unit", unit, "step", "episode")
    if model.action_noise is not None and not isinstance(model.action_noise, ActionNoise):
        raise ValueError(f"action_noise={_shown(model.action_noise)} is no ActionNoise of SB3; make one, or pass None.")
    if model.replay_buffer_class is not None:
        check_subclass("replay_buffer_class", model.replay_buffer_class, ReplayBuffer)
    check_keywords("replay_buffer_kwargs", model.replay_buffer_kwargs)
    check_subclass("policy", model.policy_class, BasePolicy)
    check_keywords("policy_kwargs", model.policy_kwargs, model.policy_class, *POLICY_ARGUMENTS)
    _check_policy_kwargs(**model.policy_kwargs)


def _check_policy_kwargs(
    net_arch: Any = None,
    features_extractor_class: Any = None,
    features_extractor_kwargs: Any = None,
    optimizer_class: Any = th.optim.Adam,
    optimizer_kwargs: Any = None,
    **_: Any,
) -> None:
    """What policies of all algorithms take."""
    if net_arch is not None:
        check_net_arch(net_arch)
    _check_extractor(features_extractor_class, features_extractor_kwargs)
    _check_optimizer(optimizer_class, optimizer_kwargs)
