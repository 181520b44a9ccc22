"""DPPO: chains and their likelihoods, what a rollout keeps, and that returns rise."""

from typing import Any

import numpy as np
import pytest
import torch as th
from algorithms import make
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.utils import LinearSchedule
from walk import Walk, record_walk, vec_walk

from modip_sb3.baselines import DPPO

ACTOR = {"denoiser": "mlp", "net_arch": [16], "num_inference_steps": 3}


def chain_of(model: DPPO, num: int = 5, std: float = 0.1) -> tuple[th.Tensor, th.Tensor]:
    condition = th.randn(num, 2)
    noise = th.randn(num, *model.policy.chunk_shape)
    return model.policy.sample_chain(condition, noise, std), condition


# ------------------------------------------------------------------ chains


@pytest.mark.parametrize("num_finetuned_steps", [None, 1, 2])
def test_a_chain_without_noise_is_a_sample(num_finetuned_steps: int | None) -> None:
    model = make("DPPO", policy_kwargs=ACTOR | {"num_finetuned_steps": num_finetuned_steps})
    condition, noise = th.randn(5, 2), th.randn(5, 4, 1)
    chain = model.policy.sample_chain(condition, noise, std=0.0)
    assert chain.shape == (5, (num_finetuned_steps or 3) + 1, 4, 1)
    th.testing.assert_close(chain[:, -1].clamp(-1, 1), model.policy.actor_ema.sample(condition, noise))


def test_only_the_last_steps_are_fine_tuned() -> None:
    model = make("DPPO", policy_kwargs=ACTOR | {"num_finetuned_steps": 1})
    condition, noise = th.randn(5, 2), th.randn(5, 4, 1)
    before = model.policy.sample_chain(condition, noise, std=0.0)
    for parameter in model.policy.actor_ema.parameters():
        parameter.data += 0.1
    after = model.policy.sample_chain(condition, noise, std=0.0)
    assert th.equal(before[:, 0], after[:, 0]) and not th.equal(before[:, 1], after[:, 1])


def test_likelihoods_by_hand() -> None:
    """Results that lie one and two standard deviations from the steps' means, and ten, which is clipped."""
    model = make("DPPO", policy_kwargs=ACTOR | {"min_std": 0.1})
    chain, condition = chain_of(model, std=0.0)  # the means themselves
    at_mean = -np.log(0.1) - 0.5 * np.log(2 * np.pi)
    found = model.policy.log_prob(model.policy.actor_ema, chain, condition)
    np.testing.assert_allclose(found.detach(), at_mean, rtol=1e-4)
    for distance, expected in ((1, at_mean - 0.5), (2, at_mean - 2.0), (10, -5.0)):
        moved = chain.clone()
        moved[:, -1] += 0.1 * distance
        last = model.policy.log_prob(model.policy.actor_ema, moved, condition)[:, -1]
        np.testing.assert_allclose(last.detach(), expected, rtol=1e-3)


def test_what_is_not_executed_does_not_count() -> None:
    model = make("DPPO", policy_kwargs=ACTOR | {"n_action_steps": 2})
    chain, condition = chain_of(model)
    moved = chain.clone()
    moved[:, -1, 2:] += 1.0
    policy = model.policy
    assert th.equal(policy.log_prob(policy.actor, chain, condition), policy.log_prob(policy.actor, moved, condition))


# ------------------------------------------------------------------ the clipped objective


def begin(model: DPPO, rate: float) -> None:
    for optimizer in model._optimizers:
        model._set_learning_rate(optimizer, rate)
    model.policy.actor.load_state_dict(model.policy.actor_ema.state_dict())


def test_chains_of_high_advantage_become_likelier() -> None:
    model = make("DPPO", clip_range=0.5, clip_range_base=0.5, policy_kwargs=ACTOR)
    begin(model, 1e-3)
    th.manual_seed(0)
    chain, condition = chain_of(model, 64)
    advantages = chain[:, -1, 0, 0].clone()  # the larger the first action, the better
    before = model.policy.log_prob(model.policy.actor, chain, condition)
    metrics = [model._update_chains(chain, condition, advantages) for _ in range(20)]
    change = (model.policy.log_prob(model.policy.actor, chain, condition) - before).detach()[:, -1]
    good = advantages > advantages.mean()
    assert change[good].mean() > change[~good].mean()
    assert metrics[0]["approx_kl"] == pytest.approx(0.0, abs=1e-6) and metrics[0]["clip_fraction"] == 0
    assert metrics[-1]["approx_kl"] > 0


def test_the_loss_by_hand() -> None:
    """Ratios of one: the loss is the mean of the discounted advantages, with the sign of a loss."""
    model = make("DPPO", gamma_denoising=0.5, policy_kwargs=ACTOR)
    begin(model, 0.0)
    chain, condition = chain_of(model, 1)
    # A single advantage is not normalised: 2 in the last of three steps, 1 and 1/2 before
    loss = model._update_chains(chain, condition, th.tensor([2.0]))["actor_loss"]
    assert loss.item() == pytest.approx(-(2.0 + 1.0 + 0.5) / 3)


def test_early_steps_are_clipped_earlier() -> None:
    """Everything moves by much the same ratio, which is beyond the first step's range and within the last one's."""
    model = make("DPPO", clip_range=1.0, clip_range_base=0.0, policy_kwargs=ACTOR)
    begin(model, 0.0)
    chain, condition = chain_of(model, 32)
    for parameter in model.policy.actor.parameters():
        parameter.data += 1e-3
    fraction = model._update_chains(chain, condition, th.randn(32))["clip_fraction"].item()
    assert 1 / 3 <= fraction < 1


def test_the_clip_range_may_be_a_schedule() -> None:
    model = make("DPPO", clip_range=LinearSchedule(100.0, 0.0, 1.0), clip_range_base=0.0, policy_kwargs=ACTOR)
    begin(model, 0.0)
    chain, condition = chain_of(model, 32)
    for parameter in model.policy.actor.parameters():
        parameter.data += 1e-3
    fractions = []
    for progress_remaining in (1.0, 0.0):  # at first the last two of three steps are free, at the end none is
        model._current_progress_remaining = progress_remaining
        fractions.append(model._update_chains(chain, condition, th.randn(32))["clip_fraction"].item())
    assert fractions == [pytest.approx(1 / 3), 1.0]


def test_epochs_end_where_the_policy_has_gone_too_far(monkeypatch: pytest.MonkeyPatch) -> None:
    for target, expected in ((None, 4), (0.01, 1)):
        model = make("DPPO", train_freq=8, n_epochs=4, target_kl=target)
        calls: list[int] = []

        def update(batch: Any, calls: list[int] = calls) -> dict[str, th.Tensor]:
            calls.append(1)
            return {"approx_kl": th.tensor(0.02)}

        monkeypatch.setattr(model, "_update_from_rollout", update)
        model.learn(8)
        assert len(calls) == expected


# ------------------------------------------------------------------ rollouts


class Rollouts(BaseCallback):
    """What was kept of each rollout, before it is learned from."""

    def _on_training_start(self) -> None:
        self.found: list[dict[str, np.ndarray]] = []
        self.dones: list[np.ndarray] = []

    def _on_step(self) -> bool:
        if "dones" in self.locals:
            self.dones.append(self.locals["dones"].copy())
        return True

    def _on_rollout_end(self) -> None:
        rollout = self.model._rollout
        names = ("actions", "rewards", "episode_starts", "values", "observations")
        self.found.append({name: getattr(rollout, name).copy() for name in names})


def test_a_chunk_is_one_decision_and_ends_with_its_episode() -> None:
    model, callback = make("DPPO", vec_walk(2), train_freq=40), Rollouts()
    model.learn(80, callback)
    rollout, dones = callback.found[0], np.array(callback.dones)
    decided = rollout["actions"].any(axis=2)  # (steps, envs)
    starts = np.vstack([np.ones((1, 2), bool), dones[:-1]])
    assert (rollout["episode_starts"].astype(bool) == starts).all()
    for env in range(2):
        since = 0
        for step in range(40):
            since = 0 if starts[step, env] else since
            assert decided[step, env] == (since % 4 == 0)
            since += 1


@pytest.mark.parametrize("terminates", [True, False])
def test_a_time_limit_is_no_termination(terminates: bool) -> None:
    model, callback = make("DPPO", vec_walk(1, terminates=terminates), train_freq=30, gamma=0.5), Rollouts()
    last = model.policy.value.ensemble.layers[-1]
    last.bias.data.copy_((-1000 * (model.policy.value.two_hot.bins - 2.0).abs()).expand_as(last.bias))
    value = float(np.expm1(2.0))  # everywhere
    model.learn(30, callback)
    rewards, ends = callback.found[0]["rewards"][:, 0], np.array(callback.dones)[:, 0]
    assert ends.any() and (rewards[~ends] <= 0).all()  # those of the environment are not positive
    expected = 0.0 if terminates else 0.5 * value
    assert (rewards[ends] <= expected + 1e-3).all() and (rewards[ends] > expected - 5).all()


def test_a_rollout_that_a_callback_ends_is_left() -> None:
    model = make("DPPO", train_freq=10)
    model.learn(100, lambda values, _: values["self"].num_timesteps < 5)
    assert model.num_timesteps == 5 and model._n_updates == 0
    model.learn(20)
    assert model._n_updates == 2 * 2


def test_fine_tuning_starts_from_the_moving_average() -> None:
    model = make("DPPO", offline_dataset=record_walk(), learning_rate=1e-2, n_epochs=1, train_freq=8)
    model.pretrain(5)
    cloned = {name: value.clone() for name, value in model.policy.actor_ema.state_dict().items()}
    assert any(not th.equal(value, cloned[name]) for name, value in model.policy.actor.state_dict().items())
    model.learn(8)
    for name, value in model.policy.actor_base.state_dict().items():
        assert th.equal(value, cloned[name])
    for name, value in model.policy.actor_ema.state_dict().items():  # what acts is what was trained
        assert th.equal(value, model.policy.actor.state_dict()[name])


def test_what_is_pushed_for_is_pushed() -> None:
    """The larger the executed actions, the better: sampled, learned from and sampled anew, they grow."""
    model = make("DPPO", clip_range=0.05, clip_range_base=0.005, policy_kwargs=ACTOR | {"net_arch": [32]})
    model.actor_decay_start = 10**6
    begin(model, 3e-3)
    th.manual_seed(0)
    for _ in range(200):  # of data that is pushed evenly to both sides
        model._clone((th.rand(64, 1, 1) - 0.5).expand(-1, 4, 1), th.randn(64, 2), th.ones(64, 4))
    begin(model, 1e-3)
    means = []
    for _ in range(40):
        chain, condition = chain_of(model, 64)
        executed = chain[:, -1].clamp(-1, 1).mean((1, 2))
        means.append(executed.mean().item())
        for _ in range(3):
            model._update_chains(chain, condition, executed)
        model.policy.actor_ema.load_state_dict(model.policy.actor.state_dict())
    assert np.mean(means[-5:]) > np.mean(means[:5]) + 0.3


@pytest.mark.parametrize(
    ("policy_kwargs", "sentence"),
    [
        ({"proposal": "gaussian"}, "leave out proposal, and choose the sample_scheduler 'DDIMScheduler'"),
        ({"sample_scheduler": "DDPMScheduler"}, "choose the sample_scheduler 'DDIMScheduler'"),
        ({"num_finetuned_steps": 4}, "num_finetuned_steps=4 is more than num_inference_steps=3"),
        ({"min_std": 0.0}, "min_std=0.0"),
    ],
)
def test_settings_that_are_refused(policy_kwargs: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        DPPO("MlpPolicy", Walk(), policy_kwargs=ACTOR | policy_kwargs)
