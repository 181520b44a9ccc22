"""Disks that are full, datasets that are gone, and Ctrl-C: what is on the disk is whole, and the training goes on."""

import ctypes
import json
import multiprocessing
import os
import random
import signal
import subprocess
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch as th
from algorithms import ALGORITHMS, every_learner, make
from episodes import in_one_sentence
from stable_baselines3.common.callbacks import BaseCallback
from test_checkpoints_zoo import CHECKPOINTS, NAME, RUN
from test_faults import assert_finite, assert_whole
from walk import Walk, record_walk, vec_walk

from modip_sb3 import MODIP, zoo
from modip_sb3.datasets import OfflineDataset, save_d4rl
from modip_sb3.resume import CheckpointCallback, find_checkpoint
from modip_sb3.storage import find_damage


def in_a_process(function: Callable[..., None], *args: Any, act: Callable[[int], None] | None = None) -> int:
    """Its exit code."""
    process = multiprocessing.get_context("fork").Process(target=function, args=args)
    process.start()
    if act is not None and process.pid is not None:
        act(process.pid)
    process.join(120)
    assert process.exitcode is not None
    return process.exitcode


# ------------------------------------------------------------------ a full disk

CLONE_NEWNS, NO_MOUNT = 0x00020000, 77


def mount_small(folder: Path) -> bool:
    """A disk of two megabytes that this process alone sees."""
    if os.geteuid() != 0 or ctypes.CDLL(None).unshare(CLONE_NEWNS) != 0:
        return False
    commands = ["mount --make-rprivate /".split(), [*"mount -t tmpfs -o size=2m tmpfs".split(), str(folder)]]
    return all(subprocess.run(command, capture_output=True).returncode == 0 for command in commands)


def fill(ballast: Path, free: int) -> None:
    """Leave so many bytes."""
    ballast.unlink(missing_ok=True)
    disk = os.statvfs(ballast.parent)
    ballast.write_bytes(bytes(max(disk.f_bavail * disk.f_frsize - free, 0)))


def train_on_a_full_disk(folder: Path, result: Path) -> None:
    if not mount_small(folder):
        os._exit(NO_MOUNT)
    callback = CheckpointCallback(10, folder)
    model = make("MODIP", vec_walk()).learn(20, callback=callback)
    newest = find_checkpoint(folder)
    assert newest is not None
    size = sum(file.stat().st_size for file in newest.iterdir())
    warned = []
    for share in (0.0, 0.2, 0.6, 0.99):  # what is left for a checkpoint
        fill(folder / "ballast", int(share * size))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.learn(5, callback=callback, reset_num_timesteps=False)
        warned += [str(each.message) for each in caught]
        assert find_checkpoint(folder) == newest and find_damage(newest) is None
        assert {path.name for path in folder.iterdir()} == {"ballast", "checkpoint-1", "checkpoint-2"}
    resumed = MODIP.resume(folder, device="cpu", env=vec_walk())
    assert resumed.num_timesteps == 20
    (folder / "ballast").unlink()
    model.learn(5, callback=callback, reset_num_timesteps=False)
    assert MODIP.resume(folder, device="cpu", env=vec_walk()).num_timesteps == 45
    result.write_text(json.dumps(warned))


@pytest.mark.skipif(not hasattr(os, "statvfs") or not Path("/proc").exists(), reason="mounts a disk as Linux does")
def test_a_full_disk(tmp_path: Path) -> None:
    disk, result = tmp_path / "disk", tmp_path / "result.json"
    disk.mkdir()
    code = in_a_process(train_on_a_full_disk, disk, result)
    if code == NO_MOUNT:
        pytest.skip("no disk can be mounted here; RLIMIT_FSIZE stands for it in test_checkpoints.py")
    assert code == 0
    warned = json.loads(result.read_text())
    assert len(warned) == 4
    for message in warned:
        assert message == (
            f"No checkpoint was written to {disk}: [Errno 28] No space left on device. The last one stays."
        )


# ------------------------------------------------------------------ data that is gone


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return save_d4rl(OfflineDataset.from_arrays(**record_walk()), tmp_path / "walk.hdf5")


@pytest.mark.parametrize("fault", ["gone", "truncated", "empty"])
def test_data_that_is_lost_in_the_middle(fault: str, data: Path, tmp_path: Path) -> None:
    callback = CheckpointCallback(10, tmp_path / "runs")
    model = make("MODIP", vec_walk(), offline_dataset=str(data)).pretrain(3, callback=callback)
    content = data.read_bytes()
    lose = {
        "gone": data.unlink,
        "truncated": lambda: data.write_bytes(content[: len(content) // 2]),
        "empty": lambda: data.write_bytes(b""),
    }[fault]
    lose()
    assert model.learn(20, callback=callback).num_timesteps == 20  # it is in memory
    with pytest.raises(FileNotFoundError if fault == "gone" else ValueError) as error:
        MODIP.resume(tmp_path / "runs", env=vec_walk())
    in_one_sentence(error, str(data))
    data.write_bytes(content)
    resumed = MODIP.resume(tmp_path / "runs", env=vec_walk(), device="cpu")
    assert resumed.learn(20).learn(10, reset_num_timesteps=False).num_timesteps == 30


# ------------------------------------------------------------------ Ctrl-C


def press_ctrl_c(delay: float, interrupted: threading.Event) -> None:
    """Again after a while: CPython itself loses one now and then (the bare ``except`` of ``copyreg._slotnames``)."""
    while not interrupted.wait(delay):
        os.kill(os.getpid(), signal.SIGINT)
        delay = 3.0


def interrupt_again_and_again(algo: str, folder: Path) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    model, callback = make(algo, vec_walk(), offline_dataset=record_walk()), CheckpointCallback(2, folder)
    rng, obs = random.Random(0), Walk().reset(seed=0)[0]
    model.learn(10, callback=callback)
    for _ in range(10):
        interrupted = threading.Event()
        thread = threading.Thread(target=press_ctrl_c, args=(0.01 + rng.random() * 0.1, interrupted), daemon=True)
        try:
            thread.start()
            if algo != "RLPD" and rng.random() < 0.3:
                model.pretrain(100_000, callback=callback)
            else:
                model.learn(100_000, callback=callback, reset_num_timesteps=False)
            os._exit(2)  # not interrupted
        except KeyboardInterrupt:
            interrupted.set()
        model.predict(obs)
    model.learn(10, reset_num_timesteps=False)
    assert all(parameter.requires_grad for parameter in model.policy.critic.parameters())
    assert_whole(model)
    assert_finite(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a damaged checkpoint
        resumed = ALGORITHMS[algo].cls.resume(folder, vec_walk(), "cpu", record_walk())
    assert_whole(resumed)
    os._exit(0)


@every_learner
def test_interrupted_again_and_again(algo: str, tmp_path: Path) -> None:
    """In the same process: what was learned is kept, and the next call goes on."""
    assert in_a_process(interrupt_again_and_again, algo, tmp_path) == 0


def test_an_interrupted_update_of_the_prior_leaves_the_critics_learning() -> None:
    model = make("TDMPC2").learn(12)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = model.policy.actor.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model._update_actor(model.policy.encode(*model.policy.obs_to_tensor(model._last_obs)[:1])[None], None)
    handle.remove()
    assert all(parameter.requires_grad for parameter in model.policy.critic.parameters())


class StopAtTheEdgeOfNoGrad(BaseCallback):
    """A Ctrl-C after ``no_grad().__enter__()`` and before its block."""

    def _on_step(self) -> bool:
        th.set_grad_enabled(False)
        raise KeyboardInterrupt


@every_learner
def test_gradients_are_on_after_an_interrupt(algo: str) -> None:
    model = make(algo, vec_walk(), offline_dataset=record_walk())
    with pytest.raises(KeyboardInterrupt):
        model.learn(20, StopAtTheEdgeOfNoGrad())
    assert th.is_grad_enabled()
    with th.no_grad():  # what an interrupted predict() may leave
        model.learn(20)
    assert model._n_updates > 0
    assert_finite(model)


def train_with_the_zoo(folder: Path) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(folder)
    zoo.main([*RUN, f"callback:[{CHECKPOINTS}]", "-n", "1000000", "-f", "logs"])


def test_an_interrupted_zoo_keeps_model_and_checkpoint(tmp_path: Path) -> None:
    def interrupt(pid: int) -> None:
        end = time.monotonic() + 60
        while find_checkpoint(tmp_path / "runs") is None and time.monotonic() < end:
            time.sleep(0.05)
        time.sleep(random.random() * 0.2)
        os.kill(pid, signal.SIGINT)

    assert in_a_process(train_with_the_zoo, tmp_path, act=interrupt) == 0
    assert (tmp_path / "logs" / "modip" / f"{NAME}_1" / f"{NAME}.zip").exists()
    newest = find_checkpoint(tmp_path / "runs")
    assert newest is not None and find_damage(newest) is None
