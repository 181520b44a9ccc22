"""What a benchmark runs: environments, algorithms, their settings and the offline data."""

import ast
import hashlib
import importlib.metadata
import inspect
import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence, Set
from functools import cache
from pathlib import Path
from typing import Any

import gymnasium as gym
import torch as th
import yaml
from gymnasium import spaces

from modip_sb3 import zoo
from modip_sb3.benchmark.runs import RunFolder
from modip_sb3.datasets import fingerprint as hash_datasets
from modip_sb3.datasets import load_sources

SUITES = {
    "hopper": ("modip/hopper-sac-medium-v5",),
    "mujoco": ("modip/hopper-medium-v5", "modip/walker2d-medium-v5", "modip/halfcheetah-medium-v5"),
    "kitchen": ("modip/kitchen-complete-v1", "modip/kitchen-partial-v1", "modip/kitchen-mixed-v1"),
    "robomimic": ("modip/lift-ph-v1", "modip/can-ph-v1", "modip/square-ph-v1", "modip/transport-ph-v1"),
}

# A diffusion policy is evaluated by sampling, as its papers do; all others by their deterministic action
SAMPLED = ("modip", "diffusion_bc", "dql", "idql", "pa_rl", "dsrl", "dppo")

# Arguments of every algorithm that decide nothing, or are settings of the run itself
NO_SETTINGS = {"self", "env", "seed", "device", "tensorboard_log", "verbose", "_init_setup_model"}

# What evaluations on fresh environments could not follow
UNSUPPORTED = ("env_wrapper", "vec_env_wrapper", "frame_stack", "callback")

PACKAGES = ["modip-sb3", "stable-baselines3", "sb3-contrib", "rl_zoo3", "torch", "diffusers", "numpy", "gymnasium"]
PACKAGES += ["mujoco", "gymnasium-robotics", "robosuite", "minari"]


def make_settings(
    env_id: str,
    algo: str,
    seed: int,
    timesteps: int,
    evaluation: Mapping[str, Any],
    dataset: Any,
    overrides: Mapping[str, Any],
    device: str = "auto",
    start_from: Path | None = None,
) -> dict[str, Any]:
    """
    Everything that decides a run's numbers, as it is written and compared.

    :param env_id: Gymnasium id
    :param algo: name of the algorithm in rl_zoo3, or of a variant of it, see :func:`base_of`
    :param seed: of the run
    :param timesteps: budget of environment steps
    :param evaluation: protocol: "freq" in environment steps, "episodes", "seed", "actions"
    :param dataset: what the algorithm's ``offline_dataset`` is, if it takes one; None is no data
    :param overrides: hyper-parameters in the place of the configured ones
    :param device: of the networks
    :param start_from: folder of a benchmark whose runs of diffusion_bc give the algorithm its diffusion policy, if it
        has one
    :return: plain values
    :raises ValueError: if the algorithm, the environment or a setting is unknown
    """
    algorithm = find_algorithm(algo)
    parameters = inspect.signature(algorithm).parameters
    hyperparameters, source = find_hyperparameters(algo, env_id)
    hyperparameters |= overrides
    if "policy" not in hyperparameters:
        hyperparameters["policy"] = _default_policy(env_id, hyperparameters)
    for name in UNSUPPORTED:
        if hyperparameters.get(name) is not None:
            raise ValueError(f"{algo} on {env_id} has {name}={hyperparameters[name]!r}: the benchmark takes none.")
    if "offline_dataset" in overrides:
        raise ValueError("offline_dataset is the same for all algorithms: give it with --offline-dataset.")
    takes_data = "offline_dataset" in parameters
    for name in ("n_timesteps", "offline_dataset"):
        hyperparameters.pop(name, None)
    if takes_data and dataset is not None:
        hyperparameters["offline_dataset"] = dataset
    if "buffer_size" in parameters:  # what the budget cannot fill would be written with every checkpoint
        default = parameters["buffer_size"].default
        hyperparameters["buffer_size"] = min(int(hyperparameters.get("buffer_size", default)), timesteps + 1000)
    actions = {"deterministic": True, "sampled": False, "default": base_of(algo) not in SAMPLED}
    settings = {
        "env": env_id,
        "algo": algo,
        "seed": seed,
        "timesteps": timesteps,
        "evaluation": dict(evaluation),
        "deterministic": actions[evaluation["actions"]],
        "hyperparameters": hyperparameters,
        "hyperparameters_from": source,
        "defaults": _defaults(parameters, {*NO_SETTINGS, *hyperparameters}),
        "dataset": fingerprint(dataset) if takes_data and dataset is not None else None,
        "device": device,
    }
    if start_from is not None and hasattr(algorithm, "from_pretrained"):
        settings["start_from"] = _find_pretrained(start_from, env_id, seed)
    return json.loads(json.dumps(settings, default=lambda value: getattr(value, "__qualname__", repr(type(value)))))


def _find_pretrained(runs: Path, env_id: str, seed: int) -> dict[str, str]:
    path = RunFolder.of(runs, {"env": env_id, "algo": "diffusion_bc", "seed": seed}).path / "model.zip"
    if not path.is_file():
        raise ValueError(f"--start-from {runs} has no {path.relative_to(runs)}: run diffusion_bc there first.")
    return {"runs": str(runs), "model": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def base_of(name: str) -> str:
    """
    :param name: of an algorithm, or ``algo@label``: the same one with other settings, in a row of its own
    :return: the algorithm's name
    :raises ValueError: if the label is not a word
    """
    base, at, label = name.partition("@")
    if at and not re.fullmatch(r"[\w-]+", label):
        raise ValueError(
            f"{name!r} is no variant of an algorithm: expected algo@label, the label of letters, digits, - and _."
        )
    return base


def find_algorithm(name: str) -> Any:
    """
    :param name: of an algorithm in rl_zoo3, ours included, or of a variant
    :return: its class
    :raises ValueError: if there is none
    """
    zoo.register()
    import rl_zoo3

    base = base_of(name)
    if base not in rl_zoo3.ALGOS:
        raise ValueError(f"Algorithm {base!r} is unknown; choose from {sorted(rl_zoo3.ALGOS)}.")
    return rl_zoo3.ALGOS[base]


def find_hyperparameters(algo: str, env_id: str) -> tuple[dict[str, Any], str]:
    """
    Our settings for the algorithm and the environment if there are any, else rl_zoo3's, else the algorithm's defaults.

    :param algo: name of the algorithm
    :param env_id: Gymnasium id
    :return: the settings, and where they are from
    :raises ValueError: if the environment is unknown
    """
    import rl_zoo3

    if env_id not in gym.registry:
        raise ValueError(f"Environment {env_id!r} is not registered in Gymnasium; suites are {sorted(SUITES)}.")
    own = zoo.find_config(base_of(algo))
    theirs = Path(rl_zoo3.__file__).parent / "hyperparams" / f"{base_of(algo)}.yml"
    for path, keys in ((own, (env_id, "default")), (theirs, (env_id,))):
        if path is None or not path.is_file():
            continue
        entries = yaml.safe_load(path.read_text())
        for key in keys:
            if key in entries:
                return dict(entries[key]), f"{path.parent.name}/{path.name}: {key}"
    return {}, "the algorithm's defaults"


def _defaults(parameters: Mapping[str, inspect.Parameter], left_out: Set[str]) -> dict[str, Any]:
    found = {name: parameter.default for name, parameter in parameters.items() if name not in left_out}
    return {name: default for name, default in found.items() if default is not inspect.Parameter.empty}


def _default_policy(env_id: str, hyperparameters: Mapping[str, Any]) -> str:
    has_dict_obs = _has_dict_obs(env_id, json.dumps(hyperparameters.get("env_kwargs", {})))
    return "MultiInputPolicy" if has_dict_obs else "MlpPolicy"


@cache
def _has_dict_obs(env_id: str, env_kwargs: str) -> bool:
    env = gym.make(env_id, **json.loads(env_kwargs))
    try:
        return isinstance(env.observation_space, spaces.Dict)
    finally:
        env.close()


def default_dataset(env_id: str) -> Any:
    """
    :param env_id: Gymnasium id
    :return: the data of an environment: what MODIP's settings name for it, or None
    """
    return find_hyperparameters("modip", env_id)[0].get("offline_dataset")


def fingerprint(source: Any) -> dict[str, Any]:
    """
    :param source: what ``offline_dataset`` takes, in plain values
    :return: the source, its number of transitions, and a hash of the data that is then loaded
    """
    return _fingerprint(json.dumps(source))


@cache
def _fingerprint(source: str) -> dict[str, Any]:
    datasets = load_sources(json.loads(source))
    transitions = sum(dataset.num_transitions for dataset, _ in datasets)
    return {"source": json.loads(source), "transitions": transitions, "sha256": hash_datasets(datasets)}


def parse_overrides(texts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """
    :param texts: each ``algo.param:value``; the value is a Python literal, or else YAML
    :return: values by algorithm and parameter
    :raises ValueError: if one has another form
    """
    overrides: dict[str, dict[str, Any]] = {}
    for text in texts:
        name, colon, value = text.partition(":")
        algo, dot, parameter = name.partition(".")
        if not (colon and dot and algo and parameter):
            raise ValueError(f"-P {text}: expected algo.param:value, such as sac.learning_starts:1000.")
        overrides.setdefault(algo, {})[parameter] = _parse_value(value)
    return overrides


def _parse_value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return yaml.safe_load(text)


# -------------------------------------------------------------------- provenance


def describe_software() -> dict[str, Any]:
    """Versions of the packages that matter, and the commit of this one if it is a checkout."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {"python": platform.python_version(), "versions": versions, "commit": _commit()}


def _commit() -> str | None:
    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True).stdout

    try:
        changed = " with changes" if git("status", "--porcelain", "--", "..").strip() else ""
        return git("rev-parse", "HEAD").strip() + changed
    except (OSError, subprocess.CalledProcessError):
        return None


def describe_hardware(threads: int, device: str) -> dict[str, Any]:
    """
    :param threads: that the run uses
    :param device: of the networks
    :return: processor, cores, threads, and the accelerator if one is used
    """
    info = Path("/proc/cpuinfo")
    models = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    cpu = models[0].split(":")[1].strip() if models else platform.processor() or platform.machine()
    gpu = th.cuda.get_device_name() if device != "cpu" and th.cuda.is_available() else None
    return {"cpu": cpu, "cores": count_cores(), "threads": threads, "gpu": gpu}


def count_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def share_threads(workers: int) -> int:
    """
    :param workers: processes at a time
    :return: threads for each: its share of the cores, or what ``OMP_NUM_THREADS`` asks for if that is less
    """
    share = max(1, count_cores() // workers)
    return min(share, int(os.environ.get("OMP_NUM_THREADS", share)))
