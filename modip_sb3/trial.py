"""Whether the planner or the policy alone collects the next episode, by the returns of both so far."""

from typing import cast

import numpy as np

from modip_sb3.acting import ActingMode

MODES: tuple[ActingMode, ActingMode] = ("planner", "policy")
WINDOW = 20  # last episodes that count: what both are worth changes as they learn
MIN_EPISODES = 5  # of these, of each: the worse one's experience corrects what it is wrong about


class Trial:
    """
    Thompson sampling over two means (Chapelle & Li, 2011) in a sliding window: of the last episodes the mean return of
    the planner's and that of the policy's, each taken to be normal, with the spread of both together.
    """

    def __init__(self) -> None:
        self.episodes: list[tuple[ActingMode, float]] = []
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

    @property
    def returns(self) -> dict[ActingMode, np.ndarray]:
        """Of the last episodes, by who acted in them."""
        return {mode: np.array([value for actor, value in self.episodes if actor == mode]) for mode in MODES}

    def step(self, rewards: np.ndarray, dones: np.ndarray) -> bool:
        """
        :param rewards: of the last environment step ``(n_envs,)``
        :param dones: where it ended the episode ``(n_envs,)``
        :return: whether an episode ended
        """
        self.rewards += rewards
        for env in np.flatnonzero(dones):
            episode = cast(ActingMode, self.acting[env]), float(self.rewards[env])
            self.episodes = [*self.episodes, episode][-WINDOW:]
            self.rewards[env], self.acting[env] = 0.0, None
            self.acting[env] = self._draw()
        return bool(dones.any())

    @property
    def policy_is_better(self) -> bool:
        """Whether the policy's mean return is above the planner's by more than the standard error of the difference."""
        if not self._are_comparable:
            return False
        (planner, policy), errors = self._beliefs()
        return bool(policy - planner > np.sqrt((errors**2).sum()))

    @property
    def _are_comparable(self) -> bool:
        return all(len(returns) >= 2 for returns in self.returns.values())

    def _beliefs(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean returns and their standard errors ``(2,)``."""
        returns = list(self.returns.values())
        counts, means = np.array([len(each) for each in returns]), np.array([each.mean() for each in returns])
        squares = sum(((each - mean) ** 2).sum() for each, mean in zip(returns, means, strict=True))
        return means, np.sqrt(squares / (counts.sum() - 2) / counts)

    def _draw(self) -> ActingMode:
        counts = [len(returns) + self.acting.count(mode) for mode, returns in self.returns.items()]
        if min(counts) < MIN_EPISODES or not self._are_comparable:
            return MODES[int(np.argmin(counts))]
        return MODES[int(np.argmax(np.random.normal(*self._beliefs())))]
