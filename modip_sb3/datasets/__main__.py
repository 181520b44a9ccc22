"""
Look at offline data, collect it from a checkpoint, and convert it between formats.

    python -m modip_sb3.datasets inspect mujoco/hopper/medium-v0 --plot hopper.png
    python -m modip_sb3.datasets collect sac.zip --algo sac --env Hopper-v5 --dataset-id me/hopper/mine-v0
    python -m modip_sb3.datasets convert me/hopper/mine-v0 hopper.hdf5 --top-fraction 0.5
"""

import argparse
import ast
import inspect
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
from minari.dataset.minari_dataset import DATASET_ID_RE
from rich.console import Console
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnv

from modip_sb3.checks import check_count
from modip_sb3.datasets.d4rl import save_d4rl
from modip_sb3.datasets.minari_io import new_minari_folder, save_minari
from modip_sb3.datasets.offline import OfflineDataset
from modip_sb3.datasets.report import check_matplotlib, plot_dataset, summary_table
from modip_sb3.datasets.robomimic import save_robomimic
from modip_sb3.datasets.rollout import collect, find_algorithm, load_model, load_vec_normalize
from modip_sb3.datasets.summary import make_env, named_env, summarize

_PROG = "python -m modip_sb3.datasets"
_SOURCE_OPTIONS = ("top_fraction", "min_return", "obs_keys", "filter_key")


def inspect_command(args: argparse.Namespace) -> None:
    """
    Show what a dataset holds, as a table and as a picture; also one that is damaged by NaN.

    example: %(prog)s mujoco/hopper/medium-v0 --plot hopper.png
    """
    if args.plot is not None:
        check_matplotlib()
    dataset = _load(args)
    _show(dataset, args.env)
    if args.plot is not None:
        plot_dataset(dataset, args.plot)
        Console().print(f"plot: {args.plot}", soft_wrap=True)


def collect_command(args: argparse.Namespace) -> None:
    """
    Roll out a checkpoint of SB3 or sb3-contrib into a Minari dataset of whole episodes.

    SB3 unpickles zip files and statistics, which can run any code: load only what comes from people you trust. Files of
    save_weights() are not unpickled.

    example: %(prog)s sac.zip --algo sac --env Hopper-v5 --dataset-id me/hopper/mine-v0 --steps 100000
    """
    check_count(1, n_envs=args.n_envs)
    new_minari_folder(args.dataset_id, args.path)
    algorithm = find_algorithm(args.algo)
    env_kwargs = dict(args.env_kwargs)
    with closing(make_env(args.env, **env_kwargs)) as env:
        vec_env: VecEnv
        with closing(make_vec_env(args.env, args.n_envs, env_kwargs=env_kwargs)) as vec_env:
            if args.vec_normalize is not None:
                vec_env = load_vec_normalize(args.vec_normalize, vec_env)
            model = load_model(args.checkpoint, algorithm, vec_env)
            num_steps = args.steps if args.episodes is None else None
            dataset = collect(
                model, vec_env, num_steps, args.episodes, args.deterministic, args.seed, progress_bar=True
            )
        how = f"deterministic={args.deterministic}, n_envs={args.n_envs}, seed={args.seed}"
        description = f"Rollouts of {Path(args.checkpoint).name} ({how})."
        metadata = {"algorithm_name": algorithm.__name__, "description": description}
        folder = save_minari(dataset, args.dataset_id, env, args.path, **metadata)
        _show(replace(dataset, source=str(folder)), env)


def convert_command(args: argparse.Namespace) -> None:
    """
    Write a dataset in another format. What is there is not replaced.

    example: %(prog)s me/hopper/mine-v0 hopper.hdf5 --top-fraction 0.5
    """
    target, form = args.target, args.format or _format_of(args.target)
    if form == "minari":
        new_minari_folder(target, args.path)
    elif Path(target).expanduser().exists():
        raise FileExistsError(f"{target} exists and is not replaced; choose another path, or remove it first.")
    dataset = _load(args)
    if args.env is not None:
        dataset = replace(dataset, env_id=args.env)
    if form == "minari":
        with closing(named_env(dataset) if args.env is None else make_env(args.env)) as env:
            written = save_minari(dataset, target, env, args.path)
    else:
        written = {"d4rl": save_d4rl, "robomimic": save_robomimic}[form](dataset, target)
    sizes = f"{dataset.num_transitions:,} transitions, {dataset.num_episodes:,} episodes"
    Console().print(f"{written}: {sizes}", soft_wrap=True, markup=False)


def _load(args: argparse.Namespace) -> OfflineDataset:
    options = {name: getattr(args, name) for name in _SOURCE_OPTIONS if getattr(args, name) is not None}
    return OfflineDataset.load({"dataset": args.source, **options} if options else args.source)


def _show(dataset: OfflineDataset, env: str | gym.Env | None) -> None:
    Console().print(summary_table(summarize(dataset, env)))


def _format_of(target: str) -> str:
    if Path(target).suffix.lower() in (".hdf5", ".h5"):
        return "d4rl"
    if DATASET_ID_RE.fullmatch(target) is not None:
        return "minari"
    raise ValueError(f"{target}: neither a Minari id like 'me/hopper/mine-v0' nor an .hdf5 path; pass --format.")


# ------------------------------------------------------------------ arguments


def _env_kwarg(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    if not name.isidentifier() or not value:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form name=value")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value  # plain text


def _add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="Minari id or folder, or an HDF5 file of D4RL or robomimic")
    options = parser.add_argument_group("what to take of it")
    options.add_argument("--top-fraction", type=float, metavar="F", help="only this share of the episodes, the best")
    options.add_argument("--min-return", type=float, metavar="R", help="only episodes with at least this return")
    options.add_argument(
        "--obs-keys", nargs="+", metavar="KEY", help="robomimic, Minari: vectors to take, side by side"
    )
    options.add_argument("--filter-key", metavar="NAME", help="robomimic: only the episodes of mask/NAME")


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    _add_source(parser)
    parser.add_argument("--env", metavar="ID", help="its environment, if the data names none")
    parser.add_argument("--plot", metavar="FILE.png", help="also draw returns, lengths and actions")


def _add_collect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="what model.save() or model.save_weights() wrote")
    parser.add_argument(
        "--algo", required=True, help="algorithm of SB3 or sb3-contrib, such as sac, or a class such as modip_sb3.MODIP"
    )
    parser.add_argument("--env", required=True, metavar="ID", help="Gymnasium id; module:id imports the module first")
    parser.add_argument("--dataset-id", required=True, metavar="ID", help="Minari id to write, like me/hopper/mine-v0")
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument(
        "--steps", type=int, default=10_000, help="transitions to record, to the end of the last episode (%(default)s)"
    )
    amount.add_argument("--episodes", type=int, help="episodes to record instead")
    parser.add_argument("--deterministic", action="store_true", help="most likely actions instead of sampled ones")
    parser.add_argument("--n-envs", type=int, default=1, help="environments side by side (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of environments and actions (%(default)s)")
    parser.add_argument(
        "--vec-normalize", metavar="FILE.pkl", help="statistics, needed if the model was trained with VecNormalize"
    )
    parser.add_argument("--path", metavar="FOLDER", help="folder of Minari datasets (MINARI_DATASETS_PATH)")
    parser.add_argument(
        "--env-kwargs",
        nargs="+",
        action="extend",
        default=[],
        type=_env_kwarg,
        metavar="NAME=VALUE",
        help="of the environment",
    )


def _add_convert(parser: argparse.ArgumentParser) -> None:
    _add_source(parser)
    parser.add_argument("target", metavar="TARGET", help="Minari id or HDF5 file to write, which must not exist")
    parser.add_argument(
        "--format",
        choices=["minari", "d4rl", "robomimic"],
        help="by default minari for an id, d4rl for an .hdf5 file",
    )
    parser.add_argument("--env", metavar="ID", help="its environment, if the data names none or another")
    parser.add_argument("--path", metavar="FOLDER", help="folder of Minari datasets (MINARI_DATASETS_PATH)")


def build_parser() -> argparse.ArgumentParser:
    """
    Describe the commands, each by its function's docstring.

    :return: The parser of all three.
    """
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(_PROG, description=__doc__, formatter_class=layout)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, add_arguments, run in (
        ("inspect", _add_inspect, inspect_command),
        ("collect", _add_collect, collect_command),
        ("convert", _add_convert, convert_command),
    ):
        text = str(inspect.getdoc(run))
        command = commands.add_parser(name, help=text.splitlines()[0], description=text, formatter_class=layout)
        add_arguments(command)
        command.set_defaults(run=run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run a command.

    :param argv: Its arguments; those of the process by default.
    :return: The exit code: 0, 2 after an error that the user can mend, or 130 after Ctrl-C.
    """
    args = build_parser().parse_args(argv)
    try:
        args.run(args)
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted: nothing was written.\n")
        return 130
    except (ValueError, OSError, ImportError) as error:
        sys.stderr.write(" ".join(str(error).split()) + "\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
