"""Acting: predict and its state, episodes' ends, and the ablations' settings."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium.wrappers import TimeLimit
from stable_baselines3.common.noise import NormalActionNoise
from walk import (
    MakeModel,
    Recorder,
    Walk,
    both_denoisers,
    both_modes,
    observations,
    parameters,
    record_walk,
    rows_of,
    vec_walk,
)

from modip_sb3 import MODIP

# ------------------------------------------------------------------ predict


@both_denoisers
@both_modes
@pytest.mark.parametrize("kind", ["box", "dict", "discrete"])
def test_deterministic_predict(make_model: MakeModel, denoiser: str, mode: str, kind: str) -> None:
    policy = "MultiInputPolicy" if kind == "dict" else "MlpPolicy"
    model = make_model(Walk(kind), policy, inference=mode, policy_kwargs={"denoiser": denoiser}).learn(12)
    obs = observations(model, num=5)
    together, _ = model.predict(obs, deterministic=True)
    np.testing.assert_array_equal(model.predict(obs, deterministic=True)[0], together)
    alone = [model.predict(rows_of(obs, i), deterministic=True)[0] for i in range(5)]
    assert alone[0].shape == (1,) and together.shape == (5, 1)
    np.testing.assert_allclose(alone, together, atol=1e-4)
    assert (model.predict(obs)[0] != model.predict(obs)[0]).any()


def test_deterministic_predict_with_a_stochastic_scheduler(make_model: MakeModel) -> None:
    model = make_model(Walk(), policy_kwargs={"sample_scheduler": "DDPMScheduler"})
    obs = observations(model, num=3)
    together, _ = model.predict(obs, deterministic=True)
    np.testing.assert_array_equal(model.predict(obs, deterministic=True)[0], together)
    np.testing.assert_allclose(model.predict(obs[2], deterministic=True)[0], together[2], atol=1e-4)


def test_the_rest_of_a_chunk_is_in_the_state(make_model: MakeModel) -> None:
    model = make_model(Walk(), policy_kwargs={"n_action_steps": 3})
    obs = observations(model, num=2)
    chunk = model.policy.sample_chunks(model.policy.features(model.policy.obs_to_tensor(obs)[0]), deterministic=True)
    state, actions = None, []
    for _ in range(4):
        action, state = model.predict(obs, state, deterministic=True)
        actions.append(action)
    np.testing.assert_allclose(actions[:3], chunk.transpose(0, 1)[:3], atol=1e-6)
    np.testing.assert_allclose(actions[3], actions[0], atol=1e-6)  # a new chunk for the same observation


def test_episode_start_drops_the_chunk_of_that_env_alone(make_model: MakeModel) -> None:
    model = make_model(Walk(), policy_kwargs={"n_action_steps": 3})
    obs = observations(model, num=2)
    first, state = model.predict(obs, deterministic=True)
    kept = [array.copy() for array in state]
    unbroken, _ = model.predict(obs, state, np.array([False, False]), deterministic=True)
    broken, after = model.predict(obs, state, np.array([True, False]), deterministic=True)
    np.testing.assert_allclose(broken[0], first[0], atol=1e-6)
    np.testing.assert_array_equal(broken[1], unbroken[1])
    assert after[1].tolist() == [1, 2]
    assert all((array == before).all() for array, before in zip(state, kept, strict=True))  # the caller's is untouched
    without_state, _ = model.predict(obs, episode_start=np.array([True, True]), deterministic=True)
    np.testing.assert_allclose(without_state, first, atol=1e-6)


def test_planner_warm_starts_from_the_state(make_model: MakeModel) -> None:
    model = make_model(Walk(), inference="planner")
    obs = observations(model, num=2)
    first, state = model.predict(obs, deterministic=True)
    assert state[0].shape == (2, 4, 1) and state[1].tolist() == [1, 1]
    again, _ = model.predict(obs, state, np.array([True, True]), deterministic=True)
    np.testing.assert_allclose(again, first, atol=1e-6)
    moved = (np.clip(state[0] + 0.9, -1, 1), state[1])
    warm, next_state = model.predict(obs, moved, np.array([True, False]), deterministic=True)
    np.testing.assert_allclose(warm[0], first[0], atol=1e-6)
    np.testing.assert_allclose(next_state[0][0], state[0][0], atol=1e-6)
    assert np.abs(next_state[0][1] - state[0][1]).max() > 1e-3  # the search began somewhere else


@pytest.mark.parametrize(("n_action_steps", "horizon", "expected"), [(1, 4, 1), (3, 4, 3), (4, 2, 2)])
def test_planner_executes_as_much_of_a_plan_as_of_a_chunk(
    make_model: MakeModel, n_action_steps: int, horizon: int, expected: int
) -> None:
    policy_kwargs = {"n_action_steps": n_action_steps, "horizon": horizon}
    model = make_model(Walk(), inference="planner", policy_kwargs=policy_kwargs)
    obs, state, positions = observations(model, num=2), None, []
    for _ in range(6):
        actions, state = model.predict(obs, state)
        positions += state[1].tolist()
        if positions[-1] > 1:
            np.testing.assert_allclose(actions, state[0][:, positions[-1] - 1], atol=1e-6)
    assert positions == [step % expected + 1 for step in range(6) for _ in range(2)]


@both_modes
@pytest.mark.parametrize(("low", "high", "shape"), [(-2.0, 0.5, (1,)), (-0.3, 0.7, (2, 2)), (10.0, 11.0, (3,))])
def test_actions_lie_in_the_box(
    make_model: MakeModel, mode: str, low: float, high: float, shape: tuple[int, ...]
) -> None:
    settings = {"low": low, "high": high, "shape": shape}
    model = make_model(Walk(**settings), inference=mode, rollout_with=mode, offline_dataset=record_walk(**settings))
    model.learn(12)
    obs = np.random.default_rng(0).uniform(-5, 5, (50, 2)).astype(np.float32)
    actions, _ = model.predict(obs)
    assert actions.shape == (50, *shape) and actions.dtype == np.float32
    assert all(model.action_space.contains(action) for action in actions)
    assert model.action_space.contains(model.predict(obs[0])[0])
    assert np.abs(model.replay_buffer.actions).max() <= 1
    assert model._offline_buffers[0].actions.min() < -0.9 and model._offline_buffers[0].actions.max() > 0.9


@pytest.mark.parametrize("n_envs", [1, 2])
@pytest.mark.parametrize("shape", [(2,), (2, 2)])
def test_action_noise_is_executed_and_stored(make_model: MakeModel, n_envs: int, shape: tuple[int, ...]) -> None:
    noise = NormalActionNoise(np.full(shape, 5.0), np.zeros(shape))  # so large that the bound is executed
    model = make_model(vec_walk(n_envs, shape=shape), action_noise=noise, learning_starts=0, gradient_steps=0)
    model.learn(6)
    assert (model.replay_buffer.actions[: 6 // n_envs] == 1).all()


# ------------------------------------------------------------------ episodes


def test_chunks_end_with_their_episode_in_learn(make_model: MakeModel) -> None:
    recorder = Recorder()
    model = make_model(
        vec_walk(3), rollout_with="policy", gradient_steps=0, learning_starts=0, policy_kwargs={"n_action_steps": 3}
    )
    model.learn(120, recorder)
    dones = np.array(recorder.dones)
    assert 10 < dones.sum() and not dones.all(axis=1).all()
    expected = np.ones(3)
    previous = np.full((3, 4, 1), np.nan)
    for step, (chunks, positions) in enumerate(recorder.chunk_states):
        np.testing.assert_array_equal(positions, expected)
        np.testing.assert_array_equal(recorder.actions[step], chunks[np.arange(3), positions - 1])
        kept = (chunks == previous).all(axis=(1, 2))
        np.testing.assert_array_equal(kept, positions > 1)  # a new chunk where one begins, and nowhere else
        expected = np.where(dones[step] | (positions == 3), 1, positions + 1)
        previous = chunks


def test_plans_start_afresh_after_an_episode(make_model: MakeModel) -> None:
    model = make_model(vec_walk(3), learning_starts=0, gradient_steps=0, n_plan_steps=1).learn(3)
    for _ in range(20):
        recorder = Recorder()
        model.learn(3, recorder, reset_num_timesteps=False)
        np.testing.assert_array_equal(model._chunk_state[1], np.where(recorder.dones[-1], -1, 1))


@pytest.mark.parametrize("limit", ["own", "wrapper"])
def test_a_time_limit_is_no_termination(make_model: MakeModel, limit: str) -> None:
    env = Walk() if limit == "own" else TimeLimit(Walk(terminates=True), max_episode_steps=1)
    model = make_model(env).learn(40)
    assert model.replay_buffer.dones[:40].sum() >= 6
    assert model.replay_buffer.sample_sequences(200, 4).terminations.sum() == 0
    assert model.replay_buffer.sample(200).dones.sum() == 0


def test_terminations_are_learned(make_model: MakeModel) -> None:
    model = make_model(Walk(terminates=True)).learn(40)
    batch = model.replay_buffer.sample_sequences(200, 4)
    assert 0 < batch.terminations.sum() <= batch.mask.sum()
    assert model.replay_buffer.sample(200).dones.sum() > 0


# ------------------------------------------------------------------ ablations


@pytest.mark.parametrize(
    "settings",
    [
        {"critic_target": "policy"},
        {"distill_from": "relabel", "relabel_freq": 4},
        {"distill_from": "both", "relabel_freq": 4},
        {"distill_weighting": "uniform"},
        {"rollout_with": "policy"},
        {"planner_kwargs": {"num_samples": 0}},
        {"n_steps": 1},
        {"offline_fraction": 0.0},
        {"offline_fraction": 1.0},
        {"policy_kwargs": {"terminal_value": "q"}},
        {"policy_kwargs": {"proposal": "gaussian"}},
        {"policy_kwargs": {"terminal_value": "q", "proposal": "gaussian"}, "distill_from": "both"},
    ],
    ids=str,
)
def test_ablations(make_model: MakeModel, settings: dict[str, Any], tmp_path: Path) -> None:
    model = make_model(vec_walk(2, terminates=True), offline_dataset=record_walk(terminates=True), **settings)
    model.learn(24)
    assert all(th.isfinite(value).all() for value in parameters(model).values())
    model.save(tmp_path / "model")
    loaded = MODIP.load(tmp_path / "model", env=vec_walk(2, terminates=True))
    for inference in ("policy", "planner"):
        model.inference = loaded.inference = inference
        obs = observations(model)
        expected, _ = model.predict(obs, deterministic=True)
        np.testing.assert_array_equal(loaded.predict(obs, deterministic=True)[0], expected)
    loaded.learn(4, reset_num_timesteps=False)


def test_learns_from_its_first_transition(make_model: MakeModel) -> None:
    model = make_model(Walk(), learning_starts=0).learn(3)
    assert all(th.isfinite(value).all() for value in parameters(model).values())


def test_batches_of_one_sequence(make_model: MakeModel) -> None:
    model = make_model(Walk(), batch_size=1, gradient_steps=2).learn(14)
    assert all(th.isfinite(value).all() for value in parameters(model).values())
