"""Everything that a training is in the middle of, in a folder of files, for any algorithm of Stable-Baselines3."""

import copy
import inspect
import io
import pickle
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import cloudpickle
import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import BaseBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.utils import check_for_correct_spaces, get_device, set_random_seed
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize, unwrap_vec_normalize

from modip_sb3.datasets import holds_no_data
from modip_sb3.env_state import EnvState, capture, plain_attributes, restore

Algorithm = TypeVar("Algorithm", bound=BaseAlgorithm)

STATE_FILE, REPLAY_FILE = "state.zip", "replay.pkl"  # other names than SB3's and rl_zoo3's: they cannot read them
# Made anew: what belongs to the process or to this module, and offline data, which is kept by reference
_MADE_ANEW = {"_logger", "_custom_logger", "_callback", "_beside", "_interrupted"}
_MADE_ANEW |= {"device", "replay_buffer", "_offline_buffers"}
_PENDING_LOG = ("name_to_value", "name_to_count", "name_to_excluded")


@dataclass(frozen=True)
class Beside:
    """What goes on beside a model: random generators, means that were not logged yet, and callbacks."""

    rng: dict[str, Any]
    log: dict[str, dict[str, Any]]
    callbacks: list[dict[str, Any]]

    @classmethod
    def of(cls, model: BaseAlgorithm) -> "Beside":
        """
        :param model: what is training
        :return: what goes on beside it
        """
        logger = getattr(model, "_logger", None)
        log = {name: dict(getattr(logger, name)) for name in _PENDING_LOG} if logger is not None else {}
        return cls(rng_state(), log, [_take_callback(each) for each in _family(getattr(model, "_callback", None))])

    def restore(self, model: BaseAlgorithm) -> None:
        """
        Random generators, and the logger's means if it has been configured.

        :param model: what goes on
        """
        for name, values in self.log.items() if hasattr(model, "_logger") else ():
            getattr(model.logger, name).update(values)
        set_rng_state(self.rng)

    def restore_callbacks(self, callback: BaseCallback) -> None:
        """
        Counters and results of callbacks, not their arguments; each takes those of the next of its class.

        :param callback: those that the training has now
        """
        left = list(self.callbacks)
        for each in _family(callback):
            taken = next((taken for taken in left if taken["class"] == type(each).__qualname__), None)
            if taken is not None:
                left.remove(taken)
                vars(each).update(taken["attributes"])
                for name, state in taken["environments"].items():
                    restore(getattr(each, name), state)


def save_state(model: BaseAlgorithm, folder: Path) -> None:
    """
    Write the whole of a training, between two rollouts or two updates: every attribute of the model, with its networks,
    optimisers and counters, the replay buffer as far as it is filled, the environments' state, random generators.

    :param model: any algorithm
    :param folder: an existing folder
    """
    has_arrays = not holds_no_data(getattr(model, "offline_dataset", None))
    left_out = {*_MADE_ANEW, "offline_dataset"} if has_arrays else _MADE_ANEW
    attributes = {
        name: value for name, value in vars(model).items() if name not in left_out and not isinstance(value, VecEnv)
    }
    state = {
        "class": type(model).__qualname__,
        "attributes": attributes,
        "environments": None if model.env is None else capture(model.env),  # in the file of what has the same spaces
        "beside": Beside.of(model),
    }
    content = io.BytesIO()  # torch's own writer does not say what is wrong with a disk
    th.save(state, content, pickle_module=cloudpickle, pickle_protocol=pickle.HIGHEST_PROTOCOL)
    (folder / STATE_FILE).write_bytes(content.getbuffer())
    buffer = getattr(model, "replay_buffer", None)
    if buffer is not None:
        _save_buffer(buffer, folder / REPLAY_FILE)


def load_state(
    algorithm: type[Algorithm], folder: Path, env: GymEnv | None = None, device: th.device | str = "auto"
) -> tuple[Algorithm, Beside]:
    """
    :param algorithm: class of the model
    :param folder: what :func:`save_state` wrote; it is unpickled, which can run any code, so trust whoever wrote it
    :param env: environments made as those of the checkpoint were; None makes them by their Gymnasium ids
    :param device: of the networks
    :return: the model, with neither offline data nor logger, and what goes on beside it
    :raises ValueError: if the checkpoint is another algorithm's, or the environments do not fit
    """
    device = get_device(device)
    state = th.load(folder / STATE_FILE, map_location=device, weights_only=False)
    if state["class"] != algorithm.__qualname__:
        raise ValueError(
            f"{folder} is a checkpoint of {state['class']}, not of {algorithm.__name__}: resume it with that."
        )
    model = algorithm.__new__(algorithm)
    vars(model).update(state["attributes"], device=device, _custom_logger=False)
    model.env = model._vec_normalize_env = None
    if state["environments"] is not None:
        _put_in(model, _remake(state["environments"]) if env is None else env, state["environments"])
    if (folder / REPLAY_FILE).exists():
        buffer = _load_buffer(folder / REPLAY_FILE)
        buffer.device = device
        model.replay_buffer = buffer  # type: ignore[attr-defined]
    return model, state["beside"]


# ------------------------------------------------------------------ environments


def _remake(state: EnvState) -> VecEnv:
    if state.ids is None:
        raise ValueError(
            "The environments of the checkpoint cannot be made again (they have no Gymnasium ids, or run in processes "
            "of their own): pass env, made as it was for the training."
        )
    venv: VecEnv = DummyVecEnv([partial(_make_env, *made_by) for made_by in state.ids])
    return VecNormalize(venv) if any("VecNormalize" in layer.kind for layer in state.outer) else venv


def _make_env(env_id: str, kwargs: dict[str, Any]) -> gym.Env:
    return Monitor(gym.make(env_id, **kwargs))


def _put_in(model: BaseAlgorithm, env: GymEnv, state: EnvState) -> None:
    venv = model._wrap_env(env, model.verbose)
    if venv.num_envs != model.n_envs:
        raise ValueError(f"The checkpoint has {model.n_envs} environments, but env has {venv.num_envs}: give as many.")
    check_for_correct_spaces(venv, model.observation_space, model.action_space)
    model.env, model._vec_normalize_env = venv, unwrap_vec_normalize(venv)
    missing = restore(venv, state)
    if missing is not None:
        warnings.warn(
            f"The state of the environments is not in the checkpoint: {missing}. A new episode begins, and the numbers "
            "differ from those of a training that was not interrupted.",
            stacklevel=4,
        )
        model._last_obs = None  # learn() resets the environments
        if model.seed is not None:
            venv.seed(model.seed + model.num_timesteps)  # not the first episodes again


# --------------------------------------------------------------------- callbacks


def _family(callback: BaseCallback | None) -> list[BaseCallback]:
    """A callback, and those that it calls, in their order."""
    found = [] if callback is None else [callback]
    for each in found:
        for name, value in vars(each).items():
            held = value if isinstance(value, list) else [value]
            if name != "parent":
                found += [child for child in held if isinstance(child, BaseCallback)]
    return found


def _take_callback(callback: BaseCallback) -> dict[str, Any]:
    arguments = {"locals", "globals", *inspect.signature(type(callback)).parameters}
    environments = {name: capture(value) for name, value in vars(callback).items() if isinstance(value, VecEnv)}
    attributes = plain_attributes(callback)
    return {
        "class": type(callback).__qualname__,
        "attributes": {name: value for name, value in attributes.items() if name not in arguments},
        "environments": environments,
    }


# ----------------------------------------------------------------- replay buffers


def _row_arrays(buffer: BaseBuffer) -> Iterator[tuple[str, str | None, np.ndarray]]:
    """Arrays with a row for each step of every environment: their attribute, their key in it if they have one."""
    for name, value in vars(buffer).items():
        for key, array in value.items() if isinstance(value, dict) else [(None, value)]:
            if isinstance(array, np.ndarray) and array.shape[:2] == (buffer.buffer_size, buffer.n_envs):
                yield name, key, array


def _replace_rows(buffer: BaseBuffer, name: str, key: str | None, array: np.ndarray) -> None:
    setattr(buffer, name, array if key is None else {**getattr(buffer, name), key: array})


def _save_buffer(buffer: BaseBuffer, path: Path) -> None:
    """Without the rows after the last step's next observation, which are empty until the buffer is full."""
    small, shortened = copy.copy(buffer), []
    for name, key, array in list(_row_arrays(buffer)) if not buffer.full else ():
        _replace_rows(small, name, key, array[: buffer.pos + 1])
        shortened.append((name, key))
    with path.open("wb") as file:
        pickle.dump((small, shortened), file, protocol=pickle.HIGHEST_PROTOCOL)


def _load_buffer(path: Path) -> BaseBuffer:
    with path.open("rb") as file:
        buffer, shortened = pickle.load(file)
    for name, key in shortened:
        rows = getattr(buffer, name) if key is None else getattr(buffer, name)[key]
        array = np.zeros((buffer.buffer_size, *rows.shape[1:]), rows.dtype)
        array[: len(rows)] = rows
        _replace_rows(buffer, name, key, array)
    return buffer


# -------------------------------------------------------------- random generators


def rng_state() -> dict[str, Any]:
    """The state of every global random generator."""
    cuda = th.cuda.get_rng_state_all() if th.cuda.is_available() else []
    return {"python": random.getstate(), "numpy": np.random.get_state(), "torch": th.get_rng_state(), "cuda": cuda}


def set_rng_state(state: dict[str, Any]) -> None:
    """
    :param state: what :func:`rng_state` returned
    """
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    th.set_rng_state(state["torch"].cpu())
    if state["cuda"] and th.cuda.is_available():
        th.cuda.set_rng_state_all([one.cpu() for one in state["cuda"]])


@contextmanager
def isolated_rng(seed: int) -> Iterator[None]:
    """
    Evaluations draw the same numbers each time, and training draws those it would draw without them.

    :param seed: of the random generators inside
    """
    state = rng_state()
    set_random_seed(seed)
    try:
        yield
    finally:
        set_rng_state(state)
