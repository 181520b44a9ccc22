"""Gymnasium ids, one for each task and dataset, so that rl_zoo3 keeps their settings, logs and plots apart."""

import gymnasium as gym

from modip_sb3.envs.robomimic import benchmark_env_args

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

# Minari's D4RL data is rewarded in each step for every subtask that holds, and goes on after the last
for _dataset in ("complete", "partial", "mixed"):
    gym.register(
        f"modip/kitchen-{_dataset}-v1",
        entry_point="modip_sb3.envs.kitchen:KitchenEnv",
        max_episode_steps=280,
        kwargs={"tasks": _dataset, "terminate_on_tasks_completed": False, "remove_task_when_completed": False},
    )
gym.register(
    "modip/kitchen-scripted-v1",
    entry_point="modip_sb3.envs.kitchen:KitchenEnv",
    max_episode_steps=280,
    kwargs={"tasks": "complete"},
)

# robomimic's tasks, the steps that its benchmark gives them, and the data: its own, and that of our scripted robot
ROBOMIMIC_TASKS = {
    "lift": (benchmark_env_args("Lift"), 400, ("ph", "mh", "scripted")),
    "can": (benchmark_env_args("PickPlaceCan"), 400, ("ph", "mh", "scripted")),
    "square": (benchmark_env_args("NutAssemblySquare"), 400, ("ph", "mh", "scripted")),
    "transport": (
        benchmark_env_args("TwoArmTransport", ["Panda", "Panda"], env_configuration="single-arm-opposed"),
        700,
        ("ph", "mh"),
    ),
}

for _task, (_env_args, _max_episode_steps, _datasets) in ROBOMIMIC_TASKS.items():
    for _dataset in _datasets:
        gym.register(
            f"modip/{_task}-{_dataset}-v1",
            entry_point="modip_sb3.envs.robomimic:RobomimicEnv",
            max_episode_steps=_max_episode_steps,
            kwargs={"env_args": _env_args},
        )
