"""Who collects the next episode: the planner or the policy alone, by the returns of both."""

from typing import Any

import numpy as np
import pytest
import torch as th
from walk import MakeModel, Recorder, Walk, record_walk, vec_walk

from modip_sb3 import MODIP
from modip_sb3.trial import MIN_EPISODES, MODES, WINDOW, Trial


@pytest.fixture(autouse=True)
def seeded() -> None:
    np.random.seed(0)


def play(trial: Trial, means: dict[str, float], episodes: int, spread: float = 1.0) -> list[str]:
    """Who acted in each of some episodes of one step, which return the mean of whoever acts."""
    acted = []
    for _ in range(episodes):
        mode = str(trial.modes[0])
        acted.append(mode)
        assert trial.step(np.array([np.random.normal(means[mode], spread)]), np.array([True]))
    return acted


def started(n_envs: int = 1) -> Trial:
    trial = Trial()
    trial.restart(n_envs)
    return trial


def show(trial: Trial, planner: list[float], policy: list[float]) -> None:
    """The returns of some episodes."""
    trial.episodes = [("planner", value) for value in planner] + [("policy", value) for value in policy]


def test_both_have_their_first_episodes() -> None:
    acted = play(started(), {"planner": 0.0, "policy": 9.0}, 2 * MIN_EPISODES)
    assert acted == ["planner", "policy"] * MIN_EPISODES


@pytest.mark.parametrize("better", MODES)
def test_the_better_one_acts_and_the_other_one_has_its_share(better: str) -> None:
    means = {mode: 10.0 * (mode == better) for mode in MODES}
    trial = started()
    acted = play(trial, means, 210)[10:]
    assert 0.7 < acted.count(better) / 200 < 0.8
    assert trial.policy_is_better == (better == "policy")


def test_equal_ones_take_turns_and_the_planner_is_kept() -> None:
    trial = started()
    acted = play(trial, {"planner": 0.0, "policy": 0.0}, 400)
    assert 0.2 < np.mean([mode == "planner" for mode in acted]) < 0.8
    for _ in range(20):
        show(trial, [1.0] * MIN_EPISODES, [1.0] * MIN_EPISODES)
        assert not trial.policy_is_better


def test_it_follows_a_change() -> None:
    trial = started()
    play(trial, {"planner": 0.0, "policy": 3.0}, 40)
    assert trial.policy_is_better
    acted = play(trial, {"planner": 9.0, "policy": -3.0}, 2 * WINDOW)
    assert not trial.policy_is_better and acted[-WINDOW:].count("planner") >= WINDOW - MIN_EPISODES


def test_the_margin_is_a_standard_error() -> None:
    trial = started()
    show(trial, [0.0, 2.0], [2.0, 4.0])  # variance 2, so that the difference's error is sqrt(2)
    assert trial.policy_is_better
    show(trial, [0.0, 2.0], [1.4, 3.4])
    assert not trial.policy_is_better
    show(trial, [0.0], [5.0, 5.0])
    assert not trial.policy_is_better


def test_environments_have_episodes_of_their_own() -> None:
    trial = started(3)
    assert list(trial.modes) == ["planner", "policy", "planner"]  # those under way count
    assert not trial.step(np.array([1.0, 2.0, 3.0]), np.zeros(3, bool))
    assert trial.step(np.array([1.0, 2.0, 3.0]), np.array([False, True, True]))
    assert trial.episodes == [("policy", 4.0), ("planner", 6.0)]
    assert list(trial.modes) == ["planner", "policy", "planner"]
    trial.restart(2)
    assert trial.episodes == [("policy", 4.0), ("planner", 6.0)] and list(trial.rewards) == [0.0, 0.0]


# ----------------------------------------------------------------- in learn()


@pytest.mark.parametrize("policy_kwargs", [{}, {"horizon": 2}])
@pytest.mark.parametrize("n_envs", [1, 3])
def test_both_act_in_learn(make_model: MakeModel, n_envs: int, policy_kwargs: dict[str, Any]) -> None:
    data = record_walk()
    model = make_model(vec_walk(n_envs), rollout_with="auto", offline_dataset=data, policy_kwargs=policy_kwargs)
    recorder = Recorder()
    model.learn(72, recorder)  # as long as no episode has left the window
    assert {"rollout/planner_return", "rollout/policy_return"} <= recorder.keys
    assert all(len(returns) >= MIN_EPISODES for returns in model._trial.returns.values())
    assert bool(model.policy.trusts_planner) != model._trial.policy_is_better
    ended = np.array(recorder.dones)
    returns = model.replay_buffer.episodes().returns
    assert ended.sum() == len(returns) > 2 * MIN_EPISODES


@pytest.mark.parametrize(("mode", "has_data"), [("auto", False), ("planner", True)])
def test_no_trial_without_data_or_wish(make_model: MakeModel, mode: str, has_data: bool) -> None:
    model = make_model(Walk(), rollout_with=mode, offline_dataset=record_walk() if has_data else None)
    recorder = Recorder()
    model.learn(60, recorder)
    assert not model._trial.episodes and "rollout/policy_return" not in recorder.keys
    assert "rollout/plan_gain" in recorder.keys


def test_predict_follows_the_trial(make_model: MakeModel, tmp_path: Any) -> None:
    model = make_model(Walk(), offline_dataset=record_walk(), inference="planner").learn(30)
    obs = np.zeros((1, 2), np.float32)
    for trusted in (True, False):
        model.policy.trusts_planner.fill_(trusted)
        found, state = model.predict(obs, deterministic=True)
        expected = model.policy.act(
            th.as_tensor(obs), model.policy.initial_state(1, "planner"), "planner" if trusted else "policy", True
        )[0]
        np.testing.assert_allclose(model.policy.scale_action(found), expected, atol=1e-6)
        model.save_weights(tmp_path / "weights")
        assert bool(MODIP.from_weights(tmp_path / "weights", env=Walk()).policy.trusts_planner) == trusted


def test_the_state_of_another_actor_is_dropped(make_model: MakeModel) -> None:
    model = make_model(Walk(), inference="planner", policy_kwargs={"horizon": 2})
    obs = np.zeros((1, 2), np.float32)
    _, state = model.predict(obs)
    model.inference = "policy"
    _, state = model.predict(obs, state)
    assert state is not None and state[0].shape == (1, 4, 1) and state[1] == 1


def test_returns_go_on_after_loading(make_model: MakeModel, tmp_path: Any) -> None:
    model = make_model(vec_walk(2), rollout_with="auto", offline_dataset=record_walk()).learn(60)
    model.save(tmp_path / "model")
    loaded = MODIP.load(tmp_path / "model", env=vec_walk(3), offline_dataset=record_walk())
    assert loaded._trial.episodes == model._trial.episodes
    loaded.learn(9, reset_num_timesteps=False)
    assert len(loaded._trial.modes) == 3
