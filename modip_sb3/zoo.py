"""
rl_zoo3's own scripts with the algorithms, settings and environments of this package.

    python -m modip_sb3.zoo train --algo modip --env modip/hopper-medium-v5 --eval-freq 5000
    python -m modip_sb3.zoo enjoy --algo modip --env modip/hopper-medium-v5 -f logs

``train -i FOLDER`` with the same arguments goes on exactly from the last checkpoint of a CheckpointCallback, a setting:

    -params callback:"{'modip_sb3.resume.CheckpointCallback': {'save_freq': 10000, 'folder': 'FOLDER'}}"
"""

import argparse
import importlib
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import yaml

from modip_sb3.baselines import DPPO, DQL, DSRL, IDQL, PARL, RLPD, TDMPC2, DiffusionBC
from modip_sb3.checkpoint import STATE_FILE
from modip_sb3.modip import MODIP
from modip_sb3.resume import ResumableAlgorithm, find_checkpoint

if TYPE_CHECKING:
    import optuna

# Where each script's function is; those of MODULES have none. Not here: record_training and benchmark, which start
# interpreters that do not know our algorithms, and push_to_hub, which sb3-team-hf-integration 3.2 broke.
FUNCTIONS = {
    "train": "rl_zoo3.train",
    "enjoy": "rl_zoo3.enjoy",
    "plot_train": "rl_zoo3.plots",
    "plot_from_file": "rl_zoo3.plots",
    "all_plots": "rl_zoo3.plots",
}
MODULES = ("record_video", "load_from_hub")


def convert_modip_params(sampled_params: dict[str, Any]) -> dict[str, Any]:
    """
    Settings of MODIP from what Optuna sampled.

    rl_zoo3 puts them in the place of the configured ones, ``policy_kwargs`` and ``planner_kwargs`` as a whole.

    :param sampled_params: the parameters of a trial
    :return: the keyword arguments
    """
    params = sampled_params.copy()
    params["gamma"] = 1 - params.pop("one_minus_gamma")
    params["policy_kwargs"] = {"denoiser": "mlp", "num_proposals": 2 ** params.pop("num_proposals_pow")}
    min_std = params.pop("min_std")
    params["planner_kwargs"] = {"min_std": min_std, "max_std": min_std * params.pop("std_ratio")}
    return params


def sample_modip_params(
    trial: "optuna.Trial", n_actions: int, n_envs: int, additional_args: dict[str, Any]
) -> dict[str, Any]:
    """
    The search space of ``train --optimize``.

    :param trial: what samples
    :param n_actions: dimension of the action space (unused)
    :param n_envs: number of environments (unused)
    :param additional_args: about HER (unused)
    :return: keyword arguments of MODIP
    """
    params = {
        "learning_rate": trial.suggest_float("learning_rate", 1e-4, 3e-3, log=True),
        "one_minus_gamma": trial.suggest_float("one_minus_gamma", 1e-3, 0.03, log=True),
        "n_steps": trial.suggest_int("n_steps", 1, 32, log=True),
        "tau": trial.suggest_float("tau", 2e-3, 0.08, log=True),
        "expectile": trial.suggest_float("expectile", 0.5, 0.95),
        "distill_beta": trial.suggest_float("distill_beta", 0.0, 5.0),
        "num_proposals_pow": trial.suggest_int("num_proposals_pow", 2, 6),
        "min_std": trial.suggest_float("min_std", 0.01, 0.3, log=True),
        "std_ratio": trial.suggest_float("std_ratio", 1.0, 20.0, log=True),
        "train_freq": trial.suggest_int("train_freq", 1, 8, log=True),
        "gradient_steps": trial.suggest_int("gradient_steps", 1, 4, log=True),
    }
    hyperparams = convert_modip_params(params)
    for name in ("gamma", "policy_kwargs", "planner_kwargs"):
        trial.set_user_attr(name, hyperparams[name])
    return hyperparams


def convert_tdmpc2_params(sampled_params: dict[str, Any]) -> dict[str, Any]:
    """
    Settings of TD-MPC2 from what Optuna sampled, as :func:`convert_modip_params` makes them.

    :param sampled_params: the parameters of a trial
    :return: the keyword arguments
    """
    params = sampled_params.copy()
    params["gamma"] = 1 - params.pop("one_minus_gamma")
    params["policy_kwargs"] = {"horizon": params.pop("horizon")}
    num_samples, min_std = 2 ** params.pop("num_samples_pow"), params.pop("min_std")
    params["planner_kwargs"] = {
        "num_samples": num_samples,
        "num_elites": num_samples // 8,
        "num_iterations": params.pop("num_iterations"),
        "min_std": min_std,
        "max_std": min_std * params.pop("std_ratio"),
    }
    return params


def sample_tdmpc2_params(
    trial: "optuna.Trial", n_actions: int, n_envs: int, additional_args: dict[str, Any]
) -> dict[str, Any]:
    """
    The search space of ``train --optimize``.

    :param trial: what samples
    :param n_actions: dimension of the action space (unused)
    :param n_envs: number of environments (unused)
    :param additional_args: about HER (unused)
    :return: keyword arguments of TD-MPC2
    """
    params = {
        "learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-3, log=True),
        "one_minus_gamma": trial.suggest_float("one_minus_gamma", 5e-3, 0.05, log=True),
        "tau": trial.suggest_float("tau", 2e-3, 0.05, log=True),
        "rho": trial.suggest_float("rho", 0.3, 1.0),
        "entropy_coef": trial.suggest_float("entropy_coef", 1e-5, 1e-2, log=True),
        "horizon": trial.suggest_int("horizon", 1, 5),
        "num_samples_pow": trial.suggest_int("num_samples_pow", 5, 9),
        "num_iterations": trial.suggest_int("num_iterations", 2, 8),
        "min_std": trial.suggest_float("min_std", 0.01, 0.3, log=True),
        "std_ratio": trial.suggest_float("std_ratio", 2.0, 50.0, log=True),
        "train_freq": trial.suggest_int("train_freq", 1, 8, log=True),
        "gradient_steps": trial.suggest_int("gradient_steps", 1, 4, log=True),
    }
    hyperparams = convert_tdmpc2_params(params)
    for name in ("gamma", "policy_kwargs", "planner_kwargs"):
        trial.set_user_attr(name, hyperparams[name])
    return hyperparams


def register() -> None:
    """Add our algorithms to rl_zoo3's registries."""
    algorithms = _import("rl_zoo3").ALGOS
    algorithms.update(modip=MODIP, tdmpc2=TDMPC2, rlpd=RLPD, diffusion_bc=DiffusionBC)
    algorithms.update(dql=DQL, idql=IDQL, pa_rl=PARL, dsrl=DSRL, dppo=DPPO)
    hyperparams_opt = _import("rl_zoo3.hyperparams_opt")
    hyperparams_opt.HYPERPARAMS_SAMPLER.update(modip=sample_modip_params, tdmpc2=sample_tdmpc2_params)
    hyperparams_opt.HYPERPARAMS_CONVERTER.update(modip=convert_modip_params, tdmpc2=convert_tdmpc2_params)


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        sys.exit(f'{name} cannot be imported ({error}): run pip install "modip-sb3[zoo]".')


def find_config(algo: str | None) -> Path | None:
    """
    :param algo: name of an algorithm
    :return: our settings for it, from the installed package or from the repository, or None if there are none
    """
    package = Path(__file__).parent
    paths = [folder / "zoo_configs" / f"{algo}.yml" for folder in (package, package.parent)]
    return next((path for path in paths if path.is_file()), None)


def with_config(arguments: Sequence[str]) -> list[str]:
    """
    :param arguments: of ``train``
    :return: with our settings for the algorithm, unless a file of settings was given or ours leave the id to rl_zoo3's
    """
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--algo")
    parser.add_argument("--env")
    parser.add_argument("-conf", "--conf-file")
    given, _ = parser.parse_known_args(arguments)
    config = find_config(given.algo) if given.conf_file is None else None
    if config is None or not {given.env, "default"} & yaml.safe_load(config.read_text()).keys():
        return list(arguments)
    return [*arguments, "--conf-file", str(config)]


def with_checkpoint(arguments: Sequence[str]) -> list[str]:
    """
    Let ``-i`` take the folder of a CheckpointCallback too, beside the file of a model.

    :param arguments: of ``train``
    :return: with the checkpoint's file in the folder's place, for which rl_zoo3 calls ``load()`` of the algorithm that
        is now registered
    """
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--algo")
    parser.add_argument("-i", "--trained-agent", default="")
    given, rest = parser.parse_known_args(arguments)
    if not Path(given.trained_agent).is_dir() or not given.trained_agent:
        return list(arguments)
    algorithms, checkpoint = _import("rl_zoo3").ALGOS, find_checkpoint(given.trained_agent)
    if checkpoint is None or not issubclass(algorithms.get(given.algo, object), ResumableAlgorithm):
        sys.exit(f"-i {given.trained_agent}: expected a complete checkpoint in it, and --algo of this package.")
    algorithms[given.algo] = _resuming(algorithms[given.algo], given.trained_agent)
    return ["--algo", given.algo, *rest, "-i", str(checkpoint / STATE_FILE)]


def _resuming(algorithm: Any, folder: str) -> type:
    def load(
        cls: type, path: str, env: Any, device: str, tensorboard_log: str | None, verbose: int, **settings: Any
    ) -> Any:
        """Settings are those of the checkpoint."""
        model = algorithm.resume(folder, env, device)
        model.tensorboard_log, model.verbose = tensorboard_log, verbose
        return model

    return type(algorithm.__name__, (algorithm,), {"load": classmethod(load)})


def main(argv: Sequence[str] | None = None) -> None:
    """
    Run a script of rl_zoo3.

    :param argv: its name and its arguments; the command line's by default
    """
    parser = argparse.ArgumentParser(
        prog="python -m modip_sb3.zoo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("script", choices=[*FUNCTIONS, *MODULES], help="followed by its own arguments, or by --help")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    script, arguments = args.script, args.arguments
    register()
    if script == "train":
        arguments = with_config(with_checkpoint(arguments))
    elif FUNCTIONS.get(script) == "rl_zoo3.plots":  # they look for an id in the folders' names, which have no slash
        arguments = [text.replace("/", "-") if text in gym.registry else text for text in arguments]
    sys.argv = [f"{parser.prog} {script}", *arguments]
    try:
        if script in FUNCTIONS:
            getattr(_import(FUNCTIONS[script]), script)()
        else:
            runpy.run_module(f"rl_zoo3.{script}", run_name="__main__")
    except AttributeError as error:
        if error.name == "pbar" and error.__context__ is not None:  # with --progress, rl_zoo3 hides what stopped it
            raise error.__context__ from None
        raise


if __name__ == "__main__":
    main()
