"""
Make the Hopper data that the package ships: rollouts of a SAC agent at a middling level, as a Minari dataset.

    python examples/make_hopper_dataset.py            # half an hour on one core; writes examples/data
"""

import argparse
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch as th
from rich.console import Console
from stable_baselines3 import SAC
from stable_baselines3.common.callbacks import CheckpointCallback

from modip_sb3.datasets import collect, concatenate, save_minari, summarize
from modip_sb3.datasets.minari_io import new_minari_folder
from modip_sb3.datasets.report import summary_table

ENV_ID = "Hopper-v5"
DATASET_ID = "modip/hopper/sac-medium-v0"
DESCRIPTION = (
    "Sampled actions of the last five checkpoints, 10,000 steps apart, of SB3's SAC stopped at a middling level on "
    "Hopper-v5; a fifth of the transitions each. Made by examples/make_hopper_dataset.py of modip_sb3."
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timesteps", type=int, default=120_000, help="environment steps of SAC")
    parser.add_argument("--transitions", type=int, default=60_000, help="transitions to collect")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--path", type=Path, default=Path(__file__).parent / "data", help="folder of Minari datasets")
    args = parser.parse_args()
    new_minari_folder(DATASET_ID, args.path)  # fails now, or half an hour later

    th.set_num_threads(1)
    with TemporaryDirectory() as folder:
        model = SAC("MlpPolicy", ENV_ID, learning_starts=1000, seed=args.seed)
        model.learn(args.timesteps, callback=CheckpointCallback(args.timesteps // 12, folder), progress_bar=True)
        parts = []
        for number in range(8, 13):
            checkpoint = SAC.load(f"{folder}/rl_model_{number * (args.timesteps // 12)}_steps")
            parts.append(collect(checkpoint, ENV_ID, num_steps=args.transitions // 5, seed=number, progress_bar=True))
    dataset = concatenate(parts, source="rollouts of SAC")
    path = save_minari(dataset, DATASET_ID, path=args.path, description=DESCRIPTION, author="modip_sb3")
    Console().print(summary_table(summarize(replace(dataset, source=str(path)))))


if __name__ == "__main__":
    main()
