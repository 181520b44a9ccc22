"""What every policy here has in common: observations to features, and acting with a state that ``predict`` carries."""

from abc import abstractmethod
from typing import Any, Literal

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, CombinedExtractor, FlattenExtractor
from stable_baselines3.common.type_aliases import PyTorchObs

from modip_sb3.checks import check_observation_space
from modip_sb3.networks import RunningNormalizer
from modip_sb3.planner import Plan
from modip_sb3.world_model import WorldModel

ActingMode = Literal["policy", "planner"]
ChunkState = tuple[np.ndarray, np.ndarray]


def num_observations(obs: PyTorchObs) -> int:
    """
    :param obs: observations ``(B, *obs_shape)``, or a dictionary of them
    :return: B
    """
    return len(next(iter(obs.values())) if isinstance(obs, dict) else obs)


class ActingPolicy(BasePolicy):
    """
    What acts by chunks or plans, carrying a state (the rest of a chunk, the last plan) from step to step.

    :param observation_space: observation space, a Box or a Dict of Box spaces
    :param action_space: action space, a bounded Box
    :param features_extractor_class: features extractor
    :param kwargs: keyword arguments of :class:`BasePolicy`
    """

    action_space: spaces.Box
    normalizer: RunningNormalizer
    normalizes_features: bool
    """Whether observation features are standardised by ``normalizer``."""
    action_horizon: int
    """Actions in a chunk."""
    horizon: int
    """Environment steps that a plan looks ahead."""
    inference: ActingMode

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        features_extractor_class: type[BaseFeaturesExtractor] | None,
        *args: Any,
        **kwargs: Any,
    ):
        check_observation_space(observation_space)
        if features_extractor_class is None:
            is_dict = isinstance(observation_space, spaces.Dict)
            features_extractor_class = CombinedExtractor if is_dict else FlattenExtractor
        super().__init__(observation_space, action_space, features_extractor_class, *args, squash_output=True, **kwargs)
        self.action_dim = get_action_dim(action_space)

    @property
    def acting_mode(self) -> ActingMode:
        """Who acts in ``predict()``."""
        return self.inference

    @abstractmethod
    def act(
        self, obs: PyTorchObs, state: ChunkState, mode: ActingMode, deterministic: bool
    ) -> tuple[np.ndarray, ChunkState, Plan | None]:
        """
        One action for each environment.

        :param obs: observations ``(B, *obs_shape)``
        :param state: chunks or plans ``(B, T, A)`` and how many of their actions were executed ``(B,)``, negative for
            none
        :param mode: who acts
        :param deterministic: the same output for the same input
        :return: actions in [-1, 1] ``(B, A)``, the next state, and the plans of the environments whose position is 1 in
            it, None if no plan was made
        """

    def features(self, obs: PyTorchObs) -> th.Tensor:
        """
        :param obs: observations ``(N, *obs_shape)``
        :return: features, normalised if the policy does so ``(N, F)``
        """
        features = self.extract_features(obs, self.features_extractor)
        return self.normalizer(features) if self.normalizes_features else features

    def chunk_length(self, mode: ActingMode) -> int:
        """
        :param mode: who acts
        :return: T, the actions that its state holds
        """
        return self.horizon if mode == "planner" else self.action_horizon

    def initial_state(self, n_envs: int, *modes: ActingMode) -> ChunkState:
        """
        :param n_envs: number of environments
        :param modes: who may act
        :return: the state before an episode's first action
        """
        length = max(map(self.chunk_length, modes))
        return np.zeros((n_envs, length, self.action_dim), np.float32), np.full(n_envs, -1)

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """
        The next action; see :meth:`BasePolicy.predict`.

        :param observation: of one environment or of several
        :param state: what the last call returned; None predicts a new chunk
        :param episode_start: where an episode begins, what is left of a chunk is dropped
        :param deterministic: the same output for the same input
        :return: actions in the environment's units, and the state to pass to the next call
        """
        if isinstance(observation, tuple):
            raise ValueError(
                f"The observation is a tuple of {len(observation)}, expected an array or a dictionary of them: of what "
                "Gymnasium's reset() and step() return, pass the first element."
            )
        self.set_training_mode(False)
        obs, vectorized = self.obs_to_tensor(observation)
        n_envs = num_observations(obs)
        mode = self.acting_mode
        if state is None or state[0].shape[1] != self.chunk_length(mode):  # or somebody else has acted
            chunk_state = self.initial_state(n_envs, mode)
        else:
            chunk_state = state[0], state[1].copy()
            if episode_start is not None:
                chunk_state[1][np.asarray(episode_start, dtype=bool)] = -1
        actions, next_state, _ = self.act(obs, chunk_state, mode, deterministic)
        env_actions = self.unscale_action(actions.reshape(-1, *self.action_space.shape))
        return (env_actions if vectorized else env_actions.squeeze(axis=0)), next_state

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        """The first action of a new chunk or plan, in [-1, 1] ``(B, *action_shape)``."""
        n_envs, mode = num_observations(observation), self.acting_mode
        actions, _, _ = self.act(observation, self.initial_state(n_envs, mode), mode, deterministic)
        return th.as_tensor(actions, device=self.device).view(n_envs, *self.action_space.shape)


class PlanningPolicy(ActingPolicy):
    """An :class:`ActingPolicy` with a world model to plan in."""

    world_model: WorldModel
    planner_kwargs: dict[str, Any]

    def encode(self, obs: PyTorchObs) -> th.Tensor:
        """
        :param obs: observations ``(N, *obs_shape)``
        :return: latents ``(N, Z)``
        """
        return self.world_model.encode(self.features(obs))
