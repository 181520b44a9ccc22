"""TD-MPC2's networks, targets, losses and plans, against hand-computed values and the published formulas."""

import math
from typing import Any

import numpy as np
import pytest
import torch as th
import torch.nn.functional as F
from gymnasium import spaces
from torch import nn
from torch.distributions import Normal
from walk import Walk

from modip_sb3.baselines import TDMPC2
from modip_sb3.baselines.tdmpc2 import discount_of
from modip_sb3.baselines.tdmpc2_policy import MODEL_SIZES, GaussianPrior, PublishedWorldModel, TDMPC2Policy
from modip_sb3.buffers import SequenceBatch
from modip_sb3.networks import EnsembleMLP

BINS = th.linspace(-10, 10, 101)


def make_policy(action_dim: int = 2, **kwargs: Any) -> TDMPC2Policy:
    sizes = {"net_arch": [16], "encoder_arch": [16], "latent_dim": 16, "n_critics": 5, "num_proposals": 2} | kwargs
    observation_space = spaces.Box(-1, 1, (3,), np.float32)
    return TDMPC2Policy(observation_space, spaces.Box(-1, 1, (action_dim,), np.float32), lambda _: 1e-3, **sizes)


def make_model(**kwargs: Any) -> TDMPC2:
    sizes = {
        "net_arch": [16],
        "encoder_arch": [16],
        "latent_dim": 16,
        "n_critics": 5,
        "num_proposals": 2,
        "dropout": 0.0,
    }
    return TDMPC2("MlpPolicy", Walk(), gamma=0.9, learning_starts=10, seed=0, policy_kwargs=sizes, **kwargs)


def make_batch(mask: th.Tensor | None = None, batch_size: int = 6) -> SequenceBatch:
    generator = th.Generator().manual_seed(0)
    observations = th.randn(batch_size, 4, 2, generator=generator)
    actions = th.rand(batch_size, 3, 1, generator=generator) * 2 - 1
    rewards = th.randn(batch_size, 3, generator=generator)
    mask = th.ones(batch_size, 3) if mask is None else mask
    return SequenceBatch(observations, actions, rewards, th.zeros(batch_size, 3), mask)


def set_values(layer: nn.Module, symlogs: list[float]) -> None:
    """Make the members of a Q ensemble constant, each on a bin of the symlog axis."""
    with th.no_grad():
        layer.weight.zero_()  # type: ignore[operator, union-attr]
        for bias, symlog in zip(layer.bias[:, 0], symlogs, strict=True):  # type: ignore[arg-type, index]
            bias.copy_(1000.0 * (BINS - symlog).abs().lt(0.01))


# ------------------------------------------------------------------ networks


def test_published_sizes() -> None:
    observation_space, action_space = spaces.Box(-1, 1, (17,), np.float32), spaces.Box(-1, 1, (6,), np.float32)
    for size, n_layers in {1: 1, 5: 1, 19: 2}.items():
        policy = TDMPC2Policy(observation_space, action_space, lambda _: 1e-3, model_size=size)
        count = sum(p.numel() for p in policy.parameters() if p.requires_grad)
        assert count == pytest.approx(size * 1e6, rel=0.3)
        encoder = [layer for layer in policy.world_model.encoder if isinstance(layer, nn.Linear)]
        assert len(encoder) == n_layers + 1 and encoder[-1].out_features == MODEL_SIZES[size]["latent_dim"]
    with pytest.raises(ValueError, match=r"model_size=48 is unknown; choose from \[1, 5, 19\]"):
        TDMPC2("MlpPolicy", "Pendulum-v1", model_size=48)


@pytest.mark.parametrize("name", ["encoder", "dynamics"])
def test_mish_and_layer_norms_up_to_the_simplices(name: str) -> None:
    model = PublishedWorldModel(3, 2, 16, [24, 24], [24, 24], with_termination=False)
    inputs = th.randn(5, 3 if name == "encoder" else 18)
    linear = [layer for layer in getattr(model, name) if isinstance(layer, nn.Linear)]
    hidden = F.mish(F.layer_norm(linear[0](inputs), (24,)))
    hidden = F.mish(F.layer_norm(linear[1](hidden), (24,)))
    logits = F.layer_norm(linear[2](hidden), (16,))
    expected = F.softmax(logits.view(5, 2, 8), dim=-1).view(5, 16)
    outputs = model.encode(inputs) if name == "encoder" else model.next(inputs[:, :16], inputs[:, 16:])
    th.testing.assert_close(outputs, expected)


def test_initialisation() -> None:
    policy = make_policy(net_arch=[256, 256], termination_head=True)
    latents, actions = policy.encode(th.randn(7, 3)), th.rand(7, 2)
    assert policy.world_model.reward(latents, actions).abs().max() < 1e-6
    assert policy.critic(latents, actions).abs().max() < 1e-6
    hidden = policy.world_model.reward_head[0]
    assert hidden.weight.std().item() == pytest.approx(0.02, rel=0.05) and hidden.bias.abs().max() == 0
    first = policy.critic.ensemble.layers[0]
    assert first.weight.std().item() == pytest.approx(0.02, rel=0.05) and first.bias.abs().max() == 0
    assert not th.equal(first.weight[0], first.weight[1])


def test_dropout_in_the_first_layer_of_the_critics_alone_and_never_in_the_target() -> None:
    policy = make_policy(net_arch=[64, 64], dropout=0.5)
    dropouts = [type(layer) for layer in policy.critic.ensemble.layers if "Linear" not in type(layer).__name__][:3]
    assert dropouts[0] is nn.Dropout and sum(isinstance(m, nn.Dropout) for m in policy.critic.modules()) == 1
    nn.init.normal_(policy.critic.ensemble.layers[-1].weight)
    policy.critic_target.load_state_dict(policy.critic.state_dict())
    latents, actions = policy.encode(th.randn(4, 3)), th.rand(4, 2)
    policy.set_training_mode(True)
    assert not th.equal(policy.critic(latents, actions), policy.critic(latents, actions))
    target = policy.critic_target(latents, actions)
    policy.set_training_mode(False)
    assert th.equal(policy.critic(latents, actions), target)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_chosen_members_are_rows_of_the_ensemble(dropout: float) -> None:
    ensemble = EnsembleMLP(4, 3, [8, 8], 2, nn.Mish, dropout).eval()
    inputs, members = th.randn(2, 5, 3), th.tensor([3, 1])
    th.testing.assert_close(ensemble(inputs, members), ensemble(inputs)[members])
    ensemble(inputs, members).sum().backward()
    gradient = ensemble.layers[0].weight.grad
    assert [bool(row.abs().max() > 0) for row in gradient] == [False, True, False, True]


def test_random_pairs() -> None:
    policy = make_policy()
    pairs = [tuple(sorted(policy.random_pair().tolist())) for _ in range(300)]
    assert len(set(pairs)) == 10 and all(first < second for first, second in pairs)
    assert make_policy(n_critics=2).random_pair() is None


# ------------------------------------------------------------------ the prior


def test_prior_is_a_squashed_gaussian_with_the_official_entropy() -> None:
    th.manual_seed(0)
    prior = GaussianPrior(16, 3, [16]).double()
    nn.init.normal_(prior.net[-1].weight, std=0.3)
    latents, noise = th.randn(50, 16).double(), th.randn(50, 3).double()
    actions, entropies = prior(latents, noise)
    mean, raw = prior.net(latents).chunk(2, dim=-1)
    log_std = -10 + 0.5 * 12 * (th.tanh(raw) + 1)
    gaussian = mean + log_std.exp() * noise
    th.testing.assert_close(actions, th.tanh(gaussian))
    log_prob = Normal(mean, log_std.exp()).log_prob(gaussian).sum(-1)
    th.testing.assert_close(entropies, -3 * log_prob)
    # As the official code has it: the squashed entropy times the ratio of scaled and squashed log-probabilities
    squashed = log_prob - th.log(F.relu(1 - actions**2) + 1e-6).sum(-1)
    th.testing.assert_close(entropies, -squashed * (3 * log_prob / (squashed + 1e-8)), rtol=1e-4, atol=1e-4)
    th.testing.assert_close(prior(latents, th.zeros_like(noise))[0], th.tanh(mean))


# ------------------------------------------------------------------ targets and losses


@pytest.mark.parametrize(
    ("length", "gamma"), [(10, 0.95), (25, 0.95), (200, 0.975), (500, 0.99), (1000, 0.995), (9999, 0.995)]
)
def test_discount_rule(length: int, gamma: float) -> None:
    assert discount_of(length) == pytest.approx(gamma)


def test_defaults_follow_from_the_episode_length() -> None:
    small = {"policy_kwargs": {"net_arch": [8], "encoder_arch": [8], "latent_dim": 8}}
    model = TDMPC2("MlpPolicy", "Pendulum-v1", **small)
    assert (model.gamma, model.learning_starts) == (pytest.approx(0.975), 1000)
    assert model.policy.planner_kwargs["gamma"] == model.gamma == model.replay_buffer.gamma
    model = TDMPC2("MlpPolicy", "Hopper-v5", **small)
    assert (model.gamma, model.learning_starts) == (pytest.approx(0.995), 5000)
    model = TDMPC2("MlpPolicy", Walk(), gamma=0.9, offline_dataset="data.hdf5", **small)
    assert model.learning_starts == 0
    for settings in ({}, {"gamma": 0.9}, {"learning_starts": 5}):
        with pytest.raises(ValueError, match="max_episode_steps.* pass gamma and learning_starts"):
            TDMPC2("MlpPolicy", Walk(), **settings, **small)


def test_targets_are_the_minimum_of_two_random_target_critics() -> None:
    model = make_model(termination_head=True)
    symlogs = [0.0, 1.0, 2.0, 3.0, -1.0]
    set_values(model.policy.critic_target.ensemble.layers[-1], symlogs)
    values = [math.copysign(math.expm1(abs(symlog)), symlog) for symlog in symlogs]
    batch = make_batch()
    batch.terminations[0, 1] = 1
    latents = model.policy.world_model.encode(batch.observations[:, 1:])
    pairs = []
    for _ in range(200):
        targets = model._compute_targets(batch, latents)
        assert targets[0, 1] == batch.rewards[0, 1]
        bootstrapped = (targets - batch.rewards)[1:] / 0.9
        assert bootstrapped.std() < 1e-4  # one pair for the whole batch
        pairs.append(bootstrapped.mean().item())
    # of ten pairs -1 is the minimum of four, 0 of three, 1 of two, 2 of one, and 3 of none
    shares = [np.isclose(pairs, value, atol=1e-3).mean() for value in values]
    np.testing.assert_allclose(shares, [0.3, 0.2, 0.1, 0.0, 0.4], atol=0.12)


def test_model_loss_by_hand() -> None:
    model = make_model(termination_head=True)
    batch = make_batch()
    batch.terminations[2, 2] = 1
    captured: list[th.Tensor] = []
    model._optimize = lambda _, loss: captured.append(loss.detach())  # type: ignore[method-assign, assignment]
    latents, metrics = model._update_model(batch, batch.observations)
    world_model, total = model.policy.world_model, th.zeros(())
    states = world_model.encode(batch.observations[:, 0])
    for step in range(3):
        following = world_model.next(states, batch.actions[:, step])
        target = world_model.encode(batch.observations[:, step + 1])
        logits = world_model.termination_head(following).squeeze(-1)  # type: ignore[misc]
        # untrained heads give log 101 whatever the target
        total = total + 0.5**step * (20 * F.mse_loss(following, target) + (0.1 + 0.1) * math.log(101))
        total = total + F.binary_cross_entropy_with_logits(logits, batch.terminations[:, step])
        states = following
    th.testing.assert_close(captured[0], total.detach() / 3)
    th.testing.assert_close(latents[:, -1], states)
    assert metrics["reward_loss"] == pytest.approx(math.log(101)) == metrics["q_loss"].item()


def test_actor_loss_by_hand() -> None:
    model = make_model(entropy_coef=0.3)
    set_values(model.policy.critic.ensemble.layers[-1], [2.0] * 5)
    captured: list[th.Tensor] = []
    model._optimize = lambda _, loss: captured.append(loss.detach())  # type: ignore[method-assign, assignment]
    latents = model.policy.encode(th.randn(24, 2)).view(6, 4, 16).detach()
    th.manual_seed(3)
    model._update_actor(latents, th.ones(6, 3))
    th.manual_seed(3)
    _, entropies = model.policy.actor(latents)
    expected = -sum(0.5**t * (math.expm1(2.0) + 0.3 * entropies[:, t].mean()) for t in range(4)) / 4
    th.testing.assert_close(captured[0], th.as_tensor(expected).detach(), rtol=1e-4, atol=1e-4)


def test_actor_leaves_the_critics_alone_and_climbs_q() -> None:
    model = make_model(learning_rate=1e-2)
    nn.init.normal_(model.policy.critic.ensemble.layers[-1].weight, std=0.3)
    before = {name: value.clone() for name, value in model.policy.critic.state_dict().items()}
    latents = model.policy.encode(th.randn(400, 2)).view(100, 4, 16).detach()

    def q_of_prior() -> float:
        return model.policy.critic(latents, model.policy.mode_actions(latents)).mean().item()

    start = q_of_prior()
    for _ in range(60):
        model._update_actor(latents, th.ones(100, 3))
    assert q_of_prior() > start + 0.01
    assert all(th.equal(value, before[name]) for name, value in model.policy.critic.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.policy.critic.parameters())


def test_scale_of_q() -> None:
    model = make_model(tau=0.25)
    values = th.arange(101.0)
    q_scale = model._next_q_scale(values[th.randperm(101)])
    assert q_scale.item() == pytest.approx(1 + 0.25 * (90 - 1))  # the 95th and the 5th percentile are 95 and 5
    assert model._next_q_scale(values / 1000).item() == 1.0


def test_padding_changes_nothing() -> None:
    mask = th.ones(6, 3)
    mask[1, 1:], mask[4, 2:] = 0, 0
    results = []
    for noise in (0.0, 1.0):
        model, batch = make_model(), make_batch(mask)
        batch.rewards.add_(noise * (1 - mask) * 7)
        batch.actions.add_(noise * (1 - mask)[..., None] * 0.5)
        batch.observations[:, 1:].add_(noise * (1 - mask)[..., None])  # type: ignore[index]
        th.manual_seed(0)
        for _ in range(3):
            model._update(batch, "online")
        results.append(model.policy.state_dict())
    for name, value in results[0].items():
        th.testing.assert_close(value, results[1][name], msg=name)


# ------------------------------------------------------------------ the planner


@pytest.mark.parametrize(("action_dim", "iterations"), [(2, 6), (19, 6), (20, 8)])
def test_published_search(action_dim: int, iterations: int) -> None:
    policy = make_policy(action_dim, num_proposals=24)
    assert policy.horizon == 3
    assert policy.planner_kwargs == {
        "num_samples": 488,  # 512 with the prior's 24
        "num_elites": 64,
        "num_iterations": iterations,
        "temperature": 0.5,
        "min_std": 0.05,
        "max_std": 2.0,
        "pessimism": 0.0,
    }
    plan = policy.plan(th.randn(2, 3), th.zeros(2, 3, action_dim))
    assert plan.actions.shape == (2, 3, action_dim) and plan.actions.abs().max() <= 1


def test_prior_sequences_follow_the_model() -> None:
    policy = make_policy(num_proposals=4)
    latents, noise = policy.encode(th.randn(3, 3)), th.randn(3, 4, 2)
    sequences = policy._roll_prior(latents, noise)  # (3, 4, 3, 2)
    for env in range(3):
        for index in range(4):
            state = latents[env]
            for step in range(3):
                action, _ = policy.actor(state, noise[step, index])
                th.testing.assert_close(sequences[env, index, step], action)
                state = policy.world_model.next(state, action)


def test_warm_start_is_the_shifted_mean_with_a_zero_and_zeros_at_an_episodes_start() -> None:
    policy = make_policy()
    seen: list[th.Tensor] = []
    original = policy.plan
    policy.plan = lambda obs, warm, det: seen.append(warm.clone()) or original(obs, warm, det)  # type: ignore
    obs = th.randn(2, 3)
    _, state, plan = policy.act(obs, policy.initial_state(2, "planner"), "planner", False)
    assert seen[0].abs().max() == 0 and plan is not None
    state[1][1] = -1
    policy.act(obs, state, "planner", False)
    th.testing.assert_close(seen[1][0, :2], plan.mean[0, 1:])
    assert seen[1][0, 2].abs().max() == 0 and seen[1][1].abs().max() == 0


def test_planner_values_the_end_with_two_critics_and_stops_at_terminations() -> None:
    policy = make_policy(termination_head=True, planner_kwargs={"gamma": 0.5})
    set_values(policy.critic.ensemble.layers[-1], [0.0, 1.0, 2.0, 3.0, 4.0])
    values = [math.expm1(symlog) for symlog in range(5)]
    candidates = th.rand(1, 3, 3, 2) * 2 - 1
    latents = policy.encode(th.randn(1, 3))
    head = policy.world_model.termination_head
    assert head is not None
    nn.init.zeros_(head[-1].weight)  # type: ignore[arg-type]
    nn.init.constant_(head[-1].bias, -0.1)  # type: ignore[arg-type]  # below one half: no termination at all
    averages = {round((a + b) / 2 / 8, 3) for i, a in enumerate(values) for b in values[:i]}
    for _ in range(20):
        assert round(policy._make_planner(False).evaluate(latents, candidates)[0, 0].item(), 3) in averages
    mean = policy._make_planner(True).evaluate(latents, candidates)
    th.testing.assert_close(mean, th.full((1, 3), sum(values) / 5 / 8))
    nn.init.constant_(head[-1].bias, 0.1)  # type: ignore[arg-type]
    assert policy._make_planner(False).evaluate(latents, candidates).abs().max() < 1e-6
