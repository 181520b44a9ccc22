"""Offline data small enough to check by eye, in arrays and files, and what tests say about it."""

import hashlib
from pathlib import Path

import h5py
import numpy as np
import pytest
from gymnasium import spaces

from modip_sb3.datasets import OfflineDataset

OBSERVATION_SPACE = spaces.Box(-np.inf, np.inf, (3,), np.float64)  # Pendulum's shapes
ACTION_SPACE = spaces.Box(-2.0, 2.0, (1,), np.float32)
COLUMNS = ["observations", "actions", "rewards", "terminations", "truncations", "final_observations"]
D4RL_NAMES = {"terminations": "terminals", "truncations": "timeouts"}


def make_arrays(lengths: tuple[int, ...] = (5, 1, 4), terminated: tuple[bool, ...] = (True, False, False)) -> dict:
    """Episodes whose observations count up, so that a misplaced row is seen."""
    ends, num = np.cumsum(lengths) - 1, sum(lengths)
    rng = np.random.default_rng(0)
    steps = np.arange(num + len(lengths), dtype=np.float32)
    is_final = np.isin(np.arange(len(steps)), ends + np.arange(len(lengths)) + 1)
    rows = np.stack([steps, steps**2, np.sin(steps)], axis=1)
    terminations, truncations = np.zeros(num, bool), np.zeros(num, bool)
    terminations[ends], truncations[ends] = terminated, ~np.array(terminated)
    return {
        "observations": rows[~is_final],
        "actions": rng.uniform(-2, 2, (num, 1)).astype(np.float32),
        "rewards": rng.normal(size=num).astype(np.float32),
        "terminations": terminations,
        "truncations": truncations,
        "final_observations": rows[is_final],
    }


def next_observations(arrays: dict) -> np.ndarray:
    after = np.roll(arrays["observations"], -1, axis=0)
    after[arrays["terminations"] | arrays["truncations"]] = arrays["final_observations"]
    return after


def write_d4rl(path: Path, arrays: dict, env_id: str | None = None) -> Path:
    with h5py.File(path, "w") as file:
        for name, values in arrays.items():
            if name != "final_observations":
                file[D4RL_NAMES.get(name, name)] = values
        if env_id is not None:
            file.attrs["env_id"] = env_id
    return path


def assert_same(dataset: OfflineDataset, expected: OfflineDataset) -> None:
    for name in COLUMNS:
        found, wanted = getattr(dataset, name), getattr(expected, name)
        if isinstance(wanted, dict):
            assert found.keys() == wanted.keys()
        for key in wanted if isinstance(wanted, dict) else [...]:
            assert found[key].dtype == wanted[key].dtype, name
            np.testing.assert_array_equal(found[key], wanted[key], err_msg=name)


def fingerprints(folder: Path) -> dict[Path, tuple[int, str]]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path: (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest()) for path in files}


def in_one_sentence(error: pytest.ExceptionInfo, *parts: str) -> None:
    message = str(error.value)
    assert message.endswith(".") and "\n" not in message
    for part in parts:
        assert part in message, f"{part!r} is not in {message!r}"
