"""
Demonstrations of a scripted Panda for robomimic's Lift, PickPlaceCan and NutAssemblySquare, as a robomimic dataset.

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
ANYWHERE = np.nan
QUARTER_TURN, HALF_TURN = np.pi / 2, np.pi


class Shape(NamedTuple):
    """Where the hand takes an object: along its x-axis from the middle, and how far above it."""

    handle: float
    grasp: float
    clear: float  # where it may close in on it
    symmetry: float  # the fingers' angle to it, up to whole multiples of this


SHAPES = {
    "lift": Shape(0.0, 0.0, 0.04, QUARTER_TURN),
    "can": Shape(0.0, 0.02, 0.08, 0.0),  # it is tall, fills the hand, and looks the same from every side
    "square": Shape(0.054, 0.0, 0.04, HALF_TURN),
}
# In the can's quarter of the second bin, where the arm reaches it easily; the square peg
CAN_PLACE, PEG = np.array([0.17, 0.345]), np.array([0.23, 0.1])


class Waypoint(NamedTuple):
    """Where the hand should be, and what its fingers should do there."""

    position: np.ndarray
    fingers: float
    tolerance: float = 0.01  # metres
    turn_tolerance: float = 0.1  # radians
    of: str = "hand"  # "grasp": relative to where the object is taken; "object": it is the object that should be there


def plan(task: str, rng: np.random.Generator) -> list[Waypoint]:
    """
    :param task: "lift", "can" or "square"
    :param rng: what the way is drawn with
    :return: the way
    """
    shape = SHAPES[task]
    side = rng.choice([-1, 1]) * rng.uniform(0.0, 0.05)
    take = np.array([0.0, 0.0, shape.grasp])
    way = [
        Waypoint(np.array([0.0, side, shape.clear + rng.uniform(0.03, 0.1)]), OPEN, 0.03, of="grasp"),
        Waypoint(np.array([0.0, 0.0, shape.clear]), OPEN, of="grasp"),
        Waypoint(take, OPEN, of="grasp"),
        Waypoint(take, CLOSED, 0.02, of="grasp"),
    ]
    if task == "lift":
        return [*way, Waypoint(take + [0.0, 0.0, 0.3], CLOSED, of="grasp")]
    height = rng.uniform(1.02, 1.08)
    up = Waypoint(np.array([ANYWHERE, ANYWHERE, height]), CLOSED, 0.03)
    if task == "square":
        return [
            *way,
            up,
            Waypoint(np.array([*PEG, 1.0]), CLOSED, 0.006, of="object"),
            Waypoint(np.array([*PEG, 0.9]), CLOSED, 0.015, of="object"),
            Waypoint(np.full(3, ANYWHERE), OPEN),
            up._replace(fingers=OPEN),
        ]
    place = CAN_PLACE + rng.uniform(-0.025, 0.025, 2)
    return [
        *way,
        up,
        Waypoint(np.array([*place, height]), CLOSED, 0.03),
        Waypoint(np.array([*place, 0.93]), CLOSED, 0.03, 0.3),  # far out, the arm cannot keep the hand upright
        Waypoint(np.array([*place, 0.93]), OPEN, 0.05, 0.3),
        Waypoint(np.array([*place, height]), OPEN),
    ]


def wrap(angle: float, period: float) -> float:
    """The angle up to multiples of the period, as close to 0 as can be; 0 for a period of 0."""
    return (angle + period / 2) % period - period / 2 if period else 0.0


class Demonstrator:
    """
    A Panda that goes from waypoint to waypoint, and starts over when it has closed its fingers on nothing.

    :param task: "lift", "can" or "square"
    :param rng: what an episode's style and noise are drawn with
    """

    def __init__(self, task: str, rng: np.random.Generator):
        self.shape, self.rng = SHAPES[task], rng
        self.speed = rng.uniform(0.5, 1.0)  # the largest action
        self.noise = rng.uniform(0.0, 0.1)
        self.waypoints = plan(task, rng)
        self.index, self.gap = 0, 0.0

    def act(self, obs: dict[str, np.ndarray]) -> np.ndarray:
        """
        :param obs: by robomimic's keys
        :return: the action
        """
        gap = float(np.ptp(obs["robot0_gripper_qpos"]))
        waypoint = self.waypoints[self.index]
        error, turn = self._error(waypoint, obs), self._turn(waypoint, obs)
        at_rest = gap < 0.075 and abs(gap - self.gap) < 5e-4 if waypoint.fingers == CLOSED else gap > 0.07
        if np.linalg.norm(error) < waypoint.tolerance and np.linalg.norm(turn) < waypoint.turn_tolerance and at_rest:
            self.index = min(self.index + 1, len(self.waypoints) - 1)
        if waypoint.fingers == CLOSED and gap < 0.01:
            self.index = 0
        self.gap = gap
        waypoint = self.waypoints[self.index]
        motion = np.concatenate(
            [2 * self._error(waypoint, obs) / POSITION_SCALE, self._turn(waypoint, obs) / ROTATION_SCALE]
        )
        motion *= self.speed / max(self.speed, np.abs(motion).max())
        motion += self.rng.normal(0.0, self.noise, 6) * np.repeat([1.0, 0.3], 3)
        return np.append(np.clip(motion, -1, 1), waypoint.fingers).astype(np.float32)

    def _error(self, waypoint: Waypoint, obs: dict[str, np.ndarray]) -> np.ndarray:
        hand, thing = obs["robot0_eef_pos"], obs["object"][:3]
        if waypoint.of == "object":
            return np.nan_to_num(waypoint.position - thing)
        handle = Rotation.from_quat(obs["object"][3:7]).apply([self.shape.handle, 0.0, 0.0])
        start = thing + handle if waypoint.of == "grasp" else np.zeros(3)
        return np.nan_to_num(start + waypoint.position - hand)  # NaN, which is anywhere, is reached

    def _turn(self, waypoint: Waypoint, obs: dict[str, np.ndarray]) -> np.ndarray:
        """Rotation vector to a hand that points down, with its fingers along the object's sides, or that turns it."""
        hand = Rotation.from_quat(obs["robot0_eef_quat"])
        yaw = Rotation.from_quat(obs["object"][3:7]).as_euler("zyx")[0]
        target = wrap(yaw, self.shape.symmetry)
        if waypoint.of != "grasp" and self.shape.handle:
            target = (hand * POINTING_DOWN.inv()).as_euler("zyx")[0] - wrap(yaw, QUARTER_TURN)
        return (Rotation.from_euler("z", target) * POINTING_DOWN * hand.inv()).as_rotvec()


class Episode(NamedTuple):
    """An episode with what robomimic keeps of the simulator."""

    data: OfflineDataset
    states: np.ndarray
    model: str
    success: bool


def record(env: gym.Env, task: str, seed: int) -> Episode:
    """
    :param env: the task
    :param task: "lift", "can" or "square"
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


def make_demos(path: Path, task: str, num_episodes: int, seed: int = 0, keep_failures: bool = False) -> None:
    """
    Record episodes until there are enough, say how many succeeded, and write them as robomimic does.

    :param path: the HDF5 file, which must not exist
    :param task: "lift", "can" or "square"
    :param num_episodes: episodes to write
    :param seed: of all episodes
    :param keep_failures: write unsuccessful episodes as well
    """
    env = gym.make(f"modip/{task}-scripted-v1")
    kept: list[Episode] = []
    successes = attempts = 0
    with tqdm(total=num_episodes, desc=f"{task} demonstrations", unit=" episodes") as bar:
        while len(kept) < num_episodes:
            episode = record(env, task, seed=10_000 * seed + attempts)
            attempts += 1
            successes += episode.success
            if episode.success or keep_failures:
                kept.append(episode)
                bar.update()
            bar.set_postfix(success=f"{successes}/{attempts}")
    dataset = concatenate([episode.data for episode in kept])
    env_args = env.unwrapped.env_args  # type: ignore[attr-defined]
    env.close()
    save_robomimic(dataset, path, env_args, [episode.states for episode in kept], [episode.model for episode in kept])
    lengths = dataset.episode_lengths
    print(f"{successes} of {attempts} episodes succeeded ({successes / attempts:.1%})")
    print(f"{path}: {len(kept)} episodes of {lengths.min()} to {lengths.max()} steps, {lengths.mean():.0f} on average")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=SHAPES, default="lift")
    parser.add_argument("--episodes", type=int, default=200, help="episodes to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep-failures", action="store_true", help="write unsuccessful episodes as well")
    parser.add_argument("--output", type=Path, help="HDF5 file (default: runs/TASK/demos.hdf5)")
    args = parser.parse_args()
    output = args.output or Path("runs") / args.task / "demos.hdf5"
    if output.exists():
        parser.error(f"{output} exists and is not replaced; choose another --output, or remove it first.")
    make_demos(output, args.task, args.episodes, args.seed, args.keep_failures)


if __name__ == "__main__":
    main()
