"""
Clone a diffusion policy from demonstrations of a robomimic task, fine-tune it with MODIP, and report success rates.

    python examples/make_robomimic_demos.py --task lift
    python examples/finetune_robomimic.py --task lift
    python examples/finetune_robomimic.py --task square --dataset datasets/square/ph/low_dim_v141.hdf5   # robomimic's
"""

import argparse
from pathlib import Path

from modip_sb3 import MODIP
from modip_sb3.envs import ROBOMIMIC_TASKS
from modip_sb3.evaluation import Evaluation, evaluate


def report(stage: str, result: Evaluation) -> None:
    assert result.success_rate is not None
    steps = result.lengths.mean()
    print(
        f"{stage}: success in {result.success_rate:.1%} of {len(result.returns)} episodes, {steps:.0f} steps on average"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=ROBOMIMIC_TASKS, default="lift")
    parser.add_argument("--dataset", type=Path, help="robomimic file (default: runs/TASK/demos.hdf5)")
    parser.add_argument("--pretrain", type=int, default=3000, help="updates of all networks in the offline phase")
    parser.add_argument("--clone", type=int, default=17_000, help="updates of the policy alone after them")
    parser.add_argument("--timesteps", type=int, default=2000, help="environment steps of fine-tuning")
    parser.add_argument("--episodes", type=int, default=20, help="episodes of each evaluation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="folder of models and logs (default: runs/TASK)")
    args = parser.parse_args()
    dataset = args.dataset or Path("runs") / args.task / "demos.hdf5"
    output = args.output or Path("runs") / args.task
    if not dataset.exists():
        parser.error(f"{dataset} is not there: make it with examples/make_robomimic_demos.py, or name a --dataset.")

    env_id = f"modip/{args.task}-ph-v1"
    model = MODIP(
        "MlpPolicy",
        env_id,
        offline_dataset=str(dataset),
        batch_size=128,
        train_freq=2,
        policy_kwargs={"denoiser": "mlp"},
        seed=args.seed,
        tensorboard_log=str(output / "tensorboard"),
    )
    model.pretrain(args.pretrain, progress_bar=True)
    model.pretrain(args.clone, clone_only=True, progress_bar=True)
    model.save(output / "bc")
    report("cloned", evaluate(model, env_id, args.episodes))
    model.learn(args.timesteps, progress_bar=True)
    model.save(output / "modip")
    report("fine-tuned, policy alone", evaluate(model, env_id, args.episodes))
    report("fine-tuned, policy + planner", evaluate(model, env_id, args.episodes, "planner"))


if __name__ == "__main__":
    main()
