"""
Videos of a saved model, an episode each.

    python -m modip_sb3.video runs/lift/modip.zip --env modip/lift-scripted-v1 --inference planner
    python -m modip_sb3.video sac.zip --algo sac --env Hopper-v5 --episodes 3
"""

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import get_args

import gymnasium as gym
from gymnasium.error import DependencyNotInstalled
from gymnasium.wrappers import RecordVideo
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnv

import modip_sb3.envs  # noqa: F401  (registers the ids)
from modip_sb3.acting import ActingMode
from modip_sb3.base import OfflineToOnlineAlgorithm
from modip_sb3.checks import check_at_least
from modip_sb3.datasets.rollout import collect, find_algorithm, load_model, load_vec_normalize


def record_videos(
    checkpoint: Path,
    env_id: str,
    folder: Path,
    algo: str = "modip_sb3.MODIP",
    inference: ActingMode | None = None,
    num_episodes: int = 1,
    deterministic: bool = False,
    seed: int = 0,
    vec_normalize: Path | None = None,
) -> list[tuple[Path, float, int]]:
    """
    Play episodes in an environment that renders, and write each as an MP4.

    :param checkpoint: What ``model.save_weights()`` wrote, or ``model.save()``: SB3 unpickles its zip files, so use
        only those of people you trust.
    :param env_id: Gymnasium id of an environment with ``render_mode="rgb_array"``.
    :param folder: Where the videos go, as ``CHECKPOINT-episode-N.mp4``.
    :param algo: Name of an algorithm of SB3 or sb3-contrib, or the dotted path of a class.
    :param inference: Who acts, "policy" or "planner", for an algorithm that has both; as it was saved by default.
    :param num_episodes: Episodes to play.
    :param deterministic: Take the most likely actions instead of sampling them.
    :param seed: Seed of the environment and of the actions.
    :param vec_normalize: Statistics of ``VecNormalize``, needed if the model was trained with it.
    :return: Path, return and length in steps of each episode.
    :raises ValueError: If the model does not fit, or has no such inference.
    """
    check_at_least(1, num_episodes=num_episodes)
    env = gym.make(env_id, render_mode="rgb_array")
    name = f"{checkpoint.stem}-{inference}" if inference else checkpoint.stem
    film = RecordVideo(env, str(folder), lambda episode: episode < num_episodes, name_prefix=name, disable_logger=True)
    vec_env: VecEnv
    with closing(make_vec_env(lambda: film)) as vec_env:
        if vec_normalize is not None:
            vec_env = load_vec_normalize(vec_normalize, vec_env)
        model = load_model(checkpoint, find_algorithm(algo), vec_env)
        if inference is not None:
            if not isinstance(model, OfflineToOnlineAlgorithm):
                raise ValueError(f"{type(model).__name__} has no inference={inference!r}; leave it out.")
            model.inference = inference
        data = collect(model, vec_env, num_episodes=num_episodes, deterministic=deterministic, seed=seed)
    paths = [folder / f"{name}-episode-{number}.mp4" for number in range(num_episodes)]
    return list(zip(paths, data.episode_returns.tolist(), data.episode_lengths.tolist(), strict=True))


def main(argv: Sequence[str] | None = None) -> int:
    """
    Record what the command line says.

    :param argv: Its arguments; those of the process by default.
    :return: The exit code: 0, or 2 after an error that the user can mend.
    """
    parser = argparse.ArgumentParser(
        "python -m modip_sb3.video", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "checkpoint", type=Path, metavar="CHECKPOINT", help="what model.save_weights() or model.save() wrote"
    )
    parser.add_argument("--env", required=True, metavar="ID", help="Gymnasium id")
    parser.add_argument(
        "--algo", default="modip_sb3.MODIP", help="name in SB3 or sb3-contrib, or a class (default: MODIP)"
    )
    parser.add_argument("--inference", choices=get_args(ActingMode), help="who acts (by default as it was saved)")
    parser.add_argument("--episodes", type=int, default=1)
    parser.add_argument("--deterministic", action="store_true", help="most likely actions instead of sampled ones")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vec-normalize", type=Path, metavar="FILE.pkl", help="if it was trained with VecNormalize")
    parser.add_argument("--output", type=Path, default=Path("videos"), metavar="FOLDER", help="(%(default)s)")
    args = parser.parse_args(argv)
    if sys.platform == "linux" and "DISPLAY" not in os.environ:
        os.environ.setdefault("MUJOCO_GL", "egl")  # MuJoCo's own default needs a screen
    try:
        videos = record_videos(
            args.checkpoint,
            args.env,
            args.output,
            args.algo,
            args.inference,
            args.episodes,
            args.deterministic,
            args.seed,
            args.vec_normalize,
        )
    except DependencyNotInstalled as error:
        sys.stderr.write(f'Videos need moviepy ({error}): run pip install "modip-sb3[video]".\n')
        return 2
    except (ValueError, OSError, ImportError, gym.error.Error) as error:
        sys.stderr.write(" ".join(str(error).split()) + "\n")
        return 2
    for path, episode_return, length in videos:
        sys.stdout.write(f"{path}: return {episode_return:g}, {length} steps\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
