"""
Generated input: the bad is answered with one sentence before the first environment step, the good trains.

The quick profile of conftest.py runs by default; ``pytest tests/test_fuzz.py --hypothesis-profile=full`` tries over
1,000 bad and 200 good ones, and ``--hypothesis-show-statistics`` shows what they were and how they were answered.
"""

import inspect
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import strategies as settings_of
import strategies_data as data_of
from algorithms import ALGORITHMS, every_algorithm, random_data
from gymnasium import spaces
from hypothesis import assume, event, given, note, settings
from hypothesis import strategies as st
from stable_baselines3.common.vec_env import DummyVecEnv

from modip_sb3.datasets import OfflineDataset, save_d4rl, save_minari, save_robomimic

BOX_ENV = data_of.Episodes(spaces.Box(-5, 5, (2,)), spaces.Box(-2, 1, (1,)))
BY_SB3 = (
    "Nested observation spaces|The algorithm only supports|finite lower and upper bound|Policy .* unknown|"
    "must use only one env when doing episodic training"
)
OF_LIBRARIES = (
    "shapes cannot be|mat1|broadcast|NoneType|unsupported operand|not subscriptable|out of range|"
    "not callable|not iterable|unhashable|has no attribute|could not convert|"
    "inhomogeneous|object is not|ambiguous|keywords must be strings"
)


def build(algo: str, env: Any, **kwargs: Any) -> Any:
    """A small model; dictionaries are added to the small ones, everything else takes their place."""
    cls, small = ALGORITHMS[algo]
    arguments = {"batch_size": 8, "seed": 0, "device": "cpu"} | small | kwargs
    for name in ("policy_kwargs", "planner_kwargs"):
        if isinstance(kwargs.get(name), dict) and name in small:
            arguments[name] = small[name] | kwargs[name]
    if algo == "DiffusionBC" and "offline_dataset" not in kwargs:
        arguments["offline_dataset"] = random_data(env)
    is_dict = isinstance(env.observation_space, spaces.Dict)
    return cls("MultiInputPolicy" if is_dict else "MlpPolicy", env, **arguments)


def refused(call: Callable[[], Any], env: data_of.Episodes, kind: str) -> None:
    """That the call raises an error of a known type, with a readable sentence, before any step of the environment."""
    env.total = 0
    with pytest.raises(Exception) as caught:
        call()
    message, name = str(caught.value), caught.type.__name__
    note(f"{name}: {message}")
    event(f"{kind}: {name}")
    assert env.total == 0, "an environment step was taken"
    if re.search(BY_SB3, message) and name in ("AssertionError", "NotImplementedError", "ValueError"):
        return
    assert name in ("ValueError", "FileNotFoundError"), f"{name}: {message}"
    assert re.fullmatch(r"\S+ .+ .+\.", message), f"no sentence: {message!r}"
    assert not re.search(OF_LIBRARIES, message), f"not our words: {message!r}"


# ------------------------------------------------------------------ bad input


@every_algorithm
@given(st.data())
def test_bad_settings(algo: str, data: st.DataObject) -> None:
    bad = data.draw(settings_of.bad_settings(algo))
    name, value = next(iter(bad.items()))
    place = f"policy_kwargs, {next(iter(value))}" if isinstance(value, dict) and value else name
    event(f"{algo}: {place}")
    refused(lambda: build(algo, BOX_ENV, **bad), BOX_ENV, "setting")


@given(settings_of.contradictions())
def test_contradictions(drawn: tuple[str, dict[str, Any]]) -> None:
    algo, contradiction = drawn
    refused(lambda: build(algo, BOX_ENV, **contradiction), BOX_ENV, "contradiction")


@given(st.sampled_from(list(ALGORITHMS)), data_of.BAD_ENVIRONMENTS)
def test_bad_spaces(algo: str, env: data_of.Episodes) -> None:
    assume(algo != "RLPD" or "255" not in str(env.observation_space))  # SAC, from which it is derived, takes images
    offline = {"offline_dataset": {}} if algo == "DiffusionBC" else {}  # is looked at later
    refused(lambda: build(algo, env, **offline).learn(1), env, type(env.observation_space).__name__)


def learn_from(source: Any, env: data_of.Episodes, algo: str = "MODIP") -> None:
    build(algo, env, offline_dataset=source, pretrain_steps=1).learn(1)


@given(st.data())
def test_bad_arrays(data: st.DataObject) -> None:
    env = data.draw(data_of.ENVIRONMENTS)
    arrays = data.draw(data_of.bad_arrays(env))
    refused(lambda: learn_from(arrays, env), env, "arrays")


@given(st.data())
def test_bad_columns_of_a_dataset(data: st.DataObject) -> None:
    """``OfflineDataset`` itself takes columns, too."""
    arrays = data.draw(data_of.arrays(BOX_ENV, "final"))
    name = data.draw(st.sampled_from(data_of.COLUMNS))
    arrays[name] = data.draw(data_of.bad_column(name, arrays[name]))
    refused(lambda: learn_from(OfflineDataset(**arrays), BOX_ENV), BOX_ENV, "columns")


@given(st.data())
def test_bad_sources(data: st.DataObject) -> None:
    source = data.draw(data_of.bad_sources(BOX_ENV))
    refused(lambda: learn_from(source, BOX_ENV), BOX_ENV, "source")


SAVE = {
    "d4rl": lambda dataset, folder: save_d4rl(dataset, folder / "data.hdf5"),
    "robomimic": lambda dataset, folder: save_robomimic(dataset, folder / "low_dim.hdf5"),
    "minari": lambda dataset, folder: save_minari(dataset, "fuzz-v0", BOX_ENV, folder),
}
# what is missed by nobody: optional, written for others, or about other things
UNREAD = {"d4rl": ("next_observations",), "robomimic": ("terminals", "dones", "next_obs"), "minari": ()}


@pytest.mark.parametrize("form", SAVE)
@given(st.data())
def test_damaged_files(form: str, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    dataset = OfflineDataset.from_arrays(**data.draw(data_of.arrays(BOX_ENV)))
    path = SAVE[form](dataset, tmp_path_factory.mktemp(form))
    damaged = path / "data" / "main_data.hdf5" if form == "minari" else path
    kind = data.draw(data_of.damage(damaged, UNREAD[form]))
    refused(lambda: learn_from(path, BOX_ENV), BOX_ENV, f"{form}, {kind}")


@given(st.data())
def test_bad_replay_buffers(data: st.DataObject) -> None:
    """Empty, of another environment, with numbers that are not finite, or with episodes that are all too short."""
    env = data.draw(data_of.ENVIRONMENTS)
    arrays = data.draw(data_of.arrays(env, "next"))
    kind = data.draw(st.sampled_from(["empty", "other", "not finite", "short"]))
    if kind == "short":
        arrays["truncations"] = ~arrays["terminations"]
    buffer = data_of.replay_buffer(env, arrays)
    if kind == "empty":
        buffer.reset()
    elif kind == "not finite":
        column = data.draw(st.sampled_from([buffer.rewards, buffer.actions]))
        column[data.draw(st.integers(0, len(arrays["rewards"]) - 1))] = data.draw(st.sampled_from([np.nan, np.inf]))
    elif kind == "other":
        env = data_of.Episodes(spaces.Box(-1, 1, (8,)), spaces.Box(-1, 1, (5,)))
    refused(lambda: learn_from(buffer, env), env, f"replay buffer, {kind}")


# ------------------------------------------------------------------ good input


@every_algorithm
@settings(max_examples=settings().max_examples * 5 // 8)
@given(st.data())
def test_good_input_trains(algo: str, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("good")
    env = data.draw(data_of.ENVIRONMENTS)
    is_dict = isinstance(env.observation_space, spaces.Dict)
    arguments = data.draw(settings_of.good_settings(algo))
    if is_dict:
        arguments["policy_kwargs"].pop("features_extractor_class", None)  # the one drawn is for Box observations
        arguments |= {"n_steps": 1} if algo == "RLPD" else {}  # SB3's n-step buffer takes no Dict
    if algo == "DiffusionBC" or data.draw(st.booleans()):
        arguments["offline_dataset"] = data.draw(data_of.good_sources(env, folder))
    event(f"{algo} on {type(env.observation_space).__name__} from {type(arguments.get('offline_dataset')).__name__}")
    model = build(algo, env, **arguments)
    model.learn(50)
    assert env.total >= 50
    assert all(parameter.isfinite().all() for parameter in model.policy.state_dict().values())
    obs = env.observation_space.sample()
    action, _ = model.predict(obs, deterministic=True)
    assert env.action_space.contains(action)
    model.save(folder / "model")
    loaded = type(model).load(folder / "model", env=DummyVecEnv([lambda: env]))
    np.testing.assert_array_equal(loaded.predict(obs, deterministic=True)[0], action)


@given(st.data())
def test_schedulers_work_or_are_refused(data: st.DataObject) -> None:
    """All that diffusers has, of which many are for other data."""
    names = {f"{phase}_scheduler": data.draw(st.sampled_from(settings_of.SCHEDULERS)) for phase in ("train", "sample")}
    known = {name: setting.good | setting.bad for name, setting in settings_of.SCHEDULER_KWARGS.items()}
    kwargs = data.draw(st.fixed_dictionaries({}, optional=known))
    try:
        model = build("DiffusionBC", BOX_ENV, policy_kwargs=names | {"scheduler_kwargs": kwargs})
    except ValueError as error:
        assert re.fullmatch(r"\S+ .+ .+\.", str(error)), str(error)
        event("refused")
    else:
        model.pretrain(1)
        assert np.isfinite(model.predict(np.zeros(2, np.float32))[0]).all()
        event("works")


@every_algorithm
def test_every_setting_is_tried(algo: str) -> None:
    arguments = set(inspect.signature(ALGORITHMS[algo].cls).parameters)
    others = {"policy", "env", "offline_dataset", "policy_kwargs", "tensorboard_log", "device", "_init_setup_model"}
    assert set(settings_of.SETTINGS[algo]) == arguments - others
    policy_class = ALGORITHMS[algo].cls.policy_aliases["MlpPolicy"]
    known = set(inspect.signature(policy_class).parameters) - {"kwargs"}
    spaces_and_rate = {"observation_space", "action_space", "lr_schedule", "normalize_images"}
    assert known - spaces_and_rate <= set(settings_of.POLICY_KWARGS[algo])
