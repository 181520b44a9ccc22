"""
A long training whose memory is watched.

    python -m modip_sb3.benchmark.soak --minutes 120 --output runs/soak

Networks are tiny, so that there are many steps, and the rest is what a training has: offline data, two environments, a
replay buffer that wraps, evaluations, checkpoints. At the end stands how much the memory grew after the warm-up, in
MiB per hour, beside a CSV file and a plot.
"""

import argparse
import csv
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import gymnasium as gym
import numpy as np
import psutil
import torch as th
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import Monitor

from modip_sb3.benchmark.plots import plot_lines
from modip_sb3.benchmark.settings import default_dataset
from modip_sb3.modip import MODIP
from modip_sb3.resume import CheckpointCallback

ENV = "modip/hopper-sac-medium-v5"
WARM_UP = 0.25  # share of the time
COLUMNS = ("seconds", "env_steps", "updates", "memory_mib", "open_files", "threads")


class MemoryCallback(BaseCallback):
    """
    Writes a row every few seconds, and ends the training.

    :param file: where the rows go
    :param seconds: after which training ends
    :param every: seconds between two rows
    """

    def __init__(self, file: TextIO, seconds: float, every: float):
        super().__init__()
        self.file, self.seconds, self.every = file, seconds, every
        self.rows = csv.writer(file)
        self.rows.writerow(COLUMNS)
        self.process = psutil.Process()
        self.last = -np.inf

    def _on_rollout_start(self) -> None:
        if self.n_calls == 0:  # the offline phase is over
            self.started = time.perf_counter()

    def _on_step(self) -> bool:
        elapsed = time.perf_counter() - self.started
        if elapsed - self.last >= self.every:
            self.last = elapsed
            model: Any = self.model
            progress = (round(elapsed, 1), self.num_timesteps, model._n_updates)
            memory = round(self.process.memory_info().rss / 2**20, 2)
            self.rows.writerow([*progress, memory, self.process.num_fds(), self.process.num_threads()])
            self.file.flush()
        return elapsed < self.seconds


def train(output: Path, seconds: float, every: float) -> None:
    """
    :param output: folder of checkpoints, evaluations and ``memory.csv``
    :param seconds: how long
    :param every: seconds between two measurements
    """
    model = MODIP(
        "MlpPolicy",
        make_vec_env(ENV, 2, seed=0),
        offline_dataset=default_dataset(ENV),
        pretrain_steps=200,
        buffer_size=4000,
        batch_size=16,
        policy_kwargs={"denoiser": "mlp", "net_arch": {"pi": [32], "qf": [32]}, "latent_dim": 16},
        seed=0,
        device="cpu",
    )
    checkpoints = CheckpointCallback(5000, output / "checkpoints")
    evaluations = EvalCallback(Monitor(gym.make(ENV)), eval_freq=2500, log_path=str(output), verbose=0)
    with (output / "memory.csv").open("w", newline="") as file:
        watch = MemoryCallback(file, seconds, every)
        model.learn(sys.maxsize, callback=CallbackList([watch, checkpoints, evaluations]), log_interval=100)


def measure_growth(rows: np.ndarray) -> tuple[float, float]:
    """
    :param rows: as in ``memory.csv`` ``(N, 6)``
    :return: growth of the memory after the warm-up, by least squares, in MiB per hour, and its mean in MiB
    """
    seconds, memory = rows[:, 0], rows[:, 3]
    flat = seconds >= WARM_UP * seconds[-1]
    slope = np.polyfit(seconds[flat] / 3600, memory[flat], 1)[0]
    return float(slope), float(memory[flat].mean())


def main(argv: Sequence[str] | None = None) -> None:
    """
    :param argv: of the command line
    :raises SystemExit: if the folder exists
    """
    parser = argparse.ArgumentParser(
        prog="python -m modip_sb3.benchmark.soak",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=120, help="how long")
    parser.add_argument("--every", type=float, default=10, help="seconds between two measurements")
    parser.add_argument("--output", type=Path, required=True, help="folder of the results, which must not exist")
    args = parser.parse_args(argv)
    if args.output.exists():
        sys.exit(f"{args.output} exists already: give another folder, or remove it.")
    args.output.mkdir(parents=True)
    th.set_num_threads(1)
    train(args.output, 60 * args.minutes, args.every)
    rows = np.loadtxt(args.output / "memory.csv", delimiter=",", skiprows=1, ndmin=2)
    plot_lines(rows[:, 0] / 60, {"resident memory": rows[:, 3]}, "minutes", "MiB", args.output / "memory.png")
    growth, mean = measure_growth(rows)
    first, last = rows[0], rows[-1]
    sys.stdout.write(
        f"{last[1]:.0f} environment steps, {last[2]:.0f} updates in {last[0] / 60:.0f} minutes; after a quarter of "
        f"them {mean:.0f} MiB, {growth:+.1f} MiB per hour; open files {first[4]:.0f} to {last[4]:.0f}, threads "
        f"{first[5]:.0f} to {last[5]:.0f}\n"
    )


if __name__ == "__main__":
    main()
