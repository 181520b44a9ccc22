"""Weights without pickle: tensors as safetensors, and what rebuilds the policy as JSON in the file's metadata."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch as th
from gymnasium import spaces
from minari.serialization import deserialize_space, serialize_space
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from stable_baselines3.common import torch_layers
from stable_baselines3.common.base_class import BaseAlgorithm, maybe_make_env
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv

from modip_sb3.storage import whole_file

SUFFIX = ".safetensors"
_KEY = "modip_sb3"
# How the networks act and learn may differ between a file and a model; what they are, and were trained for, may not
_MAY_DIFFER = {
    "condition_noise",
    "dropout",
    "horizon",
    "inference",
    "n_action_steps",
    "num_inference_steps",
    "num_proposals",
    "optimizer_class",
    "optimizer_kwargs",
    "planner_kwargs",
    "proposal_temperature",
    "sample_scheduler",
    "sampling_temperature",
}
# A file names classes; only these are taken on its word
_KNOWN_CLASSES = {
    f"{member.__module__}.{member.__qualname__}": member
    for module in (th.nn, th.optim, torch_layers)
    for member in vars(module).values()
    if isinstance(member, type) and issubclass(member, th.nn.Module | th.optim.Optimizer)
}
# What Python, torch, SB3 and Gymnasium raise on entries of a wrong type, name or size
_MISFITS = (AssertionError, AttributeError, LookupError, MemoryError, OverflowError, RuntimeError, TypeError)


class Description(NamedTuple):
    """
    What a file says of its tensors.

    :param algorithm: name of the algorithm's class
    :param policy: name of the policy's class
    :param observation_space: of the policy
    :param action_space: of the policy
    :param policy_kwargs: arguments of the policy in JSON's types, classes as ``{"class": "module.Name"}``
    :param pretrain_updates: updates of the offline phase that the weights have seen
    """

    algorithm: str
    policy: str
    observation_space: spaces.Space
    action_space: spaces.Space
    policy_kwargs: dict[str, Any]
    pretrain_updates: int


class SafeWeights(BaseAlgorithm):
    """
    ``save_weights``, ``load_weights`` and ``from_weights`` for an algorithm whose policy holds all that acts.

    Such a file holds tensors and JSON: reading one from a stranger runs no code of theirs, unlike ``load()``, which
    unpickles. It holds no optimisers, replay buffer or other state of a training run, which are in a checkpoint, and no
    statistics of ``VecNormalize``, which SB3 pickles.
    """

    _n_pretrain_updates = 0

    def save_weights(self, path: str | PathLike[str]) -> Path:
        """
        Save the policy's tensors (networks, targets, moving average, normaliser) and the arguments that rebuild it.

        :param path: the file; ``.safetensors`` is added if it is missing, folders that are missing are made
        :return: the file, which appears under its name once it is whole
        :raises ValueError: if an argument of the policy is neither a plain value nor a class
        """
        path = Path(path).expanduser()
        if path.suffix != SUFFIX:
            path = path.with_name(path.name + SUFFIX)
        description = json.dumps(
            {
                "algorithm": type(self).__name__,
                "policy": type(self.policy).__name__,
                "observation_space": serialize_space(self.observation_space, to_string=False),
                "action_space": serialize_space(self.action_space, to_string=False),
                "policy_kwargs": _plain_policy_kwargs(self.policy),
                "pretrain_updates": self._n_pretrain_updates,
            }
        )
        # Clones: tensors that share memory, of a shared features extractor for example, are stored once for each name
        tensors = {name: value.cpu().clone().contiguous() for name, value in self.policy.state_dict().items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as unfinished:
            save_file(tensors, unfinished, {_KEY: description})
        return path

    def load_weights(self, path: str | PathLike[str]) -> Self:
        """
        Load what ``save_weights`` saved into this model; it is unchanged if they do not fit.

        How the model acts (``inference``, settings of the planner and of sampling) and its optimisers stay its own.

        :param path: the file, with or without ``.safetensors``
        :return: self
        :raises FileNotFoundError: if there is no such file
        :raises ValueError: if the file is damaged or of something else, or of another algorithm, other spaces, or
            another architecture
        """
        tensors, description = read_weights(path)
        _check_description(path, description, type(self), self.observation_space, self.action_space)
        own_kwargs = _plain_policy_kwargs(self.policy)
        saved = {"policy": description.policy, **description.policy_kwargs}
        found = {"policy": type(self.policy).__name__, **own_kwargs}
        for name in sorted((saved.keys() | found.keys()) - _MAY_DIFFER):
            if saved.get(name) != found.get(name):
                raise ValueError(
                    f"The weights in {path} are of another architecture: {name}={_shown(saved.get(name))}, but the "
                    f"model has {_shown(found.get(name))}; build the model with {type(self).__name__}.from_weights()."
                )
        _check_tensors(path, tensors, self.policy.state_dict())
        self.policy.load_state_dict(tensors)
        self._n_pretrain_updates = description.pretrain_updates
        return self

    @classmethod
    def from_weights(
        cls,
        path: str | PathLike[str],
        env: GymEnv | str | None = None,
        policy: str | type[BasePolicy] | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Self:
        """
        Build a model from what ``save_weights`` saved, without unpickling anything.

        :param path: the file, with or without ``.safetensors``
        :param env: the environment, or its Gymnasium id; None for a model that only predicts
        :param policy: the policy's class, if it is none of this package
        :param policy_kwargs: arguments of the policy in place of the file's; classes of your own must be given here, as
            the file only names them
        :param kwargs: arguments of the algorithm (``learning_rate``, ``offline_dataset``, ...): the file holds
            none but those of the policy, the planner and the discount factor with it
        :return: the model
        :raises FileNotFoundError: if there is no such file
        :raises ValueError: as ``load_weights`` does
        """
        _, description = read_weights(path)
        with _buildable(path):
            arguments = {
                name: _from_plain(path, name, value)
                for name, value in description.policy_kwargs.items()
                if name not in (policy_kwargs or {})
            } | (policy_kwargs or {})
            # The algorithm sets these on its policy: given to the policy alone they would be lost
            own = {"inference", "planner_kwargs"} & arguments.keys()
            settings: dict[str, Any] = {name: arguments.pop(name) for name in own}
            if "planner_kwargs" in settings:
                settings["gamma"] = settings["planner_kwargs"].pop("gamma")
        observation_space, action_space = description.observation_space, description.action_space
        if env is not None:
            env = cls._wrap_env(maybe_make_env(env, verbose=0))
            observation_space, action_space = env.observation_space, env.action_space
        _check_description(path, description, cls, observation_space, action_space)
        policy = policy or ("MultiInputPolicy" if isinstance(observation_space, spaces.Dict) else "MlpPolicy")
        with _buildable(path):
            model = cls(policy, env, policy_kwargs=arguments, _init_setup_model=False, **settings | kwargs)  # type: ignore[call-arg]
            model.observation_space, model.action_space = observation_space, action_space
            model.n_envs = 1 if env is None else env.num_envs
            model._setup_model()
        return model.load_weights(path)


@contextmanager
def _buildable(path: str | PathLike[str]) -> Iterator[None]:
    """
    :param path: the file that says what is built within
    :raises ValueError: for whatever is wrong with it, in one sentence
    """
    try:
        yield
    except ValueError as error:  # a sentence of its own
        error.add_note(f"The policy is described in {path}; what is given in policy_kwargs replaces its settings.")
        raise
    except _MISFITS as error:
        raise ValueError(
            f"{path} describes a policy that cannot be built ({_shown(error)}); save it again with the version of "
            "modip_sb3 that is installed here, or pass what is wrong in policy_kwargs."
        ) from error


def _check_description(
    path: str | PathLike[str],
    description: Description,
    algorithm: type[BaseAlgorithm],
    observation_space: spaces.Space,
    action_space: spaces.Space,
) -> None:
    if description.algorithm != algorithm.__name__:
        raise ValueError(
            f"The weights in {path} are of {description.algorithm}, but the model is a {algorithm.__name__}; "
            "load them with their own algorithm."
        )
    for kind, own in (("observation_space", observation_space), ("action_space", action_space)):
        saved = getattr(description, kind)
        if saved != own:
            raise ValueError(
                f"The weights in {path} are for the {kind} {saved}, but the model has {own}; use an environment with "
                "the file's spaces."
            )


def read_weights(path: str | PathLike[str]) -> tuple[dict[str, th.Tensor], Description]:
    """
    Read what ``save_weights`` wrote, and build nothing from it.

    :param path: the file, with or without ``.safetensors``
    :return: the tensors by name, and what the file says of them
    :raises FileNotFoundError: if there is no such file
    :raises ValueError: if it is damaged or of something else
    """
    path = Path(path).expanduser()
    if not path.is_file():
        path = path if path.suffix == SUFFIX else path.with_name(path.name + SUFFIX)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, expected one that save_weights() wrote; check the path.")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no mapping)
    except SafetensorError as error:
        raise ValueError(
            f"{path} cannot be read as safetensors ({error}), expected a whole file that save_weights() wrote; fetch "
            "or save it again."
        ) from error
    if _KEY not in metadata:
        raise ValueError(
            f"{path} holds tensors of something else: its metadata are {_shown(sorted(metadata))}, expected "
            f"{_KEY!r}; pass a file that save_weights() wrote."
        )
    return tensors, _parse(path, metadata[_KEY])


def _parse(path: Path, text: str) -> Description:
    try:
        entries = json.loads(text)
        for kind in ("observation_space", "action_space"):
            entries[kind] = deserialize_space(entries[kind])
        description = Description(**entries)
        if not isinstance(description.policy_kwargs, dict) or not isinstance(description.pretrain_updates, int):
            raise TypeError("policy_kwargs is no dictionary, or pretrain_updates no number")
    except (*_MISFITS, ValueError) as error:
        raise ValueError(
            f"{path} describes its policy in a way that cannot be read ({_shown(error)}); save it again with the "
            "version of modip_sb3 that is installed here."
        ) from error
    return description


def _plain_policy_kwargs(policy: BasePolicy) -> dict[str, Any]:
    arguments = policy._get_constructor_parameters()
    own = {"observation_space", "action_space", "lr_schedule"}  # stored beside them; the last one is a dummy
    return {name: _to_plain(name, value) for name, value in arguments.items() if name not in own}


def _to_plain(name: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _to_plain(name, entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_to_plain(name, entry) for entry in value]
    if isinstance(value, type):
        return {"class": f"{value.__module__}.{value.__qualname__}"}
    if value is None or isinstance(value, str | int | float):
        return value
    raise ValueError(
        f"policy_kwargs[{name!r}] holds a {type(value).__name__}, expected plain values and classes, which can be "
        "stored as JSON; pass it as such, or use save()."
    )


def _from_plain(path: str | PathLike[str], name: str, value: Any) -> Any:
    if isinstance(value, list):
        return [_from_plain(path, name, entry) for entry in value]
    if not isinstance(value, dict):
        return value
    if value.keys() != {"class"}:
        return {key: _from_plain(path, name, entry) for key, entry in value.items()}
    if str(value["class"]) not in _KNOWN_CLASSES:
        raise ValueError(
            f"{path} names the class {value['class']} as {name}, which is not imported on a file's word; if you know "
            f"it, pass policy_kwargs={{{name!r}: ...}}."
        )
    return _KNOWN_CLASSES[value["class"]]


def _check_tensors(path: str | PathLike[str], tensors: dict[str, th.Tensor], own: dict[str, th.Tensor]) -> None:
    for name in sorted(tensors.keys() | own.keys()):
        saved, found = (
            f"{str(part[name].dtype).removeprefix('torch.')} {list(part[name].shape)}" if name in part else "nothing"
            for part in (tensors, own)
        )
        if saved != found:
            raise ValueError(
                f"The weights in {path} are of another architecture: {name} is {saved}, but the model has {found}; "
                "give the model the policy_kwargs that they were trained with."
            )


def _shown(value: Any) -> str:
    text = value["class"] if isinstance(value, dict) and value.keys() == {"class"} else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
