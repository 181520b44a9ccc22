"""Run as a script, with any checkout's package: a step of TD-MPC2, which is a plan and an update, for every line."""

import argparse
import sys

import torch as th

import modip_sb3
from modip_sb3.baselines import TDMPC2
from modip_sb3.benchmark.settings import default_dataset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--env", required=True)
    parser.add_argument("--size", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--device", required=True)
    args = parser.parse_args()
    th.set_num_threads(args.threads)
    model = TDMPC2("MlpPolicy", args.env, model_size=args.size, seed=0, device=args.device, termination_head=True)
    model.offline_dataset = default_dataset(args.env)
    model._load_offline_data()
    batch = model._sample_offline(model.batch_size, model.sequence_length)
    obs, _ = model.policy.obs_to_tensor(model.observation_space.sample()[None])
    warm_start = th.zeros(1, model.policy.horizon, model.policy.action_dim, device=args.device)

    answer = modip_sb3.__file__
    while True:
        sys.stdout.write(f"{answer}\n")
        sys.stdout.flush()
        if not sys.stdin.readline():
            return
        model.policy.set_training_mode(False)
        plan = model.policy.plan(obs, warm_start)
        model.policy.set_training_mode(True)
        model._update(batch, "offline")
        answer = str(plan.value.item())  # waits for the device


if __name__ == "__main__":
    main()
