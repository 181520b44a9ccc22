"""Sequence replay over rollouts and offline episodes, and the buffer of planner labels."""

from typing import Any, NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.common.vec_env import VecNormalize

Observations = np.ndarray | dict[str, np.ndarray]
ObsTensors = th.Tensor | dict[str, th.Tensor]


class SequenceBatch(NamedTuple):
    """Sequences of L steps; after an episode's end ``mask`` is 0 and the rest repeats its last observation."""

    observations: ObsTensors
    """``(B, L + 1, *obs_shape)``"""
    actions: th.Tensor
    """``(B, L, A)`` in [-1, 1]"""
    rewards: th.Tensor
    """``(B, L)``"""
    terminations: th.Tensor
    """``(B, L)``, 1 where the step terminated the episode; a time limit is not a termination"""
    mask: th.Tensor
    """``(B, L)``, 1 for steps of the episode"""


class Episodes(NamedTuple):
    """Episodes in a buffer that have ended; of what is left where an episode's beginning has been overwritten."""

    returns: np.ndarray
    """Undiscounted ``(E,)``"""
    lengths: np.ndarray
    """``(E,)``"""
    rows: np.ndarray
    """Of their first steps ``(E,)``"""
    envs: np.ndarray
    """``(E,)``"""


def map_obs(function: Any, *observations: Any) -> Any:
    """
    :param function: applied to arrays or tensors
    :param observations: arrays or tensors, or dictionaries of them with the same keys
    :return: ``function(*observations)``, for each key of dictionaries
    """
    if isinstance(observations[0], dict):
        return {key: function(*(obs[key] for obs in observations)) for key in observations[0]}
    return function(*observations)


class SequenceReplayBuffer(NStepReplayBuffer):
    """
    A replay buffer that samples sequences, holds each observation once, and takes Box and Dict observations.

    The next observation of a step is the following row; only the last one of an episode is kept aside. ``sample()``
    gives n-step transitions as in SB3's ``NStepReplayBuffer``, so that any SB3 algorithm can learn from it too.

    :param buffer_size: number of transitions, over all environments
    :param observation_space: observation space, a Dict of Box spaces too
    :param action_space: action space
    :param device: where samples go
    :param n_envs: number of parallel environments
    :param optimize_memory_usage: accepted for SB3's sake: next observations are never stored twice
    :param n_steps: rewards that ``sample()`` adds up
    :param gamma: discount factor of ``sample()``
    :param handle_timeout_termination: True, as everywhere here: a time limit is no termination
    :raises ValueError: if it is False
    """

    observations: Any
    obs_shape: Any
    # Without it, SB3's load_replay_buffer() takes a buffer for an old one and forgets its time limits
    handle_timeout_termination = True

    def __init__(
        self,
        buffer_size: int,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        device: th.device | str = "auto",
        n_envs: int = 1,
        optimize_memory_usage: bool = False,
        n_steps: int = 1,
        gamma: float = 0.99,
        handle_timeout_termination: bool = True,
    ):
        if not handle_timeout_termination:
            raise ValueError(
                "handle_timeout_termination=False would take time limits for terminations, which sequences keep apart: "
                "leave it out, or let the environment terminate where its time limit is a part of the task."
            )
        super(ReplayBuffer, self).__init__(buffer_size, observation_space, action_space, device, n_envs=n_envs)
        self.buffer_size = max(buffer_size // n_envs, 2)
        self.optimize_memory_usage = optimize_memory_usage
        self.n_steps = n_steps
        self.gamma = gamma
        shape = (self.buffer_size, n_envs)
        self.observations = self._zeros_like_obs(shape)
        self.actions = np.zeros((*shape, self.action_dim), dtype=np.float32)
        self.rewards = np.zeros(shape, dtype=np.float32)
        self.dones = np.zeros(shape, dtype=bool)
        self.timeouts = np.zeros(shape, dtype=bool)
        self.final_observations: dict[tuple[int, int], Any] = {}
        self._episodes: Episodes | None = None  # those found last, until another one ends
        self.closed = False  # closed buffers hold whole episodes and take no more steps

    def _zeros_like_obs(self, shape: tuple[int, ...]) -> Observations:
        if isinstance(self.observation_space, spaces.Dict):
            return {
                key: np.zeros((*shape, *self.obs_shape[key]), dtype=self._maybe_cast_dtype(space.dtype))
                for key, space in self.observation_space.spaces.items()
            }
        return np.zeros((*shape, *self.obs_shape), dtype=self._maybe_cast_dtype(self.observation_space.dtype))

    @classmethod
    def from_episodes(
        cls,
        observations: Observations,
        actions: np.ndarray,
        rewards: np.ndarray,
        terminations: np.ndarray,
        truncations: np.ndarray,
        final_observations: Observations,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        device: th.device | str = "auto",
    ) -> "SequenceReplayBuffer":
        """
        A full buffer that shares the arrays of offline episodes instead of copying them.

        :param observations: ``(N, *obs_shape)``, episodes one after another
        :param actions: ``(N, A)`` in [-1, 1]
        :param rewards: ``(N,)``
        :param terminations: ``(N,)``, set at the last step of an episode that terminated
        :param truncations: ``(N,)``, set at the last step of every other episode
        :param final_observations: the observation after each episode's last step ``(E, *obs_shape)``
        :param observation_space: observation space
        :param action_space: action space
        :param device: where samples go
        :return: the buffer
        """
        buffer = cls(2, observation_space, action_space, device)
        buffer.buffer_size = len(rewards)
        buffer.observations = map_obs(
            lambda obs, empty: obs.reshape(-1, *empty.shape[1:]), observations, buffer.observations
        )
        buffer.actions, buffer.rewards = actions[:, None], rewards[:, None]
        buffer.dones, buffer.timeouts = (terminations | truncations)[:, None], truncations[:, None]
        for episode, row in enumerate(np.flatnonzero(buffer.dones)):
            buffer.final_observations[int(row), 0] = map_obs(lambda obs, e=episode: obs[e], final_observations)
        buffer.full = buffer.closed = True
        return buffer

    def add(
        self,
        obs: Any,
        next_obs: Any,
        action: np.ndarray,
        reward: np.ndarray,
        done: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        """Store one step of every environment; see :meth:`ReplayBuffer.add`."""
        self._end_broken_episodes(obs)
        row, next_row = self.pos, (self.pos + 1) % self.buffer_size
        timeouts = np.array([info.get("TimeLimit.truncated", False) for info in infos])
        self._set_row(row, obs)
        self._set_row(next_row, next_obs)
        self.actions[row] = action.reshape(self.n_envs, self.action_dim)
        self.rewards[row] = reward
        self.dones[row], self.timeouts[row] = done, timeouts
        if done.any():
            self._episodes = None
        for env in range(self.n_envs):
            self.final_observations.pop((row, env), None)
            if done[env]:
                self.final_observations[row, env] = self._obs_at(next_row, env)
        self.pos = next_row
        self.full = self.full or next_row == 0

    def _set_row(self, row: int, obs: Any) -> None:
        def assign(stored: np.ndarray, new: np.ndarray) -> None:
            stored[row] = np.asarray(new).reshape(stored.shape[1:])

        map_obs(assign, self.observations, obs)

    def _obs_at(self, row: int, env: int) -> Any:
        return map_obs(lambda stored: stored[row, env].copy(), self.observations)

    def _end_broken_episodes(self, obs: Any) -> None:
        """Truncate episodes that this step does not continue: the environments were reset or replaced in between."""
        if self.size() == 0:
            return
        last_row = (self.pos - 1) % self.buffer_size

        def differs(stored: np.ndarray, new: np.ndarray) -> np.ndarray:
            expected = stored[self.pos].reshape(self.n_envs, -1)
            given = np.asarray(new, dtype=stored.dtype).reshape(self.n_envs, -1)
            return (expected != given).any(-1)

        broken = map_obs(differs, self.observations, obs)
        if isinstance(broken, dict):
            broken = np.any(list(broken.values()), axis=0)
        for env in map(int, np.flatnonzero(broken)):
            if (last_row, env) not in self.final_observations:
                self.final_observations[last_row, env] = self._obs_at(self.pos, env)
                self.dones[last_row, env] = self.timeouts[last_row, env] = True
                self._episodes = None

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.final_observations, self._episodes = {}, None

    def _start_rows(self, batch_size: int) -> np.ndarray:
        if self.size() == 0:
            raise ValueError("The replay buffer is empty: nothing can be sampled before the first step.")
        if self.full and not self.closed:
            # The row after the newest step holds that step's next observation, not an observation of its own
            return (np.random.randint(1, self.buffer_size, size=batch_size) + self.pos) % self.buffer_size
        return np.random.randint(0, self.size(), size=batch_size)

    def episodes(self) -> Episodes:
        """
        :return: the episodes that have ended
        """
        if self._episodes is None:
            self._episodes = self._find_episodes()
        return self._episodes

    def _find_episodes(self) -> Episodes:
        oldest = self.pos + 1 if self.full and not self.closed else 0  # the row between holds only an observation
        rows = np.arange(oldest, oldest + self.size() - (oldest > 0)) % self.buffer_size
        found = [Episodes(np.zeros(0), *np.zeros((3, 0), int))]
        for env in range(self.n_envs):
            ends = np.flatnonzero(self.dones[rows, env]) + 1
            if len(ends) > 0:
                starts = np.concatenate([[0], ends[:-1]])
                returns = np.add.reduceat(self.rewards[rows[: ends[-1]], env], starts, dtype=np.float64)
                found.append(Episodes(returns, ends - starts, rows[starts], np.full(len(ends), env)))
        return Episodes(*map(np.concatenate, zip(*found, strict=True)))

    def sample_episodes(
        self, weights: np.ndarray, batch_size: int, length: int, env: VecNormalize | None = None
    ) -> SequenceBatch:
        """
        Sequences from some episodes more often than from others.

        :param weights: how often a step of each of :meth:`episodes` is drawn, beside each other ``(E,)``
        :param batch_size: number of sequences B
        :param length: number of steps L
        :param env: normalises observations and rewards with its statistics
        :return: the batch
        """
        episodes = self.episodes()
        shares = episodes.lengths * weights
        drawn = np.random.choice(len(shares), batch_size, p=shares / shares.sum())
        rows = (episodes.rows[drawn] + np.random.randint(episodes.lengths[drawn])) % self.buffer_size
        if self.full and not self.closed:  # newer steps may have overwritten some: they are as good
            rows[rows == self.pos] = (self.pos + 1) % self.buffer_size
        return self._get_sequences(rows, episodes.envs[drawn], length, env)

    def sample_sequences(self, batch_size: int, length: int, env: VecNormalize | None = None) -> SequenceBatch:
        """
        Sequences from uniformly drawn starts; none crosses an episode's end.

        :param batch_size: number of sequences B
        :param length: number of steps L
        :param env: normalises observations and rewards with its statistics
        :return: the batch
        """
        starts = self._start_rows(batch_size)
        return self._get_sequences(starts, self._any_env(starts), length, env)

    def _any_env(self, starts: np.ndarray) -> np.ndarray:
        return np.random.randint(0, self.n_envs, size=starts.shape)

    def _get_sequences(
        self, starts: np.ndarray, envs: np.ndarray, length: int, env: VecNormalize | None
    ) -> SequenceBatch:
        rows = (starts[:, None] + np.arange(length)) % self.buffer_size  # (B, L)
        columns = envs[:, None]
        ends = self.dones[rows, columns] | (rows == (self.pos - 1) % self.buffer_size)
        mask = np.ones(rows.shape, dtype=bool)
        mask[:, 1:] = ~np.logical_or.accumulate(ends[:, :-1], axis=1)
        last = mask.sum(1) - 1  # (B,) the last step of the episode in each sequence

        # after the end every row repeats the episode's last step, so that padding stays finite and plausible
        steps = np.minimum(np.arange(length), last[:, None])
        rows = np.take_along_axis(rows, steps, axis=1)
        next_rows = np.minimum(np.arange(length + 1), last[:, None] + 1) + starts[:, None]
        observations = map_obs(lambda obs: obs[next_rows % self.buffer_size, columns], self.observations)
        last_rows = rows[:, -1]
        for index in map(int, np.flatnonzero(self.dones[last_rows, envs])):
            final = self.final_observations[int(last_rows[index]), int(envs[index])]
            tail = last[index] + 1

            def fill(obs: np.ndarray, final_obs: np.ndarray, index: int = index, tail: int = tail) -> None:
                obs[index, tail:] = final_obs

            map_obs(fill, observations, final)
        terminations = self.dones[rows, columns] & ~self.timeouts[rows, columns] & mask
        rewards = self._normalize_reward(self.rewards[rows, columns], env)
        return SequenceBatch(
            map_obs(self.to_torch, self._normalize_obs(observations, env)),
            self.to_torch(self.actions[rows, columns]),
            self.to_torch(rewards),
            self.to_torch(terminations.astype(np.float32)),
            self.to_torch(mask.astype(np.float32)),
        )

    def sample(self, batch_size: int, env: VecNormalize | None = None) -> ReplayBufferSamples:
        """
        n-step transitions for SB3's own algorithms; see :meth:`NStepReplayBuffer.sample`.

        :param batch_size: number of transitions
        :param env: normalises observations and rewards with its statistics
        :return: the transitions
        """
        return self._get_samples(self._start_rows(batch_size), env)

    def _get_samples(self, batch_inds: np.ndarray, env: VecNormalize | None = None) -> ReplayBufferSamples:
        batch = self._get_sequences(batch_inds, self._any_env(batch_inds), self.n_steps, env)
        discounts = self.gamma ** th.arange(self.n_steps, device=self.device)
        return ReplayBufferSamples(
            observations=map_obs(lambda obs: obs[:, 0], batch.observations),
            actions=batch.actions[:, 0],
            next_observations=map_obs(lambda obs: obs[:, -1], batch.observations),
            dones=batch.terminations.amax(1, keepdim=True),
            rewards=(batch.rewards * batch.mask * discounts).sum(1, keepdim=True),
            discounts=self.gamma ** batch.mask.sum(1, keepdim=True),
        )


class LabelBuffer:
    """
    The latest planner labels: observations and the action chunks that the planner found for them.

    :param buffer_size: number of labels kept
    """

    def __init__(self, buffer_size: int):
        self.buffer_size = buffer_size
        self.pos = 0
        self.full = False
        self.observations: Any = None
        self.chunks: np.ndarray | None = None

    def __len__(self) -> int:
        return self.buffer_size if self.full else self.pos

    def add(self, observations: Observations, chunks: np.ndarray) -> None:
        """
        :param observations: as the policy takes them ``(B, *obs_shape)``
        :param chunks: in [-1, 1], ``(B, T, A)``
        """
        if self.chunks is None:
            self.observations = map_obs(
                lambda obs: np.zeros((self.buffer_size, *obs.shape[1:]), obs.dtype), observations
            )
            self.chunks = np.zeros((self.buffer_size, *chunks.shape[1:]), np.float32)
        rows = (self.pos + np.arange(len(chunks))) % self.buffer_size

        def assign(stored: np.ndarray, new: np.ndarray) -> None:
            stored[rows] = new

        map_obs(assign, self.observations, observations)
        self.chunks[rows] = chunks
        self.full = self.full or self.pos + len(chunks) >= self.buffer_size
        self.pos = (self.pos + len(chunks)) % self.buffer_size

    def sample(self, batch_size: int, device: th.device | str) -> tuple[ObsTensors, th.Tensor]:
        """
        :param batch_size: number of labels
        :param device: where they go
        :return: observations ``(B, *obs_shape)`` and chunks ``(B, T, A)``
        """
        if self.chunks is None:
            raise ValueError("The label buffer is empty: relabel before sampling.")
        rows = np.random.randint(0, len(self), size=batch_size)
        observations = map_obs(lambda obs: th.as_tensor(obs[rows], device=device), self.observations)
        return observations, th.as_tensor(self.chunks[rows], device=device)
