"""Videos of saved models, from the command line."""

from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3 import SAC
from walk import Walk

from modip_sb3 import video

ENV_ID = "Filmed-v0"
imageio = pytest.importorskip("imageio.v3", reason='needs pip install "modip-sb3[video]"')


class Filmed(Walk):
    """Every picture is brighter than the one before."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(self, render_mode: str | None = None) -> None:
        super().__init__()
        self.render_mode = render_mode

    def render(self) -> np.ndarray:  # type: ignore[override]
        return np.full((32, 32, 3), 250 - 20 * self.steps_left, np.uint8)


gym.register(ENV_ID, Filmed, max_episode_steps=5)


@pytest.mark.parametrize("inference", [(), ("--inference", "planner")])
def test_an_episode_each(make_model, tmp_path: Path, capsys, inference: tuple[str, ...]) -> None:
    make_model(ENV_ID).save(tmp_path / "model")
    command = [str(tmp_path / "model.zip"), "--env", ENV_ID, "--episodes", "2", "--output", str(tmp_path / "out")]
    assert video.main([*command, *inference]) == 0
    printed = capsys.readouterr().out.splitlines()
    name = "model-planner" if inference else "model"
    for number, line in enumerate(printed):
        path = tmp_path / "out" / f"{name}-episode-{number}.mp4"
        assert line.startswith(f"{path}: return ") and line.endswith(" steps")
        frames = imageio.imread(path)
        assert len(frames) == int(line.split()[-2]) + 1  # the first picture is of the reset
        assert frames[-1].mean() > frames[0].mean() + 20
    assert len(printed) == len(list((tmp_path / "out").iterdir())) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing.zip"], "Checkpoint nothing.zip: no such file"),
        (["sac.zip", "--algo", "sac", "--inference", "planner"], "SAC has no inference='planner'; leave it out."),
        (["sac.zip", "--algo", "sac", "--episodes", "0"], "num_episodes=0"),
        (["sac.zip", "--algo", "sack"], "Algorithm sack: unknown"),
        (["sac.zip", "--algo", "sac", "--env", "Nowhere-v0"], "Nowhere"),
    ],
)
def test_errors(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    SAC("MlpPolicy", ENV_ID, buffer_size=10).save("sac")
    assert video.main(["--env", ENV_ID, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
