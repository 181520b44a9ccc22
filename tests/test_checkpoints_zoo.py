"""``train -i FOLDER``: rl_zoo3 goes on from a checkpoint."""

import os
from pathlib import Path

import gymnasium as gym
import pytest
import torch as th
from test_checkpoints import Death
from walk import Walk

from modip_sb3 import MODIP, zoo

ENV_ID, NAME = "checkpoint-zoo-test/walk-v0", "checkpoint-zoo-test-walk-v0"
gym.register(ENV_ID, Walk, max_episode_steps=4)
NETWORKS = "dict(denoiser='mlp', net_arch=dict(pi=[8], qf=[8]), latent_dim=8, num_proposals=2, num_inference_steps=2)"
RUN = ["train", "--algo", "modip", "--env", ENV_ID, "--seed", "0", "--verbose", "0", "-n", "60", "--eval-freq", "-1"]
RUN += ["--device", "cpu", "-params", "batch_size:8", "learning_starts:10", "buffer_size:1000", "n_envs:2"]
RUN += ["normalize:True", f"policy_kwargs:{NETWORKS}"]
CHECKPOINTS = "{'modip_sb3.resume.CheckpointCallback': {'save_freq': 20, 'folder': 'runs'}}"
KILLER = "{'test_checkpoints.Killer': {'env_steps': 50}}"


def test_train_goes_on_from_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    zoo.main([*RUN, "-f", "whole"])
    with pytest.raises(Death):
        zoo.main([*RUN, f"callback:[{CHECKPOINTS}, {KILLER}]", "-f", "killed"])
    assert sorted(os.listdir("runs")) == ["checkpoint-1", "checkpoint-2"]
    zoo.main([*RUN, f"callback:[{CHECKPOINTS}]", "-f", "resumed", "-i", "runs"])
    whole, resumed = (MODIP.load(Path(log) / "modip" / f"{NAME}_1" / f"{NAME}.zip") for log in ("whole", "resumed"))
    assert (whole.num_timesteps, resumed.num_timesteps, resumed._n_updates) == (60, 60, whole._n_updates)
    expected, found = whole.policy.state_dict(), resumed.policy.state_dict()
    assert [name for name in expected if not th.equal(expected[name], found[name])] == []


def test_a_folder_without_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="expected a complete checkpoint in it, and --algo of this package"):
        zoo.main([*RUN, "-i", str(tmp_path)])
