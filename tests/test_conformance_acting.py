"""What SB3 promises of ``predict`` and of spaces, for every algorithm."""

from typing import Any

import numpy as np
import pytest
import torch as th
from algorithms import LEARNERS, Sampler, every_algorithm, make, random_data
from episodes import in_one_sentence
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.vec_env import DummyVecEnv
from walk import Walk, assert_same, observations, parameters, rows_of, vec_walk

BOX = spaces.Box(-1.0, 1.0, (2,), np.float32)
STEP = spaces.Box(-1.0, 1.0, (1,), np.float32)

# ------------------------------------------------------------------ predict


@every_algorithm
@pytest.mark.parametrize("kind", ["box", "dict", "discrete"])
def test_predict_of_one_and_of_several_observations(algo: str, kind: str) -> None:
    model = make(algo, Walk(kind, shape=(2,)))
    obs = observations(model)
    actions, state = model.predict(obs, deterministic=True)
    assert isinstance(actions, np.ndarray) and actions.shape == (3, 2) and actions.dtype == np.float32
    assert model.action_space.contains(actions[0])
    action, _ = model.predict(rows_of(obs, 1), deterministic=True)
    assert isinstance(action, np.ndarray) and action.shape == (2,) and action.dtype == np.float32
    # float32 sums in another order, which the UNet's first denoising step, from almost pure noise, amplifies
    np.testing.assert_allclose(action, actions[1], atol=1e-4 if algo == "DiffusionBC" else 1e-5)
    again, _ = model.predict(obs, state, np.ones(3, bool), deterministic=True)
    np.testing.assert_allclose(again, actions, atol=1e-5)
    np.testing.assert_array_equal(model.policy.predict(obs, deterministic=True)[0], actions)


@every_algorithm
def test_observations_may_be_lists(algo: str) -> None:
    model = make(algo)
    obs = observations(model)
    for part in (obs, obs[0]):
        expected, _ = model.predict(part, deterministic=True)
        np.testing.assert_array_equal(model.predict(part.tolist(), deterministic=True)[0], expected)
        np.testing.assert_array_equal(model.predict(part.astype(np.float64), deterministic=True)[0], expected)


@every_algorithm
def test_predict_follows_a_vec_env(algo: str) -> None:
    env = vec_walk(3)
    model = make(algo, env)
    obs, state, starts = env.reset(), None, np.ones(3, bool)
    for _ in range(8):
        actions, state = model.predict(obs, state, starts)
        obs, _, starts, _ = env.step(actions)
    assert actions.shape == (3, 1)


@every_algorithm
def test_what_reset_returns_is_no_observation(algo: str) -> None:
    model = make(algo)
    with pytest.raises(ValueError, match="a tuple"):
        model.predict(Walk().reset())


@every_algorithm
@pytest.mark.parametrize("obs", [np.zeros(3), np.zeros((2, 3)), np.zeros((1, 1, 2))], ids=lambda obs: str(obs.shape))
def test_observations_of_another_shape(algo: str, obs: np.ndarray) -> None:
    with pytest.raises(ValueError, match="shape"):
        make(algo).predict(obs)


@every_algorithm
def test_predict_is_random_unless_deterministic(algo: str) -> None:
    model = make(algo, Walk(shape=(2,)))
    obs = observations(model)
    th.manual_seed(0)
    first, second = model.predict(obs)[0], model.predict(obs)[0]
    assert not np.array_equal(first, second)
    first, second = (model.predict(obs, deterministic=True)[0] for _ in range(2))
    np.testing.assert_array_equal(first, second)


@every_algorithm
def test_evaluate_policy(algo: str) -> None:
    env = make_vec_env(Walk, 2)
    model = make(algo, env)
    rewards, lengths = evaluate_policy(model, env, n_eval_episodes=4, return_episode_rewards=True)
    assert len(rewards) == len(lengths) == 4 and all(2 <= length <= 6 for length in lengths)


# ------------------------------------------------------------------ training and evaluation mode


class ModeRecorder(FlattenExtractor):
    """Features with a batch normalisation in front, which keeps the modes that it was called in."""

    modes: list[bool]

    def __init__(self, observation_space: spaces.Space) -> None:
        super().__init__(observation_space)
        self.norm = th.nn.BatchNorm1d(self.features_dim)

    def forward(self, obs: th.Tensor) -> th.Tensor:
        ModeRecorder.modes.append(self.training)
        return self.norm(super().forward(obs))


@every_algorithm
def test_networks_act_in_evaluation_mode_and_learn_in_training_mode(algo: str) -> None:
    data = {"offline_dataset": random_data(Walk())} if algo == "DPPO" else {}  # it extracts features by cloning alone
    model = make(algo, policy_kwargs={"features_extractor_class": ModeRecorder}, **data)
    ModeRecorder.modes = []
    before = parameters(model)
    for deterministic in (True, False):
        model.predict(observations(model), deterministic=deterministic)
    assert ModeRecorder.modes and not any(ModeRecorder.modes)
    assert_same(parameters(model), before)  # statistics of a batch are none of predict's business
    model.learn(12)
    assert any(ModeRecorder.modes)
    moved = {name for name, value in parameters(model).items() if not th.equal(value, before[name])}
    assert any("running_mean" in name for name in moved)
    ModeRecorder.modes = []
    model.policy.set_training_mode(True)
    model.predict(observations(model))
    assert not any(ModeRecorder.modes)


@every_algorithm
def test_rollouts_are_in_evaluation_mode(algo: str) -> None:
    kwargs: dict[str, Any] = {"gradient_steps": 0, "learning_starts": 0} if algo in LEARNERS else {}
    model = make(algo, policy_kwargs={"features_extractor_class": ModeRecorder}, **kwargs)
    if algo == "DiffusionBC":
        model.pretrain(1)
    model.policy.set_training_mode(True)
    ModeRecorder.modes = []
    model.learn(8)  # acts, and learns nothing
    assert ModeRecorder.modes and not any(ModeRecorder.modes)


# ------------------------------------------------------------------ spaces


@every_algorithm
@pytest.mark.parametrize(
    "observation_space",
    [
        spaces.Box(-1.0, 1.0, (2,), np.float64),
        spaces.Box(-np.inf, np.inf, (2, 3), np.float32),
        spaces.Box(0, 255, (3,), np.uint8),
        spaces.Box(-5, 5, (2,), np.int64),
        spaces.Discrete(4),
        spaces.MultiDiscrete([2, 3]),
        spaces.MultiBinary(3),
        spaces.Dict({"a": spaces.Box(-1.0, 1.0, (2,), np.float64), "b": spaces.Discrete(3)}),
    ],
    ids=str,
)
def test_observation_spaces(algo: str, observation_space: spaces.Space) -> None:
    model = make(algo, Sampler(observation_space, STEP)).learn(9)
    action, _ = model.predict(observation_space.sample(), deterministic=True)
    assert STEP.contains(action)


@every_algorithm
@pytest.mark.parametrize("start", [-2, 1])
def test_discrete_observations_must_start_at_zero(algo: str, start: int) -> None:
    with pytest.raises(ValueError) as error:
        make(algo, Sampler(spaces.Dict({"kind": spaces.Discrete(4, start=start)}), STEP))
    in_one_sentence(error, "'kind'", f"start={start}", "observation wrapper")


@every_algorithm
@pytest.mark.parametrize(
    "observation_space",
    [spaces.Tuple([BOX, STEP]), spaces.Dict({"a": spaces.Dict({"b": BOX})})],
    ids=["tuple", "nested"],
)
def test_observations_that_are_not_supported(algo: str, observation_space: spaces.Space) -> None:
    with pytest.raises((ValueError, NotImplementedError), match="support"):  # ours, or SB3's
        make(algo, Sampler(observation_space, STEP), offline_dataset=None).learn(4)


@every_algorithm
@pytest.mark.filterwarnings("ignore:.*Casting input x to numpy array")  # Gymnasium, of scalar actions
@pytest.mark.parametrize(
    "action_space",
    [
        spaces.Box(-1.0, 1.0, (2,), np.float64),
        spaces.Box(-3.0, 0.5, (1,), np.float32),
        spaces.Box(np.array([0.0, -2.0]), np.array([10.0, -1.0]), dtype=np.float64),
        spaces.Box(-1.0, 2.0, (), np.float32),
        spaces.Box(-0.3, 0.7, (2, 2), np.float32),
    ],
    ids=str,
)
def test_action_spaces(algo: str, action_space: spaces.Box) -> None:
    model = make(algo, DummyVecEnv([lambda: Sampler(BOX, action_space) for _ in range(2)])).learn(10)
    if algo in LEARNERS:
        stored = model.replay_buffer.actions[: model.replay_buffer.pos]
        assert np.abs(stored).max() <= 1
    for deterministic in (True, False):
        actions, _ = model.predict(observations(model), deterministic=deterministic)
        assert actions.shape == (3, *action_space.shape) and actions.dtype == action_space.dtype
        action, _ = model.predict(BOX.sample(), deterministic=deterministic)
        assert np.shape(action) == action_space.shape and action.dtype == action_space.dtype
        assert all(map(action_space.contains, [*actions, action]))


@every_algorithm
@pytest.mark.parametrize(
    "action_space", [spaces.Discrete(2), spaces.MultiDiscrete([2, 3]), spaces.MultiBinary(2)], ids=str
)
def test_actions_must_be_a_box(algo: str, action_space: spaces.Space) -> None:
    env = Sampler(BOX, action_space)
    kwargs: dict[str, Any] = {"offline_dataset": None} if algo == "DiffusionBC" else {}
    with pytest.raises(AssertionError) as error:
        make(algo, env, **kwargs)
    assert "Box" in str(error.value) and str(action_space) in str(error.value) and "\n" not in str(error.value)


@every_algorithm
def test_actions_must_be_bounded(algo: str) -> None:
    with pytest.raises(AssertionError) as error:
        make(algo, Sampler(BOX, spaces.Box(-np.inf, 1.0, (1,))), offline_dataset=None)
    assert "finite" in str(error.value)
