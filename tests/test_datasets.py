"""Offline data in arrays: whole episodes, filters, checks against the environment, and one clear sentence a fault."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from episodes import ACTION_SPACE, OBSERVATION_SPACE, assert_same, in_one_sentence
from gymnasium import spaces

from modip_sb3.datasets import OfflineDataset


def test_sizes(arrays: dict) -> None:
    dataset = OfflineDataset.load(arrays)
    assert (dataset.num_transitions, dataset.num_episodes) == (10, 3)
    assert dataset.episode_ends.tolist() == [4, 5, 9] and dataset.episode_ends.dtype == np.int64
    assert dataset.episode_lengths.tolist() == [5, 1, 4]
    rewards = arrays["rewards"].astype(np.float64)
    np.testing.assert_allclose(dataset.episode_returns, [rewards[:5].sum(), rewards[5], rewards[6:].sum()])
    assert OfflineDataset.load(dataset) is dataset
    dataset.check(OBSERVATION_SPACE, ACTION_SPACE, min_length=5)


def test_arrays_are_kept_and_not_modified(arrays: dict) -> None:
    arrays["truncations"][-1] = False
    before = {name: values.copy() for name, values in arrays.items()}
    for values in arrays.values():
        values.flags.writeable = False
    dataset = OfflineDataset.load(arrays)
    for name in ("observations", "actions", "rewards", "final_observations"):
        assert np.shares_memory(getattr(dataset, name), arrays[name])
    for name, values in before.items():
        np.testing.assert_array_equal(arrays[name], values)


def test_floats_become_float32_and_integers_stay(arrays: dict) -> None:
    wide = {name: values.astype(np.float64) for name, values in arrays.items()}
    assert_same(OfflineDataset.load(wide), OfflineDataset.load(arrays))
    image = arrays | {name: arrays[name].astype(np.uint8) for name in ("observations", "final_observations")}
    assert np.asarray(OfflineDataset.load(image).observations).dtype == np.uint8


def test_unfinished_episode_is_truncated_and_termination_wins(arrays: dict) -> None:
    arrays["truncations"] = np.zeros(10, bool)
    arrays["truncations"][[4, 5]] = True  # 4 is a termination as well
    dataset = OfflineDataset.load(arrays)
    assert np.flatnonzero(dataset.terminations).tolist() == [4]
    assert np.flatnonzero(dataset.truncations).tolist() == [5, 9]


def test_without_next_observations_only_truncated_episodes_lose_a_transition(arrays: dict) -> None:
    del arrays["final_observations"]
    dataset = OfflineDataset.load(arrays)
    kept = [0, 1, 2, 3, 4, 6, 7, 8]  # row 5 was an episode of its own, row 9 the last one of a truncated episode
    np.testing.assert_array_equal(dataset.observations, arrays["observations"][kept])
    np.testing.assert_array_equal(dataset.actions, arrays["actions"][kept])
    np.testing.assert_array_equal(dataset.final_observations, arrays["observations"][[4, 9]])
    assert dataset.terminations.tolist() == [False] * 4 + [True] + [False] * 3
    assert dataset.truncations.tolist() == [False] * 7 + [True]


@pytest.mark.parametrize("seed", range(20))
def test_any_flags_give_whole_episodes(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modip_sb3.datasets.columns.BLOCK", 7)  # several blocks also for few rows
    rng = np.random.default_rng(seed)
    num = int(rng.integers(1, 40))
    flags = rng.random((2, num)) < 0.2
    rows = np.arange(num, dtype=np.float32)[:, None]
    given = dict(observations=rows, actions=rows, rewards=rows[:, 0], terminations=flags[0], truncations=flags[1])
    ends = flags[0] | flags[1]
    ends[-1] = True

    known = OfflineDataset.from_arrays(**given, next_observations=rows + 1)
    np.testing.assert_array_equal(known.episode_ends, np.flatnonzero(ends))
    np.testing.assert_array_equal(known.terminations, flags[0])
    np.testing.assert_array_equal(known.final_observations, rows[ends] + 1)

    lost = ends & ~flags[0]
    if lost.all():
        with pytest.raises(ValueError, match="no transitions"):
            OfflineDataset.from_arrays(**given)
        return
    dataset = OfflineDataset.from_arrays(**given)
    np.testing.assert_array_equal(dataset.observations, rows[~lost])
    last = np.asarray(dataset.observations)[dataset.episode_ends, 0]
    expected = last + dataset.truncations[dataset.episode_ends]
    np.testing.assert_array_equal(np.asarray(dataset.final_observations)[:, 0], expected)


# -------------------------------------------------------------------- faults


def set_value(name: str, index: Any, value: float) -> Callable[[dict], None]:
    def change(arrays: dict) -> None:
        arrays[name][index] = value

    return change


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (set_value("observations", (3, 1), np.nan), ["observations hold 1 NaN or infinite values", "[3, 1]"]),
        (set_value("final_observations", (2, 0), np.inf), ["final_observations hold 1 NaN", "[2, 0]"]),
        (set_value("actions", slice(2, 4), np.nan), ["actions hold 2 NaN", "[2, 0]"]),
        (set_value("rewards", 7, -np.inf), ["rewards hold 1 NaN", "[7]"]),
        (set_value("actions", slice(0, 3), 2.5), ["3 of 10 actions are outside", "to 2.5; clip or rescale"]),
        (lambda a: a.update(observations=a["observations"][:, :2], final_observations=a["final_observations"][:, :2],
                            env_id="Walker2d-v5"),
         ["observations have shape (2,), expected (3,)", "recorded on Walker2d-v5"]),
        (lambda a: a.update(actions=np.zeros((10, 2))), ["actions have shape (2,), expected (1,)"]),
        (lambda a: a.update({k: {"state": a[k]} for k in ("observations", "final_observations")}),
         ["the keys ['state'], expected none"]),
    ],
)  # fmt: skip
def test_data_that_does_not_fit_the_environment(arrays: dict, change: Callable[[dict], None], parts: list[str]) -> None:
    change(arrays)
    with pytest.raises(ValueError) as error:
        OfflineDataset.load(arrays).check(OBSERVATION_SPACE, ACTION_SPACE, 2)
    in_one_sentence(error, "Offline dataset arrays: ", *parts)


def test_check_says_which_length_is_missing_and_tolerates_rounding(arrays: dict) -> None:
    arrays["actions"][0] = 2.003
    dataset = OfflineDataset.load(arrays)
    dataset.check(OBSERVATION_SPACE, ACTION_SPACE, 5)
    with pytest.raises(ValueError) as error:
        dataset.check(OBSERVATION_SPACE, ACTION_SPACE, 6)
    in_one_sentence(error, "longest episode has 5 steps, expected at least 6")
    with pytest.raises(ValueError) as error:
        dataset.check(spaces.Dict({"state": OBSERVATION_SPACE}), ACTION_SPACE, 1)
    in_one_sentence(error, "keys none (one array), expected ['state']")


@pytest.mark.parametrize(
    ("changed", "parts"),
    [
        ({"actions": np.zeros((9, 1))}, ["one row per transition", "'actions': 9", "'rewards': 10"]),
        ({"rewards": np.zeros((10, 1))}, ["rewards have shape (10, 1), expected (10,)"]),
        ({"rewards": 1.0}, ["'rewards': None"]),
        ({"rewards": np.array(["a"] * 10)}, ["rewards hold values of type <U1, expected numbers"]),
        ({"observations": np.array([None] * 10)}, ["observations hold values of type object"]),
        ({"final_observations": np.array([["a"]] * 3)}, ["final_observations hold values of type <U1"]),
        ({"terminations": np.full(10, 0.5)}, ["terminations hold values from 0.5 to 0.5, expected only 0 and 1"]),
        ({"final_observations": np.zeros((2, 3))}, ["final_observations have shape (2, 3), expected (3, 3)"]),
        ({"next_observations": np.zeros((10, 3))}, ["final_observations or next_observations, not both"]),
        ({"reward": np.zeros(10)}, ["unknown ['reward']"]),
    ],
)
def test_arrays_that_do_not_fit_together(arrays: dict, changed: dict, parts: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        OfflineDataset.load(arrays | changed)
    in_one_sentence(error, *parts)


def test_empty_and_incomplete_arrays(arrays: dict) -> None:
    with pytest.raises(ValueError) as error:
        OfflineDataset.load({name: values[:0] for name, values in arrays.items()})
    in_one_sentence(error, "holds no transitions")
    del arrays["rewards"]
    with pytest.raises(ValueError) as error:
        OfflineDataset.load(arrays)
    in_one_sentence(error, "lacks ['rewards']")
    with pytest.raises(ValueError) as error:
        OfflineDataset.load(3)  # type: ignore[arg-type]
    in_one_sentence(error, "of type int")


def test_episode_marks_are_checked(arrays: dict) -> None:
    with pytest.raises(ValueError) as error:
        OfflineDataset(**(arrays | {"truncations": np.zeros(10, bool)}))
    in_one_sentence(error, "exactly one of terminations and truncations")
