"""What SB3 promises of saving and loading, for every algorithm."""

import io
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch as th
from algorithms import assert_same_state, every_algorithm, every_learner, make, optimizers, random_data
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.utils import LinearSchedule
from walk import Walk, assert_same, observations, parameters, vec_walk


def assert_same_model(first: Any, second: Any) -> None:
    assert_same(parameters(first), parameters(second))
    assert optimizers(first).keys() == optimizers(second).keys() != set()
    for name, optimizer in optimizers(first).items():
        assert_same_state(optimizer.state_dict(), optimizers(second)[name].state_dict())
    obs = observations(first)
    for deterministic in (True, False):
        actions = []
        for model in (first, second):
            th.manual_seed(0)
            actions.append(model.predict(obs, deterministic=deterministic)[0])
        np.testing.assert_array_equal(*actions)


# ------------------------------------------------------------------ models


@every_algorithm
@pytest.mark.parametrize(("kind", "target"), [("box", "str"), ("dict", "path"), ("box", "bytes")])
def test_save_load_and_go_on(algo: str, kind: str, target: str, tmp_path: Path) -> None:
    model = make(algo, Walk(kind)).learn(12)
    where: Any = {"str": str(tmp_path / "model"), "path": tmp_path / "model.zip", "bytes": io.BytesIO()}[target]
    model.save(where)
    if target == "bytes":
        where.seek(0)
    loaded = type(model).load(where, env=Walk(kind), device="cpu")
    assert_same_model(model, loaded)
    assert (loaded.num_timesteps, loaded._n_updates, loaded.seed) == (12, model._n_updates, 0)
    loaded.learn(6, reset_num_timesteps=False)
    assert loaded.num_timesteps == 18
    assert all(value.isfinite().all() for value in parameters(loaded).values())


@every_algorithm
def test_load_on_other_environments(algo: str, tmp_path: Path) -> None:
    cls = type(make(algo))
    make(algo, vec_walk(1)).learn(8).save(tmp_path / "model")
    loaded = cls.load(tmp_path / "model", env=vec_walk(3))
    loaded.learn(12)
    assert (loaded.n_envs, loaded.num_timesteps) == (3, 12)
    alone = cls.load(tmp_path / "model")
    assert alone.get_env() is None
    with pytest.raises(AssertionError, match="environment"):
        alone.learn(4)
    alone.set_env(vec_walk(1))
    alone.learn(4)
    for wrong, match in ((vec_walk(low=-3.0), "Action spaces"), (vec_walk(kind="dict"), "Observation spaces")):
        with pytest.raises(ValueError, match=match):
            cls.load(tmp_path / "model", env=wrong)
    with pytest.raises(FileNotFoundError):
        cls.load(tmp_path / "nowhere")


@every_algorithm
def test_custom_objects_and_arguments(algo: str, tmp_path: Path) -> None:
    model = make(algo, learning_rate=LinearSchedule(1e-3, 0.0, 1.0)).learn(8)
    model.save(tmp_path / "model")
    cls = type(model)
    assert cls.load(tmp_path / "model").lr_schedule(0.5) == pytest.approx(5e-4)
    objects = {"learning_rate": 7e-4, "lr_schedule": lambda _: 7e-4}
    loaded = cls.load(tmp_path / "model", env=Walk(), custom_objects=objects)
    assert loaded.learning_rate == 7e-4
    if algo != "DiffusionBC":  # it has learned, and goes on only with more of pretrain()
        loaded.learn(8)
        groups = [group for optimizer in optimizers(loaded).values() for group in optimizer.param_groups]
        assert [group["lr"] for group in groups] == pytest.approx([7e-4 * group.get("lr_scale", 1) for group in groups])
    assert cls.load(tmp_path / "model", batch_size=5).batch_size == 5
    with pytest.raises(ValueError, match="policy kwargs"):
        cls.load(tmp_path / "model", policy_kwargs={"net_arch": [8]})


@every_algorithm
def test_what_save_keeps_can_be_chosen(algo: str, tmp_path: Path) -> None:
    model = make(algo)
    model.tensorboard_log = "somewhere"
    model.save(tmp_path / "without", exclude=["tensorboard_log"])
    model.save(tmp_path / "with", include=["tensorboard_log"])
    data = {name: load_from_zip_file(tmp_path / name)[0] for name in ("without", "with")}
    assert "tensorboard_log" not in data["without"] and data["with"]["tensorboard_log"] == "somewhere"
    for kept in data.values():
        assert not {"replay_buffer", "_offline_buffers", "env", "policy", "logger"} & kept.keys()


@every_learner
def test_replay_buffers_are_saved_apart(algo: str, tmp_path: Path) -> None:
    model = make(algo, vec_walk(2)).learn(12)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    loaded = type(model).load(tmp_path / "model", env=vec_walk(2))
    assert loaded.replay_buffer.size() == 0
    loaded.load_replay_buffer(tmp_path / "buffer")
    assert loaded.replay_buffer.size() == 6
    for name in ("actions", "rewards", "dones", "timeouts", "observations"):
        np.testing.assert_array_equal(getattr(loaded.replay_buffer, name), getattr(model.replay_buffer, name))
    loaded.learn(4, reset_num_timesteps=False)
    assert loaded.replay_buffer.size() == 8 and loaded._n_updates > model._n_updates


# ------------------------------------------------------------------ parameters


@every_algorithm
def test_parameters_with_optimizers(algo: str, tmp_path: Path) -> None:
    model, other = make(algo).learn(12), make(algo, seed=1)
    given = model.get_parameters()
    assert given.keys() == {"policy", *optimizers(model)}
    with pytest.raises(AssertionError):
        assert_same(parameters(model), parameters(other))
    other.set_parameters(given, exact_match=True)
    assert_same_model(model, other)
    model.save(tmp_path / "model")
    third = make(algo, seed=2)
    third.set_parameters(str(tmp_path / "model"))
    assert_same_model(model, third)
    third.learn(8)


@every_algorithm
def test_parameters_without_optimizers(algo: str) -> None:
    model, other = make(algo).learn(12), make(algo, seed=1)
    policy_alone = {"policy": model.get_parameters()["policy"]}
    before = {name: optimizer.state_dict() for name, optimizer in optimizers(other).items()}
    with pytest.raises(ValueError, match="optimizer"):
        other.set_parameters(policy_alone, exact_match=True)
    other.set_parameters(policy_alone, exact_match=False)
    assert_same(parameters(model), parameters(other))
    for name, optimizer in optimizers(other).items():
        assert_same_state(optimizer.state_dict(), before[name])
    other.learn(8)


@every_algorithm
def test_wrong_parameters(algo: str) -> None:
    model = make(algo)
    given = model.get_parameters()
    name = next(iter(given["policy"]))
    with pytest.raises(ValueError, match="nothing"):
        model.set_parameters({**given, "nothing": {}}, exact_match=False)
    lacking = {key: value for key, value in given["policy"].items() if key != name}
    with pytest.raises(RuntimeError, match=name):
        model.set_parameters({**given, "policy": lacking}, exact_match=True)
    model.set_parameters({**given, "policy": lacking}, exact_match=False)
    wrong = {**given["policy"], name: th.zeros(1, 2, 3)}
    with pytest.raises(RuntimeError, match=name):
        model.set_parameters({**given, "policy": wrong}, exact_match=False)


# ------------------------------------------------------------------ policies and devices


@every_algorithm
def test_policies_travel_alone(algo: str, tmp_path: Path) -> None:
    model = make(algo).learn(10)
    obs = observations(model)
    expected, _ = model.predict(obs, deterministic=True)
    model.policy.save(tmp_path / "policy")
    loaded = type(model.policy).load(tmp_path / "policy", device="cpu")
    pickled = cloudpickle.loads(cloudpickle.dumps(model.policy))
    for policy in (loaded, pickled):
        np.testing.assert_array_equal(policy.predict(obs, deterministic=True)[0], expected)
        action, _ = policy.predict(obs[0])
        assert model.action_space.contains(action)


def devices(model: Any) -> set[str]:
    tensors = [*model.policy.state_dict().values()]
    for optimizer in optimizers(model).values():
        tensors += [value for entry in optimizer.state.values() for name, value in entry.items() if name != "step"]
    return {tensor.device.type for tensor in tensors}


@every_algorithm
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_devices(algo: str, device: str, tmp_path: Path) -> None:
    if device == "cuda" and not th.cuda.is_available():
        pytest.skip("no GPU")
    model = make(algo).learn(10)
    model.save(tmp_path / "model")
    moved = type(model).load(tmp_path / "model", env=Walk(), device=device)
    assert moved.device.type == moved.policy.device.type == device and devices(moved) == {device}
    moved.learn(8, reset_num_timesteps=False)
    moved.save(tmp_path / "moved")
    back = type(model).load(tmp_path / "moved", env=Walk(), device="cpu")
    assert devices(back) == {"cpu"}
    obs = observations(model)
    expected, _ = moved.predict(obs, deterministic=True)
    np.testing.assert_allclose(back.predict(obs, deterministic=True)[0], expected, atol=1e-3)
    moved.policy.to("cpu")
    assert moved.policy.device.type == "cpu"
    np.testing.assert_allclose(moved.policy.predict(obs, deterministic=True)[0], expected, atol=1e-3)


@every_algorithm
@pytest.mark.parametrize("device", ["cuda"])
def test_offline_phase_on_a_gpu(algo: str, device: str) -> None:
    if not th.cuda.is_available():
        pytest.skip("no GPU")
    model = make(algo, device=device, offline_dataset=random_data(Walk())).learn(10)
    assert devices(model) == {device}
