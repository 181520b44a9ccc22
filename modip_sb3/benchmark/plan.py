"""From a command to the folders of its runs."""

import argparse
import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from modip_sb3.benchmark.runs import RunFolder, differences
from modip_sb3.benchmark.settings import (
    SUITES,
    base_of,
    default_dataset,
    describe_software,
    make_settings,
    parse_overrides,
)
from modip_sb3.storage import write_json


def plan(args: argparse.Namespace) -> list[RunFolder]:
    """
    Write the settings of runs that are new, and check those of the others.

    :param args: of ``run``
    :return: the runs, in the order in which they are to be executed: all algorithms with one seed, then the next
    :raises ValueError: if a setting is wrong, or another than the one that is there
    """
    _check(args)
    env_ids = SUITES[args.suite] if args.suite else args.envs
    overrides = parse_overrides(args.param)
    if unknown := overrides.keys() - {*args.algos, *map(base_of, args.algos)}:
        raise ValueError(f"-P names {sorted(unknown)}, but --algos are {args.algos}.")
    evaluation = {
        "freq": args.eval_freq,
        "episodes": args.eval_episodes,
        "seed": args.eval_seed,
        "actions": args.eval_actions,
    }
    settings = [
        make_settings(
            env_id,
            algo,
            seed,
            args.timesteps,
            evaluation,
            _dataset(args.offline_dataset, env_id),
            overrides.get(base_of(algo), {}) | overrides.get(algo, {}),
            args.device,
            args.start_from,
        )
        for seed, env_id, algo in product(_unique(args.seeds), _unique(env_ids), _unique(args.algos))
    ]
    return _write(args.output, settings)


def _check(args: argparse.Namespace) -> None:
    for name in ("timesteps", "eval_freq", "eval_episodes", "workers"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}: it must be at least 1.")


def _unique(values: Sequence[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def _dataset(given: str | None, env_id: str) -> Any:
    if given is None:
        return default_dataset(env_id)
    return None if given == "none" else given


def _write(output: Path, planned: Sequence[dict[str, Any]]) -> list[RunFolder]:
    """Nothing is written if a single run has other settings than those that are there."""
    runs = [RunFolder.of(output, settings) for settings in planned]
    faults = []
    for run, settings in zip(runs, planned, strict=True):
        if (run.path / "config.json").exists():
            faults += [f"  {run.name}: {phrase}" for phrase in differences(_read(run), settings)]
    if faults:
        raise ValueError("\n".join([f"{output} has runs with other settings; choose another --output:", *faults]))
    software = describe_software()
    for run, settings in zip(runs, planned, strict=True):
        if not (run.path / "config.json").exists():
            run.path.mkdir(parents=True, exist_ok=True)
            write_json(run.path / "config.json", {"settings": settings, "software": software})
    return runs


def _read(run: RunFolder) -> dict[str, Any]:
    try:
        return run.read_settings()
    except (json.JSONDecodeError, KeyError) as error:
        raise ValueError(f"{run.path / 'config.json'} cannot be read ({error}); remove the folder.") from error
