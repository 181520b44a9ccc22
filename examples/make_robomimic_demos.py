"""
Demonstrations of a scripted Panda for robomimic's Lift and PickPlaceCan, as a robomimic dataset.

    python examples/make_robomimic_demos.py --task lift     # writes runs/lift/demos.hdf5
    python examples/make_robomimic_demos.py --task can --episodes 50 --seed 1 --output can.hdf5

The script sees what a policy sees. Speed, noise, height and side of the approach differ from episode to episode.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import gymnasium as gym
import numpy as np
from scipy.spatial.transform import Rotation
from tqdm import tqdm

import modip_sb3.envs  # noqa: F401  (registers the tasks)
from modip_sb3.datasets import OfflineDataset, concatenate, save_robomimic
from modip_sb3.envs.robomimic import RobomimicEnv

OPEN, CLOSED = -1.0, 1.0
POINTING_DOWN = Rotation.from_quat([1.0, 0.0, 0.0, 0.0])
POSITION_SCALE, ROTATION_SCALE = 0.05, 0.5  # metres and radians that the controller makes of an action of 1
CAN_PLACE = np.array([0.17, 0.345])  # in the can's quarter of the second bin, where the arm reaches it easily


class Waypoint(NamedTuple):
    """Where the hand should be, and what its fingers should do there."""

    position: np.ndarray
    fingers: float
    tolerance: float = 0.01
    relative: bool = False  # to the object, wherever it is now


class Demonstrator:
    """
    A Panda that goes from waypoint to waypoint, and starts over when it has closed its fingers on nothing.

    :param task: "lift" or "can"
    :param rng: what an episode's style and noise are drawn with
    """

    def __init__(self, task: str, rng: np.random.Generator):
        self.task, self.rng = task, rng
        self.speed = rng.uniform(0.5, 1.0)  # the largest action
        self.noise = rng.uniform(0.0, 0.1)
        side = rng.choice([-1, 1]) * rng.uniform(0.0, 0.05)
        clear, grasp = (0.04, 0.0) if task == "lift" else (0.08, 0.02)  # the can is tall, and fills the hand
        self.waypoints = [
            Waypoint(np.array([0.0, side, clear + rng.uniform(0.03, 0.1)]), OPEN, 0.03, relative=True),
            Waypoint(np.array([0.0, 0.0, clear]), OPEN, relative=True),
            Waypoint(np.array([0.0, 0.0, grasp]), OPEN, relative=True),
            Waypoint(np.array([0.0, 0.0, grasp]), CLOSED, 0.02, relative=True),
        ]
        if task == "lift":
            self.waypoints += [Waypoint(np.array([0.0, 0.0, 0.3]), CLOSED, relative=True)]
        else:
            height = rng.uniform(1.02, 1.08)
            place = CAN_PLACE + rng.uniform(-0.025, 0.025, 2)
            self.waypoints += [
                Waypoint(np.array([np.nan, np.nan, height]), CLOSED, 0.03),
                Waypoint(np.array([*place, height]), CLOSED, 0.03),
                Waypoint(np.array([*place, 0.93]), CLOSED, 0.03),
                Waypoint(np.array([*place, 0.93]), OPEN, 0.05),
                Waypoint(np.array([*place, height]), OPEN),
            ]
        self.index, self.gap = 0, 0.0

    def act(self, obs: dict[str, np.ndarray]) -> np.ndarray:
        """
        :param obs: by robomimic's keys
        :return: the action
        """
        gap = float(np.ptp(obs["robot0_gripper_qpos"]))
        waypoint = self.waypoints[self.index]
        error, turn = self._error(waypoint, obs), self._turn(obs)
        at_rest = gap < 0.075 and abs(gap - self.gap) < 5e-4 if waypoint.fingers == CLOSED else gap > 0.07
        if np.linalg.norm(error) < waypoint.tolerance and np.linalg.norm(turn) < 0.1 and at_rest:
            self.index = min(self.index + 1, len(self.waypoints) - 1)
        if waypoint.fingers == CLOSED and gap < 0.01:
            self.index = 0
        self.gap = gap
        waypoint = self.waypoints[self.index]
        motion = np.concatenate([2 * self._error(waypoint, obs) / POSITION_SCALE, turn / ROTATION_SCALE])
        motion *= min(1.0, self.speed / np.abs(motion).max())
        motion += self.rng.normal(0.0, self.noise, 6) * np.repeat([1.0, 0.3], 3)
        return np.append(np.clip(motion, -1, 1), waypoint.fingers).astype(np.float32)

    def _error(self, waypoint: Waypoint, obs: dict[str, np.ndarray]) -> np.ndarray:
        target = waypoint.position + obs["object"][:3] if waypoint.relative else waypoint.position
        return np.nan_to_num(target - obs["robot0_eef_pos"])  # NaN: wherever it is

    def _turn(self, obs: dict[str, np.ndarray]) -> np.ndarray:
        """Rotation vector to a hand that points down, with its fingers along the nearest sides of the cube."""
        yaw = 0.0
        if self.task == "lift":
            yaw = Rotation.from_quat(obs["object"][3:7]).as_euler("zyx")[0]
            yaw = (yaw + np.pi / 4) % (np.pi / 2) - np.pi / 4
        target = Rotation.from_euler("z", yaw) * POINTING_DOWN
        return (target * Rotation.from_quat(obs["robot0_eef_quat"]).inv()).as_rotvec()


class Episode(NamedTuple):
    """An episode with what robomimic keeps of the simulator."""

    data: OfflineDataset
    states: np.ndarray
    model: str
    success: bool


def record(env: gym.Env, task: str, seed: int) -> Episode:
    """
    :param env: the task
    :param task: "lift" or "can"
    :param seed: of the environment and the demonstrator
    :return: one episode
    """
    inner = env.unwrapped
    assert isinstance(inner, RobomimicEnv)
    demonstrator = Demonstrator(task, np.random.default_rng(seed))
    obs, _ = env.reset(seed=seed)
    model = inner.model_xml
    observations, actions, rewards, states = [obs], [], [], []
    terminated = truncated = False
    while not (terminated or truncated):
        states.append(inner.simulator_state)
        actions.append(demonstrator.act(inner.split(obs)))
        obs, reward, terminated, truncated, info = env.step(actions[-1])
        observations.append(obs)
        rewards.append(reward)
    ended = np.arange(1, len(actions) + 1) == len(actions)
    data = OfflineDataset.from_arrays(
        observations=inner.split(np.array(observations[:-1])),
        actions=np.array(actions),
        rewards=np.array(rewards),
        terminations=ended & terminated,
        truncations=ended & truncated,
        final_observations=inner.split(obs[None]),
    )
    return Episode(data, np.array(states), model, info["is_success"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=["lift", "can"], default="lift")
    parser.add_argument("--episodes", type=int, default=200, help="episodes to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep-failures", action="store_true", help="write unsuccessful episodes as well")
    parser.add_argument("--output", type=Path, help="HDF5 file (default: runs/TASK/demos.hdf5)")
    args = parser.parse_args()
    output = args.output or Path("runs") / args.task / "demos.hdf5"
    if output.exists():
        parser.error(f"{output} exists and is not replaced; choose another --output, or remove it first.")

    env = gym.make(f"modip/{args.task}-scripted-v1")
    kept: list[Episode] = []
    successes = attempts = 0
    with tqdm(total=args.episodes, desc=args.task, unit=" episodes") as bar:
        while len(kept) < args.episodes:
            episode = record(env, args.task, seed=10_000 * args.seed + attempts)
            attempts += 1
            successes += episode.success
            if episode.success or args.keep_failures:
                kept.append(episode)
                bar.update()
            bar.set_postfix(success=f"{successes}/{attempts}")
    dataset = concatenate([episode.data for episode in kept])
    env_args = env.unwrapped.env_args  # type: ignore[attr-defined]
    save_robomimic(dataset, output, env_args, [episode.states for episode in kept], [episode.model for episode in kept])
    print(f"{successes} of {attempts} episodes succeeded ({successes / attempts:.1%})")
    lengths = dataset.episode_lengths
    print(
        f"{output}: {len(kept)} episodes of {lengths.min()} to {lengths.max()} steps, {lengths.mean():.0f} on average"
    )


if __name__ == "__main__":
    main()
