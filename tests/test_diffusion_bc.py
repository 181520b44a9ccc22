"""DiffusionBC: the same cloning as MODIP's, no network beside it, and nothing learned from rollouts."""

import json
import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from conftest import SMALL_POLICY
from episodes import in_one_sentence, write_d4rl
from gymnasium import spaces
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import configure
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.vec_env import VecNormalize
from walk import MakeModel, Walk, assert_same, observations, parameters, record_walk, vec_walk

from modip_sb3.baselines import DiffusionBC
from modip_sb3.datasets import OfflineDataset
from modip_sb3.diffusion_policy import DiffusionPolicy
from modip_sb3.evaluation import evaluate
from modip_sb3.offline import measure_blur

SMALL = {name: SMALL_POLICY[name] for name in ("denoiser", "num_inference_steps")} | {"net_arch": [16]}


def make(env: Any, policy: str = "MlpPolicy", **kwargs: Any) -> DiffusionBC:
    kwargs["policy_kwargs"] = SMALL | kwargs.get("policy_kwargs", {})
    return DiffusionBC(policy, env, **({"batch_size": 8, "pretrain_steps": 5, "seed": 0} | kwargs))


# ------------------------------------------------------------------ cloning


def test_an_update_is_the_cloning_update_of_modip(make_model: MakeModel) -> None:
    arrays = record_walk()
    modip, clone = make_model(Walk(), offline_dataset=arrays, n_steps=1), make(Walk(), offline_dataset=arrays)
    modip.pretrain(1, clone_only=True)
    clone.pretrain(1)
    shared = {name: value for name, value in parameters(modip).items() if name in clone.policy.state_dict()}
    clone.policy.load_state_dict(shared, strict=True)
    clone.actor_optimizer.load_state_dict(deepcopy(modip.actor_optimizer.state_dict()))
    clone.actor_tau = modip.actor_tau
    for model in (modip, clone):
        np.random.seed(1)
        th.manual_seed(1)
        model._update(model._sample_offline(8, 4), "clone")
    after = parameters(modip)
    assert_same(parameters(clone), {name: after[name] for name in shared})
    assert not th.equal(after["actor_ema.denoiser.input.weight"], shared["actor_ema.denoiser.input.weight"])


def test_it_clones_the_behaviour() -> None:
    arrays = record_walk(400)
    arrays["actions"] = np.clip(-0.5 * arrays["observations"][:, :1], -1, 1)  # what the random walk did not do
    arrays.pop("next_observations")
    settings = {"learning_rate": 3e-3, "batch_size": 64, "actor_tau": 0.05}
    model = make(
        Walk(),
        offline_dataset=arrays,
        policy_kwargs={"net_arch": [32], "action_horizon": 1, "n_action_steps": 1, "num_inference_steps": 5},
        **settings,
    )
    obs = np.linspace(-2, 2, 9, dtype=np.float32)[:, None].repeat(2, axis=1)

    def error() -> float:
        return float(np.abs(model.predict(obs, deterministic=True)[0] + 0.5 * obs[:, :1]).mean())

    before = error()
    model.pretrain(300)
    assert error() < 0.3 * before, (before, error())


def test_only_what_cloning_needs_is_built() -> None:
    model = make(Walk())
    assert {name for name, _ in model.policy.named_children()} == {
        "features_extractor",
        "normalizer",
        "actor",
        "actor_ema",
    }
    learned = {id(p) for group in model.actor_optimizer.param_groups for p in group["params"]}
    assert learned == {id(parameter) for parameter in model.policy.actor.parameters()}
    assert model.replay_buffer.buffer_size == 2
    assert list(model.get_parameters()) == ["policy", "actor_optimizer"]


def test_actions_after_an_episodes_end_do_not_count() -> None:
    model = make(Walk(), offline_dataset=record_walk()).pretrain(1)
    batch = model._sample_offline(64, 4)
    assert 0 < batch.mask.mean() < 1
    features = model.policy.features(batch.observations[:, 0])
    losses = []
    for weights in (batch.mask, th.ones_like(batch.mask)):
        th.manual_seed(0)
        losses.append(model.policy.compute_loss(batch.actions, features, weights)[0].item())
    th.manual_seed(0)
    assert model._update(batch, "offline")["actor_loss"].item() == pytest.approx(losses[0]) != pytest.approx(losses[1])


def test_the_condition_is_blurred_in_proportion_to_its_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(Walk(), policy_kwargs={"condition_noise": 0.2})
    policy, seen = model.policy, []
    compute_loss = policy.actor.compute_loss
    monkeypatch.setattr(policy.actor, "compute_loss", lambda *args: seen.append(args[1]) or compute_loss(*args))
    spread = th.tensor([3.0, 0.0])  # a feature that does not vary has no noise
    condition, chunks, weights = spread * th.randn(2000, 2), th.zeros(2000, *policy.chunk_shape), th.ones(2000, 4)
    policy.compute_loss(chunks, condition, weights)
    assert th.allclose((seen[0] - condition).std(0), 0.2 * spread, rtol=0.1)
    policy.condition_noise = 0.0
    policy.compute_loss(chunks, condition, weights)
    assert th.equal(seen[1], condition)


def parallel_lines(num_lines: int, num_steps: int = 100) -> dict[str, Any]:
    """Episodes side by side: the first coordinate tells when, the second one which."""
    which, when = np.meshgrid(np.linspace(0, 1, num_lines), np.linspace(0, 1, num_steps), indexing="ij")
    observations = np.stack([when, which], axis=-1).reshape(-1, 2).astype(np.float32)
    zeros, ends = np.zeros(len(observations), np.float32), np.tile(np.arange(num_steps) == num_steps - 1, num_lines)
    names = ("observations", "actions", "rewards", "terminations", "truncations")
    return dict(zip(names, (observations, zeros[:, None], zeros, np.zeros_like(ends), ends), strict=True))


@pytest.mark.parametrize("scale", [(1.0, 1.0), (1.0, 0.0)])
def test_the_blur_is_a_seventh_of_the_distance_between_episodes(scale: tuple[float, float]) -> None:
    data = parallel_lines(41)
    halves = [OfflineDataset.load({k: v[part] for k, v in data.items()}) for part in (slice(2000), slice(2000, None))]
    blur = measure_blur(halves, lambda obs: th.tensor(scale) * th.as_tensor(obs))
    gap = 1 / 40 / np.linspace(0, 1, 41).std()
    expected = gap / np.sqrt(2) / 7 if all(scale) else 0  # without the second one, the lines are the same
    assert blur == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("num_lines", [1, 3])
def test_the_blur_is_limited_where_there_are_few_episodes(num_lines: int) -> None:
    assert measure_blur([OfflineDataset.load(parallel_lines(num_lines))], th.as_tensor) == 0.1


def test_the_data_blurs_the_condition_of_its_clones(tmp_path: Path) -> None:
    model = make(Walk(), offline_dataset=parallel_lines(41), policy_kwargs={"condition_noise": "auto"})
    assert model.policy.blur == 0
    model.pretrain(1)
    blur = model.policy.blur.item()
    assert 0 < blur < 0.1
    model.save(tmp_path / "model")
    model.save_weights(tmp_path / "weights")
    others = [DiffusionBC.load(tmp_path / "model", env=Walk()), DiffusionBC.from_weights(tmp_path / "weights", Walk())]
    for other in [*others, DiffusionBC.from_pretrained(model, offline_dataset=parallel_lines(3)).pretrain(1)]:
        assert other.policy.blur == pytest.approx(blur)
    condition, chunks, weights = th.randn(2000, 2), th.zeros(2000, *model.policy.chunk_shape), th.ones(2000, 4)
    losses = []
    for noise in ("auto", blur, 0.0):
        model.policy.condition_noise = noise
        th.manual_seed(0)
        losses.append(model.policy.compute_loss(chunks, condition, weights)[0].item())
    assert losses[0] == pytest.approx(losses[1]) != pytest.approx(losses[2])


@pytest.mark.parametrize("kind", ["box", "dict"])
def test_the_blur_is_of_what_vec_normalize_returns(kind: str) -> None:
    policy = "MlpPolicy" if kind == "box" else "MultiInputPolicy"
    models = [
        make(env, policy, offline_dataset=record_walk(kind=kind), policy_kwargs={"condition_noise": "auto"})
        for env in (Walk(kind), VecNormalize(vec_walk(kind=kind)))
    ]
    plain, normalized = (model.pretrain(1).policy.blur.item() for model in models)
    assert normalized == pytest.approx(plain, rel=0.02)


def test_noise_keeps_a_clone_of_few_states_smooth() -> None:
    """A jump of the actions in the data becomes a slope."""
    arrays = record_walk(400)
    arrays["actions"] = np.sign(arrays["observations"][:, :1]).astype(np.float32)
    arrays.pop("next_observations")
    slopes = []
    for noise in (0.0, 0.5):
        settings = {"learning_rate": 3e-3, "batch_size": 64, "actor_tau": 0.05, "offline_dataset": arrays}
        model = make(Walk(), policy_kwargs={"condition_noise": noise}, **settings).pretrain(300)
        states = np.stack([np.linspace(-0.2, 0.2, 21), np.zeros(21)], axis=1).astype(np.float32)
        obs, _ = model.policy.obs_to_tensor(states)
        chunks = model.policy.sample_chunks(model.policy.features(obs), deterministic=True)
        slopes.append(chunks[:, 0, 0].diff().abs().max().item())
    assert slopes[1] < slopes[0]


class Learned(FlattenExtractor):
    """A features extractor with parameters."""

    def __init__(self, observation_space: spaces.Box) -> None:
        super().__init__(observation_space)
        self._features_dim = 6
        self.linear = th.nn.Linear(2, 6)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.linear(super().forward(observations))


def test_a_features_extractor_learns_from_the_denoising_loss() -> None:
    model = make(Walk(), offline_dataset=record_walk(), policy_kwargs={"features_extractor_class": Learned})
    before = parameters(model)["features_extractor.linear.weight"]
    model.pretrain(2)
    assert not th.equal(parameters(model)["features_extractor.linear.weight"], before)


# ------------------------------------------------------------------ learn


@pytest.mark.parametrize("kind", ["box", "dict", "discrete"])
def test_learn_clones_and_then_only_acts(kind: str) -> None:
    policy = "MultiInputPolicy" if kind == "dict" else "MlpPolicy"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = make(vec_walk(2, kind=kind), policy, offline_dataset=record_walk(kind=kind))
        before = parameters(model)
        assert model.learn(1) is model
        cloned = parameters(model)
        model.learn(30)
    assert (model._n_pretrain_updates, model._n_updates, model.num_timesteps) == (5, 0, 30)
    assert_same(parameters(model), cloned)
    changed = {name.split(".")[0] for name, value in cloned.items() if not th.equal(value, before[name])}
    assert changed == {"actor", "actor_ema", "normalizer", "num_actor_updates"}
    assert len(model.ep_info_buffer) > 0  # the rollouts are counted


def test_evaluations_beside_other_algorithms(tmp_path: Path) -> None:
    model = make(vec_walk(), offline_dataset=record_walk())
    model.set_logger(configure(str(tmp_path), ["json"]))
    evaluation = EvalCallback(vec_walk(), None, None, 2, 20, str(tmp_path), str(tmp_path), verbose=0)
    model.learn(60, callback=evaluation, progress_bar=True)
    assert evaluation.evaluations_timesteps == [20, 40, 60]
    keys = set().union(*map(json.loads, (tmp_path / "progress.json").read_text().splitlines()))
    assert {"pretrain/actor_loss", "rollout/ep_rew_mean", "eval/mean_reward"} <= keys
    assert not {key for key in keys if key.startswith("train/")}
    DiffusionBC.load(tmp_path / "best_model", env=vec_walk())


@pytest.mark.parametrize("n_envs", [1, 2])
def test_same_seed_same_numbers(n_envs: int) -> None:
    def run(seed: int) -> dict[str, th.Tensor]:
        return parameters(make(vec_walk(n_envs), seed=seed, offline_dataset=record_walk()).learn(4))

    assert_same(run(3), run(3))
    with pytest.raises(AssertionError):
        assert_same(run(3), run(4))


def test_vec_normalize() -> None:
    env = VecNormalize(vec_walk(2))
    model = make(env, offline_dataset=record_walk(200)).learn(10)
    assert 200 <= env.obs_rms.count < 230
    assert model.policy.normalizer.mean.abs().max() < 0.1
    evaluate_policy(model, env, n_eval_episodes=2, warn=False)


# ------------------------------------------------------------------ saving


@pytest.mark.parametrize("denoiser", ["mlp", "unet"])
@pytest.mark.parametrize("proposal", ["diffusion", "gaussian"])
def test_save_and_load(tmp_path: Path, denoiser: str, proposal: str) -> None:
    kwargs = {"denoiser": denoiser, "proposal": proposal, "action_horizon": 5, "n_action_steps": 2}
    model = make(Walk(), offline_dataset=record_walk(), policy_kwargs=kwargs).learn(12)
    model.save(tmp_path / "model")
    loaded = DiffusionBC.load(tmp_path / "model", env=Walk())
    assert_same(parameters(model), parameters(loaded))
    obs = observations(model)
    expected, state = model.predict(obs, deterministic=True)
    np.testing.assert_array_equal(loaded.predict(obs, deterministic=True)[0], expected)
    assert state is not None and state[0].shape == (3, 5, 1) and state[1].tolist() == [1, 1, 1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the data is not missed: it is cloned already
        loaded.learn(5, reset_num_timesteps=False)
    assert (loaded.num_timesteps, loaded._n_pretrain_updates) == (17, 5)
    model.policy.save(tmp_path / "policy")
    policy = DiffusionPolicy.load(tmp_path / "policy")
    np.testing.assert_array_equal(policy.predict(obs, deterministic=True)[0], expected)


def test_cloning_goes_on_after_loading(tmp_path: Path) -> None:
    path = write_d4rl(tmp_path / "walk.hdf5", {k: v for k, v in record_walk().items() if k != "next_observations"})
    make(Walk(), offline_dataset=str(path)).pretrain(3).save(tmp_path / "model")
    loaded = DiffusionBC.load(tmp_path / "model", env=Walk())
    assert loaded.pretrain(4)._n_pretrain_updates == 7


# ------------------------------------------------------------------ evaluation and errors


def test_there_is_no_planner() -> None:
    model = make("Pendulum-v1")
    assert evaluate(model, "Pendulum-v1", 2, env_kwargs={"max_episode_steps": 5}).lengths.tolist() == [5, 5]
    with pytest.raises(ValueError, match=r"inference='planner' is unknown; choose from \['policy'\]") as error:
        evaluate(model, "Pendulum-v1", 1, "planner")
    in_one_sentence(error)
    assert model.inference == model.policy.inference == "policy"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "DiffusionBC learns from data: pass offline_dataset"),
        ({"pretrain_steps": 0}, "pretrain_steps=0 must be at least 1"),
        ({"actor_tau": 2}, "actor_tau=2 is not between 0 and 1"),
        ({"actor_decay_start": 0}, "actor_decay_start=0 must be at least 1"),
        ({"policy_kwargs": {"n_action_steps": 5}}, "n_action_steps=5 .* action_horizon=4"),
        ({"offline_dataset": record_walk(shape=(2,))}, r"actions have shape \(2,\), expected \(1,\)"),
    ],
    ids=str,
)
def test_errors(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        make(Walk(), **settings).learn(5)
    in_one_sentence(error)
