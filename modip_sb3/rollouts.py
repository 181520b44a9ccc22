"""Acting in ``learn()``: by chunks, by plans, or by whichever of the two turns out better, in each environment."""

from abc import abstractmethod
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.type_aliases import PyTorchObs
from stable_baselines3.common.utils import obs_as_tensor

from modip_sb3.acting import ActingMode, ActingPolicy, ChunkState
from modip_sb3.buffers import map_obs
from modip_sb3.checks import check_choice
from modip_sb3.faults import check_actions
from modip_sb3.offline import OfflineDataAlgorithm
from modip_sb3.planner import Plan, PlanTracker
from modip_sb3.trial import MODES, Trial


class ActingAlgorithm(OfflineDataAlgorithm):
    """
    An algorithm whose policy carries a state (the rest of a chunk, the last plan) from step to step.

    :param args: arguments of :class:`OffPolicyAlgorithm`
    :param rollout_with: what collects experience in ``learn()``, one of ``rollout_choices``: "planner", "policy", or
        "auto" for whichever has the better episodes
    :param inference: what ``predict()`` uses, "policy" or "planner"
    :param kwargs: keyword arguments of :class:`OffPolicyAlgorithm`
    """

    policy: ActingPolicy
    rollout_choices: tuple[str, ...] = ("policy", "planner")

    def __init__(self, *args: Any, rollout_with: Any, inference: ActingMode, **kwargs: Any):
        super().__init__(*args, **kwargs)
        check_choice("rollout_with", rollout_with, *self.rollout_choices)
        check_choice("inference", inference, "policy", "planner")
        self.rollout_with = rollout_with
        self.inference = inference
        self._trial = Trial()

    @property
    @abstractmethod
    def _knows_something(self) -> bool:
        """Whether the policy has learned from data: it acts from the first step, and its normaliser stays."""

    @property
    def _on_trial(self) -> bool:
        """Whether planner and policy take turns: before it has learned from data, a policy alone shows nothing."""
        return self.rollout_with == "auto" and self._knows_something

    def _setup_model(self) -> None:
        super()._setup_model()
        self._chunk_state: ChunkState | None = None
        self._chunk_mode = self.rollout_with
        self._plan_tracker = PlanTracker(self.n_envs, self.gamma)

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_chunk_state", "_plan_tracker"]

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """The next action, with ``inference``; parameters as in :meth:`ActingPolicy.predict`."""
        self.policy.inference = self.inference
        return super().predict(observation, state, episode_start, deterministic)

    def _setup_learn(self, *args: Any, **kwargs: Any) -> Any:
        last_obs = self._last_obs
        result = super()._setup_learn(*args, **kwargs)
        new_mode = self._chunk_mode != self.rollout_with
        if self._chunk_state is None or new_mode or self._last_obs is not last_obs:  # the environments were reset
            self._chunk_mode = self.rollout_with
            self._begin_episodes()
        return result

    def _begin_episodes(self) -> None:
        """Nothing is left of chunks and plans in any environment."""
        self._chunk_state = self.policy.initial_state(self.n_envs, *self._rollout_modes)
        self._plan_tracker = PlanTracker(self.n_envs, self.gamma)
        self._trial.restart(self.n_envs)

    def _sample_action(
        self, learning_starts: int, action_noise: ActionNoise | None = None, n_envs: int = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        if self.num_timesteps < learning_starts and not self._knows_something:
            return super()._sample_action(learning_starts, action_noise, n_envs)
        assert self._last_obs is not None and self._chunk_state is not None
        obs, _ = self.policy.obs_to_tensor(self._last_obs)
        actions, self._chunk_state, predicted = self._act_in_each(obs, self._chunk_state)
        check_actions(actions)
        self._plan_tracker.start(predicted)
        scaled_actions = actions.reshape(n_envs, *self.action_space.shape)
        if action_noise is not None:
            scaled_actions = np.clip(scaled_actions + action_noise(), -1, 1)
        return self.policy.unscale_action(scaled_actions), scaled_actions

    @property
    def _rollout_modes(self) -> tuple[ActingMode, ...]:
        """Who may act in ``learn()``."""
        return MODES if self.rollout_with == "auto" else (self.rollout_with,)

    def _act_in_each(self, obs: PyTorchObs, state: ChunkState) -> tuple[np.ndarray, ChunkState, np.ndarray]:
        """Actions ``(n_envs, A)``, the next state, and what plans that begin promise, NaN for none ``(n_envs,)``."""
        modes = self._trial.modes if self._on_trial else np.full(self.n_envs, self._rollout_modes[0])
        chunks, position = state[0].copy(), state[1].copy()
        actions = np.empty((len(modes), chunks.shape[2]), np.float32)
        predicted = np.full(len(modes), np.nan)
        for mode in self._rollout_modes:
            rows = np.flatnonzero(modes == mode)
            if len(rows) == 0:
                continue
            index = th.as_tensor(rows, device=self.device)
            length = self.policy.chunk_length(mode)
            part = map_obs(lambda array, index=index: array[index], obs)
            actions[rows], (ahead, executed), plan = self._act(part, (chunks[rows, :length], position[rows]), mode)
            chunks[rows, :length], position[rows] = ahead, executed
            if plan is not None:
                predicted[rows[executed == 1]] = plan.value.cpu().numpy()
                self.logger.record_mean("rollout/plan_gain", (plan.value - plan.proposal_value).mean().item())
        return actions, (chunks, position), predicted

    def _act(self, obs: PyTorchObs, state: ChunkState, mode: ActingMode) -> tuple[np.ndarray, ChunkState, Plan | None]:
        """What is executed in ``learn()``, before action noise; see :meth:`ActingPolicy.act`."""
        return self.policy.act(obs, state, mode, deterministic=False)

    def _store_transition(
        self,
        replay_buffer: Any,
        buffer_action: np.ndarray,
        new_obs: Any,
        reward: np.ndarray,
        dones: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        super()._store_transition(replay_buffer, buffer_action, new_obs, reward, dones, infos)
        assert self._chunk_state is not None
        self._chunk_state[1][dones] = -1  # what is left of a chunk or a plan ends with its episode
        if not self._knows_something:
            self._update_normalizer(new_obs)
        truncated = np.array([info.get("TimeLimit.truncated", False) for info in infos])
        predicted, realized = self._plan_tracker.step(reward, dones & ~truncated, truncated)
        if len(predicted) > 0:
            self.logger.record_mean("rollout/plan_predicted", predicted.mean())
            self.logger.record_mean("rollout/plan_realized", realized.mean())
        if self._on_trial and self._trial.step(reward, dones):
            self._learn_from_trial()

    def _update_normalizer(self, obs: Any) -> None:
        if self.policy.normalizes_features:
            with th.no_grad():
                tensors = obs_as_tensor(obs, self.device)
                features = self.policy.extract_features(tensors, self.policy.features_extractor)
                self.policy.normalizer.update(features)

    def _learn_from_trial(self) -> None:
        """The planner is what ``predict()`` uses as long as the policy alone has not turned out better."""
        policy: Any = self.policy
        policy.trusts_planner.fill_(not self._trial.policy_is_better)
        for mode, returns in self._trial.returns.items():
            if len(returns) > 0:
                self.logger.record(f"rollout/{mode}_return", float(np.mean(returns)))
