"""
Trainings that are killed at random moments and resumed, beside the same trainings that nobody interrupts.

    python -m modip_sb3.benchmark.kills --kills 50 --output runs/kills

Networks are tiny and environments real. A kill is the system's SIGKILL, or the SIGINT of a Ctrl-C: while the data or a
checkpoint is read, during the offline phase, during ``learn()``, during an evaluation in it, or while a checkpoint is
written. At the end every number has to be the same, to the last bit.
"""

import argparse
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from rich.console import Console
from rich.table import Table
from stable_baselines3.common.buffers import BaseBuffer
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import KVWriter, Logger

from modip_sb3.baselines import TDMPC2
from modip_sb3.buffers import LabelBuffer
from modip_sb3.checkpoint import rng_state
from modip_sb3.datasets import OfflineDataset, save_d4rl
from modip_sb3.modip import MODIP
from modip_sb3.resume import CheckpointCallback, find_checkpoint

ENVS = ("Pendulum-v1", "Hopper-v5")
UPDATES, STEPS, SAVE_FREQ = 60, 240, 24
MOMENTS = LOADING, OFFLINE, ONLINE, EVALUATING, WRITING = ("loading", "offline", "online", "evaluating", "writing")
SIGNALS = (signal.SIGKILL, signal.SIGINT)
INTERRUPTED = 130  # what a shell gives for a Ctrl-C
_SMALL = {"batch_size": 8, "learning_starts": 20, "buffer_size": 200, "seed": 0, "device": "cpu"}  # the replay wraps
_PLANNER = {"num_samples": 4, "num_elites": 2, "num_iterations": 1}
_NETWORKS = {"latent_dim": 16, "num_proposals": 4}
ALGORITHMS: dict[str, tuple[Any, dict[str, Any]]] = {
    "modip": (
        MODIP,
        {
            "policy_kwargs": {"denoiser": "mlp", "net_arch": {"pi": [16], "qf": [16]}, "num_inference_steps": 2},
            "distill_from": "both",
            "relabel_freq": 10,
        },
    ),
    "tdmpc2": (
        TDMPC2,
        {
            "policy_kwargs": {"net_arch": [16], "encoder_arch": [16], "n_critics": 3},
            "gamma": 0.9,
            "termination_head": True,
        },
    ),
}


@dataclass
class Training:
    """One training, in processes that may be killed."""

    algo: str
    env: str
    n_envs: int
    folder: Path
    dataset: Path
    kills: dict[str, int] = field(default_factory=lambda: dict.fromkeys(MOMENTS, 0))
    interrupts: int = 0
    survived: int = 0
    differences: list[str] = field(default_factory=list)

    @property
    def explicit(self) -> bool:
        """Whether ``pretrain()`` is called; else ``learn()`` begins with the offline phase."""
        return self.n_envs == 1


# ----------------------------------------------------------- inside of the process


class _Lines(KVWriter):
    """Logged values, a line for each time, in full precision; wall time apart."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("a")

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        values = {name: float(value).hex() for name, value in key_values.items() if not name.startswith("time/")}
        phase = "pretrain" if any(name.startswith("pretrain/") for name in values) else "learn"
        self.file.write(json.dumps([phase, step, values]) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


class _Watched(CheckpointCallback):
    """Tells the process outside where it is, and logs the losses of every step and of every seventh update."""

    def __init__(self, folder: Path, shared: Any) -> None:
        super().__init__(SAVE_FREQ, folder)
        self.shared = shared

    def save(self) -> None:
        before, self.shared[1] = self.shared[1], MOMENTS.index(WRITING)
        super().save()
        self.shared[1] = before

    def _on_rollout_start(self) -> None:
        self.shared[1] = MOMENTS.index(ONLINE)
        super()._on_rollout_start()

    def _on_step(self) -> bool:
        if not self.in_rollout:
            self.shared[1] = MOMENTS.index(OFFLINE)
        self.shared[0] = self._progress()
        if not self.in_rollout and self._progress() % 7 == 0:
            self.logger.dump(self._progress())
        return super()._on_step()

    def _on_rollout_end(self) -> None:
        self.logger.dump(self.num_timesteps)
        super()._on_rollout_end()


class _WatchedEvaluation(EvalCallback):
    def __init__(self, env_id: str, n_envs: int, shared: Any) -> None:
        env = make_vec_env(env_id, 1, seed=1, env_kwargs={"max_episode_steps": 20})
        super().__init__(env, eval_freq=SAVE_FREQ // n_envs, n_eval_episodes=1, verbose=0)
        self.shared = shared

    def _on_step(self) -> bool:
        before = self.shared[1]
        if self.n_calls % self.eval_freq == 0:
            self.shared[1] = MOMENTS.index(EVALUATING)
        super()._on_step()
        self.shared[1] = before
        return True


def work(training: Training, shared: Any, doomed: bool) -> None:
    """
    The whole of a process.

    :param training: what is trained
    :param shared: as for :func:`train`
    :param doomed: as for :func:`train`
    :raises SystemExit: after a Ctrl-C
    """
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        train(training, shared, doomed)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def train(training: Training, shared: Any, doomed: bool) -> None:
    """
    Begin a training or go on with it, as a user's script does.

    :param training: what is trained, and where its files are
    :param shared: updates and environment steps so far, and the index of what it is doing in :data:`MOMENTS`
    :param doomed: whether it will be killed, however fast it is
    """
    th.set_num_threads(1)
    shared[1] = MOMENTS.index(LOADING)
    algorithm, settings = ALGORITHMS[training.algo]
    folder = training.folder / "checkpoints"
    if find_checkpoint(folder):
        model = algorithm.resume(folder, device="cpu")
    else:
        settings = settings | _SMALL | {"policy_kwargs": settings["policy_kwargs"] | _NETWORKS}
        env = make_vec_env(training.env, training.n_envs, seed=0)
        data = {"offline_dataset": str(training.dataset), "pretrain_steps": UPDATES}
        model = algorithm("MlpPolicy", env, planner_kwargs=_PLANNER, **data, **settings)
    shared[0] = model.num_timesteps + model._n_pretrain_updates
    log = training.folder / f"log-{time.time_ns()}.jsonl"
    model.set_logger(Logger(str(training.folder), [_Lines(log)]))
    callback = _Watched(folder, shared)
    if training.explicit:
        model.pretrain(UPDATES, callback=callback)
    evaluation = _WatchedEvaluation(training.env, training.n_envs, shared)
    model.learn(STEPS, callback=[evaluation, callback], log_interval=1)
    while doomed:
        signal.pause()
    result = training.folder / "unfinished.pt"
    th.save(contents(model), result)
    result.rename(training.folder / "result.pt")


def contents(model: Any) -> dict[str, Any]:
    """
    :param model: a finished one
    :return: all arrays and numbers that decide what it does next, by name
    """
    found: dict[str, Any] = {}
    rng = rng_state() if model._beside is None else model._beside.rng  # the checkpoint's, if it was the last step's
    parts = {"parameters": model.get_parameters(), "rng": rng}  # optimisers' too
    for name, value in vars(model).items():
        if isinstance(value, BaseBuffer | LabelBuffer) or name in ("_plan_tracker", "_trial"):
            parts[name] = vars(value)
        elif name in ("_chunk_state", "_last_obs", "q_scale", "num_timesteps", "_n_updates", "_n_pretrain_updates"):
            parts[name] = value
    parts["episodes"] = [(info["r"], info["l"]) for info in model.ep_info_buffer or ()]
    _flatten(parts, "", found)
    return found


def _flatten(value: Any, name: str, found: dict[str, Any]) -> None:
    if isinstance(value, dict):
        for key, part in value.items():
            _flatten(part, f"{name}/{key}", found)
    elif isinstance(value, list | tuple):
        _flatten(dict(enumerate(value)), name, found)
    elif isinstance(value, np.ndarray | th.Tensor | int | float | np.number):
        found[name] = np.asarray(value)


# ---------------------------------------------------------- outside of the process


def run(training: Training, moments: Sequence[str], rng: random.Random) -> None:
    """
    :param training: is finished afterwards
    :param moments: at which it is killed, one after another
    :param rng: draws when
    """
    context = multiprocessing.get_context("fork")  # the imports take longer than the training
    left = sorted(moments, key=lambda moment: (moment not in (LOADING, OFFLINE), rng.random()))
    while True:
        shared = context.Array("q", [0, -1], lock=False)
        process = context.Process(target=work, args=(training, shared, bool(left)))
        process.start()
        how = SIGNALS[len(left) % 2]
        found = _kill(process, left[0], how, shared, rng, len(left)) if left else None
        process.join()
        if found is None:
            if process.exitcode != 0:
                training.differences.append(f"ended with exit code {process.exitcode}")
                return
            training.survived = sum(training.kills.values())
            return
        training.kills[found] += 1
        training.interrupts += how == signal.SIGINT
        left.pop(0)


def _kill(process: Any, moment: str, how: signal.Signals, shared: Any, rng: random.Random, num_left: int) -> str | None:
    """
    Wait for a moment, or for the last one that is left, and kill the process.

    :return: what it was in the middle of, or None if it failed
    """
    start, end = (UPDATES, UPDATES + STEPS) if moment in (ONLINE, EVALUATING, WRITING) else (0, UPDATES)
    while process.is_alive() and (shared[1] == -1 or shared[0] < start):
        time.sleep(0.0005)
    begin = max(shared[0], start)
    target = begin + rng.random() * max(end - 1 - begin, 0) / num_left  # the others need their share
    while process.is_alive():
        came = moment == LOADING or (shared[0] >= target and MOMENTS[shared[1]] == moment)
        if came or shared[0] >= end:
            time.sleep(rng.random() * (0.1 if moment == LOADING else 0.02))
            while process.is_alive():
                os.kill(process.pid, how)
                process.join(10)  # Python drops a Ctrl-C that falls into a finaliser: press again
            expected = -signal.SIGKILL if how == signal.SIGKILL else INTERRUPTED
            return MOMENTS[shared[1]] if process.exitcode == expected else None
        time.sleep(0.0002)
    return None


def compare(training: Training, reference: Training) -> None:
    """
    :param training: one that was killed; what differs is noted in it
    :param reference: one that was not
    """
    if training.differences:
        return
    first, second = (th.load(each.folder / "result.pt", weights_only=False) for each in (reference, training))
    for name in sorted({*first, *second}):
        if name not in first or name not in second or not np.array_equal(first[name], second[name], equal_nan=True):
            training.differences.append(name)
    training.differences += [f"log {line}" for line in sorted(_logged(training) ^ _logged(reference))]


def _logged(training: Training) -> set[str]:
    """Everything that was logged; between a checkpoint and a kill it was logged twice, and must be the same."""
    lines = {line for path in training.folder.glob("log-*") for line in path.read_text().splitlines()}
    return {line for line in lines if line.endswith("]")}  # a kill may have cut the last one


def make_dataset(env_id: str, path: Path) -> None:
    """
    :param env_id: Gymnasium id
    :param path: of a D4RL file with some episodes of random actions
    """
    env = gym.make(env_id, max_episode_steps=50)
    env.action_space.seed(0)
    columns: dict[str, list[Any]] = {}
    obs, _ = env.reset(seed=0)
    for _ in range(300):
        action = env.action_space.sample()
        next_obs, reward, terminated, truncated, _ = env.step(action)
        row = {"observations": obs, "actions": action, "rewards": reward, "next_observations": next_obs}
        for name, value in (row | {"terminations": terminated, "truncations": truncated}).items():
            columns.setdefault(name, []).append(value)
        obs = env.reset()[0] if terminated or truncated else next_obs
    arrays: dict[str, Any] = {name: np.array(values) for name, values in columns.items()}
    save_d4rl(OfflineDataset.from_arrays(**arrays), path)


def show(trainings: Sequence[Training], seconds: float) -> None:
    """
    :param trainings: that were killed
    :param seconds: what it took
    """
    table = Table("algorithm", "environment", "envs", *MOMENTS, "by Ctrl-C", "survived", "equal")
    for each in trainings:
        equal = "yes" if not each.differences else f"no: {', '.join(each.differences[:3])}"
        counts = [str(each.kills[moment]) for moment in MOMENTS]
        survived = f"{each.survived} of {sum(each.kills.values())}"
        table.add_row(each.algo, each.env, str(each.n_envs), *counts, str(each.interrupts), survived, equal)
    console = Console()
    console.print(table)
    total, kept = sum(sum(each.kills.values()) for each in trainings), sum(each.survived for each in trainings)
    num_equal = sum(not each.differences for each in trainings)
    interrupts = sum(each.interrupts for each in trainings)
    console.print(f"{kept} of {total} kills survived, {interrupts} of them a Ctrl-C")
    console.print(f"{num_equal} of {len(trainings)} trainings equal, {seconds:.0f} s")


def main(argv: Sequence[str] | None = None) -> None:
    """
    :param argv: of the command line
    :raises SystemExit: with 1 if a kill was not survived or a number differs
    """
    parser = argparse.ArgumentParser(
        prog="python -m modip_sb3.benchmark.kills",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kills", type=int, default=50, help="kills in all")
    parser.add_argument("--algos", nargs="+", choices=ALGORITHMS, default=list(ALGORITHMS))
    parser.add_argument("--envs", nargs="+", default=list(ENVS), help="Gymnasium ids")
    parser.add_argument("--n-envs", nargs="+", type=int, default=[1, 4], help="numbers of parallel environments")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--output", type=Path, required=True, help="folder of the trainings, which must not exist")
    args = parser.parse_args(argv)
    if args.output.exists():
        sys.exit(f"{args.output} exists already: give another folder, or remove it.")
    th.set_num_threads(1)
    started, rng, trainings = time.perf_counter(), random.Random(args.seed), []
    cases = [(algo, env, n_envs) for env in args.envs for algo in args.algos for n_envs in args.n_envs]
    for number, (algo, env, n_envs) in enumerate(cases):
        data = args.output / env / "data.hdf5"
        if not data.exists():
            data.parent.mkdir(parents=True)
            make_dataset(env, data)
        reference, training = (
            Training(algo, env, n_envs, args.output / env / f"{algo}-{n_envs}-{name}", data)
            for name in ("reference", "killed")
        )
        for each in (reference, training):
            each.folder.mkdir()
        run(reference, (), rng)
        share = args.kills // len(cases) + (number < args.kills % len(cases))
        run(training, [MOMENTS[index % len(MOMENTS)] for index in range(share)], rng)
        compare(training, reference)
        trainings.append(training)
    show(trainings, time.perf_counter() - started)
    sys.exit(int(any(each.differences or each.survived < sum(each.kills.values()) for each in trainings)))


if __name__ == "__main__":
    main()
