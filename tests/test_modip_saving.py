"""Saving, loading, and what travels with the model."""

import json
import zipfile
from pathlib import Path

import cloudpickle
import numpy as np
import pytest
import torch as th
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecNormalize
from walk import (
    MakeModel,
    Walk,
    assert_same,
    both_denoisers,
    both_modes,
    observations,
    parameters,
    record_walk,
    vec_walk,
)

from modip_sb3 import MODIP, MODIPPolicy
from modip_sb3.modip import RANK_PROPOSALS

# ------------------------------------------------------------------ save and load


@both_denoisers
@pytest.mark.parametrize("kind", ["box", "dict"])
def test_save_and_load(make_model: MakeModel, tmp_path: Path, denoiser: str, kind: str) -> None:
    policy = "MultiInputPolicy" if kind == "dict" else "MlpPolicy"
    model = make_model(Walk(kind), policy, policy_kwargs={"denoiser": denoiser}).learn(15)
    model.save(tmp_path / "model")
    loaded = MODIP.load(tmp_path / "model", env=Walk(kind))
    assert_same(parameters(model), parameters(loaded))
    for name in model.optimizer_names:
        saved, restored = getattr(model, name).state_dict(), getattr(loaded, name).state_dict()
        assert saved["param_groups"] == restored["param_groups"]
        assert all(th.equal(entry["exp_avg"], restored["state"][i]["exp_avg"]) for i, entry in saved["state"].items())
    obs = observations(model)
    for inference in ("policy", "planner"):
        model.inference = loaded.inference = inference
        for deterministic in (True, False):
            th.manual_seed(0)
            expected, _ = model.predict(obs, deterministic=deterministic)
            th.manual_seed(0)
            np.testing.assert_array_equal(loaded.predict(obs, deterministic=deterministic)[0], expected)
    assert loaded.num_timesteps == 15
    loaded.learn(10, reset_num_timesteps=False)
    assert (loaded.num_timesteps, loaded._n_updates) == (25, 15)


def test_inference_and_rollouts_are_saved_and_can_be_changed(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model(Walk(), inference="planner", rollout_with="policy", gamma=0.9)
    model.save(tmp_path / "model")
    loaded = MODIP.load(tmp_path / "model")
    assert (loaded.inference, loaded.policy.inference, loaded.rollout_with) == ("planner", "planner", "policy")
    assert loaded.planner_kwargs == model.planner_kwargs and loaded.policy.planner_kwargs["gamma"] == 0.9
    assert MODIP.load(tmp_path / "model", inference="policy").policy.inference == "policy"


def test_get_and_set_parameters(make_model: MakeModel) -> None:
    first, second = make_model(Walk()).learn(14), make_model(Walk(), seed=1)
    assert set(first.get_parameters()) == {"policy", *first.optimizer_names}
    second.set_parameters(first.get_parameters(), exact_match=True)
    assert_same(parameters(first), parameters(second))
    second.learn(14)
    with pytest.raises(ValueError):
        second.set_parameters({"policy": first.policy.state_dict()}, exact_match=True)


@pytest.mark.parametrize("distill_from", ["executed", "both"])
def test_no_data_in_the_zip(make_model: MakeModel, tmp_path: Path, distill_from: str) -> None:
    arrays = record_walk(5000)
    model = make_model(Walk(), offline_dataset=arrays, distill_from=distill_from, relabel_freq=2, buffer_size=100_000)
    model.learn(8)
    model.save(tmp_path / "model")
    with zipfile.ZipFile(tmp_path / "model.zip") as file:
        data = json.loads(file.read("data"))
        weights = {name for name in file.namelist() if name.endswith(".pth")}
    assert not {"replay_buffer", "_offline_buffers", "_label_buffer", "_chunk_state", "offline_dataset"} & data.keys()
    assert weights == {"policy.pth", "pytorch_variables.pth", *(f"{name}.pth" for name in model.optimizer_names)}
    assert (tmp_path / "model.zip").stat().st_size < 400_000
    loaded = MODIP.load(tmp_path / "model", env=Walk())  # the data are not needed to act, nor to go on without them
    loaded.learn(5, reset_num_timesteps=False)


def test_loaded_model_takes_its_data_again(make_model: MakeModel, tmp_path: Path) -> None:
    arrays = record_walk()
    model = make_model(Walk(), offline_dataset=arrays).pretrain(3)
    model.save(tmp_path / "model")
    loaded = MODIP.load(tmp_path / "model", env=Walk(), offline_dataset=arrays)
    normalizer = loaded.policy.normalizer.mean.clone()
    loaded.pretrain(2).learn(5)
    assert loaded._n_pretrain_updates == 5
    assert th.equal(loaded.policy.normalizer.mean, normalizer)
    assert loaded.planner_kwargs == model.planner_kwargs


def test_settings_of_the_planner_given_to_load_stand_beside_the_defaults(tmp_path: Path) -> None:
    MODIP("MlpPolicy", Walk(), offline_dataset=record_walk()).save(tmp_path / "model")
    loaded = MODIP.load(tmp_path / "model", planner_kwargs={"min_std": 0.01})
    assert loaded.policy.planner_kwargs == {"gamma": loaded.gamma, **RANK_PROPOSALS, "min_std": 0.01}


@both_modes
def test_policy_saves_loads_and_pickles_alone(make_model: MakeModel, tmp_path: Path, mode: str) -> None:
    model = make_model(Walk(), inference=mode).learn(12)
    obs = observations(model)
    expected, _ = model.predict(obs, deterministic=True)
    model.policy.save(tmp_path / "policy")
    for policy in (MODIPPolicy.load(tmp_path / "policy"), cloudpickle.loads(cloudpickle.dumps(model.policy))):
        assert policy.inference == mode
        np.testing.assert_array_equal(policy.predict(obs, deterministic=True)[0], expected)


def test_set_env(make_model: MakeModel) -> None:
    model = make_model(vec_walk(2)).learn(20)
    model.set_env(vec_walk(2, terminates=True))
    model.learn(20, reset_num_timesteps=False)
    assert model.num_timesteps == 40
    with pytest.raises(ValueError):
        model.set_env(vec_walk(2, low=-3.0))


def test_load_with_another_number_of_envs(make_model: MakeModel, tmp_path: Path) -> None:
    make_model(vec_walk(1)).learn(12).save(tmp_path / "model")
    loaded = MODIP.load(tmp_path / "model", env=vec_walk(3))
    loaded.learn(9)
    assert (loaded.n_envs, loaded.num_timesteps) == (3, 9)


# ------------------------------------------------------------------ VecNormalize


@pytest.mark.parametrize("kind", ["box", "dict"])
def test_vec_normalize(make_model: MakeModel, tmp_path: Path, kind: str) -> None:
    policy = "MultiInputPolicy" if kind == "dict" else "MlpPolicy"
    env = VecNormalize(vec_walk(2, kind=kind))
    model = make_model(env, policy, offline_dataset=record_walk(kind=kind)).learn(20)
    model.save(tmp_path / "model")
    env.save(str(tmp_path / "statistics"))
    normalized = VecNormalize.load(str(tmp_path / "statistics"), vec_walk(2, kind=kind))
    loaded = MODIP.load(tmp_path / "model", env=normalized)
    obs = env.reset()
    np.testing.assert_array_equal(loaded.predict(obs, deterministic=True)[0], model.predict(obs, deterministic=True)[0])
    loaded.learn(10, reset_num_timesteps=False)
    evaluate_policy(loaded, loaded.get_env(), n_eval_episodes=2, warn=False)


def test_offline_data_go_through_vec_normalize(make_model: MakeModel) -> None:
    arrays = record_walk(200)
    for name in ("observations", "next_observations"):
        arrays[name] = 3 + arrays[name] / 10
    env = VecNormalize(vec_walk(), norm_reward=False)
    model = make_model(env, offline_dataset=arrays).pretrain(2)
    np.testing.assert_allclose(env.obs_rms.mean, arrays["observations"].mean(0), atol=1e-2)
    batch = model._sample_batch(200)
    assert batch.observations.mean().abs() < 0.3 and 0.7 < batch.observations.std() < 1.3
    assert model.policy.normalizer.mean.abs().max() < 0.01  # nothing is normalised twice
    model.learn(12)
    stored = model.replay_buffer.observations[:12]
    assert np.abs(stored).max() <= 5 and stored.std() > 0.3  # raw


def test_offline_rewards_have_the_scale_of_online_ones(make_model: MakeModel) -> None:
    arrays = record_walk(200)
    arrays["rewards"] = arrays["rewards"] * 1000
    model = make_model(VecNormalize(vec_walk()), offline_dataset=arrays).pretrain(2)
    assert model._sample_batch(200).rewards.std() < 3  # neither raw nor clipped flat
    assert len(model._sample_batch(200).rewards.unique()) > 20
