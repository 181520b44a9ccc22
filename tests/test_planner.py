"""The planner on systems whose optimum is known, and its bookkeeping by hand."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch as th

from modip_sb3.planner import MPPI, PlanTracker

HORIZON, ACTION_DIM, GAMMA = 3, 1, 0.9


class LinearQuadratic:
    """A double integrator with quadratic cost, whose optimal value -z'Pz is the fixed point of the Riccati equation."""

    A = th.tensor([[1.0, 0.2], [0.0, 1.0]])
    B = th.tensor([[0.0], [0.5]])
    Q = th.diag(th.tensor([1.0, 0.2]))
    R = th.tensor([[0.3]])

    def __init__(self) -> None:
        A, B, self.P = self.A, self.B, self.Q
        for _ in range(500):
            self.gain = GAMMA * th.linalg.solve(self.R + GAMMA * B.T @ self.P @ B, B.T @ self.P @ A)
            self.P = self.Q + GAMMA * A.T @ self.P @ (A - B @ self.gain)

    def next(self, latents: th.Tensor, actions: th.Tensor) -> th.Tensor:
        return latents @ self.A.T + actions @ self.B.T

    def rollout(self, latents: th.Tensor, actions: th.Tensor) -> th.Tensor:
        states = [latents]
        for step_actions in actions.unbind(1):
            states.append(self.next(states[-1], step_actions))
        return th.stack(states, dim=1)

    def reward(self, latents: th.Tensor, actions: th.Tensor) -> th.Tensor:
        return -((latents @ self.Q) * latents).sum(-1) - ((actions @ self.R) * actions).sum(-1)

    def terminated(self, latents: th.Tensor) -> th.Tensor:
        return th.zeros(latents.shape[:-1])

    def value(self, latents: th.Tensor) -> th.Tensor:
        return -((latents @ self.P) * latents).sum(-1)[None]


class Corridor:
    """Walks by its action, earns the action, and ends with probability ``end`` beyond 1."""

    def __init__(self, end: float) -> None:
        self.end = end

    def rollout(self, latents: th.Tensor, actions: th.Tensor) -> th.Tensor:
        return th.cat([latents[:, None], latents[:, None] + actions.cumsum(1)], dim=1)

    def reward(self, latents: th.Tensor, actions: th.Tensor) -> th.Tensor:
        return actions[..., 0]

    def terminated(self, latents: th.Tensor) -> th.Tensor:
        return self.end * (latents[..., 0] > 1).float()


SYSTEM = LinearQuadratic()


def fixed_proposals(seed: int = 0, num: int = 6, scale: float = 1.0) -> Callable[[th.Tensor], th.Tensor]:
    generator = th.Generator().manual_seed(seed)
    proposals = scale * (2 * th.rand(1, num, HORIZON, ACTION_DIM, generator=generator) - 1)
    return lambda latents: proposals.expand(len(latents), -1, -1, -1)


def make_planner(**kwargs: Any) -> MPPI:
    settings = {"model": SYSTEM, "propose": fixed_proposals(), "terminal_value": SYSTEM.value, "gamma": GAMMA}
    return MPPI(**settings | kwargs)


def random_states(seed: int, num: int = 5) -> th.Tensor:
    return 2 * th.rand(num, 2, generator=th.Generator().manual_seed(seed)) - 1


WIDE = {"num_samples": 256, "num_elites": 16, "num_iterations": 6, "temperature": 20.0, "max_std": 1.0}


@pytest.mark.parametrize("deterministic", [True, False])
def test_finds_the_optimum_of_a_linear_quadratic_problem(deterministic: bool) -> None:
    th.manual_seed(0)
    latents = 0.5 * random_states(0, num=8)  # near enough for the optimal actions to lie in [-1, 1]
    plan = make_planner(**WIDE, min_std=0.01).plan(latents, deterministic=deterministic)
    optimum = SYSTEM.value(latents)[0]
    assert (plan.value <= optimum + 1e-5).all()
    th.testing.assert_close(plan.value, optimum, rtol=0.03, atol=0.002)
    th.testing.assert_close(plan.mean[:, 0], -latents @ SYSTEM.gain.T, rtol=0.0, atol=0.1)
    assert (optimum - plan.proposal_value > 0.1).all()  # which the proposals are far from


def test_evaluate_is_the_cost_of_the_optimal_policy() -> None:
    latents = state = 0.5 * random_states(1)
    actions = []
    for _ in range(HORIZON):
        actions.append(-state @ SYSTEM.gain.T)
        state = SYSTEM.next(state, actions[-1])
    scores = make_planner().evaluate(latents, th.stack(actions, dim=1)[:, None])
    th.testing.assert_close(scores[:, 0], SYSTEM.value(latents)[0])


@pytest.mark.parametrize("num_samples, num_iterations", [(16, 2), (1, 1), (0, 2), (16, 0)])
@pytest.mark.parametrize("trust_region", [None, 0.0, 0.1])
@pytest.mark.parametrize("warm", [False, True])
def test_deterministic_plan_is_never_worse_than_the_best_proposal(
    num_samples: int, num_iterations: int, trust_region: float | None, warm: bool
) -> None:
    for seed in range(10):
        latents, propose = random_states(seed), fixed_proposals(seed)
        planner = make_planner(
            propose=propose, num_samples=num_samples, num_iterations=num_iterations, trust_region=trust_region
        )
        warm_start = 2 * random_states(seed, num=5 * HORIZON).view(5, -1)[:, :HORIZON, None] if warm else None
        plan = planner.plan(latents, warm_start, deterministic=True)
        proposal_values = planner.evaluate(latents, propose(latents))
        assert (plan.value >= proposal_values.amax(1)).all()
        th.testing.assert_close(plan.value, planner.evaluate(latents, plan.actions[:, None])[:, 0])
        th.testing.assert_close(plan.proposal_value, proposal_values.mean(1))
        assert plan.actions.abs().max() <= 1


@pytest.mark.parametrize("trust_region", [0.0, 0.05, 0.3])
def test_trust_region_holds(trust_region: float) -> None:
    for seed in range(10):
        latents, propose = random_states(seed), fixed_proposals(seed, num=3, scale=0.9)
        proposals = propose(latents)
        low, high = proposals.amin(1) - trust_region - 1e-6, proposals.amax(1) + trust_region + 1e-6
        planner = make_planner(propose=propose, trust_region=trust_region, max_std=1.0)
        plan = planner.plan(latents, warm_start=th.ones(5, HORIZON, 1), deterministic=True)
        for actions in (plan.actions, plan.mean):
            assert ((low <= actions) & (actions <= high) & (actions.abs() <= 1)).all()


def test_ranks_the_proposals_when_it_does_not_search() -> None:
    latents = random_states(0)
    planner = make_planner(num_samples=0)
    proposals = planner.propose(latents)
    plan = planner.plan(latents, deterministic=True)
    best = planner.evaluate(latents, proposals).argmax(1)
    assert th.equal(plan.actions, proposals[th.arange(5), best])


def test_exploration_stays_in_the_action_box_and_differs() -> None:
    th.manual_seed(0)
    planner = make_planner(min_std=0.4, max_std=1.0)
    first, second = planner.plan(random_states(0)), planner.plan(random_states(0))
    assert (first.actions != second.actions).any()
    assert max(first.actions.abs().max(), second.actions.abs().max()) <= 1


def test_exploration_noise_has_the_search_spread() -> None:
    latents = th.zeros(1, 2).expand(4000, 2)
    plan = make_planner(propose=fixed_proposals(num=1, scale=0.1), num_samples=0, min_std=0.2).plan(latents)
    noise = plan.actions - fixed_proposals(num=1, scale=0.1)(latents)[:, 0]
    assert th.equal(plan.std, th.full_like(plan.std, 0.2))
    th.testing.assert_close(noise.mean(0), th.zeros(HORIZON, 1), rtol=0, atol=0.02)
    th.testing.assert_close(noise.std(0), th.full((HORIZON, 1), 0.2), rtol=0.1, atol=0)


def test_mean_and_spread_of_the_elites_by_hand() -> None:
    """The candidates 0, 0.2 and 0.6 earn just that; the best two are weighted by exp(10 v)."""
    proposals = th.tensor([0.0, 0.2, 0.6]).view(1, 3, 1, 1)
    settings = {"num_samples": 0, "num_elites": 2, "temperature": 10.0, "min_std": 0.0, "gamma": 1.0}
    planner = make_planner(
        model=Corridor(end=0.0), propose=lambda latents: proposals, terminal_value=lambda z: 0 * z.T, **settings
    )
    plan = planner.plan(th.zeros(1, 1), deterministic=True)
    weight = 1 / (1 + np.exp(-4.0))
    mean = 0.6 * weight + 0.2 * (1 - weight)
    std = np.sqrt(weight * (0.6 - mean) ** 2 + (1 - weight) * (0.2 - mean) ** 2)
    assert plan.actions.item() == pytest.approx(0.6) and plan.value.item() == pytest.approx(0.6)
    assert plan.proposal_value.item() == pytest.approx(0.8 / 3)
    assert plan.mean.item() == pytest.approx(mean, rel=1e-5) and plan.std.item() == pytest.approx(std, rel=1e-4)


@pytest.mark.parametrize("end", [0.0, 0.5, 1.0])
def test_score_of_a_terminating_plan_by_hand(end: float) -> None:
    """From 0 by 0.6, 0.7 and 0.2: the second and the third step arrive beyond 1; V is 10."""
    actions = th.tensor([0.6, 0.7, 0.2]).view(1, 1, 3, 1)
    planner = make_planner(model=Corridor(end), terminal_value=lambda latents: 10 * th.ones(1, len(latents)))
    score = planner.evaluate(th.zeros(1, 1), actions)
    expected = 0.6 + 0.9 * 0.7 + (1 - end) * 0.81 * 0.2 + (1 - end) ** 2 * 0.729 * 10
    assert score.shape == (1, 1) and score.item() == pytest.approx(expected)


@pytest.mark.parametrize("pessimism, bootstrap", [(0.0, 8.0), (1.0, 6.0), (2.5, 3.0)])
def test_pessimism_by_hand(pessimism: float, bootstrap: float) -> None:
    def disagree(latents: th.Tensor) -> th.Tensor:
        return th.tensor([[10.0], [6.0]]).expand(2, len(latents))  # mean 8, standard deviation 2

    planner = make_planner(model=Corridor(end=0.0), terminal_value=disagree, pessimism=pessimism)
    scores = planner.evaluate(th.zeros(2, 1), th.zeros(2, 4, 3, 1))
    th.testing.assert_close(scores, th.full((2, 4), 0.729 * bootstrap))


def test_pessimism_avoids_where_the_ensemble_disagrees() -> None:
    """V is z on average, but one member knows only the left half."""
    proposals = th.tensor([-0.4, 0.8]).view(1, 2, 1, 1)
    settings = {"model": Corridor(end=0.0), "propose": lambda latents: proposals, "num_samples": 0}

    def value(latents: th.Tensor) -> th.Tensor:
        doubt = 5 * latents[:, 0].clamp(min=0)
        return th.stack([latents[:, 0] + doubt, latents[:, 0] - doubt])

    chosen = [
        make_planner(**settings, terminal_value=value, pessimism=pessimism).plan(th.zeros(1, 1), deterministic=True)
        for pessimism in (0.0, 1.0)
    ]
    assert [plan.actions.item() for plan in chosen] == pytest.approx([0.8, -0.4])


def test_deterministic_plan_depends_on_its_state_alone() -> None:
    latents = random_states(3)
    warm_start = th.linspace(-1, 1, 5 * HORIZON).view(5, HORIZON, 1)
    planner = make_planner()
    together = planner.plan(latents, warm_start, deterministic=True)
    th.manual_seed(123)
    again = planner.plan(latents, warm_start, deterministic=True)
    assert all(th.equal(first, second) for first, second in zip(together, again, strict=True))
    for index in range(5):
        alone = planner.plan(latents[index : index + 1], warm_start[index : index + 1], deterministic=True)
        for first, second in zip(together, alone, strict=True):
            th.testing.assert_close(first[index], second[0])


def test_nan_rows_of_the_warm_start_mean_no_warm_start() -> None:
    latents = random_states(4)
    warm_start = th.full((5, HORIZON, 1), 0.9)
    warm_start[::2] = th.nan
    planner = make_planner()
    cold, warm = planner.plan(latents, deterministic=True), planner.plan(latents, warm_start, deterministic=True)
    for first, second in zip(cold, warm, strict=True):
        assert not second.isnan().any()
        th.testing.assert_close(first[::2], second[::2])
    assert (cold.mean[1::2] != warm.mean[1::2]).any()


def test_warm_start_helps_when_it_is_the_optimum() -> None:
    latents = state = 0.5 * random_states(5)
    actions = []
    for _ in range(HORIZON):
        actions.append(-state @ SYSTEM.gain.T)
        state = SYSTEM.next(state, actions[-1])
    planner = make_planner(num_iterations=1, max_std=0.05, propose=fixed_proposals(num=2))
    gap = [
        (SYSTEM.value(latents)[0] - planner.plan(latents, warm_start, deterministic=True).value).mean().item()
        for warm_start in (None, th.stack(actions, dim=1))
    ]
    assert gap[1] < 0.2 * gap[0]


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"num_samples": -1}, "num_samples=-1 must be at least 0"),
        ({"num_iterations": -1}, "num_iterations=-1 must be at least 0"),
        ({"num_elites": 0}, "num_elites=0 must be at least 1"),
        ({"min_std": 0.6, "max_std": 0.5}, "min_std <= max_std"),
        ({"min_std": -0.1}, "min_std=-0.1 must be at least 0"),
    ],
)
def test_wrong_settings_are_named(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_planner(**wrong)


def step(tracker: PlanTracker, rewards: list[float], ended: str = "--") -> list[list[float]]:
    """``ended`` has a letter for each environment: T for terminated, L for a time limit."""
    terminated, truncated = (np.array([letter == end for letter in ended]) for end in "TL")
    return [values.tolist() for values in tracker.step(np.array(rewards), terminated, truncated)]


def test_plan_tracker_by_hand() -> None:
    tracker = PlanTracker(n_envs=2, gamma=0.5)
    tracker.start(np.array([5.0, 50.0]))
    assert step(tracker, [1.0, 10.0]) == [[], []]
    tracker.start(np.array([np.nan, 70.0]))
    assert step(tracker, [2.0, 20.0], "-T") == [[50.0, 70.0], [10.0 + 20.0 / 2, 20.0]]
    tracker.start(np.array([6.0, 60.0]))
    assert step(tracker, [4.0, 40.0], "T-") == [[5.0, 6.0], [1.0 + 2.0 / 2 + 4.0 / 4, 4.0]]


def test_plan_tracker_ends_at_a_time_limit_with_the_last_promise() -> None:
    tracker = PlanTracker(n_envs=2, gamma=0.5)
    tracker.start(np.array([5.0, 50.0]))
    assert step(tracker, [1.0, 10.0]) == [[], []]
    tracker.start(np.array([8.0, np.nan]))
    assert step(tracker, [2.0, 20.0], "LL") == [[5.0], [1.0 + 8.0 / 2]]  # one promise alone has nothing to be held to
    assert step(tracker, [100.0, 100.0], "TT") == [[], []]  # no plan is followed: these rewards belong to none


def test_plan_tracker_keeps_no_more_than_its_longest_episode() -> None:
    tracker = PlanTracker(n_envs=1, gamma=0.5, max_steps=3)
    for promise in (4.0, 2.0):
        tracker.start(np.array([promise]))
        assert step(tracker, [1.0], "-") == [[], []]
    tracker.start(np.array([8.0]))
    assert step(tracker, [1.0], "-") == [[4.0, 2.0], [1.0 + 1.0 / 2 + 8.0 / 4, 1.0 + 8.0 / 2]]
    assert tracker.rewards == [[]] and tracker.plans == [[]]
