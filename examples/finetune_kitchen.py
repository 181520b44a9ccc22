"""
Clone a diffusion policy from kitchen demonstrations, fine-tune it with MODIP, and count the subtasks it completes.

    python examples/finetune_kitchen.py                      # makes the demonstrations first, if they are not there
    python examples/finetune_kitchen.py --env modip/kitchen-mixed-v1 --dataset D4RL/kitchen/mixed-v2 \\
        --obs-keys observation                               # D4RL's data, which Minari downloads
"""

import argparse
import csv
from pathlib import Path
from typing import Any

from make_kitchen_demos import ENV_ID, make_demos
from rich.console import Console
from rich.table import Table

from modip_sb3 import MODIP
from modip_sb3.evaluation import Evaluation, evaluate
from modip_sb3.policies import ActingMode

DEMOS = Path("runs/kitchen/demos.hdf5")
# Each subtask is rewarded once, so that the return of an evaluation is the number completed
COUNTING = {"terminate_on_tasks_completed": True, "remove_task_when_completed": True}
STAGES: tuple[tuple[str, ActingMode], ...] = (("MODIP, policy alone", "policy"), ("MODIP, policy + planner", "planner"))


def row_of(stage: str, result: Evaluation, env_steps: int) -> dict[str, Any]:
    """What the table and the CSV say about an evaluation; every subtask completed is worth a quarter."""
    assert result.success_rate is not None
    return {
        "stage": stage,
        "env_steps": env_steps,
        "episodes": len(result.returns),
        "completed": round(result.mean, 3),
        "standard_error": round(result.standard_error, 3),
        "completed/4": round(result.mean / 4, 3),
        "all_four": round(result.success_rate, 3),
        "length": round(float(result.lengths.mean()), 1),
    }


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Clone, evaluate, fine-tune, evaluate."""
    model = MODIP(
        "MlpPolicy",
        args.env,
        offline_dataset=args.dataset if args.obs_keys is None else {"dataset": args.dataset, "obs_keys": args.obs_keys},
        batch_size=128,
        train_freq=2,
        policy_kwargs={"denoiser": "mlp"},
        seed=args.seed,
        tensorboard_log=str(args.output / "tensorboard"),
    )
    model.pretrain(args.pretrain, progress_bar=True)
    model.pretrain(args.clone, clone_only=True, progress_bar=True)
    model.save(args.output / "bc")
    rows = [row_of("BC", evaluate(model, args.env, args.episodes, env_kwargs=COUNTING), 0)]
    model.learn(args.timesteps, progress_bar=True)
    model.save(args.output / "modip")
    for stage, inference in STAGES:
        result = evaluate(model, args.env, args.episodes, inference, env_kwargs=COUNTING)
        rows.append(row_of(stage, result, args.timesteps))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default=ENV_ID, help="Gymnasium id of the kitchen")
    parser.add_argument("--dataset", help=f"demonstrations: Minari id or HDF5 file ({DEMOS}, made if it is not there)")
    parser.add_argument("--obs-keys", nargs="+", metavar="KEY", help="of Minari's Dict observations: 'observation'")
    parser.add_argument("--demos", type=int, default=200, help="episodes to make if there is no such file")
    parser.add_argument("--pretrain", type=int, default=5000, help="updates of all networks in the offline phase")
    parser.add_argument("--clone", type=int, default=15_000, help="updates of the policy alone after them")
    parser.add_argument("--timesteps", type=int, default=5000, help="environment steps of fine-tuning")
    parser.add_argument("--episodes", type=int, default=20, help="episodes of each evaluation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/kitchen"))
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    if args.dataset is None:
        args.dataset = str(DEMOS)
        if not DEMOS.exists():
            make_demos(DEMOS, args.demos)

    rows = run(args)
    with open(args.output / "finetune.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    table = Table("", "completed ± standard error", "completed / 4", "all four", "steps", title=args.env)
    for row in rows:
        completed = f"{row['completed']:.2f} ± {row['standard_error']:.2f}"
        shares = [f"{row[name]:.0%}" for name in ("completed/4", "all_four")]
        table.add_row(row["stage"], completed, *shares, f"{row['length']:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
