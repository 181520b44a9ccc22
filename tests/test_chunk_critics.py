"""Critics of chunks and acting with the best of several: DQL, IDQL, PA-RL and DSRL, by hand on small numbers."""

from typing import Any

import numpy as np
import pytest
import torch as th
from algorithms import make
from walk import Walk, record_walk

from modip_sb3.baselines import DSRL, PARL, DiffusionBC
from modip_sb3.baselines.chunk_critics import ChunkCriticAlgorithm, ChunkTransitions
from modip_sb3.buffers import SequenceBatch
from modip_sb3.checks import check_ent_coef

FAMILY = ["DQL", "IDQL", "PARL", "DSRL"]
every_member = pytest.mark.parametrize("algo", FAMILY)
ACTOR = {"denoiser": "mlp", "net_arch": [24], "num_inference_steps": 2}


def batch_of(rewards: list[float], terminations: list[float], mask: list[float]) -> SequenceBatch:
    """One sequence, whose observations count its steps and stay where the episode ends."""
    steps = np.minimum(np.arange(len(mask) + 1), sum(mask))
    observations = th.tensor(np.stack([steps, 0 * steps], axis=1), dtype=th.float32)[None]
    actions = th.linspace(-0.5, 0.5, len(mask))[None, :, None]
    return SequenceBatch(observations, actions, *(th.tensor([row]) for row in (rewards, terminations, mask)))


# ------------------------------------------------------------------ transitions of chunks


@pytest.mark.parametrize(
    ("n_action_steps", "terminations", "mask", "reward", "discount", "last"),
    [
        # 1 + 2/2 + 3/4 + 4/8, then γ^4
        pytest.param(4, [0, 0, 0, 0], [1, 1, 1, 1], 3.25, 1 / 16, 4, id="whole"),
        pytest.param(2, [0, 0, 0, 0], [1, 1, 1, 1], 2.0, 1 / 4, 2, id="executed in part"),
        pytest.param(4, [0, 1, 0, 0], [1, 1, 0, 0], 2.0, 0.0, 2, id="termination"),
        pytest.param(4, [0, 0, 0, 0], [1, 1, 0, 0], 2.0, 1 / 4, 2, id="time limit"),
        pytest.param(2, [0, 0, 1, 0], [1, 1, 1, 0], 2.0, 1 / 4, 2, id="termination after what is executed"),
    ],
)
def test_transitions_by_hand(
    n_action_steps: int, terminations: list[float], mask: list[float], reward: float, discount: float, last: int
) -> None:
    model = make("IDQL", gamma=0.5, policy_kwargs={"n_action_steps": n_action_steps})
    batch = batch_of([1.0, 2.0, 3.0, 4.0], [float(x) for x in terminations], [float(x) for x in mask])
    transitions = model._make_transitions(batch)
    assert transitions.rewards.item() == pytest.approx(reward)
    assert transitions.discounts.item() == pytest.approx(discount)
    obs = th.tensor([[0.0, 0.0], [last, 0.0]])
    expected = model.policy.features(obs)
    assert th.equal(th.cat([transitions.features, transitions.next_features]), expected)
    assert model.policy.executed(transitions.chunks).tolist() == batch.actions[:, :n_action_steps, 0].tolist()


@every_member
def test_critics_learn_the_value_of_a_chunk(algo: str) -> None:
    """Steps pay 1 and the episode terminates with the second: 1 + γ."""
    model = make(algo, gamma=0.5, learning_rate=3e-3, policy_kwargs={"net_arch": {"pi": [16], "qf": [32]}})
    batch = batch_of([1.0, 1.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0])
    for _ in range(150):
        model._update_critics(model._make_transitions(batch))
    transitions = model._make_transitions(batch)
    values = model.policy.critic(transitions.features, model.policy.executed(transitions.chunks))
    np.testing.assert_allclose(values.detach(), 1.5, atol=0.05)


def test_targets_bootstrap_from_what_each_algorithm_names() -> None:
    """The values of what follows, by networks whose outputs are set."""
    for algo in ("IDQL", "PARL"):
        model = make(algo)
        set_output(model.policy.value, 7.0)
        assert model._next_values(th.zeros(2, 2)).tolist() == pytest.approx([7.0, 7.0], rel=0.1)
    model = make("DQL")
    set_output(model.policy.critic_target, 5.0)
    assert model._next_values(th.zeros(2, 2)).tolist() == pytest.approx([5.0, 5.0], rel=0.1)
    model = make("DSRL", ent_coef=0.0)
    set_output(model.policy.critic_target, 5.0)
    with th.no_grad():
        assert model._next_values(th.zeros(2, 2)).tolist() == pytest.approx([5.0, 5.0], rel=0.1)


def set_output(ensemble: Any, value: float) -> None:
    """A two-hot head that says the same everywhere, as closely as its bins allow."""
    last = ensemble.ensemble.layers[-1]
    last.weight.data.zero_()
    distances = (ensemble.two_hot.bins - np.log1p(value)).abs()
    last.bias.data.copy_((-1000 * distances).expand_as(last.bias))


# ------------------------------------------------------------------ which chunk is executed


def prefer(model: ChunkCriticAlgorithm, slope: float = 20.0) -> None:
    """Critics whose value is ``slope`` times the first executed action."""

    def forward(latents: th.Tensor, actions: th.Tensor, members: Any = None) -> th.Tensor:
        return slope * actions[..., 0].expand(2, *actions.shape[:-1])

    model.policy.critic.forward = model.policy.critic_target.forward = forward  # type: ignore[method-assign]


CANDIDATES = th.tensor([-0.5, 0.9, 0.1])[None, :, None, None].expand(1, 3, 4, 1)


@pytest.mark.parametrize("algo", ["DQL", "IDQL", "PARL"])
def test_the_best_candidate_is_chosen(algo: str) -> None:
    model = make(algo, policy_kwargs={"selection": "best"})
    prefer(model)
    assert model.policy._choose(CANDIDATES, th.zeros(1, 2), deterministic=False)[0, 0].item() == pytest.approx(0.9)


@pytest.mark.parametrize(("selection", "slope"), [("softmax", 1.0), ("expectile", 1.0)])
def test_candidates_are_drawn_with_their_probabilities(selection: str, slope: float) -> None:
    model = make("IDQL", expectile=0.8, policy_kwargs={"selection": selection})
    prefer(model, slope)
    candidates = CANDIDATES.expand(4000, -1, -1, -1)
    chosen = model.policy._choose(candidates, th.zeros(4000, 2), deterministic=False)[:, 0, 0]
    found = [float((chosen == value).float().mean()) for value in CANDIDATES[0, :, 0, 0]]
    if selection == "softmax":
        expected = CANDIDATES[0, :, 0, 0].softmax(0).tolist()
    else:  # V starts at zero: two candidates are above it
        expected = [0.2 / 1.8, 0.8 / 1.8, 0.8 / 1.8]
    assert found == pytest.approx(expected, abs=0.03)
    deterministic = model.policy._choose(candidates, th.zeros(4000, 2), deterministic=True)[:, 0, 0]
    assert (deterministic == CANDIDATES.max()).all()


def test_one_candidate_is_the_diffusion_policy() -> None:
    model, one = make("IDQL"), make("IDQL", policy_kwargs={"num_candidates": 1})
    cloned = make("DiffusionBC")
    for each in (model, one):
        each.policy.actor_ema.load_state_dict(cloned.policy.actor_ema.state_dict())
    obs = np.zeros((2, 2), np.float32)
    expected, _ = cloned.predict(obs, deterministic=True)
    np.testing.assert_array_equal(one.predict(obs, deterministic=True)[0], expected)


# ------------------------------------------------------------------ how policies improve


def transitions_of(model: Any, chunks: th.Tensor) -> ChunkTransitions:
    num = len(chunks)
    zeros, ones = th.zeros(num), th.ones(num, chunks.shape[1])
    return ChunkTransitions(th.zeros(num, 2), chunks, ones, zeros, zeros, th.zeros(num, 2))


def begin(model: Any) -> None:
    """What ``train()`` does first."""
    for optimizer in model._optimizers:
        model._set_learning_rate(optimizer, model.learning_rate)


def mean_action(model: Any) -> float:
    with th.no_grad():
        return model.policy.actor_ema.sample(th.zeros(500, 2))[:, 0].mean().item()


@pytest.mark.parametrize("algo", ["DQL", "PARL"])
def test_the_policy_climbs_what_critics_prefer(algo: str) -> None:
    """The data's chunks are spread evenly and critics like large first actions: the clone's mean is near 0 alone."""
    means = {}
    for name in ("DiffusionBC", algo):
        model = make(name, learning_rate=3e-3, actor_tau=0.05, actor_decay_start=10**6, policy_kwargs=ACTOR)
        begin(model)
        th.manual_seed(0)
        for _ in range(200):
            chunks = (2 * th.rand(32, 1, 1) - 1).expand(-1, 4, 1) * 0.5
            transitions = transitions_of(model, chunks)
            if name == "DiffusionBC":
                model._clone(chunks, transitions.features, transitions.mask)
            else:
                prefer(model, 1.0)
                model._update_policy(None, transitions, "online")
        means[name] = mean_action(model)
    assert abs(means["DiffusionBC"]) < 0.15
    assert means[algo] > means["DiffusionBC"] + 0.2


def test_refined_chunks_go_up_the_gradient_and_stay_in_bounds() -> None:
    settings = {"num_refined": 2, "num_gradient_steps": 3, "step_size": 0.01}
    model = make("PARL", policy_kwargs=settings)
    prefer(model, 2.0)
    refined = model.policy._refine(CANDIDATES, th.zeros(1, 2))
    # the two best, in their order; 3 steps of .01 times the slope of 2, and the bound
    assert refined[0, :, 0, 0].tolist() == pytest.approx([0.96, 0.16])
    assert refined[0, :, 1:, 0].flatten().tolist() == pytest.approx([0.9] * 3 + [0.1] * 3)  # not in the critics' view
    prefer(model, 100.0)
    assert model.policy._refine(CANDIDATES, th.zeros(1, 2))[0, 0, 0].item() == 1.0


def test_a_way_that_leads_down_is_not_taken() -> None:
    """The critics are highest at .9, where a candidate is: a step would go beyond, and is refused."""
    model = make("PARL", policy_kwargs={"num_refined": 1, "num_gradient_steps": 5, "step_size": 1.0})

    def forward(latents: th.Tensor, actions: th.Tensor, members: Any = None) -> th.Tensor:
        return -((actions[..., 0] - 0.85) ** 2).expand(2, *actions.shape[:-1])

    model.policy.critic.forward = forward
    assert model.policy._refine(CANDIDATES, th.zeros(1, 2))[0, 0, 0, 0].item() == pytest.approx(0.9)


def test_the_datas_own_chunk_is_a_candidate() -> None:
    model = make("PARL", policy_kwargs={"num_gradient_steps": 0})
    prefer(model)
    chunks = th.ones(2, 4, 1)  # as good as any can be
    assert (model.policy.improve(th.zeros(2, 2), chunks)[:, 0] == 1).all()


def test_the_policy_is_distilled_now_and_then() -> None:
    model = make("PARL", policy_delay=3)
    begin(model)
    for number in range(6):
        model._n_updates = number
        model._update(batch_of([0.0] * 4, [0.0] * 4, [1.0] * 4), "online")
    assert model.policy.num_actor_updates == 2


# ------------------------------------------------------------------ steering by noise


def test_the_frozen_policy_stays_and_the_noise_actor_learns() -> None:
    model = make("DSRL", offline_dataset=record_walk())
    model.pretrain(3)
    actor = {name: value.clone() for name, value in model.policy.actor_ema.state_dict().items()}
    noise_actor = {name: value.clone() for name, value in model.policy.noise_actor.state_dict().items()}
    model.learn(20)
    assert all(th.equal(value, actor[name]) for name, value in model.policy.actor_ema.state_dict().items())
    assert any(not th.equal(value, noise_actor[name]) for name, value in model.policy.noise_actor.state_dict().items())


def test_noise_is_scaled_and_denoised() -> None:
    model = make("DSRL", policy_kwargs={"noise_magnitude": 2.0})
    condition, noise = th.zeros(3, 2), 2 * th.rand(3, 4) - 1
    expected = model.policy.actor_ema.sample(condition, 2.0 * noise.view(3, 4, 1))
    assert th.equal(model.policy.denoise(condition, noise), expected)


def test_the_noise_actor_finds_the_noise_that_pays() -> None:
    """Q(s, noise) that likes large first components: the mode goes up; and the temperature goes to its target."""
    model = make("DSRL", learning_rate=1e-2, ent_coef="auto_0.01")

    def forward(latents: th.Tensor, actions: th.Tensor, members: Any = None) -> th.Tensor:
        return actions[..., 0].expand(2, *actions.shape[:-1])

    model.policy.noise_critic.forward = forward
    features = th.zeros(64, 2)
    before = model.policy.noise_actor(features, deterministic=True)[0, 0].item()
    metrics = [model._update_noise_actor(features) for _ in range(150)]
    after = model.policy.noise_actor(features, deterministic=True)[0, 0].item()
    assert after > max(before, 0.5)
    assert metrics[-1]["entropy"] > -4 and metrics[-1]["ent_coef"] != metrics[0]["ent_coef"]


def test_a_noise_critic_learns_the_value_of_what_noise_becomes() -> None:
    model = make("DSRL", learning_rate=1e-2)
    set_output(model.policy.critic, 3.0)
    transitions = transitions_of(model, th.zeros(16, 4, 1))
    for _ in range(150):
        model._update_noise_critic(transitions)
    noise = 2 * th.rand(16, 4) - 1
    np.testing.assert_allclose(model.policy.noise_critic(transitions.features, noise).detach(), 3.0, rtol=0.1)


# ------------------------------------------------------------------ a policy that was cloned once


@pytest.mark.parametrize("algo", [*FAMILY, "DPPO"])
def test_every_algorithm_starts_from_a_cloned_policy(algo: str) -> None:
    cls: Any = type(make(algo))
    cloned = DiffusionBC("MlpPolicy", Walk(), batch_size=8, offline_dataset=record_walk(), policy_kwargs=ACTOR, seed=0)
    cloned.pretrain(5)
    settings = {"train_freq": 4} if algo == "DPPO" else {"learning_starts": 4, "gradient_steps": 1}
    model = cls.from_pretrained(cloned, batch_size=8, seed=0, **settings)
    for name, value in cloned.policy.actor_ema.state_dict().items():
        assert th.equal(model.policy.actor_ema.state_dict()[name], value)
    model.learn(12)
    assert model._n_updates > 0 and model._n_pretrain_updates == 0
    assert th.equal(model.policy.normalizer.mean, cloned.policy.normalizer.mean)
    again = DiffusionBC.from_pretrained(model, offline_dataset=record_walk())  # and back
    assert again.policy.net_arch["pi"] == [24]


@pytest.mark.parametrize("value", ["auto", "auto_0.5", 0, 0.1])
def test_entropy_coefficients(value: Any) -> None:
    check_ent_coef(value)
    model = DSRL("MlpPolicy", Walk(), ent_coef=value, policy_kwargs=ACTOR)
    expected = {"auto": 1.0, "auto_0.5": 0.5}.get(value, value)
    assert model.log_ent_coef.exp().item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"num_candidates": 0}, "num_candidates=0"),
        ({"selection": "worst"}, "selection='worst'"),
        ({"num_refined": 1.5}, "num_refined=1.5"),
        ({"step_size": -1}, "step_size=-1"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        PARL("MlpPolicy", Walk(), policy_kwargs=settings)
    with pytest.raises(ValueError, match="selection='expectile'"):
        make("DQL", policy_kwargs={"selection": "expectile"})
