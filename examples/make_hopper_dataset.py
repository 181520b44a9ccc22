"""
Make the Hopper data that the package ships: what SB3's SAC did on its way to a middling level, as a Minari dataset.

    python examples/make_hopper_dataset.py            # half an hour on one core; writes examples/data
"""

import argparse
from pathlib import Path

import numpy as np
import torch as th
from stable_baselines3 import SAC
from stable_baselines3.common.buffers import ReplayBuffer

from modip_sb3 import OfflineDataset
from modip_sb3.datasets import normalized_score, save_minari

ENV_ID = "Hopper-v5"
DATASET_ID = "modip/hopper/sac-medium-v0"
DESCRIPTION = (
    "The last episodes of a SAC run on Hopper-v5 that was stopped at a middling level: what the agent did while it "
    "learned, exploration included. Made by examples/make_hopper_dataset.py of modip_sb3."
)


def last_episodes(buffer: ReplayBuffer, num_transitions: int) -> OfflineDataset:
    """
    :param buffer: experience of one environment
    :param num_transitions: the latest episodes that are complete and together have about this many transitions are kept
    :return: their data
    """
    ends = np.flatnonzero(buffer.dones[: buffer.size(), 0])
    start = ends[ends <= ends[-1] - num_transitions][-1] + 1
    rows = slice(start, ends[-1] + 1)
    truncations = buffer.timeouts[rows, 0].astype(bool)
    return OfflineDataset.from_arrays(
        observations=buffer.observations[rows, 0],
        actions=buffer.actions[rows, 0],  # Hopper's bounds are [-1, 1]: scaled actions are the environment's
        rewards=buffer.rewards[rows, 0],
        terminations=buffer.dones[rows, 0].astype(bool) & ~truncations,
        truncations=truncations,
        next_observations=buffer.next_observations[rows, 0],
        env_id=ENV_ID,
        source="SAC replay buffer",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timesteps", type=int, default=120_000, help="environment steps of SAC")
    parser.add_argument("--keep", type=int, default=60_000, help="transitions to keep, the latest")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--path", type=Path, default=Path(__file__).parent / "data", help="folder of Minari datasets")
    args = parser.parse_args()

    th.set_num_threads(1)
    model = SAC("MlpPolicy", ENV_ID, learning_starts=1000, seed=args.seed)
    model.learn(args.timesteps, progress_bar=True)
    assert model.replay_buffer is not None
    dataset = last_episodes(model.replay_buffer, args.keep)
    folder = save_minari(dataset, DATASET_ID, path=args.path, description=DESCRIPTION, author="modip_sb3")
    mean_return = float(dataset.episode_returns.mean())
    print(
        f"{folder}: {dataset.num_transitions} transitions, {dataset.num_episodes} episodes, "
        f"mean return {mean_return:.0f} ({normalized_score(ENV_ID, mean_return):.1f})"
    )


if __name__ == "__main__":
    main()
