"""The examples run from the command line, with budgets that teach nothing."""

import csv
import os
import subprocess
import sys
from pathlib import Path

from stable_baselines3 import SAC

from modip_sb3 import OfflineDataset
from modip_sb3.datasets import collect, save_d4rl

EXAMPLES = Path(__file__).parent.parent / "examples"


def run_example(name: str, folder: Path, *args: str) -> str:
    """Run an example in a folder of its own; return what it printed."""
    command = [sys.executable, str(EXAMPLES / name), *args]
    environment = os.environ | {"COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_own_data(tmp_path: Path) -> None:
    printed = run_example("own_data.py", tmp_path, "--pretrain", "5", "--timesteps", "102")
    assert all(word in printed for word in ("demonstrations", "cloned", "fine-tuned", "planner"))
    assert (tmp_path / "cart.zip").exists()


BUDGET = "--pretrain 6 --clone 4 --bc-gap 2 --timesteps 110 --episodes 2 --curve-episodes 1 --eval-freq 50".split()


def test_finetune_hopper(tmp_path: Path) -> None:
    printed = run_example("finetune_hopper.py", tmp_path, *BUDGET, "--output", "out")
    with open(tmp_path / "out" / "mlp.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["stage"], row["inference"], row["env_steps"], row["updates"]) for row in rows] == [
        ("bc-before", "policy", "0", "10"),
        ("bc", "policy", "0", "12"),
        ("curve", "policy", "50", "0"),
        ("curve", "planner", "50", "0"),
        ("curve", "policy", "100", "0"),
        ("curve", "planner", "100", "0"),
        ("modip", "policy", "110", "5"),
        ("modip", "planner", "110", "5"),
        ("control", "policy", "0", "5"),
    ]
    assert all(float(row["mean"]) > 0 and float(row["standard_error"]) >= 0 for row in rows)
    assert all({"denoiser": "mlp", "seed": "0"}.items() <= row.items() for row in rows)
    assert (tmp_path / "out" / "mlp.png").stat().st_size > 10_000
    assert list((tmp_path / "out" / "tensorboard").iterdir())
    assert all(label in printed for label in ("BC continued (control)", "MODIP, policy alone", "policy + planner"))


def test_finetune_walker2d_from_an_hdf5_file(tmp_path: Path) -> None:
    data = collect(SAC("MlpPolicy", "Walker2d-v5", seed=0), "Walker2d-v5", num_steps=100, seed=0)
    save_d4rl(data, tmp_path / "walker2d.hdf5")
    printed = run_example("finetune_hopper.py", tmp_path, *BUDGET, "--env", "Walker2d-v5", "--dataset", "walker2d.hdf5")
    assert "Walker2d-v5, mlp denoiser" in printed
    assert {"mlp.csv", "mlp.png"} <= {path.name for path in (tmp_path / "runs" / "walker2d").iterdir()}


def test_make_hopper_dataset(tmp_path: Path) -> None:
    printed = run_example(
        "make_hopper_dataset.py", tmp_path, "--timesteps", "120", "--transitions", "50", "--path", "out"
    )
    dataset = OfflineDataset.load(tmp_path / "out" / "modip" / "hopper" / "sac-medium-v0")
    assert dataset.num_transitions >= 50 and dataset.num_episodes >= 5  # of five checkpoints
    assert dataset.env_id == "Hopper-v5" and f"{dataset.num_episodes} " in printed
