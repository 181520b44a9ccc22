"""
Clone a diffusion policy from the shipped Hopper data, fine-tune it with MODIP, and show the gain as numbers and a plot.

    python examples/finetune_hopper.py                       # one seed, the residual MLP denoiser
    python examples/finetune_hopper.py --seeds 0 1 2 --denoiser unet
"""

import argparse
import csv
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from rich.console import Console
from rich.table import Table
from stable_baselines3.common.callbacks import BaseCallback

from modip_sb3 import MODIP
from modip_sb3.datasets import normalized_score
from modip_sb3.evaluation import Evaluation, evaluate

ENV_ID = "Hopper-v5"
DATASET = Path(__file__).parent / "data" / "modip" / "hopper" / "sac-medium-v0"
FIELDS = ["denoiser", "seed", "stage", "inference", "env_steps", "updates", "mean", "standard_error", "seconds"]
STAGES = [
    ("BC", "bc", "policy"),
    ("BC continued (control)", "control", "policy"),
    ("MODIP, policy alone", "modip", "policy"),
    ("MODIP, policy + planner", "modip", "planner"),
]
Record = Callable[[str, Evaluation, int, int], None]


class EvaluationCallback(BaseCallback):
    """Evaluates the policy, alone and with the planner, every ``eval_freq`` environment steps of ``learn()``."""

    def __init__(self, eval_freq: int, n_episodes: int, record: Record):
        super().__init__()
        self.eval_freq, self.n_episodes, self.record = eval_freq, n_episodes, record

    def _on_step(self) -> bool:
        if self.num_timesteps % self.eval_freq == 0:
            for inference in ("policy", "planner"):
                result = evaluate(self.model, ENV_ID, self.n_episodes, inference)  # type: ignore[arg-type]
                self.record("curve", result, self.num_timesteps, self.model._n_updates)
        return True


def run_seed(args: argparse.Namespace, seed: int, record: Record) -> None:
    """The whole job for one seed; every evaluation goes to ``record``."""
    model = MODIP(
        "MlpPolicy",
        ENV_ID,
        offline_dataset=str(args.dataset),
        batch_size=128,
        train_freq=2,
        policy_kwargs={"denoiser": args.denoiser, **NETWORKS[args.denoiser]},
        seed=seed,
        tensorboard_log=str(args.output / "tensorboard"),
    )
    model.pretrain(args.pretrain - 4000, progress_bar=True)
    record("bc-4k", evaluate(model, ENV_ID, args.episodes), 0, model._n_pretrain_updates)
    model.pretrain(4000, progress_bar=True)
    record("bc", evaluate(model, ENV_ID, args.episodes), 0, model._n_pretrain_updates)
    model.save(args.output / f"{args.denoiser}-{seed}-bc")

    callback = EvaluationCallback(args.eval_freq, args.curve_episodes, record)
    model.learn(args.timesteps, callback=callback, progress_bar=True)
    model.save(args.output / f"{args.denoiser}-{seed}-modip")
    for inference in ("policy", "planner"):
        result = evaluate(model, ENV_ID, args.episodes, inference)  # type: ignore[arg-type]
        record("modip", result, args.timesteps, model._n_updates)

    control = MODIP.load(args.output / f"{args.denoiser}-{seed}-bc")
    control.clone(model._n_updates, progress_bar=True)
    record("control", evaluate(control, ENV_ID, args.episodes), 0, model._n_updates)
