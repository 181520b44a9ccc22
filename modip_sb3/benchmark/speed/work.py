"""TD-MPC2's plan and update. Run as a script, with any checkout's package: both of them for every line it reads."""

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch as th

import modip_sb3
from modip_sb3.baselines import TDMPC2
from modip_sb3.benchmark.settings import default_dataset


def make_steps(env_id: str, size: int, device: str) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """
    :param env_id: Gymnasium id
    :param size: ``model_size``
    :param device: of the networks
    :return: what plans for one observation, and what updates all networks on one batch of the offline data
    """
    model = TDMPC2("MlpPolicy", env_id, model_size=size, seed=0, device=device, termination_head=True)
    model.offline_dataset = default_dataset(env_id)
    model._load_offline_data()
    batch = model._sample_offline(model.batch_size, model.sequence_length)
    obs, _ = model.policy.obs_to_tensor(model.observation_space.sample()[None])
    warm_start = th.zeros(1, model.policy.horizon, model.policy.action_dim, device=device)

    def plan() -> Any:
        model.policy.set_training_mode(False)
        return model.policy.plan(obs, warm_start)

    def update() -> Any:
        model.policy.set_training_mode(True)
        return model._update(batch, "offline")

    return plan, update


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--env", required=True)
    parser.add_argument("--size", type=int, required=True)
    parser.add_argument("--device", required=True)
    args = parser.parse_args()
    plan, update = make_steps(args.env, args.size, args.device)
    answer = modip_sb3.__file__
    while True:
        sys.stdout.write(f"{answer}\n")
        sys.stdout.flush()
        if not sys.stdin.readline():
            return
        plan()
        answer = str({name: value.item() for name, value in update().items()})  # waits for the device


if __name__ == "__main__":
    main()
