"""SB3's replay buffers become episodes: the same transitions that the environment gave, in the order of time."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from episodes import in_one_sentence
from gymnasium import spaces
from stable_baselines3 import DQN, SAC
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from modip_sb3.buffers import SequenceReplayBuffer
from modip_sb3.datasets import OfflineDataset

Episode = list[dict[str, Any]]


class Drift(gym.Env):
    """A point that drifts with the action, and keeps a record of its own of every step."""

    observation_space: spaces.Space = spaces.Box(-100.0, 100.0, (2,))
    action_space = spaces.Box(np.array([[-3.0], [1.0]]), np.array([[1.0], [2.0]]), dtype=np.float32)  # one of (2, 1)

    def __init__(self, terminates_after: int, truncates_after: int, dict_obs: bool = False) -> None:
        self.limits, self.dict_obs, self.episodes = (terminates_after, truncates_after), dict_obs, list[Episode]()
        if dict_obs:
            self.observation_space = spaces.Dict({"a": spaces.Box(-100.0, 100.0, (1,)), "b": Drift.observation_space})

    def _obs(self) -> Any:
        return {"a": self.point[:1], "b": self.point + 1} if self.dict_obs else self.point

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self.point = self.np_random.normal(size=2).astype(np.float32)
        self.episodes.append([])
        return self._obs(), {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict]:
        before, self.point = self._obs(), self.point + action[:, 0] / 10
        episode = self.episodes[-1]
        terminated = len(episode) + 1 == self.limits[0] + len(self.episodes) % 2
        truncated = not terminated and len(episode) + 1 == self.limits[1]
        reward = float(np.float32(self.point.sum()))
        episode.append(dict(obs=before, action=action.copy(), reward=reward, next=self._obs(), terminated=terminated))
        return self._obs(), reward, terminated, truncated, {}


def collect(
    steps: int, n_envs: int = 1, dict_obs: bool = False, normalize: bool = False, **kwargs: Any
) -> tuple[SAC, list[Drift]]:
    """A real run of SAC on environments where episodes of five or six steps terminate, and are cut off at five."""
    envs = [Drift(5 + index, 5, dict_obs) for index in range(n_envs)]
    vec_env: Any = DummyVecEnv([lambda env=env: env for env in envs])
    model = SAC(
        "MultiInputPolicy" if dict_obs else "MlpPolicy",
        VecNormalize(vec_env) if normalize else vec_env,
        learning_starts=4,
        batch_size=4,
        policy_kwargs={"net_arch": [4]},
        seed=0,
        **{"buffer_size": 1000, **kwargs},
    )
    return model.learn(steps), envs


def column(values: list[Any]) -> Any:
    return {key: np.array([v[key] for v in values]) for key in values[0]} if isinstance(values[0], dict) else values


def assert_recorded(dataset: OfflineDataset, envs: list[Drift], kept: int | None = None) -> None:
    """The dataset holds the last ``kept`` steps of each environment's record."""
    episodes: list[Episode] = []
    for env in envs:
        total = sum(map(len, env.episodes))
        skip = total - (total if kept is None else kept)
        for episode in env.episodes:
            if episode[skip:]:
                episodes.append(episode[skip:])
            skip = max(skip - len(episode), 0)
    assert dataset.episode_lengths.tolist() == [len(episode) for episode in episodes]
    steps = [step for episode in episodes for step in episode]
    for found, wanted in (
        (dataset.observations, [step["obs"] for step in steps]),
        (dataset.final_observations, [episode[-1]["next"] for episode in episodes]),
    ):
        for key in found if isinstance(found, dict) else [...]:
            rows = column(wanted)[key] if key is not ... else wanted
            np.testing.assert_allclose(found[key], rows, rtol=1e-5)  # SB3 unnormalises an episode's last one
    np.testing.assert_allclose(dataset.actions, [step["action"] for step in steps], atol=1e-6)
    np.testing.assert_array_equal(dataset.rewards, np.array([step["reward"] for step in steps], np.float32))
    assert dataset.terminations.tolist() == [step["terminated"] for step in steps]
    dataset.check(envs[0].observation_space, envs[0].action_space, min_length=2)


@pytest.mark.parametrize("block", [7, 1000])
@pytest.mark.parametrize("dict_obs", [False, True])
@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize(("buffer_size", "kept"), [(1000, None), (60, 20)])
def test_a_real_run(
    n_envs: int, dict_obs: bool, buffer_size: int, kept: int | None, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modip_sb3.datasets.columns.BLOCK", block)
    model, envs = collect(33 * n_envs, n_envs, dict_obs, buffer_size=buffer_size if n_envs == 3 else buffer_size // 3)
    dataset = OfflineDataset.load(model.replay_buffer)
    assert_recorded(dataset, envs, kept)
    assert dataset.terminations.any() and dataset.truncations.any() and dataset.source == "replay buffer"


def test_resets_between_two_runs_and_normalised_rewards() -> None:
    model, envs = collect(13, normalize=True)
    model.learn(9)  # resets the environment in the middle of an episode
    assert_recorded(OfflineDataset.load(model.replay_buffer), envs)


@pytest.mark.parametrize(("buffer_size", "kept"), [(1000, 22), (12, 11), (11, 10)])
def test_memory_optimised_buffer_does_not_know_time_limits(buffer_size: int, kept: int) -> None:
    options = {"optimize_memory_usage": True, "replay_buffer_kwargs": {"handle_timeout_termination": False}}
    model, (env,) = collect(22, buffer_size=buffer_size, **options)
    with pytest.warns(UserWarning, match="every episode's end counts as a termination"):
        dataset = OfflineDataset.load(model.replay_buffer)
    for episode in env.episodes[:-1]:
        episode[-1] |= {"terminated": True, "next": episode[-1]["obs"]}  # SB3 keeps no more of it
    assert_recorded(dataset, [env], kept)


@pytest.mark.parametrize(("buffer_size", "kept"), [(1000, None), (60, 19)])
def test_our_own_buffer(buffer_size: int, kept: int | None) -> None:
    model, envs = collect(99, n_envs=3, replay_buffer_class=SequenceReplayBuffer, buffer_size=buffer_size)
    assert_recorded(OfflineDataset.load(model.replay_buffer), envs, kept)


def test_our_own_buffer_of_offline_episodes() -> None:
    model, envs = collect(30)
    dataset = OfflineDataset.load(model.replay_buffer)
    scaled = model.policy.scale_action(dataset.actions).reshape(30, 2)
    columns = (dataset.rewards, dataset.terminations, dataset.truncations, dataset.final_observations)
    spaces_ = (model.observation_space, model.action_space)
    closed = SequenceReplayBuffer.from_episodes(dataset.observations, scaled, *columns, *spaces_)
    assert_recorded(OfflineDataset.load(closed), envs)


def fill_dqn() -> ReplayBuffer:
    model = DQN("MlpPolicy", "CartPole-v1", learning_starts=10, buffer_size=20, policy_kwargs={"net_arch": [4]})
    assert (buffer := model.learn(5).replay_buffer) is not None
    return buffer


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda: ReplayBuffer(10, Drift.observation_space, Drift.action_space), ["no transitions", "collect some"]),
        (fill_dqn, ["holds actions of Discrete(2), expected those of a bounded Box"]),
    ],
)
def test_buffers_that_cannot_be_read(make: Callable[[], ReplayBuffer], parts: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        OfflineDataset.load(make())
    in_one_sentence(error, "Offline dataset replay buffer: ", *parts)


def test_a_saved_buffer_is_not_unpickled_but_loaded_by_sb3(tmp_path: Path) -> None:
    model, envs = collect(12)
    model.save_replay_buffer(tmp_path / "buffer")
    with pytest.raises(ValueError) as error:
        OfflineDataset.load(tmp_path / "buffer.pkl")
    in_one_sentence(error, "buffer.pkl: a pickle", "model.load_replay_buffer", "model.replay_buffer")
    other, _ = collect(4)
    other.load_replay_buffer(tmp_path / "buffer.pkl", truncate_last_traj=False)
    assert_recorded(OfflineDataset.load(other.replay_buffer), envs)
