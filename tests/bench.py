"""Benchmarks that take seconds: Pendulum in episodes of ten steps, tiny networks, a few dozen environment steps."""

from pathlib import Path

from modip_sb3.benchmark.__main__ import main, make_parser
from modip_sb3.benchmark.plan import plan
from modip_sb3.benchmark.runs import RunFolder

ENV_ID, NAME = "Pendulum-v1", "Pendulum-v1"
SHORT = "env_kwargs:{'max_episode_steps': 10}"
SAC = [f"sac.{text}" for text in ("batch_size:8", "learning_starts:5", "policy_kwargs:{'net_arch': [8]}", SHORT)]
MODIP = [
    f"modip.{text}"
    for text in (
        "batch_size:8",
        "learning_starts:5",
        "policy_kwargs:{denoiser: mlp, net_arch: {pi: [8], qf: [8]}, latent_dim: 8, num_proposals: 2}",
        "planner_kwargs:{'num_samples': 2, 'num_elites': 2, 'num_iterations': 1}",
        SHORT,
    )
]
BC = ["diffusion_bc.pretrain_steps:2", "diffusion_bc.policy_kwargs:{denoiser: mlp}"]
PARAMS = {"sac": SAC, "modip": MODIP, "diffusion_bc": BC}


def command(
    output: Path, *algos: str, timesteps: int = 40, seeds: tuple[int, ...] = (0,), more: tuple[str, ...] = ()
) -> list[str]:
    """Arguments of ``run``; ``more`` begins with further parameters."""
    params = [text for algo in algos for text in PARAMS[algo]]
    protocol = ["--timesteps", str(timesteps), "--eval-freq", "20", "--eval-episodes", "2", "--device", "cpu"]
    names = ["--envs", ENV_ID, "--algos", *algos, "--seeds", *map(str, seeds)]
    return ["run", *names, *protocol, "--output", str(output), "-P", *params, *more]


def run(*arguments: str) -> int | str | None:
    """The exit code, or the sentence, of a command."""
    try:
        main(arguments)
    except SystemExit as end:
        return end.code
    return None


def planned(arguments: list[str]) -> list[RunFolder]:
    args = make_parser().parse_args(arguments)
    args.output.mkdir(parents=True, exist_ok=True)
    return plan(args)
