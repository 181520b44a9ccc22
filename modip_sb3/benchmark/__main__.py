"""
Algorithms side by side: the same environments, budget, evaluations and offline data for all.

    python -m modip_sb3.benchmark run --suite hopper --algos diffusion_bc sac modip --seeds 0 1 2 --output runs/bench
    python -m modip_sb3.benchmark report runs/bench
    python -m modip_sb3.benchmark speed

``run`` goes on where it was stopped or killed when it is called again, and never repeats a finished run.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from modip_sb3.benchmark.plan import plan
from modip_sb3.benchmark.runs import locked
from modip_sb3.benchmark.settings import SUITES, share_threads


def main(argv: Sequence[str] | None = None) -> None:
    """
    :param argv: of the command line
    :raises SystemExit: with 1 if a run failed, with a sentence if the command or the folder is at fault
    """
    args = make_parser().parse_args(argv)
    try:
        sys.exit(args.command(args))
    except (ValueError, FileNotFoundError, ConnectionError, ImportError) as error:
        sys.exit(str(error))


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m modip_sb3.benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    _add_run(commands)
    _add_report(commands)
    _add_speed(commands)
    return parser


def _add_run(commands: Any) -> None:
    run = commands.add_parser("run", help="run algorithms side by side")
    run.set_defaults(command=run_benchmark)
    envs = run.add_mutually_exclusive_group(required=True)
    envs.add_argument("--suite", choices=SUITES, help="a named list of environments")
    envs.add_argument("--envs", nargs="+", help="Gymnasium ids")
    run.add_argument(
        "--algos",
        nargs="+",
        required=True,
        help="names in rl_zoo3, ours included; algo@label is a variant, which -P sets",
    )
    run.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    run.add_argument("--timesteps", type=int, required=True, help="environment steps of each run")
    run.add_argument("--output", type=Path, required=True, help="folder of the runs")
    run.add_argument("--eval-freq", type=int, default=2500, help="environment steps between evaluations")
    run.add_argument("--eval-episodes", type=int, default=20)
    run.add_argument("--eval-seed", type=int, default=1000, help="of the evaluations' first states")
    run.add_argument(
        "--eval-actions",
        choices=("default", "deterministic", "sampled"),
        default="default",
        help="by default diffusion policies sample, and all others act deterministically",
    )
    run.add_argument("--offline-dataset", help="instead of the data that MODIP's settings name; 'none' for none")
    run.add_argument(
        "-P",
        "--param",
        nargs="+",
        action="extend",
        default=[],
        metavar="ALGO.PARAM:VALUE",
        help="hyper-parameters",
    )
    run.add_argument("--start-from", type=Path, metavar="RUNS", help="diffusion policies: from its diffusion_bc runs")
    run.add_argument("--device", default="auto")
    run.add_argument("--workers", type=int, default=1, help="runs at a time; each gets its share of the cores")
    run.add_argument("--backend", choices=("local", "ray"), default="local")


def _add_report(commands: Any) -> None:
    report = commands.add_parser("report", help="tables and figures from the folders of the runs")
    report.set_defaults(command=write_report)
    report.add_argument("runs", type=Path, help="folder of the runs")
    report.add_argument("--out", type=Path, help="folder of the report; RUNS/report by default")
    report.add_argument(
        "--baseline",
        nargs="+",
        action="extend",
        default=[],
        metavar="ROW",
        help="whom every other row is compared with: diffusion_bc, 'modip (policy)' ...",
    )
    report.add_argument("--timesteps", type=int, help="compare after so many environment steps, of longer runs too")


def _add_speed(commands: Any) -> None:
    speed = commands.add_parser("speed", help="how fast the code is, as ratios measured in turns")
    speed.set_defaults(command=measure_speed)
    speed.add_argument("--rows", nargs="+", metavar="ROW", help="P1 to P10; by default all but the demo, P9")
    speed.add_argument("--before", type=Path, metavar="CHECKOUT", help="older checkout that P9 and P10 compare with")
    speed.add_argument("--repeats", type=int, default=9, help="measurements of each function")
    speed.add_argument("--threads", type=int, default=2)
    speed.add_argument("--device", default="cpu")
    speed.add_argument("--output", type=Path, help="folder for speed.json")


def run_benchmark(args: argparse.Namespace) -> int:
    """
    :param args: of ``run``
    :return: exit code, 1 if a run failed
    """
    from modip_sb3.benchmark.schedule import Backend, LocalBackend, RayBackend, run_all

    console = Console()
    args.output.mkdir(parents=True, exist_ok=True)
    with locked(args.output, wait=False):
        runs = plan(args)
        threads = share_threads(args.workers)
        backend: Backend = (
            RayBackend(args.workers, threads, args.device)
            if args.backend == "ray"
            else LocalBackend(args.workers, threads)
        )
        try:
            failed = run_all(runs, backend, console)
        except KeyboardInterrupt:
            console.print("Stopped; the same command goes on from here.")
            return 130
    for run in failed:
        console.print(f"[red]{run.name} failed[/]: {run.read_status()['error']} ({run.path / 'traceback.txt'})")
    return int(bool(failed))


def write_report(args: argparse.Namespace) -> int:
    """
    :param args: of ``report``
    :return: exit code
    """
    from modip_sb3.benchmark.report import write

    write(args.runs, args.out or args.runs / "report", args.baseline, args.timesteps)
    return 0


def measure_speed(args: argparse.Namespace) -> int:
    """
    :param args: of ``speed``
    :return: exit code
    :raises ValueError: if there is no such row or checkout
    """
    import torch as th

    from modip_sb3.benchmark.speed.report import choose, measure
    from modip_sb3.benchmark.speed.timing import Clock

    rows = choose(args.rows, args.before)
    th.set_num_threads(args.threads)
    measure(rows, Clock(args.device, args.repeats), args.output, Console())
    return 0


if __name__ == "__main__":
    main()
