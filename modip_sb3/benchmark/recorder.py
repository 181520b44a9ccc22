"""Evaluations, checkpoints and time of a run, as a callback of ``learn()``."""

import inspect
import resource
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback

from modip_sb3.acting import ActingMode
from modip_sb3.baselines import DiffusionBC
from modip_sb3.benchmark.runs import EVALUATION_COLUMNS, Row, RunFolder, evaluation_steps
from modip_sb3.checkpoint import isolated_rng, save_state
from modip_sb3.evaluation import evaluate
from modip_sb3.storage import whole_file, write_json

STATUS_INTERVAL = 1.0  # seconds between two updates of what the live table shows
MB = 1e6


@dataclass
class Totals:
    """What a run has taken so far; a part that was lost to a kill does not count."""

    train_seconds: float = 0.0
    """Offline phase and online learning, without evaluations and checkpoints"""
    cpu_seconds: float = 0.0
    """The processor time of all threads in it, which other work on the machine does not lengthen"""
    offline_seconds: float = 0.0
    evaluation_seconds: float = 0.0
    checkpoint_seconds: float = 0.0
    peak_memory_mb: float = 0.0

    def steps_per_second(self, env_steps: int) -> float | None:
        """
        :param env_steps: environment steps so far
        :return: of online learning, without evaluations; None before it
        """
        online = self.train_seconds - self.offline_seconds
        return env_steps / online if env_steps > 0 and online > 0 else None


class Recorder(BaseCallback):
    """
    Evaluates and checkpoints before the first environment step (after the offline phase), then every ``freq`` steps,
    and at the end; always between two rollouts, when everything collected is stored and learned from. A clone, which
    learns nothing online, is evaluated once, before its first step: with the same seeds all others would be the same.

    :param run: the run's folder
    :param settings: of the run
    :param env_kwargs: of the environments
    :param totals: what the run has taken so far
    :param rows: evaluation episodes so far
    """

    def __init__(
        self, run: RunFolder, settings: dict[str, Any], env_kwargs: dict[str, Any], totals: Totals, rows: list[Row]
    ) -> None:
        super().__init__()
        self.run, self.settings, self.env_kwargs = run, settings, env_kwargs
        self.totals, self.rows = totals, rows
        self.last_evaluation = int(rows[-1]["env_steps"]) if rows else -1

    def _on_training_start(self) -> None:
        self.status_time = 0.0
        self._start_watch()

    def _on_rollout_start(self) -> None:
        freq = self.settings["evaluation"]["freq"]
        if self.last_evaluation < 0 or self.num_timesteps // freq > self.last_evaluation // freq:
            self.record()

    def _on_step(self) -> bool:
        if isinstance(self.model, DiffusionBC):
            return False
        if time.perf_counter() - self.status_time > STATUS_INTERVAL:
            self._stop_watch()
            self._report()
        return True

    def _on_training_end(self) -> None:
        if isinstance(self.model, DiffusionBC):
            self._repeat_evaluation()
        elif self.num_timesteps > self.last_evaluation:
            self.record()

    def _repeat_evaluation(self) -> None:
        """The last evaluation stands for all later ones."""
        last = [row for row in self.rows if int(row["env_steps"]) == self.last_evaluation]
        for due in evaluation_steps(self.settings):
            if due > self.last_evaluation:
                self.rows += [row | {"env_steps": due} for row in last]
        self.run.write_evaluations(self.rows)

    def _start_watch(self) -> None:
        self.since, self.cpu_since = time.perf_counter(), time.process_time()

    def _stop_watch(self) -> None:
        self.totals.train_seconds += time.perf_counter() - self.since
        self.totals.cpu_seconds += time.process_time() - self.cpu_since
        self._start_watch()

    def record(self) -> None:
        """Evaluate, then save everything; neither counts as training time."""
        self._stop_watch()
        if self.num_timesteps == 0:
            self.totals.offline_seconds = self.totals.train_seconds
        self.rows += self._evaluate()
        self.last_evaluation = self.num_timesteps
        self.totals.evaluation_seconds += time.perf_counter() - self.since
        started = time.perf_counter()
        self.save()
        self.totals.checkpoint_seconds += time.perf_counter() - started
        self._report()
        self._start_watch()

    def _evaluate(self) -> list[Row]:
        rows = []
        protocol = self.settings["evaluation"]
        with isolated_rng(self.settings["seed"]):
            for inference in inferences(self.model):
                result = evaluate(
                    self.model,
                    self.settings["env"],
                    protocol["episodes"],
                    inference,
                    protocol["seed"],
                    self.settings["deterministic"],
                    env_kwargs=self.env_kwargs,
                )
                successes = [None] * len(result.returns) if result.successes is None else result.successes.astype(int)
                acted = (self.num_timesteps, round(self.totals.train_seconds, 3), inference)
                for episode, figures in enumerate(zip(result.returns, result.lengths, successes, strict=True)):
                    rows.append(dict(zip(EVALUATION_COLUMNS, (*acted, episode, *figures), strict=True)))
        return rows

    def save(self) -> None:
        """A checkpoint; the evaluations beside it are those in it."""
        self.totals.peak_memory_mb = peak_memory_mb(self.totals)
        with self.run.new_checkpoint(self.num_timesteps) as folder:
            save_state(self.model, folder)
            write_json(folder / "totals.json", asdict(self.totals))
            RunFolder(folder).write_evaluations(self.rows)
            shutil.copy(self.run.path / "progress.csv", folder)
        self.run.write_evaluations(self.rows)

    def _report(self) -> None:
        self.status_time = time.perf_counter()
        last = [row for row in self.rows if row["env_steps"] == self.last_evaluation]
        means = {
            inference: float(np.mean([float(row["return"]) for row in last if row["inference"] == inference]))
            for inference in dict.fromkeys(row["inference"] for row in last)
        }
        self.run.update_status(
            env_steps=self.num_timesteps,
            steps_per_second=self.totals.steps_per_second(self.num_timesteps),
            last_evaluation={"env_steps": self.last_evaluation, **means} if last else None,
            **asdict(self.totals),
        )


# ----------------------------------------------------------------------- helpers


def inferences(model: BaseAlgorithm) -> tuple[ActingMode, ...]:
    """
    :param model: an algorithm
    :return: who can act for it
    """
    return ("policy", "planner") if "inference" in inspect.signature(type(model)).parameters else ("policy",)


def save_model(model: BaseAlgorithm, folder: Path) -> None:
    """
    SB3's ``model.zip``, and ``vecnormalize.pkl`` if observations or rewards are normalised.

    :param model: what to save
    :param folder: where
    """
    statistics = model.get_vec_normalize_env()
    if statistics is not None:
        statistics.save(str(folder / "vecnormalize.pkl"))
    with whole_file(folder / "model.zip") as unfinished:
        model.save(unfinished)


def peak_memory_mb(totals: Totals) -> float:
    """
    :param totals: of the run, whose earlier sessions count too
    :return: the most that the process held, without what it was forked from where /proc tells
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        peak = int(line.split()[1]) * 1024 / MB
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / MB  # in bytes on macOS
    return max(peak, totals.peak_memory_mb)
