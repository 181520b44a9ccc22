"""What the policy clones: whose chunks, in which shares, how they were executed, and how it samples what it learned."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from walk import MakeModel, Recorder, Walk, observations, parameters, record_walk, vec_walk

from modip_sb3 import MODIP
from modip_sb3.baselines import DSRL, DiffusionBC
from modip_sb3.buffers import Episodes, SequenceReplayBuffer
from modip_sb3.mixing import (
    PRIOR_STEPS,
    advantage_weights,
    better_share,
    better_weights,
    offline_share,
    rate_episodes,
)
from modip_sb3.planner import Plan

# ------------------------------------------------------------------ shares


def episodes(*pairs: tuple[float, int]) -> Episodes:
    """Of returns and lengths."""
    returns, lengths = zip(*pairs, strict=True) if pairs else ((), ())
    return Episodes(np.array(returns, float), np.array(lengths, int), *np.zeros((2, len(pairs)), int))


def test_share_before_experience() -> None:
    ratings = rate_episodes([episodes((5.0, 10))], [1.0], episodes())
    assert ratings.shape == (0,) and offline_share(ratings, np.zeros(0), 10) == 1


def test_ratings_count_steps_and_half_of_the_ties() -> None:
    offline = [episodes((5.0, 100), (7.0, 50), (7.0, 50))]
    online = episodes(*((reward, 1) for reward in (4.0, 5.0, 6.0, 7.0, 8.0)))
    np.testing.assert_allclose(rate_episodes(offline, [1.0], online), [0, 0.25, 0.5, 0.75, 1])


def test_ratings_follow_the_sources_weights() -> None:
    sources = [episodes((0.0, 1000)), episodes((9.0, 1))]
    np.testing.assert_allclose(rate_episodes(sources, [0.3, 0.7], episodes((5.0, 1))), [0.3])


@pytest.mark.parametrize(("rating", "expected"), [(0.0, 1.0), (0.5, 0.75), (1.0, 0.5)])
def test_share_of_equal_episodes(rating: float, expected: float) -> None:
    share = offline_share(np.full(4, rating), np.full(4, PRIOR_STEPS / 4), 2 * PRIOR_STEPS)
    assert share == pytest.approx(expected)


def share_of(ratings: np.ndarray, lengths: np.ndarray, offline_steps: int, by_rating: bool) -> float:
    """With "better" of data that is many episodes, or with "all"."""
    if by_rating:
        return better_share(better_weights(ratings, 1000), lengths, offline_steps)
    return offline_share(ratings, lengths, offline_steps)


@pytest.mark.parametrize("by_rating", [False, True])
def test_demonstrations_are_outnumbered_by_experience_as_good(by_rating: bool) -> None:
    ratings, lengths = np.array([0.5, 0.0]), np.array([100 * PRIOR_STEPS, 0])  # successes like theirs
    share = share_of(ratings, lengths, PRIOR_STEPS, by_rating)
    assert share == pytest.approx(0.01, rel=0.05)  # one of a hundred
    failures = np.array([100 * PRIOR_STEPS, 400 * PRIOR_STEPS])
    with_failures = share_of(ratings, failures, PRIOR_STEPS, by_rating)
    assert with_failures == share if by_rating else with_failures > 5 * share


def test_much_data_is_not_cloned_more_for_being_much() -> None:
    ratings, lengths = np.array([0.9]), np.array([PRIOR_STEPS])
    shares = [offline_share(ratings, lengths, times * PRIOR_STEPS) for times in (2, 3, 1000)]
    assert shares == [pytest.approx(0.55)] * 3


@pytest.mark.parametrize("by_rating", [False, True])
def test_failures_alone_are_not_cloned(by_rating: bool) -> None:
    assert share_of(np.zeros(3), np.full(3, 400), 300, by_rating) == 1


def test_share_is_the_probability_of_drawn_steps() -> None:
    rng = np.random.default_rng(0)
    sources = [episodes(*zip(rng.integers(0, 9, n), rng.integers(1, 50, n), strict=True)) for n in (5, 8)]
    online = episodes(*zip(rng.integers(0, 9, 6), rng.integers(500, 2000, 6), strict=True))
    weights = np.array([0.4, 0.6])
    ratings = rate_episodes(sources, weights, online)
    offline = np.concatenate(
        [rng.choice(np.repeat(*s[:2]), int(w * 1e5)) for s, w in zip(sources, weights, strict=True)]
    )
    drawn = rng.choice(online.returns, len(offline), p=online.lengths / online.lengths.sum())
    probability = (offline > drawn).mean() + (offline == drawn).mean() / 2
    steps = online.lengths.sum()
    expected = (PRIOR_STEPS + steps * probability) / (PRIOR_STEPS + steps)
    assert offline_share(ratings, online.lengths, 10**6) == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("lengths", [(3,), (37, 41, 35), (1, 10, 100, 7, 13, 29)])
def test_successes_count_about_as_demonstrations_and_failures_do_not(lengths: tuple[int, ...]) -> None:
    sources = [episodes(*((1.0, length) for length in lengths))] * 3
    ratings = rate_episodes(sources, [0.1, 0.2, 0.7], episodes((0.0, 400), (1.0, 40)))
    failure, success = better_weights(ratings, 100)
    assert failure == 0 and success == pytest.approx(1, abs=0.02)


def test_better_weights_by_hand() -> None:
    offline = episodes(*((float(number), 10) for number in range(4)))
    ratings = rate_episodes([offline], [1.0], episodes(*((reward, 9) for reward in (1.0, 1.5, 2.0, 3.0, 4.0))))
    np.testing.assert_allclose(ratings, [0.375, 0.5, 0.625, 0.875, 1])
    np.testing.assert_allclose(better_weights(ratings, 4), [0, 0.5 / 0.75, 1, 0.875 / 0.375, 4])


def add(buffer: SequenceReplayBuffer, rewards: list[float], dones: list[int]) -> None:
    obs = np.zeros((buffer.n_envs, 2), np.float32)
    infos: list[dict[str, Any]] = [{} for _ in rewards]
    buffer.add(obs, obs, np.zeros((buffer.n_envs, 1)), np.array(rewards), np.array(dones), infos)


def returns_of(buffer: SequenceReplayBuffer) -> list[tuple[float, int]]:
    found = buffer.episodes()
    return sorted(zip(found.returns.tolist(), found.lengths.tolist(), strict=True))


def test_episode_returns_by_hand() -> None:
    buffer = SequenceReplayBuffer(10, *vec_walk_spaces(), n_envs=2)
    assert returns_of(buffer) == []
    for step, dones in enumerate([[0, 1], [1, 0], [0, 0], [0, 1]]):
        add(buffer, [float(step), 10.0 + step], dones)
    assert returns_of(buffer) == [(1.0, 2), (10.0, 1), (36.0, 3)]  # the first environment's second goes on
    found = buffer.episodes()
    assert sorted(zip(found.envs.tolist(), found.rows.tolist(), strict=True)) == [(0, 0), (1, 0), (1, 1)]
    buffer.reset()
    assert returns_of(buffer) == []


def test_episodes_are_drawn_by_their_weights_and_lengths() -> None:
    buffer = SequenceReplayBuffer(20, *vec_walk_spaces(), n_envs=2)
    for step in range(8):  # the first environment has episodes of 2 and 6 steps, the second one of 7
        add(buffer, [float(step), 100.0 + step], [int(step in (1, 7)), int(step == 6)])
    lengths = buffer.episodes().lengths.tolist()
    assert lengths == [2, 6, 7]
    batch = buffer.sample_episodes(np.array([1.0, 0.0, 2.0]), 3000, 3)
    first = batch.rewards[:, 0].numpy()
    assert set(first) == {0, 1, *range(100, 107)} and (first < 2).mean() == pytest.approx(2 / 16, abs=0.03)
    assert set(batch.mask.sum(1)[first == 106].tolist()) == {1}  # none crosses an episode's end


def test_a_full_buffer_draws_steps_that_have_been_overwritten_anew() -> None:
    buffer = SequenceReplayBuffer(6, *vec_walk_spaces())
    for step in range(9):
        add(buffer, [float(step)], [int(step == 5)])
        if step == 5:
            assert buffer.episodes().lengths.tolist() == [5]  # the row between holds only an observation
    batch = buffer.sample_episodes(np.ones(1), 500, 2)  # steps 6 to 8 are where 0 to 2 were, and 3 is that row
    assert set(batch.rewards[:, 0].tolist()) == {4, 5, 7, 8}


@pytest.mark.parametrize(("size", "expected"), [(6, (26.0, 4)), (4, (15.0, 2))])
def test_episode_returns_of_a_buffer_that_wrapped(size: int, expected: tuple[float, int]) -> None:
    buffer = SequenceReplayBuffer(size, *vec_walk_spaces())
    for step in range(1, 10):
        add(buffer, [float(step)], [int(step % 4 == 0)])
    assert returns_of(buffer) == [expected]  # of steps 5 to 8, of which the smaller one has 7 and 8


def test_episode_returns_of_offline_data(make_model: MakeModel) -> None:
    arrays = record_walk()
    model = make_model(Walk(), offline_dataset=arrays).pretrain(1)
    ends = np.flatnonzero(arrays["terminations"] | arrays["truncations"]) + 1
    parts = np.split(arrays["rewards"], ends)
    expected = sorted((part.sum(), len(part)) for part in parts if len(part) > 0)
    np.testing.assert_allclose(returns_of(model._offline_buffers[0]), expected, rtol=1e-5)


def vec_walk_spaces() -> tuple[Any, Any]:
    env = Walk()
    return env.observation_space, env.action_space


# ------------------------------------------------------------------ batches


def far_walk() -> dict[str, Any]:
    """Offline data whose actions are all 1."""
    arrays = record_walk()
    arrays["actions"] = np.ones_like(arrays["actions"])
    return arrays


@pytest.mark.parametrize(("fraction", "expected"), [(0.0, 0.0), (0.25, 0.25), (1.0, 1.0)])
def test_the_policy_clones_the_share_it_is_told(make_model: MakeModel, fraction: float, expected: float) -> None:
    model = make_model(Walk(), offline_dataset=far_walk(), distill_offline_fraction=fraction, rollout_with="policy")
    model.learn(20)
    model.replay_buffer.actions[:] = -1
    chunks = model._executed_chunks(400)
    assert [part.shape for part in chunks] == [(400, 4, 1), (400, 2), (400, 4)]
    assert (chunks.actions[:, 0] == 1).float().mean() == expected


@pytest.mark.parametrize("distilled", ["all", "better"])
def test_episodes_are_cloned_by_what_they_return(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch, distilled: str
) -> None:
    monkeypatch.setattr("modip_sb3.mixing.PRIOR_STEPS", 1e-6)
    model = make_model(vec_walk(4), offline_dataset=far_walk(), distill_episodes=distilled)
    recorder = Recorder()
    model.learn(80, recorder)
    assert "train/offline_share" in recorder.keys
    replay = model.replay_buffer
    replay.actions[:] = -1
    (data,) = model._offline_buffers
    counts = replay.episodes().lengths.sum() * len(data.episodes().returns)  # each online step as often as that is
    left = data.size() / (data.size() + counts) if distilled == "better" else 0
    for reward, expected in ((-100.0, 1), (100.0, left)):
        replay.rewards[:], replay._episodes = reward, None
        offline = model._sample_distilled(1000, 4).actions[:, 0] == 1
        assert offline.float().mean() == pytest.approx(expected, abs=0.0005)  # 0 and 1 to the last chunk
    found = replay.episodes()
    row, env = found.rows[0], found.envs[0]
    replay.rewards[:], replay._episodes, model.distill_offline_fraction = -100, None, 0.0
    drawn = model._sample_distilled(40, 4).actions[:, 0].flatten()
    assert set(drawn.tolist()) == ({1.0} if distilled == "better" else {-1.0})  # of failures not even what is asked for
    replay.rewards[row, env], replay.actions[row, env], replay._episodes = 1e6, 0, None
    drawn = model._sample_distilled(400, 4).actions[:, 0].flatten()
    assert set(drawn.tolist()) == {-1.0, 0.0}
    share = 1 / (found.lengths[0] if distilled == "better" else replay.size() * replay.n_envs)
    assert (drawn == 0).float().mean() == pytest.approx(share, abs=0.1)


@pytest.mark.parametrize("advantage", [-100.0, 100.0, 0.0])
def test_equal_advantages_weigh_the_same(advantage: float) -> None:
    np.testing.assert_allclose(advantage_weights(th.full((8,), advantage), 2.0), 1.0, rtol=1e-5)


def test_advantage_weights_do_not_depend_on_an_offset_or_a_scale() -> None:
    advantages = th.tensor([-1.0, 0.0, 1.0, 0.0])  # standard deviation sqrt(1/2)
    expected = np.exp(2 * np.array([-1, 0, 1, 0]) * np.sqrt(2))
    for offset, scale in ((0.0, 1.0), (-500.0, 1.0), (500.0, 7.0)):
        weights = advantage_weights(offset + scale * advantages, 2.0)
        np.testing.assert_allclose(weights, expected / expected.mean(), rtol=1e-4)


def test_without_data_everything_is_experience(make_model: MakeModel) -> None:
    model = make_model(Walk()).learn(20)
    assert len(model._executed_chunks(30).actions) == 30


@pytest.mark.parametrize("distill_steps", [0, 1, 3])
def test_updates_of_the_policy(make_model: MakeModel, distill_steps: int) -> None:
    model = make_model(Walk(), offline_dataset=record_walk(), distill_steps=distill_steps)
    model.pretrain(5)
    before, steps = parameters(model), steps_of(model)
    model.learn(14)
    assert model._n_updates > 0 and steps_of(model) - steps == distill_steps * model._n_updates
    changed = [name for name, value in parameters(model).items() if not th.equal(value, before[name])]
    assert any(name.startswith("actor") for name in changed) == (distill_steps > 0)
    assert any(name.startswith("critic") for name in changed)


@pytest.mark.parametrize(("distill_from", "batches"), [("executed", 1), ("relabel", 1), ("both", 2)])
def test_what_is_cloned_has_a_batch_size_of_its_own(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch, distill_from: str, batches: int
) -> None:
    model = make_model(Walk(), distill_from=distill_from, distill_batch_size=24)
    sizes, clone = [], model._clone

    def record(actions: th.Tensor, *args: Any) -> Any:
        sizes.append(len(actions))
        return clone(actions, *args)

    monkeypatch.setattr(model, "_clone", record)
    model.learn(20)
    assert sizes and set(sizes) == {24 * batches}


def steps_of(model: MODIP) -> int:
    return int(next(iter(model.actor_optimizer.state.values()))["step"])


def test_wrong_settings_of_the_distillation(make_model: MakeModel) -> None:
    for wrong, message in [
        ({"distill_steps": -1}, "distill_steps=-1"),
        ({"distill_batch_size": 0}, "distill_batch_size=0"),
        ({"distill_offline_fraction": 1.5}, "distill_offline_fraction=1.5"),
        ({"distill_offline_fraction": "half"}, "distill_offline_fraction='half'"),
        ({"n_plan_steps": 0}, "n_plan_steps=0"),
        ({"n_plan_steps": 5}, "n_plan_steps=5 must not exceed the plans' horizon=4"),
        ({"policy_kwargs": {"sampling_temperature": -0.1}}, "sampling_temperature=-0.1"),
        ({"policy_kwargs": {"condition_noise": -0.1}}, "condition_noise=-0.1"),
        ({"policy_kwargs": {"proposal_temperature": -0.1}}, "proposal_temperature=-0.1"),
    ]:
        with pytest.raises((ValueError, TypeError), match=message):
            make_model(Walk(), **wrong)


# ------------------------------------------------------------------ plans that are executed for several steps


def test_plans_are_executed_to_their_end_or_the_episodes(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(vec_walk(3), learning_starts=0, gradient_steps=0, n_plan_steps=3)
    plans: list[Plan] = []
    plan = model.policy.plan

    def record(*args: Any) -> Plan:
        plans.append(plan(*args))
        return plans[-1]

    monkeypatch.setattr(model.policy, "plan", record)
    recorder = Recorder()
    model.learn(120, recorder)
    made, position, chunks = iter(plans), np.full(3, -1), np.zeros((3, 4, 1))
    for actions, dones in zip(recorder.actions, recorder.dones, strict=True):
        due = (position < 0) | (position == 3)
        if due.any():
            chunks[due], position[due] = next(made).actions.numpy(), 0
        np.testing.assert_array_equal(actions, chunks[np.arange(3), position])
        position = np.where(dones, -1, position + 1)
    assert next(made, None) is None and len({len(p.actions) for p in plans}) > 1  # some were made for some alone


def test_promises_are_kept_track_of(make_model: MakeModel) -> None:
    recorder = Recorder()
    make_model(vec_walk(3), learning_starts=0, n_plan_steps=2, policy_kwargs={"horizon": 2}).learn(60, recorder)
    assert {"rollout/plan_predicted", "rollout/plan_realized", "rollout/plan_gain"} <= recorder.keys


@pytest.mark.parametrize(("policy_kwargs", "expected"), [({}, 4), ({"n_action_steps": 2}, 4), ({"horizon": 3}, 3)])
def test_default_steps_of_a_plan(make_model: MakeModel, policy_kwargs: dict[str, Any], expected: int) -> None:
    assert make_model(Walk(), policy_kwargs=policy_kwargs).n_plan_steps == expected


def test_predict_plans_at_every_step(make_model: MakeModel) -> None:
    model = make_model(Walk(), offline_dataset=record_walk(), inference="planner").learn(12)
    obs, state = observations(model, 1), None
    fresh, state = model.predict(obs, state, deterministic=True)
    for _ in range(3):
        action, state = model.predict(obs, state, deterministic=True)
        np.testing.assert_array_equal(action, fresh)


# ------------------------------------------------------------------ temperature


@pytest.mark.parametrize("proposal", ["diffusion", "gaussian"])
def test_temperatures_scale_the_spread_of_the_policy_alone_and_of_the_proposals(
    make_model: MakeModel, proposal: str
) -> None:
    def sample(**temperatures: float) -> tuple[th.Tensor, th.Tensor]:
        settings = {"proposal": proposal, "num_proposals": 500} | temperatures
        planner_kwargs = {"num_samples": 0, "num_elites": 500, "min_std": 0.0}
        policy = make_model(Walk(), policy_kwargs=settings, planner_kwargs=planner_kwargs).policy
        own = policy.sample_chunks(th.zeros(500, 2))
        if policy.sampling_temperature == 0:
            th.testing.assert_close(own, policy.sample_chunks(th.zeros(500, 2), deterministic=True))
        th.manual_seed(0)
        return own.std(0).mean(), policy.plan(th.zeros(1, 2)).std

    hot = sample(sampling_temperature=1.0)
    cold, still = sample(sampling_temperature=0.5), sample(sampling_temperature=0.0)
    assert cold[0] < 0.9 * hot[0]
    assert still[1].equal(hot[1]) and cold[1].equal(hot[1])  # the proposals have a temperature of their own
    cold, still = sample(proposal_temperature=0.5), sample(proposal_temperature=0.0)
    assert still[1].mean() < 1e-6 < cold[1].mean() < 0.9 * hot[1].mean()


def test_a_clone_acts_as_the_data_do_and_modip_colder_and_anew_at_each_step(tmp_path: Path) -> None:
    clone = DiffusionBC("MlpPolicy", Walk(), offline_dataset=record_walk(), policy_kwargs={"action_horizon": 6})
    assert (clone.policy.n_action_steps, clone.policy.sampling_temperature) == (6, 1)
    model = MODIP.from_pretrained(clone)
    assert (model.policy.n_action_steps, model.policy.sampling_temperature) == (1, 0.3)
    assert DSRL.from_pretrained(model, offline_dataset=record_walk()).policy.n_action_steps == 6
    clone.save(tmp_path / "clone")
    assert DiffusionBC.load(tmp_path / "clone").policy.n_action_steps == 6
