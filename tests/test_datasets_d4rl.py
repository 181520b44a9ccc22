"""D4RL's HDF5 layout: read and written, and every fault one clear sentence."""

from pathlib import Path

import h5py
import numpy as np
import pytest
from episodes import assert_same, fingerprints, in_one_sentence, next_observations, write_d4rl

from modip_sb3.datasets import OfflineDataset, save_d4rl


def test_d4rl_round_trip(arrays: dict, tmp_path: Path) -> None:
    path = write_d4rl(tmp_path / "data.hdf5", arrays | {"next_observations": next_observations(arrays)}, "Pendulum-v1")
    before = fingerprints(tmp_path)
    for source in (path, str(path)):
        dataset = OfflineDataset.load(source)
        assert_same(dataset, OfflineDataset.load(arrays))
        assert (dataset.env_id, dataset.source) == ("Pendulum-v1", str(path))
    assert fingerprints(tmp_path) == before


def test_a_file_is_known_by_its_content(arrays: dict, tmp_path: Path) -> None:
    path = write_d4rl(tmp_path / "data.bin", arrays | {"next_observations": next_observations(arrays)})
    assert_same(OfflineDataset.load(path), OfflineDataset.load(arrays))


def test_d4rl_without_next_observations(arrays: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modip_sb3.datasets.columns.BLOCK", 3)
    path = write_d4rl(tmp_path / "data.h5", arrays)
    del arrays["final_observations"]
    dataset = OfflineDataset.load(path)
    assert_same(dataset, OfflineDataset.load(arrays))
    assert dataset.env_id is None


def test_d4rl_itself_would_read_what_we_write(arrays: dict, tmp_path: Path) -> None:
    path = save_d4rl(OfflineDataset.load(arrays | {"env_id": "Pendulum-v1"}), tmp_path / "data.hdf5")
    with h5py.File(path) as file:  # D4RL's get_dataset() wants these names, shapes and types
        found = {key: (values.shape, values.dtype) for key, values in file.items()}
        np.testing.assert_array_equal(file["next_observations"], next_observations(arrays))
        assert file.attrs["env_id"] == "Pendulum-v1"
    f4, flag = np.dtype(np.float32), np.dtype(bool)
    assert found == {
        "observations": ((10, 3), f4),
        "next_observations": ((10, 3), f4),
        "actions": ((10, 1), f4),
        "rewards": ((10,), f4),
        "terminals": ((10,), flag),
        "timeouts": ((10,), flag),
    }


@pytest.mark.parametrize("block", [3, 4, 1000])
def test_rows_out_of_order(block: int, arrays: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modip_sb3.datasets.columns.BLOCK", block)
    arrays["next_observations"] = next_observations(arrays)
    del arrays["final_observations"]
    swapped = {name: values[[0, 1, 3, 2, *range(4, 10)]] for name, values in arrays.items()}
    unmarked = arrays | {"terminations": np.arange(10) == 9, "truncations": np.arange(10) == 5}
    for name, faulty, row in (("swapped", swapped, 2), ("unmarked", unmarked, 5)):
        path = write_d4rl(tmp_path / f"{name}.hdf5", faulty)
        with pytest.raises(ValueError) as error:
            OfflineDataset.load(path)
        in_one_sentence(error, str(path), f"row {row} is not what row {row - 1} led to", "sort the rows by episode")
    with pytest.raises(ValueError) as error:
        OfflineDataset.load(arrays | {"next_observations": arrays["next_observations"][:, :2]})
    in_one_sentence(error, "next_observations have shape (10, 2), expected (10, 3)")
    with pytest.raises(ValueError) as error:
        OfflineDataset.load(arrays | {"next_observations": {"arm": arrays["next_observations"]}})
    in_one_sentence(error, "next_observations have the keys ['arm'], expected none (one array)")


def test_faulty_hdf5_files(arrays: dict, tmp_path: Path) -> None:
    whole = write_d4rl(tmp_path / "whole.hdf5", arrays)
    (tmp_path / "truncated.hdf5").write_bytes(whole.read_bytes()[:-1000])
    (tmp_path / "empty.hdf5").touch()
    (tmp_path / "text.hdf5").write_text("not an HDF5 file")
    (tmp_path / "pickle.pkl").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    (tmp_path / "table.csv").write_text("1,2")
    with h5py.File(tmp_path / "chunk.hdf5", "w") as file:
        for key in ("observations", "actions", "rewards", "terminals", "timeouts"):
            file.create_dataset(key, data=np.zeros((100, 3)[: 1 + (key[0] in "oa")]), compression="gzip")
        offset = file["actions"].id.get_chunk_info(0).byte_offset
    damaged = bytearray((tmp_path / "chunk.hdf5").read_bytes())
    damaged[offset : offset + 4] = b"\xff" * 4
    (tmp_path / "chunk.hdf5").write_bytes(damaged)
    with h5py.File(tmp_path / "keys.hdf5", "w") as file:
        file["observations"], file["acts"] = arrays["observations"], arrays["actions"]
    with h5py.File(tmp_path / "group.hdf5", "w") as file:
        for name in ("observations", "rewards", "terminals", "timeouts"):
            file[name] = np.zeros(3)
        file["actions/left"] = np.zeros(3)
    before = fingerprints(tmp_path)
    for name, parts in {
        "truncated.hdf5": ["cannot be read as HDF5"],
        "empty.hdf5": ["the file is empty"],
        "text.hdf5": ["cannot be read as HDF5"],
        "pickle.pkl": ["a pickle, which is not opened here", "model.load_replay_buffer"],
        "table.csv": ["a .csv file, expected HDF5 (one of ['.h5', '.hdf5'])", "as a mapping"],
        "chunk.hdf5": ["cannot be read as HDF5"],
        "keys.hdf5": ["lacks ['actions', 'rewards', 'terminals', 'timeouts']", "found ['acts', 'observations']"],
        "group.hdf5": ["actions hold a group"],
    }.items():
        with pytest.raises(ValueError) as error:
            OfflineDataset.load(tmp_path / name)
        in_one_sentence(error, str(tmp_path / name), *parts)
    with pytest.raises(FileNotFoundError) as missing:
        OfflineDataset.load(tmp_path / "nowhere.hdf5")
    in_one_sentence(missing, "nowhere.hdf5: no such file")
    assert fingerprints(tmp_path) == before
