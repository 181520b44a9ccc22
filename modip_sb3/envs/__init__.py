"""Gymnasium ids, one for each task and dataset, so that rl_zoo3 keeps their settings, logs and plots apart."""

import gymnasium as gym

# The environments of Minari's datasets, and the data that each task's id may name
TASKS = {
    "hopper": ("Hopper-v5", ("simple", "medium", "expert", "sac-medium")),
    "walker2d": ("Walker2d-v5", ("simple", "medium", "expert")),
    "halfcheetah": ("HalfCheetah-v5", ("simple", "medium", "expert")),
}

for _task, (_base_id, _datasets) in TASKS.items():
    _base = gym.spec(_base_id)
    for _dataset in _datasets:
        gym.register(
            f"modip/{_task}-{_dataset}-v5",
            entry_point=_base.entry_point,
            reward_threshold=_base.reward_threshold,
            max_episode_steps=_base.max_episode_steps,
            kwargs=_base.kwargs,
        )
