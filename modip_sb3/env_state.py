"""The state of environments in the middle of an episode: taken from, and put back into, environments made alike."""

import inspect
import io
import pickle
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import mujoco
from stable_baselines3.common.monitor import ResultsWriter
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecEnvWrapper

# What has no state, or shows the state without being part of it: specifications, windows, cameras, log files
_STATELESS_MODULES = ("gymnasium.envs.registration", "gymnasium.envs.mujoco.mujoco_rendering", "pygame")
_STATELESS_NAMES = {"class_attributes", "metadata", "spec"}
# Values of other classes may stand for something outside of the process's memory, such as a simulator behind a handle
_PLAIN_PACKAGES = {"builtins", "collections", "gymnasium", "numpy", "pathlib"}
_PLAIN_CLASSES = {
    "gymnasium_robotics.utils.mujoco_utils.MujocoModelNames",
    "stable_baselines3.common.running_mean_std.RunningMeanStd",
}


class NoState(Exception):
    """Why the state of an environment cannot be had."""


@dataclass(frozen=True)
class Layer:
    """The attributes of one wrapper or environment; a state of MuJoCo (``MjData``) is kept apart."""

    kind: str
    attributes: dict[str, Any]
    simulations: dict[str, bytes]


@dataclass(frozen=True)
class EnvState:
    """
    What :func:`capture` takes from a :class:`VecEnv`.

    ``outer`` are its wrappers such as VecNormalize, and ``inner`` the DummyVecEnv and its environments, or None if
    their state cannot be had, for the reason ``missing``.
    """

    outer: list[Layer]
    inner: list[Layer] | None
    missing: str | None
    ids: list[tuple[str, dict[str, Any]]] | None
    """The Gymnasium ids and arguments that the environments were made by, if they have any"""

    @property
    def kinds(self) -> list[str]:
        """The classes of all layers, the outermost first; without the inner ones if their state is not here."""
        return [layer.kind for layer in [*self.outer, *(self.inner or [])]]


def capture(venv: VecEnv) -> EnvState:
    """
    The attributes of every wrapper and environment: numbers, texts, arrays, containers of them, spaces and random
    generators, and MuJoCo's data. The environments' part cannot be had of a SubprocVecEnv, nor where an attribute holds
    anything else (robosuite's simulation, Box2D's world). What an environment keeps outside of its attributes, in a
    simulator that it knows only by a number, is not seen.

    :param venv: environments
    :return: their state; it shares arrays with them, so write it before they go on
    """
    outer, base = _wrappers(venv)
    try:
        if type(base) is not DummyVecEnv:
            raise NoState(f"the environments of a {type(base).__name__} are out of reach")
        simulations: set[int] = set()
        inner = [_take(layer, simulations) for layer in _inner(base)]
        return EnvState([_take(layer, simulations) for layer in outer], inner, None, _ids(base))
    except NoState as reason:
        plain = [Layer(_kind(wrapper), plain_attributes(wrapper), {}) for wrapper in outer]
        return EnvState(plain, None, str(reason), _ids(base))


def restore(venv: VecEnv, state: EnvState) -> str | None:
    """
    :param venv: environments made as those were whose state was taken
    :param state: what :func:`capture` returned
    :return: None if they are where those were, else why a new episode has to begin; the wrappers around the VecEnv,
        such as VecNormalize's statistics, are restored in either case
    :raises ValueError: if the environments are wrapped in another way
    """
    outer, base = _wrappers(venv)
    inner = _inner(base) if state.inner is not None and type(base) is DummyVecEnv else []
    kinds = [_kind(layer) for layer in [*outer, *inner]]
    expected = state.kinds if inner else [layer.kind for layer in state.outer]
    if kinds != expected:
        raise ValueError(
            f"The environments are {kinds}, but those of the checkpoint were {expected}: make them the same way."
        )
    for layer, taken in zip(outer, state.outer, strict=True):
        vars(layer).update(taken.attributes)
    if state.inner is None:
        return state.missing
    if not inner:
        return f"{type(base).__name__} takes no state of environments"
    simulations = [_load_simulations(layer, taken) for layer, taken in zip(inner, state.inner, strict=True)]
    if None in simulations:
        return "the MuJoCo model is another one than in the checkpoint"
    for layer, taken, loaded in zip(inner, state.inner, simulations, strict=True):
        vars(layer).update(taken.attributes)
        for name, data in (loaded or {}).items():
            mujoco.mj_copyData(getattr(layer, name), _model_of(layer), data)
    return None


def plain_attributes(thing: Any) -> dict[str, Any]:
    """
    :param thing: any object with attributes
    :return: those of them that are plain values
    """
    items = vars(thing).items()
    return {name: value for name, value in items if not _is_stateless(name, value) and _why_not_plain(value) is None}


# ------------------------------------------------------------------------ layers


def _wrappers(venv: VecEnv) -> tuple[list[VecEnvWrapper], VecEnv]:
    outer = []
    while isinstance(venv, VecEnvWrapper):
        outer.append(venv)
        venv = venv.venv
    return outer, venv


def _inner(venv: Any) -> list[Any]:
    return [venv, *(layer for env in venv.envs for layer in _layers(env))]


def _layers(env: gym.Env) -> list[gym.Env]:
    """An environment, and those that it holds: what it wraps, or the robot of a kitchen."""
    found = [env]
    for layer in found:
        held = [value for value in vars(layer).values() if isinstance(value, gym.Env)]
        found += [value for value in held if all(value is not other for other in found)]
    return found


def _ids(venv: VecEnv) -> list[tuple[str, dict[str, Any]]] | None:
    specs = [env.unwrapped.spec for env in venv.envs] if isinstance(venv, DummyVecEnv) else [None]
    return [(spec.id, dict(spec.kwargs)) for spec in specs if spec] if all(specs) else None


def _kind(layer: Any) -> str:
    return f"{type(layer).__module__}.{type(layer).__qualname__}"


def _take(layer: Any, seen: set[int]) -> Layer:
    """A simulation that two layers hold is kept with the first of them."""
    attributes, simulations = {}, {}
    for name, value in vars(layer).items():
        if isinstance(value, mujoco.MjData):
            if _model_of(layer) is None:
                raise NoState(f"{_kind(layer)}.{name} has its MuJoCo model elsewhere")
            if id(value) not in seen:
                simulations[name] = pickle.dumps(value)
            seen.add(id(value))
        elif not _is_stateless(name, value):
            reason = _why_not_plain(value)
            if reason is not None:
                raise NoState(f"{_kind(layer)}.{name} {reason}")
            attributes[name] = value
    return Layer(_kind(layer), attributes, simulations)


def _model_of(layer: Any) -> Any:
    return next((value for value in vars(layer).values() if isinstance(value, mujoco.MjModel)), None)


def _is_stateless(name: str, value: Any) -> bool:
    if name in _STATELESS_NAMES or isinstance(value, VecEnv | gym.Env | ResultsWriter):
        return True
    if isinstance(value, list) and value and all(isinstance(env, gym.Env) for env in value):
        return True
    is_code = inspect.isroutine(value) or inspect.ismodule(value) or inspect.isclass(value)
    return is_code or isinstance(value, mujoco.MjModel) or type(value).__module__.startswith(_STATELESS_MODULES)


class _PlainPickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> None:
        """Not an id: pickle asks for one of every value, and this looks at each."""
        kind: Any = value if hasattr(value, "__qualname__") else type(value)  # a class or function, or an object of one
        is_plain = str(kind.__module__).split(".")[0] in _PLAIN_PACKAGES and not isinstance(value, gym.Env)
        if not (is_plain or f"{kind.__module__}.{kind.__qualname__}" in _PLAIN_CLASSES):
            raise NoState(f"holds a {kind.__module__}.{kind.__qualname__}")


def _why_not_plain(value: Any) -> str | None:
    try:
        _PlainPickler(io.BytesIO(), protocol=4).dump(value)
    except NoState as reason:
        return str(reason)
    except (TypeError, AttributeError, pickle.PicklingError, RecursionError) as error:
        return f"cannot be pickled: {error}"
    return None


def _load_simulations(layer: Any, taken: Layer) -> dict[str, Any] | None:
    """MuJoCo's data, None if a model in them is another one than the layer's."""
    loaded = {name: pickle.loads(content) for name, content in taken.simulations.items()}
    same = all(pickle.dumps(data.model) == pickle.dumps(_model_of(layer)) for data in loaded.values())
    return loaded if same else None
