"""TD-MPC2 as an SB3 algorithm: learning, acting, saving, and the zoo."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
import yaml
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback, EvalCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecNormalize
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from walk import PLANS, Walk, assert_same, both_modes, observations, record_walk, rows_of, vec_walk

from modip_sb3 import zoo
from modip_sb3.baselines import TDMPC2
from modip_sb3.baselines.tdmpc2_policy import TDMPC2Policy
from modip_sb3.evaluation import evaluate

ROOT = Path(__file__).parent.parent
CONFIG = yaml.safe_load((ROOT / "zoo_configs" / "tdmpc2.yml").read_text())
LOSSES = {"consistency_loss", "reward_loss", "q_loss", "actor_loss"}
METRICS = LOSSES | {"q_mean", "entropy", "q_scale"}
SMALL_POLICY = {"net_arch": [16], "encoder_arch": [16], "latent_dim": 16, "n_critics": 3, "num_proposals": 2}
SMALL_PLANNER = {"num_samples": 6, "num_elites": 3, "num_iterations": 2}
SMALL = {"batch_size": 8, "learning_starts": 10, "pretrain_steps": 5, "buffer_size": 1000, "gamma": 0.9, "seed": 0}
MakeModel = Callable[..., TDMPC2]
ENV_ID, NAME = "tdmpc2-test/walk-v0", "tdmpc2-test-walk-v0"
gym.register(ENV_ID, Walk, max_episode_steps=4)


@pytest.fixture
def make_model() -> MakeModel:
    """``TDMPC2`` with tiny networks; arguments and single entries of the nested ones can be given."""

    def make(env: Any, policy: str = "MlpPolicy", **kwargs: Any) -> TDMPC2:
        kwargs["policy_kwargs"] = SMALL_POLICY | kwargs.get("policy_kwargs", {})
        kwargs["planner_kwargs"] = SMALL_PLANNER | kwargs.get("planner_kwargs", {})
        return TDMPC2(policy, env, **(SMALL | kwargs))

    return make


def parameters(model: TDMPC2) -> dict[str, th.Tensor]:
    return {name: value.clone() for name, value in model.policy.state_dict().items()}


# ------------------------------------------------------------------ learning


@both_modes
def test_learns_from_scratch_without_a_warning(make_model: MakeModel, mode: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = make_model(Walk(), rollout_with=mode)
        before = parameters(model)
        assert model.learn(20) is model
    assert (model.num_timesteps, model._n_updates) == (20, 19)  # as many as seed steps first, then one for each step
    for name in ("world_model", "critic", "critic_target", "actor"):
        changed = [not th.equal(v, before[f"{name}.{k}"]) for k, v in getattr(model.policy, name).named_parameters()]
        assert any(changed), name
    assert all(th.isfinite(value).all() for value in parameters(model).values())


def test_seed_updates_come_once(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model(Walk(), train_freq=2).learn(12)
    assert model._n_updates == 10
    model.learn(6, reset_num_timesteps=False)
    assert model._n_updates == 13
    model.save(tmp_path / "model")
    loaded = TDMPC2.load(tmp_path / "model", env=Walk()).learn(4, reset_num_timesteps=False)
    assert loaded._n_updates == 15


class KeepKeys(BaseCallback):
    """Collects the names of all that was logged."""

    def __init__(self) -> None:
        super().__init__()
        self.keys: set[str] = set()

    def _on_step(self) -> bool:
        self.keys |= set(self.model.logger.name_to_value)
        return True


def test_seed_steps_are_uniform_and_only_without_data(make_model: MakeModel) -> None:
    model = make_model(Walk(), learning_starts=300).learn(300)
    actions = model.replay_buffer.actions[:300, 0, 0]
    assert model._n_updates == 0 and actions.std() == pytest.approx(3**-0.5, abs=0.06)
    keep = KeepKeys()
    model = make_model(Walk(), offline_dataset=record_walk(), learning_starts=None).learn(4, keep)
    assert (model._n_pretrain_updates, model._n_updates) == (5, 4)
    assert "rollout/plan_gain" in keep.keys  # planned from the first step on


@pytest.mark.parametrize("kind", ["box", "dict", "discrete"])
def test_learns_on_every_observation_space(make_model: MakeModel, kind: str) -> None:
    policy = "MultiInputPolicy" if kind == "dict" else "MlpPolicy"
    model = make_model(Walk(kind), policy).learn(20)
    evaluate_policy(model, Walk(kind), n_eval_episodes=2, warn=False)
    make_model(Walk(kind), policy, offline_dataset=record_walk(kind=kind), learning_starts=0).pretrain(5).learn(10)


@pytest.mark.parametrize("vec_env_cls", [DummyVecEnv, SubprocVecEnv])
def test_vec_envs(make_model: MakeModel, vec_env_cls: type[VecEnv]) -> None:
    env = vec_walk(4, vec_env_cls)
    model = make_model(env, gradient_steps=-1).learn(21)
    assert (model.num_timesteps, model._n_updates) == (24, 10 + 3 * 4)
    env.close()


def test_episode_length_of_worker_processes() -> None:
    def make() -> gym.Env:
        return gym.make("Pendulum-v1")

    env = SubprocVecEnv([make, make], start_method="fork")
    model = TDMPC2("MlpPolicy", env, policy_kwargs=SMALL_POLICY)
    assert (model.gamma, model.learning_starts) == (pytest.approx(0.975), 1000)
    env.close()


def test_pretrain_then_learn(make_model: MakeModel) -> None:
    data = record_walk()
    data["rewards"] += 100
    model = make_model(Walk(), offline_dataset=data, learning_starts=None, offline_fraction=0.25)
    before = parameters(model)
    model.pretrain(6)
    for name in ("world_model", "critic", "critic_target", "actor"):
        changed = [not th.equal(v, before[f"{name}.{k}"]) for k, v in getattr(model.policy, name).named_parameters()]
        assert any(changed), name
    model.learn(12)
    assert (model._n_pretrain_updates, model._n_updates) == (6, 12)
    batch = model._sample_batch(40)
    assert (batch.rewards[:, 0] > 50).sum() == 10 and batch.actions.shape == (40, 3, 1)
    with pytest.raises(ValueError, match="no policy to clone.* without clone_only"):
        model.pretrain(1, clone_only=True)


def test_terminations_need_the_head(make_model: MakeModel) -> None:
    message = "An episode terminated .* pass termination_head=True"
    with pytest.raises(ValueError, match=message):
        make_model(Walk(terminates=True)).learn(20)
    data = record_walk(terminates=True)
    with pytest.raises(ValueError, match=message):
        make_model(Walk(), offline_dataset=data).pretrain(1)
    model = make_model(Walk(terminates=True), offline_dataset=data, termination_head=True, learning_rate=1e-2)
    assert model.policy.world_model.termination_head is not None
    before = parameters(model)["world_model.termination_head.0.weight"]
    model.learn(15)
    assert not th.equal(before, parameters(model)["world_model.termination_head.0.weight"])
    assert "termination_loss" in model._update(model._sample_batch(8), "online")
    assert "termination_loss" not in make_model(Walk()).learn(12)._update(model._sample_batch(8), "online")


def test_the_planner_improves_with_learning(make_model: MakeModel) -> None:
    sizes = {"policy_kwargs": {"net_arch": [32], "encoder_arch": [32]}, "learning_rate": 3e-3, "batch_size": 64}
    planner_kwargs = {"num_samples": 32, "num_elites": 8}
    model = make_model(Walk(), offline_dataset=record_walk(1500), planner_kwargs=planner_kwargs, **sizes)

    def mean_return() -> float:
        env = vec_walk(10)
        env.seed(5)
        return float(evaluate_policy(model, env, 50, warn=False)[0])  # type: ignore[arg-type]

    assert mean_return() < -2.5
    model.pretrain(150)
    assert mean_return() > -1.6  # -3.1 and -1.1 when this was written


def test_callbacks_and_logged_keys(make_model: MakeModel, tmp_path: Path) -> None:
    keep = KeepKeys()
    callbacks = [
        EvalCallback(vec_walk(), eval_freq=10, n_eval_episodes=2, best_model_save_path=str(tmp_path), verbose=0),
        CheckpointCallback(10, str(tmp_path), "walk"),
        keep,
    ]
    make_model(Walk(), tensorboard_log=str(tmp_path / "tb"), offline_dataset=record_walk()).learn(30, callbacks)
    assert {"best_model.zip", "walk_10_steps.zip", "walk_30_steps.zip"} <= {path.name for path in tmp_path.iterdir()}
    assert keep.keys >= {f"train/{name}" for name in METRICS} | PLANS
    assert max(map(len, keep.keys)) <= 36
    (run,) = (tmp_path / "tb").iterdir()
    tags = {tag for path in run.rglob("events*") for tag in EventAccumulator(str(path)).Reload().Tags()["scalars"]}
    assert run.name == "TDMPC2_1"
    assert {"pretrain/q_loss", "train/q_loss", "rollout/ep_rew_mean"} <= tags


def test_learning_rate_schedule(make_model: MakeModel) -> None:
    model = make_model(Walk(), learning_rate=lambda remaining: 1e-2 * remaining).learn(20)
    rates = [group["lr"] for optimizer in model._optimizers for group in optimizer.param_groups]
    np.testing.assert_allclose(rates, np.array([0.3, 1.0, 1.0]) * rates[-1])
    assert 0 <= rates[-1] < 2e-3
    assert (model.model_optimizer.defaults["eps"], model.actor_optimizer.defaults["eps"]) == (1e-8, 1e-5)  # official
    encoder = model.model_optimizer.param_groups[0]["params"]
    assert {id(p) for p in encoder} == {id(p) for p in model.policy.world_model.encoder.parameters()}
    optimised = sum(p.numel() for o in model._optimizers for group in o.param_groups for p in group["params"])
    assert optimised == sum(p.numel() for p in model.policy.parameters() if p.requires_grad)


def test_policy_kwargs(make_model: MakeModel) -> None:
    class Learned(FlattenExtractor):
        def __init__(self, observation_space: gym.Space) -> None:
            super().__init__(observation_space)
            self.linear = th.nn.Linear(2, 2)

        def forward(self, obs: th.Tensor) -> th.Tensor:
            return self.linear(super().forward(obs))

    kwargs = {
        "net_arch": {"pi": [], "qf": [8, 8]},
        "features_extractor_class": Learned,
        "optimizer_class": th.optim.SGD,
        "optimizer_kwargs": {"momentum": 0.5},
        "horizon": 2,
    }
    model = make_model(Walk(), policy_kwargs=kwargs, learning_rate=0.05)
    before = model.policy.features_extractor.linear.weight.clone()
    model.learn(20)
    assert not th.equal(before, model.policy.features_extractor.linear.weight)
    assert isinstance(model.model_optimizer, th.optim.SGD) and model.sequence_length == 2


@both_modes
@pytest.mark.parametrize("n_envs", [1, 2])
def test_same_seed_same_numbers(make_model: MakeModel, n_envs: int, mode: str) -> None:
    runs = [make_model(vec_walk(n_envs), rollout_with=mode).learn(30) for _ in range(2)]
    assert_same(parameters(runs[0]), parameters(runs[1]))
    other = make_model(vec_walk(n_envs), rollout_with=mode, seed=1).learn(30)
    assert not th.equal(runs[0].policy.actor.net[0].weight, other.policy.actor.net[0].weight)


# ------------------------------------------------------------------ acting


@both_modes
@pytest.mark.parametrize("kind", ["box", "dict"])
def test_deterministic_predict(make_model: MakeModel, mode: str, kind: str) -> None:
    model = make_model(Walk(kind), "MultiInputPolicy" if kind == "dict" else "MlpPolicy", inference=mode).learn(15)
    obs = observations(model, 4)
    first, state = model.predict(obs, deterministic=True)
    np.testing.assert_array_equal(model.predict(obs, deterministic=True)[0], first)
    np.testing.assert_allclose(model.predict(rows_of(obs, slice(1, 3)), deterministic=True)[0], first[1:3], atol=1e-5)
    second, _ = model.predict(obs, state, np.array([False, True, False, False]), deterministic=True)
    np.testing.assert_allclose(second[1], first[1], atol=1e-5)
    assert not np.array_equal(model.predict(obs)[0], model.predict(obs)[0])
    single, _ = model.predict(rows_of(obs, 0), deterministic=True)
    assert single.shape == (1,)


def test_actions_lie_in_the_box(make_model: MakeModel) -> None:
    env = Walk(low=-3.0, high=-1.0, shape=(2, 2))
    model = make_model(env).learn(14)
    for inference in ("planner", "policy"):
        model.inference = inference
        actions, _ = model.predict(observations(model, 20))
        assert actions.shape == (20, 2, 2) and actions.min() >= -3 and actions.max() <= -1
    assert np.abs(model.replay_buffer.actions).max() <= 1


def test_evaluate_with_both(make_model: MakeModel) -> None:
    model = make_model("Pendulum-v1", learning_starts=5).learn(8)
    for inference in ("planner", "policy"):
        evaluation = evaluate(model, "Pendulum-v1", 2, inference, deterministic=True)
        assert evaluation.inference == inference and (evaluation.returns < 0).all()
    assert model.inference == "planner"


# ------------------------------------------------------------------ saving


@pytest.mark.parametrize("kind", ["box", "dict"])
def test_save_load_and_go_on(make_model: MakeModel, tmp_path: Path, kind: str) -> None:
    policy = "MultiInputPolicy" if kind == "dict" else "MlpPolicy"
    model = make_model(Walk(kind), policy, gamma=0.8, tau=0.5).learn(20)
    model.q_scale.fill_(3.5)
    model.save(tmp_path / "model")
    loaded = TDMPC2.load(tmp_path / "model", env=Walk(kind))
    assert_same(parameters(model), parameters(loaded))
    assert (loaded.gamma, loaded.learning_starts, loaded.q_scale.item()) == (0.8, 10, 3.5)
    assert loaded.policy.planner_kwargs == model.policy.planner_kwargs
    for name in model.optimizer_names:
        saved, restored = getattr(model, name).state_dict(), getattr(loaded, name).state_dict()
        assert all(th.equal(entry["exp_avg"], restored["state"][i]["exp_avg"]) for i, entry in saved["state"].items())
    obs = observations(model)
    for inference in ("policy", "planner"):
        model.inference = loaded.inference = inference
        expected, _ = model.predict(obs, deterministic=True)
        np.testing.assert_array_equal(loaded.predict(obs, deterministic=True)[0], expected)
    loaded.learn(10, reset_num_timesteps=False)
    assert (loaded.num_timesteps, loaded._n_updates) == (30, 29)
    other = make_model(Walk(kind), policy, seed=1)
    other.set_parameters(model.get_parameters(), exact_match=True)
    assert_same(parameters(model), parameters(other))


def test_defaults_of_the_environment_are_saved(tmp_path: Path) -> None:
    TDMPC2("MlpPolicy", "Pendulum-v1", policy_kwargs=SMALL_POLICY).save(tmp_path / "model")
    loaded = TDMPC2.load(tmp_path / "model")
    assert (loaded.gamma, loaded.learning_starts) == (pytest.approx(0.975), 1000)
    assert loaded.policy.planner_kwargs["gamma"] == loaded.gamma


@both_modes
def test_policy_saves_and_loads_alone(make_model: MakeModel, tmp_path: Path, mode: str) -> None:
    model = make_model(Walk(), inference=mode).learn(12)
    obs = observations(model)
    expected, _ = model.predict(obs, deterministic=True)
    model.policy.save(tmp_path / "policy")
    policy = TDMPC2Policy.load(tmp_path / "policy")
    assert policy.inference == mode
    np.testing.assert_array_equal(policy.predict(obs, deterministic=True)[0], expected)


def test_vec_normalize(make_model: MakeModel, tmp_path: Path) -> None:
    env = VecNormalize(vec_walk(2))
    model = make_model(env, offline_dataset=record_walk()).learn(20)
    model.save(tmp_path / "model")
    loaded = TDMPC2.load(tmp_path / "model", env=env)
    obs = env.reset()
    np.testing.assert_array_equal(loaded.predict(obs, deterministic=True)[0], model.predict(obs, deterministic=True)[0])
    loaded.learn(10, reset_num_timesteps=False)
    assert np.abs(model.replay_buffer.observations).max() <= 5  # raw


# ------------------------------------------------------------------ faults


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_size": 2}, r"model_size=2 is unknown; choose from \[1, 5, 19\]"),
        ({"policy_kwargs": {"latent_dim": 17}}, "latent_dim=17 is not a multiple of 8"),
        ({"policy_kwargs": {"horizon": 0}}, "horizon=0 must be at least 1"),
        ({"policy_kwargs": {"num_proposals": 0}}, "num_proposals=0 must be at least 1"),
        ({"policy_kwargs": {"dropout": 2.0}}, "dropout=2.0 is not between 0 and 1"),
        ({"planner_kwargs": {"num_elites": 0}}, "num_elites=0 must be at least 1"),
        ({"inference": "prior"}, "inference='prior'.*'planner'"),
        ({"rho": -1}, "rho=-1 is not between 0 and 1"),
        ({"entropy_coef": -1}, "entropy_coef=-1 must be at least 0"),
        ({"gamma": 1.1}, "gamma=1.1 is not between 0 and 1"),
    ],
    ids=str,
)
def test_wrong_settings(make_model: MakeModel, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_model(Walk(), **settings)


# ------------------------------------------------------------------ zoo


def test_every_id_has_settings() -> None:
    modip = yaml.safe_load((ROOT / "zoo_configs" / "modip.yml").read_text())
    without_data = {"Hopper-v5", "Walker2d-v5", "HalfCheetah-v5"}
    assert CONFIG.keys() == modip.keys() | without_data
    for env_id, settings in CONFIG.items():
        theirs = {} if env_id in without_data else modip[env_id]
        assert settings.get("offline_dataset") == theirs.get("offline_dataset")
        assert settings.get("pretrain_steps") == theirs.get("pretrain_steps")


def test_zoo_trains_and_optimizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["zoo"])
    run = ["train", "--algo", "tdmpc2", "--env", ENV_ID, "--seed", "0", "--verbose", "0"]
    small = ["batch_size:8", "learning_starts:10", "buffer_size:1000"]
    budget = ["-n", "14", "--eval-freq", "-1", "--hyperparams", *small]
    zoo.main([*run, *budget, "policy_kwargs:" + repr(SMALL_POLICY)])
    model = TDMPC2.load(tmp_path / "logs" / "tdmpc2" / f"{NAME}_1" / f"{NAME}.zip")
    assert model.policy.latent_dim == 16 and model.policy.planner_kwargs["num_samples"] == 104  # theirs, and ours
    search = ["--optimize", "--n-trials", "2", "--n-evaluations", "1", "--eval-episodes", "1", "--no-optim-plots"]
    study = ["--storage", "study.log", "--study-name", "walk", "-f", "optimized"]
    zoo.main([*run, "-n", "14", "--hyperparams", *small, *search, *study])
    assert list((tmp_path / "optimized" / "tdmpc2").glob("*.csv"))
    zoo.main([*run, *budget, *study, "--trial-id", "1"])  # rl_zoo3 takes 0 for none
    model = TDMPC2.load(next((tmp_path / "optimized").glob(f"tdmpc2/*/{NAME}.zip")))
    planner = model.policy.planner_kwargs
    assert planner["num_elites"] == planner["num_samples"] // 8 and 1 <= model.policy.horizon <= 5
