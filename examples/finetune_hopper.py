"""
Clone a diffusion policy from the shipped Hopper data, fine-tune it with MODIP, and show the gain as numbers and a plot.
Other data of the MuJoCo tasks goes through the same steps.

    python examples/finetune_hopper.py                       # one seed, the residual MLP denoiser
    python examples/finetune_hopper.py --seeds 0 1 2 --denoiser unet
    python examples/finetune_hopper.py --env Walker2d-v5 --dataset walker2d-medium.hdf5
"""

import argparse
import csv
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from stable_baselines3.common.callbacks import BaseCallback

from modip_sb3 import MODIP
from modip_sb3.acting import ActingMode
from modip_sb3.datasets import normalized_score
from modip_sb3.evaluation import Evaluation, evaluate

DATASET = Path(__file__).parent / "data" / "modip" / "hopper" / "sac-medium-v0"
FIELDS = ["denoiser", "seed", "stage", "inference", "env_steps", "updates", "mean", "standard_error", "seconds"]
STAGES = [
    ("BC", "bc", "policy"),
    ("BC continued (control)", "control", "policy"),
    ("MODIP, policy alone", "modip", "policy"),
    ("MODIP, policy + planner", "modip", "planner"),
]
MODES: tuple[ActingMode, ...] = ("policy", "planner")
evaluate_at_once = partial(evaluate, n_envs=20)
Record = Callable[[str, Evaluation, int, int], None]


class EvaluationCallback(BaseCallback):
    """Evaluates the policy, alone and with the planner, every ``eval_freq`` environment steps before the last one."""

    model: MODIP

    def __init__(self, env_id: str, eval_freq: int, n_episodes: int, record: Record):
        super().__init__()
        self.env_id, self.eval_freq, self.n_episodes, self.record = env_id, eval_freq, n_episodes, record

    def _on_step(self) -> bool:
        if self.num_timesteps % self.eval_freq == 0 and self.num_timesteps < self.model._total_timesteps:
            for inference in MODES:
                result = evaluate_at_once(self.model, self.env_id, self.n_episodes, inference)
                self.record("curve", result, self.num_timesteps, self.model._n_updates)
        return True


def run_seed(args: argparse.Namespace, seed: int, record: Record) -> None:
    """The whole job for one seed; every evaluation goes to ``record``."""
    model = MODIP(
        "MlpPolicy",
        args.env,
        offline_dataset=str(args.dataset),
        batch_size=128,
        train_freq=2,
        gamma=0.995,  # at 0.99 a fast gait that falls after 250 steps is worth more than a slower one that never does
        policy_kwargs={"denoiser": args.denoiser},
        seed=seed,
        tensorboard_log=str(args.output / "tensorboard"),
    )
    model.pretrain(args.pretrain, progress_bar=True)
    model.pretrain(args.clone, clone_only=True, progress_bar=True)
    record("bc-before", evaluate_at_once(model, args.env, args.episodes), 0, model._n_pretrain_updates)
    model.pretrain(args.bc_gap, clone_only=True, progress_bar=True)
    record("bc", evaluate_at_once(model, args.env, args.episodes), 0, model._n_pretrain_updates)
    model.save(args.output / f"{args.denoiser}-{seed}-bc")

    callback = EvaluationCallback(args.env, args.eval_freq, args.curve_episodes, record)
    model.learn(args.timesteps, callback=callback, progress_bar=True)
    model.save(args.output / f"{args.denoiser}-{seed}-modip")
    for inference in MODES:
        result = evaluate_at_once(model, args.env, args.episodes, inference)
        record("modip", result, args.timesteps, model._n_updates)

    control = MODIP.load(args.output / f"{args.denoiser}-{seed}-bc", offline_dataset=str(args.dataset))
    control.pretrain(model._n_updates, clone_only=True, progress_bar=True)
    record("control", evaluate_at_once(control, args.env, args.episodes), 0, model._n_updates)


def mean_and_spread(rows: list[dict[str, Any]]) -> tuple[float, float]:
    """Mean over seeds, and its spread: over seeds, or over the episodes of a single one."""
    means = np.array([row["mean"] for row in rows])
    return float(means.mean()), float(means.std(ddof=1) if len(means) > 1 else rows[0]["standard_error"])


def print_table(rows: list[dict[str, Any]], env_id: str, denoiser: str, num_seeds: int) -> None:
    """The gain over behaviour cloning, stage by stage."""
    spread_name = f"standard deviation over {num_seeds} seeds" if num_seeds > 1 else "standard error over episodes"
    table = Table(title=f"{env_id}, {denoiser} denoiser: mean return ± {spread_name}")
    for column in ("", "return", "normalised", "× BC", "updates"):
        table.add_column(column, justify="right" if column else "left")
    bc_mean = mean_and_spread([row for row in rows if row["stage"] == "bc"])[0]
    for label, stage, inference in STAGES:
        chosen = [row for row in rows if (row["stage"], row["inference"]) == (stage, inference)]
        mean, spread = mean_and_spread(chosen)
        table.add_row(
            label,
            f"{mean:.0f} ± {spread:.0f}",
            f"{normalized_score(env_id, mean):.1f}",
            f"{mean / bc_mean:.2f}",
            str(chosen[0]["updates"]),
        )
    Console().print(table)


def plot(rows: list[dict[str, Any]], env_id: str, denoiser: str, path: Path) -> None:
    """Learning curves on the left, the gain on the right."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (curve_axis, bar_axis) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    bc_mean = mean_and_spread([row for row in rows if row["stage"] == "bc"])[0]
    for label, _, inference in STAGES[2:]:
        points = [row for row in rows if row["inference"] == inference and row["stage"] in ("curve", "modip")]
        steps = sorted({row["env_steps"] for row in points})
        stats = [mean_and_spread([row for row in points if row["env_steps"] == step]) for step in steps]
        means, spreads = np.array(stats).T
        (line,) = curve_axis.plot(steps, means, marker="o", label=label)
        curve_axis.fill_between(steps, means - spreads, means + spreads, color=line.get_color(), alpha=0.2)
    curve_axis.axhline(bc_mean, color="0.4", linestyle="--", label="BC")
    curve_axis.set(xlabel="environment steps", ylabel="return", title=f"{env_id}, {denoiser} denoiser")
    curve_axis.legend()
    stats = [
        mean_and_spread([row for row in rows if (row["stage"], row["inference"]) == (stage, inference)])
        for _, stage, inference in STAGES
    ]
    means, spreads = np.array(stats).T
    bars = bar_axis.bar(range(len(STAGES)), means, yerr=spreads, capsize=4, color=["0.6", "0.8", "C0", "C1"])
    bar_axis.bar_label(bars, labels=[f"{mean / bc_mean:.2f} × BC" for mean in means], padding=3)
    bar_axis.set_xticks(range(len(STAGES)), [label.replace(" (", "\n(").replace(", ", ",\n") for label, *_ in STAGES])
    bar_axis.set(ylabel="return", title="after fine-tuning")
    bar_axis.margins(y=0.15)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--denoiser", choices=["mlp", "unet"], default="mlp")
    parser.add_argument("--env", default="Hopper-v5", help="Hopper-v5, Walker2d-v5 or HalfCheetah-v5")
    parser.add_argument("--dataset", default=DATASET, help="Minari id or folder, or HDF5 file, of that environment")
    parser.add_argument("--pretrain", type=int, default=7500, help="updates of all networks in the offline phase")
    parser.add_argument("--clone", type=int, default=2500, help="updates of the policy alone after them")
    parser.add_argument(
        "--bc-gap", type=int, default=2000, help="updates between two evaluations of BC that should agree"
    )
    parser.add_argument("--timesteps", type=int, default=2500, help="environment steps of fine-tuning")
    parser.add_argument("--episodes", type=int, default=20, help="episodes of each evaluation in the table")
    parser.add_argument("--curve-episodes", type=int, default=10, help="episodes of each evaluation in the curves")
    parser.add_argument(
        "--eval-freq", type=int, default=1250, help="environment steps between two points of the curves"
    )
    parser.add_argument("--output", type=Path, help="folder to write to, runs/hopper for Hopper-v5")
    args = parser.parse_args()
    if args.timesteps < args.eval_freq:
        parser.error(f"--timesteps {args.timesteps} must be at least --eval-freq {args.eval_freq}: no curve otherwise.")
    args.output = args.output or Path("runs") / args.env.split("-")[0].lower()
    args.output.mkdir(parents=True, exist_ok=True)

    rows: list[dict[str, Any]] = []
    with open(args.output / f"{args.denoiser}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        for seed in args.seeds:
            start = time.time()

            def record(
                stage: str, result: Evaluation, env_steps: int, updates: int, seed: int = seed, start: float = start
            ) -> None:
                values = [args.denoiser, seed, stage, result.inference, env_steps, updates]
                values += [round(result.mean, 1), round(result.standard_error, 1), round(time.time() - start)]
                rows.append(dict(zip(FIELDS, values, strict=True)))
                writer.writerow(rows[-1])
                file.flush()
                Console().print(
                    f"seed {seed} {stage} {result.inference}: {result.mean:.0f} ± {result.standard_error:.0f}"
                )

            run_seed(args, seed, record)
    print_table(rows, args.env, args.denoiser, len(args.seeds))
    plot(rows, args.env, args.denoiser, args.output / f"{args.denoiser}.png")
    Console().print(f"curves: {args.output / args.denoiser}.csv   plot: {args.output / args.denoiser}.png")


if __name__ == "__main__":
    main()
