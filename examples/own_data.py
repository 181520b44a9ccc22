"""
Your own environment and your own demonstrations: any Gymnasium environment, any arrays.

    python examples/own_data.py

Here the environment is a cart that must be pushed to the origin, and the demonstrator pushes too timidly.
"""

import argparse
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from modip_sb3 import MODIP, OfflineDataset
from modip_sb3.evaluation import evaluate


class Cart(gym.Env):
    """A point mass on a line: observation (position, velocity), action a force, reward minus the distance to 0."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)

    def __init__(self) -> None:
        self.state = np.zeros(2, np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.state = self.np_random.uniform([-2, -0.5], [2, 0.5]).astype(np.float32)
        return self.state.copy(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        position, velocity = self.state
        velocity = 0.95 * velocity + 0.1 * float(np.clip(action[0], -1, 1))
        position = position + 0.1 * velocity
        self.state = np.array([position, velocity], np.float32)
        return self.state.copy(), -abs(float(position)), False, False, {}


gym.register("Cart-v0", lambda **kwargs: Cart(), max_episode_steps=100)


def demonstrate(num_episodes: int, seed: int) -> dict[str, Any]:
    """Roll out a weak, noisy controller; your demonstrations come from wherever you have them."""
    env, rng = gym.make("Cart-v0"), np.random.default_rng(seed)
    columns: dict[str, list[Any]] = {
        name: [] for name in ("observations", "actions", "rewards", "terminations", "truncations", "next_observations")
    }
    for episode in range(num_episodes):
        obs, _ = env.reset(seed=seed + episode)
        ended = False
        while not ended:
            action = np.clip(-0.2 * obs[0] - 0.3 * obs[1] + 0.3 * rng.normal(size=1), -1, 1).astype(np.float32)
            next_obs, reward, terminated, truncated, _ = env.step(action)
            for column, value in zip(
                columns.values(), (obs, action, reward, terminated, truncated, next_obs), strict=True
            ):
                column.append(value)
            obs, ended = next_obs, terminated or truncated
    return {name: np.array(column) for name, column in columns.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrain", type=int, default=3000, help="updates of the offline phase")
    parser.add_argument("--timesteps", type=int, default=2000, help="environment steps of fine-tuning")
    args = parser.parse_args()

    dataset = OfflineDataset.from_arrays(**demonstrate(num_episodes=50, seed=0), env_id="Cart-v0")
    model = MODIP(
        "MlpPolicy", "Cart-v0", offline_dataset=dataset, batch_size=64, policy_kwargs={"denoiser": "mlp"}, seed=0
    )
    model.pretrain(args.pretrain, progress_bar=True)
    before = evaluate(model, "Cart-v0")
    model.learn(args.timesteps, progress_bar=True)
    after, planner = evaluate(model, "Cart-v0"), evaluate(model, "Cart-v0", inference="planner")
    print(f"demonstrations {dataset.episode_returns.mean():.1f}, cloned {before.mean:.1f}")
    print(f"fine-tuned {after.mean:.1f}, with the planner {planner.mean:.1f}")
    model.save("cart")


if __name__ == "__main__":
    main()
