"""Bad input: one clear sentence each."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from walk import (
    MakeModel,
    Walk,
    record_walk,
)

from modip_sb3.buffers import SequenceReplayBuffer

# ------------------------------------------------------------------ errors


class Other(gym.Env):
    """An environment that only has spaces."""

    def __init__(self, observation_space: spaces.Space | None = None, action_space: spaces.Space | None = None) -> None:
        self.observation_space = observation_space or spaces.Box(-1, 1, (2,))
        self.action_space = action_space or spaces.Box(-1, 1, (1,))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        return self.observation_space.sample(), {}


IMAGE = spaces.Box(0, 255, (3, 64, 64), np.uint8)
NESTED = spaces.Dict({"a": spaces.Dict({"b": spaces.Box(-1, 1, (1,))})})


@pytest.mark.parametrize(
    ("env", "policy", "message"),
    [
        (Other(action_space=spaces.Discrete(3)), "MlpPolicy", "only supports .*Box.* Discrete"),
        (Other(action_space=spaces.Box(-np.inf, np.inf, (1,))), "MlpPolicy", "finite lower and upper bound"),
        (Other(IMAGE), "MlpPolicy", "The observation is an image .* wrapper"),
        (Other(spaces.Dict({"x": spaces.Box(-1, 1, (1,)), "eye": IMAGE})), "MultiInputPolicy", "'eye' is an image"),
        (Other(NESTED), "MultiInputPolicy", "Nested observation spaces are not supported"),
        (Walk("dict"), "MlpPolicy", "must use `MultiInputPolicy`"),
        (Walk(), "CnnPolicy", "Policy CnnPolicy unknown"),
    ],
)
def test_wrong_spaces(make_model: MakeModel, env: gym.Env, policy: str, message: str) -> None:
    with pytest.raises((ValueError, AssertionError, NotImplementedError), match=message):
        make_model(env, policy)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"policy_kwargs": {"denoiser": "transformer"}}, "denoiser='transformer'.*'unet'"),
        ({"policy_kwargs": {"proposal": "flow"}}, "proposal='flow'.*'gaussian'"),
        ({"policy_kwargs": {"terminal_value": "w"}}, "terminal_value='w'.*'q'"),
        ({"policy_kwargs": {"train_scheduler": "Adam"}}, "'Adam' is not a scheduler"),
        ({"policy_kwargs": {"sample_scheduler": "UNet1DModel"}}, "'UNet1DModel' is not a scheduler"),
        ({"policy_kwargs": {"horizon": 5}}, "horizon=5 .* action_horizon=4"),
        ({"policy_kwargs": {"n_action_steps": 0}}, "n_action_steps=0"),
        ({"policy_kwargs": {"num_inference_steps": 21}}, "num_inference_steps=21 .* num_train_timesteps=20"),
        ({"policy_kwargs": {"latent_dim": 17}}, "latent_dim=17"),
        ({"policy_kwargs": {"net_arch": [16, 32]}}, r"equal widths.*\[16, 32\]"),
        ({"inference": "both"}, "inference='both'.*'planner'"),
        ({"rollout_with": "random"}, "rollout_with='random'.*'planner'"),
        ({"offline_fraction": 1.5}, "offline_fraction=1.5"),
        ({"critic_target": "q"}, "critic_target='q'.*'policy'"),
        ({"distill_from": "none"}, "distill_from='none'.*'both'"),
        ({"distill_weighting": "softmax"}, "distill_weighting='softmax'.*'uniform'"),
        ({"distill_from": "both", "policy_kwargs": {"horizon": 3}}, "'both' .*horizon=3 .*action_horizon=4"),
        ({"n_steps": 0}, "n_steps=0 must be at least 1"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"relabel_freq": 0}, "relabel_freq=0 must be at least 1"),
        ({"actor_reset_freq": -1}, "actor_reset_freq=-1 must be at least 0"),
        ({"actor_reset_steps": 0}, "actor_reset_steps=0 must be at least 1"),
        ({"pretrain_steps": -1}, "pretrain_steps=-1 must be at least 0"),
        ({"distill_beta": float("nan")}, "distill_beta=nan must be at least 0"),
        ({"gamma": 1.1}, "gamma=1.1 is not between 0 and 1"),
        ({"tau": -0.1}, "tau=-0.1 is not between 0 and 1"),
        ({"td_lambda": 2}, "td_lambda=2 is not between 0 and 1"),
        ({"expectile": float("nan")}, "expectile=nan is not between 0 and 1"),
        ({"rho": -1}, "rho=-1 is not between 0 and 1"),
        ({"actor_tau": 5}, "actor_tau=5 is not between 0 and 1"),
        ({"policy_kwargs": {"num_proposals": 0}}, "num_proposals=0 must be at least 1"),
        ({"policy_kwargs": {"n_critics": 0}}, "n_critics=0 must be at least 1"),
        ({"planner_kwargs": {"num_elites": 0}}, "num_elites=0 must be at least 1"),
        ({"planner_kwargs": {"min_std": 2.0}}, "min_std <= max_std"),
    ],
    ids=str,
)
def test_wrong_settings(make_model: MakeModel, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_model(Walk(), **settings)


def test_unknown_planner_setting(make_model: MakeModel) -> None:
    with pytest.raises((TypeError, ValueError), match="num_sample"):
        make_model(Walk(), planner_kwargs={"num_sample": 3})


def test_wrong_replay_buffer(make_model: MakeModel) -> None:
    with pytest.raises(ValueError, match="replay_buffer_class=ReplayBuffer .* use a SequenceReplayBuffer"):
        make_model(Walk(), replay_buffer_class=ReplayBuffer)
    assert isinstance(make_model(Walk(), replay_buffer_class=SequenceReplayBuffer).replay_buffer, SequenceReplayBuffer)


def test_pretrain_without_data(make_model: MakeModel) -> None:
    with pytest.raises(ValueError, match="offline_dataset"):
        make_model(Walk()).pretrain(5)


@pytest.mark.parametrize("method", ["pretrain", "learn"])
def test_missing_dataset(make_model: MakeModel, method: str) -> None:
    model = make_model(Walk(), offline_dataset="/nowhere/data.hdf5")
    with pytest.raises(FileNotFoundError, match="/nowhere/data.hdf5"):
        getattr(model, method)(5)


def bad_arrays(fault: str) -> dict[str, Any]:
    arrays = record_walk(kind="dict") if fault == "keys" else record_walk(shape=(2,) if fault == "actions" else (1,))
    if fault == "rewards":
        arrays["rewards"][7] = np.nan
    elif fault == "bounds":
        arrays["actions"] = arrays["actions"] * 3
    elif fault == "observations":
        for name in ("observations", "next_observations"):
            arrays[name] = arrays[name][:, :1]
    elif fault == "short":
        arrays["truncations"][:] = True
    elif fault == "names":
        arrays["obs"] = arrays.pop("observations")
    return arrays


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("observations", r"observations have shape \(1,\), expected \(2,\)"),
        ("actions", r"actions have shape \(2,\), expected \(1,\)"),
        ("keys", r"have the keys \['speed', 'x'\], expected none"),
        ("rewards", r"rewards hold 1 NaN .* \[7\]"),
        ("bounds", "outside of Box"),
        ("short", "longest episode has 1 steps"),
        ("names", r"lacks \['observations'\] and has unknown \['obs'\]"),
    ],
)
def test_wrong_data(make_model: MakeModel, fault: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_model(Walk(), offline_dataset=bad_arrays(fault)).learn(5)
