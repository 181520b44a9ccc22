"""The world model on linear systems that it can learn, and its loss by hand."""

import numpy as np
import pytest
import torch as th
import torch.nn.functional as F

from modip_sb3.world_model import WorldModel, compute_world_model_loss

A = th.tensor([[0.9, 0.3, 0.0], [-0.3, 0.9, 0.0], [0.0, 0.2, 0.8]])
B = th.tensor([[0.5, 0.0], [0.0, 0.5], [0.3, -0.3]])
THRESHOLD = 0.4
Batch = tuple[th.Tensor, th.Tensor, th.Tensor, th.Tensor]


def linear_system(batch_size: int, reward: str, horizon: int = 3) -> Batch:
    """Observations ``(B, H + 1, 3)``, actions ``(B, H, 2)``, rewards and terminations ``(B, H)`` of x' = Ax + Ba."""
    states = [2 * th.rand(batch_size, 3) - 1]
    actions = 2 * th.rand(batch_size, horizon, 2) - 1
    for step_actions in actions.unbind(1):
        states.append(states[-1] @ A.T + step_actions @ B.T)
    obs = th.stack(states, dim=1)
    linear = obs[:, :-1, 0] - obs[:, :-1, 2] + actions[..., 0]
    quadratic = 1.0 - (obs[:, :-1] ** 2).sum(-1) - 0.5 * (actions**2).sum(-1)
    terminations = (obs[:, 1:, 0] > THRESHOLD).float()
    return obs, actions, linear if reward == "linear" else quadratic, terminations


def episode_mask(terminations: th.Tensor) -> th.Tensor:
    """1 up to the first termination of each sequence."""
    ended = terminations.cumsum(1) - terminations
    return (ended == 0).float()


@pytest.fixture(scope="module", params=["linear", "quadratic"])
def learned(request: pytest.FixtureRequest) -> tuple[WorldModel, str]:
    th.manual_seed(0)
    model = WorldModel(3, 2, latent_dim=32, net_arch=[64, 64])
    optimizer = th.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(500):
        obs, actions, rewards, terminations = linear_system(128, request.param)
        latents = model.rollout(model.encode(obs[:, 0]), actions)
        with th.no_grad():
            targets = model.encode(obs[:, 1:])
        mask = episode_mask(terminations)
        loss, _ = compute_world_model_loss(model, latents, targets, actions, rewards, terminations, mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model, request.param


@th.no_grad()
def test_rewards_of_a_latent_rollout(learned: tuple[WorldModel, str]) -> None:
    model, reward = learned
    obs, actions, rewards, terminations = linear_system(2000, reward)
    mask = episode_mask(terminations).bool()
    latents = model.rollout(model.encode(obs[:, 0]), actions)
    predicted = model.reward(latents[:, :-1], actions)
    for step in range(actions.shape[1]):
        rows = mask[:, step]
        error = F.mse_loss(predicted[rows, step], rewards[rows, step])
        assert error < 0.15 * rewards[rows, step].var(), f"step {step}"


@th.no_grad()
def test_terminations_of_a_latent_rollout(learned: tuple[WorldModel, str]) -> None:
    model, reward = learned
    obs, actions, _, terminations = linear_system(2000, reward)
    mask = episode_mask(terminations).bool()
    probability = model.terminated(model.rollout(model.encode(obs[:, 0]), actions)[:, 1:])
    clear = mask & ((obs[:, 1:, 0] - THRESHOLD).abs() > 0.1)
    assert 0.1 < terminations[clear].mean() < 0.5
    correct = ((probability > 0.5) == terminations.bool()).float()
    for step in range(actions.shape[1]):
        assert correct[:, step][clear[:, step]].mean() > 0.95, f"step {step}"


@th.no_grad()
def test_latents_follow_the_encoder_without_collapse(learned: tuple[WorldModel, str]) -> None:
    model, reward = learned
    obs, actions, *_ = linear_system(2000, reward)
    targets = model.encode(obs[:, 1:])
    error = F.mse_loss(model.rollout(model.encode(obs[:, 0]), actions)[:, 1:], targets)
    assert error < 0.1 * targets.flatten(0, 1).var(0).mean()


def make_loss_inputs(batch_size: int = 4, horizon: int = 3) -> tuple[WorldModel, dict[str, th.Tensor]]:
    th.manual_seed(0)
    model = WorldModel(3, 2, latent_dim=8, net_arch=[16])
    for head in (model.dynamics, model.reward_head):  # which start at zero
        th.nn.init.normal_(head[-1].weight)
    inputs = {
        "latents": th.randn(batch_size, horizon + 1, 8),
        "target_latents": th.randn(batch_size, horizon, 8),
        "actions": th.randn(batch_size, horizon, 2),
        "rewards": th.randn(batch_size, horizon),
        "terminations": th.randint(0, 2, (batch_size, horizon)).float(),
        "weights": th.ones(batch_size, horizon),
    }
    return model, inputs


def test_untrained_heads_and_consistency_by_hand() -> None:
    """A fresh reward head gives each of 101 bins the same probability, a zero termination head one half."""
    model = WorldModel(3, 2, latent_dim=8, net_arch=[16])
    for parameter in model.termination_head.parameters():
        th.nn.init.zeros_(parameter)
    latents = th.zeros(1, 3, 8)
    latents[0, 1] = 1.0  # off by 1 in each of 8 features at the first step, by 2 in one of them at the second
    targets = th.zeros(1, 2, 8)
    targets[0, 1, 5] = 2.0
    weights = th.tensor([[1.0, 0.5]])
    terminations = th.tensor([[0.0, 1.0]])
    rewards, coefs = th.tensor([[3.0, -7.0]]), (20.0, 0.1, 3.0)
    loss, metrics = compute_world_model_loss(
        model, latents, targets, th.zeros(1, 2, 2), rewards, terminations, weights, *coefs
    )
    expected = {
        "consistency_loss": (1.0 + 0.5 * 4 / 8) / 1.5,
        "reward_loss": np.log(101),
        "termination_loss": np.log(2),
    }
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(expected, rel=1e-5)
    total = 20 * expected["consistency_loss"] + 0.1 * np.log(101) + 3 * np.log(2)
    assert loss.item() == pytest.approx(total, rel=1e-5)


def test_loss_is_the_weighted_mean_over_steps() -> None:
    model, inputs = make_loss_inputs()
    inputs["weights"] = th.rand(4, 3)
    loss, _ = compute_world_model_loss(model, **inputs)
    total = 0.0
    for row in range(4):
        for step in range(3):
            span = slice(step, step + 1)
            single = {name: value[row : row + 1, span] for name, value in inputs.items()}
            single["latents"] = inputs["latents"][row : row + 1, step : step + 2]
            single["weights"] = th.ones(1, 1)
            total += inputs["weights"][row, step].item() * compute_world_model_loss(model, **single)[0].item()
    assert loss.item() == pytest.approx(total / inputs["weights"].sum().item(), rel=1e-4)


def test_padding_changes_nothing() -> None:
    model, inputs = make_loss_inputs()
    inputs["weights"][1, 1:] = 0.0
    inputs["weights"][3, 2:] = 0.0
    loss, metrics = compute_world_model_loss(model, **inputs)
    for name, replacement in [("rewards", 1e6), ("actions", 5.0), ("terminations", 1.0), ("target_latents", 9.0)]:
        inputs[name][1, 1:], inputs[name][3, 2:] = replacement, replacement
    inputs["latents"][1, 2:], inputs["latents"][3, 3:] = -3.0, -3.0  # the state before the padding still counts
    padded_loss, padded_metrics = compute_world_model_loss(model, **inputs)
    th.testing.assert_close((padded_loss, padded_metrics), (loss, metrics))


def test_no_weight_is_no_loss() -> None:
    model, inputs = make_loss_inputs()
    inputs["weights"].zero_()
    assert compute_world_model_loss(model, **inputs)[0].item() == 0.0


def test_rollout_is_one_step_after_another() -> None:
    model, _ = make_loss_inputs()
    start, actions = model.encode(th.randn(4, 3)), th.randn(4, 2, 2)
    second = model.next(start, actions[:, 0])
    expected = th.stack([start, second, model.next(second, actions[:, 1])], dim=1)
    th.testing.assert_close(model.rollout(start, actions), expected)
    assert model.reward(expected[:, :-1], actions).shape == model.terminated(expected[:, 1:]).shape == (4, 2)


def test_latent_dim_must_fit_the_simplices() -> None:
    with pytest.raises(ValueError, match="latent_dim=20 is not a multiple of simnorm_dim=8"):
        WorldModel(3, 2, latent_dim=20)
