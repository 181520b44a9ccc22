"""What several test files share: a MODIP small enough to learn in a second, three episodes, a Minari folder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch as th
from episodes import make_arrays
from hypothesis import HealthCheck, settings

from modip_sb3 import MODIP

SMALL_POLICY = {
    "denoiser": "mlp",
    "net_arch": {"pi": [16], "qf": [16]},
    "latent_dim": 16,
    "num_proposals": 4,
    "num_inference_steps": 2,
}
SMALL_PLANNER = {"num_samples": 4, "num_elites": 2, "num_iterations": 1}

# Of generated input, the same few examples in every run; --hypothesis-profile=full tries over a thousand others
settings.register_profile(
    "quick", max_examples=8, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
)
settings.register_profile("full", settings.get_profile("quick"), max_examples=80, derandomize=False)
settings.load_profile("quick")


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    th.set_num_threads(1)


@pytest.fixture
def make_model() -> Callable[..., MODIP]:
    """``MODIP`` with tiny networks; arguments and single entries of the nested ones can be given."""

    def make(env: Any = "Pendulum-v1", policy: str = "MlpPolicy", **kwargs: Any) -> MODIP:
        settings = {
            "batch_size": 8,
            "distill_batch_size": 8,
            "train_freq": 1,
            "learning_starts": 10,
            "pretrain_steps": 5,
            "buffer_size": 1000,
            "seed": 0,
        }
        kwargs["policy_kwargs"] = SMALL_POLICY | kwargs.get("policy_kwargs", {})
        kwargs["planner_kwargs"] = SMALL_PLANNER | kwargs.get("planner_kwargs", {})
        return MODIP(policy, env, **(settings | kwargs))

    return make


@pytest.fixture
def arrays() -> dict[str, Any]:
    """Three episodes, of which the first terminated."""
    return make_arrays()


@pytest.fixture
def minari_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of Minari datasets."""
    root = tmp_path / "minari"
    root.mkdir()
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(root))
    return root
