"""Reading offline data runs nobody's code: what holds a pickled object is refused, and the object is not made."""

import ast
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch as th
from episodes import assert_same, in_one_sentence, write_d4rl
from test_datasets_robomimic import write_robomimic
from test_weights import Harm

import modip_sb3.datasets
from modip_sb3 import weights
from modip_sb3.datasets import OfflineDataset, save_minari

READERS = [*Path(modip_sb3.datasets.__file__).parent.glob("*.py"), Path(weights.__file__)]
# rollout.py loads checkpoints to act with, through SB3, which says in its documentation that they are unpickled
READERS = [path for path in READERS if path.name != "rollout.py"]
UNPICKLERS = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}


@pytest.fixture
def owned(tmp_path: Path) -> Path:
    return tmp_path / "owned"


def opaque(owned: Path) -> np.void:
    return np.void(pickle.dumps(Harm(owned)))


def rows(owned: Path, num: int) -> np.ndarray:
    """One pickle for each step."""
    return np.array([pickle.dumps(Harm(owned))] * num)


def test_the_harm_is_real(owned: Path) -> None:
    pickle.loads(pickle.dumps(Harm(owned)))
    assert owned.exists()


def replace(file: h5py.File, name: str, value: Any) -> None:
    del file[name]
    file[name] = value


@pytest.mark.parametrize("name", ["observations", "actions", "rewards", "terminals", "timeouts"])
@pytest.mark.parametrize("make", [lambda owned: opaque(owned), lambda owned: rows(owned, 10)], ids=["one", "rows"])
def test_pickles_in_a_d4rl_file(arrays: dict, name: str, make: Callable, owned: Path, tmp_path: Path) -> None:
    path = write_d4rl(tmp_path / "data.hdf5", arrays)
    with h5py.File(path, "r+") as file:
        replace(file, name, make(owned))
    with pytest.raises(ValueError) as error:
        OfflineDataset.load(path)
    in_one_sentence(error, str(path))
    assert not owned.exists()


def test_pickles_beside_the_data_are_left_alone(arrays: dict, owned: Path, tmp_path: Path) -> None:
    path = write_d4rl(tmp_path / "data.hdf5", arrays)
    expected = OfflineDataset.load(path)
    with h5py.File(path, "r+") as file:
        file["infos/extra"], file.attrs["env_id"] = opaque(owned), opaque(owned)
    dataset = OfflineDataset.load(path)
    assert_same(dataset, expected)
    assert dataset.env_id is None
    assert not owned.exists()


@pytest.mark.parametrize("name", ["actions", "rewards", "obs/object", "next_obs/object"])
def test_pickles_in_a_robomimic_file(name: str, owned: Path, tmp_path: Path) -> None:
    path = write_robomimic(tmp_path / "lift.hdf5")
    with h5py.File(path, "r+") as file:
        replace(file, f"data/demo_0/{name}", rows(owned, 3))
    with pytest.raises(ValueError) as error:
        OfflineDataset.load(path)
    in_one_sentence(error, str(path))
    assert not owned.exists()


@pytest.mark.parametrize("name", ["observations", "actions", "rewards", "terminations", "truncations"])
def test_pickles_in_a_minari_dataset(arrays: dict, name: str, owned: Path, minari_root: Path) -> None:
    folder = save_minari(OfflineDataset.load(arrays), "harm-v0", env="Pendulum-v1")
    with h5py.File(folder / "data" / "main_data.hdf5", "r+") as file:
        replace(file, f"episode_0/{name}", rows(owned, 6 if name == "observations" else 5))
    with pytest.raises(ValueError) as error:
        OfflineDataset.load(folder)
    in_one_sentence(error, str(folder))
    assert not owned.exists()


def test_environments_named_by_a_minari_dataset_are_not_made(arrays: dict, owned: Path, minari_root: Path) -> None:
    folder = save_minari(OfflineDataset.load(arrays), "harm-v0", env="Pendulum-v1")
    path = folder / "data" / "metadata.json"
    metadata = json.loads(path.read_text())
    specification = json.loads(metadata["env_spec"])
    specification["entry_point"], specification["kwargs"] = "pathlib:Path.touch", {"self": str(owned)}
    metadata["env_spec"] = json.dumps(specification)
    path.write_text(json.dumps(metadata))
    assert OfflineDataset.load(folder).num_transitions == 10
    assert not owned.exists()


def write_numpy(owned: Path) -> bytes:
    content = io.BytesIO()
    np.savez(content, observations=np.array([Harm(owned)], dtype=object))
    return content.getvalue()


def write_array(owned: Path) -> bytes:
    content = io.BytesIO()
    np.save(content, np.array([Harm(owned)], dtype=object), allow_pickle=True)
    return content.getvalue()


def write_torch(owned: Path) -> bytes:
    content = io.BytesIO()
    th.save({"observations": Harm(owned)}, content)
    return content.getvalue()


@pytest.mark.parametrize("suffix", [".npz", ".npy", ".pt", ".pth", ".pkl", ".pickle", ".zip", "", ".hdf5"])
@pytest.mark.parametrize("write", [write_numpy, write_array, write_torch, lambda owned: pickle.dumps(Harm(owned))])
def test_formats_that_hold_pickles(suffix: str, write: Callable, owned: Path, tmp_path: Path) -> None:
    path = tmp_path / f"data{suffix}"
    path.write_bytes(write(owned))
    with pytest.raises(ValueError) as error:
        OfflineDataset.load(path)
    in_one_sentence(error, str(path))
    assert not owned.exists()


@pytest.mark.parametrize("path", READERS, ids=lambda path: path.name)
def test_no_reader_can_unpickle(path: Path) -> None:
    """No module that unpickles, no ``eval``, and none of the ``load`` functions of numpy, torch and SB3."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert not {alias.name.split(".")[0] for alias in node.names} & UNPICKLERS
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] not in UNPICKLERS
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "load":
            assert isinstance(node.func.value, ast.Name) and node.func.value.id in ("OfflineDataset", "cls")
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("eval", "exec", "__import__", "load_from_pkl", "load_from_zip_file")
