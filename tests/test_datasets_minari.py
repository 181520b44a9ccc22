"""Minari datasets: read, written, downloaded from a server, and every fault one clear sentence."""

import hashlib
import json
import re
import warnings
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import gymnasium as gym
import h5py
import minari
import numpy as np
import pytest
from episodes import COLUMNS, assert_same, fingerprints, in_one_sentence, make_arrays
from gymnasium import spaces
from minari.data_collector import EpisodeBuffer

from modip_sb3.datasets import OfflineDataset, save_minari


def test_minari_round_trip(arrays: dict, minari_root: Path) -> None:
    expected = OfflineDataset.load(arrays | {"env_id": "Pendulum-v1"})
    folder = save_minari(expected, "pendulum/test-v0", description="a test")
    assert folder == minari_root / "pendulum" / "test-v0"
    before = fingerprints(minari_root)
    for source in ("pendulum/test-v0", folder, str(folder), folder / "data"):
        dataset = OfflineDataset.load(source)
        assert_same(dataset, expected)
        assert (dataset.env_id, dataset.source) == ("Pendulum-v1", str(source))
    assert fingerprints(minari_root) == before


def test_minari_itself_reads_what_we_write(arrays: dict, tmp_path: Path, minari_root: Path) -> None:
    env = gym.make("Pendulum-v1")
    folder = save_minari(OfflineDataset.load(arrays), "test-v3", env=env, path=tmp_path / "elsewhere", author="me")
    assert folder == tmp_path / "elsewhere" / "test-v3" and not list(minari_root.iterdir())
    dataset = minari.MinariDataset(folder / "data")
    assert dataset.spec.total_steps == 10 and dataset.recover_environment().spec.id == "Pendulum-v1"
    assert [len(episode) for episode in dataset] == [5, 1, 4] and "total_steps=5" in repr(dataset[0])
    for episode in dataset:
        assert episode.observations.dtype == dataset.observation_space.dtype
        assert all(action in dataset.action_space for action in episode.actions)
    another = EpisodeBuffer(**{name: getattr(dataset[2], name) for name in COLUMNS[:-1]}, infos={})
    dataset.update_dataset_from_buffer([another])
    assert OfflineDataset.load(folder).episode_lengths.tolist() == [5, 1, 4, 4]


def test_minari_recording_that_just_stopped_is_truncated(arrays: dict, minari_root: Path) -> None:
    folder = save_minari(OfflineDataset.load(arrays), "stopped-v0", env="Pendulum-v1")
    with h5py.File(folder / "data" / "main_data.hdf5", "r+") as file:
        file["episode_1/truncations"][...] = False
    assert_same(OfflineDataset.load("stopped-v0"), OfflineDataset.load(arrays))


def test_minari_stays_small(minari_root: Path) -> None:
    arrays = make_arrays((200,) * 20, (True, False) * 10)
    rng = np.random.default_rng(0)
    for name in ("observations", "final_observations"):
        arrays[name] = rng.normal(size=arrays[name].shape).astype(np.float32)
    folder = save_minari(OfflineDataset.load(arrays), "small-v0", env="Pendulum-v1")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert size / 4000 < 4 * (3 + 1 + 1) + 15  # the float32 numbers, and what HDF5 needs for 5 arrays an episode


def test_paths_that_are_no_minari_dataset(minari_root: Path, tmp_path: Path) -> None:
    for source in ("./nowhere", "data/nowhere", tmp_path / "nowhere dir", tmp_path):
        with pytest.raises(FileNotFoundError) as error:
            OfflineDataset.load(source)
        in_one_sentence(error, str(source), "Minari folder")


# ----------------------------------------------------------------- downloading


class Hub(BaseHTTPRequestHandler):
    """As much of Hugging Face as Minari asks for, over the datasets in one folder."""

    folder: Path
    sha = "0" * 40

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        repositories = [p.name for p in self.folder.iterdir()]
        if path == "/api/datasets":
            self.answer([{"id": f"farama-minari/{name}"} for name in repositories])
        elif match := re.fullmatch(r"/api/datasets/farama-minari/(\w+)/revision/\w+", path):
            self.answer({"id": f"farama-minari/{match[1]}", "sha": self.sha})
        elif match := re.fullmatch(r"/api/datasets/farama-minari/(\w+)/tree/\w+", path):
            files = [file for file in (self.folder / match[1]).rglob("*") if file.is_file()]
            names = {str(file.relative_to(self.folder / match[1])): file.stat().st_size for file in files}
            self.answer([{"type": "file", "path": path, "size": size, "oid": path} for path, size in names.items()])
        elif match := re.fullmatch(r"/datasets/farama-minari/(\w+)/resolve/\w+/(.+)", path):
            file = self.folder / match[1] / match[2]
            if file.is_file():
                self.answer(file.read_bytes())
            else:
                self.answer({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
        else:
            self.answer({}, 404)

    do_HEAD = do_GET

    def answer(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        etag = hashlib.sha256(body).hexdigest()
        given = {"X-Repo-Commit": self.sha, "ETag": f'"{etag}"', "Content-Length": str(len(body))} | (headers or {})
        for name, value in given.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        """Nothing on the console."""


@pytest.fixture
def hub(tmp_path: Path, minari_root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of an empty server that Minari downloads from."""
    folder = tmp_path / "hub"
    folder.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("FolderHub", (Hub,), {"folder": folder}))
    monkeypatch.delenv("MINARI_REMOTE", raising=False)
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    template = "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", url + template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield folder
    server.shutdown()
    thread.join()
    server.server_close()


def test_an_id_that_is_not_there_is_downloaded(
    arrays: dict, hub: Path, minari_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = OfflineDataset.load(arrays)
    save_minari(expected, "pendulum/test-v0", env="Pendulum-v1", path=hub)
    (hub / "pendulum" / "namespace_metadata.json").write_text(json.dumps({"datasets": ["pendulum/test-v0"]}))
    dataset = OfflineDataset.load("pendulum/test-v0")
    assert_same(dataset, expected)
    assert (minari_root / "pendulum" / "test-v0" / "data" / "main_data.hdf5").is_file()
    assert "Downloading pendulum/test-v0" in capsys.readouterr().out
    OfflineDataset.load("pendulum/test-v0")
    assert "Downloading" not in capsys.readouterr().out

    for missing in ("pendulum/other-v0", "pendulum/test-v1", "nobody/nothing-v0"):
        with pytest.raises(FileNotFoundError) as error:
            OfflineDataset.load(missing)
        in_one_sentence(error, f"Minari dataset {missing}: not found in {minari_root}", "minari list remote")


def test_no_network(hub: Path, minari_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the client's own attempts
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError) as error:
        OfflineDataset.load("mujoco/hopper/medium-v0")
    in_one_sentence(
        error,
        f"Minari dataset mujoco/hopper/medium-v0: not found in {minari_root}",
        "Connection refused",
        "check the network, or point MINARI_DATASETS_PATH",
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError) as error:
        OfflineDataset.load("mujoco/hopper/medium-v0")
    in_one_sentence(error, "HF_HUB_OFFLINE", "check the network")
    assert not list(minari_root.iterdir())


# ---------------------------------------------------------------------- faults


def test_damaged_minari_datasets(arrays: dict, minari_root: Path) -> None:
    dataset = OfflineDataset.load(arrays)
    folder = save_minari(dataset, "damaged-v0", env="Pendulum-v1") / "data"
    metadata = json.loads((folder / "metadata.json").read_text())
    data = (folder / "main_data.hdf5").read_bytes()

    def load(parts: list[str], content: bytes = data, **changed: Any) -> None:
        (folder / "main_data.hdf5").write_bytes(content)
        (folder / "metadata.json").write_text(json.dumps({k: v for k, v in (metadata | changed).items() if v}))
        with pytest.raises(ValueError) as error:
            OfflineDataset.load("damaged-v0")
        in_one_sentence(error, "Minari dataset damaged-v0: ", *parts)

    load(["cannot be read", "expected 11 steps in all, found 10"], total_steps=11)
    load(["cannot be read"], total_steps=9)
    load(["cannot be read"], content=data[:-2000])
    load(["cannot be read"], content=b"")
    load(["lacks ['action_space', 'observation_space']"], observation_space=None, action_space=None)
    nested = {"type": "Dict", "subspaces": {"goal": {"type": "Dict", "subspaces": {}}}}
    load(["holds a Dict space where a Box was expected"], observation_space=json.dumps(nested))
    (folder / "metadata.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        OfflineDataset.load("damaged-v0")


def test_save_minari_refuses_what_it_cannot_write(arrays: dict, minari_root: Path) -> None:
    dataset = OfflineDataset.load(arrays)
    for dataset_id in ("no-version", "../escape-v0", "/absolute-v0"):
        with pytest.raises(ValueError) as error:
            save_minari(dataset, dataset_id, env="Pendulum-v1")
        in_one_sentence(error, "is no Minari id")
    with pytest.raises(ValueError) as error:
        save_minari(dataset, "test-v0")
    in_one_sentence(error, "pass env=")
    with pytest.raises(ValueError, match="use data of this environment"):
        save_minari(dataset, "test-v0", env="MountainCarContinuous-v0")
    assert not list(minari_root.iterdir())


# ------------------------------------------------------------- goals in a Dict


def write_kitchen(dataset_id: str) -> list[np.ndarray]:
    """Two episodes in the spaces of D4RL/kitchen/complete-v2; return their observations, one more than steps."""
    shapes = {"microwave": 1, "kettle": 7, "light switch": 2, "slide cabinet": 1}
    goals = spaces.Dict({task: spaces.Box(-np.inf, np.inf, (size,), np.float64) for task, size in shapes.items()})
    rows = spaces.Box(-np.inf, np.inf, (59,), np.float64)
    space = spaces.Dict({"achieved_goal": goals, "desired_goal": goals, "observation": rows})
    rng = np.random.default_rng(0)
    buffers = []
    for length in (5, 3):
        achieved = {task: rng.normal(size=(length + 1, size)) for task, size in shapes.items()}
        desired = {task: np.ones((length + 1, size)) for task, size in shapes.items()}
        observations = {"observation": rng.normal(size=(length + 1, 59)), "achieved_goal": achieved}
        buffers.append(
            EpisodeBuffer(
                observations=observations | {"desired_goal": desired},
                actions=rng.uniform(-1, 1, (length, 9)),
                rewards=rng.integers(0, 5, length).astype(float),
                terminations=np.zeros(length, bool),
                truncations=np.arange(length) == length - 1,
                infos={},
            )
        )
    actions = spaces.Box(-1.0, 1.0, (9,), np.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # Minari's advice to give every piece of metadata
        minari.create_dataset_from_buffers(dataset_id, buffers, observation_space=space, action_space=actions)
    return [buffer.observations["observation"] for buffer in buffers]


def test_minari_vectors_of_a_goal_conditioned_environment(minari_root: Path) -> None:
    episodes = write_kitchen("D4RL/kitchen/complete-v2")
    before = fingerprints(minari_root)
    source = {"dataset": "D4RL/kitchen/complete-v2", "obs_keys": ["observation"]}
    dataset = OfflineDataset.load(source)
    assert dataset.observations.shape == (8, 59) and dataset.actions.shape == (8, 9)
    np.testing.assert_allclose(dataset.observations, np.concatenate([rows[:-1] for rows in episodes]), rtol=1e-6)
    np.testing.assert_allclose(dataset.final_observations, [rows[-1] for rows in episodes], rtol=1e-6)
    assert dataset.episode_lengths.tolist() == [5, 3] and not dataset.terminations.any()
    best = OfflineDataset.load(source | {"top_fraction": 0.5})
    assert best.num_episodes == 1
    twice = OfflineDataset.load(source | {"obs_keys": ["observation", "observation"]})
    np.testing.assert_array_equal(twice.observations, np.tile(dataset.observations, 2))
    for keys in (["observation", "state"], ["desired_goal"], []):
        with pytest.raises(ValueError) as error:
            OfflineDataset.load(source | {"obs_keys": keys})
        in_one_sentence(error, f"obs_keys={keys} names no vectors of its Dict space", "some of ['observation']")
    with pytest.raises(ValueError) as error:
        OfflineDataset.load("D4RL/kitchen/complete-v2")
    in_one_sentence(error, "holds a Dict space where a Box was expected", "choose vectors of a Dict with obs_keys")
    assert fingerprints(minari_root) == before
