"""Weights without pickle: what they restore, what does not fit, and files that mean harm."""

import json
import pickle
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from algorithms import LEARNERS, PLANNERS, Sampler, assert_same_state, every_algorithm, make, optimizers, random_data
from episodes import in_one_sentence
from gymnasium import spaces
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from stable_baselines3 import SAC
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.vec_env import VecNormalize
from walk import Walk, assert_same, observations, parameters, vec_walk

from modip_sb3.datasets.rollout import collect, load_model
from modip_sb3.weights import read_weights


class Harm:
    """What is unpickled with it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


class Scaled(FlattenExtractor):
    """A features extractor that learns, of somebody's own."""

    def __init__(self, observation_space: spaces.Space, scale: Any = 1.0) -> None:
        super().__init__(observation_space)
        self.scale = th.nn.Parameter(th.tensor(float(scale)))

    def forward(self, obs: th.Tensor) -> th.Tensor:
        return self.scale * super().forward(obs)


def optimizer_states(model: Any) -> list[dict[str, Any]]:
    return [deepcopy(optimizer.state_dict()) for optimizer in optimizers(model).values()]


def description_of(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["modip_sb3"])


def rewrite(path: Path, change: Callable[[dict[str, th.Tensor], dict[str, Any]], None]) -> None:
    tensors, description = load_file(path), description_of(path)
    change(tensors, description)
    save_file(tensors, path, {"modip_sb3": json.dumps(description)})


# ------------------------------------------------------------------ what is restored


@every_algorithm
@pytest.mark.parametrize("kind", ["box", "dict", "discrete"])
def test_a_model_is_rebuilt(algo: str, kind: str, tmp_path: Path) -> None:
    model = make(algo, Walk(kind, low=-2.0)).learn(10)
    path = model.save_weights(tmp_path / "new" / "model")
    assert path == tmp_path / "new" / "model.safetensors" and [*path.parent.iterdir()] == [path]
    rebuilt = type(model).from_weights(tmp_path / "new" / "model", seed=5, device="cpu")
    assert rebuilt.get_env() is None
    assert_same(parameters(model), parameters(rebuilt))
    assert (rebuilt.observation_space, rebuilt.action_space) == (model.observation_space, model.action_space)
    obs = observations(model)
    for inference in ("policy", "planner") if algo in PLANNERS else ("policy",):
        model.inference = rebuilt.inference = inference
        expected, _ = model.predict(obs, deterministic=True)
        np.testing.assert_array_equal(rebuilt.predict(obs, deterministic=True)[0], expected)
    own, new = (m.policy._get_constructor_parameters() for m in (model, rebuilt))
    for name in own.keys() - {"lr_schedule"}:
        assert own[name] == new[name], name


@every_algorithm
def test_learning_goes_on_from_weights(algo: str, tmp_path: Path) -> None:
    env = vec_walk(2)
    data = random_data(env)
    model = make(algo, vec_walk(1), offline_dataset=data).learn(10)
    path = model.save_weights(tmp_path / "model.safetensors")
    settings = {"learning_starts": 2, "buffer_size": 50} if algo in LEARNERS else {}
    settings |= {"train_freq": 4} if algo == "DPPO" else {}
    rebuilt = type(model).from_weights(path, env, batch_size=4, offline_dataset=data, device="cpu", **settings)
    assert rebuilt.batch_size == 4
    before = parameters(rebuilt)
    rebuilt.learn(8)
    assert rebuilt.num_timesteps == 8
    if algo == "DiffusionBC":  # it is cloned already
        assert_same(parameters(rebuilt), before)
    else:
        assert rebuilt._n_updates > 0
        assert rebuilt._n_pretrain_updates == model._n_pretrain_updates
    if "normalizer.mean" in before:
        assert th.equal(parameters(rebuilt)["normalizer.mean"], before["normalizer.mean"])


@every_algorithm
def test_weights_are_loaded_into_a_model(algo: str, tmp_path: Path) -> None:
    model, other = make(algo).learn(10), make(algo, seed=1).learn(8)
    path = model.save_weights(tmp_path / "model")
    states = optimizer_states(other)
    assert other.load_weights(path) is other
    assert_same(parameters(model), parameters(other))
    for before, after in zip(states, optimizer_states(other), strict=True):
        assert_same_state(before, after)
    other.learn(6, reset_num_timesteps=False)
    third = make(algo, seed=2)
    third.save_weights(path)  # over the old file
    assert_same(parameters(other.load_weights(path)), parameters(third))


@pytest.mark.parametrize("algo", ["MODIP", "TDMPC2"])
def test_how_a_model_acts_is_restored_or_chosen(algo: str, tmp_path: Path) -> None:
    model = make(algo, inference="planner", gamma=0.8, planner_kwargs={"num_samples": 5, "num_elites": 2})
    path = model.save_weights(tmp_path / "model")
    cls = type(model)
    rebuilt = cls.from_weights(path)
    assert (rebuilt.inference, rebuilt.gamma) == ("planner", 0.8)
    assert rebuilt.policy.planner_kwargs == model.policy.planner_kwargs
    chosen = cls.from_weights(path, inference="policy", gamma=0.7, policy_kwargs={"num_proposals": 3})
    assert (chosen.inference, chosen.policy.inference, chosen.gamma) == ("policy", "policy", 0.7)
    assert chosen.policy.num_proposals == 3 and chosen.policy.planner_kwargs["gamma"] == 0.7
    own = make(algo, inference="policy", policy_kwargs={"num_proposals": 3}).load_weights(path)
    assert (own.inference, own.policy.num_proposals) == ("policy", 3)


@every_algorithm
def test_classes_of_ones_own_are_named_and_not_imported(algo: str, tmp_path: Path) -> None:
    kwargs = {"features_extractor_class": Scaled, "features_extractor_kwargs": {"scale": 3}}
    model = make(algo, policy_kwargs=kwargs).learn(8)
    path = model.save_weights(tmp_path / "model")
    with pytest.raises(ValueError) as error:
        type(model).from_weights(path)
    in_one_sentence(error, "test_weights.Scaled", "features_extractor_class", "pass policy_kwargs=")
    rebuilt = type(model).from_weights(path, policy_kwargs={"features_extractor_class": Scaled})
    assert_same(parameters(model), parameters(rebuilt))
    assert_same(parameters(make(algo, seed=1, policy_kwargs=kwargs).load_weights(path)), parameters(model))


@every_algorithm
def test_weights_act_where_checkpoints_do(algo: str, tmp_path: Path) -> None:
    model = make(algo).learn(8)
    path = model.save_weights(tmp_path / "model")
    env = VecNormalize(vec_walk(2), training=False)
    loaded = load_model(path, type(model), env)
    assert loaded.get_vec_normalize_env() is env
    assert_same(parameters(loaded), parameters(model))  # type: ignore[arg-type]
    assert collect(loaded, env, num_episodes=2).num_episodes == 2
    with pytest.raises(ValueError) as error:
        load_model(path, SAC, env)
    in_one_sentence(error, str(path), "SAC reads no weights")


def test_a_shared_features_extractor_is_stored(tmp_path: Path) -> None:
    shared = {"features_extractor_class": Scaled, "share_features_extractor": True}
    model = make("RLPD", policy_kwargs=shared).learn(8)
    rebuilt = type(model).from_weights(model.save_weights(tmp_path / "model"), policy_kwargs=shared)
    assert_same(parameters(model), parameters(rebuilt))


def test_what_is_no_plain_value_is_refused(tmp_path: Path) -> None:
    kwargs = {"features_extractor_class": Scaled, "features_extractor_kwargs": {"scale": np.float32(2)}}
    with pytest.raises(ValueError) as error:
        make("MODIP", policy_kwargs=kwargs).save_weights(tmp_path / "model")
    in_one_sentence(error, "features_extractor_kwargs", "float32", "plain values")
    assert not [*tmp_path.iterdir()]


def test_an_old_file_stays_if_a_new_one_cannot_be_written(tmp_path: Path) -> None:
    model = make("RLPD")
    (tmp_path / "model.safetensors" / "inside").mkdir(parents=True)  # a folder in the file's place
    with pytest.raises(OSError):
        model.save_weights(tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


# ------------------------------------------------------------------ what does not fit


def fails(model: Any, path: Path, *parts: str, error_type: type[Exception] = ValueError) -> None:
    """One sentence, and the model is as it was."""
    before, states = parameters(model), optimizer_states(model)
    with pytest.raises(error_type) as error:
        model.load_weights(path)
    in_one_sentence(error, str(path), *parts)
    assert_same(parameters(model), before)
    for old, new in zip(states, optimizer_states(model), strict=True):
        assert_same_state(old, new)


@every_algorithm
def test_weights_of_something_else(algo: str, tmp_path: Path) -> None:
    model = make(algo)
    path = model.save_weights(tmp_path / "model")
    other = "RLPD" if algo == "MODIP" else "MODIP"
    fails(make(other), path, f"are of {algo}", f"the model is a {other}")
    fails(make(algo, Walk(low=-2.0)), path, "for the action_space Box(-1.0", "the model has Box(-2.0")
    fails(make(algo, Walk("dict")), path, "for the observation_space Box", "the model has Dict")
    fails(make(algo, policy_kwargs={"net_arch": [12]}), path, "another architecture", "net_arch=", "has [12]")
    with pytest.raises(ValueError) as error:
        type(model).from_weights(path, Walk("dict"))
    in_one_sentence(error, "for the observation_space Box")
    with pytest.raises(ValueError) as error:
        type(make(other)).from_weights(path)
    in_one_sentence(error, f"are of {algo}")


@pytest.mark.parametrize(
    ("algo", "kwargs", "part"),
    [
        ("MODIP", {"scheduler_kwargs": {"beta_schedule": "linear"}}, "scheduler_kwargs=None"),
        ("MODIP", {"terminal_value": "q"}, "terminal_value='v'"),
        ("RLPD", {"activation_fn": th.nn.Tanh}, "activation_fn=torch.nn.modules.activation.ReLU"),
        ("TDMPC2", {"n_critics": 4}, "n_critics=5"),
        ("DiffusionBC", {"proposal": "gaussian"}, "proposal='diffusion'"),
    ],
)
def test_same_shapes_do_not_make_the_same_architecture(
    algo: str, kwargs: dict[str, Any], part: str, tmp_path: Path
) -> None:
    path = make(algo).save_weights(tmp_path / "model")
    fails(make(algo, policy_kwargs=kwargs), path, "another architecture", part)


def add_tensor(tensors: dict[str, th.Tensor], description: dict[str, Any]) -> None:
    tensors["added"] = th.zeros(2)


def drop_tensor(tensors: dict[str, th.Tensor], description: dict[str, Any]) -> None:
    del tensors["normalizer.mean"]


def double_tensor(tensors: dict[str, th.Tensor], description: dict[str, Any]) -> None:
    tensors["normalizer.mean"] = tensors["normalizer.mean"].double()


def reshape_tensor(tensors: dict[str, th.Tensor], description: dict[str, Any]) -> None:
    tensors["normalizer.mean"] = th.zeros(7)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (add_tensor, "added is float32 [2], but the model has nothing"),
        (drop_tensor, "normalizer.mean is nothing, but the model has float32 [2]"),
        (double_tensor, "normalizer.mean is float64 [2], but the model has float32 [2]"),
        (reshape_tensor, "normalizer.mean is float32 [7], but the model has float32 [2]"),
    ],
)
def test_tensors_that_do_not_fit(change: Any, part: str, tmp_path: Path) -> None:
    model = make("MODIP")
    path = model.save_weights(tmp_path / "model")
    rewrite(path, change)
    fails(model, path, "another architecture", part)
    with pytest.raises(ValueError) as error:
        type(model).from_weights(path)
    in_one_sentence(error, part)


# ------------------------------------------------------------------ damaged and foreign files


def test_damaged_and_foreign_files(tmp_path: Path) -> None:
    model = make("RLPD").learn(8)
    whole = model.save_weights(tmp_path / "whole").read_bytes()
    files = {f"cut-{size}": whole[:size] for size in (0, 4, 8, 100, len(whole) // 2, len(whole) - 1)}
    files |= {"longer": whole + b"\0", "text": b"not tensors at all", "header": b"\xff" * 8 + whole[8:]}
    files |= {"pickle": pickle.dumps(Harm(tmp_path / "owned"))}
    th.save(Harm(tmp_path / "owned"), tmp_path / "torch")
    model.save(tmp_path / "zip")
    files |= {"torch": (tmp_path / "torch").read_bytes(), "zip": (tmp_path / "zip.zip").read_bytes()}
    for name, content in files.items():
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(content)
        fails(model, path, "cannot be read as safetensors", "expected a whole file")
    fails(model, tmp_path / "zip.zip", "cannot be read as safetensors")
    fails(model, tmp_path / "nowhere.safetensors", "no such file", error_type=FileNotFoundError)
    fails(model, tmp_path, "no such file", error_type=FileNotFoundError)
    assert not (tmp_path / "owned").exists()
    save_file({"weight": th.zeros(2)}, tmp_path / "foreign.safetensors", {"format": "pt"})
    fails(model, tmp_path / "foreign.safetensors", "of something else", "['format']", "'modip_sb3'")
    save_file({"weight": th.zeros(2)}, tmp_path / "bare.safetensors")
    fails(model, tmp_path / "bare.safetensors", "of something else")


def test_flipped_bits(tmp_path: Path) -> None:
    model = make("RLPD")
    path = model.save_weights(tmp_path / "model")
    whole, before = path.read_bytes(), parameters(model)
    header = 8 + int.from_bytes(whole[:8], "little")
    rng = np.random.default_rng(0)
    refused = 0
    for position in rng.integers(header, size=200):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        try:
            model.load_weights(path)
        except ValueError as error:
            refused += 1
            assert "\n" not in str(error) and str(path) in str(error)
        assert_same(parameters(model), before)
    assert refused > 150  # of the rest, most are in settings that may differ


@pytest.mark.parametrize(
    "description",
    [
        "{",
        "[]",
        "null",
        "{}",
        "[" * 100_000,
        {"policy_kwargs": None},
        {"policy_kwargs": [1]},
        {"pretrain_updates": "many"},
        {"observation_space": None},
        {"observation_space": {"type": "Box"}},
        {"observation_space": {"type": "Nothing"}},
        {"action_space": {"type": "Box", "shape": [1], "dtype": "O", "low": [0], "high": [1]}},
        {"unknown": 1},
    ],
    ids=lambda description: str(description)[:30],
)
def test_descriptions_that_cannot_be_read(description: Any, tmp_path: Path) -> None:
    model = make("MODIP")
    path = model.save_weights(tmp_path / "model")
    text = description if isinstance(description, str) else json.dumps(description_of(path) | description)
    save_file(load_file(path), path, {"modip_sb3": text})
    fails(model, path, "describes its policy in a way that cannot be read")


@pytest.mark.parametrize(
    ("name", "value", "parts"),
    [
        ("features_extractor_class", {"class": "subprocess.Popen"}, ["subprocess.Popen", "not imported"]),
        ("optimizer_class", {"class": "os.system"}, ["os.system", "not imported"]),
        ("optimizer_class", {"class": ["os.system"]}, ["os.system", "not imported"]),
        ("sample_scheduler", "DiffusionPipeline", ["'DiffusionPipeline' is not a scheduler"]),
        ("denoiser", "transformer", ["denoiser='transformer' is unknown"]),
        ("net_arch", "deep", ["net_arch='deep' is no list of widths"]),
        ("net_arch", {"pi": [-3], "qf": [16]}, ["net_arch['pi'][0]=-3"]),
        ("latent_dim", 2**60, ["a policy that cannot be built"]),
        ("latent_dim", None, ["latent_dim=None is no whole number"]),
        ("unknown", 1, ["unknown ['unknown']"]),
        ("planner_kwargs", [1], ["a policy that cannot be built"]),
        ("planner_kwargs", {}, ["a policy that cannot be built", "gamma"]),
    ],
)
def test_policies_that_cannot_be_built(name: str, value: Any, parts: list[str], tmp_path: Path) -> None:
    model = make("MODIP")
    path = model.save_weights(tmp_path / "model")
    rewrite(path, lambda _, description: description["policy_kwargs"].update({name: value}))
    with pytest.raises(ValueError) as error:
        type(model).from_weights(path)
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)
    assert str(path) in "".join([str(error.value), *getattr(error.value, "__notes__", [])])


@every_algorithm
def test_nothing_is_built_to_read(algo: str, tmp_path: Path) -> None:
    model = make(algo, Sampler(spaces.Box(-np.inf, np.inf, (3,)), spaces.Box(-1, 2, (2, 2), np.float64)))
    tensors, description = read_weights(model.save_weights(tmp_path / "model"))
    assert description.algorithm == algo and description.policy == type(model.policy).__name__
    assert description.action_space == model.action_space and description.observation_space == model.observation_space
    assert tensors.keys() == model.policy.state_dict().keys()
    assert {tensor.device.type for tensor in tensors.values()} == {"cpu"}
