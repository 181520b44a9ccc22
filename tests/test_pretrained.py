"""A diffusion policy that was cloned once and is fine-tuned by several algorithms."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from conftest import SMALL_POLICY
from stable_baselines3 import SAC
from walk import Walk, observations, parameters, record_walk

from modip_sb3 import MODIP
from modip_sb3.baselines import TDMPC2, DiffusionBC

ACTOR = {name: SMALL_POLICY[name] for name in ("denoiser", "num_inference_steps")} | {"net_arch": [24]}
SMALL = {"latent_dim": 8, "num_proposals": 2, "net_arch": {"qf": [8]}}


@pytest.fixture
def cloned() -> DiffusionBC:
    model = DiffusionBC("MlpPolicy", Walk(), batch_size=8, offline_dataset=record_walk(), policy_kwargs=ACTOR, seed=0)
    return model.pretrain(5)


def start(model: Any, **kwargs: Any) -> MODIP:
    policy_kwargs = SMALL | kwargs.pop("policy_kwargs", {})
    return MODIP.from_pretrained(model, batch_size=8, policy_kwargs=policy_kwargs, **kwargs)


def actions_of(model: Any) -> np.ndarray:
    return model.predict(observations(model), deterministic=True)[0]


def test_the_policy_acts_as_before(cloned: DiffusionBC, tmp_path: Path) -> None:
    model = start(cloned)
    np.testing.assert_array_equal(actions_of(model), actions_of(cloned))
    assert model.policy.net_arch == {"pi": [24], "qf": [8]}
    assert model.policy.normalizer.count == cloned.policy.normalizer.count > 0
    model.save(tmp_path / "model")
    loaded = MODIP.load(tmp_path / "model", env=Walk())
    np.testing.assert_array_equal(actions_of(loaded), actions_of(cloned))
    again = DiffusionBC.from_pretrained(loaded, offline_dataset=record_walk())
    np.testing.assert_array_equal(actions_of(again), actions_of(cloned))


@pytest.mark.parametrize("data", [True, False])
def test_learning_goes_on_from_it(cloned: DiffusionBC, data: bool) -> None:
    before = parameters(cloned)
    model = start(cloned, offline_dataset=record_walk() if data else None, pretrain_steps=3, learning_starts=10)
    model.learn(12)
    assert model._n_pretrain_updates == (3 if data else 0)
    after = parameters(model)
    for name in ("normalizer.mean", "normalizer.count"):  # what the actor has learned to see
        assert th.equal(after[name], before[name])
    assert any(not th.equal(after[name], before[name]) for name in before if name.startswith("actor_ema."))


@pytest.mark.parametrize("schedule", [1e-3, lambda progress: 2e-3 * progress - 1e-3])
def test_the_policys_rate_falls_with_its_updates(cloned: DiffusionBC, schedule: Any, tmp_path: Path) -> None:
    model = start(cloned, offline_dataset=record_walk(), learning_rate=schedule, actor_decay_start=2, pretrain_steps=3)
    others = [model.model_optimizer, model.value_optimizer]
    model.pretrain(3)  # 5 updates before, so that the last is the eighth
    assert model.actor_optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * (7 / 2) ** -0.5)
    rates = [group["lr"] for optimizer in others for group in optimizer.param_groups]
    assert rates == pytest.approx([3e-4, 1e-3, 1e-3])
    assert cloned.actor_optimizer.param_groups[0]["lr"] == 1e-3  # it has not begun to fall
    model.save(tmp_path / "model")
    model = MODIP.load(tmp_path / "model", env=Walk(), offline_dataset=record_walk())
    model.pretrain(1)
    assert model.policy.num_actor_updates == 9
    assert model.actor_optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * (8 / 2) ** -0.5)


def test_it_acts_from_the_first_step(cloned: DiffusionBC) -> None:
    model = start(cloned, rollout_with="policy", learning_starts=1_000, train_freq=1)
    model.learn(1)
    assert model._chunk_state is not None and model._chunk_state[1].item() == 1  # one action of a chunk is executed


def test_how_it_acts_may_be_chosen_anew(cloned: DiffusionBC) -> None:
    model = start(
        cloned, policy_kwargs={"n_action_steps": 2, "num_inference_steps": 3, "sample_scheduler": "DDPMScheduler"}
    )
    assert (model.policy.n_action_steps, model.policy.actor.num_inference_steps) == (2, 3)


@pytest.mark.parametrize(
    ("kwargs", "sentence"),
    [
        ({"policy_kwargs": {"denoiser": "unet"}}, "denoiser='unet', but the diffusion policy was trained with 'mlp'"),
        (
            {"policy_kwargs": {"action_horizon": 2, "horizon": 2}},
            "action_horizon=2, but .* trained with 4: leave it out",
        ),
        ({"env": Walk("dict")}, "The diffusion policy is for the observation_space Box"),
        ({"policy_kwargs": {"terminal_value": "q"}}, "does not fit MODIP .* such as terminal_value='q'"),
    ],
    ids=["denoiser", "chunk", "spaces", "input"],
)
def test_what_does_not_fit_is_told(cloned: DiffusionBC, kwargs: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        start(cloned, **kwargs)


def test_only_a_diffusion_policy_can_be_given() -> None:
    with pytest.raises(ValueError, match="SAC has a SACPolicy, expected an algorithm with a diffusion policy"):
        start(SAC("MlpPolicy", Walk(), buffer_size=10))
    assert not hasattr(TDMPC2, "from_pretrained")
