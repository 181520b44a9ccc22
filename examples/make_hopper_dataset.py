"""
Make the Hopper data that the package ships: rollouts of a SAC agent at a middling level, as a Minari dataset.

    python examples/make_hopper_dataset.py            # half an hour on one core; writes examples/data
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3 import SAC
from stable_baselines3.common.callbacks import CheckpointCallback

from modip_sb3 import OfflineDataset
from modip_sb3.datasets import normalized_score, save_minari

ENV_ID = "Hopper-v5"
DATASET_ID = "modip/hopper/sac-medium-v0"
DESCRIPTION = (
    "Sampled actions of the last five checkpoints, 10,000 steps apart, of SB3's SAC stopped at a middling level on "
    "Hopper-v5; a fifth of the transitions each. Made by examples/make_hopper_dataset.py of modip_sb3."
)


def roll_out(model: SAC, num_transitions: int, seed: int) -> dict[str, Any]:
    """
    :param model: the agent, whose actions are sampled
    :param num_transitions: whole episodes are collected until there are this many
    :param seed: of the first episode; the others count on
    :return: arrays that ``OfflineDataset.from_arrays`` takes
    """
    env = gym.make(ENV_ID)
    names = ("observations", "actions", "rewards", "terminations", "truncations", "next_observations")
    steps: list[tuple[Any, ...]] = []
    while len(steps) < num_transitions:
        obs, _ = env.reset(seed=seed)
        seed, ended = seed + 1, False
        while not ended:
            action, _ = model.predict(obs, deterministic=False)
            next_obs, reward, terminated, truncated, _ = env.step(action)
            steps.append((obs, action, reward, terminated, truncated and not terminated, next_obs))
            obs, ended = next_obs, terminated or truncated
    return {name: np.array(column) for name, column in zip(names, zip(*steps, strict=True), strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timesteps", type=int, default=120_000, help="environment steps of SAC")
    parser.add_argument("--transitions", type=int, default=60_000, help="transitions to collect")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--path", type=Path, default=Path(__file__).parent / "data", help="folder of Minari datasets")
    args = parser.parse_args()

    th.set_num_threads(1)
    with TemporaryDirectory() as folder:
        model = SAC("MlpPolicy", ENV_ID, learning_starts=1000, seed=args.seed)
        model.learn(args.timesteps, callback=CheckpointCallback(args.timesteps // 12, folder), progress_bar=True)
        parts = []
        for number in range(8, 13):
            checkpoint = SAC.load(f"{folder}/rl_model_{number * (args.timesteps // 12)}_steps")
            checkpoint.set_random_seed(number)
            parts.append(roll_out(checkpoint, args.transitions // 5, seed=1000 * number))
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    dataset = OfflineDataset.from_arrays(**arrays, env_id=ENV_ID, source="rollouts of SAC")
    path = save_minari(dataset, DATASET_ID, path=args.path, description=DESCRIPTION, author="modip_sb3")
    mean_return = float(dataset.episode_returns.mean())
    print(
        f"{path}: {dataset.num_transitions} transitions, {dataset.num_episodes} episodes, "
        f"mean return {mean_return:.0f} ({normalized_score(ENV_ID, mean_return):.1f})"
    )


if __name__ == "__main__":
    main()
