"""Returns by hand, and values of chains that are known exactly."""

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.utils import polyak_update

from modip_sb3.critics import ValueEnsemble, compute_expectile_loss, compute_lambda_returns, compute_q_loss

# r = 1, 2, 3, 4 and V(s') = 10, 20, 30, 40 with a discount of one half
REWARDS, NEXT_VALUES, GAMMA = [1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 30.0, 40.0], 0.5
TD_TARGETS = [6.0, 12.0, 18.0, 24.0]


@pytest.mark.parametrize(
    "td_lambda, n_steps, terminations, mask, expected",
    [
        pytest.param(0.0, 4, [0, 0, 0, 0], [1, 1, 1, 1], TD_TARGETS, id="lambda=0"),
        pytest.param(1.0, 1, [0, 0, 0, 0], [1, 1, 1, 1], TD_TARGETS, id="n_steps=1"),
        # 3 + 24/2 = 15, 2 + 18/2 = 11, 1 + 12/2 = 7: the last step has nothing after it
        pytest.param(1.0, 2, [0, 0, 0, 0], [1, 1, 1, 1], [7.0, 11.0, 15.0, 24.0], id="n_steps=2"),
        # 3 + 24/2 = 15, 2 + 15/2 = 9.5, 1 + 9.5/2 = 5.75
        pytest.param(1.0, 4, [0, 0, 0, 0], [1, 1, 1, 1], [5.75, 9.5, 15.0, 24.0], id="lambda=1"),
        # 3 + (30 + 24)/4 = 16.5, 2 + (20 + 16.5)/4 = 11.125, 1 + (10 + 11.125)/4 = 6.28125
        pytest.param(0.5, 9, [0, 0, 0, 0], [1, 1, 1, 1], [6.28125, 11.125, 16.5, 24.0], id="lambda=1/2"),
        # 3 + (30 + 24)/4 = 16.5, 2 + (20 + 18)/4 = 11.5, 1 + (10 + 12)/4 = 6.5
        pytest.param(0.5, 2, [0, 0, 0, 0], [1, 1, 1, 1], [6.5, 11.5, 16.5, 24.0], id="lambda=1/2, n_steps=2"),
        # the third step terminates: 3, then 2 + 3/2 = 3.5, 1 + 3.5/2 = 2.75
        pytest.param(1.0, 4, [0, 0, 1, 0], [1, 1, 1, 0], [2.75, 3.5, 3.0], id="termination"),
        # the third step meets a time limit: 3 + 30/2 = 18, then 2 + 18/2 = 11, 1 + 11/2 = 6.5
        pytest.param(1.0, 4, [0, 0, 0, 0], [1, 1, 1, 0], [6.5, 11.0, 18.0], id="time limit"),
        pytest.param(1.0, 4, [0, 0, 0, 0], [1, 0, 0, 0], [6.0], id="time limit at once"),
        pytest.param(1.0, 4, [1, 0, 0, 0], [1, 0, 0, 0], [1.0], id="termination at once"),
    ],
)
def test_lambda_returns_by_hand(
    td_lambda: float, n_steps: int, terminations: list[int], mask: list[int], expected: list[float]
) -> None:
    rows = th.tensor([REWARDS, NEXT_VALUES, terminations, mask], dtype=th.float32)[:, None]  # (4, B, L)
    rows = th.cat([rows, rows], dim=1)
    rows[:2, 1] = th.where(rows[3, 1] > 0, rows[:2, 1], 777.0)  # what stands in the padding is not looked at
    returns = compute_lambda_returns(*rows, gamma=GAMMA, td_lambda=td_lambda, n_steps=n_steps)
    for sequence in returns:
        np.testing.assert_allclose(sequence[: len(expected)], expected)


@pytest.mark.parametrize("seed", range(5))
def test_lambda_return_of_consistent_values_is_the_value(seed: int) -> None:
    generator = th.Generator().manual_seed(seed)
    values = th.randn(3, 6, generator=generator)
    terminations = (th.rand(3, 5, generator=generator) < 0.3).float()
    rewards = values[:, :-1] - 0.9 * (1 - terminations) * values[:, 1:]
    ended = th.cat([th.zeros(3, 1), terminations.cumsum(1)[:, :-1]], dim=1)
    mask = (ended == 0).float()
    td_lambda = th.rand(1, generator=generator).item()
    returns = compute_lambda_returns(rewards, values[:, 1:], terminations, mask, 0.9, td_lambda, seed + 1)
    th.testing.assert_close(returns * mask, values[:, :-1] * mask)


@pytest.mark.parametrize("n_steps", [1, 3])
@pytest.mark.parametrize("terminates", [True, False], ids=["termination", "time limit"])
def test_values_of_a_chain(terminates: bool, n_steps: int) -> None:
    """
    Three states in a row, a reward of 1 on leaving the last of them for a fourth. Where that is a termination the
    values are γ², γ and 1. Where it is a time limit, the fourth state's value counts; it is also visited in the middle
    of episodes, stays where it is for a reward of 2, and is worth 2 / (1 - γ).
    """
    th.manual_seed(0)
    gamma, states = 0.5, th.eye(4)
    paths = th.tensor([[0, 1, 2, 3], [1, 2, 3, 3], [2, 3, 3, 3], [3, 3, 3, 3]])  # states s_0 .. s_3 of sequences
    latents = states[paths]  # (B, L + 1, Z)
    rewards = th.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [2.0, 2.0, 2.0]])
    mask = th.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0], [1.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    terminations = float(terminates) * th.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    actions = th.zeros(4, 3, 1)

    value, value_target = ValueEnsemble(4, 0, 2, [32]), ValueEnsemble(4, 0, 2, [32])
    critic, critic_target = ValueEnsemble(4, 1, 2, [32]), ValueEnsemble(4, 1, 2, [32])
    value_target.load_state_dict(value.state_dict())
    critic_target.load_state_dict(critic.state_dict())
    optimizer = th.optim.Adam([*value.parameters(), *critic.parameters()], lr=3e-3)
    for _ in range(800):
        with th.no_grad():
            next_values = value_target(latents[:, 1:]).amin(0)
            targets = compute_lambda_returns(rewards, next_values, terminations, mask, gamma, 0.9, n_steps)
            q_values = critic_target(latents[:, :-1], actions).amin(0)
        q_loss, _ = compute_q_loss(critic, latents[:, :-1], actions, targets, mask)
        v_loss, _ = compute_expectile_loss(value, latents[:, :-1], q_values, mask, expectile=0.5)
        optimizer.zero_grad()
        (q_loss + v_loss).backward()
        optimizer.step()
        polyak_update(value.parameters(), value_target.parameters(), 0.1)
        polyak_update(critic.parameters(), critic_target.parameters(), 0.1)

    last = 1.0 if terminates else 1.0 + gamma * 2 / (1 - gamma)
    expected = th.tensor([gamma**2 * last, gamma * last, last, 2 / (1 - gamma)])
    with th.no_grad():
        for values in [*value(states), *critic(states, th.zeros(4, 1))]:
            th.testing.assert_close(values, expected, rtol=0.1, atol=0.05)


@pytest.mark.parametrize("expectile", [0.5, 0.7, 0.9])
def test_expectile_loss_finds_the_expectile(expectile: float) -> None:
    """Of the two targets 0 and e - 1 (symlog 0 and 1), drawn equally often, the expectile has symlog τ."""
    th.manual_seed(0)
    value = ValueEnsemble(1, 0, 2, [])
    latents, targets = th.ones(1, 2, 1), th.tensor([[0.0, np.e - 1]])
    optimizer = th.optim.Adam(value.parameters(), lr=0.02)
    for _ in range(300):
        loss, _ = compute_expectile_loss(value, latents, targets, th.ones(1, 2), expectile)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    values = value(latents[0, :1]).detach()[:, 0]
    th.testing.assert_close(values, th.full((2,), np.expm1(expectile), dtype=th.float32), rtol=0.03, atol=0.03)


@pytest.mark.parametrize("target, asymmetry", [(5.0, 0.8), (-5.0, 0.2)])
def test_expectile_loss_by_hand(target: float, asymmetry: float) -> None:
    value = ValueEnsemble(2, 0, 3, [4])  # its head starts at zero: 101 equal probabilities, a value of 0
    latents, targets, weights = th.randn(1, 2, 2), th.tensor([[target, 1e4]]), th.tensor([[1.0, 0.0]])
    loss, metrics = compute_expectile_loss(value, latents, targets, weights, expectile=0.8)
    assert loss.item() == pytest.approx(asymmetry * np.log(101), rel=1e-5)
    assert metrics["v_mean"].item() == pytest.approx(0.0, abs=1e-5)


def test_q_loss_by_hand() -> None:
    critic = ValueEnsemble(2, 1, 2, [])
    critic.ensemble.layers[-1].bias.data[0, 0, 50] = 100.0  # member 0 is certain of zero, member 1 knows nothing
    inputs, targets = (th.randn(1, 3, 2), th.randn(1, 3, 1)), th.tensor([[0.0, 0.0, 9.0]])
    loss, metrics = compute_q_loss(critic, *inputs, targets, th.tensor([[1.0, 0.5, 0.0]]))
    assert loss.item() == pytest.approx(0.5 * np.log(101), rel=1e-5)
    assert metrics["q_mean"].item() == pytest.approx(0.0, abs=1e-5)


def test_q_depends_on_the_action_and_v_has_none() -> None:
    critic = ValueEnsemble(2, 3, 4, [8])
    th.nn.init.normal_(critic.ensemble.layers[-1].weight)
    latents = th.randn(5, 2)
    values, others = critic(latents, th.zeros(5, 3)), critic(latents, th.ones(5, 3))
    assert values.shape == (4, 5) and (values != others).all()
    assert ValueEnsemble(2, 0, 4, [8])(latents).shape == (4, 5)
