"""Offline data beside an algorithm's own experience: loaded once, checked, scaled, and drawn from by weight."""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces

from modip_sb3.buffers import Observations, SequenceReplayBuffer, map_obs
from modip_sb3.checks import check_count, check_keywords, check_kinds_of_space, check_off_policy
from modip_sb3.datasets import DatasetSources, OfflineDataset, fingerprint, holds_no_data, load_sources
from modip_sb3.faults import FaultTolerantAlgorithm
from modip_sb3.resume import ResumableAlgorithm
from modip_sb3.weights import SafeWeights


def discounted_sums(dataset: OfflineDataset, gamma: float) -> np.ndarray:
    """
    :param dataset: transitions
    :param gamma: discount factor
    :return: the running sums of rewards by whose variance VecNormalize scales them ``(N,)``
    """
    sums, ended = np.zeros(dataset.num_transitions), dataset.terminations | dataset.truncations
    running = 0.0
    for step, reward in enumerate(dataset.rewards):
        running = gamma * running + float(reward)
        sums[step] = running
        running *= not ended[step]
    return sums


def obs_blocks(datasets: Sequence[OfflineDataset]) -> Iterator[Any]:
    """
    :param datasets: transitions
    :return: all observations, some thousand at a time: statistics of the whole would need as much memory again
    """
    for dataset in datasets:
        for start in range(0, dataset.num_transitions, 10_000):
            yield map_obs(lambda array, s=start: array[s : s + 10_000].copy(), dataset.observations)


def measure_blur(datasets: Sequence[OfflineDataset], features: Callable[[Observations], th.Tensor]) -> float:
    """
    How much noise on a policy's condition the data leaves room for: a seventh of the distance from a state to the
    nearest one of another episode, the root mean square over the features, in their standard deviations, and the median
    over some hundred states. At most 0.1: so much do clones of eight demonstrations need.

    :param datasets: transitions
    :param features: of observations ``(B, F)``
    :return: standard deviation of the noise, in those of the features
    """
    ends = np.concatenate([dataset.terminations | dataset.truncations for dataset in datasets])
    episodes, stride = np.cumsum(ends) - ends, max(len(ends) // 300, 1)  # of each step

    def blocks() -> Iterator[tuple[th.Tensor, th.Tensor]]:
        start = 0
        for obs in obs_blocks(datasets):
            block = features(obs)
            yield block, th.as_tensor(episodes[start : start + len(block)], device=block.device)
            start += len(block)

    some, episode = map(th.cat, zip(*((b[::stride].clone(), e[::stride]) for b, e in blocks()), strict=True))
    scale = some.std(dim=0, correction=0).clamp(min=1e-6) * math.sqrt(some.shape[1])
    nearest = th.full((len(some),), math.inf, device=some.device)
    for block, block_episode in blocks():
        distances = th.cdist(some / scale, block / scale).masked_fill(episode[:, None] == block_episode, math.inf)
        nearest = th.minimum(nearest, distances.amin(dim=1))
    return min(nearest.median().item() / 7, 0.1)


class OfflineDataAlgorithm(SafeWeights, FaultTolerantAlgorithm, ResumableAlgorithm):
    """
    An off-policy algorithm with replay buffers of offline data beside its own: one for each source, closed, and never
    saved with the model. A subclass sets ``offline_dataset`` in its constructor.
    """

    action_space: spaces.Box
    offline_dataset: DatasetSources | None
    _had_offline_data = False

    def __init__(self, *args: Any, **kwargs: Any):
        check_keywords("policy_kwargs", kwargs.get("policy_kwargs"))
        check_count(0, verbose=kwargs.get("verbose", 0))
        env = args[1] if len(args) > 1 else kwargs.get("env")
        if isinstance(env, gym.Env):  # before SB3 wraps it
            check_kinds_of_space(env.observation_space)
        super().__init__(*args, **kwargs)
        check_off_policy(self)

    def _setup_model(self) -> None:
        super()._setup_model()
        self._offline_buffers: list[SequenceReplayBuffer] = []  # one for each source

    def _excluded_save_params(self) -> list[str]:
        excluded = ["_offline_buffers", "_offline_shares", "_offline_fingerprint"]
        if not holds_no_data(self.offline_dataset):
            excluded.append("offline_dataset")  # arrays do not belong in a model file; paths, ids and weights do
        return super()._excluded_save_params() + excluded

    def _fill_offline_buffers(self, min_length: int) -> Sequence[OfflineDataset]:
        """
        Load and check the offline data, and scale its actions, once.

        :param min_length: number of steps that at least one episode must have
        :return: what was loaded, nothing if there is no data or it is loaded already
        """
        if self.offline_dataset is None and self._had_offline_data:
            warnings.warn(
                "This model learned from arrays, which its file does not hold: it goes on with online data alone. "
                "Pass offline_dataset to load() to go on with both.",
                stacklevel=4,  # whoever called learn()
            )
        if self.offline_dataset is None or self._offline_buffers:
            return ()
        sources = load_sources(self.offline_dataset)
        self._offline_fingerprint = fingerprint(sources)
        datasets, weights = zip(*sources, strict=True)
        for dataset in datasets:
            dataset.check(self.observation_space, self.action_space, min_length)
        self._offline_buffers = [self._buffer_of(dataset) for dataset in datasets]
        self._offline_shares = np.array(weights) / sum(weights)
        self._had_offline_data = True
        return datasets

    def _restore_offline_data(self, offline_dataset: DatasetSources | None) -> None:
        self._offline_buffers = []
        self.offline_dataset = getattr(self, "offline_dataset", None) if offline_dataset is None else offline_dataset
        if not self._had_offline_data:
            return
        if self.offline_dataset is None:
            raise ValueError(
                "The training that was interrupted learns from arrays, which its checkpoint does not hold: pass the "
                "same data as offline_dataset to resume()."
            )
        expected = self._offline_fingerprint
        self._fill_offline_buffers(min_length=1)
        if self._offline_fingerprint != expected:
            raise ValueError(
                f"The offline data has changed since the checkpoint was written (SHA-256 {self._offline_fingerprint}, "
                f"expected {expected}): give resume() the same data, in the same order and with the same weights."
            )

    def _buffer_of(self, dataset: OfflineDataset) -> SequenceReplayBuffer:
        actions = np.empty((dataset.num_transitions, math.prod(self.action_space.shape)), np.float32)
        for start in range(0, len(actions), 10_000):
            block = self.policy.scale_action(dataset.actions[start : start + 10_000])
            actions[start : start + 10_000] = block.reshape(len(block), -1)
        return SequenceReplayBuffer.from_episodes(
            dataset.observations,
            actions,
            dataset.rewards,
            dataset.terminations,
            dataset.truncations,
            dataset.final_observations,
            self.observation_space,
            self.action_space,
            self.device,
        )

    def _normalize_obs(self, obs: Any) -> Any:
        return obs if self._vec_normalize_env is None else self._vec_normalize_env.normalize_obs(obs)

    def _fit_vec_normalize(self, datasets: Sequence[OfflineDataset]) -> None:
        """The statistics of ``VecNormalize``, while it gathers them, see the offline data too."""
        vec_normalize = self._vec_normalize_env
        if vec_normalize is not None and vec_normalize.norm_obs and vec_normalize.training:
            statistics: Any = vec_normalize.obs_rms  # one for each normalised key of Dict observations
            for obs in obs_blocks(datasets):
                if isinstance(obs, dict):
                    for key in vec_normalize.norm_obs_keys or []:
                        statistics[key].update(obs[key])
                else:
                    statistics.update(obs)
        if vec_normalize is not None and vec_normalize.norm_reward and vec_normalize.training:
            for dataset in datasets:
                vec_normalize.ret_rms.update(discounted_sums(dataset, vec_normalize.gamma))

    def _offline_counts(self, batch_size: int) -> Iterator[tuple[SequenceReplayBuffer, int]]:
        """Of each source as many as its share says, on average; those of which there are none are left out."""
        counts = np.random.multinomial(batch_size, self._offline_shares)
        return ((buffer, int(n)) for buffer, n in zip(self._offline_buffers, counts, strict=True) if n > 0)
