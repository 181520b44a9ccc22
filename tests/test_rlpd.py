"""RLPD: what it adds to SB3's SAC, against values computed by hand, and everything an SB3 algorithm does."""

import json
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from episodes import in_one_sentence, write_d4rl
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import CheckpointCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import configure
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.common.vec_env import VecNormalize
from walk import Walk, assert_same, observations, parameters, record_walk, vec_walk

from modip_sb3.baselines import RLPD
from modip_sb3.baselines.rlpd import RLPDPolicy
from modip_sb3.datasets import OfflineDataset
from modip_sb3.evaluation import evaluate

SMALL = {"batch_size": 8, "learning_starts": 10, "buffer_size": 1000, "seed": 0}


def make(env: Any, policy: str = "MlpPolicy", **kwargs: Any) -> RLPD:
    kwargs["policy_kwargs"] = {"net_arch": [16], "n_critics": 3} | kwargs.get("policy_kwargs", {})
    return RLPD(policy, env, **(SMALL | kwargs))


def make_constant(model: RLPD) -> None:
    """Every critic's value becomes its number, whatever it sees."""
    for ensemble in (model.critic, model.critic_target):
        for number, network in enumerate(ensemble.q_networks):
            assert isinstance(network, th.nn.Sequential)
            th.nn.init.zeros_(network[-1].weight)  # type: ignore[arg-type]
            th.nn.init.constant_(network[-1].bias, number)  # type: ignore[arg-type]


def make_batch(rewards: list[float], dones: list[float], discount: float) -> ReplayBufferSamples:
    column = th.tensor(rewards)[:, None]
    obs, actions = th.zeros(len(rewards), 2), th.zeros(len(rewards), 1)
    return ReplayBufferSamples(obs, actions, obs + 1, th.tensor(dones)[:, None], column, th.full_like(column, discount))


# ------------------------------------------------------------------ the method


def test_the_critics_lose_what_the_paper_says() -> None:
    model = make(Walk(), n_target_critics=3, backup_entropy=False)
    make_constant(model)
    metrics = model._update_critic(make_batch([1.0, 2.0], [0.0, 1.0], 0.9))
    # the minimum of the values 0, 1 and 2 of the next state is 0: the targets are 1 and 2
    assert metrics["critic_loss"].item() == pytest.approx(np.mean([1, 0, 1, 4, 1, 0]))
    assert metrics["q_mean"].item() == 1.0


@pytest.mark.parametrize("ent_coef", [0.5, "auto_0.5"])
def test_the_entropy_of_the_next_action_is_backed_up(ent_coef: Any) -> None:
    model = make(Walk(), n_target_critics=3, ent_coef=ent_coef)
    make_constant(model)
    batch = make_batch([1.0, 2.0], [0.0, 1.0], 0.9)
    th.manual_seed(0)
    _, log_probs = model.actor.action_log_prob(batch.next_observations)
    first = 1 - 0.9 * 0.5 * log_probs[0].item()
    expected = np.mean([(value - target) ** 2 for value in range(3) for target in (first, 2.0)])
    th.manual_seed(0)
    assert model._update_critic(batch)["critic_loss"].item() == pytest.approx(expected, rel=1e-5)


def test_targets_are_of_a_random_subset() -> None:
    model = make(Walk(), policy_kwargs={"n_critics": 10})
    make_constant(model)
    drawn = [model.critic_target.random_subset(th.zeros(4, 2), th.zeros(4, 1), 2) for _ in range(300)]
    assert all(values.shape == (4, 2) and (values == values[:1]).all() for values in drawn)
    assert all(values[0, 0] != values[0, 1] for values in drawn)
    mean_of_minimum = np.mean([values[0].min().item() for values in drawn])
    assert mean_of_minimum == pytest.approx(8 / 3, abs=0.5)  # of two out of 0 ... 9: (10 - 2) / 3


def test_the_actor_climbs_the_mean_of_the_ensemble() -> None:
    model = make(Walk(), policy_kwargs={"n_critics": 10}, ent_coef=0.5)
    make_constant(model)
    batch = make_batch([0.0] * 3, [0.0] * 3, 0.9)
    th.manual_seed(0)
    _, log_probs = model.actor.action_log_prob(batch.observations)
    th.manual_seed(0)
    metrics = model._update_actor(batch)
    assert metrics["actor_loss"].item() == pytest.approx(0.5 * log_probs.mean().item() - 4.5, rel=1e-5)


def test_the_temperature_aims_at_half_the_dimensions() -> None:
    assert make(Walk(shape=(3,))).target_entropy == -1.5
    assert make(Walk(), target_entropy=-2).target_entropy == -2.0
    model = make(Walk(), target_entropy=100.0, learning_rate=0.1)
    model._update_actor(make_batch([0.0], [0.0], 0.9))
    assert model._entropy_weight.item() == pytest.approx(np.exp(0.1), rel=1e-3)  # Adam's first step, upwards
    model = make(Walk(), ent_coef=0.3).learn(20)
    assert model._entropy_weight.item() == pytest.approx(0.3)


def test_layer_norm_bounds_values_far_from_the_data() -> None:
    critic = make(Walk(), policy_kwargs={"n_critics": 10, "net_arch": [32, 32]}).critic
    obs, actions = th.ones(1, 2), th.ones(1, 1)
    far, further = (th.cat(critic(obs, scale * actions), dim=1) for scale in (1e4, 1e6))
    assert far.shape == (1, 10) and far.unique().numel() == 10
    th.testing.assert_close(far, further, rtol=1e-2, atol=1e-2)


def test_the_actor_learns_after_every_policy_delay_updates() -> None:
    model = make(Walk(), gradient_steps=3, policy_delay=4)
    model.learn(11)  # one call of train()
    assert model._n_updates == 3
    actor = parameters(model)
    model.learn(1, reset_num_timesteps=False)
    changed = {name.split(".")[0] for name, value in parameters(model).items() if not th.equal(value, actor[name])}
    assert model._n_updates == 6 and changed == {"actor", "critic", "critic_target"}
    model = make(Walk(), gradient_steps=3, policy_delay=4)
    before = parameters(model)
    model.learn(11)
    changed = {name.split(".")[0] for name, value in parameters(model).items() if not th.equal(value, before[name])}
    assert changed == {"critic", "critic_target"}


def test_it_learns() -> None:
    settings = {"learning_rate": 3e-3, "batch_size": 64, "policy_kwargs": {"net_arch": [32, 32], "n_critics": 3}}
    model = make(Walk(), offline_dataset=record_walk(300), gamma=0.9, **settings)
    env = vec_walk(1)
    before, _ = evaluate_policy(model, env, 50)
    model.learn(200)
    env.seed(0)
    after, _ = evaluate_policy(model, env, 50)
    assert after > 0.5 * before  # at least half of the cost is gone


# ------------------------------------------------------------------ batches


@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.5, 1.0])
def test_batches_are_symmetric(fraction: float) -> None:
    arrays = record_walk()
    arrays["rewards"] = np.full_like(arrays["rewards"], 100.0)
    model = make(Walk(), offline_dataset=arrays, offline_fraction=fraction).learn(11)
    batch = model._sample_batch(8)
    assert batch.observations.shape == (8, 2) and batch.discounts.shape == (8, 1)
    assert (batch.rewards == 100).sum() == 8 * fraction
    assert (batch.discounts == model.gamma).all()


def test_weights_of_sources() -> None:
    near, far = record_walk(), record_walk()
    near["rewards"], far["rewards"] = near["rewards"] * 0 + 100, far["rewards"] * 0 + 200
    sources = [{"dataset": OfflineDataset.load(near), "weight": 3}, {"dataset": OfflineDataset.load(far), "weight": 1}]
    model = make(Walk(), offline_dataset=sources).learn(11)
    rewards = model._sample_batch(4000).rewards
    assert (rewards == 200).sum().item() == pytest.approx(500, abs=5 * 500**0.5)
    assert (rewards >= 100).sum() == 2000


@pytest.mark.parametrize("terminates", [True, False])
def test_time_limits_are_no_terminations(terminates: bool) -> None:
    arrays = record_walk(terminates=terminates)
    model = make(Walk(terminates=terminates), offline_dataset=arrays, offline_fraction=1.0).learn(11)
    batch = model._sample_batch(400)
    after = {
        tuple(row): (tuple(following), end)
        for row, following, end in zip(
            arrays["observations"].tolist(), arrays["next_observations"].tolist(), arrays["terminations"], strict=True
        )
    }
    for row, following, done in zip(batch.observations, batch.next_observations, batch.dones, strict=True):
        assert after[tuple(row.tolist())] == (tuple(following.tolist()), bool(done))
    assert batch.dones.any() == terminates
    online = model.replay_buffer.sample(50)
    assert online.dones.any() == terminates


def test_rewards_of_several_steps_are_added_up() -> None:
    arrays = record_walk(terminates=True)
    arrays["rewards"] = np.ones_like(arrays["rewards"])
    model = make(Walk(terminates=True), offline_dataset=arrays, n_steps=2, gamma=0.5, offline_fraction=0.5).learn(20)
    batch = model._sample_batch(200)
    rewards, dones, discounts = batch.rewards[:100], batch.dones[:100], batch.discounts[:100]
    assert set(rewards.flatten().tolist()) == {1.0, 1.5}  # an episode's last step has no second one
    assert (discounts[rewards == 1.5] == 0.25).all() and (discounts[rewards == 1.0] == 0.5).all()
    assert (dones[rewards == 1.0] == 1).sum() >= (rewards == 1.0).sum() - 10  # but for the end of the recording
    assert batch.discounts[100:].min() == 0.25  # online ones too


@pytest.mark.parametrize("kind", ["box", "dict"])
def test_vec_normalize(kind: str, tmp_path: Path) -> None:
    arrays = record_walk(200, kind=kind)
    arrays["rewards"] = arrays["rewards"] * 1000
    env = VecNormalize(vec_walk(2, kind=kind))
    policy = "MultiInputPolicy" if kind == "dict" else "MlpPolicy"
    model = make(env, policy, offline_dataset=arrays, offline_fraction=1.0).learn(12)
    batch = model._sample_batch(200)
    expected: Any = env.normalize_obs(arrays["observations"])
    obs, normalized = (part["x"] if kind == "dict" else part[:, :1] for part in (batch.observations, expected))
    assert np.isclose(obs.numpy(), normalized.T).any(1).all()
    rms: Any = env.obs_rms["x"] if isinstance(env.obs_rms, dict) else env.obs_rms
    assert 200 <= rms.count < 220
    assert batch.rewards.std() < 3 and len(batch.rewards.unique()) > 20  # neither raw nor clipped flat
    model.save(tmp_path / "model")
    loaded = RLPD.load(tmp_path / "model", env=env, offline_dataset=arrays)
    count = env.ret_rms.count
    loaded.learn(0, reset_num_timesteps=False)
    assert env.ret_rms.count == count  # the statistics have seen the data already


# ------------------------------------------------------------------ an SB3 algorithm


@pytest.mark.parametrize("kind", ["box", "dict", "discrete"])
@pytest.mark.parametrize("with_data", [True, False])
def test_learns_without_a_warning(kind: str, with_data: bool) -> None:
    policy = "MultiInputPolicy" if kind == "dict" else "MlpPolicy"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = make(Walk(kind), policy, offline_dataset=record_walk(kind=kind) if with_data else None)
        assert model.learn(30) is model
    assert (model.num_timesteps, model._n_updates) == (30, 2 * 20)
    assert all(th.isfinite(value).all() for value in parameters(model).values())
    evaluate_policy(model, Walk(kind), n_eval_episodes=2, warn=False)


@pytest.mark.parametrize("kwargs", [{"shape": (2, 3)}, {"low": -3.0, "high": 0.5}], ids=str)
def test_actions_are_scaled(kwargs: dict[str, Any]) -> None:
    arrays = record_walk(**kwargs)
    model = make(Walk(**kwargs), offline_dataset=arrays, offline_fraction=1.0).learn(12)
    actions = model._sample_batch(500).actions
    assert actions.shape == (500, int(np.prod(model.action_space.shape)))
    assert -1 <= actions.min() < -0.9 and 0.9 < actions.max() <= 1
    assert Walk(**kwargs).action_space.contains(model.predict(np.zeros(2, np.float32))[0])


@pytest.mark.parametrize("n_envs", [1, 3])
def test_same_seed_same_numbers(n_envs: int) -> None:
    def run(seed: int) -> dict[str, th.Tensor]:
        return parameters(make(vec_walk(n_envs), seed=seed, offline_dataset=record_walk()).learn(18))

    assert_same(run(3), run(3))
    with pytest.raises(AssertionError):
        assert_same(run(3), run(4))


def test_save_and_load(tmp_path: Path) -> None:
    arrays = record_walk(5000)
    model = make(Walk(), offline_dataset=arrays).learn(15)
    model.save(tmp_path / "model")
    with zipfile.ZipFile(tmp_path / "model.zip") as file:
        assert not {"replay_buffer", "_offline_buffers", "offline_dataset"} & json.loads(file.read("data")).keys()
    assert (tmp_path / "model.zip").stat().st_size < 200_000
    loaded = RLPD.load(tmp_path / "model", env=Walk(), offline_dataset=arrays)
    assert_same(parameters(model), parameters(loaded))
    obs = observations(model)
    expected, _ = model.predict(obs, deterministic=True)
    np.testing.assert_array_equal(loaded.predict(obs, deterministic=True)[0], expected)
    th.testing.assert_close(loaded._entropy_weight, model._entropy_weight)
    loaded.learn(20, reset_num_timesteps=False)
    assert (loaded.num_timesteps, loaded._n_updates) == (35, 10 + 2 * 20) and loaded._offline_buffers
    model.policy.save(tmp_path / "policy")
    np.testing.assert_array_equal(RLPDPolicy.load(tmp_path / "policy").predict(obs, deterministic=True)[0], expected)


def test_a_path_is_saved_and_missing_arrays_are_told(tmp_path: Path) -> None:
    path = write_d4rl(tmp_path / "walk.hdf5", {k: v for k, v in record_walk().items() if k != "next_observations"})
    make(Walk(), offline_dataset=str(path)).learn(12).save(tmp_path / "model")
    loaded = RLPD.load(tmp_path / "model", env=Walk())
    assert loaded.offline_dataset == str(path)
    loaded.learn(5, reset_num_timesteps=False)
    make(Walk(), offline_dataset=record_walk()).learn(12).save(tmp_path / "model")
    with pytest.warns(UserWarning, match="learned from arrays, which its file does not hold") as record:
        RLPD.load(tmp_path / "model", env=Walk()).learn(5, reset_num_timesteps=False)
    assert record[0].filename == __file__


def test_an_sb3_buffer_is_offline_data() -> None:
    model = make(Walk()).learn(30)
    assert type(model.replay_buffer) is ReplayBuffer
    other = make(Walk(), offline_dataset=model.replay_buffer, offline_fraction=1.0).learn(11)
    stored = {tuple(row) for row in model.replay_buffer.observations[:30, 0].tolist()}
    assert {tuple(row) for row in other._sample_batch(200).observations.tolist()} == stored


def test_callbacks_and_logged_keys(tmp_path: Path) -> None:
    folder = str(tmp_path)
    model = make(vec_walk(), offline_dataset=record_walk())
    model.set_logger(configure(folder, ["json"]))
    evaluation = EvalCallback(vec_walk(), None, None, 2, 20, folder, folder, verbose=0)
    model.learn(60, callback=[evaluation, CheckpointCallback(30, folder)])
    assert evaluation.evaluations_timesteps == [20, 40, 60]
    RLPD.load(tmp_path / "best_model", env=vec_walk())
    keys = set().union(*map(json.loads, (tmp_path / "progress.json").read_text().splitlines()))
    names = {"critic_loss", "q_mean", "actor_loss", "ent_coef", "ent_coef_loss", "learning_rate", "n_updates"}
    assert {f"train/{name}" for name in names} | {"rollout/ep_rew_mean", "time/fps"} <= keys


def test_evaluate() -> None:
    model = make("Pendulum-v1").learn(12)
    short = {"max_episode_steps": 8}
    result = evaluate(model, "Pendulum-v1", 3, deterministic=True, env_kwargs=short)
    expected, _ = evaluate_policy(
        model, make_vec_env("Pendulum-v1", 3, seed=1000, env_kwargs=short), 3, return_episode_rewards=True
    )
    np.testing.assert_array_equal(result.returns, expected)


# ------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_target_critics": 4}, "n_target_critics=4 .* n_critics=3"),
        ({"n_target_critics": 0}, "n_target_critics=0 must be at least 1"),
        ({"policy_delay": 0}, "policy_delay=0 must be at least 1"),
        ({"offline_fraction": 1.5}, "offline_fraction=1.5 is not between 0 and 1"),
        ({"gamma": 1.1}, "gamma=1.1 is not between 0 and 1"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        make(Walk(), **settings)
    in_one_sentence(error)


def test_data_must_fit_the_environment() -> None:
    with pytest.raises(ValueError, match=r"actions have shape \(2,\), expected \(1,\)"):
        make(Walk(), offline_dataset=record_walk(shape=(2,))).learn(5)
    with pytest.raises(FileNotFoundError, match="nowhere.hdf5"):
        make(Walk(), offline_dataset="nowhere.hdf5").learn(5)
