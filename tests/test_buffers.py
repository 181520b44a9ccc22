"""What comes out of the buffers, for episodes of random lengths whose every number says where it belongs."""

from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import NStepReplayBuffer
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from modip_sb3.buffers import LabelBuffer, SequenceBatch, SequenceReplayBuffer

BOX = spaces.Box(-np.inf, np.inf, (3,), np.float32)
DICT = spaces.Dict({"a": spaces.Box(-np.inf, np.inf, (3,), np.float32), "b": spaces.Box(-1e6, 1e6, (2, 1), np.float64)})
ACTIONS = spaces.Box(-1, 1, (2,), np.float32)
Identity = tuple[int, int, int]
any_obs = pytest.mark.parametrize("observation_space", [BOX, DICT], ids=["box", "dict"])


def encode(space: spaces.Space, identities: list[Identity]) -> Any:
    """Observations ``(n_envs, ...)`` that spell (env, episode, step)."""
    rows = np.array(identities, dtype=np.float32)
    if isinstance(space, spaces.Dict):
        return {"a": rows, "b": rows[:, 1:, None].astype(np.float64)}
    return rows


def decode(observations: Any) -> np.ndarray:
    """Back to integers ``(..., 3)``; the two keys of Dict observations must agree."""
    if isinstance(observations, dict):
        th.testing.assert_close(observations["b"][..., 0], observations["a"][..., 1:], check_dtype=False)
        observations = observations["a"]
    return np.asarray(observations).astype(int)


@dataclass
class Recorder:
    """Feeds a buffer with random episodes, as SB3's rollout does, and remembers how each of them ended."""

    buffer: Any
    space: spaces.Space
    seed: int
    max_length: int = 9
    ends: dict[tuple[int, int], tuple[int, str]] = field(default_factory=dict)  # (env, episode) -> (length, how)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)
        self.current = [(env, 0, 0) for env in range(self.buffer.n_envs)]
        self.lengths = self.rng.integers(1, self.max_length, self.buffer.n_envs)

    def _end(self, env: int, how: str) -> None:
        _, episode, step = self.current[env]
        self.ends[env, episode] = (step, how)
        self.current[env] = (env, episode + 1, 0)
        self.lengths[env] = self.rng.integers(1, self.max_length)

    def step(self) -> None:
        before = list(self.current)
        after = [(env, episode, step + 1) for env, episode, step in before]
        dones = np.array([step >= length for (*_, step), length in zip(after, self.lengths, strict=True)])
        limits = dones & (self.rng.random(len(dones)) < 0.5)
        rewards = np.array([step + 100 * episode for _, episode, step in before], dtype=np.float32)
        actions = np.array([(step / 1000, episode / 1000) for _, episode, step in before], dtype=np.float32)
        infos = [{"TimeLimit.truncated": bool(limit)} for limit in limits]
        self.buffer.add(encode(self.space, before), encode(self.space, after), actions, rewards, dones, infos)
        self.current = after
        for env in np.flatnonzero(dones):
            self._end(int(env), "limit" if limits[env] else "termination")

    def reset_envs(self) -> None:
        """The environments are reset without a done, as between two calls of ``learn()``."""
        for env in range(self.buffer.n_envs):
            if self.current[env][2] > 0:
                self._end(env, "reset")


def check_sequences(batch: SequenceBatch, recorder: Recorder, newest: dict[int, Identity], length: int) -> None:
    """Every number of a batch, from what the recorder knows."""
    identities, mask = decode(batch.observations), batch.mask.numpy().astype(int)
    assert identities.shape[1] == length + 1 and mask.shape == (len(identities), length)
    for index, (env, episode, start) in enumerate(identities[:, 0]):
        num = mask[index].sum()
        end, how = recorder.ends.get((env, episode), (None, "running"))
        available = (newest[env][2] if end is None else end) - start  # steps of this episode from here on
        assert num == min(length, available) and num >= 1
        assert mask[index].tolist() == [1] * num + [0] * (length - num)
        steps = np.minimum(start + np.arange(length + 1), start + num)  # the padding repeats the last observation
        assert identities[index].tolist() == [[env, episode, step] for step in steps]
        assert batch.rewards[index, :num].tolist() == [step + 100 * episode for step in steps[:num]]
        np.testing.assert_allclose(batch.actions[index, :num, 0], steps[:num] / 1000, rtol=1e-6)
        np.testing.assert_allclose(batch.actions[index, :num, 1], episode / 1000, rtol=1e-6)
        reached_termination = how == "termination" and available <= length
        expected = [0] * length
        if reached_termination:
            expected[num - 1] = 1
        assert batch.terminations[index].tolist() == expected
        assert np.isfinite(batch.rewards[index]).all() and np.isfinite(batch.actions[index]).all()


@any_obs
@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("num_steps", [1, 16, 60], ids=lambda steps: f"{steps}steps")
@pytest.mark.parametrize("resets", [False, True], ids=["", "resets"])
def test_sequences_of_random_episodes(
    observation_space: spaces.Space, n_envs: int, num_steps: int, resets: bool
) -> None:
    for seed in range(2):
        np.random.seed(seed)
        buffer = SequenceReplayBuffer(16 * n_envs, observation_space, ACTIONS, "cpu", n_envs)
        recorder = Recorder(buffer, observation_space, seed)
        for _ in range(num_steps):
            if resets and recorder.rng.random() < 0.15:
                recorder.reset_envs()
            recorder.step()
        newest = {env: recorder.current[env] for env in range(n_envs)}
        batch = buffer.sample_sequences(250 * n_envs, 5)
        check_sequences(batch, recorder, newest, 5)

        # all rows but the oldest of a full ring are drawn: its place holds the newest step's next observation
        starts = {tuple(identity) for identity in decode(batch.observations)[:, 0]}
        assert len(starts) == n_envs * min(num_steps, 15)


def test_a_ring_that_is_full_never_starts_after_the_newest_step() -> None:
    buffer = SequenceReplayBuffer(8, BOX, ACTIONS, "cpu")
    recorder = Recorder(buffer, BOX, seed=0, max_length=100)
    for num_steps in range(1, 30):
        recorder.step()
        rows = buffer._start_rows(300)
        assert set(rows) == (set(range(num_steps)) if num_steps < 8 else set(range(8)) - {buffer.pos})


def test_final_observations_do_not_accumulate() -> None:
    buffer = SequenceReplayBuffer(16, BOX, ACTIONS, "cpu", n_envs=2)
    recorder = Recorder(buffer, BOX, seed=0, max_length=3)
    for _ in range(200):
        recorder.step()
    assert set(buffer.final_observations) == {(int(row), int(env)) for row, env in np.argwhere(buffer.dones)}


def test_an_episode_broken_off_by_a_reset_ends_in_a_time_limit() -> None:
    buffer = SequenceReplayBuffer(10, BOX, ACTIONS, "cpu")
    recorder = Recorder(buffer, BOX, seed=0, max_length=100)
    recorder.lengths[:] = 100
    for _ in range(3):
        recorder.step()
    recorder.reset_envs()
    recorder.step()
    assert buffer.dones[:4, 0].tolist() == buffer.timeouts[:4, 0].tolist() == [False, False, True, False]
    batch = buffer._get_sequences(np.array([1]), np.array([0]), 4, None)
    assert decode(batch.observations)[0].tolist() == [[0, 0, 1], [0, 0, 2], [0, 0, 3], [0, 0, 3], [0, 0, 3]]
    assert batch.mask.tolist() == [[1, 1, 0, 0]] and batch.terminations.sum() == 0


def make_episodes(space: spaces.Space, lengths: list[int], terminated: list[bool]) -> dict[str, Any]:
    steps = [(0, episode, step) for episode, length in enumerate(lengths) for step in range(length)]
    ends = np.cumsum(lengths) - 1
    terminations, truncations = np.zeros(len(steps), bool), np.zeros(len(steps), bool)
    terminations[ends], truncations[ends] = terminated, ~np.array(terminated)
    return {
        "observations": encode(space, steps),
        "actions": np.array([(step / 1000, episode / 1000) for _, episode, step in steps], dtype=np.float32),
        "rewards": np.array([step + 100 * episode for _, episode, step in steps], dtype=np.float32),
        "terminations": terminations,
        "truncations": truncations,
        "final_observations": encode(space, [(0, episode, length) for episode, length in enumerate(lengths)]),
    }


@any_obs
@pytest.mark.parametrize("lengths", [[1], [4, 1, 7, 2], [12]])
def test_offline_episodes(observation_space: spaces.Space, lengths: list[int]) -> None:
    np.random.seed(0)
    terminated = [episode % 2 == 1 for episode in range(len(lengths))]
    arrays = make_episodes(observation_space, lengths, terminated)
    buffer = SequenceReplayBuffer.from_episodes(
        **arrays, observation_space=observation_space, action_space=ACTIONS, device="cpu"
    )
    recorder = Recorder(buffer, observation_space, seed=0)
    recorder.ends = {
        (0, episode): (length, "termination" if terminated[episode] else "limit")
        for episode, length in enumerate(lengths)
    }
    batch = buffer.sample_sequences(200, 4)
    check_sequences(batch, recorder, {}, 4)
    starts = {tuple(identity) for identity in decode(batch.observations)[:, 0]}
    assert len(starts) == buffer.size() == sum(lengths)  # every step of a closed buffer is a start


@any_obs
def test_offline_episodes_are_shared_not_copied(observation_space: spaces.Space) -> None:
    arrays = make_episodes(observation_space, [3, 5], [True, False])
    buffer = SequenceReplayBuffer.from_episodes(
        **arrays, observation_space=observation_space, action_space=ACTIONS, device="cpu"
    )
    assert np.shares_memory(buffer.actions, arrays["actions"]) and np.shares_memory(buffer.rewards, arrays["rewards"])
    if isinstance(observation_space, spaces.Dict):
        assert all(np.shares_memory(buffer.observations[key], arrays["observations"][key]) for key in "ab")
    else:
        assert np.shares_memory(buffer.observations, arrays["observations"])


@pytest.mark.parametrize("n_steps", [1, 3])
def test_sample_is_n_step_as_in_sb3(n_steps: int) -> None:
    """Every row of two rings that were fed the same, ours and SB3's own."""
    ours = SequenceReplayBuffer(16, BOX, ACTIONS, "cpu", n_steps=n_steps, gamma=0.9)
    theirs = NStepReplayBuffer(16, BOX, ACTIONS, "cpu", n_steps=n_steps, gamma=0.9)
    recorders = [Recorder(buffer, BOX, seed=1, max_length=6) for buffer in (ours, theirs)]
    for num_steps in range(1, 60):
        for recorder in recorders:
            recorder.step()
        rows = np.arange(num_steps) if num_steps < 16 else np.delete(np.arange(16), ours.pos)
        for name, mine, reference in zip(
            ours._get_samples(rows)._fields, ours._get_samples(rows), theirs._get_samples(rows), strict=True
        ):
            th.testing.assert_close(mine, reference, msg=f"{name} after {num_steps} steps")


def test_n_step_sample_by_hand() -> None:
    """Rewards 0, 1, 2 and a termination, then 100, 101 and a time limit, then 200 and no more; γ = 1/2."""
    buffer = SequenceReplayBuffer(10, BOX, ACTIONS, "cpu", n_steps=2, gamma=0.5)
    recorder = Recorder(buffer, BOX, seed=0)
    for length, limit in [(3, False), (2, True), (1, None)]:
        for step in range(length):
            done = step == length - 1 and limit is not None
            episode, info = recorder.current[0][1], [{"TimeLimit.truncated": done and bool(limit)}]
            obs, next_obs = (encode(BOX, [(0, episode, at)]) for at in (step, step + 1))
            reward = np.array([step + 100.0 * episode])
            buffer.add(obs, next_obs, np.zeros((1, 2)), reward, np.array([done]), info)
        recorder.current = [(0, episode + 1, 0)]
    samples = buffer._get_samples(np.arange(6))
    assert samples.rewards[:, 0].tolist() == [0.5, 2.0, 2.0, 150.5, 101.0, 200.0]
    assert samples.dones[:, 0].tolist() == [0, 1, 1, 0, 0, 0]
    assert samples.discounts[:, 0].tolist() == [0.25, 0.25, 0.5, 0.25, 0.5, 0.5]
    expected = [[0, 0, 2], [0, 0, 3], [0, 0, 3], [0, 1, 2], [0, 1, 2], [0, 2, 1]]
    assert decode(samples.next_observations).tolist() == expected


def test_dict_n_step_sample() -> None:
    np.random.seed(0)
    buffer = SequenceReplayBuffer(30, DICT, ACTIONS, "cpu", n_envs=3, n_steps=2)
    recorder = Recorder(buffer, DICT, seed=0, max_length=100)
    recorder.lengths[:] = 100
    for _ in range(5):
        recorder.step()
    samples = buffer.sample(50)
    before, after = decode(samples.observations), decode(samples.next_observations)
    assert (after[:, 2] == np.minimum(before[:, 2] + 2, 5)).all() and (after[:, :2] == before[:, :2]).all()


def test_vec_normalize_is_applied_once() -> None:
    venv = VecNormalize(DummyVecEnv([lambda: gym.make("Pendulum-v1")]), clip_obs=1e3, clip_reward=1e3)
    venv.obs_rms.mean, venv.obs_rms.var = np.array([0.0, 1.0, 2.0]), np.array([1.0, 4.0, 16.0])
    venv.ret_rms.var = np.array(25.0)
    buffer = SequenceReplayBuffer(10, BOX, ACTIONS, "cpu")
    recorder = Recorder(buffer, BOX, seed=0, max_length=2)  # each step is an episode: final observations too
    for _ in range(5):
        recorder.step()
    raw, normalized = (buffer._get_sequences(np.arange(5), np.zeros(5, int), 2, env) for env in (None, venv))
    expected = (raw.observations - th.tensor([0.0, 1.0, 2.0])) / th.tensor([1.0, 2.0, 4.0])
    th.testing.assert_close(normalized.observations, expected, rtol=1e-4, atol=1e-4)
    th.testing.assert_close(normalized.rewards, raw.rewards / 5, rtol=1e-4, atol=1e-4)
    assert raw.rewards.max() == 400


def test_empty_buffers_say_so() -> None:
    buffer = SequenceReplayBuffer(10, BOX, ACTIONS, "cpu")
    with pytest.raises(ValueError, match="replay buffer is empty"):
        buffer.sample_sequences(4, 2)
    recorder = Recorder(buffer, BOX, seed=0)
    recorder.step()
    buffer.reset()
    with pytest.raises(ValueError, match="replay buffer is empty"):
        buffer.sample(4)
    with pytest.raises(ValueError, match="label buffer is empty"):
        LabelBuffer(10).sample(4, "cpu")


@any_obs
@pytest.mark.parametrize("batches", [[3], [3, 4], [3, 4, 5], [10], [4, 10, 4], [25], [1] * 23])
def test_label_buffer_keeps_the_latest(observation_space: spaces.Space, batches: list[int]) -> None:
    np.random.seed(0)
    labels = LabelBuffer(10)
    count = 0
    for size in batches:
        numbers = np.arange(count, count + size)
        chunks = np.tile(numbers[:, None, None] / 1000, (1, 4, 2)).astype(np.float32)
        labels.add(encode(observation_space, [(0, 0, number) for number in numbers]), chunks)
        count += size
    assert len(labels) == min(count, 10)
    observations, chunks = labels.sample(400, "cpu")
    numbers = decode(observations)[:, 2]
    assert set(numbers) == set(range(max(0, count - 10), count))
    np.testing.assert_allclose(chunks, np.tile(numbers[:, None, None] / 1000, (1, 4, 2)), rtol=1e-6)
