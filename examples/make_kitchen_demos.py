"""
Make demonstrations for the kitchen: a scripted hand that does the four subtasks in a random order.

    python examples/make_kitchen_demos.py --episodes 200 --output runs/kitchen/demos.hdf5

Each episode draws its order, its speed, the heights at which it travels and how it misses its waypoints, so that the
same state is met with different actions. The joint velocities come from damped least squares on MuJoCo's Jacobians.
"""

import argparse
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import gymnasium as gym
import mujoco
import numpy as np
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import modip_sb3.envs  # noqa: F401  (registers the ids)
from modip_sb3.datasets import OfflineDataset, concatenate, save_d4rl
from modip_sb3.envs.kitchen import TASKS, KitchenEnv

ENV_ID = "modip/kitchen-scripted-v1"
OPEN, CLOSED = 0.04, 0.0  # position of each finger, in metres
MIDDLE = np.array([-0.35, 0.3, 2.2])  # on the way between subtasks, clear of the robot's base
Actions = Iterator[np.ndarray]


class Hand:
    """
    Actions that bring the hand to points, while it goes on pointing at the kitchen.

    :param env: Where it moves; its state is read, and nothing but actions changes it.
    :param rng: What the speed and all that is missed is drawn from.
    :param noise: Standard deviation of the noise on the arm's actions.
    """

    def __init__(self, env: KitchenEnv, rng: np.random.Generator, noise: float):
        self.model, self.data = env.kitchen.model, env.kitchen.data
        self.rng, self.noise = rng, noise
        self.step_size = rng.uniform(0.045, 0.065)  # metres in a step
        self.duration = env.kitchen.robot_env.dt
        self.stiffness = self.model.actuator_gainprm[:9, 0]
        # What a servo, a spring with a damper, covers of its way in one step
        self.progress = 1 - np.exp(-self.duration * self.stiffness / self.model.dof_damping[:9])
        self.first_posture = self.data.qpos[:7].copy()
        self.first_rotation = self._site().xmat.reshape(3, 3).copy()

    def _site(self) -> Any:
        return self.data.site("end_effector")

    @property
    def position(self) -> np.ndarray:
        """Between the fingers."""
        return self._site().xpos.copy()

    def point(self, site: str, x: float = 0, y: float = 0, z: float = 0, spread: float = 0) -> np.ndarray:
        """A point beside one of the kitchen's sites, missed by up to ``spread`` in each direction."""
        return self.data.site(site).xpos + [x, y, z] + self.rng.uniform(-spread, spread, 3)

    def joint(self, name: str) -> float:
        """Position of one of the kitchen's joints."""
        return float(self.data.joint(name).qpos[0])

    def move(
        self,
        target: np.ndarray,
        fingers: float = CLOSED,
        until: Callable[[], bool] = lambda: False,
        tolerance: float = 0.02,
        max_steps: int = 60,
    ) -> Actions:
        """Go straight to a point, until it is reached or something else is."""
        for _ in range(max_steps):
            if until() or np.linalg.norm(target - self.position) < tolerance:
                return
            yield self.action(target, fingers)

    def action(self, target: np.ndarray, fingers: float) -> np.ndarray:
        """One step towards a point."""
        wanted = np.concatenate([_shortened(target - self.position, self.step_size), 0.3 * self._turn()])
        offsets = self._joint_step(wanted) / self.progress[:7]
        offsets += self.data.qfrc_bias[:7] / self.stiffness[:7]  # what the servos hang through
        velocities = offsets / (2 * self.duration)  # an action of 1 is 2 rad/s
        velocities /= max(1.0, np.abs(velocities).max())
        velocities += self.noise * self.rng.standard_normal(7)
        finger_steps = (fingers - self.data.qpos[7:9]) / self.progress[7:]
        return np.clip(np.concatenate([velocities, finger_steps / (2 * self.duration)]), -1, 1)

    def _turn(self) -> np.ndarray:
        """The rotation back to the first orientation, as an axis times an angle."""
        now = self._site().xmat.reshape(3, 3)
        return _shortened(0.5 * np.cross(now.T, self.first_rotation.T).sum(axis=0), 0.15)

    def _joint_step(self, wanted: np.ndarray) -> np.ndarray:
        """``(7,)`` rad for the wanted ``(6,)`` translation and 0.3 times rotation, with the joints within limits."""
        jacobian = np.zeros((6, self.model.nv))
        mujoco.mj_jacSite(self.model, self.data, jacobian[:3], jacobian[3:], self._site().id)
        jacobian = jacobian[:, :7] * np.array([[1], [1], [1], [0.3], [0.3], [0.3]])
        joints, (low, high) = self.data.qpos[:7], self.model.jnt_range[:7].T
        free = np.ones(7, bool)
        while True:
            part = jacobian * free
            inverse = part.T @ np.linalg.inv(part @ part.T + 0.02**2 * np.eye(6))
            posture = 0.1 * (self.first_posture - joints)
            step = free * (inverse @ wanted + posture - inverse @ (part @ posture))
            blocked = ((joints + step < low) & (step < 0)) | ((joints + step > high) & (step > 0))
            if not blocked.any():
                return step
            free &= ~blocked


def _shortened(vector: np.ndarray, length: float) -> np.ndarray:
    return vector * min(1.0, length / max(1e-9, float(np.linalg.norm(vector))))


# ------------------------------------------------------------------ subtasks


def slide_cabinet(hand: Hand) -> Actions:
    """Push the handle to the right."""
    yield from hand.move(hand.point("slide_site", -0.09, -0.12, 0, spread=0.02))
    yield from hand.move(hand.point("slide_site", -0.08, -0.02, 0, spread=0.005))
    target, opened = hand.point("slide_site", 0.3, -0.02, 0), hand.rng.uniform(0.15, 0.3)
    yield from hand.move(target, until=lambda: hand.joint("slide_cabinet") > opened)
    yield from back_off(hand)


def light_switch(hand: Hand) -> Actions:
    """Push the lever to the left."""
    yield from hand.move(hand.point("light_site", 0.09, -0.12, 0, spread=0.02))
    yield from hand.move(hand.point("light_site", 0.08, -0.01, 0, spread=0.005), max_steps=8)
    target = hand.point("light_site", -0.12, -0.01, 0)
    yield from hand.move(target, until=lambda: hand.joint("light_switch") < -0.6, max_steps=20)
    yield from back_off(hand)


def bottom_burner(hand: Hand) -> Actions:
    """Push the upper half of the knob to the right."""
    yield from hand.move(hand.point("knob2_site", -0.06, -0.12, 0.03, spread=0.02))
    yield from hand.move(hand.point("knob2_site", -0.06, -0.03, 0.03, spread=0.003), max_steps=8)
    target = hand.point("knob2_site", 0.1, -0.03, 0.03)
    yield from hand.move(target, until=lambda: hand.joint("knob_Joint_2") < -0.75, max_steps=20)
    yield from back_off(hand)


def kettle(hand: Hand) -> Actions:
    """Push it backwards, low enough that it does not fall over, with both fingers, so that it does not turn."""
    x = hand.data.site("kettle_site").xpos[0] + hand.rng.uniform(-0.015, 0.015)
    height, pushed = hand.rng.uniform(1.70, 1.73), hand.rng.uniform(0.52, 0.58)
    yield from hand.move(np.array([x, 0.08, hand.rng.uniform(1.9, 2.05)]), OPEN)
    yield from hand.move(np.array([x, 0.1, height]), OPEN)
    yield from hand.move(np.array([x, 0.6, height]), OPEN, until=lambda: hand.data.joint("kettle").qpos[1] > pushed)
    yield from hand.move(np.array([x, 0.15, height + 0.05]), OPEN)


def microwave(hand: Hand) -> Actions:
    """Take the handle and pull the door open along its circle."""
    yield from hand.move(hand.point("microhandle_site", 0, -0.18, 0, spread=0.03), OPEN)
    yield from hand.move(hand.point("microhandle_site", 0, -0.01, 0, spread=0.005), OPEN, tolerance=0.012, max_steps=15)
    yield from (hand.action(hand.point("microhandle_site", 0, -0.01, 0), CLOSED) for _ in range(4))
    hinge = hand.data.body("microdoorroot").xpos
    opened = -hand.rng.uniform(0.55, 0.65)
    for _ in range(30):
        handle = hand.point("microhandle_site")
        if hand.joint("microwave") < opened or np.linalg.norm(handle - hand.position) > 0.07:  # or slipped
            break
        radius = handle - hinge
        yield hand.action(handle + 0.06 * np.array([radius[1], -radius[0], 0]) / np.linalg.norm(radius), CLOSED)
    yield from (hand.action(hand.position, OPEN) for _ in range(2))
    yield from hand.move(hand.position - [0, 0.05, 0], OPEN, max_steps=4)


def back_off(hand: Hand) -> Actions:
    """Leave the furniture."""
    yield from hand.move(hand.position - [0, hand.rng.uniform(0.08, 0.14), 0], max_steps=6)


SUBTASKS = {
    "slide cabinet": slide_cabinet,
    "light switch": light_switch,
    "bottom burner": bottom_burner,
    "kettle": kettle,
    "microwave": microwave,
}

# ------------------------------------------------------------------ episodes


def demonstrate(env: KitchenEnv, tasks: list[str], rng: np.random.Generator, noise: float) -> Actions:
    """Each subtask in a random order, then whatever failed again."""
    hand = Hand(env, rng, noise)
    while True:
        for task in rng.permutation([task for task in tasks if task not in env.kitchen.episode_task_completions]):
            yield from hand.move(MIDDLE + rng.uniform(-0.08, 0.08, 3), tolerance=0.2)
            yield from SUBTASKS[task](hand)
        yield hand.action(hand.position, CLOSED)


def record(index: int, seed: int, tasks: str, noise: float) -> tuple[OfflineDataset, list[str]]:
    """
    One episode, the same for the same arguments.

    :param index: Its number.
    :param seed: Of all episodes.
    :param tasks: The set of subtasks.
    :param noise: Standard deviation of the noise on the arm's actions.
    :return: The episode, and the subtasks completed in it.
    """
    rng = np.random.default_rng([seed, index])
    env = gym.make(ENV_ID, tasks=tasks)
    kitchen = env.unwrapped
    assert isinstance(kitchen, KitchenEnv)
    obs, info = env.reset(seed=int(rng.integers(2**31)))
    steps = []
    for action in demonstrate(kitchen, list(TASKS[tasks]), rng, noise):
        after, reward, terminated, truncated, info = env.step(action)
        steps.append((obs, action, reward, terminated, truncated))
        obs = after
        if terminated or truncated:
            break
    env.close()
    observations, actions, rewards, terminations, truncations = map(np.array, zip(*steps, strict=True))
    episode = OfflineDataset.from_arrays(
        observations, actions, rewards, terminations, truncations, final_observations=obs[None]
    )
    return episode, info["completed_tasks"]


def print_table(dataset: OfflineDataset, completed: list[list[str]], tasks: str) -> None:
    """How often how much was completed, and which subtasks."""
    numbers = np.array([len(episode) for episode in completed])
    done = Counter(task for episode in completed for task in episode)
    steps = dataset.episode_lengths.mean()
    table = Table("", "episodes", title=f"{numbers.mean():.2f} of 4 subtasks in {steps:.0f} steps")
    for number in range(5):
        table.add_row(f"{number} completed", f"{np.mean(numbers == number):.1%}")
    for task in TASKS[tasks]:
        table.add_row(task, f"{done[task] / len(completed):.1%}")
    Console().print(table)


def make_demos(
    path: Path, num_episodes: int, tasks: str = "complete", noise: float = 0.1, seed: int = 0, workers: int = 1
) -> None:
    """
    Record episodes, say what was completed in them, and write them in D4RL's layout.

    :param path: The file, which must not exist.
    :param num_episodes: How many; the first ones are the same in every number.
    :param tasks: The set of subtasks.
    :param noise: Standard deviation of the noise on the arm's actions.
    :param seed: Of all episodes.
    :param workers: Processes that share the work.
    """
    job = partial(record, seed=seed, tasks=tasks, noise=noise)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        done = pool.map(job, range(num_episodes))
        episodes, completed = zip(*tqdm(done, total=num_episodes, desc="episodes"), strict=True)
    dataset = replace(concatenate(episodes, source="a scripted hand"), env_id=ENV_ID)
    print_table(dataset, list(completed), tasks)
    save_d4rl(dataset, path)
    Console().print(f"{path}: {dataset.num_episodes:,} episodes, {dataset.num_transitions:,} steps", soft_wrap=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=200)
    parser.add_argument("--tasks", choices=sorted(TASKS), default="complete", help="the set of subtasks")
    parser.add_argument("--noise", type=float, default=0.1, help="on the arm's actions, which reach from -1 to 1")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1, help="processes; the data does not depend on it")
    parser.add_argument("--output", type=Path, default=Path("runs/kitchen/demos.hdf5"), help="HDF5 file, D4RL's layout")
    args = parser.parse_args()
    if args.output.exists():
        parser.error(f"{args.output} exists and is not replaced; choose another path, or remove it first.")
    make_demos(args.output, args.episodes, args.tasks, args.noise, args.seed, args.workers)


if __name__ == "__main__":
    main()
