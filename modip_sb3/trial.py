"""Whether the planner or the policy alone collects the next episode, by the returns of both so far."""

from typing import cast

import numpy as np

from modip_sb3.acting import ActingMode

MODES: tuple[ActingMode, ActingMode] = ("planner", "policy")
MIN_EPISODES = 2  # of each, before their returns say anything
WINDOW = 20  # last episodes of each that count: both get better


class Trial:
    """
    Thompson sampling over two means (Chapelle & Li, 2011): the mean return of the planner's last episodes and that of
    the policy's, each taken to be normal, with the spread of both together.
    """

    def __init__(self) -> None:
        self.returns: dict[ActingMode, list[float]] = {mode: [] for mode in MODES}
        self.restart(0)

    def restart(self, n_envs: int) -> None:
        """
        Begin new episodes in all environments.

        :param n_envs: number of environments
        """
        self.rewards = np.zeros(n_envs)
        self.acting: list[ActingMode | None] = [None] * n_envs
        for env in range(n_envs):
            self.acting[env] = self._draw()

    @property
    def modes(self) -> np.ndarray:
        """Who acts in each environment ``(n_envs,)``."""
        return np.array(self.acting)

    def step(self, rewards: np.ndarray, dones: np.ndarray) -> bool:
        """
        :param rewards: of the last environment step ``(n_envs,)``
        :param dones: where it ended the episode ``(n_envs,)``
        :return: whether an episode ended
        """
        self.rewards += rewards
        for env in np.flatnonzero(dones):
            mode = cast(ActingMode, self.acting[env])
            self.returns[mode] = [*self.returns[mode], float(self.rewards[env])][-WINDOW:]
            self.rewards[env], self.acting[env] = 0.0, None
            self.acting[env] = self._draw()
        return bool(dones.any())

    @property
    def policy_is_better(self) -> bool:
        """Whether the policy's mean return is above the planner's by more than the standard error of the difference."""
        if any(len(self.returns[mode]) < MIN_EPISODES for mode in MODES):
            return False
        (planner, policy), errors = self._beliefs()
        return bool(policy - planner > np.sqrt((errors**2).sum()))

    def _beliefs(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean returns and their standard errors ``(2,)``."""
        returns = [np.array(self.returns[mode]) for mode in MODES]
        counts, means = np.array([len(each) for each in returns]), np.array([each.mean() for each in returns])
        squares = sum(((each - mean) ** 2).sum() for each, mean in zip(returns, means, strict=True))
        return means, np.sqrt(squares / (counts.sum() - 2) / counts)

    def _draw(self) -> ActingMode:
        for mode in MODES:
            if len(self.returns[mode]) + self.acting.count(mode) < MIN_EPISODES:
                return mode
        if any(len(self.returns[mode]) < MIN_EPISODES for mode in MODES):
            return "planner"
        return MODES[int(np.argmax(np.random.normal(*self._beliefs())))]
