"""
How close the environment that a robomimic dataset describes comes to the data: observations of the stored simulator
states beside the stored observations.

    python -m modip_sb3.benchmark.fidelity datasets/lift/ph/low_dim_v141.hdf5
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from modip_sb3.datasets.files import open_hdf5
from modip_sb3.envs.robomimic import RobomimicEnv


def compare(path: Path, every: int = 1) -> tuple[dict[str, float], int]:
    """
    Set the simulator to the states of a dataset, and observe.

    :param path: A robomimic dataset with states and low-dimensional observations.
    :param every: Take every n-th state of each demonstration.
    :return: The largest absolute difference in each observation, and the number of states.
    :raises ValueError: If the file has no states.
    """
    env = RobomimicEnv(path)
    env.reset(seed=0)
    differences: list[np.ndarray] = []
    with open_hdf5(path) as file:
        for name, demo in tqdm(file["data"].items(), desc="demonstrations"):
            if "states" not in demo or "obs" not in demo:
                raise ValueError(f"{path}: {name} holds {sorted(demo)}, expected states and obs; extract them first.")
            stored = np.concatenate([demo["obs"][key][::every] for key in env.obs_keys], axis=1)
            for state, expected in zip(demo["states"][::every], stored, strict=True):
                env.simulator_state = state
                differences.append(np.abs(env.observe() - expected))
    env.close()
    worst = env.split(np.max(differences, axis=0))
    return {key: float(values.max()) for key, values in worst.items()}, len(differences)


def main(argv: Sequence[str] | None = None) -> int:
    """
    Print the table.

    :param argv: Arguments; those of the process by default.
    :return: The exit code: 0 if all is within the tolerance, 1 if not, or 2 after an error that the user can mend.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path, help="robomimic HDF5 file with states")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only every n-th state")
    parser.add_argument("--tolerance", type=float, default=1e-6, help="metres, radians (%(default)s)")
    args = parser.parse_args(argv)
    try:
        worst, num_states = compare(args.dataset, args.every)
    except (ValueError, OSError, ImportError) as error:
        sys.stderr.write(" ".join(str(error).split()) + "\n")
        return 2
    table = Table("observation", "largest difference", title=f"{num_states:,} states of {args.dataset.name}")
    for key, difference in worst.items():
        table.add_row(key, f"{difference:.1e}")
    Console().print(table)
    return int(max(worst.values()) > args.tolerance)


if __name__ == "__main__":
    sys.exit(main())
