"""Runs as a report reads them: finished ones with their scores, all others as gaps; and what must not be mixed."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from modip_sb3.benchmark.runs import EVALUATION_COLUMNS, RunFolder, evaluation_steps, flatten
from modip_sb3.datasets import has_reference_score, normalized_score


class Key(NamedTuple):
    """Which run."""

    env: str
    algo: str
    seed: int


@dataclass(frozen=True)
class Record:
    """
    A finished run.

    :param key: which run
    :param name: of its folder
    :param settings: of its ``config.json``
    :param software: of its ``config.json``
    :param status: of its ``status.json``
    :param curve: a row for each evaluation and inference: "env_steps", "wall_seconds", "inference", "return", and the
        normalised "score" and the rate of "success" where they are known
    """

    key: Key
    name: str
    settings: dict[str, Any]
    software: dict[str, Any]
    status: dict[str, Any]
    curve: pd.DataFrame


class CorruptRun(ValueError):
    """A folder that does not hold what a run writes."""


def read_runs(output: Path, timesteps: int | None = None) -> tuple[list[Record], dict[Key, str]]:
    """
    :param output: folder of a benchmark
    :param timesteps: what to read of longer runs; all of them by default
    :return: the finished runs, and for every other combination of the environments, algorithms and seeds that were
        found the reason why it is missing
    :raises ValueError: if there is no run, if one was not evaluated after so many steps, or if the runs that can be
        read cannot be compared
    """
    found = output.glob("*/*/seed-*")
    folders = sorted(path for path in found if path.is_dir() and path.name.removeprefix("seed-").isdigit())
    if not folders:
        raise ValueError(f"{output} has no runs (folders ENV/ALGO/seed-N); write some with the command run.")
    records, gaps, settings = [], {}, {}
    env_ids: dict[str, str] = {}
    for folder in folders:
        run = RunFolder(folder)
        try:
            config = _read_config(run)
            settings[run.name] = config["settings"]
            env_ids[folder.parts[-3]] = config["settings"]["env"]
            reason = _unfinished(run)
            if reason is None:
                records.append(_read_record(run, config))
            else:
                gaps[_key(folder)] = reason
        except CorruptRun as error:
            gaps[_key(folder)] = f"corrupt folder: {error}"
    if timesteps is not None:
        settings = {name: _cut_settings(name, entries, timesteps) for name, entries in settings.items()}
        records = [_cut(record, settings[record.name]) for record in records]
    check_comparable(settings)
    gaps = {key._replace(env=env_ids.get(key.env, key.env)): reason for key, reason in gaps.items()}
    known = [record.key for record in records] + list(gaps)
    for combination in product(*(dict.fromkeys(values) for values in zip(*known, strict=True))):
        if Key(*combination) not in known:
            gaps[Key(*combination)] = "no such run"
    return records, gaps


def _key(folder: Path) -> Key:
    env, algo, seed = folder.parts[-3:]
    return Key(env, algo, int(seed.removeprefix("seed-")))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CorruptRun(f"{path.name} cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise CorruptRun(f"{path.name} holds a {type(content).__name__}, expected an object")
    return content


def _read_config(run: RunFolder) -> dict[str, Any]:
    config = _read_json(run.path / "config.json")
    settings = config.get("settings", {})
    if missing := {"env", "algo", "seed", "timesteps", "evaluation", "dataset", "hyperparameters"} - set(settings):
        raise CorruptRun(f"config.json lacks settings {sorted(missing)}")
    if RunFolder.of(run.path.parents[2], settings).path != run.path:
        raise CorruptRun(f"its config.json is that of {settings['env']}, {settings['algo']}, seed {settings['seed']}")
    return config


def _unfinished(run: RunFolder) -> str | None:
    status = _read_json(run.path / "status.json") if (run.path / "status.json").exists() else {"state": "waiting"}
    state, steps = status.get("state"), status.get("env_steps", 0)
    if state == "finished":
        return None
    if state == "failed":
        return f"failed after {steps:,} steps: {status.get('error')}"
    if state in ("running", "stopped"):
        return f"unfinished, {steps:,} steps so far"
    if state == "waiting":
        return "not started"
    raise CorruptRun(f"status.json has the state {state!r}")


def _read_record(run: RunFolder, config: dict[str, Any]) -> Record:
    settings = config["settings"]
    try:
        episodes = pd.read_csv(run.path / "evaluations.csv")
    except (OSError, ValueError) as error:  # pandas' errors of parsing are ValueErrors
        raise CorruptRun(f"evaluations.csv cannot be read ({error})") from error
    if list(episodes.columns) != list(EVALUATION_COLUMNS):
        raise CorruptRun(
            f"evaluations.csv has the columns {list(episodes.columns)}, expected {list(EVALUATION_COLUMNS)}"
        )
    numbers = episodes[["env_steps", "wall_seconds", "episode", "return", "length"]]
    if not all(pd.api.types.is_numeric_dtype(numbers[name]) for name in numbers) or numbers.isna().to_numpy().any():
        raise CorruptRun("evaluations.csv has cells that are no numbers")
    _check_episodes(episodes, settings)
    key = Key(settings["env"], settings["algo"], settings["seed"])
    status = _read_json(run.path / "status.json")
    return Record(key, run.name, settings, config.get("software", {}), status, _curve(episodes, settings))


def _check_episodes(episodes: pd.DataFrame, settings: Mapping[str, Any]) -> None:
    expected = settings["evaluation"]["episodes"]
    for (steps, inference), group in episodes.groupby(["env_steps", "inference"]):
        if sorted(group["episode"]) != list(range(expected)):
            raise CorruptRun(
                f"evaluations.csv has {len(group)} rows for {inference} at {steps} steps, expected {expected} episodes"
            )
    timesteps, freq = settings["timesteps"], settings["evaluation"]["freq"]
    for inference, group in episodes.groupby("inference"):
        found = list(dict.fromkeys(_scheduled(steps, timesteps, freq) for steps in group["env_steps"]))
        if found != (due := evaluation_steps(settings)):
            raise CorruptRun(f"evaluations.csv has evaluations of {inference} at {found} steps, expected them at {due}")


def _scheduled(steps: int, timesteps: int, freq: int) -> int:
    """When an evaluation was due: it waits for the end of a rollout, which may be some steps later."""
    return timesteps if steps >= timesteps else int(steps) // freq * freq


def _curve(episodes: pd.DataFrame, settings: Mapping[str, Any]) -> pd.DataFrame:
    due = [_scheduled(steps, settings["timesteps"], settings["evaluation"]["freq"]) for steps in episodes["env_steps"]]
    columns = {"wall_seconds": "first", "return": "mean", "length": "mean", "success": "mean"}
    curve = episodes.assign(env_steps=due).groupby(["inference", "env_steps"], sort=False).agg(columns)
    curve = curve.reset_index()
    if has_reference_score(settings["env"]):
        curve["score"] = normalized_score(settings["env"], curve["return"].to_numpy())
    else:
        curve["score"] = 100 * curve["success"]
    return curve


# --------------------------------------------------------------------- cutting


def _cut_settings(name: str, settings: dict[str, Any], timesteps: int) -> dict[str, Any]:
    if timesteps not in evaluation_steps(settings)[1:]:
        budget, freq = settings["timesteps"], settings["evaluation"]["freq"]
        raise ValueError(
            f"{name} has {budget:,} steps and is evaluated every {freq:,}, not at {timesteps:,}: choose another "
            "--timesteps, or leave it out."
        )
    return settings | {"timesteps": timesteps}


def _cut(record: Record, settings: dict[str, Any]) -> Record:
    """A run as if it had ended earlier; what only its end tells of its costs is not known."""
    if settings["timesteps"] == record.settings["timesteps"]:
        return record
    curve = record.curve[record.curve["env_steps"] <= settings["timesteps"]]
    whole = {"cpu_seconds", "evaluation_seconds", "peak_memory_mb"}
    status = {name: value for name, value in record.status.items() if name not in whole}
    status["train_seconds"] = float(curve["wall_seconds"].max())
    return replace(record, settings=settings, status=status, curve=curve)


# ------------------------------------------------------------------- comparing


def check_comparable(settings: Mapping[str, Mapping[str, Any]]) -> None:
    """
    :param settings: of each run, by the name of its folder
    :raises ValueError: if budgets, evaluations or data differ, or the settings of one algorithm; it says where. An
        algorithm may be evaluated less often than another, such as one whose planner takes long
    """
    protocol = {name: flatten({key: s[key] for key in ("timesteps", "evaluation")}) for name, s in settings.items()}
    freq = {name: {"evaluation.freq": entries.pop("evaluation.freq")} for name, entries in protocol.items()}
    faults = _mixtures(protocol, lambda name: "")
    faults += _mixtures(freq, lambda name: settings[name]["algo"])
    data = {name: {"dataset": s["dataset"]["sha256"][:12]} for name, s in settings.items() if s["dataset"]}
    faults += _mixtures(data, lambda name: settings[name]["env"])
    task = {name: {"env_kwargs": s["hyperparameters"].get("env_kwargs")} for name, s in settings.items()}
    faults += _mixtures(task, lambda name: settings[name]["env"])
    own = ("hyperparameters", "defaults", "deterministic", "device")
    of_algorithm = {
        name: {key: s.get(key) for key in own} | {"start_from": s.get("start_from", {}).get("runs")}
        for name, s in settings.items()
    }
    faults += _mixtures(of_algorithm, lambda name: f"{settings[name]['env']}/{settings[name]['algo']}")
    if faults:
        raise ValueError("\n".join(["These runs cannot be compared; report them from separate folders:", *faults]))


def _mixtures(content: Mapping[str, Mapping[str, Any]], group_of: Callable[[str], str]) -> list[str]:
    """A sentence for every entry that is not the same in all runs of a group."""
    groups: dict[tuple[str, str], dict[str, list[str]]] = {}
    for run, entries in content.items():
        for name, value in flatten(entries).items():
            groups.setdefault((group_of(run), name), {}).setdefault(repr(value), []).append(run)
    faults = []
    for (group, name), values in groups.items():
        if len(values) > 1:
            found = "; ".join(f"{value} in {_some(runs)}" for value, runs in values.items())
            faults.append(f"  {name} differs{' for ' + group if group else ''}: {found}")
    return faults


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
