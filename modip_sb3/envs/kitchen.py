"""FrankaKitchen-v1 of gymnasium-robotics with D4RL's task sets, flat observations and success in ``info``."""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

# As D4RL's d4rl/kitchen/__init__.py and the metadata of Minari's datasets say. "partial" differs from "complete" in its
# data alone, in which other subtasks are done as well.
TASKS = {
    "complete": ("microwave", "kettle", "light switch", "slide cabinet"),
    "partial": ("microwave", "kettle", "light switch", "slide cabinet"),
    "mixed": ("microwave", "kettle", "bottom burner", "light switch"),
}


class KitchenEnv(gym.Env):
    """
    A Franka Panda in a kitchen, with four subtasks that count in any order.

    Observations are FrankaKitchen-v1's 59 values: 9 positions and 9 velocities of the robot's joints, 21 positions and
    20 velocities of the kitchen's. D4RL's own environment had 60: the same 30 positions, then 30 values of the goal,
    which never change within a task set, and no velocities. Actions are nine joint velocities in units of 2 rad/s
    (fingers: 2 m/s), held for 80 ms. Every episode starts in the same state; the seed is that of the sensors' noise.

    ``info`` holds ``completed_tasks`` (the subtasks completed so far, in that order), ``completed`` (their number),
    ``completed_fraction`` (of the four, D4RL's normalised score / 100) and ``is_success`` (all four).

    :param tasks: The set of subtasks, "complete", "partial" or "mixed".
    :param terminate_on_tasks_completed: Whether the episode ends once all four are completed.
    :param remove_task_when_completed: Whether a subtask is rewarded once, in the step that completes it, as in D4RL's
        environment, so that the return is the number of subtasks. Otherwise each step is rewarded with the number that
        hold at the moment: the rewards in Minari's D4RL datasets, which were recorded so and without termination.
    :param render_mode: "human", "rgb_array" or "depth_array".
    :param kwargs: What FrankaKitchen-v1 takes besides, such as ``robot_noise_ratio``, ``width`` and ``height``.
    :raises ImportError: If gymnasium-robotics is not installed.
    :raises ValueError: If there is no such set.
    """

    metadata = {"render_modes": ["human", "rgb_array", "depth_array"], "render_fps": 12}

    def __init__(
        self,
        tasks: str = "complete",
        terminate_on_tasks_completed: bool = True,
        remove_task_when_completed: bool = True,
        render_mode: str | None = None,
        **kwargs: Any,
    ):
        if tasks not in TASKS:
            raise ValueError(f"tasks={tasks!r} is no set of kitchen subtasks, expected one of {sorted(TASKS)}.")
        try:
            from gymnasium_robotics.envs.franka_kitchen import KitchenEnv as FrankaKitchen
        except ImportError as error:
            raise ImportError(
                f'The kitchen needs gymnasium-robotics ({error}): run pip install "modip-sb3[kitchen]".'
            ) from error
        self.render_mode = render_mode
        self.kitchen = FrankaKitchen(
            tasks_to_complete=list(TASKS[tasks]),
            terminate_on_tasks_completed=terminate_on_tasks_completed,
            remove_task_when_completed=remove_task_when_completed,
            render_mode=render_mode,
            **kwargs,
        )
        self.observation_space: spaces.Box = self.kitchen.observation_space["observation"]
        self.action_space: spaces.Box = spaces.Box(-1.0, 1.0, self.kitchen.action_space.shape, np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """
        Put the robot and the kitchen back.

        :param seed: Seed of the sensors' noise; it goes on without one.
        :param options: Unused.
        :return: The observation, and ``info`` with nothing completed.
        """
        super().reset(seed=seed)
        obs, info = self.kitchen.reset(seed=seed)
        return obs["observation"], self._completions(info)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """
        Move for 80 ms.

        :param action: ``(9,)`` in [-1, 1].
        :return: Observation, reward, whether all is done (if that ends the episode), False, and ``info``.
        """
        obs, reward, terminated, truncated, info = self.kitchen.step(action)
        return obs["observation"], reward, terminated, truncated, self._completions(info)

    def render(self) -> Any:
        """The camera's picture, or nothing for "human", which has a window."""
        return self.kitchen.render()

    def close(self) -> None:
        """Release the simulation's window and renderer."""
        self.kitchen.close()

    def _completions(self, info: dict[str, Any]) -> dict[str, Any]:
        completed = list(info["episode_task_completions"])
        fraction = len(completed) / len(self.kitchen.goal)
        return {
            "completed_tasks": completed,
            "completed": len(completed),
            "completed_fraction": fraction,
            "is_success": fraction == 1.0,
        }
