"""
Speed and memory of loading offline data, for each format: ``python -m modip_sb3.benchmark.loaders``.

A synthetic dataset of Kitchen's size is written in each format, then loaded and checked in a fresh process. Memory is
what that process holds more than before: at the end ("resident") and at most ("peak"), which /proc tells on Linux only.
"""

import argparse
import csv
import json
import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from rich.console import Console
from rich.table import Table
from stable_baselines3.common.buffers import ReplayBuffer

from modip_sb3.datasets import OfflineDataset, save_d4rl, save_minari, save_robomimic

FORMATS = ("arrays", "replay buffer", "d4rl", "robomimic", "minari")
EPISODE_LENGTH = 280  # Kitchen's
MB = 1e6

_CLEAR_REFS = Path("/proc/self/clear_refs")


@dataclass
class Measurement:
    """What loading one format took."""

    format: str
    transitions: int
    seconds: float
    rows_per_second: float
    bare_mb: float
    """The arrays alone"""
    resident_mb: float
    peak_mb: float
    resident_ratio: float
    """Resident memory over that of the arrays alone"""
    peak_ratio: float


class SyntheticEnv(gym.Env):
    """The spaces of the synthetic data."""

    def __init__(self, obs_dim: int, action_dim: int) -> None:
        self.observation_space = spaces.Box(-np.inf, np.inf, (obs_dim,), np.float32)
        self.action_space = spaces.Box(-1.0, 1.0, (action_dim,), np.float32)


def make_dataset(transitions: int, obs_dim: int, action_dim: int) -> OfflineDataset:
    """
    :param transitions: number of transitions N
    :param obs_dim: length of an observation
    :param action_dim: length of an action
    :return: noise in episodes of Kitchen's length, all truncated
    """
    rng = np.random.default_rng(0)
    truncations = np.arange(1, transitions + 1) % EPISODE_LENGTH == 0
    truncations[-1] = True
    return OfflineDataset(
        observations=rng.standard_normal((transitions, obs_dim), np.float32),
        actions=rng.random((transitions, action_dim), np.float32),
        rewards=rng.random(transitions, np.float32),
        terminations=np.zeros(transitions, bool),
        truncations=truncations,
        final_observations=rng.standard_normal((truncations.sum(), obs_dim), np.float32),
    )


def write_formats(dataset: OfflineDataset, folder: Path, env: SyntheticEnv) -> None:
    """
    :param dataset: what to write
    :param folder: where, a file or a folder for each format
    :param env: the environment of the data
    """
    save_d4rl(dataset, folder / "d4rl.hdf5")
    save_robomimic(dataset, folder / "robomimic.hdf5")
    save_minari(dataset, "synthetic-v0", env=env, path=folder)


def measure(name: str, folder: Path, obs_dim: int, action_dim: int) -> Measurement:
    """
    Load and check the data of one format. For meaningful figures this is called in a process of its own.

    :param name: one of ``FORMATS``
    :param folder: where ``write_formats`` wrote
    :param obs_dim: length of an observation
    :param action_dim: length of an action
    :return: what it took
    """
    env = SyntheticEnv(obs_dim, action_dim)
    source = _source(name, folder, env)
    before = _status_mb("VmRSS")
    _CLEAR_REFS.write_text("5")  # the peak is counted from here
    start = time.perf_counter()
    dataset = OfflineDataset.load(source)
    dataset.check(env.observation_space, env.action_space, min_length=1)
    seconds = time.perf_counter() - start
    resident, peak = _status_mb("VmRSS") - before, _status_mb("VmHWM") - before
    columns = (getattr(dataset, field.name) for field in fields(dataset))
    bare = sum(column.nbytes for column in columns if isinstance(column, np.ndarray)) / MB
    rows = dataset.num_transitions
    return Measurement(name, rows, seconds, rows / seconds, bare, resident, peak, resident / bare, peak / bare)


def _source(name: str, folder: Path, env: SyntheticEnv) -> Any:
    if name == "minari":
        return folder / "synthetic-v0"
    if name in ("d4rl", "robomimic"):
        return folder / f"{name}.hdf5"
    dataset = OfflineDataset.load(folder / "d4rl.hdf5")
    if name == "arrays":
        return {field.name: getattr(dataset, field.name) for field in fields(dataset)}
    buffer = ReplayBuffer(dataset.num_transitions, env.observation_space, env.action_space)
    buffer.observations[:, 0] = buffer.next_observations[:, 0] = dataset.observations
    buffer.next_observations[:-1, 0] = buffer.observations[1:, 0]
    buffer.actions[:, 0], buffer.rewards[:, 0] = dataset.actions, dataset.rewards
    buffer.dones[:, 0] = buffer.timeouts[:, 0] = dataset.truncations
    buffer.full = True
    return buffer


def _status_mb(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024 / MB


def run(formats: Sequence[str], transitions: int, obs_dim: int, action_dim: int) -> list[Measurement]:
    """
    :param formats: some of ``FORMATS``
    :param transitions: number of transitions
    :param obs_dim: length of an observation
    :param action_dim: length of an action
    :return: what each format took, each in a fresh process
    """
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_formats(make_dataset(transitions, obs_dim, action_dim), folder, SyntheticEnv(obs_dim, action_dim))
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as processes:
            jobs = [processes.submit(measure, format_, folder, obs_dim, action_dim) for format_ in formats]
            return [job.result() for job in jobs]


def save(measurements: list[Measurement], path: Path) -> None:
    """
    :param measurements: what to write
    :param path: a JSON or CSV file, by its suffix
    """
    rows = [asdict(measurement) for measurement in measurements]
    with path.open("w", newline="") as file:
        if path.suffix == ".json":
            json.dump(rows, file, indent=2)
        else:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


def show(measurements: list[Measurement]) -> None:
    """
    :param measurements: what to print as a table
    """
    first = measurements[0]
    table = Table(title=f"{first.transitions:,} transitions, {first.bare_mb:.0f} MB of bare arrays")
    for heading in ("format", "rows/s", "s", "resident MB", "peak MB", "resident / bare", "peak / bare"):
        table.add_column(heading, justify="left" if heading == "format" else "right")
    for found in measurements:
        figures = (f"{found.rows_per_second:,.0f}", f"{found.seconds:.2f}", f"{found.resident_mb:.0f}")
        ratios = (f"{found.resident_ratio:.2f}", f"{found.peak_ratio:.2f}")
        table.add_row(found.format, *figures, f"{found.peak_mb:.0f}", *ratios)
    Console().print(table)


def main(args: list[str] | None = None) -> None:
    """
    :param args: of the command line
    """
    parser = argparse.ArgumentParser(description="Speed and memory of loading offline data, for each format.")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS, help="all by default")
    parser.add_argument("--transitions", type=int, default=1_000_000)
    parser.add_argument("--obs-dim", type=int, default=60)
    parser.add_argument("--action-dim", type=int, default=9)
    parser.add_argument("--output", type=Path, help="a .json or .csv file for the figures")
    given = parser.parse_args(args)
    if min(given.transitions, given.obs_dim, given.action_dim) < 1:
        parser.error("--transitions, --obs-dim and --action-dim must be at least 1")
    if given.output is not None and (given.output.suffix not in (".json", ".csv") or not given.output.parent.is_dir()):
        parser.error(f"--output {given.output}: expected a .json or .csv file in a folder that exists")
    if not _CLEAR_REFS.exists():
        parser.error("memory is measured with Linux's /proc, which this machine does not have")
    measurements = run(given.formats, given.transitions, given.obs_dim, given.action_dim)
    show(measurements)
    if given.output is not None:
        save(measurements, given.output)


if __name__ == "__main__":
    main()
