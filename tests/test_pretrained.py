"""A diffusion policy that was cloned once and is fine-tuned by several algorithms."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from conftest import SMALL_POLICY
from stable_baselines3 import SAC
from walk import Walk, assert_same, observations, parameters, record_walk

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


def test_the_policy_is_cloned_anew(cloned: DiffusionBC, capfd: pytest.CaptureFixture[str]) -> None:
    settings = {"offline_dataset": record_walk(), "pretrain_steps": 0, "train_freq": 1, "learning_starts": 0}
    model = start(cloned, actor_reset_freq=4, actor_reset_steps=3, **settings).learn(4, progress_bar=True)
    other = start(cloned, **settings).learn(4)
    assert "cloning anew" in capfd.readouterr().out
    assert (model._n_updates, model.policy.num_actor_updates, other.policy.num_actor_updates) == (4, 3 + 1, 5 + 4)
    assert {state["step"].item() for state in model.actor_optimizer.state.values()} == {3 + 1}
    for network in ("actor", "actor_ema"):
        layers = [name for name, value in parameters(cloned).items() if name.startswith(network) and value.ndim == 2]
        was, goes_on, anew = ([parameters(each)[name] for name in layers] for each in (cloned, other, model))
        assert max((a - b).abs().max() for a, b in zip(was, goes_on, strict=True)) < 0.01  # of steps of .001
        assert min((a - b).abs().max() for a, b in zip(was, anew, strict=True)) > 0.03
    model.learn(1, reset_num_timesteps=False)
    assert model.policy.num_actor_updates == 3 + 2


@pytest.mark.parametrize("source", ["relabel", "both"])
def test_the_planners_labels_are_cloned_anew_from_the_first_update(cloned: DiffusionBC, source: str) -> None:
    lengths = {"horizon": cloned.policy.action_horizon}
    model = start(
        cloned, policy_kwargs=lengths, distill_from=source, actor_reset_freq=1, actor_reset_steps=2, train_freq=1
    )
    model.learn(model.learning_starts + 2)
    assert (model._n_updates, model.policy.num_actor_updates) == (2, 2 + 1)


def learned_by(model: MODIP) -> dict[str, th.Tensor]:
    """What the policy's optimiser remembers."""
    states = model.actor_optimizer.state_dict()["state"]
    return {f"{index} {name}": value for index, state in states.items() for name, value in state.items()}


def test_a_cloning_cut_short_leaves_the_policy_as_it_was(cloned: DiffusionBC) -> None:
    model = start(cloned, offline_dataset=record_walk(), pretrain_steps=3).learn(12)
    before = deepcopy((parameters(model), learned_by(model)))
    updates = iter([True, True])

    def update() -> dict[str, th.Tensor]:
        if next(updates, False):
            return model._distill()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model._clone_anew(5, update)
    assert_same(before[0], parameters(model))
    assert_same(before[1], learned_by(model))


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
