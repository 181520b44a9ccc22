"""One run, from the settings in its folder to a finished model; called again it goes on from its last checkpoint."""

import argparse
import json
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import CSVOutputFormat, Logger
from stable_baselines3.common.vec_env import VecEnv

from modip_sb3.acting import ActingMode
from modip_sb3.baselines import DiffusionBC
from modip_sb3.benchmark.recorder import (
    Recorder,
    Totals,
    inferences,
    peak_memory_mb,
    save_model,
)
from modip_sb3.benchmark.runs import RunFolder, locked, read_rows
from modip_sb3.benchmark.settings import base_of, describe_hardware, describe_software, find_algorithm
from modip_sb3.checkpoint import load_state
from modip_sb3.resume import ResumableAlgorithm

LATENCY_STEPS = 40


def execute(folder: Path, threads: int) -> None:
    """
    Start a run or go on with it. This is all that a backend needs to call.

    :param folder: of the run, with its ``config.json``
    :param threads: of torch
    :raises Exception: what stopped the run; its folder then says "failed", and has the traceback
    """
    run = RunFolder(folder)
    th.set_num_threads(threads)
    with locked(folder, wait=True):
        try:
            _learn(run, threads)
        except Exception as error:
            (folder / "traceback.txt").write_text(traceback.format_exc())
            run.update_status(state="failed", error=f"{type(error).__name__}: {error}")
            raise
        except (SystemExit, KeyboardInterrupt):
            run.update_status(state="stopped")
            raise


def _learn(run: RunFolder, threads: int) -> None:
    settings = run.read_settings()
    checkpoint = run.last_checkpoint()
    if checkpoint is None:
        model, env, env_kwargs = make_model(settings, run.path)
        totals, rows = Totals(), []
    else:
        model, env, env_kwargs = restore_model(settings, run.path, checkpoint)
        totals = Totals(**json.loads((checkpoint / "totals.json").read_text()))
        rows = read_rows(checkpoint / "evaluations.csv")
    session = {
        "from_step": model.num_timesteps,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        **describe_hardware(threads, str(model.device)),
        "commit": describe_software()["commit"],
    }
    sessions = [*run.read_status().get("sessions", []), session]
    run.update_status(state="running", error=None, env_steps=model.num_timesteps, sessions=sessions)
    run.write_evaluations(rows)
    (run.path / "traceback.txt").unlink(missing_ok=True)
    output = _progress_output(run.path, checkpoint)
    model.set_logger(Logger(str(run.path), [output]))
    recorder = Recorder(run, settings, env_kwargs, totals, rows)
    model.learn(settings["timesteps"] - model.num_timesteps, callback=recorder, reset_num_timesteps=False)
    latency = {inference: _milliseconds(model, settings, env_kwargs, inference) for inference in inferences(model)}
    save_model(model, run.path)
    env.close()
    output.close()
    run.update_status(state="finished", ms_per_action=latency, peak_memory_mb=peak_memory_mb(totals))
    run.remove_checkpoints()


# ------------------------------------------------------------------------ models


def make_model(settings: dict[str, Any], folder: Path) -> tuple[BaseAlgorithm, VecEnv, dict[str, Any]]:
    """
    :param settings: of a run
    :param folder: of the run
    :return: a new model as rl_zoo3 makes it from its YAML files, its environments, and what they were made with
    """
    env, env_kwargs, hyperparameters = _make_env(settings, folder, settings["seed"])
    algorithm = find_algorithm(settings["algo"])
    chosen = {"env": env, "seed": settings["seed"], "device": settings["device"]}
    if "start_from" in settings:
        cloned = DiffusionBC.load(settings["start_from"]["model"], device=settings["device"])
        del hyperparameters["policy"]
        return algorithm.from_pretrained(cloned, **chosen, **hyperparameters), env, env_kwargs
    return algorithm(**chosen, **hyperparameters), env, env_kwargs


def restore_model(
    settings: dict[str, Any], folder: Path, checkpoint: Path
) -> tuple[BaseAlgorithm, VecEnv, dict[str, Any]]:
    """
    :param settings: of a run
    :param folder: of the run
    :param checkpoint: what :meth:`Recorder.save` wrote
    :return: as :func:`make_model`
    """
    env, env_kwargs, _ = _make_env(settings, folder, settings["seed"])
    model, beside = load_state(find_algorithm(settings["algo"]), checkpoint, env, settings["device"])
    if isinstance(model, ResumableAlgorithm):
        model.go_on_with(beside)
    else:
        beside.restore(model)
    return model, env, env_kwargs


def _make_env(settings: dict[str, Any], folder: Path, seed: int) -> tuple[VecEnv, dict[str, Any], dict[str, Any]]:
    from rl_zoo3.exp_manager import ExperimentManager

    manager = ExperimentManager(
        argparse.Namespace(),
        base_of(settings["algo"]),
        settings["env"],
        log_folder=str(folder),
        n_timesteps=settings["timesteps"],
        seed=seed,
        verbose=0,
        device=settings["device"],
    )
    raw = {**settings["hyperparameters"], "n_timesteps": settings["timesteps"]}
    hyperparameters, *_ = manager._preprocess_hyperparams(dict(raw))
    env = manager.create_envs(manager.n_envs, no_log=True)
    return env, manager.env_kwargs, manager._preprocess_action_noise(hyperparameters, raw, env)


def _progress_output(folder: Path, checkpoint: Path | None) -> CSVOutputFormat:
    """SB3's CSV logger, which begins a new file, with the rows of the checkpoint in it."""
    output = CSVOutputFormat(str(folder / "progress.csv"))
    if checkpoint is not None:
        for row in read_rows(checkpoint / "progress.csv"):
            output.write({name: _number(value) for name, value in row.items() if value}, {})
    return output


def _number(text: str) -> float:
    return int(text) if text.lstrip("-").isdigit() else float(text)


def _milliseconds(model: Any, settings: dict[str, Any], env_kwargs: dict[str, Any], inference: ActingMode) -> float:
    """Mean time of ``predict`` on one environment, with the rest of chunks and plans carried on as in use."""
    env = make_vec_env(settings["env"], seed=settings["evaluation"]["seed"], env_kwargs=env_kwargs)
    previous = getattr(model, "inference", None)
    if previous is not None:
        model.inference = inference
    observations, state, starts = env.reset(), None, np.ones(1, dtype=bool)
    seconds = 0.0
    for step in range(-LATENCY_STEPS // 4, LATENCY_STEPS):  # the first calls are slower and do not count
        started = time.perf_counter()
        actions, state = model.predict(observations, state, starts, settings["deterministic"])
        seconds += (time.perf_counter() - started) * (step >= 0)
        observations, _, starts, _ = env.step(actions)
    if previous is not None:
        model.inference = model.policy.inference = previous
    env.close()
    return 1000 * seconds / LATENCY_STEPS
