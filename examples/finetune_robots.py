"""
Clone a diffusion policy from a robot's demonstrations, fine-tune it with MODIP, and show what each stage achieves.

    python examples/finetune_robots.py --task lift      # makes the demonstrations first, if they are not there
    python examples/finetune_robots.py --task kitchen
    python examples/finetune_robots.py --task square --dataset datasets/square/ph/low_dim_v141.hdf5   # robomimic's data
    python examples/finetune_robots.py --task kitchen --env modip/kitchen-mixed-v1 \\
        --dataset D4RL/kitchen/mixed-v2 --obs-keys observation                         # D4RL's, which Minari downloads
"""

import argparse
import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import make_kitchen_demos
import make_robomimic_demos
from rich.console import Console
from rich.table import Table

from modip_sb3 import MODIP
from modip_sb3.acting import ActingMode
from modip_sb3.evaluation import Evaluation, evaluate

STAGES: tuple[tuple[str, ActingMode], ...] = (("MODIP, policy alone", "policy"), ("MODIP, policy + planner", "planner"))
# As in zoo_configs/modip.yml
ARM: dict[str, Any] = {"denoiser": "mlp", "condition_noise": "auto"}
SURER = {"n_action_steps": 4, "proposal_temperature": 0.3}
UNWEIGHTED: dict[str, Any] = {"distill_weighting": "uniform", "distill_episodes": "better"}
BY_TURNS = UNWEIGHTED | {"rollout_with": "auto"}
SETTINGS: dict[str, dict[str, Any]] = {
    "kitchen": BY_TURNS | {"policy_kwargs": {"denoiser": "mlp", "action_horizon": 8} | SURER},
    "lift": BY_TURNS | {"policy_kwargs": ARM},
    "can": UNWEIGHTED | {"rollout_with": "policy", "actor_reset_freq": 3500, "policy_kwargs": ARM | SURER},
    "square": BY_TURNS | {"policy_kwargs": ARM | SURER},
    "transport": BY_TURNS | {"policy_kwargs": ARM | SURER},
}
# The kitchen rewards each of its four subtasks once, so that the return of an evaluation is the number completed
COUNTING = {"terminate_on_tasks_completed": True, "remove_task_when_completed": True}


def row_of(stage: str, result: Evaluation, env_steps: int, best: int) -> dict[str, Any]:
    """What the table and the CSV say about an evaluation whose highest possible return is ``best``."""
    assert result.success_rate is not None
    return {
        "stage": stage,
        "env_steps": env_steps,
        "episodes": len(result.returns),
        "return": round(result.mean, 3),
        "standard_error": round(result.standard_error, 3),
        "score": round(result.mean / best, 3),
        "success": round(result.success_rate, 3),
        "length": round(float(result.lengths.mean()), 1),
    }


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Clone, evaluate, fine-tune, evaluate: a row for each stage, as soon as it is there."""
    is_kitchen = args.task == "kitchen"
    model = MODIP(
        "MlpPolicy",
        args.env,
        offline_dataset=args.dataset if args.obs_keys is None else {"dataset": args.dataset, "obs_keys": args.obs_keys},
        batch_size=128,
        seed=args.seed,
        tensorboard_log=str(args.output / "tensorboard"),
        **SETTINGS[args.task],
    )
    best, env_kwargs = (4, COUNTING) if is_kitchen else (1, None)
    model.pretrain(args.pretrain, progress_bar=True)
    model.pretrain(args.clone, clone_only=True, progress_bar=True)
    model.save(args.output / "bc")
    yield row_of("BC", evaluate(model, args.env, args.episodes, env_kwargs=env_kwargs), 0, best)
    model.learn(args.timesteps, progress_bar=True)
    model.save(args.output / "modip")
    for stage, inference in STAGES:
        result = evaluate(model, args.env, args.episodes, inference, env_kwargs=env_kwargs)
        yield row_of(stage, result, args.timesteps, best)


def make_demos(task: str, num_episodes: int) -> Path:
    """Demonstrations of our script, unless they are there already."""
    path = Path("runs") / task / "demos.hdf5"
    if path.exists():
        return path
    if task == "kitchen":
        make_kitchen_demos.make_demos(path, num_episodes)
    else:
        make_robomimic_demos.make_demos(path, task, num_episodes)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=list(SETTINGS), default="lift")
    parser.add_argument("--env", help="Gymnasium id (default: that of our demonstrations)")
    parser.add_argument("--dataset", help="demonstrations: HDF5 file or Minari id (default: runs/TASK/demos.hdf5)")
    parser.add_argument("--obs-keys", nargs="+", metavar="KEY", help="of Minari's Dict observations: 'observation'")
    parser.add_argument("--demos", type=int, default=200, help="episodes to make if there is no such file")
    parser.add_argument("--pretrain", type=int, default=5000, help="updates of all networks in the offline phase")
    parser.add_argument("--clone", type=int, default=25_000, help="updates of the policy alone after them")
    parser.add_argument("--timesteps", type=int, default=5000, help="environment steps of fine-tuning")
    parser.add_argument("--episodes", type=int, default=20, help="episodes of each evaluation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="folder of models and logs (default: runs/TASK)")
    args = parser.parse_args()
    if args.task == "transport" and args.dataset is None:
        parser.error("No script of ours does transport: name robomimic's file with --dataset.")
    args.env = args.env or f"modip/{args.task}-{'ph' if args.task == 'transport' else 'scripted'}-v1"
    args.output = args.output or Path("runs") / args.task
    args.output.mkdir(parents=True, exist_ok=True)
    args.dataset = args.dataset or str(make_demos(args.task, args.demos))

    rows: list[dict[str, Any]] = []
    with open(args.output / f"finetune-{args.seed}.csv", "w", newline="", buffering=1) as file:
        for row in run(args):
            if not rows:
                writer = csv.DictWriter(file, row)
                writer.writeheader()
            writer.writerow(row)
            rows.append(row)
            print(*(f"{name} {value}" for name, value in row.items()), sep=", ")
    what = "subtasks of 4" if args.task == "kitchen" else "return"
    table = Table("", f"{what} ± standard error", "score", "success", "steps", title=f"{args.env}, seed {args.seed}")
    for row in rows:
        mean = f"{row['return']:.2f} ± {row['standard_error']:.2f}"
        table.add_row(row["stage"], mean, f"{row['score']:.0%}", f"{row['success']:.0%}", f"{row['length']:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
