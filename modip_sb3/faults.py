"""What a training does about faults: environments that give no numbers, raise or die, and networks that diverge."""

import copy
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait
from operator import attrgetter
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.type_aliases import RolloutReturn
from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv

LARGEST = 1e15
"""Observation or reward: sums of the squares of larger ones are infinite in float32"""
MAX_SKIPPED_IN_A_ROW = 20
"""Updates that may be skipped one after another. A single bad batch is passed over; so many mean divergence."""


def check_given(what: str, values: Any, step: int, env: int | None = None) -> None:
    """
    :param what: "an observation" or "a reward"
    :param values: what the environments gave, a row for each ``(n_envs, ...)``, or a dictionary of that
    :param step: the environment step of the training
    :param env: of which environment, if the values are of one alone
    :raises ValueError: for NaN, infinity, and what is beyond :data:`LARGEST`
    """
    for key, given in values.items() if isinstance(values, dict) else [(None, values)]:
        rows = np.asarray(given) if env is None else np.asarray(given)[None]
        finite = np.abs(rows.astype(np.float64)) <= LARGEST
        if not finite.all():
            row = int(np.argmin(finite.reshape(len(rows), -1).all(1)))
            name = what if key is None else f"{what} {key!r}"
            raise ValueError(
                f"Environment {row if env is None else env} gave {name} that is not finite, or beyond ±{LARGEST:g}, "
                f"at time step {step} ({rows[~finite][0]}), and nothing of this step was kept: mend the environment, "
                "or end the episode in a wrapper before its simulation diverges."
            )


def check_actions(actions: np.ndarray) -> None:
    """
    :param actions: what networks gave
    :raises FloatingPointError: for NaN and infinity
    """
    if not np.isfinite(actions).all():
        raise FloatingPointError(
            f"The actions are not finite ({actions[~np.isfinite(actions)][0]}), and were not executed: the networks "
            "have diverged, or the observation was not finite; go back to an earlier checkpoint or model, and lower "
            "learning_rate."
        )


@contextmanager
def finite_distribution() -> Iterator[None]:
    """For what draws from an actor of SB3's SAC: a clear error where its networks have diverged."""
    try:
        yield
    except ValueError as error:
        if "found invalid values" not in str(error):  # what torch says where the mean or the deviation is not finite
            raise
        raise FloatingPointError(
            "The actor's distribution is not finite: the networks have diverged, or the observation was not finite; go "
            "back to an earlier checkpoint or model, and lower learning_rate."
        ) from error


def _dead_processes(env: VecEnv | None) -> list[str]:
    vec_env = None if env is None else env.unwrapped
    if not isinstance(vec_env, SubprocVecEnv):
        return []
    ended = wait([process.sentinel for process in vec_env.processes], timeout=1)
    for process in vec_env.processes:
        if process.sentinel in ended:  # its pipes are closed, and soon it will be gone
            process.join(timeout=1)
    return [f"{i} (exit code {p.exitcode})" for i, p in enumerate(vec_env.processes) if not p.is_alive()]


class FaultTolerantAlgorithm(OffPolicyAlgorithm):
    """
    An off-policy algorithm into which nothing comes that is not a finite number.

    An observation or reward that is NaN or infinite is an error that names it, and nothing of its step is kept. After
    any error in a rollout, Ctrl-C too, the next ``learn()`` resets the environments, since their last step is lost. An
    optimiser's step with a loss or gradient that is not finite is not made, and what would follow it in the same update
    (targets, moving averages, other networks) is not either: the update is counted in ``train/skipped_updates`` or
    ``pretrain/skipped_updates``, and after :data:`MAX_SKIPPED_IN_A_ROW` of them in a row the training ends.
    """

    max_grad_norm: float = math.inf
    _skipped_updates = 0
    _skipped_in_a_row = 0

    # ---------------------------------------------------------------- acting

    def predict(self, *args: Any, **kwargs: Any) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """
        As in SB3.

        :raises FloatingPointError: if the networks give actions that are not finite
        """
        actions, state = super().predict(*args, **kwargs)
        check_actions(actions)
        return actions, state

    @contextmanager
    def _in_environments(self) -> Iterator[None]:
        """What the environments do: after an error ``learn()`` resets them, and one that died is named."""
        vec_normalize = self._vec_normalize_env
        attributes = {} if vec_normalize is None else vars(vec_normalize)
        statistics = copy.deepcopy({name: value for name, value in attributes.items() if name.endswith("_rms")})
        try:
            yield
        except BaseException as error:
            self._last_obs = None
            if isinstance(error, ValueError):  # VecNormalize has counted what was refused
                attributes.update(statistics)
            dead = _dead_processes(self.env) if isinstance(error, EOFError | ConnectionError) else []
            if dead:
                raise ChildProcessError(
                    f"The process of environment {', '.join(dead)} has died; what it said last is on stderr. Make the "
                    "environments anew, and go on from the last checkpoint with resume(), or here after set_env()."
                ) from error
            raise

    def _setup_learn(self, *args: Any, **kwargs: Any) -> tuple[int, BaseCallback]:
        with self._in_environments():
            result = super()._setup_learn(*args, **kwargs)
            first_obs = self._last_obs if self._vec_normalize_env is None else self._last_original_obs
            check_given("an observation", first_obs, self.num_timesteps)
        return result

    def collect_rollouts(self, *args: Any, **kwargs: Any) -> RolloutReturn:
        """
        As in SB3.

        :raises ValueError: if an observation or reward is not finite
        :raises ChildProcessError: if the process of an environment has died
        """
        with self._in_environments():
            return super().collect_rollouts(*args, **kwargs)

    def _store_transition(
        self,
        replay_buffer: Any,
        buffer_action: np.ndarray,
        new_obs: Any,
        reward: np.ndarray,
        dones: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        vec_normalize, step = self._vec_normalize_env, self.num_timesteps
        check_given("an observation", new_obs if vec_normalize is None else vec_normalize.get_original_obs(), step)
        check_given("a reward", reward if vec_normalize is None else vec_normalize.get_original_reward(), step)
        for env in np.flatnonzero(dones):
            final_obs = infos[env].get("terminal_observation")
            if final_obs is not None:
                check_given("a final observation", final_obs, step, int(env))
        super()._store_transition(replay_buffer, buffer_action, new_obs, reward, dones, infos)

    # ---------------------------------------------------------------- learning

    def _optimize(self, optimizer: th.optim.Optimizer, loss: th.Tensor) -> None:
        """
        One step, with the norm of the gradient clipped to ``max_grad_norm``.

        :raises FloatingPointError: instead of the step, if the loss or its gradient is not finite
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        optimizer.zero_grad()
        loss.backward(inputs=parameters)  # through other networks, if the loss has some, but not to their parameters
        norm = th.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
        if not math.isfinite((norm + loss.detach()).item()):
            names = self._get_torch_save_params()[0]
            name = next((name for name in names if attrgetter(name)(self) is optimizer), "an optimizer")
            raise FloatingPointError(f"in {name} the loss is {loss.item()} and the norm of its gradient {norm.item()}")
        optimizer.step()

    @contextmanager
    def _skipping(self, phase: str) -> Iterator[None]:
        """
        One update, which ends where a loss, a gradient or a plan is not finite.

        :param phase: "train" or "pretrain", for the log
        :raises FloatingPointError: after :data:`MAX_SKIPPED_IN_A_ROW` skipped updates in a row
        """
        try:
            yield
            self._skipped_in_a_row = 0
        except FloatingPointError as error:
            self._skipped_updates += 1
            self._skipped_in_a_row += 1
            if self._skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
                self._skipped_in_a_row = 0
                raise FloatingPointError(
                    f"The training has diverged: {MAX_SKIPPED_IN_A_ROW} updates in a row were skipped, and {error}. Go "
                    "back to an earlier checkpoint or model, lower learning_rate, and look for rewards or observations "
                    "that are far too large."
                ) from error
            warnings.warn(
                f"Updates are skipped where a loss or gradient is not finite, and counted in {phase}/skipped_updates; "
                f"{MAX_SKIPPED_IN_A_ROW} in a row end the training.",
                stacklevel=3,
            )
        if self._skipped_updates > 0:
            self.logger.record(f"{phase}/skipped_updates", self._skipped_updates)
